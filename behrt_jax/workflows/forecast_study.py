"""Study: how near fine-tuned forecasts come to the best possible ones, and what pretraining is worth.

Records are generated from a model whose forecasts are known (`data.synthetic.latent`). The task is the onset
of a condition within a horizon after a subject's last visit.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from behrt_jax.config import DataConfig, FinetuneConfig, ForecastStudyConfig, ModelConfig, PretrainConfig
from behrt_jax.data.labels import Labels
from behrt_jax.data.load import generated_code_count, load_sequences
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.synthetic.latent import latent_paths, onset_labels
from behrt_jax.data.task_batches import task_batches
from behrt_jax.data.tasks import Task
from behrt_jax.errors import InputError
from behrt_jax.evaluation.baseline import BaselineData
from behrt_jax.evaluation.binary import binary_scorer
from behrt_jax.evaluation.bootstrap import Figures, SubjectDraws, bootstrap, subject_draws
from behrt_jax.evaluation.count_models import boosting_baseline, regression_baseline
from behrt_jax.evaluation.decisions import predictions
from behrt_jax.evaluation.histories import count_codes
from behrt_jax.evaluation.oracle import oracle_of
from behrt_jax.evaluation.oracle_forecast import onset_probabilities, stage_posteriors
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.run_folder import SUMMARY_FILE, write_json
from behrt_jax.training.mesh import make_mesh
from behrt_jax.training.task_scores import score
from behrt_jax.training.task_step import make_output_step
from behrt_jax.workflows.finetune import finetune_on
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.labelled_data import examples_of
from behrt_jax.workflows.pretrain import pretrain

DRAWS = 1000
RESULT_FILE = "forecast_study.json"


def forecast_study(
    config: ForecastStudyConfig, base: PretrainConfig, finetunes: Sequence[FinetuneConfig]
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
        best = _figures(truth, oracle[held_out], draws)
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
                train = replace(finetune.train, epochs=round(finetune.train.epochs / math.sqrt(fraction)))
                if not (run / SUMMARY_FILE).is_file():
                    made = replace(finetune, task=task, train=train, init=pretrained, output=run)
                    finetune_on(made, data, labels)
                outputs, trained = _held_out_outputs(run, data, labels.take(held_out))
                compared[finetune.name] = _figures(truth, outputs, draws)
                rows.append(_row(finetune.name, fraction, compared[finetune.name], best, trained))
            baselines = _baselines(base.model, data, labels, held_out, fraction)
            for name, predicted in baselines.items():
                compared[name] = _figures(truth, predicted, draws)
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


def _held_out_outputs(run: Any, data: SequenceSet, labels: Labels) -> tuple[np.ndarray, dict[str, Any]]:
    mesh = make_mesh()
    model = open_finetuned(run, None, mesh)
    examples = examples_of(data, "held_out", labels, model.model, model.max_length, ())
    batches = task_batches(
        examples,
        np.zeros((len(examples), 1), np.float32),
        row_length=model.model.positions,
        batch_size=len(examples),
        seed=None,
        cls_token=model.model.cls_token,
    ).of_rows(64, mesh.size)
    outputs = score(jax.jit(make_output_step(model.setup.predictor)), model.members[0], batches, mesh)
    return predictions("binary", outputs, model.calibration.temperature)[:, 0], model.trained


def _baselines(
    model: ModelConfig, data: SequenceSet, labels: Labels, held_out: np.ndarray, fraction: float
) -> dict[str, np.ndarray]:
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


def _figures(labels: np.ndarray, probabilities: np.ndarray, draws: SubjectDraws) -> Figures:
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
