"""Kinds of task: one object each, which knows what its labels ask for and what its predictions look like.

Layers above look up what they have for a kind in one dictionary each, by two traits: the loss in JAX by
``loss`` (`models.losses.LOSSES`), and figures and baselines by what it ``predicts``
(`evaluation.performance.ASSESSMENTS`, `evaluation.task_baselines.BASELINES`). A new kind is a class here, a
name in `TaskKind`, and an entry in each of these for which no trait is there yet.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from behrt_jax.data.labels import LabelKind, Labels
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject

TaskKind = Literal["binary", "multiclass", "multilabel", "regression", "survival"]
Predicts = Literal["probability", "class", "codes", "number", "survival curve"]
"""What is said of an example: the probability of yes; that of each class, of which one is right; that of each
code; a number; the probability of no event up to the end of each interval."""
Names = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task, as the labels of the train split define it."""

    kind: TaskKind
    classes: tuple[str, ...] = ()
    """Multi-class: the values, as text. Multi-label: the codes."""
    edges_days: tuple[float, ...] = ()
    """Survival: where the intervals end, in days from the prediction time, ascending."""
    mean: float = 0.0
    """Regression: of the train labels."""
    deviation: float = 1.0
    """Regression: standard deviation of the train labels."""
    of_integers: bool = False
    """Multi-class: the classes are those of integer_value, not text (which may be digits, such as 007)."""

    @property
    def of(self) -> "Kind":
        """What all tasks of its kind have in common."""
        return KINDS[self.kind]

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for an example."""
        return len(self.classes or self.edges_days) or 1

    def fits(self, labels: Labels) -> bool:
        """Whether labels are of this kind."""
        return self.of.fits(self, labels)

    def targets(self, labels: Labels, rows: np.ndarray) -> np.ndarray:
        """Targets of some labels, float32 ``[rows, targets]``, see `Kind.targets`.

        Raises:
            InputError: labels of another kind, or a class that no label of the train split has.
        """
        if not self.fits(labels):
            raise InputError(f"The labels are of the kind {labels.kind}, which is no {self.kind} task.")
        truths, places = self.of.truths(labels, rows, self.classes)
        if unknown := len(rows) - len(places):
            raise InputError(
                f"{unknown} of {len(rows)} labels have a class that no label of the train split has: "
                "merge rare classes, or leave these labels out."
            )
        return self.of.targets(self, truths)

    def to_json(self) -> JsonObject:
        """As JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> "Task":
        """Inverse of :meth:`to_json`."""
        return cls(**{**value, "classes": tuple(value["classes"]), "edges_days": tuple(value["edges_days"])})


def fit_task(labels: Labels, rows: np.ndarray, intervals: int = 10) -> Task:
    """The task that labels define, whose classes, scale and intervals come from the train split alone.

    Args:
        labels: of all splits.
        rows: those of the train split, int64 ``[n]``.
        intervals: survival: how many, each with about as many events as the others.

    Raises:
        InputError: there is nothing to learn, such as one class alone.
    """
    kind = next(kind for kind in KINDS.values() if kind.takes(labels))
    return kind.fit(labels, rows, intervals)


class Kind(ABC):
    """All in which kinds of task differ, but for losses in JAX, figures and baselines."""

    name: ClassVar[TaskKind]
    labels: ClassVar[tuple[LabelKind, ...]]
    """Kinds of labels that it takes."""
    loss: ClassVar[str]
    predicts: ClassVar[Predicts]
    column: ClassVar[tuple[str, pa.DataType]]
    """Name and type of what is predicted in a file of predictions; a list for several numbers."""
    tempered: ClassVar[bool] = False
    """The outputs are divided by a temperature that is fitted on the tuning split."""
    decides: ClassVar[bool] = False
    """A file has a label beside the probabilities; see :meth:`decide`."""
    thresholded: ClassVar[bool] = False
    """A threshold decides of a probability, and an ensemble's members have a file of their own."""
    has_classes: ClassVar[bool] = False
    tells_seen_codes: ClassVar[bool] = False
    """A file says which of the codes the history has."""

    def takes(self, labels: Labels) -> bool:
        """Whether such labels define a task of this kind; the first that takes them has them."""
        return labels.kind in self.labels

    def fits(self, task: Task, labels: Labels) -> bool:
        """Whether labels are those of a task of this kind."""
        return self.takes(labels)

    @abstractmethod
    def fit(self, labels: Labels, rows: np.ndarray, intervals: int) -> Task:
        """The task that labels of the train split define; see :func:`fit_task`."""

    def truths(self, labels: Labels, rows: np.ndarray, classes: Names) -> tuple[np.ndarray, np.ndarray]:
        """Labels as `predictions.PredictionFile` has them, and the places among ``rows`` that have one.

        Args:
            labels: of a kind that is taken.
            rows: int ``[n]``.
            classes: of the task; labels of another class (multi-class) are left out.
        """
        return labels.values[rows], np.arange(len(rows))

    def targets(self, task: Task, truths: np.ndarray) -> np.ndarray:
        """Targets of a loss from :meth:`truths`, float32 ``[n, targets]``."""
        found = truths.astype(np.float32)
        return found if found.ndim > 1 else found[:, None]

    def tell(self, targets: np.ndarray, outputs: int) -> dict[str, int | float]:
        """Counts of what targets, float32 ``[examples, targets]``, say."""
        return {}

    @abstractmethod
    def base_outputs(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """Outputs that tell of each example what is true on average, float32 ``[outputs]``: training begins
        there. Each count is raised by a half, so that no output is infinite.

        Args:
            targets: of the train examples, float32 ``[examples, targets]``.
            outputs: of the model.
        """

    @abstractmethod
    def predictions(self, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """What outputs say, float64 ``[examples, outputs]``, see `Predicts`; numbers are standardised.

        Args:
            outputs: float32 ``[examples, outputs]``.
            temperature: divides the outputs, but for regression.
        """

    def of_truth(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Of a kind with a temperature: the probabilities that predictions give to what came true."""
        raise NotImplementedError

    def errs(self, outputs: np.ndarray, targets: np.ndarray) -> bool:
        """Of a kind with a temperature: whether an output ``[..., examples, outputs]`` is on a wrong side."""
        raise NotImplementedError

    def with_classes_of(self, labels: Labels, classes: Names) -> Names:
        """The classes of a task, and after them those that labels alone have."""
        return classes

    def decide(self, task: Task, predicted: np.ndarray, threshold: float | None) -> np.ndarray:
        """The label that predictions speak for, ``[examples]``."""
        raise NotImplementedError

    def in_file(self, task: Task, predicted: np.ndarray) -> np.ndarray:
        """What a file has of :meth:`predictions`: a number, or one for each output."""
        return predicted if pa.types.is_list(self.column[1]) else predicted[:, 0]


class _YesOrNo(Kind):
    """Independent answers of yes or no."""

    loss = "sigmoid"
    tempered = True

    def base_outputs(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        yes = targets.sum(axis=0) + 0.5
        return _log_odds(yes, len(targets) + 1.0 - yes)

    def predictions(self, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        from scipy.special import expit

        return expit(outputs.astype(np.float64) / temperature)

    def of_truth(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.where(targets > 0.5, predicted, 1 - predicted)

    def errs(self, outputs: np.ndarray, targets: np.ndarray) -> bool:
        return bool(((outputs > 0) != (targets > 0.5)).any())


def _log_odds(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return (np.log(yes) - np.log(no)).astype(np.float32)


class Binary(_YesOrNo):
    """Yes or no; the target is 0 or 1."""

    name = "binary"
    labels = ("boolean", "integer")
    predicts = "probability"
    column = ("predicted_boolean_probability", pa.float64())
    decides = thresholded = True

    def takes(self, labels: Labels) -> bool:
        return labels.positive() is not None

    def fit(self, labels: Labels, rows: np.ndarray, intervals: int) -> Task:
        return Task(self.name)

    def truths(self, labels: Labels, rows: np.ndarray, classes: Names) -> tuple[np.ndarray, np.ndarray]:
        positive = labels.positive()
        assert positive is not None
        return positive[rows], np.arange(len(rows))

    def tell(self, targets: np.ndarray, outputs: int) -> dict[str, int | float]:
        return {"positive": int(targets.sum())}

    def decide(self, task: Task, predicted: np.ndarray, threshold: float | None) -> np.ndarray:
        return predicted[:, 0] >= threshold


class Multiclass(Kind):
    """One of several classes; the target is its number."""

    name = "multiclass"
    labels = ("integer", "categorical")
    loss = "softmax"
    predicts = "class"
    column = ("predicted_probabilities", pa.list_(pa.float64()))
    tempered = decides = has_classes = True

    def fits(self, task: Task, labels: Labels) -> bool:
        if labels.kind == "integer":
            return all(name.lstrip("-").isdecimal() for name in task.classes)
        return self.takes(labels)

    def fit(self, labels: Labels, rows: np.ndarray, intervals: int) -> Task:
        found, counts = np.unique(labels.values[rows], return_counts=True)
        if len(found) > 1000 or len(found) * 2 > counts.sum():
            raise InputError(
                f"{len(found):,} classes in {counts.sum():,} train labels are too many to learn: "
                "give numbers as float_value, or merge classes."
            )
        if len(found) < 2:
            raise InputError("All train labels have the same class: there is nothing to learn.")
        return Task(self.name, tuple(str(value) for value in found), of_integers=labels.kind == "integer")

    def truths(self, labels: Labels, rows: np.ndarray, classes: Names) -> tuple[np.ndarray, np.ndarray]:
        places = {name: place for place, name in enumerate(classes)}
        found = np.array([places.get(str(value), -1) for value in labels.values[rows]], np.int64)
        return found[found >= 0], np.flatnonzero(found >= 0)

    def tell(self, targets: np.ndarray, outputs: int) -> dict[str, int | float]:
        return {"smallest_class": int(np.bincount(targets[:, 0].astype(int), minlength=outputs).min())}

    def base_outputs(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        counts = np.bincount(targets[:, 0].astype(int), minlength=outputs) + 0.5
        return np.log(counts / counts.sum()).astype(np.float32)

    def predictions(self, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        from scipy.special import softmax

        return softmax(outputs.astype(np.float64) / temperature, axis=-1)

    def of_truth(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return predicted[np.arange(len(predicted)), targets[:, 0].astype(int)]

    def errs(self, outputs: np.ndarray, targets: np.ndarray) -> bool:
        return bool((outputs.argmax(axis=-1) != targets[:, 0]).any())

    def with_classes_of(self, labels: Labels, classes: Names) -> Names:
        return (*classes, *sorted({str(value) for value in labels.values} - set(classes)))

    def decide(self, task: Task, predicted: np.ndarray, threshold: float | None) -> np.ndarray:
        return np.array(task.classes, object)[predicted.argmax(axis=1)]


class Multilabel(_YesOrNo):
    """A set of codes; targets are 0 or 1 for each code that a train label has."""

    name = "multilabel"
    labels = ("codes",)
    predicts = "codes"
    column = ("predicted_probabilities", pa.list_(pa.float32()))
    has_classes = tells_seen_codes = True

    def fit(self, labels: Labels, rows: np.ndarray, intervals: int) -> Task:
        codes = sorted({code for row in labels.values[rows] for code in row})
        if not codes:
            raise InputError("No train label names a code: there is nothing to learn.")
        return Task(self.name, tuple(codes))

    def truths(self, labels: Labels, rows: np.ndarray, classes: Names) -> tuple[np.ndarray, np.ndarray]:
        places = {name: place for place, name in enumerate(classes)}
        sets, found = labels.values[rows], np.zeros((len(rows), len(classes)), bool)
        pairs = [(row, places[code]) for row, codes in enumerate(sets) for code in codes if code in places]
        if pairs:
            found[tuple(np.array(pairs).T)] = True
        return found, np.arange(len(rows))

    def tell(self, targets: np.ndarray, outputs: int) -> dict[str, int | float]:
        return {"codes_per_example": round(float(targets.sum(axis=1).mean()), 2)}


class Regression(Kind):
    """A number; the target is the value, standardised."""

    name = "regression"
    labels = ("float",)
    loss = "squared"
    predicts = "number"
    column = ("predicted_float_value", pa.float64())

    def fit(self, labels: Labels, rows: np.ndarray, intervals: int) -> Task:
        values = labels.values[rows]
        if wrong := int((~np.isfinite(values)).sum()):
            raise InputError(f"{wrong} train labels are not finite: leave them out, or mend them.")
        deviation = float(values.std())
        if deviation == 0.0:
            raise InputError("All train labels have the same value: there is nothing to learn.")
        return Task(self.name, mean=float(values.mean()), deviation=deviation)

    def targets(self, task: Task, truths: np.ndarray) -> np.ndarray:
        return ((truths - task.mean) / task.deviation).astype(np.float32)[:, None]

    def base_outputs(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        return np.zeros(outputs, np.float32)

    def predictions(self, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        return outputs.astype(np.float64)

    def in_file(self, task: Task, predicted: np.ndarray) -> np.ndarray:
        return predicted[:, 0] * task.deviation + task.mean


class Survival(Kind):
    """Days to an event, or to the end of follow-up; targets are the number of the interval of either, and 1
    for an event.
    """

    name = "survival"
    labels = ("survival",)
    loss = "hazards"
    predicts = "survival curve"
    column = ("predicted_survival", pa.list_(pa.float64()))

    def fit(self, labels: Labels, rows: np.ndarray, intervals: int) -> Task:
        values = labels.values[rows]
        events = values[values[:, 1] > 0, 0]
        if not len(events):
            raise InputError("No train label has an event: there is nothing to learn.")
        edges = np.unique(np.quantile(events, np.linspace(0, 1, intervals + 1)[1:], method="higher"))
        return Task(self.name, edges_days=tuple(float(edge) for edge in edges))

    def targets(self, task: Task, truths: np.ndarray) -> np.ndarray:
        days, event = truths[:, 0], truths[:, 1]
        # An edge belongs to the interval that it ends; who was followed up to it has survived that one.
        ends = [np.searchsorted(task.edges_days, days, side=side) for side in ("left", "right")]
        interval = np.where(event > 0, *ends)
        seen = (event > 0) & (interval < len(task.edges_days))
        return np.stack([interval, seen], axis=1).astype(np.float32)

    def tell(self, targets: np.ndarray, outputs: int) -> dict[str, int | float]:
        return {"events": int(targets[:, 1].sum())}

    def base_outputs(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        interval, event = targets[:, 0].astype(int), targets[:, 1] > 0
        yes = np.bincount(interval[event], minlength=outputs)[:outputs] + 0.5
        at_risk = (interval[:, None] > np.arange(outputs)).sum(axis=0) + yes + 0.5
        return _log_odds(yes, at_risk - yes)

    def predictions(self, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        from scipy.special import log_expit

        return np.exp(np.cumsum(log_expit(-outputs.astype(np.float64) / temperature), axis=-1))


KINDS: dict[TaskKind, Kind] = {
    kind.name: kind for kind in (Binary(), Multiclass(), Multilabel(), Regression(), Survival())
}
"""In the order in which they are asked whether they take labels."""
BINARY = Task("binary")
