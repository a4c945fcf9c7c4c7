"""Checks during training, on the records of metrics.jsonl: the course of the losses, and single steps.

Each takes the record of a run, going on or finished, and passes over what is not known of it;
:func:`check_during` has the list.
"""

import math
import statistics
from collections.abc import Iterator

from behrt_jax.diagnosis.finding import Finding, RunRecord
from behrt_jax.files import JsonObject
from behrt_jax.run_folder import Records, is_number


def check_during(run: RunRecord) -> Iterator[Finding]:
    """Every check of a running or finished training."""
    yield from diverged(run)
    yield from stuck(run)
    yield from zero_gradient(run)
    yield from still_adapters(run)
    yield from overfitting(run)
    yield from loss_spikes(run)
    yield from untouched_rows(run)
    yield from recompilations(run)
    yield from input_stalls(run)


# The course of the losses.

NEAR = 0.02
"""A loss within this share of another is no better than it."""
MIN_STEPS, MAX_STEPS = 200, 5000
"""A run is judged after a quarter of its steps, but neither before nor after these."""
SPIKE_NATS, SPIKE_SHARE, SPIKE_WINDOW = 0.3, 0.10, 5
RISES = 3
"""Validations in a row, without a new best, that make overfitting."""


def diverged(run: RunRecord) -> Iterator[Finding]:
    """A loss that is not finite; the reason to stop names step and leaf."""
    lost = next((r for r in run.trainings if "loss" in r and not is_number(r["loss"])), None)
    stop_reason = run.summary.get("stop_reason") or ""
    if stop_reason.startswith("diverged"):
        seen = stop_reason[:1].upper() + stop_reason[1:]
    elif lost is not None:
        seen = f"The training loss at step {lost['step']:,} is not finite."
    else:
        return
    yield Finding.error(
        "diverged",
        seen,
        "Everything after that step is lost; the last good checkpoint is kept.",
        "Lower --optimizer.learning_rate or --optimizer.clip_norm, raise --optimizer.warmup_fraction; "
        f"where frozen parameters are named, see what {run.option('init.run')} loaded.",
    )


def stuck(run: RunRecord) -> Iterator[Finding]:
    """A loss that stays at ln(codes), or at what code frequencies alone give."""
    known = _with_loss(run.validations)
    if not known or known[-1]["step"] < judged_from(run):
        return
    if run.setting("data", "source") == "uniform":  # there it is the best that can be
        return
    loss = min(record["loss"] for record in known)
    unigram, codes = run.baseline("unigram", "loss"), run.facts.codes
    chance = math.log(codes) if codes else math.inf
    at = f"Best validation loss {loss:.4f} after {known[-1]['step']:,} steps"
    mend = "See that embeddings and head train, try another learning rate, and train longer."
    # Where frequencies alone are hardly better than chance, only the unigram's loss can tell.
    if loss >= (1 - NEAR) * chance and not (is_number(unigram) and unigram > 0.97 * chance):
        yield Finding.error(
            "stuck-at-chance",
            f"{at} is within {NEAR:.0%} of ln({codes}) = {chance:.4f}.",
            "The model guesses among all codes: not even how frequent they are was learnt.",
            mend,
        )
    elif is_number(unigram) and loss >= (1 - NEAR) * unigram:
        yield Finding.warning(
            "stuck-at-frequencies",
            f"{at} is within {NEAR:.0%} of the unigram baseline, {unigram:.4f}, or above it.",
            "The model has learnt how frequent codes are, and nothing of what goes together.",
            mend,
        )


def judged_from(run: RunRecord) -> int:
    """Step from which on a loss that has not moved is a finding."""
    total = run.facts.total_steps or MIN_STEPS
    quarter = min(total // 4, MAX_STEPS)
    return max(MIN_STEPS, run.facts.steps_per_epoch or 0, 2 * run.warmup_steps(total), quarter)


def overfitting(run: RunRecord) -> Iterator[Finding]:
    """The validation loss rises while the training loss goes on falling."""
    known = _with_loss(run.validations)
    if len(known) < RISES + 1:
        return
    index = min(range(len(known)), key=lambda place: known[place]["loss"])
    best = known[index]
    at_best, at_end = (_fitted(run.trainings, known, place) for place in (index, len(known) - 1))
    if len(known) - 1 - index < RISES or at_best is None or at_end is None:
        return
    rise, fall = known[-1]["loss"] - best["loss"], at_best - at_end
    if rise < 0.005 * best["loss"] or fall < 0.01 * at_best:
        return
    stops = run.setting("train", "patience") is not None
    harmless = " The best checkpoint is of that epoch, and early stopping is on: no harm is done."
    yield Finding(
        "overfitting",
        "info" if stops else "warning",
        f"From epoch {best['epoch']:.1f} (step {best['step']:,}) on the validation loss rose by "
        f"{rise:.3f} nats while the training loss fell by {fall:.3f}.",
        "The model memorises the train split from there on." + (harmless if stops else ""),
        f"Use the best checkpoint, set --train.patience, raise {run.option('model.dropout')}, train fewer "
        "parameters or use more subjects.",
    )


def _fitted(trainings: Records, validations: Records, index: int) -> float | None:
    """Mean training loss between a validation and the one before it."""
    first = validations[index - 1]["step"] if index else 0
    lines = [r for r in _with_loss(trainings) if first < r["step"] <= validations[index]["step"]]
    targets = sum(record.get("targets") or 1 for record in lines)
    return sum(record["loss"] * (record.get("targets") or 1) for record in lines) / targets if lines else None


def loss_spikes(run: RunRecord) -> Iterator[Finding]:
    """Training losses far above those just before them."""
    known = _with_loss(run.trainings)
    spikes = []
    for index in range(SPIKE_WINDOW, len(known)):
        usual = statistics.median(record["loss"] for record in known[index - SPIKE_WINDOW : index])
        # A line over few masked codes is noisy: 2 nats is the spread of a single code's loss.
        noise = 4 * 2.0 / math.sqrt(max(known[index].get("targets") or 1, 1))
        if known[index]["loss"] > usual + max(SPIKE_NATS, SPIKE_SHARE * usual) + noise:
            spikes.append((known[index], usual))
    if spikes:
        record, usual = max(spikes, key=lambda spike: spike[0]["loss"] - spike[1])
        yield Finding.warning(
            "loss-spikes",
            f"{len(spikes)} spikes of the training loss, the largest at step {record['step']:,}: "
            f"{record['loss']:.3f} after {usual:.3f}.",
            "Updates are too large for a while; worse ones end in divergence.",
            "Lower --optimizer.learning_rate, set --optimizer.clip_norm 1.0, raise "
            "--optimizer.warmup_fraction, or look for odd batches.",
        )


def _with_loss(records: Records) -> list[JsonObject]:
    return [record for record in records if is_number(record.get("loss"))]


# Single steps: gradients, updates, compilation, input.

STILL = 1e-4
"""Movement of an adapter, relative to the values it started with, that counts as none."""
STALL_SHARE, IDLE_SHARE = 0.50, 0.10


def zero_gradient(run: RunRecord) -> Iterator[Finding]:
    """Trainable leaves whose gradient was exactly zero at every logged step."""
    # Before the first update b is zero, and with it the gradient of a: that step says nothing.
    judged = [r for r in run.trainings if r["step"] > 1 and "without_gradient" in r]
    if len(judged) < 2:
        return
    always = set(judged[0]["without_gradient"]).intersection(*(r["without_gradient"] for r in judged))
    norms = [r.get("gradient_norms") or {} for r in judged]
    dead = [group for group in norms[0] if all(n.get(group) == 0.0 for n in norms)]
    if "lora" in dead:
        dead = [group for group in dead if group not in ("lora_a", "lora_b")]
    # An attention key's bias has no gradient by nature: softmax does not see it.
    leaves = sorted(name for name in always if not name.endswith("/bias"))
    why = "What gets no gradient does not learn: the loss does not depend on it."
    mend = "Find where the forward pass leaves it out or cuts the gradient, or freeze it on purpose."
    if dead:
        yield Finding.error(
            "zero-gradient",
            f"The gradient of the trainable group {' and '.join(dead)} was zero at all {len(judged)} "
            "logged steps.",
            why,
            mend,
        )
    elif leaves:
        yield Finding.warning(
            "zero-gradient-leaf",
            f"The gradient of {len(leaves)} trainable leaves was zero at all {len(judged)} logged "
            f"steps, the first is {leaves[0]}.",
            why,
            mend,
        )


def still_adapters(run: RunRecord) -> Iterator[Finding]:
    """Adapters whose a or b is where it started."""
    last = next((r for r in reversed(run.validations) if r.get("adapters")), None)
    warmup = run.warmup_steps(run.facts.total_steps or 0)
    if last is None or last["step"] < max(10, warmup // 2):
        return
    still = {
        part: least for part, least in last["adapters"].items() if not (least.get("movement") or 0.0) >= STILL
    }
    if still:
        listed = " and ".join(f"{part} of {least['layer']}" for part, least in still.items())
        yield Finding.error(
            "adapters-still",
            f"After {last['step']:,} steps {listed} moved by less than {STILL:g} of the values adapters "
            "start with.",
            "An adapter with a or b at its start does nothing, or nothing that it learnt.",
            "See that the regime trains the group lora, that optimizer.learning_rates.lora is not tiny, "
            "and that the layer is reached (findings adapters-not-reached and zero-gradient).",
        )


def untouched_rows(run: RunRecord) -> Iterator[Finding]:
    """Codes that occur in the train split but whose embedding never had a gradient."""
    last = next((r for r in reversed(run.validations) if r.get("embedding_rows")), None)
    if last is None or not last["embedding_rows"].get("untouched"):
        return
    rows = last["embedding_rows"]
    yield Finding.warning(
        "untouched-rows",
        f"{rows['untouched']:,} of {rows['expected']:,} code embeddings were never updated in "
        f"{last['epoch']:.1f} epochs, although their codes occur often enough in the train split.",
        "For those codes the model reads random values.",
        "See what cuts them off: data.window first or recent never shows the rest of a history.",
    )


def recompilations(run: RunRecord) -> Iterator[Finding]:
    """A train step that was compiled more than once."""
    most = max((record.get("compilations") or 0 for record in run.trainings), default=0)
    if most > 1:
        yield Finding.warning(
            "recompilations",
            f"The train step was compiled {most} times.",
            "Each compilation takes seconds to minutes in which nothing is trained.",
            "Keep the shapes, dtypes and shardings of batches and state the same at every step.",
        )


def input_stalls(run: RunRecord) -> Iterator[Finding]:
    """Time spent on making batches while the devices had nothing to do."""
    shares = [(r.get("data_share"), r.get("device_share")) for r in run.trainings[1:]]
    judged = [(data, device) for data, device in shares if is_number(data) and is_number(device)]
    if len(judged) < 3:
        return
    data, device = (statistics.median(column) for column in zip(*judged, strict=True))
    # Where the host waits for the devices, making batches beside them costs nothing.
    if data > STALL_SHARE and device < IDLE_SHARE:
        yield Finding.warning(
            "input-stalls",
            f"{data:.0%} of the time went into waiting for batches, {device:.0%} into waiting for the "
            "devices.",
            "The devices are idle while batches are made.",
            "Prepare the data once (behrt-jax prepare) and put it on a local disk, or give larger batches to "
            "fewer steps.",
        )
