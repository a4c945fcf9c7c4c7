"""`load`: one patient and prepared data as the commands have them, from every form that a model has."""

import subprocess
import sys
from datetime import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import behrt_jax
from behrt_jax.config.commands import PredictConfig
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE
from behrt_jax.data.prepared import read_prepared
from behrt_jax.errors import InputError
from behrt_jax.models.attention import dense_attention
from behrt_jax.models.behrt import BEHRT, head_rotations
from behrt_jax.models.layers import rotate
from behrt_jax.workflows.loaded import attention_weights, load
from behrt_jax.workflows.predict import predict
from tests.models.rows import VOCABULARY, random_batch, tiny_model
from tests.records.meds_folder import DAY, events_table
from tests.workflows.evaluated import TIME
from tests.workflows.finetune_case import ONE


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def model(case):
    """A fine-tuned run."""
    return load(case.run(), devices=ONE)


def test_one_patient_from_python_is_predicted_as_in_a_file(case, newcomers, model, tmp_path):
    events = events_table(newcomers)
    table, found = case.predicted(tmp_path / "p.parquet"), None
    rows = table.filter(pa.compute.is_in(table["subject_id"], events["subject_id"])).to_pylist()
    assert len(rows) > 3

    def events_of(row):
        chosen = pa.compute.equal(events["subject_id"], row["subject_id"])
        return events.filter(chosen).select(["code", "time"]).to_pylist()

    for row in rows:
        own = events_of(row)
        found = model.predict(own, row["prediction_time"])
        np.testing.assert_allclose(found.predicted, [row["predicted_boolean_probability"]], rtol=1e-6)
        assert found.codes["unknown"] == 0 and found.events.read == len(own)
    row, own = rows[-1], events_of(rows[-1])
    assert model.predict(own).time == TIME - DAY
    assert model._steps["outputs"]._cache_size() == 1  # compiled once
    later = [*own, {"code": "RISK", "time": datetime(2030, 1, 1)}]
    assert found and model.predict(later, row["prediction_time"]).predicted == found.predicted
    wrong = {
        "none of 1 is left": [{"code": "RISK", "time": datetime(2030, 1, 1)}],
        "events have no time": [{"code": "RISK"}],
        "events have value: give each": [{"code": "RISK", "time": None, "value": 1.0}],
        "in the column time: write it as timestamps": [{"code": "RISK", "time": "soon"}],
        "a time of mixed or unknown types": [*own, {"code": "RISK", "time": "soon"}],
        "events has no code in row 1": [{"code": None, "time": datetime(2030, 1, 1)}],
        "codes that the model does not know": [own[0], {"code": "X", "time": datetime(2030, 1, 1)}],
        "of several subjects": events,
    }
    for message, given in wrong.items():
        with pytest.raises(InputError, match=message):
            model.predict(given)
    died = [*own, {"code": DEATH_CODE, "time": datetime(2030, 1, 1)}]
    assert model.predict(died).predicted == model.predict(own).predicted
    with pytest.raises(InputError, match="after the patient's death"):
        model.predict(died, datetime(2031, 1, 1))
    newborn = [event for event in own if event["code"] == BIRTH_CODE]
    assert 0 < model.predict(newborn, datetime(2030, 1, 1)).predicted[0] < 1


def test_a_run_and_its_adapter_are_the_same_model(case, model, tmp_path):
    data, labels = case.data, case.labelled("binary").labels
    known = case.predicted(tmp_path / "p.parquet")["predicted_boolean_probability"].to_numpy()
    found = model.predict(data, labels=labels)
    np.testing.assert_array_equal(found.values[:, 0], known)
    assert found.values.dtype == np.float64 and found.times.dtype == found.subject_ids.dtype == np.int64
    for own in (load(case.run() / "adapter", case.base, ONE),):
        np.testing.assert_array_equal(own.predict(read_prepared(data), labels=labels).values, found.values)
        assert_equal(own.params, model.params)
        assert own.vocabulary.codes == model.vocabulary.codes
    assert len(model.predict(data).values) == len(case.labelled("binary").splits["held_out"])
    assert len(model.predict(data, split="tuning")) == 3
    with pytest.raises(InputError, match="There is no split 'test'"):
        model.predict(data, split="test")
    with pytest.raises(InputError, match="time is of one patient's events"):
        model.predict(data, datetime(2020, 1, 1))


def test_a_pretrained_model_embeds_as_the_command_does(case, newcomers, tmp_path):
    base = load(str(case.base), devices=ONE)
    options = PredictConfig(model=case.base, data=case.data, output=tmp_path / "e.parquet", embeddings=True)
    predict(options, ONE)
    known = pq.read_table(tmp_path / "e.parquet")
    found = base.embed(case.data)
    np.testing.assert_array_equal(found.subject_ids, known["subject_id"].to_numpy())
    vectors = np.array(known["features"].to_pylist(), np.float32)
    np.testing.assert_array_equal(found.values, vectors)
    first = [row for row in newcomers if row.subject == newcomers[0].subject]
    one = base.embed(events_table(first))
    (expected,) = vectors[found.subject_ids == newcomers[0].subject]
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
    assert (base.embed(events_table(first), pooling="max") != one).any()
    with pytest.raises(InputError, match="a pretrained model, which predicts no task"):
        base.predict(case.data)
    with pytest.raises(InputError, match=r"base: .* is no adapter"):
        load(case.base, case.base, ONE)
    with pytest.raises(InputError, match="holds no finished run"):
        load(tmp_path, devices=ONE)


def test_batches_are_what_the_module_takes(case, newcomers, model):
    table = events_table(newcomers)
    subject = newcomers[0].subject
    events = table.filter(pa.compute.equal(table["subject_id"], subject))
    batch = model.batch(events)
    tokens = int((batch.segment_ids > 0).sum())
    assert batch.codes.shape == (1, 24) and (batch.segment_ids[0, :tokens] == 1).all()
    shown = [model.vocabulary.codes[code] for code in batch.codes[0, :tokens]]
    times = sorted(
        (row.time, row.code) for row in newcomers if row.subject == subject and row.code != BIRTH_CODE
    )
    assert sorted(shown) == sorted(code for _, code in times) and shown[-1] == times[-1][1]
    apply = jax.jit(model.model.apply, static_argnums=2)
    outputs = apply({"params": model.params}, batch, 1)
    probability = jax.nn.sigmoid(outputs[0, 0, 0] / model.finetuned.calibration.temperature)
    np.testing.assert_allclose(model.predict(events).predicted, [probability], rtol=1e-5)
    several = model.batch(case.data, limit=5)
    data = model.predict(case.data)
    assert several.codes.shape == (5, 24) and (several.segment_ids <= 1).all()
    whole = model.batch(case.data, limit=None)
    assert_equal(jax.tree.map(lambda column: column[:5], whole)._replace(row_ids=several.row_ids), several)
    outputs = apply({"params": model.params}, several, 1)[:, 0]
    found = jax.nn.sigmoid(outputs / model.finetuned.calibration.temperature)
    np.testing.assert_allclose(data.values[:5], found, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rope", "rope_time"])
def test_attention_is_what_the_dense_form_weighs_by(positions):
    """With as many tokens as numbers of a head, values of the unit vectors give the weights."""
    config = tiny_model(hidden_size=16, heads=2, positions=8, position_embedding=positions)
    network, batch = BEHRT(config, VOCABULARY), random_batch(0, rows=3, length=8)
    params = network.init(jax.random.key(0), batch)["params"]
    params = jax.tree.map(lambda leaf: leaf * (2 if leaf.ndim == 2 else 1), params)  # far from even weights
    weights = np.asarray(jax.jit(attention_weights, static_argnums=0)(network, params, batch))
    assert weights.shape == (3, 2, 2, 8, 8) and weights.dtype == np.float32
    segments = batch.segment_ids
    allowed = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    assert (segments == 0).any() and segments.max() > 1
    assert (weights[~np.broadcast_to(allowed[:, None, None], weights.shape)] == 0).all()
    sums = np.broadcast_to((segments > 0)[:, None, None], weights.shape[:-1])
    np.testing.assert_allclose(weights.sum(-1), sums, rtol=1e-6)
    _, captured = network.apply({"params": params}, batch, capture_intermediates=True)
    rotation = head_rotations(config, batch)
    for layer in range(2):
        own = captured["intermediates"]["encoder"][f"layer_{layer}"]["attention"]
        queries, keys, values = (
            own[name]["__call__"][0].reshape(3, 8, 2, 8) for name in ("query", "key", "value")
        )
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
        unit = jnp.broadcast_to(jnp.eye(8), keys.shape)
        dense = dense_attention(queries * 8**-0.5, keys, unit, segments)
        real = np.broadcast_to((segments > 0)[:, None, :, None], dense.shape)
        np.testing.assert_allclose(weights[:, layer][real], dense[real], rtol=1e-5, atol=1e-6)
        # What the layer puts out is what these weights take of its values.
        mixed = jnp.einsum("bnts,bnsk->btnk", weights[:, layer], values).reshape(3, 8, 16)
        of_layer = params["encoder"][f"layer_{layer}"]["attention"]["out"]
        out = mixed @ of_layer["kernel"] + of_layer["bias"][None, None]
        real = segments > 0
        np.testing.assert_allclose(out[real], own["__call__"][0][real], rtol=1e-4, atol=1e-5)


def test_attention_of_a_patient_has_its_tokens_alone(newcomers, model):
    table = events_table(newcomers)
    events = table.filter(pa.compute.equal(table["subject_id"], newcomers[0].subject))
    batch = model.batch(events)
    found, tokens = model.attention(events), int((batch.segment_ids > 0).sum())
    assert found.shape == (2, 2, tokens, tokens) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    of_rows = model.attention(batch)
    assert of_rows.shape == (1, 2, 2, 24, 24)
    np.testing.assert_array_equal(of_rows[0, :, :, :tokens, :tokens], found)
    assert not of_rows[..., tokens:].any() and not of_rows[..., tokens:, :].any()
    earlier = model.attention(events, datetime.fromtimestamp((TIME - 35 * DAY) / 1e6))
    assert 0 < earlier.shape[-1] < tokens


def test_importing_the_package_imports_no_jax():
    code = "import sys, behrt_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert behrt_jax.load is load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = behrt_jax.lod
