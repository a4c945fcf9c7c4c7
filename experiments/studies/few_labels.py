"""Study: fine-tuning with few labels beside logistic regression and gradient boosting on counts of codes.

Three tasks on generated records: one strong cause (a code that is in the history or not), one value that
decides (the last of a laboratory test's), and the first occurrence of a diagnosis, as make-labels labels it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.cli import main as command
from behrt_jax.config import DataConfig, OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.presets import SMALL
from behrt_jax.records.meds_export import write_meds
from behrt_jax.records.synthetic.clinical import generate_clinical
from behrt_jax.run_folder import SUMMARY_FILE
from behrt_jax.workflows.pretrain import pretrain

TEST = "LAB//GLUCOSE"
CAUSE = "one strong cause"
VALUE = "one value decides"
DIAGNOSIS = "first diagnosis"
TASKS = (CAUSE, VALUE, DIAGNOSIS)
SIZES = (200, 1000, 10_000)
SUBJECTS = 20_000
EPOCHS = 8


def prepared_records(folder: Path, subjects: int = SUBJECTS) -> Path:
    """Generated records with a laboratory test whose values are drawn at random, prepared."""
    output = folder / "prepared"
    if not output.is_dir():
        made = generate_clinical(subjects, 495, 15.0, 0.9, 0)
        events = made.events
        rng = np.random.default_rng(1)
        at = np.sort(rng.choice(events.num_rows, events.num_rows // 12, replace=False))
        tests = events.take(pa.array(at))
        tests = tests.filter(pa.compute.is_valid(tests["time"]))
        tests = tests.filter(pa.compute.not_equal(tests["code"].cast(pa.string()), "MEDS_BIRTH"))
        codes = pa.array([TEST] * tests.num_rows).dictionary_encode()
        values = pa.array(rng.normal(size=tests.num_rows).astype(np.float32))
        tests = tests.set_column(tests.schema.get_field_index("code"), "code", codes)
        tests = tests.set_column(tests.schema.get_field_index("numeric_value"), "numeric_value", values)
        plain = events.set_column(
            events.schema.get_field_index("code"), "code", events["code"].cast(pa.string())
        )
        tests = tests.set_column(
            tests.schema.get_field_index("code"), "code", tests["code"].cast(pa.string())
        )
        joined = pa.concat_tables([plain, tests.cast(plain.schema)])
        joined = joined.set_column(
            joined.schema.get_field_index("code"), "code", joined["code"].dictionary_encode()
        ).combine_chunks()
        write_meds(
            [joined.unify_dictionaries()],
            folder / "meds",
            splits={},
            descriptions=made.descriptions,
            dataset_name="made up",
        )
        options = [
            "--codes",
            ".",
            "--exclude_codes",
            "MEDS_",
            "--value_codes",
            TEST,
            "--tuning_fraction",
            "0.15",
        ]
        arguments = ["prepare", "--input", str(folder / "meds"), "--output", str(output), *options]
        if status := command([*arguments, "--held_out_fraction", "0.2"]):
            sys.exit(status)
    return output


def base_run(folder: Path, data: Path) -> Path:
    """A small pretrained model of these records."""
    output = folder / "base"
    if not (output / SUMMARY_FILE).is_file():
        pretrain(
            PretrainConfig(
                name="few_labels_base",
                model=replace(SMALL, hidden_size=64, embedding_size=64, positions=64),
                data=DataConfig(source="prepared", path=data),
                optimizer=OptimizerConfig(learning_rate=3e-3),
                train=TrainConfig(epochs=EPOCHS, batch_size=128, log_every=50),
                output=output,
            )
        )
    return output


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(base_run(folder, prepared_records(folder)))
