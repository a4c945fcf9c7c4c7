"""The study of the representation: its ladder, the masked codes that all rungs share, and a run of it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from behrt_jax.config.training import FinetuneConfig
from behrt_jax.data.vocabulary import MASK
from behrt_jax.errors import InputError
from behrt_jax.presets import MODERN
from behrt_jax.records.load import load_sequences
from experiments.studies.representation import (
    BASE,
    FIRST,
    QUICK_RUNGS,
    RESULT_FILE,
    RUNGS,
    RepresentationStudyConfig,
    config_of,
    exam_of,
    held_out_batches,
    masked_rows,
    pretrained_as,
    representation_study,
    task_of,
)
from tests.models.rows import tiny_model
from tests.workflows.small_run import changed

ONE = jax.devices()[:1]
TINY = changed(
    changed(BASE, "data", subjects=300, vocabulary_size=70, covariates=(), held_out_fraction=0.2),
    "train",
    epochs=2,
    batch_size=32,
)
TINY = replace(TINY, model=tiny_model(positions=32, layers=1))


def test_a_rung_has_its_own_changes_and_those_that_it_stands_on():
    for name, (on, changes, _) in RUNGS.items():
        config = config_of(BASE, name)
        if on is None:
            assert config == BASE and name == FIRST
            continue
        under = config_of(BASE, on)
        sections = {section: replace(getattr(under, section), **of) for section, of in changes.items()}
        assert config == replace(under, **sections)
        assert (config != under) == bool(changes) == (pretrained_as(name) == name)
    # The quick study has what each of its rungs stands on, and ends at the configurations of today.
    assert {RUNGS[rung].on for rung in QUICK_RUNGS} <= {None, *QUICK_RUNGS}
    assert config_of(BASE, "as modern_*").model == replace(BASE.model, **MODERN)
    last = config_of(BASE, "visits masked").model
    assert (last.position_embedding, last.visit_embedding) == ("rope", "alternating")


def test_the_same_codes_are_asked_for_in_whatever_rows():
    data = load_sequences(TINY.data, sep_token=False)
    split = exam_of(TINY, data).split
    sequences = data.splits["held_out"]
    seen = {}
    for name in ("packed", "padded", "short"):
        config = changed(TINY, "data", packed=name != "padded", max_length=10 if name == "short" else None)
        batches = held_out_batches(config, data)
        found = np.full(len(split.targets), -1)
        for batch, masked, asked in masked_rows(batches, split):
            assert (np.take_along_axis(batch.codes, masked.columns, 1) == MASK)[masked.weights].mean() > 0.5
            found[asked] = masked.labels[masked.weights]
            ages = np.take_along_axis(batch.ages, masked.columns, 1)[masked.weights]
            np.testing.assert_array_equal(ages, sequences.ages[split.targets[asked]])
        seen[name] = found
    np.testing.assert_array_equal(seen["packed"], split.codes)
    np.testing.assert_array_equal(seen["padded"], split.codes)
    read = seen["short"] >= 0
    place = split.targets - sequences.offsets[split.subjects]
    np.testing.assert_array_equal(read, place < 10)
    assert 0 < read.sum() < len(read)


def test_labels_ask_for_the_last_visit_at_the_end_of_the_one_before():
    data = load_sequences(TINY.data, sep_token=False)
    task = task_of("RX//", data)
    part = data.splits["held_out"]
    asked = task.labels.take(task.held_out)
    codes = np.array(data.vocabulary.codes)
    known = dict(zip(asked.subject_ids, zip(asked.times, asked.values, strict=True), strict=True))
    assert 0.1 < asked.values.mean() < 0.9
    for start, stop, subject in zip(part.offsets[:-1], part.offsets[1:], part.subject_ids, strict=True):
        visits = part.visits[start:stop]
        last = visits == visits.max()
        if visits.max() == 0:
            assert subject not in known
            continue
        time, value = known.pop(subject)
        assert time == part.times[start:stop][~last].max()
        assert value == any(code.startswith("RX//") for code in codes[part.codes[start:stop][last]])
    assert not known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": ("+ wings",)}, r"'\+ wings' is unknown, choose from codes, ages, visits"),
        ({"rungs": (FIRST, "+ gaps")}, r"'\+ facts' is missing, on which others stand"),
        ({"rungs": ()}, "'codes, ages, visits' is missing"),
        ({"seeds": 0}, "seeds is 0"),
        ({"pretrain": changed(BASE, "data", source="clinical")}, "source must be latent"),
    ],
)
def test_wrong_options_are_told_before_any_work(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        representation_study(replace(RepresentationStudyConfig(output=tmp_path), **changes))


@pytest.mark.slow
def test_the_study_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    ladder = {FIRST: RUNGS[FIRST], "+ facts": RUNGS["+ facts"]._replace(on=FIRST)}
    ladder["attention pooling"] = RUNGS["attention pooling"]._replace(on="+ facts")
    monkeypatch.setattr("experiments.studies.representation.RUNGS", ladder)
    tiny = changed(TINY, "data", covariates=("sex",))
    config = RepresentationStudyConfig(tiny, tuple(ladder), seeds=1, finetune_epochs=1, output=tmp_path)
    found, status = representation_study(config)
    assert status == 0
    assert json.loads((tmp_path / RESULT_FILE).read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "representation_study.png").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "pretrained").iterdir()} == {"00-0", "01-0"}
    assert len(list((tmp_path / "finetuned").iterdir())) == 3
    first, facts, pooled = found["rungs"].values()
    for exam, known in found["exams"].items():
        best, without = (known["losses"][name] for name in ("oracle", "oracle without sex"))
        assert best < without < known["losses"]["unigram"]
        for row in (first, facts, pooled):
            assert row[exam]["loss"] == pytest.approx(np.mean(row[exam]["of_seeds"]))
            assert row[exam]["share_of_attainable_gain"] < 1
        gain = facts[exam]["gain"]
        assert gain["value"] == pytest.approx(first[exam]["loss"] - facts[exam]["loss"])
        assert gain["low"] < gain["value"] < gain["high"]
        assert pooled[exam]["gain"] == {"value": 0, "low": 0, "high": 0, "of_seeds": [0]}
    assert "gain" not in first["codes"] and "auroc_gain" not in first
    less = facts["auroc_gain"]["value"]
    assert less == pytest.approx(facts["auroc"]["value"] - first["auroc"]["value"])
    assert pooled["flops_ratio"] == 1 != facts["flops_ratio"]
    record = json.loads((tmp_path / "finetuned/02-0/config.json").read_text())["settings"]
    assert record["task"]["pooling"] == "attention"
    assert FinetuneConfig().task.pooling != "attention"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/held_out.json")}
    assert representation_study(config)[0] == found
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(InputError, match=r"made with other options \(train\)"):
        representation_study(replace(config, pretrain=changed(tiny, "train", epochs=1)))
