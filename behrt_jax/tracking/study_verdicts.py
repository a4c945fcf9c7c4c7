"""What the freezing study must show, each claim checked on its runs."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

FROZEN_SHARE = 0.25
"""Most that a frozen model may gain, of what the full one gains, to count as one that hardly learns."""
FRESH_SHARE = 0.25
"""Most that the training loss may fall with fresh masks, of its fall with masks drawn once."""
LEAST_FALL = 0.3
"""Nats by which a loss must fall to count as falling."""

Run = dict[str, Any]


def judge(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Check the claims for which there are runs.

    Args:
        runs: ``source``, ``masks``, ``regime``, ``seed`` and the figures of
            :func:`behrt_jax.tracking.study_results.read_run`.

    Returns:
        For each claim and kind of data: ``id``, ``claim``, ``seen`` (figures, as text) and ``holds``.
    """
    found = []
    for source in dict.fromkeys(run["source"] for run in runs if run["source"] != "uniform"):
        found += _learnable(source, [run for run in runs if run["source"] == source])
    uniform = [run for run in runs if run["source"] == "uniform"]
    return found + _memorising(uniform) + _no_leak(uniform)


def _learnable(source: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Data with something to learn: only a model whose embeddings and head fit learns it."""

    def gain(regime: str) -> float | None:
        return _mean(runs, regime, lambda run: run["ln_codes"] - run["validation_loss_best"])

    def over_unigram(regime: str) -> float | None:
        return _mean(runs, regime, lambda run: run["unigram"] - run["validation_loss_best"])

    found = []
    full, frozen = gain("full"), gain("lora_only")
    if full is not None and frozen is not None:
        found.append(
            _verdict(
                f"frozen-{source}",
                f"{source}: with embeddings and head frozen at random values the loss stays near ln(codes).",
                f"best validation loss {frozen:.3f} nats below ln(codes), of the full model {full:.3f}",
                frozen < FROZEN_SHARE * full,
            )
        )
    for regime in ("full", "lora", "all_but_adapted", "lora_pretrained"):
        value, least = over_unigram(regime), 0.0
        if value is not None:
            found.append(
                _verdict(
                    f"learns-{source}-{regime}",
                    f"{source}: {regime} learns more than how frequent each code is.",
                    f"best validation loss {value:.3f} nats below the unigram baseline",
                    value > least,
                )
            )
    return found


def _memorising(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Uniform data: a training loss that falls has learnt the masks by heart."""

    def fall(masks: str, regime: str) -> float | None:
        chosen = [run for run in runs if run["masks"] == masks]
        return _mean(chosen, regime, lambda run: run["ln_codes"] - run["train_loss_last"])

    found = []
    for regime in ("full", "lora"):
        once, fresh, frozen = fall("once", regime), fall("fresh", regime), fall("once", "lora_only")
        if once is None:
            continue
        found.append(
            _verdict(
                f"once-memorises-{regime}",
                f"uniform: with masks drawn once, {regime} falls below ln(codes) on its training subjects.",
                f"training loss ends {once:.3f} nats below ln(codes)",
                once > LEAST_FALL,
            )
        )
        if frozen is not None:
            found.append(
                _verdict(
                    f"once-frozen-{regime}",
                    f"uniform: with embeddings and head frozen it falls far less than under {regime}.",
                    f"training loss ends {frozen:.3f} nats below ln(codes), under {regime} {once:.3f}",
                    frozen < FROZEN_SHARE * once,
                )
            )
        if fresh is not None:
            found.append(
                _verdict(
                    f"fresh-forgets-{regime}",
                    f"uniform: with fresh masks {regime} hardly memorises.",
                    f"training loss ends {fresh:.3f} nats below ln(codes), with masks drawn once {once:.3f}",
                    fresh < FRESH_SHARE * once,
                )
            )
    return found


def _no_leak(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Uniform data: on subjects that were not trained on nobody can beat a guess."""
    if not runs:
        return []
    beyond = [run["ln_codes"] - run["validation_loss_best"] - half_width(run) for run in runs]
    deepest = min(runs, key=lambda run: run["validation_loss_best"] - run["ln_codes"])
    difference = deepest["validation_loss_best"] - deepest["ln_codes"]
    return [
        _verdict(
            "no-leak",
            "uniform: the validation loss never drops below ln(codes) by more than its 95 % interval.",
            f"least of {len(runs)} runs and all epochs: {difference:+.4f} nats from ln(codes), "
            f"interval +-{half_width(deepest):.4f}",
            max(beyond) <= 0,
        )
    ]


def half_width(run: Run) -> float:
    """Half the 95 % interval of a run's best validation loss, nats."""
    low, high = run["interval"]
    return (high - low) / 2


def _mean(runs: Sequence[Run], regime: str, value: Any) -> float | None:
    values = [value(run) for run in runs if run["regime"] == regime]
    return fmean(values) if values else None


def _verdict(name: str, claim: str, seen: str, holds: bool) -> dict[str, Any]:
    return {"id": name, "claim": claim, "seen": seen, "holds": holds}
