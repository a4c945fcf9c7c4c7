"""Study: questions about the future answered without labels, beside models that learn from labels.

On generated records whose best possible answers are known. A model is pretrained on questions; then it is
asked of frequent codes within horizons that were asked in training, and within others that never were. For
one question also heads are fine-tuned on 100, 1,000 and all labels, beside gradient boosting and logistic
regression on counts of codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from behrt_jax.cli import Command, run_command
from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import (
    OptimizerConfig,
    PretrainConfig,
    QueriesConfig,
    SearchConfig,
    TaskConfig,
    TaskTrainConfig,
    TrainConfig,
)
from behrt_jax.data.labels import Labels
from behrt_jax.data.questions import PredictionTimes, prediction_times
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.evaluation.forecasts import (
    StagePosteriors,
    chances_of_visits_left,
    occurrence_probability,
    stage_posteriors,
)
from behrt_jax.evaluation.oracle import Oracle, oracle_of
from behrt_jax.evaluation.performance import Figures, mean_figures, subject_draws
from behrt_jax.files import read_json, write_json
from behrt_jax.presets import FINETUNE, SMALL
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import SUMMARY_FILE
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.workflows.ask import Question, answers, calibrate, known_answers, load_asked
from behrt_jax.workflows.finetune import finetune_on
from behrt_jax.workflows.loaded import Loaded
from behrt_jax.workflows.prediction_data import Histories, Records
from behrt_jax.workflows.pretrain import pretrain
from experiments.studies.forecast import figures_of, fitted_baselines, held_out_outputs

RESULT_FILE = "queries_study.json"
ALL = 1_000_000
"""More labels than there are."""


@dataclass(frozen=True)
class QueriesStudyConfig:
    """Ask a model pretrained on questions, beside the optimum and models that learn from labels."""

    quick: bool = False
    """A small study of a few minutes, which shows that it runs: its figures say little."""
    subjects: int | None = None
    """Subjects to generate; 100,000 where not given, quick 6,000."""
    epochs: int | None = None
    """Of pretraining; 4 where not given."""
    codes: int = 8
    """How many of the most frequent diagnoses and treatments are asked of; quick 2."""
    sizes: tuple[int, ...] = (100, 1000, ALL)
    """Train labels of the heads and the count models; a quarter as many are of tuning. 1000000 for all."""
    known_for: int = 1000
    """Held_out subjects for whom the best possible loss is worked out, which takes long."""
    draws: int = 200
    """Bootstrap draws of subjects for the intervals."""
    output: Path = Path("runs/queries_study")
    """Folder of all runs; what is there already is not made again."""


ASKED, NEVER = (60.0, 240.0, 480.0), (90.0, 365.0)
"""Horizons that the study asks of: some of those in training, and others."""
STUDY_BASE = PretrainConfig(
    name="queries_study",
    objective="queries",
    model=replace(SMALL, dropout=0.0, position_embedding="rope", visit_embedding="alternating"),
    data=DataConfig(
        source="latent",
        subjects=100_000,
        vocabulary_size=100,
        tuning_fraction=0.02,
        held_out_fraction=0.06,
    ),
    queries=QueriesConfig(questions=64, horizon_days=(30.0, 60.0, 120.0, 240.0, 480.0, 720.0)),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    # Many subjects, each time at other prediction times: there is nothing to memorise.
    train=TrainConfig(epochs=4, batch_size=256, log_every=50),
)
WAYS = {
    "head": replace(
        FINETUNE["probe"],
        task=TaskConfig(pooling="mean"),
        search=SearchConfig(size=0),
        train=TaskTrainConfig(max_steps=800),
    ),
    "adapters and head": replace(
        FINETUNE["lora"],
        task=TaskConfig(pooling="mean"),
        search=SearchConfig(size=0),
        train=TaskTrainConfig(max_steps=800),
    ),
}
"""Fine-tuning, on the encoder that was pretrained on questions."""


def queries_study(config: QueriesStudyConfig, base: PretrainConfig = STUDY_BASE) -> dict[str, Any]:
    """Pretrain, ask, and compare on the held_out split; runs that are there already are not made again.

    Args:
        config: options of the study.
        base: the pretraining run, on latent records.

    Returns:
        What is written to queries_study.json.
    """
    if config.quick:
        config = replace(config, codes=2, known_for=200, draws=50, sizes=config.sizes[:2])
    subjects = config.subjects or (6000 if config.quick else base.data.subjects)
    train = replace(base.train, epochs=config.epochs or base.train.epochs)
    base = replace(base, data=replace(base.data, subjects=subjects), train=train)
    run = config.output / "pretrained"
    if not (run / SUMMARY_FILE).is_file():
        pretrain(replace(base, output=run))
    study = _Study.of(config, base, run)
    summary = read_json(run / SUMMARY_FILE)
    result: dict[str, Any] = {
        "subjects": subjects,
        "codes": study.names,
        "pretraining": {name: summary[name] for name in ("epochs", "steps", "wall_seconds", "best")},
        "horizons": [],
        "labels": {"code": study.names[0], "horizon_days": NEVER[-1], "rows": []},
    }
    horizons = [*((days, True) for days in ASKED), *((days, False) for days in NEVER)]
    with open_console() as console:
        for days, asked in sorted(horizons):
            result["horizons"].append(study.horizon(days, asked))
        show_horizons(console, result["horizons"])
        write_json(config.output / RESULT_FILE, result)
        for size in config.sizes:
            result["labels"]["rows"].append(study.few_labels(size))
            write_json(config.output / RESULT_FILE, result)
        show_labels(console, result["labels"]["rows"])
        console.log(f"Written: {config.output / RESULT_FILE}")
    return result


@dataclass(frozen=True, eq=False)
class _Study:
    """The model, the records, and what is known of them."""

    config: QueriesStudyConfig
    base: PretrainConfig
    data: SequenceSet
    model: Loaded
    oracle: Oracle
    posteriors: StagePosteriors
    """Of the held_out split."""
    ids: Sequence[int]
    """Codes that are asked of."""

    @classmethod
    def of(cls, config: QueriesStudyConfig, base: PretrainConfig, run: Path) -> "_Study":
        """Of a run on the records of `base`; it is asked of the most frequent diagnoses and treatments."""
        data = load_sequences(base.data, sep_token=False)
        names, counts = data.vocabulary.codes, data.vocabulary.counts
        oracle = oracle_of(base.data, names)
        assert oracle is not None
        ordered = np.argsort(-counts, kind="stable").tolist()
        wanted = [row for row in ordered if names[row].startswith(("DX//", "RX//"))][: config.codes]
        posteriors = stage_posteriors(oracle, data.splits["held_out"])
        return cls(config, base, data, load_asked(run), oracle, posteriors, wanted)

    @property
    def names(self) -> list[str]:
        """Codes that are asked of."""
        return [self.data.vocabulary.codes[row] for row in self.ids]

    @property
    def records(self) -> Records:
        """As `ask` reads them."""
        return Records(self.data, (), ("held_out",), None, None, {})

    def question(self, code: int, days: float) -> Question:
        """Of one code."""
        chosen = np.arange(len(self.data.vocabulary)) == code
        return Question(np.array([code], np.int32), chosen, days, False)

    def times(self, split: str, days: float) -> PredictionTimes:
        """One end of a visit of each subject of a split that is followed up for the horizon."""
        return prediction_times(self.data, split, days).drawn(1, np.random.default_rng(0))

    def answered(self, question: Question, labels: Labels) -> np.ndarray:
        """Calibrated probabilities of held_out labels."""
        options = PredictConfig(rows=64)
        fitted = calibrate(self.model, question, self.records, options)
        given = answers(self.model, question, Histories(self.data, {"held_out": labels}, ()), options)
        return fitted.probabilities(np.concatenate([log_odds for _, log_odds, _, _ in given]))

    def visits_of(self, times: PredictionTimes) -> np.ndarray:
        """The visit that ends at each prediction time, among those of the posteriors."""
        part, visits = self.data.splits["held_out"], self.posteriors.visits
        return visits.firsts[times.subjects] + part.visits[times.up_to - 1]

    def best(self, times: PredictionTimes, codes: Sequence[int], days: float) -> np.ndarray:
        """Best possible probabilities, by the conditions alone: float64 ``[n, codes]``."""
        chosen, sets = self.visits_of(times), [[code] for code in codes]
        return occurrence_probability(self.oracle, self.posteriors, chosen, sets, int(days))

    def best_of_followed(self, times: PredictionTimes, codes: Sequence[int], days: float) -> np.ndarray:
        """The same of records that are known to go on for as long: what these questions are about."""
        chosen, sets = self.visits_of(times), [[code] for code in codes]
        so_far = chosen - self.posteriors.visits.firsts[times.subjects] + 1
        left = chances_of_visits_left(self.oracle.model, self.base.data, so_far)
        return occurrence_probability(
            self.oracle, self.posteriors, chosen, sets, int(days), left, followed=True
        )

    def horizon(self, days: float, asked: bool) -> dict[str, Any]:
        """AUROC and loss of all codes within one horizon, beside the best possible ones."""
        part = self.data.splits["held_out"]
        times = self.times("held_out", days)
        draws = subject_draws(part.subject_ids[times.subjects], self.config.draws, seed=0)
        best = self.best(times, self.ids, days)
        known = times.take(np.arange(min(len(times), self.config.known_for)))
        optimum = self.best_of_followed(known, self.ids, days)
        common = self.prevalence(days)
        ours, theirs, losses, positive = [], [], [], 0
        for place, code in enumerate(self.ids):
            question = self.question(code, days)
            labels = known_answers(self.data, "held_out", times, question)
            found, truth = self.answered(question, labels), labels.values.astype(bool)
            positive += int(truth.sum())
            ours.append(figures_of(truth, found, draws))
            theirs.append(figures_of(truth, best[:, place], draws))
            some = truth[: len(known)]
            beside = (np.full(len(known), common[place]), found[: len(known)], optimum[:, place])
            losses.append([log_loss(some, one) for one in beside])
        zero_shot, optimal = mean_figures(ours), mean_figures(theirs)
        prevalence, loss, least = np.mean(losses, axis=0).tolist()
        return {
            "horizon_days": days,
            "asked_in_training": asked,
            "examples": len(times),
            "positive": positive,
            "zero_shot": zero_shot.entry("auroc"),
            "best": optimal.entry("auroc"),
            "best_less_zero_shot": optimal.less(zero_shot, "auroc"),
            "loss": {"prevalence": prevalence, "zero_shot": loss, "best": least},
            "share_of_attainable_gain": (prevalence - loss) / (prevalence - least),
        }

    def prevalence(self, days: float) -> np.ndarray:
        """How often each code comes within the horizon in the train split, float64 ``[codes]``."""
        times = self.times("train", days)
        return np.array(
            [
                known_answers(self.data, "train", times, self.question(code, days)).values.mean()
                for code in self.ids
            ]
        )

    def few_labels(self, size: int) -> dict[str, Any]:
        """AUROC of heads and count models that learn from so many labels of one question, on held_out."""
        days, code = NEVER[-1], self.ids[0]
        question = self.question(code, days)
        times = {split: self.times(split, days) for split in self.data.splits}
        parts = {name: known_answers(self.data, name, one, question) for name, one in times.items()}
        rng = np.random.default_rng(1)
        wanted = {"train": size, "tuning": max(size // 4, 20), "held_out": ALL}
        parts = {
            name: part.take(np.sort(rng.permutation(len(part))[: wanted[name]]))
            for name, part in parts.items()
        }
        subjects, at, values = (
            np.concatenate([getattr(part, name) for part in parts.values()])
            for name in ("subject_ids", "times", "values")
        )
        labels = Labels(subjects, at, values, "boolean")
        held_out = np.arange(len(labels) - len(parts["held_out"]), len(labels))
        truth = labels.values[held_out].astype(bool)
        draws = subject_draws(labels.subject_ids[held_out], self.config.draws, seed=0)
        best = self.best(times["held_out"], [code], days)[:, 0]
        found = {"best possible": best, "zero-shot": self.answered(question, parts["held_out"])}
        for name, way in WAYS.items():
            run = self.config.output / f"{name.replace(' ', '_')}_{len(parts['train'])}"
            if not (run / SUMMARY_FILE).is_file():
                finetune_on(replace(way, init=self.model.folder, output=run), self.data, labels)
            found[name], _ = held_out_outputs(run, self.data, parts["held_out"])
        found |= fitted_baselines(self.model.config, self.data, labels, held_out, 1.0)
        figures: dict[str, Figures] = {
            name: figures_of(truth, predicted, draws) for name, predicted in found.items()
        }
        return {
            "labels": len(parts["train"]),
            "positive": int(parts["train"].values.sum()),
            "auroc": {name: one.entry("auroc") for name, one in figures.items()},
            "less_zero_shot": {
                name: one.less(figures["zero-shot"], "auroc") for name, one in figures.items()
            },
        }


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean cross-entropy in nats."""
    of_truth = np.where(labels, probabilities, 1 - probabilities)
    return float(-np.log(np.maximum(of_truth, 1e-12)).mean())


def _cell(entry: dict[str, Any], sign: str = "") -> str:
    return f"{entry['value']:{sign}.4f} ({entry['low']:{sign}.4f} to {entry['high']:{sign}.4f})"


def show_horizons(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """How near to the best possible answers those without labels are."""
    console.table(
        "Held_out AUROC within codes, mean over codes, with 95 % intervals over subjects",
        ("horizon", "in training", "best possible", "zero-shot", "below the best", "share of the gain"),
        [
            (
                f"{row['horizon_days']:g} days",
                "asked" if row["asked_in_training"] else "never",
                f"{row['best']['value']:.4f}",
                f"{row['zero_shot']['value']:.4f}",
                _cell(row["best_less_zero_shot"], "+"),
                f"{row['share_of_attainable_gain']:.1%}",
            )
            for row in rows
        ],
    )


def show_labels(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """From how many labels on a head is better."""
    names = list(rows[0]["auroc"])
    console.table(
        "Held_out AUROC of one question by the train labels that a model learned from",
        ("labels", *names),
        [(f"{row['labels']:,}", *(_cell(row["auroc"][name]) for name in names)) for row in rows],
    )


def queries_study_command(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status of :func:`behrt_jax.cli.run_command`."""
    study = Command(QueriesStudyConfig, f"{__name__}:queries_study")
    return run_command(study, arguments, prog="queries_study.py")
