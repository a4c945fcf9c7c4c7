"""What an evaluation says follows from its figures; the page is whole, and hostile names stay text."""

import copy

import pytest

from behrt_jax.tracking.evaluation_plots import (
    draw_comparison,
    draw_precision_recall,
    draw_roc,
    draw_survival,
    plot_evaluation,
)
from behrt_jax.tracking.evaluation_report import (
    evaluation_tables,
    figure_text,
    plain_words,
    summary_text,
    verdict,
    write_evaluation_report,
)
from tests.tracking.test_report import Page


def entry(value, low=None, high=None, **more):
    return {"value": value, "low": low, "high": high, **more}


def record_of(positives=300, **more):
    figures = {
        "auroc": entry(0.8, 0.75, 0.85),
        "average_precision": entry(0.4, 0.3, 0.5),
        "brier": entry(0.1, 0.09, 0.11),
        "prevalence": entry(0.3, 0.28, 0.32),
        "mean_prediction": entry(0.3, 0.29, 0.31),
        "calibration_slope": entry(1.0, 0.9, 1.1),
        "calibration_intercept": entry(0.0, -0.1, 0.1),
    }
    curve = [{"threshold": t / 100, "model": 0.3 - t / 100, "treat_all": 0.3 - t / 50} for t in range(1, 100)]
    curves = {"false_positive_rate": [0.0, 0.2, 1.0], "recall": [0.0, 0.7, 1.0], "precision": [1.0, 0.6, 0.3]}
    bins = [
        {"examples": 10, "predicted": p, "observed": p, "low": p - 0.1, "high": p + 0.1} for p in (0.2, 0.5)
    ]
    model = {"figures": figures, "curves": curves, "decision_curve": curve, "reliability": bins}
    return {
        "kind": "binary",
        "task": {"model": "runs/x", "split": "held_out", "threshold": 0.25, "counts": {"empty_histories": 3}},
        "counts": {"examples": 1000, "subjects": 400, "positives": positives, "positive_subjects": 90},
        "bootstrap": {"draws": 1000, "seed": 0, "unit": "subject", "level": 0.95},
        "model": model,
        "baselines": [
            baseline("logistic regression", entry(0.05, 0.01, 0.09, ahead="model", better="model"))
        ],
        "groups": {},
        "ensemble": None,
        "without_baselines": None,
        "without_groups": None,
        **more,
    }


def baseline(name, auroc, **others):
    figures = {
        "auroc": entry(0.75, 0.7, 0.8),
        "brier": entry(0.12, 0.1, 0.13),
        "average_precision": entry(0.3),
    }
    return {
        "name": name,
        "note": "how",
        "figures": figures,
        "model_less_baseline": {"auroc": auroc, **others},
    }


def words(record):
    return "\n".join(plain_words(record))


def test_a_sound_evaluation_says_no_more_than_it_must():
    assert plain_words(record_of()) == [
        "The model's AUROC is 0.800 (0.750 to 0.850); in brackets the 95 % interval.",
        "The model is better than logistic regression by AUROC (model 0.800 and baseline 0.750, difference "
        "0.050 (0.010 to 0.090)).",
        "Acting on the model has more net benefit than treating all or nobody at 29 of the 99 thresholds "
        "from 1 % to 99 %, between 1% and 29% (decision curve).",
        "F1, precision, recall and specificity are those of the threshold 0.25, settled before.",
        "3 examples had no known event and were predicted from the age alone.",
        "The figures hold for subjects and records like these; another hospital needs its own.",
    ]


def test_who_is_ahead_is_said_plainly():
    lost = entry(-0.02, -0.03, -0.01, ahead="baseline", better="baseline")
    brier = entry(0.02, 0.01, 0.03, ahead="baseline", better="baseline")
    said = plain_words(record_of(baselines=[baseline("boosting", lost, brier=brier)]))
    assert [line for line in said if "boosting" in line] == [
        "THE BASELINE WINS: boosting is better than the model by AUROC (model 0.800 and baseline 0.750, "
        "difference -0.020 (-0.030 to -0.010)); by Brier score (model 0.100 and baseline 0.120, difference "
        "0.020 (0.010 to 0.030))."
    ]
    even = entry(-0.01, -0.03, 0.02, ahead="unclear", better="baseline")
    said = words(record_of(baselines=[baseline("boosting", even, brier=brier)]))
    assert "The model and boosting are not told apart (the baseline leads) by AUROC (model 0.800 and" in said
    assert "THE BASELINE WINS: boosting is better than the model by Brier score (model 0.100 and" in said
    alone = entry(0.1, ahead="unclear", better="model")
    assert "are not told apart (no interval) by AUROC" in words(record_of(baselines=[baseline("x", alone)]))
    unfitted = {"name": "x", "note": "Not fitted: why.", "figures": None}
    assert "Baseline x: Not fitted: why." in words(record_of(baselines=[unfitted]))
    assert "No baseline was run: because." in words(record_of(baselines=[], without_baselines="because."))


def test_nobody_wins_by_nothing():
    even = entry(0.0, -0.01, 0.01, ahead="unclear", better="equal")
    nothing = entry(0.00021, 0.0001, 0.0003, ahead="baseline", better="baseline")
    record = record_of(baselines=[baseline("boosting", even, brier=nothing)])
    assert "BASELINE" not in words(record)
    table = next(table for table in evaluation_tables(record) if table.title.startswith("Model less"))
    assert [row[2:] for row in table.rows][1] == ("0.00021 (0.0001 to 0.0003)", "not told apart")
    # An error in units of its own may be small, and the victory real.
    ridge = {**baseline("ridge", even), "figures": {"mae": entry(0.00019)}}
    record = record_of(baselines=[{**ridge, "model_less_baseline": {"mae": nothing}}])
    record["model"]["figures"]["mae"] = entry(0.0004)
    table = next(table for table in evaluation_tables(record) if table.title.startswith("Model less"))
    assert table.rows[0][3] == "BASELINE"


def test_an_auroc_too_good_to_be_true_is_suspected_first():
    record = record_of()
    assert "LEAKAGE" not in words(record)
    record["model"]["figures"]["auroc"] = entry(0.9912, 0.98, 1.0)
    assert plain_words(record)[1].startswith("SUSPECT LEAKAGE: an AUROC of 0.9912.")


def test_with_one_class_nobody_wins():
    brier = entry(0.02, 0.01, 0.03, ahead="baseline", better="baseline")
    record = record_of(positives=0)
    record["model"]["figures"]["auroc"] = entry(None, reason="one class only")
    only = baseline("boosting", None)
    record["baselines"] = [{**only, "model_less_baseline": {"brier": brier}}]
    assert "boosting" not in words(record)
    assert plain_words(record)[0] == "There is no AUROC: one class only."


def test_few_labels_of_either_class_are_said():
    assert "With 9 positive labels of 90 subjects the intervals are wide" in words(record_of(positives=9))
    assert "With 5 negative labels the intervals are wide" in words(record_of(positives=995))
    assert "intervals are wide" not in words(record_of(positives=100))


def test_calibration_and_useless_thresholds_are_said():
    record = record_of()
    record["model"]["figures"]["calibration_slope"] = entry(0.5, 0.4, 0.6)
    record["model"]["figures"]["calibration_intercept"] = entry(-0.5, -0.7, -0.3)
    record["model"]["figures"]["mean_prediction"] = entry(0.4, 0.39, 0.41)
    for row in record["model"]["decision_curve"]:
        row["model"] = row["treat_all"]
    said = words(record)
    assert (
        "too extreme: risks lie nearer to the mean (calibration slope 0.500 (0.400 to 0.600), right is 1)"
        in said
    )
    assert "On average the predicted risk is too high: 40.0% predicted, 30.0% found." in said
    assert "At no threshold is acting on the model better than treating all or nobody" in said


def test_the_verdict_is_good_only_where_the_model_is_ahead_of_every_baseline():
    ahead = entry(0.05, 0.01, 0.09, ahead="model", better="model")
    even = entry(-0.01, -0.03, 0.02, ahead="unclear", better="baseline")
    lost = entry(-0.02, -0.03, -0.01, ahead="baseline", better="baseline")
    two = [baseline("prevalence", ahead), baseline("boosting", ahead)]
    said, tone = verdict(record_of(baselines=two))
    assert said.endswith("By it the model is better than each baseline.") and tone == "good"
    assert verdict(record_of(positives=20, baselines=two)) == (said, "plain")  # too few to tell
    said, tone = verdict(record_of(baselines=[two[0], baseline("boosting", even)]))
    assert said.endswith("By it the model is not told apart from boosting.") and tone == "doubt"
    said, tone = verdict(record_of(baselines=[two[0], baseline("x", even), baseline("boosting", lost)]))
    assert said.endswith("By it THE BASELINE WINS: boosting.") and tone == "doubt"
    assert verdict(record_of(baselines=[]))[1] == "plain"
    leaking = record_of(baselines=two)
    leaking["model"]["figures"]["auroc"] = entry(0.9999, 0.999, 1.0)
    assert verdict(leaking)[1] == "bad"


def test_predictions_of_other_splits_are_said_to_flatter():
    assert "These are predictions of the split tuning" in words(record_of(task={"split": "tuning"}))


def test_figures_read_as_text():
    assert figure_text(entry(0.81234, 0.79, 0.8333)) == "0.812 (0.790 to 0.833)"
    assert figure_text(entry(0.5)) == "0.500 (no interval)"
    assert figure_text(entry(None)) == figure_text(None) == "none"
    assert figure_text(entry(12345.6, 0, 1)) == "12,346 (0.000 to 1.000)"


def test_tables_without_rows_are_left_out_and_small_groups_have_a_reason():
    groups = {
        "sex": [
            {"group": "F", "counts": {"examples": 900, "subjects": 350, "positives": 290},
             "figures": record_of()["model"]["figures"]},
            {"group": "M", "counts": {"examples": 9, "subjects": 5, "positives": 1}, "figures": None,
             "reason": "too small: 1 positives"},
        ]
    }  # fmt: skip
    tables = {table.title: table for table in evaluation_tables(record_of(groups=groups, baselines=[]))}
    assert list(tables) == ["Figures", "By sex"]
    rows = tables["By sex"].rows
    assert rows[0][:5] == ("F", 900, 350, 290, "0.800 (0.750 to 0.850)")
    assert rows[1][-1] == "too small: 1 positives"
    assert all(len(row) == len(tables["By sex"].columns) for row in rows)


def test_the_page_holds_words_tables_and_pictures_and_nothing_else(tmp_path):
    nasty = "<script>alert(1)</script>"
    record = record_of(task={"model": nasty, "split": "held_out"})
    pictures = plot_evaluation(record, tmp_path / "plots")
    assert [path.stem for path in pictures] == [
        "roc", "precision_recall", "reliability", "decision_curve", "comparison",
    ]  # fmt: skip
    write_evaluation_report(tmp_path / "report.html", f"Evaluation of {nasty}", record, pictures)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 5
    assert "script" not in page.tags
    assert nasty in page.text
    for sentence in plain_words(record):
        assert sentence in page.text
    assert "\x1b" not in summary_text(record_of(task={"model": "\x1b[31m"}))


@pytest.fixture
def axes():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def test_curves_are_those_of_the_model_and_of_baselines_that_have_some(axes):
    record = record_of()
    other = copy.deepcopy(record["model"])
    other["curves"]["recall"] = [0.0, 0.4, 1.0]
    record["baselines"] = [{**record["baselines"][0], **other}]
    assert draw_roc(axes, record)
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["model (0.800)"] == [0.0, 0.7, 1.0]
    assert lines["logistic regression (0.800)"] == [0.0, 0.4, 1.0]
    axes.clear()
    record["model"]["curves"] = None
    assert not draw_roc(axes, record)
    assert not draw_precision_recall(axes, record)


def test_the_comparison_has_a_row_for_each_that_has_the_figure(axes):
    record = record_of()
    record["baselines"].append({"name": "x", "note": "", "figures": None})
    assert draw_comparison(axes, record)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["model", "logistic regression"]
    record["model"]["figures"]["auroc"] = entry(None)
    assert not draw_comparison(axes, record)


def test_survival_is_drawn_beside_what_was_observed(axes):
    rows = [
        {"days": 30.0, "predicted": 0.9, "observed": 0.8},
        {"days": 60.0, "predicted": 0.7, "observed": None},
    ]
    assert draw_survival(axes, {"model": {"by_edge": rows}})
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"mean prediction": [1.0, 0.9, 0.7], "observed (Kaplan-Meier)": [1.0, 0.8]}
