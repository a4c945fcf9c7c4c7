from behrt_jax.diagnosis.finding import (
    Finding,
    by_severity,
    from_json,
    has_error,
    one_line,
    summary_line,
    table_rows,
    to_json,
)

INFO = Finding("c", "info", "Seen.", "Why.", "Mend.", "after")
WARNING = Finding("b", "warning", "Seen.", "Why.", "Mend.")
ERROR = Finding("a", "error", "Seen.", "Why.", "Mend.", "before")


def test_errors_come_first_and_json_gives_the_same_back():
    assert by_severity([INFO, WARNING, ERROR]) == [ERROR, WARNING, INFO]
    assert [row[:2] for row in table_rows([INFO, ERROR])] == [("error", "a"), ("info", "c")]
    assert from_json(to_json([INFO, ERROR])) == [ERROR, INFO]
    assert from_json([{**to_json([INFO])[0], "of_a_newer_version": 1}]) == [INFO]


def test_counts_and_lines():
    assert has_error([WARNING, ERROR])
    assert not has_error([WARNING, INFO])
    assert summary_line([ERROR, WARNING, WARNING]) == "1 error, 2 warnings, 0 infos"
    assert one_line(ERROR) == "Error [a]: Seen. Why. Mend."
    assert one_line(INFO) == "Info [c]: Seen."
