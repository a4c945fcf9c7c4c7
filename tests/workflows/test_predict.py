"""Prediction as a whole: from a run and from its adapter, of every kind, in parts, and without a leak."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.adapters import lora
from behrt_jax.config.commands import EvaluateConfig, PredictConfig
from behrt_jax.config.data import PrepareConfig
from behrt_jax.config.model import ModelConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.events import BIRTH_CODE, SPLITS, EventCounts
from behrt_jax.data.labels import VALUE_COLUMNS
from behrt_jax.data.predictions import read_predictions
from behrt_jax.data.prepared import read_prepared, read_rules
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.vocabulary import UNK, fit_vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import PatientEmbedding
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.tracking.console import SilentConsole
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.workflows import checks, prediction_data
from behrt_jax.workflows.evaluate import evaluate
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.labelled_data import check_codes, label_data, read_labelled
from behrt_jax.workflows.predict import predict
from behrt_jax.workflows.prediction_data import known as known_files
from behrt_jax.workflows.prediction_data import open_records
from tests.records.meds_folder import DAY, Row, born, events_table, write_meds
from tests.records.memory_source import MemorySource
from tests.workflows.evaluated import CODES, FIRST_ID, TIME
from tests.workflows.finetune_case import ONE

KINDS = [
    "binary",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("multiclass", "multilabel", "regression", "survival")
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_task_is_predicted_and_evaluated(case, tmp_path, kind):
    labelled = case.labelled(kind)
    table = case.predicted(tmp_path / "predictions.parquet", kind)
    labels = pq.read_table(labelled.labels)
    held_out = np.isin(labels["subject_id"].to_numpy(), labelled.splits["held_out"])
    chosen = labels.filter(pa.array(held_out))
    for name in chosen.column_names:  # the rows of the table, in its order, as they were
        assert table[name].to_pylist() == chosen[name].to_pylist(), name
    found = read_predictions(tmp_path / "predictions.parquet")
    assert found.kind == kind and len(found) == held_out.sum()
    assert found.metadata["split"] == "held_out" and found.metadata["max_tokens"] == 24
    assert found.metadata["trained"]["regime"] == "lora_pretrained"
    if kind == "binary":
        np.testing.assert_array_equal(found.decisions, found.predictions >= found.metadata["threshold"])
    if kind == "multiclass":
        np.testing.assert_allclose(found.predictions.sum(axis=1), 1, rtol=1e-12)
    if kind == "multilabel":
        seen = labelled.seen[held_out]
        order = [CODES.index(name) for name in found.classes]
        np.testing.assert_array_equal(found.seen_before, seen[:, order])
    if kind == "survival":
        assert (np.diff(found.predictions, axis=1) <= 0).all()
    config = EvaluateConfig(
        predictions=tmp_path / "predictions.parquet",
        output=tmp_path / "evaluation",
        baselines=False,
        draws=20,
    )
    record = evaluate(config)
    assert record["task"]["kind"] == kind
    assert (tmp_path / "evaluation" / "report.html").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_keys_are_enough_to_predict(case, tmp_path, kind):
    labels = pq.read_table(case.labelled(kind).labels)
    keys, output = tmp_path / "keys.parquet", tmp_path / "unknown.parquet"
    pq.write_table(labels.select(["subject_id", "prediction_time"]), keys)
    known = case.predicted(tmp_path / "known.parquet", kind)
    unknown = case.predicted(output, kind, labels=keys)
    assert unknown.schema.equals(known.schema)
    of_labels = [name for name in known.column_names if name in VALUE_COLUMNS]
    assert all(unknown[name].null_count == len(unknown) for name in of_labels)
    assert unknown.drop_columns(of_labels).equals(known.drop_columns(of_labels))
    with pytest.raises(InputError, match=r"no label in any .* nothing to compare the predictions with"):
        evaluate(EvaluateConfig(predictions=output, output=tmp_path / "evaluation", baselines=False))
    with pytest.raises(InputError, match=r"keys\.parquet has no value in any of its 300 rows"):
        finetune(replace(case.config(kind), labels=keys, output=tmp_path / "run"), ONE)
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "run").exists()


def test_labels_before_birth_are_left_out_of_predictions_or_kept(case, tmp_path):
    labelled, known = case.labelled("binary"), case.predicted(tmp_path / "known.parquet")
    table, file = pq.read_table(labelled.labels), tmp_path / "labels.parquet"
    held_out = table.filter(pa.array(np.isin(table["subject_id"].to_numpy(), labelled.splits["held_out"])))
    times = pa.array([-(10**16)] * 3, pa.timestamp("us"))
    early = held_out.slice(0, 3).set_column(1, "prediction_time", times)
    assert table.column_names[1] == "prediction_time"
    pq.write_table(pa.concat_tables([early, table]), file)
    with pytest.raises(InputError, match=r"3 of .* labels of held_out .* before the subject's birth"):
        case.predicted(tmp_path / "refused.parquet", labels=file)
    assert not (tmp_path / "refused.parquet").exists()
    assert case.predicted(tmp_path / "out.parquet", labels=file, outside_life="leave_out").equals(known)
    counts = read_predictions(tmp_path / "out.parquet").metadata["counts"]
    assert (counts["examples"], counts["outside_life"]) == (len(known), 3)
    kept = case.predicted(tmp_path / "kept.parquet", labels=file, outside_life="keep")
    assert len(kept) == len(known) + 3


def test_the_adapter_on_its_base_predicts_what_the_run_predicts(case, tmp_path):
    whole = case.predicted(tmp_path / "run.parquet")
    adapter = shutil.copytree(case.run() / "adapter", tmp_path / "adapter")
    alone = case.predicted(tmp_path / "adapter.parquet", model=adapter)
    assert alone.equals(whole)
    with_base = case.predicted(tmp_path / "base.parquet", model=adapter, base=case.base)
    assert with_base.equals(whole)


@pytest.mark.slow
def test_an_adapter_on_another_base_is_refused_with_the_reason(case, tmp_path):
    other = case.pretrained("other base", seed=1)
    with pytest.raises(InputError, match="frozen parameters differ from those this adapter was trained on"):
        case.predicted(tmp_path / "p.parquet", model=case.run() / "adapter", base=other)
    assert not (tmp_path / "p.parquet").exists()


def test_wrong_input_is_one_clear_error_before_anything_is_written(case, tmp_path):
    output = tmp_path / "p.parquet"
    config = PredictConfig(
        model=case.run(), data=case.data, labels=case.labelled("binary").labels, output=output
    )
    strangers = tmp_path / "strangers.parquet"
    labels = pq.read_table(config.labels)
    pq.write_table(labels.set_column(0, "subject_id", pa.array(np.arange(len(labels)))), strangers)
    words = tmp_path / "words.parquet"
    pq.write_table(
        labels.drop_columns("boolean_value").append_column("integer_value", pa.array(np.arange(len(labels)))),
        words,
    )
    cases = {
        "--model is missing": replace(config, model=None),
        "--model: .* holds no fine-tuned model": replace(config, model=case.base),
        "--output is missing": replace(config, output=None),
        "--data and --input are both given": replace(config, input=case.data),
        "--source has no effect without --input": replace(config, source="omop"),
        "--births has no effect without --input": replace(config, births=strangers),
        "max_unknown is 1.5": replace(config, max_unknown=1.5),
        "rows is 0": replace(config, rows=0),
        "none of the 300 labels is of a subject of the split held_out .*300 are of": replace(
            config, labels=strangers
        ),
        "the labels are float ones, but the model predicts a binary task": replace(
            config, labels=case.labelled("regression").labels
        ),
        "the labels are integer ones, but the model predicts a binary task": replace(config, labels=words),
    }
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            predict(wrong, ONE)
    assert not output.exists()
    output.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        predict(config, ONE)
    assert output.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"p.parquet", strangers.name, words.name}


def close(ours, theirs):
    """Equal rows in equal order; probabilities up to the rounding of another arrangement of rows."""
    name = "predicted_boolean_probability"
    assert ours.drop_columns(name).equals(theirs.drop_columns(name))
    np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-5)


def test_a_few_examples_at_a_time_and_any_number_of_devices_give_the_same_file(case, tmp_path, monkeypatch):
    shuffled = tmp_path / "labels.parquet"
    labels = pq.read_table(case.labelled("binary").labels)
    labels = labels.take(np.random.default_rng(0).permutation(len(labels)))
    pq.write_table(labels, shuffled)
    at_once = case.predicted(tmp_path / "at_once.parquet", labels=shuffled, split="train")
    of_train = np.isin(labels["subject_id"].to_numpy(), case.labelled("binary").splits["train"])
    assert at_once.select(labels.column_names).cast(labels.schema).equals(labels.filter(pa.array(of_train)))
    config = PredictConfig(
        model=case.run(), data=case.data, labels=shuffled, split="train", output=tmp_path / "eight.parquet"
    )
    predict(config, jax.devices())
    close(pq.read_table(tmp_path / "eight.parquet"), at_once)
    monkeypatch.setattr(prediction_data, "AT_ONCE", 37)
    close(case.predicted(tmp_path / "parts.parquet", labels=shuffled, split="train", rows=5), at_once)


def test_every_split_and_all_of_them(case, tmp_path):
    parts = [
        case.predicted(tmp_path / f"{name}.parquet", split=name) for name in ("train", "tuning", "held_out")
    ]
    together = case.predicted(tmp_path / "all.parquet", split="all")
    assert len(together) == 300
    close(
        together, pa.concat_tables([part.replace_schema_metadata(together.schema.metadata) for part in parts])
    )
    # What training says of the tuning split is what its predictions are worth.
    chances = parts[1]["predicted_boolean_probability"].to_numpy()
    of_truth = np.where(parts[1]["boolean_value"].to_numpy(), chances, 1 - chances)
    recorded = json.loads((case.run() / "summary.json").read_text())["calibration"]["loss"]
    assert recorded == pytest.approx(-np.log(of_truth).mean(), rel=1e-5)


def test_no_subject_is_named_on_the_console(case, tmp_path, capsys):
    case.predicted(tmp_path / "p.parquet")
    said = capsys.readouterr()
    assert "predictions (binary)" in said.out
    assert str(FIRST_ID)[:6] not in said.out + said.err


class Shifted:
    """Held-out subjects with one label each, within their histories."""

    def __init__(self, case, kind, folder):
        self.case, self.kind, self.folder = case, kind, folder
        self.labelled = case.labelled(kind)
        labels = pq.read_table(self.labelled.labels)
        ids, first = np.unique(labels["subject_id"].to_numpy(), return_index=True)
        held_out = np.isin(ids, self.labelled.splits["held_out"])
        self.ids = ids[held_out].tolist()
        # RISK stands at TIME - 30, ... days; the last code at TIME - 1 day.
        days = np.random.default_rng(2).integers(30, 42, len(self.ids))
        self.times = dict(zip(self.ids, (TIME - days * DAY).tolist(), strict=True))
        rows = labels.take(pa.array(first[held_out]))
        times = pa.array(list(self.times.values()), pa.timestamp("us"))
        folder.mkdir()
        pq.write_table(rows.set_column(1, "prediction_time", times), folder / "labels.parquet")

    def predicted(self, name, rows):
        """Predictions where the records are these."""
        data = self.folder / name
        self.labelled.prepare(rows, data)
        output = self.folder / f"{name}.parquet"
        return self.case.predicted(output, self.kind, data=data, labels=self.folder / "labels.parquet")


@pytest.mark.parametrize("kind", ["binary", pytest.param("multilabel", marks=pytest.mark.slow)])
def test_events_after_the_prediction_time_change_nothing(case, tmp_path, kind):
    """Their codes, their times and their number are drawn anew; predictions are the same to the last bit."""
    shifted = Shifted(case, kind, tmp_path / kind)
    original = shifted.labelled.rows
    before = shifted.predicted("original", original)
    rng = np.random.default_rng(3)
    known = [row for row in original if row.time <= shifted.times.get(row.subject, row.time)]
    assert len(original) - len(known) > 2 * len(shifted.ids)
    later = [
        Row(subject, time + int(rng.integers(1, 50 * DAY)), str(rng.choice([*CODES, "RISK", "NEW//1"])))
        for subject, time in shifted.times.items()
        for _ in range(rng.integers(0, 12))
    ]
    assert {row.subject for row in later} < set(shifted.ids)  # some have nothing after it any more
    after = shifted.predicted("changed", known + later)
    assert after.replace_schema_metadata(None).equals(before.replace_schema_metadata(None))


def test_a_subject_without_any_event_is_predicted_as_one_whose_first_event_comes_later(case, tmp_path):
    shifted = Shifted(case, "binary", tmp_path / "alone")
    alone, unborn = shifted.ids[:5], shifted.ids[5]
    of_train = shifted.labelled.splits["train"][:3].tolist()
    rows = [
        row
        for row in shifted.labelled.rows
        if row.subject != unborn and (row.code == BIRTH_CODE or row.subject not in [*alone, *of_train])
    ]
    later = [Row(subject, shifted.times[subject] + DAY, CODES[0]) for subject in alone]
    table = shifted.predicted("never", rows)
    assert table.equals(shifted.predicted("later", rows + later))
    assert table["subject_id"].to_pylist() == [subject for subject in shifted.ids if subject != unborn]

    known = {
        row.subject
        for row in rows
        if row.code != BIRTH_CODE and row.time <= shifted.times.get(row.subject, 0)
    }
    counts = {"examples": len(table), "unknown_subjects": 1, "duplicates": 0}
    counts["empty_histories"] = len(table) - len(known & set(shifted.ids))
    for name in ("never", "later"):
        assert read_predictions(shifted.folder / f"{name}.parquet").metadata["counts"] == counts
    judged = tmp_path / "judged"
    record = evaluate(
        EvaluateConfig(predictions=shifted.folder / "never.parquet", output=judged, baselines=False, draws=20)
    )
    assert record["task"]["counts"] == counts and record["without_groups"] is None
    assert f"{counts['empty_histories']} examples had no known event" in (judged / "SUMMARY.txt").read_text()

    # Their labels are there to be learned from, too.
    data, labels, delays = read_labelled(shifted.folder / "never", case.labelled("binary").labels)
    config, model = case.config(), open_pretrained(case.base)
    found = label_data(config, model.model, model.vocabulary, data, labels, delays).counts
    assert found["train"]["empty_histories"] == np.isin(labels.subject_ids, of_train).sum() > 0
    assert found["train"]["examples"] == np.isin(labels.subject_ids, shifted.labelled.splits["train"]).sum()
    assert found["labels_of_unknown_subjects"] == (labels.subject_ids == unborn).sum()


def test_an_event_at_the_prediction_time_counts_and_one_just_after_it_does_not(case, tmp_path):
    shifted = Shifted(case, "binary", tmp_path / "at")
    known = [row for row in shifted.labelled.rows if row.time <= shifted.times.get(row.subject, row.time)]
    some = shifted.ids[::2]

    def probabilities(name, code, wait):
        more = [
            Row(
                subject,
                shifted.times[subject] + (wait if subject in some else 0),
                code if subject in some else CODES[0],
            )
            for subject in shifted.ids
        ]
        table = shifted.predicted(name, known + more)
        return dict(
            zip(
                table["subject_id"].to_pylist(),
                table["predicted_boolean_probability"].to_pylist(),
                strict=True,
            )
        )

    risk, other = probabilities("risk", "RISK", 0), probabilities("other", CODES[1], 0)
    for subject in shifted.ids:
        if subject in some:
            assert risk[subject] != other[subject]
        else:
            assert risk[subject] == other[subject]
    assert max(abs(risk[subject] - other[subject]) for subject in some) > 0.02
    assert probabilities("risk later", "RISK", 1) == probabilities("other later", CODES[1], 1)


# Embeddings of subjects equal those of the model applied by hand.


LENGTH = 24


def written(case, output, **options):
    predict(PredictConfig(output=output, data=case.data, embeddings=True, **options), ONE)
    table = pq.read_table(output)
    assert table.column_names[:2] == ["subject_id", "prediction_time"]
    assert table.schema.field("features").type == pa.list_(pa.float32())
    vectors = np.stack(table["features"].to_numpy())
    return table["subject_id"].to_numpy(), table["prediction_time"].cast("int64").to_numpy(), vectors


@pytest.mark.parametrize("kind", ["binary", pytest.param("multilabel", marks=pytest.mark.slow)])
def test_embeddings_stand_beside_the_labels_for_a_linear_probe(case, tmp_path, kind):
    labelled = case.labelled(kind)
    given = PredictConfig(model=case.base, data=case.data, labels=labelled.labels, embeddings=True)
    predict(replace(given, output=tmp_path / "probe.parquet"), ONE)
    table, labels = pq.read_table(tmp_path / "probe.parquet"), pq.read_table(labelled.labels)
    chosen = labels.filter(pa.array(np.isin(labels["subject_id"].to_numpy(), labelled.splits["held_out"])))
    assert table.column_names == [*chosen.column_names, "features"]
    for name in chosen.column_names:
        assert table[name].to_pylist() == chosen[name].to_pylist(), name
    if kind == "binary":
        predict(replace(given, output=tmp_path / "old.parquet", embedding_columns="vector"), ONE)
        old = pq.read_table(tmp_path / "old.parquet")
        assert old.column_names == ["subject_id", "time", "vector"]
        assert old["vector"].to_pylist() == table["features"].to_pylist()
        assert old["time"].to_pylist() == table["prediction_time"].to_pylist()


def by_hand(data, split, subjects, times, model, vocabulary_size, params, pooling):
    """Each history alone in a padded row."""
    part = data.splits[split]
    shape = (len(subjects), LENGTH)
    codes, ages, visits, positions, segments = (
        np.zeros(shape, dtype) for dtype in (np.int32, np.float32, np.int32, np.int32, np.int32)
    )
    for row, (subject, time) in enumerate(zip(subjects, times, strict=True)):
        place = int(np.flatnonzero(part.subject_ids == subject)[0])
        tokens = np.arange(part.offsets[place], part.offsets[place + 1])
        tokens = tokens[part.times[tokens] <= time][-LENGTH:]
        count = len(tokens)
        codes[row, :count], ages[row, :count] = part.codes[tokens], part.ages[tokens]
        visits[row, :count], positions[row, :count] = part.visits[tokens], np.arange(count)
        segments[row, :count] = 1
    network = PatientEmbedding(model, vocabulary_size, pooling)
    days = np.zeros_like(codes)  # not read by this model
    batch = Batch(codes, ages, visits, days, positions, segments, np.arange(len(codes), dtype=np.int32))
    apply = jax.jit(network.apply, static_argnames="segments")
    return np.asarray(apply({"params": {"behrt": params}}, batch, segments=1))[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_of_a_base_at_the_labels(case, tmp_path, monkeypatch, pooling):
    monkeypatch.setattr(prediction_data, "AT_ONCE", 41)
    labels = case.labelled("binary").labels
    ids, times, vectors = written(
        case, tmp_path / "e.parquet", model=case.base, labels=labels, pooling=pooling
    )
    table = pq.read_table(labels)
    held_out = np.isin(table["subject_id"].to_numpy(), case.labelled("binary").splits["held_out"])
    np.testing.assert_array_equal(ids, table["subject_id"].to_numpy()[held_out])
    np.testing.assert_array_equal(times, table["prediction_time"].cast("int64").to_numpy()[held_out])
    base = open_pretrained(case.base)
    params = read_encoder(base, make_mesh(ONE)).params
    data = read_prepared(case.data)
    expected = by_hand(data, "held_out", ids, times, base.model, len(base.vocabulary), params, pooling)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_of_an_adapted_model_at_the_last_events(case, tmp_path):
    ids, times, vectors = written(case, tmp_path / "e.parquet", model=case.run(), split="tuning")
    data = read_prepared(case.data)
    part = data.splits["tuning"]
    np.testing.assert_array_equal(ids, part.subject_ids)
    last = [part.times[start:stop].max() for start, stop in zip(part.offsets, part.offsets[1:], strict=False)]
    np.testing.assert_array_equal(times, last)
    keys = {"subject_id": ids, "prediction_time": pa.array(times, pa.timestamp("us"))}
    pq.write_table(pa.table(keys), tmp_path / "keys.parquet")
    at_keys = written(
        case, tmp_path / "k.parquet", model=case.run(), split="tuning", labels=tmp_path / "keys.parquet"
    )
    np.testing.assert_array_equal(at_keys[2], vectors)
    found = open_finetuned(case.run(), None, make_mesh(ONE))
    (variables,), adapters = found.members, found.setup.predictor.lora
    params = lora.merge(variables["params"], variables["lora"], adapters)["behrt"]
    expected = by_hand(data, "tuning", ids, times, found.model, len(found.vocabulary), params, "mean")
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    plain = by_hand(
        data, "tuning", ids, times, found.model, len(found.vocabulary), variables["params"]["behrt"], "mean"
    )
    assert np.abs(vectors - np.asarray(plain)).max() > 0.01  # the adapters are in


def test_wrong_options_are_one_clear_error(case, tmp_path):
    output = tmp_path / "e.parquet"
    with pytest.raises(InputError, match=r"pooling is cls, but the model reads no \[CLS\]"):
        written(case, output, model=case.base, pooling="cls")
    with pytest.raises(InputError, match="holds no finished run"):
        written(case, output, model=tmp_path)
    assert not output.exists()


# New patients: records in place of prepared data, and one patient from Python.


@pytest.fixture(scope="module")
def meds(newcomers, tmp_path_factory):
    """Their records as they come: no split, no preparation."""
    return write_meds(tmp_path_factory.mktemp("new") / "meds", newcomers)


def renamed(rows, chosen=lambda code: True):
    """The same rows with other codes, but for births."""
    return [
        row._replace(code=f"X//{row.code}") if row.code != BIRTH_CODE and chosen(row.code) else row
        for row in rows
    ]


def test_records_are_predicted_as_prepared_data_are(case, newcomers, meds, tmp_path):
    known = case.predicted(tmp_path / "known.parquet")
    given = {"data": None, "input": meds, "source": "meds"}
    found = case.predicted(tmp_path / "new.parquet", **given)
    subjects = pa.array(sorted({row.subject for row in newcomers}))
    same = known.filter(pa.compute.is_in(known["subject_id"], subjects))
    probability = "predicted_boolean_probability"
    assert len(found) > 3 and found.drop_columns(probability).equals(same.drop_columns(probability))
    np.testing.assert_allclose(found[probability].to_numpy(), same[probability].to_numpy(), rtol=1e-6)
    metadata = read_predictions(tmp_path / "new.parquet").metadata
    assert metadata["data"] is None and metadata["input"] == str(meds) and metadata["split"] == "all"
    assert metadata["codes"]["unknown"] == 0 == metadata["codes"]["changed_bins"]
    assert metadata["codes"]["tokens"] > 10
    # Births in a file of their own give the same ages.
    apart = write_meds(tmp_path / "unborn", [row for row in newcomers if row.code != BIRTH_CODE])
    born_rows = [row for row in newcomers if row.code == BIRTH_CODE]
    births = pa.table({"subject_id": [row.subject for row in born_rows],
                       "birth": pa.array([row.time for row in born_rows], pa.timestamp("us"))})  # fmt: skip
    pq.write_table(births, tmp_path / "births.parquet")
    given_births = given | {"input": apart, "births": tmp_path / "births.parquet"}
    assert case.predicted(tmp_path / "born.parquet", **given_births).equals(found)
    # From an adapter elsewhere, without labels: each subject at its last event.
    adapter = shutil.copytree(case.run() / "adapter", tmp_path / "adapter")
    last = case.predicted(tmp_path / "last.parquet", model=adapter, **(given | {"labels": None}))
    assert last["prediction_time"].cast(pa.int64()).to_pylist() == [TIME - DAY] * 3
    vectors = case.predicted(
        tmp_path / "vectors.parquet",
        model=case.base,
        embeddings=True,
        labels=None,
        **{name: given[name] for name in ("data", "input", "source")},
    )
    assert vectors["subject_id"].to_pylist() == subjects.to_pylist()
    names = {"known.parquet", "new.parquet", "adapter", "last.parquet", "vectors.parquet",
             "unborn", "births.parquet", "born.parquet"}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names  # no work folder is left


def test_a_model_knows_its_data_and_labels(case, tmp_path):
    known = case.predicted(tmp_path / "known.parquet")
    for model in (case.run(), case.run() / "adapter"):
        path = tmp_path / f"{model.name}.parquet"
        assert case.predicted(path, model=model, data=None, labels=None).equals(known)
    assert known_files(case.base, "data") == case.data and known_files(case.base, "labels") is None
    assert known_files(case.run() / "plots", "data") is None


def test_years_that_a_model_does_not_know_are_refused_whatever_it_is_asked(case, tmp_path, monkeypatch):
    """Predictions, vectors and answers all come from the records that are opened here."""
    config = PredictConfig(model=case.base, data=case.data, output=tmp_path / "p.parquet")
    vocabulary = read_prepared(case.data).vocabulary
    of_calendar = vocabulary, None, ModelConfig(time="time2vec"), SilentConsole()
    with open_records(config, *of_calendar) as records:
        assert records.splits == ("held_out",)
    monkeypatch.setattr(checks, "FIRST_YEAR", 2150)
    with (
        pytest.raises(InputError, match=r"events of the held_out split are in years outside of 2150"),
        open_records(config, *of_calendar),
    ):
        pass


def test_codes_that_the_model_does_not_know_are_counted_and_too_many_refused(case, newcomers, tmp_path):
    strangers = write_meds(tmp_path / "strangers", renamed(newcomers))
    given = {"data": None, "source": "meds"}
    with pytest.raises(InputError, match=r"100.0% of the \d+ tokens are codes that .* codes: .*X//CODE//\d"):
        case.predicted(tmp_path / "p.parquet", input=strangers, **given)
    with pytest.raises(InputError, match="codes that the model does not know"):
        case.predicted(tmp_path / "p.parquet", input=strangers, embeddings=True, labels=None, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"strangers"}
    allowed = case.predicted(tmp_path / "allowed.parquet", input=strangers, max_unknown=1.0, **given)
    assert len(allowed) > 2
    few = write_meds(tmp_path / "few", renamed(newcomers, lambda code: code == "RISK"))
    case.predicted(tmp_path / "few.parquet", input=few, **given)
    codes = read_predictions(tmp_path / "few.parquet").metadata["codes"]
    assert 0 < codes["unknown"] < 0.5 and codes["unknown_codes"] == ["X//RISK"]
    with pytest.raises(InputError, match=r"the limit is 1.0%"):
        case.predicted(tmp_path / "p.parquet", input=few, max_unknown=0.01, **given)
    # The same records, prepared with a vocabulary of their own: their rare codes are named too.
    subjects = case.labelled("binary").splits["held_out"][:3, None]
    splits = dict(zip(("train", "tuning", "held_out"), subjects, strict=True))
    source = MemorySource([[events_table(renamed(newcomers), visits=False)]], splits)
    prepare(source, PrepareConfig(output=tmp_path / "own", codes=(".*",), min_count=2))
    with pytest.raises(InputError, match=r"are codes that the model does not know .*X//"):
        case.predicted(tmp_path / "p.parquet", data=tmp_path / "own", split="all")
    with pytest.raises(InputError, match=r"are codes that the model does not know .*X//"):
        finetune(replace(case.config(), data=tmp_path / "own", output=tmp_path / "run"), ONE)
    assert not (tmp_path / "run").exists() and not (tmp_path / "p.parquet").exists()


@pytest.mark.parametrize(
    ("tokens", "unknown", "trained", "refused"),
    [
        (10, 5, 0.0, False),  # half of a few tokens
        (10, 6, 0.0, True),
        (1000, 99, 0.0, False),  # a tenth more than in training
        (1000, 101, 0.0, True),
        (1000, 299, 0.1, False),  # three times as in training
        (1000, 301, 0.1, True),
        (1000, 501, 0.3, True),
        (1000, 690, 0.6, False),
        (1000, 710, 0.6, True),
    ],
)
def test_how_many_unknown_codes_are_too_many(tokens, unknown, trained, refused):
    vocabulary = fit_vocabulary({"A": 1000}, 1, None)
    vocabulary.counts[UNK] = round(1000 * trained / (1 - trained))
    codes = np.repeat([UNK, vocabulary.encode(["A"])[0]], [unknown, tokens - unknown])
    part = Sequences(np.array([1]), np.array([0, tokens]), codes, *([np.zeros(tokens)] * 3))
    data = SequenceSet(
        vocabulary, dict.fromkeys(SPLITS, part), EventCounts(), "", unknown_codes={"B": unknown}
    )
    check = partial(check_codes, data, ["tuning"], vocabulary, None, like=Path("runs/a"))
    if refused:
        with pytest.raises(InputError, match=r"unknown codes: B\. Prepare the records with --like runs/a"):
            check(None)
    found = check(1.0)
    assert found["unknown"] == unknown / tokens and found["tokens"] == tokens
    assert refused or check(None)["limit"] >= found["unknown"]


def test_bins_of_values_that_mean_something_else_are_told(tmp_path):
    rows = [born(subject) for subject in range(9)]
    rows += [
        Row(subject, day * DAY, code, value=float(subject + day + shift))
        for subject in range(9)
        for day in range(1, 20)
        for code, shift in (("LAB//K", 0), ("LAB//NA", 0), ("DX", 0))
    ]
    splits = {"train": range(7), "tuning": [7], "held_out": [8]}
    rules = {"codes": ("DX",), "value_codes": ("LAB",), "value_bins": 3, "duplicates": "count"}

    def prepared(name, rows):
        source = MemorySource([[events_table(rows)]], {key: np.array(ids) for key, ids in splits.items()})
        prepare(source, PrepareConfig(output=tmp_path / name, **rules))
        return read_prepared(tmp_path / name)

    ours = prepared("ours", rows)
    theirs = prepared(
        "theirs", [row._replace(value=2 * row.value) if row.code == "LAB//K" else row for row in rows]
    )
    check = partial(check_codes, ours, ["held_out"], ours.vocabulary, like=tmp_path)
    assert check(ours.preparation, None)["changed_bins"] == 0
    assert check(theirs.preparation, None)["changed_bins"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match=r"33.3% of the 57 tokens have a bin of values with other edges"):
        check(theirs.preparation, 0.3)
    assert check(None, None)["changed_bins"] is None
    counted = ["LAB//K//Q1", "LAB//K//Q3//x3-5", "LAB//K//Q1x", "LAB//K", "LAB//NA//Q1", "[UNK]"]
    differ = ours.preparation.other_bins(theirs.preparation, counted)
    assert differ.tolist() == [True, True, False, False, False, False]


def test_a_run_of_an_older_version_predicts_but_cannot_be_prepared_like(case, meds, tmp_path):
    old = shutil.copytree(case.run(), tmp_path / "old")
    (old / "preparation.json").unlink()
    with pytest.raises(InputError, match=r"preparation\.json is missing"):
        read_rules(old, "--like")
    (old / "files.json").unlink()
    config = json.loads((old / "config.json").read_text())
    del config["recorded"]
    (old / "config.json").write_text(json.dumps(config))
    known, found = (
        case.predicted(tmp_path / "known.parquet"),
        case.predicted(tmp_path / "p.parquet", model=old),
    )
    assert found.equals(known)
    assert read_predictions(tmp_path / "p.parquet").metadata["codes"]["changed_bins"] is None
    with pytest.raises(InputError, match=r"--model: .*old does not tell how its data were prepared"):
        case.predicted(tmp_path / "q.parquet", model=old, data=None, input=meds, source="meds")
    with pytest.raises(InputError, match=r"--like: .*old does not tell"):
        read_rules(old, "--like")
    # What is there must be what the run wrote.
    for name, change in {
        "preparation.json": ("keep", "drop"),
        "vocabulary.parquet": ("CODE//1", "CODE//9"),
    }.items():
        spoilt = shutil.copytree(case.run() / "adapter", tmp_path / name)
        content = (spoilt / name).read_bytes()
        damaged = content.replace(*(word.encode() for word in change))
        (spoilt / name).write_bytes(damaged if damaged != content else content[:-1])
        with pytest.raises(InputError, match=f"{name} is damaged"):
            read_rules(spoilt, "--like")
