"""Checks during training, on the records of metrics.jsonl."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from behrt_jax.diagnosis.finding import Finding, is_number

# Checks of the course of the losses.

Values = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]


NEAR = 0.02
"""A loss within this share of another is no better than it."""
MIN_STEPS, MAX_STEPS = 200, 5000
"""A run is judged after a quarter of its steps, but neither before nor after these."""
SPIKE_NATS, SPIKE_SHARE, SPIKE_WINDOW = 0.3, 0.10, 5
RISES = 3
"""Validations in a row, without a new best, that make overfitting."""


def diverged(trainings: Records, stop_reason: str) -> list[Finding]:
    """A loss that is not finite; the reason to stop names step and leaf."""
    lost = next((r for r in trainings if "loss" in r and not is_number(r["loss"])), None)
    if not stop_reason.startswith("diverged") and lost is None:
        return []
    seen = (
        stop_reason[:1].upper() + stop_reason[1:]
        if stop_reason.startswith("diverged")
        else (f"The training loss at step {lost['step'] if lost else 0:,} is not finite.")
    )
    return [
        Finding(
            "diverged",
            "error",
            seen,
            "Everything after that step is lost; the last good checkpoint is kept.",
            "Lower --optimizer.learning_rate or --optimizer.clip_norm, raise --optimizer.warmup_fraction; "
            "where frozen parameters are named, see what --init.run loaded.",
        )
    ]


def stuck(settings: Values, facts: Values, baselines: Values, validations: Records) -> list[Finding]:
    """A loss that stays at ln(codes), or at what code frequencies alone give."""
    last = _last(validations, "loss")
    if last is None or last["step"] < judged_from(settings, facts):
        return []
    if (settings.get("data") or {}).get("source") == "uniform":  # there it is the best that can be
        return []
    loss = min(record["loss"] for record in validations if is_number(record.get("loss")))
    unigram = (baselines.get("unigram") or {}).get("loss")
    chance = math.log(facts["codes"]) if facts.get("codes") else None
    at = f"Best validation loss {loss:.4f} after {last['step']:,} steps"
    mend = "See that embeddings and head train, try another learning rate, and train longer."
    # Where frequencies alone are hardly better than chance, only the unigram's loss can tell.
    if (
        chance is not None
        and loss >= (1 - NEAR) * chance
        and not (is_number(unigram) and unigram > 0.97 * chance)
    ):
        return [
            Finding(
                "stuck-at-chance",
                "error",
                f"{at} is within {NEAR:.0%} of ln({facts['codes']}) = {chance:.4f}.",
                "The model guesses among all codes: not even how frequent they are was learnt.",
                mend,
            )
        ]
    if is_number(unigram) and loss >= (1 - NEAR) * unigram:
        return [
            Finding(
                "stuck-at-frequencies",
                "warning",
                f"{at} is within {NEAR:.0%} of the unigram baseline, {unigram:.4f}, or above it.",
                "The model has learnt how frequent codes are, and nothing of what goes together.",
                mend,
            )
        ]
    return []


def overfitting(settings: Values, trainings: Records, validations: Records) -> list[Finding]:
    """The validation loss rises while the training loss goes on falling."""
    known = [record for record in validations if is_number(record.get("loss"))]
    if len(known) < RISES + 1:
        return []
    index = min(range(len(known)), key=lambda place: known[place]["loss"])
    best = known[index]
    at_best, at_end = _fitted(trainings, known, index), _fitted(trainings, known, len(known) - 1)
    if len(known) - 1 - index < RISES or at_best is None or at_end is None:
        return []
    rise, fall = known[-1]["loss"] - best["loss"], at_best - at_end
    if rise < 0.005 * best["loss"] or fall < 0.01 * at_best:
        return []
    stops = (settings.get("train") or {}).get("patience") is not None
    return [
        Finding(
            "overfitting",
            "info" if stops else "warning",
            f"From epoch {best['epoch']:.1f} (step {best['step']:,}) on the validation loss rose by "
            f"{rise:.3f} nats while the training loss fell by {fall:.3f}.",
            "The model memorises the train split from there on."
            + (
                " The best checkpoint is of that epoch, and early stopping is on: no harm is done."
                if stops
                else ""
            ),
            "Use the best checkpoint, set --train.patience, raise --model.dropout, train fewer parameters "
            "or use more subjects.",
        )
    ]


def loss_spikes(trainings: Records) -> list[Finding]:
    """Training losses far above those just before them."""
    known = [record for record in trainings if is_number(record.get("loss"))]
    spikes = []
    for index in range(SPIKE_WINDOW, len(known)):
        usual = statistics.median(record["loss"] for record in known[index - SPIKE_WINDOW : index])
        # A line over few masked codes is noisy: 2 nats is the spread of a single code's loss.
        noise = 4 * 2.0 / math.sqrt(max(known[index].get("targets") or 1, 1))
        if known[index]["loss"] > usual + max(SPIKE_NATS, SPIKE_SHARE * usual) + noise:
            spikes.append((known[index], usual))
    if not spikes:
        return []
    record, usual = max(spikes, key=lambda spike: spike[0]["loss"] - spike[1])
    return [
        Finding(
            "loss-spikes",
            "warning",
            f"{len(spikes)} spikes of the training loss, the largest at step {record['step']:,}: "
            f"{record['loss']:.3f} after {usual:.3f}.",
            "Updates are too large for a while; worse ones end in divergence.",
            "Lower --optimizer.learning_rate, set --optimizer.clip_norm 1.0, raise "
            "--optimizer.warmup_fraction, or look for odd batches.",
        )
    ]


def judged_from(settings: Values, facts: Values) -> int:
    """Step from which on a loss that has not moved is a finding."""
    total = facts.get("total_steps") or MIN_STEPS
    warmup = round(((settings.get("optimizer") or {}).get("warmup_fraction") or 0.0) * total)
    return max(MIN_STEPS, facts.get("steps_per_epoch") or 0, 2 * warmup, min(total // 4, MAX_STEPS))


def _fitted(trainings: Records, validations: Records, index: int) -> float | None:
    """Mean training loss between a validation and the one before it."""
    first = validations[index - 1]["step"] if index else 0
    lines = [
        record
        for record in trainings
        if first < record["step"] <= validations[index]["step"] and is_number(record.get("loss"))
    ]
    targets = sum(record.get("targets") or 1 for record in lines)
    return sum(record["loss"] * (record.get("targets") or 1) for record in lines) / targets if lines else None


def _last(records: Records, field: str) -> Mapping[str, Any] | None:
    return next((record for record in reversed(records) if is_number(record.get(field))), None)


# Checks of single steps: gradients, updates, compilation, input.

STILL = 1e-4
"""Movement of an adapter, relative to the values it started with, that counts as none."""
STALL_SHARE, IDLE_SHARE = 0.50, 0.10


def zero_gradient(trainings: Records) -> list[Finding]:
    """Trainable leaves whose gradient was exactly zero at every logged step."""
    # Before the first update b is zero, and with it the gradient of a: that step says nothing.
    judged = [r for r in trainings if r["step"] > 1 and "without_gradient" in r]
    if len(judged) < 2:
        return []
    always = set(judged[0]["without_gradient"]).intersection(*(r["without_gradient"] for r in judged))
    norms = [r.get("gradient_norms") or {} for r in judged]
    dead = [group for group in norms[0] if all(_is_zero(n.get(group)) for n in norms)]
    if "lora" in dead:
        dead = [group for group in dead if group not in ("lora_a", "lora_b")]
    findings = []
    why = "What gets no gradient does not learn: the loss does not depend on it."
    mend = "Find where the forward pass leaves it out or cuts the gradient, or freeze it on purpose."
    if dead:
        findings.append(
            Finding(
                "zero-gradient",
                "error",
                f"The gradient of the trainable group {' and '.join(dead)} was zero at all {len(judged)} "
                "logged steps.",
                why,
                mend,
            )
        )
    # An attention key's bias has no gradient by nature: softmax does not see it.
    leaves = sorted(name for name in always if not name.endswith("/bias"))
    if leaves and not dead:
        findings.append(
            Finding(
                "zero-gradient-leaf",
                "warning",
                f"The gradient of {len(leaves)} trainable leaves was zero at all {len(judged)} logged "
                f"steps, the first is {leaves[0]}.",
                why,
                mend,
            )
        )
    return findings


def still_adapters(settings: Values, facts: Values, validations: Records) -> list[Finding]:
    """Adapters whose a or b is where it started."""
    last = next((r for r in reversed(validations) if r.get("adapters")), None)
    total = facts.get("total_steps") or 0
    warmup = round(((settings.get("optimizer") or {}).get("warmup_fraction") or 0.0) * total)
    if last is None or last["step"] < max(10, warmup // 2):
        return []
    still = {
        part: least for part, least in last["adapters"].items() if not (least.get("movement") or 0.0) >= STILL
    }
    if not still:
        return []
    listed = " and ".join(f"{part} of {least['layer']}" for part, least in still.items())
    return [
        Finding(
            "adapters-still",
            "error",
            f"After {last['step']:,} steps {listed} moved by less than {STILL:g} of the values adapters "
            "start with.",
            "An adapter with a or b at its start does nothing, or nothing that it learnt.",
            "See that the regime trains the group lora, that optimizer.learning_rates.lora is not tiny, "
            "and that the layer is reached (findings adapters-not-reached and zero-gradient).",
        )
    ]


def untouched_rows(validations: Records) -> list[Finding]:
    """Codes that occur in the train split but whose embedding never had a gradient."""
    last = next((r for r in reversed(validations) if r.get("embedding_rows")), None)
    if last is None or not last["embedding_rows"].get("untouched"):
        return []
    rows = last["embedding_rows"]
    return [
        Finding(
            "untouched-rows",
            "warning",
            f"{rows['untouched']:,} of {rows['expected']:,} code embeddings were never updated in "
            f"{last['epoch']:.1f} epochs, although their codes occur often enough in the train split.",
            "For those codes the model reads random values.",
            "See what cuts them off: data.window first or recent never shows the rest of a history.",
        )
    ]


def recompilations(trainings: Records) -> list[Finding]:
    """A train step that was compiled more than once."""
    most = max((record.get("compilations") or 0 for record in trainings), default=0)
    if most <= 1:
        return []
    return [
        Finding(
            "recompilations",
            "warning",
            f"The train step was compiled {most} times.",
            "Each compilation takes seconds to minutes in which nothing is trained.",
            "Keep the shapes, dtypes and shardings of batches and state the same at every step.",
        )
    ]


def input_stalls(trainings: Records) -> list[Finding]:
    """Time spent on making batches while the devices had nothing to do."""
    judged = [r for r in trainings[1:] if is_number(r.get("data_share")) and is_number(r.get("device_share"))]
    if len(judged) < 3:
        return []
    data = statistics.median(record["data_share"] for record in judged)
    device = statistics.median(record["device_share"] for record in judged)
    # Where the host waits for the devices, making batches beside them costs nothing.
    if data <= STALL_SHARE or device >= IDLE_SHARE:
        return []
    return [
        Finding(
            "input-stalls",
            "warning",
            f"{data:.0%} of the time went into waiting for batches, {device:.0%} into waiting for the "
            "devices.",
            "The devices are idle while batches are made.",
            "Prepare the data once (experiments/prepare.py) and put it on a local disk, or give larger "
            "batches to fewer steps.",
        )
    ]


def _is_zero(value: Any) -> bool:
    return value is not None and value == 0.0


def check_during(
    settings: Values, facts: Values, baselines: Values, records: Records, stop_reason: str = ""
) -> list[Finding]:
    """Every check of a running or finished training; what is unknown is not checked.

    Args:
        settings: the configuration as nested dicts.
        facts: ``facts`` in config.json.
        baselines: name -> figures, as in summary.json.
        records: of metrics.jsonl, in order.
        stop_reason: of summary.json; empty while the run goes on.
    """
    trainings = [record for record in records if record.get("split") == "train"]
    validations = [record for record in records if record.get("split") == "tuning"]
    return [
        *diverged(trainings, stop_reason),
        *stuck(settings, facts, baselines, validations),
        *zero_gradient(trainings),
        *still_adapters(settings, facts, validations),
        *overfitting(settings, trainings, validations),
        *loss_spikes(trainings),
        *untouched_rows(validations),
        *recompilations(trainings),
        *input_stalls(trainings),
    ]
