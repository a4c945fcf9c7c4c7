"""Study: fine-tuning with few labels beside logistic regression and gradient boosting on counts of codes.

Three tasks on generated records: one strong cause (a code that is in the history or not), one value that
decides (the last of a laboratory test's), and the first occurrence of a diagnosis within a year. Fine-tuning
is that of ``--config lora`` with nothing else given, alone and blended with the count model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from scipy.special import expit

from behrt_jax.cli import Command, run_command
from behrt_jax.config.data import DataConfig, MakeLabelsConfig, PrepareConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.data.batches import RowShape, task_batches
from behrt_jax.data.events import BIRTH_CODE
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.evaluation.performance import Figures, mean_figures, subject_draws
from behrt_jax.evaluation.task_baselines import count_codes
from behrt_jax.files import read_json, write_json
from behrt_jax.presets import FINETUNE, SMALL
from behrt_jax.records.meds_export import write_meds
from behrt_jax.records.synthetic.clinical import generate_clinical
from behrt_jax.run_folder import SUMMARY_FILE
from behrt_jax.tracking.console import open_console
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.pretrained import open_pretrained
from behrt_jax.training.validation import make_output_step, score
from behrt_jax.workflows.finetune import finetune_on
from behrt_jax.workflows.finetune_run import blended
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.labelled_data import examples_of
from behrt_jax.workflows.make_labels import make_labels
from behrt_jax.workflows.prepare import prepare_records
from behrt_jax.workflows.pretrain import pretrain
from experiments.studies.forecast import figures_of, fitted_baselines

CAUSE, VALUE, DIAGNOSIS = "one strong cause", "one value decides", "first diagnosis"
TEST = "LAB//GLUCOSE"
OUTCOME = "DX//J10"
WAYS = ("fine-tuned", "blended")
DRAWS = 1000


@dataclass(frozen=True)
class FewLabelsStudyConfig:
    """Fine-tune with few labels on generated records, beside a count model and gradient boosting."""

    tasks: tuple[str, ...] = (CAUSE, VALUE, DIAGNOSIS)
    """Which tasks."""
    sizes: tuple[int, ...] = (200, 1000, 10_000)
    """Train labels; a quarter as many are of tuning, and all of held_out."""
    seeds: int = 5
    """Draws of labels, each with a run of its own."""
    subjects: int = 20_000
    """Subjects to generate."""
    hidden: int = 64
    """Width of the encoder."""
    layers: int = 2
    """Its layers."""
    output: Path = Path("runs/few_labels_study")
    """Folder of all runs; what is there already is not made again."""


def prepared_records(config: FewLabelsStudyConfig) -> Path:
    """Generated records, and beside some events a laboratory test whose values are drawn at random."""
    folder, output = config.output, config.output / "prepared"
    if not output.is_dir():
        made = generate_clinical(config.subjects, 495, 15.0, 0.9, 0)
        events = made.events.set_column(
            made.events.schema.get_field_index("code"), "code", made.events["code"].cast(pa.string())
        )
        rng = np.random.default_rng(1)
        tests = events.take(np.sort(rng.choice(events.num_rows, events.num_rows // 12, replace=False)))
        dated = tests["time"].is_valid().to_numpy() & (tests["code"].to_numpy() != BIRTH_CODE)
        tests = tests.filter(pa.array(dated))
        for name, values in (
            ("code", pa.array([TEST] * len(tests))),
            ("numeric_value", pa.array(rng.normal(size=len(tests)).astype(np.float32))),
        ):
            tests = tests.set_column(tests.schema.get_field_index(name), name, values)
        joined = pa.concat_tables([events, tests.cast(events.schema)])
        codes = joined["code"].combine_chunks().dictionary_encode()
        joined = joined.set_column(joined.schema.get_field_index("code"), "code", codes)
        write_meds(
            [joined], folder / "meds", splits={}, descriptions=made.descriptions, dataset_name="made up"
        )
        prepare_records(
            PrepareConfig(
                input=folder / "meds",
                output=output,
                codes=(".",),
                exclude_codes=("MEDS_",),
                value_codes=(TEST,),
                tuning_fraction=0.15,
                held_out_fraction=0.2,
            )
        )
    return output


def base_run(config: FewLabelsStudyConfig, data: Path) -> Path:
    """A small pretrained model of these records."""
    output = config.output / f"base_{config.hidden}x{config.layers}"
    if not (output / SUMMARY_FILE).is_file():
        width, layers = config.hidden, config.layers
        model = replace(SMALL, hidden_size=width, embedding_size=width, layers=layers, positions=64)
        pretrain(
            PretrainConfig(
                name="few_labels_base",
                model=model,
                data=DataConfig(source="prepared", path=data),
                optimizer=OptimizerConfig(learning_rate=3e-3),
                train=TrainConfig(epochs=8, log_every=50),
                output=output,
            )
        )
    return output


def labels_of(task: str, folder: Path, data: SequenceSet) -> Labels:
    """Labels of all splits, one a subject."""
    if task == DIAGNOSIS:
        file = folder / "diagnosis.parquet"
        if not file.is_file():
            make_labels(
                MakeLabelsConfig(
                    "first_occurrence", folder / "prepared", file, codes=(OUTCOME,), times="random"
                )
            )
        return read_labels(file)
    rng = np.random.default_rng(5)
    codes = data.vocabulary.codes
    cause, bins = codes.index(OUTCOME), [codes.index(f"{TEST}//Q{number}") for number in range(1, 6)]
    rows = []
    for part in data.splits.values():
        for start, stop, subject in zip(part.offsets[:-1], part.offsets[1:], part.subject_ids, strict=True):
            own = part.codes[start:stop]
            values = np.flatnonzero(np.isin(own, bins))
            if task == CAUSE:
                yes = rng.random() < 1 / (1 + np.exp(2.0 - 3.0 * (own == cause).any()))
            elif len(values):  # the last value is high, but for one in fifty
                yes = (bins.index(int(own[values[-1]])) >= 3) ^ (rng.random() < 0.02)
            else:
                continue
            rows.append((subject, part.times[stop - 1], yes))
    subjects, times, values = zip(*rows, strict=True)
    return Labels(np.array(subjects), np.array(times), np.array(values, bool), "boolean")


def drawn(labels: Labels, data: SequenceSet, size: int, seed: int) -> Labels:
    """So many of train, a quarter as many of tuning, and all of held_out."""
    rng = np.random.default_rng([seed, size])
    kept = []
    for name, part in data.splits.items():
        rows = np.flatnonzero(np.isin(labels.subject_ids, part.subject_ids))
        most = {"train": size, "tuning": size // 4}.get(name, len(rows))
        kept.append(rng.permutation(rows)[:most])
    return labels.take(np.sort(np.concatenate(kept)))


def held_out_predictions(run: Path, data: SequenceSet, labels: Labels) -> dict[str, np.ndarray]:
    """What the model says of each held_out label (in their order), alone and blended."""
    mesh = make_mesh()
    found = open_finetuned(run, None, mesh)
    examples = examples_of(data, "held_out", labels, found.model, found.max_length, ())
    batches = task_batches(
        examples,
        np.zeros((len(examples), 1), np.float32),
        RowShape(found.model.positions, cls_token=found.model.cls_token),
        batch_size=len(examples),
        seed=None,
    ).of_rows(64, mesh.size)
    alone = score(jax.jit(make_output_step(found.setup.predictor)), found.members[0], batches, mesh)
    assert found.blend is not None
    counts, share = found.blend
    mixed = blended(alone, counts.outputs(count_codes(examples, len(found.vocabulary))), share)
    return {name: expit(outputs[:, 0]) for name, outputs in zip(WAYS, (alone, mixed), strict=True)}


def few_labels_study(config: FewLabelsStudyConfig) -> dict[str, Any]:
    """Make all runs, and compare them on the held_out split.

    Returns:
        What is written to few_labels.json: for each task and size the mean AUROC over seeds of each way, and
        of fine-tuning less the better one of the two baselines, with 95 % intervals by resampling the
        held_out subjects, paired draw by draw.
    """
    folder = prepared_records(config)
    base, data, rows = base_run(config, folder), read_prepared(folder), []
    for task in config.tasks:
        labels = labels_of(task, config.output, data)
        held_out = labels.take(np.isin(labels.subject_ids, data.splits["held_out"].subject_ids))
        draws = subject_draws(held_out.subject_ids, DRAWS, seed=0)
        for size in config.sizes:
            found: dict[str, list[Figures]] = {}
            for seed in range(config.seeds):
                run = config.output / f"{task.replace(' ', '_')}_{size}_{seed}_{base.name}"
                for name, told in predictions(run, base, data, drawn(labels, data, size, seed), seed).items():
                    found.setdefault(name, []).append(figures_of(held_out.values, np.array(told), draws))
                rows = [row for row in rows if (row["task"], row["labels"]) != (task, size)]
                rows.append({"task": task, "labels": size, "seeds": seed + 1, **compared(found)})
                show(rows)
                write_json(config.output / "few_labels.json", {"rows": rows})
    return {"rows": rows}


def predictions(
    run: Path, base: Path, data: SequenceSet, labels: Labels, seed: int
) -> dict[str, list[float]]:
    """Of each held_out label, by fine-tuning and by the baselines; those of before where they are there."""
    cache = run / "held_out.json"
    if not cache.is_file():
        if not (run / SUMMARY_FILE).is_file():
            given = FINETUNE["lora"]
            blend = replace(given.task, blend="counts")
            train = replace(given.train, seed=seed)
            finetune_on(replace(given, task=blend, train=train, init=base, output=run), data, labels)
        own = np.flatnonzero(np.isin(labels.subject_ids, data.splits["held_out"].subject_ids))
        told = held_out_predictions(run, data, labels.take(own))
        told |= fitted_baselines(open_pretrained(base).model, data, labels, own, 1.0)
        write_json(cache, {name: one.tolist() for name, one in told.items()})
    return read_json(cache)


def compared(found: dict[str, list[Figures]]) -> dict[str, Any]:
    """Mean AUROC over seeds of each way, and how far fine-tuning is above the better baseline."""
    means = {name: mean_figures(of_seeds) for name, of_seeds in found.items()}
    best = max(("logistic regression", "gradient boosting"), key=lambda name: means[name].values["auroc"])
    figures: dict[str, Any] = {name: mean.entry("auroc") for name, mean in means.items()}
    less = {f"{name} less the best": means[name].less(means[best], "auroc") for name in WAYS}
    return {**figures, "best baseline": best, **less}


def show(rows: list[dict[str, Any]]) -> None:
    """The table of what is known so far."""
    ways = ("logistic regression", "gradient boosting", *WAYS)

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        differences = (row[f"{name} less the best"] for name in WAYS)
        return (
            *(str(row[name]) for name in ("task", "labels", "seeds")),
            *(f"{row[name]['value']:.4f}" for name in ways),
            *(f"{one['value']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})" for one in differences),
        )

    columns = ("task", "labels", "seeds", *ways, *(f"{name} less the best" for name in WAYS))
    with open_console() as console:
        console.table("Held_out AUROC, mean over seeds", columns, list(map(cells, rows)))


def few_labels_study_command(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status of :func:`behrt_jax.cli.run_command`."""
    study = Command(FewLabelsStudyConfig, f"{__name__}:few_labels_study")
    return run_command(study, arguments, prog="few_labels_study.py")
