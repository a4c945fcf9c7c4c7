"""Checks of single steps: gradients, updates, compilation, input."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from behrt_jax.diagnosis.finding import Finding, is_number

Values = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]


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
