"""The entry of MEDS-DEV beside this file, through its stages and the evaluation.

``python experiments/meds_dev/run.py --demo`` does what MEDS-DEV's own commands ``meds-dev-model mode=full
dataset_type=full`` and ``meds-dev-evaluation`` do, without them: each command of ``model.yaml``, with its
variables filled in, is the script ``cmd.sh`` in a folder of its own, which takes what it writes too.
Source: https://github.com/Medical-Event-Data-Standard/MEDS-DEV, src/MEDS_DEV (models, evaluation, utils.py).
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before the folder of this file, in which `behrt_jax` is the entry and not the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from behrt_jax.cli import Command, run_command
from behrt_jax.data.events import DEATH_CODE, EVENT_SCHEMA, SPLITS
from behrt_jax.data.labels import VALUE_COLUMNS
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.records.meds_export import write_meds
from behrt_jax.records.synthetic.clinical import generate_clinical
from behrt_jax.tracking.console import open_console

ROOT = Path(__file__).parents[2]
ENTRY = Path(__file__).parent / "behrt_jax"
EVALUATION = ("meds==0.3.3", "meds-evaluation==0.0.3")
"""With what MEDS-DEV evaluates, in the versions that it asks for."""
STAGES = (("unsupervised", "train"), ("supervised", "train"), ("supervised", "predict"))
TEST = "LAB//GENERATED//mg/dL"
"""Generated data: the laboratory test whose value decides."""


@dataclass(frozen=True)
class MedsDevConfig:
    """Run the stages of the MEDS-DEV entry and evaluate its predictions, as MEDS-DEV does."""

    dataset_dir: Path | None = None
    """MEDS data set; where not given one is generated, with labels."""
    labels_dir: Path | None = None
    """Folder of its labels: Parquet files by the MEDS label schema."""
    output: Path = Path("runs/meds_dev")
    """Folder of all stages; a stage that is done is not run again."""
    demo: bool = False
    """The entry's demo: a small model, trained for a few epochs."""
    split: str = "held_out"
    """Whose subjects are predicted."""
    subjects: int = 2000
    """Generated data: how many subjects."""
    environment: Path | None = None
    """Python environment with the entry's requirements and meds-evaluation. Where not given, one is made in
    `output`, of this checkout and of the versions that MEDS-DEV asks for."""


def meds_dev(config: MedsDevConfig) -> JsonObject:
    """Run all stages that are not done, evaluate, and show the figures.

    Returns:
        What meds-evaluation found: figures by name, with samples and with subjects weighted equally.

    Raises:
        InputError: one of dataset_dir and labels_dir alone, or a stage that failed.
    """
    output = config.output.resolve()
    if (config.dataset_dir is None) != (config.labels_dir is None):
        raise InputError("--dataset_dir and --labels_dir go together: give both, or none for generated data.")
    dataset, labels = config.dataset_dir, config.labels_dir
    if dataset is None or labels is None:
        dataset, labels = generated(output / "generated", config.subjects)
    environment = config.environment or environment_in(output / "environment")
    commands = yaml.safe_load((ENTRY / "model.yaml").read_text())["commands"]
    given = {"dataset_dir": dataset, "labels_dir": labels, "model_dir": ENTRY, "demo": config.demo}
    folder, before = output, {}
    for data, mode in STAGES:
        folder = output / data / mode
        variables = {**given, **before, "output_dir": folder, "split": config.split}
        run_stage(commands[data][mode].format(**variables), folder, environment)
        before = {"model_initialization_dir": folder}
    judged = output / "evaluation"
    results = judged / "results.json"
    # The folder is what 0.0.3 asks for, the file what later versions do; ++ gives each what it does not know.
    arguments = (
        f"predictions_path={folder}/**/*.parquet",
        f"++output_dir={judged}",
        f"++output_file={results}",
    )
    run_stage(shlex.join(["meds-evaluation-cli", *arguments]), judged, environment)
    found = json.loads(results.read_text())
    with open_console() as console:
        rows = [
            (name, *(f"{found[weights][name]:.4f}" for weights in found))
            for name in found["samples_equally_weighted"]
        ]
        console.table(f"{config.split}, by meds-evaluation", ("figure", *found), rows)
    return found


def run_stage(command: str, folder: Path, environment: Path) -> None:
    """Run a command by bash in its folder, unless it is done; what it says is shown as it comes.

    Raises:
        InputError: it failed.
    """
    done = folder / ".done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cmd.sh").write_text(f"#!/bin/bash\nset -e\n{command}\n")
    path = f"{environment.absolute() / 'bin'}{os.pathsep}{os.environ['PATH']}"
    inside: Mapping[str, str] = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(environment.absolute())}
    status = subprocess.run(["bash", "cmd.sh"], cwd=folder, env=inside, check=False).returncode
    if status:
        raise InputError(f"{folder / 'cmd.sh'} ended with status {status}: see what it said above.")
    done.touch()


def environment_in(folder: Path) -> Path:
    """An environment with the entry's requirements, behrt-jax from this checkout, and meds-evaluation."""
    done = folder / ".installed"
    if not done.exists():
        wheels = folder / "wheels"
        pip = [folder / "bin" / "python", "-m", "pip", "--quiet"]
        for arguments in (
            [sys.executable, "-m", "venv", "--clear", folder],
            [*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT],
            [*pip, "install", "--find-links", wheels, "-r", ENTRY / "requirements.txt", *EVALUATION],
        ):
            if status := subprocess.run(list(map(str, arguments)), check=False).returncode:
                raise InputError(f"{shlex.join(map(str, arguments))} ended with status {status}.")
        done.touch()
    return folder


def generated(folder: Path, subjects: int, seed: int = 0) -> tuple[Path, Path]:
    """A MEDS data set in which one value decides, and the folder of its labels, in shards by split.

    At its last event each subject has one laboratory test with a value from the normal distribution, and the
    label is whether that is above 0. Of five bins of values the middle one has both labels, so that
    nothing that reads bins has a larger AUROC than 0.98, and what does not read them has 0.5.
    """
    dataset, labels = folder / "dataset", folder / "labels"
    if labels.exists():
        return dataset, labels
    rng = np.random.default_rng(seed)
    made = generate_clinical(subjects, 300, 15.0, 0.9, seed)
    events = made.events.select(EVENT_SCHEMA.names)
    alive = (pc.field("code").cast(pa.string()) != DEATH_CODE) & pc.field("time").is_valid()
    last = events.filter(alive).group_by("subject_id").aggregate([("time", "max")]).sort_by("subject_id")
    ids, times = last["subject_id"], last["time_max"]
    values = rng.normal(size=len(last)).astype(np.float32)
    codes = pa.array([TEST] * len(last)).dictionary_encode()
    tests = pa.table([ids, times, codes, values], schema=EVENT_SCHEMA)
    table = pa.concat_tables([events.cast(EVENT_SCHEMA), tests]).unify_dictionaries().combine_chunks()
    of = rng.choice(SPLITS, len(last), p=(0.7, 0.15, 0.15))
    splits = {name: ids.to_numpy()[of == name] for name in SPLITS}
    write_meds([table], dataset, splits=splits, descriptions=made.descriptions, dataset_name="generated")
    keys = {"subject_id": ids, "prediction_time": times}
    nothing = {name: pa.nulls(len(last), VALUE_COLUMNS[name]) for name in ("integer_value", "float_value")}
    table = pa.table({**keys, "boolean_value": values > 0, **nothing})
    for name in SPLITS:
        (labels / name).mkdir(parents=True)
        pq.write_table(table.filter(pa.array(of == name)), labels / name / "0.parquet")
    return dataset, labels


def meds_dev_command(arguments: Sequence[str]) -> int:
    """Run it; returns the exit status of :func:`behrt_jax.cli.run_command`."""
    return run_command(Command(MedsDevConfig, f"{__name__}:meds_dev"), arguments, prog="run.py")


if __name__ == "__main__":
    sys.exit(meds_dev_command(sys.argv[1:]))
