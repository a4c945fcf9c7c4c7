"""Skip-gram vectors of codes, and the study of what they are worth."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import SEP, SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import read_document
from behrt_jax.weights.code_vectors import VECTORS_FILE, read_vectors
from behrt_jax.workflows.prepare import prepare_records
from experiments.studies import skipgram
from experiments.studies.embeddings import (
    BASE,
    STRATEGIES,
    EmbeddingStudyConfig,
    Start,
    embedding_study,
    run_config,
    train_vectors,
)
from experiments.studies.skipgram import Sentences, SkipGramConfig, skipgram_command
from tests.models.rows import tiny_model
from tests.workflows.small_run import changed

FIRST = len(SPECIAL_TOKENS)
ONE = jax.devices()[:1]


def test_sentences_are_subjects_or_visits_as_often_as_asked(monkeypatch):
    codes = np.array([5, 6, SEP, 7, SEP, 6, SEP, SEP], np.int32)
    visits = np.array([0, 0, 0, 1, 1, 0, 0, 1], np.int32)
    zeros = np.zeros(8, np.int64)
    of_two = Sequences(np.array([1, 2]), np.array([0, 5, 8]), codes, zeros, visits, zeros)
    names = ("", "", "", "", "", "a", "b", "c")
    by_subject, by_visit = Sentences(of_two, names), Sentences(of_two, names, by_visit=True)
    for _ in range(2):
        assert list(by_subject) == [["a", "b", "c"], ["b"]]
        assert list(by_visit) == [["a", "b"], ["c"], ["b"]]
    monkeypatch.setattr(skipgram, "LONGEST", 2)
    assert list(by_subject) == [["a", "b"], ["c"], ["b"]]


def test_fewer_subjects_are_seen_more_often_in_fewer_steps(tmp_path):
    config = EmbeddingStudyConfig(output=tmp_path)
    start = Start(subjects=80, vectors=tmp_path / "v")
    runs = {}
    for name in STRATEGIES:
        shared = changed(BASE, "data", train_fraction=0.01)
        runs[name] = run_config(config, shared, name, 1, start)
    assert len({run.output for run in runs.values()}) == 3
    for name, run in runs.items():
        assert run.train.epochs == 10 * BASE.train.epochs
        assert run.train.validate_every == -(-run.train.epochs * 2 // 12)
        assert (run.train.seed, run.data.train_fraction) == (1, 0.01)
        assert (run.init.vectors is None) == (name == "random")
        assert run.freezing.groups == (("head", "base") if name == "vectors, frozen" else ())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Subjects who have codes of one of two groups."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    lines = ["subject_id,time,code,birth"]
    for subject in range(400):
        group = "AB"[subject % 2]
        lines += [f"{subject},2020-01-{day:02d},{group} {rng.integers(5)},1960-01-01" for day in range(1, 13)]
    (folder / "events.csv").write_text("\n".join(lines))
    table = replace(PrepareConfig().table, birth="birth")
    prepare_records(
        PrepareConfig(source="table", input=folder / "events.csv", output=folder / "prepared", table=table)
    )
    return folder / "prepared"


@pytest.mark.slow
def test_codes_that_occur_together_have_vectors_that_are_alike(prepared, tmp_path, capsys):
    pytest.importorskip("gensim")
    arguments = ["--data", str(prepared), "--output", str(tmp_path / "vectors"), "--dimension", "8"]
    assert skipgram_command([*arguments, "--epochs", "5"]) == 0
    found = read_vectors(tmp_path / "vectors" / VECTORS_FILE)
    assert sorted(found.codes) == sorted(read_prepared(prepared).vocabulary.codes[FIRST:])
    assert len(found.codes) == 10
    units = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    alike = units @ units.T
    same = np.array([[one[0] == other[0] for one in found.codes] for other in found.codes])
    assert alike[same].min() > alike[~same].max()
    assert read_vectors(tmp_path / "vectors" / "vectors.txt").codes[0] == found.codes[0].replace(" ", "_")
    assert skipgram_command([*arguments, "--epochs", "5"]) == 2
    assert "--output" in capsys.readouterr().err


def test_without_gensim_the_command_says_what_to_install(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    monkeypatch.setitem(sys.modules, "gensim", None)
    with pytest.raises(InputError, match=r"pip install 'behrt-jax\[vectors\]'"):
        skipgram.skipgram_vectors(read_prepared(prepared), SkipGramConfig())


def tiny_study(output, vectors_of="all"):
    base = changed(changed(BASE, "data", subjects=300, vocabulary_size=70), "train", epochs=1)
    return EmbeddingStudyConfig(
        replace(base, model=tiny_model(positions=24, layers=1)),
        fractions=(0.2, 1.0),
        seeds=1,
        skipgram=SkipGramConfig(dimension=8, epochs=2),
        vectors_of=vectors_of,
        output=output,
    )


@pytest.mark.slow
def test_vectors_are_of_all_train_subjects_or_of_those_of_the_model(tmp_path):
    pytest.importorskip("gensim")
    known = {}
    for vectors_of in ("all", "same"):
        config = tiny_study(tmp_path, vectors_of)
        for fraction in config.fractions:
            data = load_sequences(replace(config.pretrain.data, train_fraction=fraction), sep_token=False)
            known[vectors_of, fraction] = read_vectors(train_vectors(config, data, fraction)).vectors
    files = sorted(path.parent.name for path in tmp_path.glob("*/vectors.parquet"))
    assert files == ["vectors_of_0.2", "vectors_of_1", "vectors_of_all"]
    np.testing.assert_array_equal(known["all", 0.2], known["all", 1.0])
    np.testing.assert_array_equal(known["same", 1.0], known["all", 1.0])
    assert len(known["same", 0.2]) < len(known["all", 1.0])


@pytest.mark.slow
def test_the_study_as_a_whole(tmp_path, monkeypatch):
    pytest.importorskip("gensim")
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    config = tiny_study(tmp_path)
    found = embedding_study(config)
    assert found == json.loads((tmp_path / "embedding_study.json").read_text())
    few, all_of_them = found["rows"]
    assert (few["fraction"], all_of_them["fraction"]) == (0.2, 1.0)
    assert few["subjects"] == round(0.2 * all_of_them["subjects"])
    assert few["targets"] == all_of_them["targets"]
    assert few["baselines"]["oracle"] == all_of_them["baselines"]["oracle"] < few["baselines"]["unigram"]
    for row in found["rows"]:
        random = row["strategies"]["random"]
        assert set(row["strategies"]) == set(STRATEGIES)
        assert 0.5 < row["coverage"]["vocabulary_share"] <= 1
        assert random["below_random"] == {"value": 0, "low": 0, "high": 0}
        for name, figures in row["strategies"].items():
            gain = figures["below_random"]
            assert gain["value"] == pytest.approx(random["loss"] - figures["loss"])
            assert gain["low"] <= gain["value"] <= gain["high"]
            stem = f"{name.replace(', ', '_')}_{row['fraction']:g}_0"
            summary = read_document(tmp_path / "all" / stem, "summary.json")
            assert ("init_vectors" in summary) == (name != "random")
            assert summary["data"]["splits"]["train"]["subjects"] == row["subjects"]
            assert (summary["parameters"]["embedding"]["trainable"] == 0) == (name == "vectors, frozen")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/summary.json")}
    assert len(before) == 6
    assert embedding_study(config) == found
    assert before == {path: path.stat().st_mtime_ns for path in before}
