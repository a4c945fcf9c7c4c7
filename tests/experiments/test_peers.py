"""The comparison with models of Hugging Face: the same masked codes for all, and what is counted."""

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.vocabulary import MASK
from behrt_jax.errors import InputError
from behrt_jax.training.masking import MaskedCodes, mask_codes
from experiments.benchmarks import peers
from experiments.benchmarks.peers import (
    OURS,
    MaskedBatches,
    PeersBenchmark,
    benchmark_peers,
    config_of,
    masked_batches,
    train,
)
from tests.models.rows import VOCABULARY, padded_segment, random_batch, tiny_model

TINY = PeersBenchmark(
    subjects=300,
    vocabulary_size=180,
    hidden_size=16,
    heads=2,
    positions=24,
    epochs=2,
    batch_size=32,
    points=3,
)


def masked(batch):
    found = mask_codes(jax.random.key(3), batch.codes, batch.row_ids, MaskingConfig(), VOCABULARY)
    return jax.tree.map(np.array, found)  # PyTorch wants them to be writable


def test_every_contender_is_given_the_rows_of_a_run_with_fresh_masks():
    batches, baselines = masked_batches(config_of(TINY, "rope", 1e-3))
    assert len(batches.train) % TINY.epochs == 0
    first, again = (batches.train[step] for step in (0, len(batches.train) // 2))
    for batch, codes in (first, again, batches.tuning[0]):
        asked = np.take_along_axis(batch.codes, codes.columns, axis=1)
        np.testing.assert_array_equal(codes.labels[codes.weights], asked[codes.weights])
        shown = np.take_along_axis(codes.codes, codes.columns, axis=1)[codes.weights]
        assert 0.5 < (shown == MASK).mean() <= 1.0
    assert not np.array_equal(first[1].columns, again[1].columns)
    labels = np.concatenate([codes.labels[codes.weights] for _, codes in batches.tuning])
    np.testing.assert_array_equal(labels, baselines["unigram"].codes)
    others, _ = masked_batches(config_of(TINY, "learned positions", 3e-3))
    for one, other in zip(jax.tree.leaves(batches.train), jax.tree.leaves(others.train), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_clock_stands_still_while_tuning_is_scored(monkeypatch):
    clock = iter(np.arange(100.0) * 0.5)
    monkeypatch.setattr(peers, "time", SimpleNamespace(process_time=lambda: next(clock)))
    batch = random_batch(0)
    rows = batch, masked(batch)

    class Step:
        parameters = 7

        def __init__(self):
            self.done = 0

        def __call__(self, batch, codes):
            self.done += 1
            if self.done == 1:
                list(islice(clock, 2))  # compiles

        def losses(self, batch, codes):
            next(clock)
            return np.full(codes.weights.shape, 5.0 - self.done)

    course = train(Step(), MaskedBatches([rows] * 4, [rows], VOCABULARY, 1), points=2)
    assert (course.steps, course.losses, course.parameters) == ([2, 4], [3.0, 1.0], 7)
    assert course.seconds == [1.0, 2.0]  # half a second a step
    assert course.first_seconds == 1.5
    assert len(course.last) == rows[1].weights.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ("RoBERTa",)}, "'RoBERTa' is unknown, choose from learned positions"),
        ({"contenders": ()}, "--contenders: give one or more"),
        ({"points": 0}, "--points: give one or more"),
    ],
)
def test_wrong_options_are_told_before_any_work(changes, message):
    with pytest.raises(InputError, match=message):
        benchmark_peers(replace(TINY, **changes))


def test_without_transformers_the_benchmark_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'behrt-jax\[benchmark\]'"):
        benchmark_peers(TINY)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_subjects_of_a_packed_row_are_apart_in_models_of_hugging_face_too(architecture):
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.huggingface import Peer

    torch.manual_seed(0)
    peer = Peer(architecture, tiny_model(), VOCABULARY, ages_and_visits=True).eval()
    batch = random_batch(1)
    codes = masked(batch)
    with torch.no_grad():
        packed = peer(batch, codes).numpy()
        for row in range(2):
            for segment in (1, 2, 3):
                shown = padded_segment(batch._replace(codes=codes.codes), row, segment)
                there = np.flatnonzero(batch.segment_ids[row] == segment)
                own = codes.weights[row] & np.isin(codes.columns[row], there)
                slots = MaskedCodes(
                    shown.codes,
                    codes.columns[row : row + 1, own] - there[0],
                    codes.labels[row : row + 1, own],
                    np.ones((1, own.sum()), bool),
                    np.zeros(1, np.int32),
                )
                np.testing.assert_allclose(peer(shown, slots).numpy()[0], packed[row, own], atol=1e-5)
    older = batch._replace(ages=batch.ages / 2)
    with torch.no_grad():
        assert np.abs(peer(older, codes).numpy() - packed)[codes.weights].max() > 1e-4


@pytest.mark.slow
def test_the_benchmark_as_a_whole(tmp_path, capsys):
    pytest.importorskip("transformers")
    names = ("rope, alternating visits", "ModernBERT")
    benchmark = replace(TINY, source="latent", contenders=names, learning_rates=(3e-3,), output=tmp_path)
    report = benchmark_peers(benchmark)
    assert json.loads((tmp_path / "peers.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    ours, theirs = report["rows"]
    assert [row["contender"] for row in report["rows"]] == list(names)
    known = report["baselines"]
    for row in report["rows"]:
        assert len(row["steps"]) == len(row["seconds"]) == len(row["losses"]) == TINY.points
        assert row["seconds"] == sorted(row["seconds"]) and row["seconds"][0] > 0
        assert known["oracle"] < row["losses"][-1] < row["losses"][0] < np.log(180) + 0.2
        assert row["share_of_attainable_gain"] < 1
    below = ours["below_rival"]
    assert below["value"] == pytest.approx(theirs["losses"][-1] - ours["losses"][-1])
    assert below["low"] < below["value"] < below["high"]
    assert "below_rival" not in theirs
    table = capsys.readouterr().out
    assert all(name in table for name in names)


def test_contenders_differ_from_each_other_in_what_they_are_called_after():
    models = {name: config_of(TINY, name, 1e-3).model for name in OURS}
    assert models["learned positions"].position_embedding == "learned"
    assert models["rope"] == replace(models["learned positions"], position_embedding="rope")
    assert models["rope, alternating visits"] == replace(models["rope"], visit_embedding="alternating")
