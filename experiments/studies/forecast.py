"""Study: how near fine-tuned forecasts come to the best possible ones, and what pretraining is worth.

Records are generated from a model whose forecasts are known (`records.synthetic.latent`). The task is the
onset of a condition within a horizon after a subject's last visit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from behrt_jax.cli import Command, run_command
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import (
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    SearchConfig,
    TaskConfig,
    TaskTrainConfig,
    TrainConfig,
)
from behrt_jax.data.batches import RowShape, task_batches
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.tasks import Task
from behrt_jax.errors import InputError
from behrt_jax.evaluation.forecasts import onset_probabilities, stage_posteriors
from behrt_jax.evaluation.oracle import oracle_of
from behrt_jax.evaluation.performance import Figures, SubjectDraws, bootstrap, subject_draws
from behrt_jax.evaluation.scores import binary_scorer
from behrt_jax.evaluation.task_baselines import (
    BaselineData,
    boosting_baseline,
    count_codes,
    regression_baseline,
)
from behrt_jax.files import write_json
from behrt_jax.presets import FINETUNE, PRETRAIN, SMALL
from behrt_jax.records.load import generated_code_count, load_sequences
from behrt_jax.run_folder import SUMMARY_FILE
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.loop import USUAL_EPOCHS
from behrt_jax.training.validation import make_output_step, score
from behrt_jax.workflows.finetune import finetune_on
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.labelled_data import examples_of
from behrt_jax.workflows.pretrain import pretrain
from experiments.studies.latent_course import latent_paths, onset_labels


@dataclass(frozen=True)
class ForecastStudyConfig:
    """Fine-tune on generated records whose best possible forecasts are known, in several ways and with
    several shares of the labels, and say how near each comes to them and what pretraining is worth.
    """

    label_fractions: tuple[float, ...] = (1.0, 0.05)
    """Shares of the train subjects whose labels are used."""
    subjects: int | None = None
    """Subjects to generate, of which 7 in 10 train; those of the base's configuration where not given.
    Epochs change with them, so that the number of steps stays about the same."""
    ways: tuple[str, ...] = ()
    """Ways of fine-tuning, by name; all where not given."""
    horizon_days: int = 730
    """In which the condition begins, after a subject's last visit."""
    output: Path = Path("runs/forecast_study")
    """Folder of all runs; what is there already is not made again."""


_FIXED = {"task": TaskConfig(pooling="mean"), "search": SearchConfig(size=0)}
"""The study compares ways of training: nothing is chosen beside them."""
_FEW = {"batch_size": 256, "patience": 8, "log_every": 50}
FORECAST_BASE = replace(
    PRETRAIN["small_latent"],
    name="forecast_base",
    model=replace(SMALL, positions=64, dropout=0.0),
    data=DataConfig(
        source="latent",
        subjects=100_000,
        vocabulary_size=300,
        events_spread=0.6,
        window="first",
        tuning_fraction=0.1,
        held_out_fraction=0.2,
    ),
    train=TrainConfig(epochs=10, batch_size=256, log_every=50),
)
FORECASTS = (
    replace(
        FINETUNE["full"],
        **_FIXED,
        optimizer=OptimizerConfig(learning_rate=3e-4),
        train=TaskTrainConfig(epochs=5, **_FEW),
    ),
    replace(
        FINETUNE["lora"],
        **_FIXED,
        lora=LoRAConfig(rank=2, targets=("query", "key", "value", "out", "intermediate", "output")),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TaskTrainConfig(epochs=5, **_FEW),
    ),
    replace(FINETUNE["scratch"], **_FIXED, train=TaskTrainConfig(epochs=8, **_FEW)),
)
"""Study of forecasts: a base for generated records, and ways of fine-tuning it."""


DRAWS = 1000
RESULT_FILE = "forecast_study.json"


def forecast_study(
    config: ForecastStudyConfig,
    base: PretrainConfig = FORECAST_BASE,
    finetunes: Sequence[FinetuneConfig] = FORECASTS,
) -> dict[str, Any]:
    """Pretrain, fine-tune in each way with each share of the labels, and compare on the held_out split.

    Runs that are in the output folder already are not made again.

    Args:
        config: options of the study.
        base: the pretraining run; its data is that of the study.
        finetunes: ways of fine-tuning, each with a name of its own.

    Returns:
        What is written to forecast_study.json.

    Raises:
        InputError: the source is not latent, or another wrong option.
    """
    if base.data.source != "latent":
        raise InputError("The data must be latent: of other records the best forecast is unknown.")
    names = [finetune.name for finetune in finetunes]
    if unknown := set(config.ways) - set(names):
        raise InputError(f"ways: there is no {min(unknown)}: choose among {', '.join(names)}.")
    finetunes = [finetune for finetune in finetunes if not config.ways or finetune.name in config.ways]
    base, finetunes = with_subjects(config.subjects, base, finetunes)
    with open_console() as console:
        pretrained = config.output / "pretrained"
        if not (pretrained / SUMMARY_FILE).is_file():
            pretrain(replace(base, output=pretrained))
        data = load_sequences(base.data, sep_token=False)
        condition, labels, oracle = onset_task(base.data, data, config.horizon_days)
        held_out = np.flatnonzero(np.isin(labels.subject_ids, data.splits["held_out"].subject_ids))
        truth = labels.values[held_out]
        draws = subject_draws(labels.subject_ids[held_out], DRAWS, seed=0)
        best = figures_of(truth, oracle[held_out], draws)
        console.log(
            f"Onset of condition {condition} within {config.horizon_days} days: {int(truth.sum()):,} of "
            f"{len(truth):,} held_out subjects; best possible AUROC {best.values['auroc']:.4f}."
        )
        rows = []
        for fraction in config.label_fractions:
            compared = {"oracle": best}
            for finetune in finetunes:
                run = config.output / f"{finetune.name}_{fraction:g}"
                task = replace(finetune.task, label_fraction=fraction)
                # Fewer labels make fewer steps an epoch.
                epochs = round((finetune.train.epochs or USUAL_EPOCHS) / math.sqrt(fraction))
                train = replace(finetune.train, epochs=epochs)
                if not (run / SUMMARY_FILE).is_file():
                    made = replace(finetune, task=task, train=train, init=pretrained, output=run)
                    finetune_on(made, data, labels)
                outputs, trained = held_out_outputs(run, data, labels.take(held_out))
                compared[finetune.name] = figures_of(truth, outputs, draws)
                rows.append(_row(finetune.name, fraction, compared[finetune.name], best, trained))
            baselines = fitted_baselines(base.model, data, labels, held_out, fraction)
            for name, predicted in baselines.items():
                compared[name] = figures_of(truth, predicted, draws)
                rows.append(_row(name, fraction, compared[name], best, None))
            _compare(rows, fraction, compared)
        _show(console, rows)
        result = {
            "condition": condition,
            "horizon_days": config.horizon_days,
            "held_out": len(truth),
            "positive": int(truth.sum()),
            "oracle": {name: best.entry(name) for name in ("auroc", "average_precision")},
            "rows": rows,
        }
        write_json(config.output / RESULT_FILE, result)
        console.log(f"Written: {config.output / RESULT_FILE}")
    return result


def with_subjects(
    subjects: int | None, base: PretrainConfig, finetunes: Sequence[FinetuneConfig]
) -> tuple[PretrainConfig, Sequence[FinetuneConfig]]:
    """The runs with another number of subjects, and about as many steps as before."""
    if subjects is None:
        return base, finetunes
    share = base.data.subjects / subjects

    def fewer(train: Any) -> Any:
        return replace(train, epochs=max(1, round(train.epochs * share)))

    data = replace(base.data, subjects=subjects)
    return replace(base, data=data, train=fewer(base.train)), [
        replace(finetune, train=fewer(finetune.train)) for finetune in finetunes
    ]


def onset_task(data: DataConfig, loaded: SequenceSet, horizon_days: int) -> tuple[int, Labels, np.ndarray]:
    """The condition with the most onsets, its labels at each subject's last visit, and the best forecast.

    Args:
        data: that `loaded` was generated with.
        loaded: all splits.
        horizon_days: after the last visit.

    Returns:
        The condition's number, labels of all splits, and probabilities float64 ``[labels]``.
    """
    oracle = oracle_of(data, loaded.vocabulary.codes)
    assert oracle is not None
    options = data.subjects, generated_code_count(data), data.events_mean, data.events_spread, data.seed
    paths = latent_paths(*options, data.difficulty, follow_up_days=horizon_days)
    last = np.append(paths.histories.first_visits[1:], len(paths.states)) - 1
    by_condition = np.stack(
        [onset_labels(paths, last, c, horizon_days) for c in range(oracle.model.states.shape[1])]
    )
    condition = int(by_condition.sum(axis=1).argmax())
    order = np.argsort(paths.histories.subject_ids)
    ids, times, values, forecasts = [], [], [], []
    for part in loaded.splits.values():
        posteriors = stage_posteriors(oracle, part)
        chosen = posteriors.visits.firsts + posteriors.visits.counts - 1
        forecasts.append(onset_probabilities(oracle, posteriors, chosen, condition, horizon_days))
        place = order[np.searchsorted(paths.histories.subject_ids[order], part.subject_ids)]
        ids.append(part.subject_ids)
        times.append(part.times[part.offsets[1:] - 1])
        values.append(by_condition[condition, place])
    labels = Labels(np.concatenate(ids), np.concatenate(times), np.concatenate(values), "boolean")
    return condition, labels, np.concatenate(forecasts)


def held_out_outputs(run: Any, data: SequenceSet, labels: Labels) -> tuple[np.ndarray, dict[str, Any]]:
    """Probabilities of a fine-tuned run for labels of the held_out split, and what was trained."""
    mesh = make_mesh()
    model = open_finetuned(run, None, mesh)
    examples = examples_of(data, "held_out", labels, model.model, model.max_length, ())
    batches = task_batches(
        examples,
        np.zeros((len(examples), 1), np.float32),
        RowShape(model.model.positions, cls_token=model.model.cls_token),
        batch_size=len(examples),
        seed=None,
    ).of_rows(64, mesh.size)
    outputs = score(jax.jit(make_output_step(model.setup.predictor)), model.members[0], batches, mesh)
    return model.task.of.predictions(outputs, model.calibration.temperature)[:, 0], model.trained


def fitted_baselines(
    model: ModelConfig, data: SequenceSet, labels: Labels, held_out: np.ndarray, fraction: float
) -> dict[str, np.ndarray]:
    """Probabilities of the labels at some rows, by logistic regression and gradient boosting."""
    task = Task("binary")
    parts = {name: examples_of(data, name, labels, model, None, ()) for name in ("train", "tuning")}
    parts["train"] = parts["train"].of_some_subjects(fraction, 0)
    parts["held_out"] = examples_of(data, "held_out", labels.take(held_out), model, None, ())
    histories = {name: count_codes(part, len(data.vocabulary)) for name, part in parts.items()}
    targets = {name: task.targets(labels, parts[name].rows)[:, 0] > 0.5 for name in ("train", "tuning")}
    given = BaselineData(
        kind="binary",
        classes=(),
        edges_days=np.zeros(0),
        class_ids=np.zeros(0, np.int64),
        train=histories["train"],
        train_targets=targets["train"],
        tuning=histories["tuning"],
        tuning_targets=targets["tuning"],
        evaluated=histories["held_out"],
        boosting_codes=500,
        seed=0,
    )
    found = [baseline(given) for baseline in (regression_baseline, boosting_baseline)]
    return {baseline.name: baseline.predictions for baseline in found if baseline.predictions is not None}


def figures_of(labels: np.ndarray, probabilities: np.ndarray, draws: SubjectDraws) -> Figures:
    """Figures of some probabilities, and of draws of their subjects."""
    return bootstrap(binary_scorer(labels, probabilities, line=False), draws)


def _row(name: str, fraction: float, found: Figures, best: Figures, trained: Any) -> dict[str, Any]:
    return {
        "model": name,
        "label_fraction": fraction,
        "auroc": found.entry("auroc"),
        "average_precision": found.entry("average_precision"),
        "oracle_less_model": best.less(found, "auroc"),
        "trained": trained,
    }


def _compare(rows: list[dict[str, Any]], fraction: float, compared: dict[str, Figures]) -> None:
    """Add to the rows of this share of labels how far each is above the others, draw by draw."""
    for row in rows:
        if row["label_fraction"] == fraction:
            mine = compared[row["model"]]
            row["above"] = {
                name: mine.less(other, "auroc") for name, other in compared.items() if name != row["model"]
            }


def _show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    def cell(entry: dict[str, Any]) -> str:
        return f"{entry['value']:.4f} ({entry['low']:.4f} to {entry['high']:.4f})"

    def share(trained: dict[str, Any] | None) -> str:
        return "" if trained is None else f"{trained['trainable'] / trained['total']:.2%}"

    console.table(
        "Held_out AUROC, with 95 % intervals over subjects",
        ("model", "labels", "AUROC", "below the best possible", "trained"),
        [
            (
                row["model"],
                f"{row['label_fraction']:.0%}",
                cell(row["auroc"]),
                cell(row["oracle_less_model"]),
                share(row["trained"]),
            )
            for row in rows
        ],
    )


def forecast_study_command(arguments: Sequence[str]) -> int:
    """Run the study of forecasts; returns the exit status of :func:`behrt_jax.cli.run_command`."""
    study = Command(ForecastStudyConfig, f"{__name__}:forecast_study")
    return run_command(study, arguments, prog="forecast_study.py")
