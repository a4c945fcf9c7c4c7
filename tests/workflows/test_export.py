"""Exports: equal predictions from run, folder and program; a card that says what is so, and names nobody."""

import json
import shutil
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest

from behrt_jax.cli import COMMANDS, main, parse
from behrt_jax.config.commands import DoctorConfig, EvaluateConfig, ExportConfig, PredictConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.tasks import KINDS, Task
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.attention import CHUNKED_FROM
from behrt_jax.models.behrt import BEHRTForMLM, PatientEmbedding
from behrt_jax.tracking.model_card import tokens_read
from behrt_jax.weights.code_vectors import read_vectors, text_name
from behrt_jax.weights.portable import write_model
from behrt_jax.workflows.doctor import examine_folder
from behrt_jax.workflows.evaluate import evaluate
from behrt_jax.workflows.export import export, predicted, subjects_by_code
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.loaded import load
from behrt_jax.workflows.predict import predict
from behrt_jax.workflows.pretrain import pretrain
from tests.models.rows import VOCABULARY, random_batch, tiny_model
from tests.workflows.evaluated import FIRST_ID
from tests.workflows.finetune_case import ONE
from tests.workflows.small_run import SMALL_RUN, changed


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    """A fine-tuned run with its adapters merged, as a folder."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(ExportConfig(run=case.run(), output=folder, licence="apache-2.0", vectors=True), ONE)
    return folder


@pytest.fixture(scope="module")
def with_program(case, tmp_path_factory):
    """The same, with a program."""
    pytest.importorskip("flatbuffers")
    folder = tmp_path_factory.mktemp("program") / "model"
    export(ExportConfig(run=case.run(), output=folder, stablehlo=True), ONE)
    return folder


def probabilities(table):
    return table["predicted_boolean_probability"].to_numpy()


def test_a_fine_tuned_export_predicts_as_its_run_does(case, exported, tmp_path):
    known = case.predicted(tmp_path / "run.parquet")
    found = case.predicted(tmp_path / "export.parquet", model=exported)
    # Merged once in full precision, not in each forward pass: up to rounding.
    np.testing.assert_allclose(probabilities(found), probabilities(known), rtol=1e-6)
    assert found.drop_columns("predicted_boolean_probability").equals(
        known.drop_columns("predicted_boolean_probability")
    )


@pytest.mark.slow
def test_other_ways_to_the_same_export(case, exported, tmp_path):
    known = case.predicted(tmp_path / "run.parquet")
    export(ExportConfig(run=case.run(), output=tmp_path / "beside", adapters="beside"), ONE)
    beside = case.predicted(tmp_path / "beside.parquet", model=tmp_path / "beside")
    np.testing.assert_array_equal(probabilities(beside), probabilities(known))
    # An export is exported again, and an adapter is on its base.
    export(ExportConfig(run=exported, output=tmp_path / "again"), ONE)
    export(ExportConfig(run=case.run() / "adapter", base=case.base, output=tmp_path / "of_adapter"), ONE)
    for name in ("again", "of_adapter"):
        assert (tmp_path / name / "model.safetensors").read_bytes()[-4096:] == (
            exported / "model.safetensors"
        ).read_bytes()[-4096:]


def test_learnt_vectors_are_the_code_embedding(exported):
    loaded, first = load(exported, devices=ONE), len(SPECIAL_TOKENS)
    table = loaded.params["behrt"]["embeddings"]["code"]["embedding"]
    found = {name: read_vectors(exported / name) for name in ("vectors.parquet", "vectors.txt")}
    assert found["vectors.parquet"].codes == loaded.vocabulary.codes[first:]
    assert found["vectors.txt"].codes == tuple(map(text_name, loaded.vocabulary.codes[first:]))
    for one in found.values():
        np.testing.assert_array_equal(one.vectors, table[first:])


def test_a_folder_holds_no_path_and_no_subject(case, with_program):
    subjects = [str(FIRST_ID + k) for k in range(200)]
    for path in with_program.rglob("*"):
        content = path.read_bytes()
        for word in (str(case.folder), *subjects):
            assert word.encode() not in content, path.name
    assert sorted(path.name for path in with_program.iterdir()) == [
        "README.md", "config.json", "files.json", "model.safetensors", "predict.stablehlo",
        "preparation.json", "vocabulary.parquet",
    ]  # fmt: skip


WITHOUT_BIASES = {"ffn": "geglu", "norm": "rms", "bias": False, "tied_decoder": True}


def histories(batch: Batch):
    return batch.codes, batch.ages, batch.visits


def test_the_program_predicts_as_the_command_does(case, with_program):
    model, call = load(case.run(), devices=ONE), program_of(with_program)
    known = model.predict(case.data)
    batch = model.batch(case.data, limit=None)
    for rows in (1, 7, len(known.values)):  # any number of rows
        found = np.asarray(call(*(column[:rows] for column in histories(batch))))
        assert found.dtype == np.float32 and found.shape == (rows, 1)
        np.testing.assert_allclose(found, known.values[:rows], rtol=1e-5)


def program_of(folder):
    import jax.export

    return jax.export.deserialize(bytearray((folder / "predict.stablehlo").read_bytes())).call


ALONE = textwrap.dedent("""
    import sys

    for name in ("behrt_jax", "flax", "optax", "orbax", "pyarrow", "chex", "safetensors"):
        sys.modules[name] = None  # as where they are not installed
    import re
    import jax.export, numpy as np

    folder, histories, output = sys.argv[1:]
    given = np.load(histories)
    program = jax.export.deserialize(open(folder + "/predict.stablehlo", "rb").read())
    np.save(output, program.call(given["codes"], given["ages"], given["visits"]))
    import os
    os.chdir(folder)
    lines = re.search(r"```python\\n(import jax.export.*?)```", open("README.md").read(), re.DOTALL)[1]
    exec(lines)
""")


@pytest.mark.slow
def test_a_program_runs_where_only_jax_and_flatbuffers_are_installed(case, with_program, tmp_path):
    model = load(case.run(), devices=ONE)
    batch, known = model.batch(case.data, limit=None), model.predict(case.data)
    np.savez(tmp_path / "h.npz", **dict(zip(("codes", "ages", "visits"), histories(batch), strict=True)))
    command = [sys.executable, "-c", ALONE, with_program, tmp_path / "h.npz", tmp_path / "found.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), known.values, rtol=1e-5)
    assert done.stdout.startswith("[[0.")  # what the card says to run


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_says_what_files_of_predictions_say(kind):
    outputs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) * 4
    task = Task(kind, ("a", "b", "c"), mean=3.0, deviation=2.5)
    temperature = 1.7 if kind != "regression" else 1.0
    found = jax.jit(lambda x: predicted(task.of.predicts, task, x, temperature))(outputs)
    known = task.of.predictions(outputs, temperature)
    if kind == "regression":
        known = known * task.deviation + task.mean
        np.testing.assert_allclose(found[:, 0], task.of.in_file(task, outputs), rtol=1e-6)
    np.testing.assert_allclose(found, known, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("special", {"sep_token": True}, "Each visit ends with the code 4 ([SEP])"),
        (
            "dated",
            {"position_embedding": "rope_time", "time": "time2vec", **WITHOUT_BIASES},
            "`days` are whole days from 1970-01-01 to the event",
        ),
    ],
)
def test_a_pretrained_program_gives_the_vectors_of_the_command(case, tmp_path, name, settings, told):
    """With [CLS], which it puts in front by itself."""
    pytest.importorskip("flatbuffers")
    base = case.pretrained(name, cls_token=True, **settings)
    export(ExportConfig(run=base, output=tmp_path / "m", stablehlo=True), ONE)
    model = load(tmp_path / "m", devices=ONE)
    batch, known = model.batch(case.data, limit=None), model.embed(case.data)
    columns = (*histories(batch), *([batch.days] if model.config.reads_days else []))
    found = np.asarray(program_of(tmp_path / "m")(*(column[:, 1:] for column in columns)))
    np.testing.assert_allclose(found, known.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(known.values, load(base, devices=ONE).embed(case.data).values)
    assert told in (tmp_path / "m" / "README.md").read_text()
    with pytest.raises(InputError, match="the PyTorch layout is for") if name == "dated" else nullcontext():
        export(ExportConfig(run=base, output=tmp_path / "torch", format="torch"), ONE)


@pytest.mark.slow
def test_long_histories_are_read_in_tiles_by_a_program_too(tmp_path):
    """In bfloat16, its layers stacked, as large models are."""
    pytest.importorskip("flatbuffers")
    config = tiny_model(positions=CHUNKED_FROM + 8, compute_dtype="bfloat16", scan_layers=True)
    network, batch = (
        BEHRTForMLM(config, VOCABULARY),
        random_batch(0, rows=3, length=config.positions, segments=1),
    )
    codes = (*SPECIAL_TOKENS, *(f"CODE//{index}" for index in range(VOCABULARY - len(SPECIAL_TOKENS))))
    vocabulary = Vocabulary(codes, np.zeros(VOCABULARY, np.int64), (None,) * VOCABULARY)
    params = jax.jit(network.init)(jax.random.key(0), batch)["params"]
    write_model(tmp_path / "m", config, vocabulary, None, params)
    export(ExportConfig(run=tmp_path / "m", output=tmp_path / "n", stablehlo=True), ONE)
    found = np.asarray(program_of(tmp_path / "n")(*histories(batch)))
    pooled = PatientEmbedding(replace(config, attention="dense"), VOCABULARY, "mean")
    known = pooled.apply({"params": {"behrt": params["behrt"]}}, batch, 1)[:, 0]
    np.testing.assert_allclose(found, known, rtol=0.05, atol=0.05)
    model = load(tmp_path / "n", devices=ONE)
    np.testing.assert_allclose(model.attention(batch).sum(-1)[:, :, :, 0], 1, rtol=1e-5)


@pytest.mark.slow
def test_a_pretraining_run_with_adapters_and_its_exports_are_the_same_model(tmp_path):
    config = changed(SMALL_RUN, "model", layers=1)
    config = changed(config, "data", subjects=60, vocabulary_size=40, source="uniform")
    config = changed(config, "train", epochs=1)
    run = pretrain(replace(config, output=tmp_path / "run"), ONE).folder
    known = load(run, devices=ONE)
    assert known.setup.predictor.lora is not None
    for adapters in ("merged", "beside"):
        folder = tmp_path / adapters
        written = export(ExportConfig(run=run, output=folder, adapters=adapters), ONE)
        assert written.step == known.step > 0
        found = load(folder, devices=ONE)
        assert (found.setup.predictor.lora is None) == (adapters == "merged")
        jax.tree.map(np.testing.assert_array_equal, found.params, known.params)
    own = load(run / "adapter", run, ONE)
    jax.tree.map(np.testing.assert_array_equal, own.params, known.params)
    with pytest.raises(InputError, match="base is missing: give the run that the adapter"):
        load(run / "adapter", devices=ONE)


@pytest.mark.slow
def test_finetuning_from_an_export_equals_that_from_its_run(case, tmp_path):
    export(ExportConfig(run=case.base, output=tmp_path / "base"), ONE)
    config = replace(case.config(), init=tmp_path / "base", output=tmp_path / "task")
    finetune(config, ONE)
    known = case.predicted(tmp_path / "run.parquet")
    for model in (tmp_path / "task", tmp_path / "task" / "adapter"):
        found = case.predicted(tmp_path / f"{model.name}.parquet", model=model)
        np.testing.assert_array_equal(probabilities(found), probabilities(known))
    moved = shutil.move(tmp_path / "base", tmp_path / "moved")
    found = case.predicted(
        tmp_path / "moved.parquet", model=tmp_path / "task" / "adapter", base=tmp_path / "moved"
    )
    np.testing.assert_array_equal(probabilities(found), probabilities(known))
    assert moved


@pytest.mark.slow
def test_new_codes_of_an_adapter_are_in_the_table_of_its_export(case, tmp_path):
    own = case.labelled("binary")
    rows = [row._replace(code="NEW//1") if row.code == "CODE//1" else row for row in own.rows]
    own.prepare(rows, tmp_path / "prepared")
    run = tmp_path / "run"
    finetune(replace(case.config(), data=tmp_path / "prepared", extend_vocabulary=True, output=run), ONE)
    given = {"data": tmp_path / "prepared"}
    known = case.predicted(tmp_path / "run.parquet", model=run, **given)
    for adapters in ("merged", "beside"):
        export(ExportConfig(run=run, output=tmp_path / adapters, adapters=adapters, vectors=True), ONE)
        assert read_vectors(tmp_path / adapters / "vectors.parquet").codes[-1] == "NEW//1"
        assert load(tmp_path / adapters, devices=ONE).vocabulary.codes[-1] == "NEW//1"
        found = case.predicted(tmp_path / f"{adapters}.parquet", model=tmp_path / adapters, **given)
        np.testing.assert_allclose(probabilities(found), probabilities(known), rtol=1e-6)


def test_what_cannot_be_exported_is_told(case, exported, tmp_path, capsys):
    cases = {
        "--run is missing": {"run": None},
        "--output is missing": {"output": None},
        "--min_subjects is 0": {"min_subjects": 0},
        "--licence is empty": {"licence": " "},
        "holds other files": {"output": case.folder},
        "holds no finished run": {"run": tmp_path},
        r"--adapters beside: .*base has no adapters": {"run": case.base, "adapters": "beside"},
        r"base: .* is no adapter": {"run": case.base, "base": case.base},
        "is not what evaluate writes": {"run": case.base, "evaluation": case.run()},
    }
    (case.run() / "metrics.json").write_text("{}")
    for message, options in cases.items():
        with pytest.raises(InputError, match=message):
            export(ExportConfig(**{"run": case.run(), "output": tmp_path / "x", **options}), ONE)
    (case.run() / "metrics.json").unlink()
    assert not (tmp_path / "x").exists()
    assert main(["export", str(exported), "--output", str(exported)]) == 2
    assert "holds other files" in capsys.readouterr().err
    options = parse(COMMANDS["export"], ["runs/a", "--output", "b", "--stablehlo"], "")
    assert options.run.name == "a" and options.stablehlo
    with pytest.raises(InputError, match=r"exported|export of a fine-tuned model: give a pretraining run"):
        finetune(replace(case.config(), init=exported, output=tmp_path / "y"), ONE)
    export(ExportConfig(run=case.base, output=tmp_path / "base"), ONE)
    with pytest.raises(InputError, match="base is an exported model, no run"):
        examine_folder(DoctorConfig(run=tmp_path / "base"))
    with pytest.raises(InputError, match="is the export of a pretrained model: give a fine-tuned one"):
        predict(PredictConfig(model=tmp_path / "base", data=case.data, output=tmp_path / "z"), ONE)


# What the folder tells.


def test_counts_of_codes_that_few_subjects_have_are_left_out(case, tmp_path):
    data = read_prepared(case.data)
    train, size = data.splits["train"], len(data.vocabulary)
    carriers = subjects_by_code(train, size)
    expected = np.zeros(size, int)
    for start, end in zip(train.offsets[:-1], train.offsets[1:], strict=True):
        expected[np.unique(train.codes[start:end])] += 1
    np.testing.assert_array_equal(carriers, expected)
    least = int(np.median(carriers[len(SPECIAL_TOKENS) :]))
    rare = carriers < least
    rare[: len(SPECIAL_TOKENS)] = False
    assert rare.any() and (data.vocabulary.counts[rare] >= least).any()  # more events than subjects
    for run in (case.base, case.run()):
        folder = tmp_path / run.name
        export(ExportConfig(run=run, output=folder, min_subjects=least), ONE)
        found = Vocabulary.read(folder / "vocabulary.parquet")
        np.testing.assert_array_equal(found.counts, np.where(rare, 0, data.vocabulary.counts))
        card = (folder / "README.md").read_text()
        assert f"The counts of {rare.sum()} codes that fewer than {least} train subjects have" in card
        assert not any(f"| {data.vocabulary.codes[row]} |" in card for row in np.flatnonzero(rare))


def test_without_the_data_events_are_counted(case, tmp_path):
    run = shutil.copytree(case.base, tmp_path / "run")
    (run / "files.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data"]["path"], config["recorded"] = str(tmp_path / "gone"), False
    (run / "config.json").write_text(json.dumps(config))
    known = Vocabulary.read(run / "vocabulary.parquet").counts
    least = int(known[len(SPECIAL_TOKENS) :].min()) + 1
    export(ExportConfig(run=run, output=tmp_path / "m", min_subjects=least), ONE)
    found = Vocabulary.read(tmp_path / "m" / "vocabulary.parquet").counts
    np.testing.assert_array_equal(found, np.where(known < least, 0, known))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "The subjects of each code are not known" in card and "train events are of are left out" in card


def front_matter(card):
    head = card.split("---\n")[1]
    return {
        name: json.loads(value) for name, _, value in (line.partition(": ") for line in head.splitlines())
    }


def test_the_card_says_what_the_run_says(case, exported):
    card, summary = (
        (exported / "README.md").read_text(),
        json.loads((case.run() / "summary.json").read_text()),
    )
    head = front_matter(card)
    assert head["license"] == "apache-2.0" and head["library_name"] == "behrt_jax"
    assert {"binary", "lora"} <= {*head["tags"]}
    (result,) = head["model-index"][0]["results"]
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures == {name: summary["best"][name] for name in ("loss", "auroc")}
    assert len(figures) == len(result["metrics"])
    assert f"examples {summary['data']['train']['examples']}" in card
    assert "| optimizer.learning_rate | 0.02 |" in card and "| lora.rank | 2 |" in card
    assert "```python\nimport behrt_jax\n" in card and "predict.stablehlo" not in card
    fingerprint = json.loads((case.run() / "config.json").read_text())["data"]["fingerprint"]
    assert fingerprint in card and json.loads((exported / "config.json").read_text())["data_fingerprint"]


def test_the_card_tells_of_each_setting_what_is_read():
    plain = replace(tiny_model(), visit_embedding="none")
    read = {
        "age and the position.": {},
        "age, the visit and the position.": {"visit_embedding": "ordinal"},
        "age. Attention reads how many visits lie between two tokens.": {
            "position_embedding": "rope", "position_of": "visit",
        },
        "age and the days since the visit before. Attention reads how many days lie": {
            "position_embedding": "rope_time", "time": "gaps",
        },
        "age, the days since the visit before and the date. Attention reads how many events": {
            "position_embedding": "rope", "time": "time2vec",
        },
    }  # fmt: skip
    for text, settings in read.items():
        assert f"Each token is a code with the patient's {text}" in tokens_read(replace(plain, **settings))


def test_small_numbers_of_subjects_are_not_told(case, tmp_path):
    export(ExportConfig(run=case.run(), output=tmp_path / "m", min_subjects=41), ONE)
    card = (tmp_path / "m" / "README.md").read_text()
    counts = json.loads((case.run() / "summary.json").read_text())["data"]["tuning"]
    assert counts["subjects"] == 40 and "subjects fewer than 41" in card and "subjects 40" not in card


def test_figures_of_an_evaluation_stand_in_the_card_with_their_intervals(case, tmp_path):
    pytest.importorskip("sklearn")
    case.predicted(tmp_path / "p.parquet")
    options = {"predictions": tmp_path / "p.parquet", "baselines": False, "draws": 20}
    record = evaluate(EvaluateConfig(output=tmp_path / "e", **options))
    export(ExportConfig(run=case.run(), output=tmp_path / "m", evaluation=tmp_path / "e"), ONE)
    card = (tmp_path / "m" / "README.md").read_text()
    auroc = record["model"]["figures"]["auroc"]
    row = next(line for line in card.splitlines() if "| held_out split | this model | auroc " in line.lower())
    assert row.endswith(f"| {auroc['value']:.4g} | {auroc['low']:.4g} to {auroc['high']:.4g} |")
    names = [metric["name"] for metric in front_matter(card)["model-index"][0]["results"][0]["metrics"]]
    assert "auroc, held_out split" in names
    with pytest.raises(InputError, match=r"--evaluation: .* is about predictions of .*binary-lora, not of"):
        export(ExportConfig(run=case.base, output=tmp_path / "n", evaluation=tmp_path / "e"), ONE)
