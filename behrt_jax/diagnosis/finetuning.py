"""Checks of fine-tuning runs: their labels, before training; what came out, after it.

Each takes the record of a run and passes over what is not known of it; :func:`check_labelled` and
:func:`check_finetuned` have the lists. The checks of any training (`diagnosis.before`, `during`, `after`) are
made beside them.
"""

from collections.abc import Iterator
from typing import Any

from behrt_jax.diagnosis.finding import Finding, RunRecord
from behrt_jax.evaluation.scores import LEAKAGE_AUROC, LEAKAGE_WORDS
from behrt_jax.files import JsonObject
from behrt_jax.run_folder import is_number

FEW_LABELS, FEW_OF_A_CLASS = 2000, 100
"""Of the train split: with fewer a count model is hard to beat."""
FEW_TUNING, FEW_TUNING_OF_A_CLASS = 100, 20
"""With fewer on tuning, the standard error of an AUROC is above some 0.05."""
LATE = 0.8
"""Share of a run after which its best validation lies near its end."""


def check_labelled(run: RunRecord) -> Iterator[Finding]:
    """Every check of a fine-tuning run that needs no training."""
    if run.finetunes:
        yield from few_labels(run)
        yield from tuning_too_small(run)


def check_finetuned(run: RunRecord) -> Iterator[Finding]:
    """Every check of a fine-tuning run that ended."""
    if run.finetunes:
        yield from gain_over_base_rate(run)
        yield from gain_over_counts(run)
        yield from schedule_at_zero(run)
        yield from auroc_of_leakage(run)
        yield from mean_of_many(run)


def _tables(run: RunRecord) -> dict[str, JsonObject]:
    """By label table, of which there may be several, what is in its splits."""
    data: JsonObject = run.data or run.summary.get("data") or {}
    return dict(data.get("tasks") or ({"": data} if data.get("train") else {}))


def _size(split: JsonObject) -> tuple[int, int | None]:
    """Examples of a split, and those of its smallest class where that is known."""
    examples, positive = int(split.get("examples") or 0), split.get("positive")
    smallest = split.get("smallest_class") if positive is None else min(positive, examples - positive)
    return examples, smallest


def _counted(size: tuple[int, int | None]) -> str:
    examples, smallest = size
    rarest = "" if smallest is None else f", of which {smallest:,} are of the smallest class"
    return f"{examples:,}{rarest}"


def few_labels(run: RunRecord) -> Iterator[Finding]:
    """So few train labels that a count model does as well."""
    for name, splits in _tables(run).items():
        examples, smallest = size = _size(splits.get("train") or {})
        very_few = examples < FEW_LABELS // 4 or (smallest is not None and smallest < FEW_OF_A_CLASS)
        if not very_few and examples >= FEW_LABELS:
            continue
        yield Finding(
            "few-labels",
            "warning" if very_few else "info",
            f"The train labels{f' of {name}' if name else ''} are {_counted(size)}.",
            "With so few, logistic regression on counts of codes is hard to beat, and another seed gives "
            "another model.",
            "Compare with the count model on held_out (behrt-jax evaluate); train a blend with it "
            "(--task.blend counts), or label more subjects.",
        )


def tuning_too_small(run: RunRecord) -> Iterator[Finding]:
    """A tuning split that cannot choose."""
    for name, splits in _tables(run).items():
        examples, smallest = size = _size(splits.get("tuning") or {})
        if examples and (
            examples < FEW_TUNING or (smallest is not None and smallest < FEW_TUNING_OF_A_CLASS)
        ):
            yield Finding.warning(
                "tuning-too-small",
                f"The tuning labels{f' of {name}' if name else ''} are {_counted(size)}.",
                "The best epoch, temperature and threshold are chosen on them, partly by chance, and the "
                "figures there say little.",
                "Label more subjects of tuning, prepare with a larger --tuning_fraction, or cross-validate: "
                "--population.size 5 --population.vary fold.",
            )


def _best(run: RunRecord) -> JsonObject:
    """The best validation: of the model, or of the first member that predicts."""
    if best := run.summary.get("best"):
        return best
    summary: Any = run.summary
    members, chosen = summary.get("members") or [], summary.get("predicting_members") or []
    return members[chosen[0]] if chosen and chosen[0] < len(members) else {}


def gain_over_base_rate(run: RunRecord) -> Iterator[Finding]:
    """A model that knows no more than how frequent the outcome is."""
    loss, base = _best(run).get("loss"), run.baseline("base rate", "loss")
    if is_number(loss) and is_number(base) and loss >= base:
        yield Finding.error(
            "no-gain-over-base-rate",
            f"The best validation loss, {loss:.4f}, is not below that of the base rate, {base:.4f}.",
            "The model has learned nothing of use.",
            "Try another learning rate, more epochs or more labels; see what the count model finds "
            "(behrt-jax evaluate).",
        )


def gain_over_counts(run: RunRecord) -> Iterator[Finding]:
    """A count model that is ahead on the same tuning labels, by more than chance."""
    best = _best(run)
    loss, counts = best.get("loss"), run.baseline("count model", "loss")
    gap = (run.summary.get("gaps") or {}).get("count model") or {}
    if not (is_number(loss) and is_number(counts) and is_number(gap.get("low"))):
        return
    aurocs = best.get("auroc"), run.baseline("count model", "auroc")
    also = f"; AUROC {aurocs[0]:.3f} and {aurocs[1]:.3f}" if all(map(is_number, aurocs)) else ""
    if gap["nats"] > 0:
        sure = gap["low"] > 0
        chance = "" if sure else ", which may be chance"
        yield Finding(
            "count-model-ahead",
            "warning" if sure else "info",
            f"On tuning, a model on counts of codes has a loss of {counts:.4f}, the model "
            f"{loss:.4f} "
            f"(difference {gap['low']:+.4f} to {gap['high']:+.4f}, paired{also}){chance}.",
            "A simpler model predicts better." if sure else "A simpler model may do as well.",
            "Train a blend of both (--task.blend counts), let the pooling be chosen (--task.pooling auto), "
            "label more subjects, or use the count model.",
        )


def schedule_at_zero(run: RunRecord) -> Iterator[Finding]:
    """A learning rate that came to its end while the model was still learning."""
    best_step, steps = run.summary.get("best_step"), run.summary.get("steps") or 0
    if run.summary.get("stop_reason") != "finished" or not best_step or best_step < LATE * steps:
        return
    if run.setting("optimizer", "schedule") == "constant":
        return
    losses = [record["loss"] for record in run.validations if is_number(record.get("loss"))]
    if len(losses) < 3 or min(losses) >= losses[len(losses) // 2]:
        return
    yield Finding.warning(
        "schedule-at-zero",
        f"The learning rate came to zero at step {steps:,}, and the best validation is step {best_step:,}: "
        "the loss was still falling.",
        "The schedule ended the training, not the labels: the model could learn more.",
        "Leave --train.epochs and --train.max_steps out, or raise them: early stopping ends the run.",
    )


def auroc_of_leakage(run: RunRecord) -> Iterator[Finding]:
    """An AUROC that is too good to be true."""
    auroc = _best(run).get("auroc")
    if is_number(auroc) and auroc >= LEAKAGE_AUROC:
        yield Finding.warning(
            "auroc-too-good", f"The AUROC on tuning is {auroc:.4f}.", *LEAKAGE_WORDS,
        )  # fmt: skip


def mean_of_many(run: RunRecord) -> Iterator[Finding]:
    """Mean pooling that was given, not chosen."""
    if run.setting("task", "pooling") == "mean":
        yield Finding.info(
            "mean-pooling",
            "The model reads the mean of a history's vectors (task.pooling is mean).",
            "One event that decides counts for one of all events: the longer the history, the less is left "
            "of it.",
            "Let the pooling be chosen on tuning (--task.pooling auto), or give max, last or attention.",
        )
