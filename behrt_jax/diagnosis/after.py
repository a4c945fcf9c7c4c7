"""Checks of what came out, on summary.json and the validations.

Each takes the record of a run that ended and passes over what is not known of it; :func:`check_after` has
the list.
"""

import math
from collections.abc import Iterator

from behrt_jax.diagnosis.during import MIN_STEPS
from behrt_jax.diagnosis.finding import Finding, RunRecord
from behrt_jax.files import JsonObject
from behrt_jax.run_folder import is_number

SMALL_GAIN = 0.01
"""Nats; another seed could turn it around."""
SMALL_SHARE = 0.8
"""Of the gain over the unigram that could be attained."""
STILL_FALLING = 0.02
"""Share by which the loss fell in the last fifth of the validations."""
ENOUGH_TARGETS, SMALL_ACCURACY = 50, 0.02
"""Masked codes that a band needs to be judged, and a gain in accuracy there that counts as none."""


def check_after(run: RunRecord) -> Iterator[Finding]:
    """Every check of a run that ended."""
    yield from below_oracle(run)
    yield from best_without_record(run)
    # A run of a few steps is a trial: how good it is says nothing, but that pairs are not beaten yet does.
    if (run.summary.get("steps") or 0) < MIN_STEPS:
        yield from gain_over_pairs(run)
        return
    yield from gain_over_baselines(run)
    yield from common_codes_alone(run)
    yield from best_epoch(run)
    yield from gap_to_oracle(run)


def below_oracle(run: RunRecord) -> Iterator[Finding]:
    """A loss that is better than can be."""
    gap = run.summary.get("oracle_gap") or {}
    if is_number(gap.get("high")) and gap["high"] < 0:
        yield Finding.error(
            "below-oracle",
            f"The validation loss is {abs(gap.get('nats') or gap['high']):.4f} nats below the best that is "
            f"possible, more than its 95 % interval ({gap.get('low') or math.nan:.4f} to {gap['high']:.4f}) "
            "allows.",
            "What is masked reaches the model some other way: there is leakage.",
            "Look for targets in the input (masks, segment ids, subjects in two splits), and audit the "
            "data with behrt-jax doctor --data.",
        )


def best_without_record(run: RunRecord) -> Iterator[Finding]:
    """A best checkpoint that the metrics do not know."""
    best_step = run.summary.get("best_step")
    if run.summary.get("best") is None and best_step is not None:
        yield Finding.warning(
            "best-without-record",
            f"The best step, {best_step:,}, has no validation record in the metrics.",
            "Its figures are unknown.",
            "See whether metrics.jsonl was cut or edited.",
        )


def gain_over_baselines(run: RunRecord) -> Iterator[Finding]:
    """A model no better than code frequencies, than counting which codes go together, or, of questions, than
    how common each code is.
    """
    if run.setting("data", "source") == "uniform":
        return
    of_answers = run.summary.get("gain_over_prevalence")
    if is_number(of_answers) and of_answers <= 0:
        yield Finding.error(
            "no-gain-over-prevalence",
            f"The best validation loss is {abs(of_answers):.4f} nats above that of answering by how common "
            "each code is.",
            "The model is of no use yet: a table of prevalences answers better.",
            LONGER,
        )
    gain = run.summary.get("gain_over_unigram")
    if not is_number(gain) or gain >= SMALL_GAIN:
        yield from gain_over_pairs(run)
        return
    yield Finding(
        "no-gain-over-unigram",
        "error" if gain <= 0 else "warning",
        f"The best validation loss is {abs(gain):.4f} nats {'above' if gain <= 0 else 'below'} that "
        "of predicting by code frequency.",
        "The model is of no use yet." if gain <= 0 else "Another seed could turn that around.",
        LONGER,
    )


LONGER = "Train longer, try another learning rate, see that embeddings and head train."


def gain_over_pairs(run: RunRecord) -> Iterator[Finding]:
    """A model no better than counting which codes go together, by more than chance where that is known."""
    loss, pairs = (run.summary.get("best") or {}).get("loss"), run.baseline("co-occurrence", "loss")
    if run.setting("data", "source") == "uniform" or not (is_number(loss) and is_number(pairs)):
        return
    gap = (run.summary.get("gaps") or {}).get("co-occurrence") or {}
    known = is_number(gap.get("low")) and is_number(gap.get("high"))
    low, high = (gap["low"], gap["high"]) if known else (0.0, 0.0)
    if known and low <= 0 <= high:
        yield Finding.info(
            "no-gain-over-co-occurrence",
            f"The best validation loss, {loss:.4f}, and the {pairs:.4f} nats of counting which codes occur "
            f"together are not told apart (difference {low:+.4f} to {high:+.4f}, paired code by code).",
            "A table of pairs may do as well as the model.",
            "Train longer, or validate on more subjects, to tell.",
        )
    elif loss >= pairs:
        short = run.setting("train", "max_steps") is not None and (run.summary.get("steps") or 0) < MIN_STEPS
        interval = f" (difference {low:+.4f} to {high:+.4f}, paired code by code)" if known else ""
        yield Finding(
            "no-gain-over-co-occurrence",
            "info" if short else "warning",  # cut short on purpose
            f"The best validation loss, {loss:.4f}, is not below the {pairs:.4f} nats of counting which "
            f"codes occur together{interval}.",
            "A table of pairs does as well as the model.",
            LONGER,
        )


def common_codes_alone(run: RunRecord) -> Iterator[Finding]:
    """Nothing but the most frequent codes predicted better than by frequency."""
    bands = [
        band
        for band in run.summary.get("bands") or []
        if (band.get("targets") or 0) >= ENOUGH_TARGETS
        and is_number(band.get("accuracy"))
        and is_number(band.get("unigram_accuracy"))
    ]
    bands.sort(key=lambda band: band["targets"] / max(band.get("codes") or 1, 1), reverse=True)
    if len(bands) < 2 or (run.summary.get("gain_over_unigram") or 0.0) < SMALL_GAIN:
        return
    if not any(map(_gained, bands[1:])):
        listed = ", ".join(f"{band['band']}: {band['accuracy']:.1%}" for band in bands)
        yield Finding.warning(
            "common-codes-alone",
            "Only the most frequent codes are predicted better than by frequency (accuracy by rank of the "
            f"code: {listed}).",
            "The overall accuracy hides that nothing was learnt about the other codes.",
            "Train longer or on more subjects, map rare codes to a coarser level, or raise "
            f"{run.option('data.min_count')}.",
        )


def _gained(band: JsonObject) -> bool:
    """True where the codes of a band are predicted better than by frequency, and not by chance."""
    share = max(band["accuracy"], 1.0 / band["targets"])
    error = math.sqrt(max(share * (1 - share), 0.0) / band["targets"])  # standard error of the accuracy
    if band["accuracy"] > band["unigram_accuracy"] + max(SMALL_ACCURACY, 2 * error):
        return True
    return is_number(band.get("unigram_loss")) and band["loss"] < band["unigram_loss"] - 0.1


def best_epoch(run: RunRecord) -> Iterator[Finding]:
    """A best validation that is the very first or the very last."""
    validations = [record for record in run.validations if is_number(record.get("loss"))]
    if len(validations) < 5:
        return
    best = min(validations, key=lambda record: record["loss"])
    if best is validations[0]:
        yield Finding.warning(
            "best-at-first",
            f"The first of {len(validations)} validations was the best (epoch {best['epoch']:.1f}); the "
            f"last is {validations[-1]['loss'] - best['loss']:.3f} nats above it.",
            "All training after it was in vain: the model overfits at once or is thrown off its course.",
            "Lower --optimizer.learning_rate, validate more often (--train.validate_every), or train "
            "fewer parameters.",
        )
    elif best is validations[-1]:
        earlier = validations[-1 - max(1, len(validations) // 5)]
        fall = earlier["loss"] - best["loss"]
        falling = fall > STILL_FALLING * earlier["loss"]
        yield Finding(
            "best-at-last",
            "warning" if falling else "info",
            f"The last of {len(validations)} validations was the best; the loss fell by {fall:.3f} nats "
            "over the last fifth.",
            "The run ended before the model had learnt what it can."
            if falling
            else "A longer run may gain a little more.",
            "Raise --train.epochs."
            if falling
            else "Nothing must be done; raise --train.epochs for the last bit.",
        )


def gap_to_oracle(run: RunRecord) -> Iterator[Finding]:
    """The share that was learnt of what could be learnt."""
    share, gap = run.summary.get("share_of_attainable_gain"), run.summary.get("oracle_gap") or {}
    if not is_number(share):
        return
    nats = f", {gap['nats']:.3f} nats above the optimum" if is_number(gap.get("nats")) else ""
    accuracy = run.baseline("oracle", "accuracy")
    best = f" The best possible accuracy is {accuracy:.1%}." if is_number(accuracy) else ""
    low = share < SMALL_SHARE
    yield Finding(
        "gap-to-oracle",
        "warning" if low else "info",
        f"{share:.1%} of the attainable gain over code frequencies was attained{nats}.{best}",
        "The data holds more than the model has learnt." if low else "The model is close to the optimum.",
        "Train longer, in full instead of with adapters, with a larger model or another learning rate."
        if low
        else "Nothing is to be done.",
    )
