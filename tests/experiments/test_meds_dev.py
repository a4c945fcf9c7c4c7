"""The entry of MEDS-DEV: its form, the commands that it becomes, and the chain of them on generated data."""

import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from behrt_jax import __version__
from behrt_jax.cli import COMMANDS, parse
from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.data import PrepareConfig
from behrt_jax.config.training import FinetuneConfig, PretrainConfig
from behrt_jax.errors import InputError
from experiments.meds_dev.run import ENTRY, STAGES, MedsDevConfig, generated, meds_dev, run_stage

SCHEMA = {
    "subject_id": "int64",
    "prediction_time": "timestamp[us]",
    "boolean_value": "bool",
    "predicted_boolean_value": "bool",
    "predicted_boolean_probability": "double",
}
"""That of meds-evaluation 0.0.3."""


@pytest.fixture(scope="module")
def entry():
    return yaml.safe_load((ENTRY / "model.yaml").read_text())


@pytest.fixture
def started(tmp_path, entry):
    """Called with `demo`: the configurations that the stages would start, folders having blanks in them."""
    environment, said = tmp_path / "an environment", tmp_path / "said"
    (environment / "bin").mkdir(parents=True)
    program = environment / "bin" / "behrt-jax"
    program.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {shlex.quote(str(said))}\necho >> {said}\n')
    program.chmod(0o755)

    def start(demo):
        given = {"dataset_dir": tmp_path / "a data set", "labels_dir": tmp_path / "some labels"}
        folders = [tmp_path / f"{demo} {data} {mode}" for data, mode in STAGES]
        for (data, mode), folder, before in zip(STAGES, folders, [None, *folders[:-1]], strict=True):
            variables = {**given, "output_dir": folder, "split": "tuning", "demo": demo, "model_dir": ENTRY}
            command = entry["commands"][data][mode].format(**variables, model_initialization_dir=before)
            run_stage(command, folder, environment)
        lines = [shlex.split(line) for line in said.read_text().splitlines()]
        said.unlink()
        return folders, [parse(COMMANDS[name], arguments, "") for name, *arguments in lines]

    return start


def test_the_entry_has_the_form_that_meds_dev_asks_for(entry):
    assert {path.name for path in ENTRY.iterdir()} == {
        "README.md",
        "model.yaml",
        "requirements.txt",
        "refs.bib",
    }
    assert set(entry) == {"metadata", "commands"}
    about = entry["metadata"]
    assert isinstance(about["description"], str) and all(link.startswith("http") for link in about["links"])
    assert about["contacts"] and all(isinstance(contact["name"], str) for contact in about["contacts"])
    assert [(data, mode) for data, modes in entry["commands"].items() for mode in modes] == [*STAGES]
    assert (ENTRY / "requirements.txt").read_text() == f"behrt-jax[commands]=={__version__}\n"


@pytest.mark.parametrize("demo", [False, True])
def test_each_stage_starts_commands_that_are_understood(started, tmp_path, demo):
    (pretraining, finetuning, predicting), configs = started(demo)
    prepare, pretrain, finetune, predict = configs
    assert [type(config) for config in configs] == [
        PrepareConfig,
        PretrainConfig,
        FinetuneConfig,
        PredictConfig,
    ]
    assert prepare.input == tmp_path / "a data set" and prepare.value_codes == (".",)
    assert prepare.output == pretrain.data.path == finetune.data == pretraining / "prepared"
    assert pretrain.data.window == "random" and pretrain.model.positions >= 512
    assert finetune.init == pretrain.output == pretraining / "pretrained"
    assert finetune.labels == predict.labels == tmp_path / "some labels"
    assert predict.model == finetune.output == finetuning / "finetuned" and predict.split == "tuning"
    assert predict.data is None and predict.output.parent == predicting
    assert (pretrain.model.layers, finetune.search.size) == ((2, 0) if demo else (6, 8))
    assert not pretrain.resume and not finetune.resume
    # Cut short and started again.
    for folder in (pretraining, finetuning, predicting):
        (folder / ".done").unlink()
    pretrain.output.mkdir()
    finetune.output.mkdir()
    _, (_, pretrain, finetune, _) = started(demo)
    assert pretrain.resume and finetune.resume


def test_a_stage_that_fails_is_told_and_runs_again_and_one_that_is_done_does_not(tmp_path):
    with pytest.raises(InputError, match=r"cmd\.sh ended with status 3"):
        run_stage("false_is_no_end=1\n(exit 3)\ntouch after", tmp_path / "stage", tmp_path)
    assert not (tmp_path / "stage" / "after").exists()
    for _ in range(2):
        run_stage("echo again >> lines", tmp_path / "stage", tmp_path)
    assert (tmp_path / "stage" / "lines").read_text() == "again\n"


def test_labels_without_their_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="dataset_dir and --labels_dir go together"):
        meds_dev(MedsDevConfig(labels_dir=tmp_path, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_chain_predicts_what_one_value_decides(tmp_path, capfd):
    pytest.importorskip("meds_evaluation")
    dataset, labels = generated(tmp_path / "generated", 600)
    config = MedsDevConfig(
        dataset_dir=dataset,
        labels_dir=labels,
        output=tmp_path / "out",
        demo=True,
        environment=Path(sys.prefix),
    )
    found = meds_dev(config)
    assert found["samples_equally_weighted"]["roc_auc_score"] > 0.9
    assert "roc_auc_score" in capfd.readouterr().out
    folder = tmp_path / "out" / "supervised" / "predict"
    assert [path.name for path in folder.rglob("*.parquet")] == ["predictions.parquet"]
    table = pq.read_table(folder / "predictions.parquet")
    assert {field.name: str(field.type) for field in table.schema} == SCHEMA
    expected = pq.read_table(labels / "held_out")
    for name in ("subject_id", "prediction_time", "boolean_value"):
        assert table[name].to_pylist() == expected[name].to_pylist()
