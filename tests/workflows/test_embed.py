"""Embeddings of subjects equal those of the model applied by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.adapters import lora
from behrt_jax.config import PredictConfig
from behrt_jax.data.prepared import read_prepared
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import PatientEmbedding
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import open_pretrained, read_encoder
from behrt_jax.workflows import predict as embed_module
from behrt_jax.workflows.predict import open_finetuned, predict
from tests.workflows.finetune_case import ONE

LENGTH = 24


def written(case, output, **options):
    predict(PredictConfig(output=output, data=case.data, embeddings=True, **options), ONE)
    table = pq.read_table(output)
    assert table.column_names == ["subject_id", "time", "vector"]
    vectors = np.stack(table["vector"].to_numpy())
    assert vectors.dtype == np.float32
    return table["subject_id"].to_numpy(), table["time"].cast("int64").to_numpy(), vectors


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
    return network.apply({"params": {"behrt": params}}, codes, ages, visits, positions, segments, 1)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_of_a_base_at_the_labels(case, tmp_path, monkeypatch, pooling):
    monkeypatch.setattr(embed_module, "AT_ONCE", 41)
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
