"""Pretraining that starts from vectors of codes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import InitConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import write_bytes
from behrt_jax.models.behrt import EMBEDDING_STDDEV
from behrt_jax.records.load import load_sequences
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import read_parameters
from behrt_jax.training.state import init_state, optimizer_for, run_keys, set_up
from behrt_jax.weights.code_vectors import CodeVectors, first_rows, read_vectors, vector_files
from behrt_jax.workflows import pretrain as workflow
from behrt_jax.workflows.pretrain import pretrain
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
SHORT = changed(
    changed(changed(SMALL_RUN, "model", layers=1), "data", subjects=60, vocabulary_size=40, source="uniform"),
    "train",
    epochs=1,
    validate_every=None,
)
FULL = replace(SHORT, lora=None, freezing=FreezingConfig("full"))
# With a learning rate of almost nothing a run ends where it started.
STILL = changed(FULL, "optimizer", learning_rate=1e-12)
FIRST = len(SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Vectors of a third of the codes, longer than the embedding."""
    codes = load_sequences(FULL.data, sep_token=False).vocabulary.codes[FIRST::3]
    vectors = np.random.default_rng(0).normal(size=(len(codes), 24)).astype(np.float32)
    path = tmp_path_factory.mktemp("vectors") / "vectors.parquet"
    write_bytes(path, vector_files(CodeVectors(codes, vectors))["vectors.parquet"])
    return path


def usual_start(config):
    """The parameters that a run without vectors starts from."""
    setup, key = set_up(config, vocabulary_size=40), run_keys(config.train.seed).init
    return init_state(setup, optimizer_for(config.optimizer, setup, 10), key, make_mesh(ONE)).variables[
        "params"
    ]


def parameters(folder, config):
    """Those of a run, its adapters merged."""
    return read_parameters(folder, "run", usual_start(config))[0]


def code_table(params):
    return np.asarray(params["behrt"]["embeddings"]["code"]["embedding"])


def test_the_code_embedding_alone_starts_from_vectors(file, tmp_path, capsys):
    run = pretrain(replace(STILL, init=InitConfig(vectors=file), output=tmp_path / "run"), ONE)
    vocabulary = Vocabulary.read(run.folder / "vocabulary.parquet")
    expected = first_rows(read_vectors(file), vocabulary, STILL)
    theirs, ours = usual_start(FULL), parameters(run.folder, FULL)
    np.testing.assert_allclose(code_table(ours)[FIRST:], expected.rows, atol=1e-7)
    assert np.abs(code_table(ours)[FIRST:] - code_table(theirs)[FIRST:]).max() > EMBEDDING_STDDEV / 2
    np.testing.assert_allclose(code_table(ours)[:FIRST], code_table(theirs)[:FIRST], atol=1e-7)
    for tree in (theirs, ours):
        tree["behrt"]["embeddings"]["code"]["embedding"] = None
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-7), ours, theirs)
    covered = [code in read_vectors(file).codes for code in vocabulary.codes]
    events = vocabulary.counts[covered].sum() / vocabulary.counts.sum()
    coverage = run.summary["init_vectors"]
    assert coverage == json.loads((run.folder / "config.json").read_text())["facts"]["vectors"]
    assert coverage["codes"] == sum(covered) == 12
    assert coverage["event_share"] == pytest.approx(events)
    said = " ".join(capsys.readouterr().out.split())
    assert f"12 codes, 34.3% of the vocabulary and {events:.1%} of the train events" in said
    assert "vectors-cover-little" in said


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["groups", "lora_pretrained", "lora"])
def test_vectors_are_frozen_as_the_regime_says(file, tmp_path, regime):
    freezing = FreezingConfig(groups=("head", "base")) if regime == "groups" else FreezingConfig(regime)
    config = replace(FULL if regime == "groups" else SHORT, freezing=freezing, init=InitConfig(vectors=file))
    run = pretrain(replace(config, output=tmp_path / "run"), ONE)
    vocabulary = Vocabulary.read(run.folder / "vocabulary.parquet")
    found = code_table(parameters(run.folder, config))[FIRST:]
    expected = first_rows(read_vectors(file), vocabulary, config).rows
    assert np.array_equal(found, expected) == (regime != "lora")
    ids = [finding["id"] for finding in run.summary["findings"]]
    assert ("frozen-beside-vectors" in ids) == (regime != "lora")
    assert "frozen-at-random" not in ids


@pytest.mark.slow
def test_a_resumed_run_reads_its_vectors_only_where_it_has_no_checkpoint_yet(file, tmp_path, monkeypatch):
    source = tmp_path / "vectors.parquet"
    source.write_bytes(file.read_bytes())
    config = replace(STILL, init=InitConfig(vectors=source), output=tmp_path / "run")

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(workflow, "begin", killed)
        pretrain(config, ONE)
    source.unlink()
    resumed = replace(config, resume=True)
    with pytest.raises(InputError, match=r"init\.vectors: there is no file"):
        pretrain(resumed, ONE)
    source.write_bytes(file.read_bytes())
    first = pretrain(resumed, ONE)
    rows = first_rows(read_vectors(file), Vocabulary.read(first.folder / "vocabulary.parquet"), config).rows
    np.testing.assert_allclose(code_table(parameters(first.folder, config))[FIRST:], rows, atol=1e-7)
    source.unlink()
    second = pretrain(changed(resumed, "train", epochs=2), ONE)
    assert second.summary["epochs"] == 2
    assert second.summary["init_vectors"] == first.summary["init_vectors"] != {}


def test_what_is_wrong_is_told_before_any_data_is_read(file, tmp_path, monkeypatch):
    def no_data(*_):
        raise AssertionError("data was read first")

    monkeypatch.setattr(workflow, "load_sequences", no_data)
    other = tmp_path / "notes.txt"
    other.write_text("no vectors")
    for init, message in (
        (InitConfig(run=tmp_path, vectors=file), r"init\.run and init\.vectors both"),
        (InitConfig(vectors=tmp_path / "none.txt"), "there is no file"),
        (InitConfig(vectors=other), "in no form that is read"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain(replace(FULL, init=init, output=tmp_path / "run"), ONE)
        assert not (tmp_path / "run").exists()
