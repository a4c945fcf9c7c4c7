"""The number of micro-batches: tried, remembered, and kept by a run that goes on."""

import json

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.training import micro_batches
from behrt_jax.training.micro_batches import candidates, even_rows, fastest, likely_parts, remembered


@given(st.integers(1, 500), st.integers(8, 1024), st.integers(16, 4096))
def test_likely_parts_fit_the_cache_and_are_no_more_than_rows(rows, row_length, ffn_size):
    parts = likely_parts(rows, row_length, ffn_size, "cpu")
    assert 1 <= parts <= rows
    rows_of_part = -(-rows // parts)
    assert rows_of_part == 1 or rows_of_part * row_length * ffn_size * 4 <= micro_batches.CACHED_BYTES
    assert likely_parts(rows, row_length, ffn_size, "gpu") == 1


@given(st.integers(1, 500), st.integers(1, 500))
def test_candidates_are_few_different_and_waste_less_than_a_part(rows, likely):
    found = candidates(rows, min(likely, rows))
    assert found == sorted(set(found)) and 1 <= len(found) <= micro_batches.MOST_CANDIDATES
    assert found[0] == 1
    for parts in found:
        part = -(-rows // parts)
        assert (parts - 1) * part < rows <= parts * part


@given(st.integers(1, 5000), st.integers(1, 2048))
def test_rows_on_an_accelerator_are_even_and_few_of_them_empty(rows, row_length):
    multiple = even_rows(rows, row_length, "gpu")
    assert multiple & (multiple - 1) == 0  # a power of two
    filled = -(-rows // multiple) * multiple
    assert filled <= rows * (1 + micro_batches.MOST_EMPTY)
    doubled = -(-rows // (2 * multiple)) * 2 * multiple
    even = filled * row_length % micro_batches.EVEN_TOKENS == 0
    assert even or doubled > rows * (1 + micro_batches.MOST_EMPTY)
    assert even_rows(rows, row_length, "cpu") == 1


def test_even_rows_of_the_named_configurations():
    assert [even_rows(rows, 200, "gpu") for rows in (123, 10, 1)] == [64, 2, 1]
    assert [even_rows(128, length, "gpu") for length in (512, 1024)] == [1, 1]


def test_the_fastest_that_fits_is_taken(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(micro_batches.time, "perf_counter", lambda: clock[0])
    seconds = {1: None, 2: 3.0, 4: 1.0, 8: 2.0}
    said = []

    def make_trial(parts):
        def trial():
            if seconds[parts] is None:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            clock[0] += seconds[parts]
            return jnp.zeros(())

        return trial

    assert fastest([1, 2, 4, 8], make_trial, said.append) == 4
    assert len(said) == 1 and "4 (measured 2: 3,000 ms, 4: 1,000 ms" in said[0]
    with pytest.raises(RuntimeError, match="does not fit the memory"):
        fastest([1], make_trial, said.append)

    def broken(parts):
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        fastest([1, 2], broken, said.append)


def test_an_answer_is_remembered_for_its_own_key(tmp_path):
    file = tmp_path / "folder" / "answers.json"
    asked = []

    def find(answer):
        return lambda: asked.append(answer) or answer

    assert remembered(file, {"rows": 3}, find(5)) == 5
    assert remembered(file, {"rows": 3}, find(6)) == 5
    assert remembered(file, {"rows": 4}, find(7)) == 7
    assert remembered(file, {"rows": 3}, find(8)) == 5
    assert asked == [5, 7]
    file.write_text("no JSON")
    assert remembered(file, {"rows": 3}, find(9)) == 9
    assert list(json.loads(file.read_text()).values()) == [9]
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert remembered(blocked / "answers.json", {}, find(3)) == 3  # a folder that cannot be made
