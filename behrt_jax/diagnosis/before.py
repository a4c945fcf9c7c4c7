"""Checks before training: what the settings, the parameters and the data already tell.

Each takes the record of a run and passes over what is not known of it; :func:`check_before` has the list.
"""

import math
from collections.abc import Iterator, Mapping

from behrt_jax.diagnosis.finding import SHIFTED_MEND, SHIFTED_WHY, Finding, RunRecord
from behrt_jax.run_folder import is_number


def check_before(run: RunRecord) -> Iterator[Finding]:
    """Every check that can be made before the first step."""
    yield from frozen_at_random(run)
    yield from code_vectors(run)
    yield from trainable_share(run)
    yield from adapters_reached(run)
    yield from data_without_structure(run)
    yield from validation_size(run)
    yield from unseen_codes(run)
    yield from beyond_tables(run)
    yield from cut_histories(run)
    yield from calendar_time(run)
    yield from static_masks(run)
    yield from steps_for_schedule(run)
    yield from learning_rate_for_batch(run)


# What trains: groups, regimes and adapters.

MOST_TRAINABLE = 50.0
"""Percent of the parameters; above it adapters save little."""


def frozen_at_random(run: RunRecord) -> Iterator[Finding]:
    """Groups that neither train nor were loaded from a run."""
    loaded: set[str] = set(run.setting("init", "groups") or ()) if run.setting("init", "run") else set()
    if run.setting("init", "vectors"):
        loaded.add("embedding")
    if run.finetunes and not run.settings.get("from_scratch"):
        loaded = {"embedding", "base"}
    adapted = run.settings.get("lora") is not None
    frozen = {
        group: run.parameters[group]["total"]
        for group in ("embedding", "head", "base")
        if (run.parameters.get(group) or {}).get("total")
        and not run.parameters[group]["trainable"]
        and group not in loaded
    }
    base = frozen.pop("base", None)
    if frozen:
        listed = " and ".join(f"{group} ({total:,})" for group, total in frozen.items())
        yield Finding.error(
            "frozen-at-random",
            f"Parameters frozen at random values: {listed}.",
            "Adapters cannot make up for random embeddings or a random head: the loss stays near "
            "ln(vocabulary).",
            f"From scratch use --freezing.regime {'lora' if adapted else 'full'}; or give a pretrained run "
            f"with {run.option('init.run')}.",
        )
    if base is not None:
        yield Finding(
            "base-at-random",
            "info" if adapted else "warning",
            f"The {base:,} parameters of the base are frozen at random values.",
            "Adapters, embeddings and head learn around it, but not all that a trained encoder would."
            if adapted
            else "A random encoder without adapters can learn little of order and context.",
            "For the best result pretrain with --freezing.regime full first and give that run with "
            f"{run.option('init.run')}.",
        )


LITTLE_COVERED = 0.5
"""Share of the train events whose codes have vectors; below it vectors are hardly a start."""


def code_vectors(run: RunRecord) -> Iterator[Finding]:
    """Vectors that few codes have, or that are frozen together with embeddings at random values."""
    found = run.facts.vectors
    if not found:
        return
    if found["event_share"] < LITTLE_COVERED:
        yield Finding.warning(
            "vectors-cover-little",
            f"init.vectors has {found['codes']:,} codes of the vocabulary ({found['vocabulary_share']:.1%}), "
            f"to which {found['event_share']:.1%} of the train events belong.",
            "All other codes start from noise around the mean of these vectors.",
            "See that codes are written alike in both, or train vectors on these records.",
        )
    embedding, size = run.parameters.get("embedding") or {}, run.setting("model", "embedding_size")
    if embedding.get("total") and not embedding["trainable"]:
        yield Finding.info(
            "frozen-beside-vectors",
            f"With the vectors, {embedding['total'] - found['codes'] * size:,} other parameters of the group "
            "embedding are frozen, at random values: ages, visits, positions, special tokens, codes without "
            "vectors.",
            "The encoder tells them apart as they are, but they cannot come to mean anything.",
            "Let the embeddings train (--freezing.regime lora or full) unless they must stay as given.",
        )


def trainable_share(run: RunRecord) -> Iterator[Finding]:
    """Adapters beside a base that trains as well, or beside large embeddings and head."""
    percent = run.parameters.get("trainable_percent")
    if run.settings.get("lora") is None or percent is None:
        return
    trainable = {
        group: (run.parameters.get(group) or {}).get("trainable") for group in ("embedding", "head", "base")
    }
    if trainable["base"]:
        yield Finding.warning(
            "trainable-share",
            f"Regime {run.parameters.get('regime', 'unknown')}: {percent:.1f} % of the parameters train "
            f"although LoRA is on, {trainable['base']:,} of them in the base.",
            "Adapters are meant to replace the training of the base: hardly anything is saved over "
            "full training.",
            f"Use --freezing.regime {'lora_pretrained' if run.finetunes else 'lora'}, or a configuration "
            "without adapters.",
        )
    elif percent > MOST_TRAINABLE:
        large = ", ".join(f"{group} {count:,}" for group, count in trainable.items() if count)
        yield Finding.info(
            "trainable-share",
            f"{percent:.1f} % of the parameters train although the base is frozen: {large}.",
            "With a large vocabulary and a small encoder, embeddings and head are most of the model: "
            "LoRA saves little.",
            "Nothing is wrong. Train in full if memory allows, or take a larger encoder.",
        )


def adapters_reached(run: RunRecord) -> Iterator[Finding]:
    """Adapters that are not there, or that the prediction does not depend on."""
    if run.settings.get("lora") is None or not run.parameters:
        return
    if not (run.parameters.get("lora") or {}).get("total"):
        yield Finding.error(
            "no-adapters",
            "LoRA is on, but the model has no adapters.",
            "Nothing of what lora.targets asks for is trained.",
            "Name layers that exist in --lora.targets (query key value out intermediate output gate).",
        )
    elif unreached := run.facts.unreached_adapters:
        yield Finding.error(
            "adapters-not-reached",
            f"{len(unreached)} adapter matrices do not take part in the prediction, the first is "
            f"{unreached[0]}.",
            "They get no gradient and stay what they are, while everything looks as if LoRA were on.",
            "See that the layer is a flax Dense and is called inside adapters.lora.applying, or leave it "
            "out of --lora.targets.",
        )


# The data that a run reads.

WIDE_INTERVAL, NOTED_INTERVAL = 0.15, 0.05
"""Half the width, in nats, of the 95 % interval of a validation loss."""
FEW_VALIDATION_SUBJECTS = 30
MUCH_UNSEEN, MUCH_BEYOND, MUCH_CUT = 0.02, 0.01, 0.10
"""Shares of events."""


def data_without_structure(run: RunRecord) -> Iterator[Finding]:
    """Codes drawn at random."""
    if run.setting("data", "source") == "uniform":
        codes = run.facts.codes
        best = f" ln({codes}) = {math.log(codes):.4f}" if codes else " ln(codes)"
        yield Finding.warning(
            "uniform-data",
            "data.source uniform: codes are drawn at random, there is nothing to learn.",
            f"The best possible validation loss is{best}.",
            "For study only; to see a model learn use --data.source clinical or latent.",
        )


def validation_size(run: RunRecord) -> Iterator[Finding]:
    """A validation loss that cannot be known well, by the interval of the simplest baseline's."""
    simple = "prevalence" if "prevalence" in run.baselines else "unigram"
    low, high = run.baseline(simple, "interval") or (None, None)
    subjects = run.facts.validation_subjects
    half = (high - low) / 2 if is_number(low) and is_number(high) else None
    few = subjects is not None and subjects < FEW_VALIDATION_SUBJECTS
    if not few and (half is None or half <= NOTED_INTERVAL):
        return
    of = f" of {subjects:,} subjects" if subjects is not None else ""
    known = f"95 % interval of their loss: +- {half:.3f} nats" if half is not None else ""
    targets = (run.baselines.get(simple) or {}).get("targets", 0)
    asked = "questions" if simple == "prevalence" else "masked codes"
    yield Finding(
        "validation-size",
        "warning" if few or half is None or half > WIDE_INTERVAL else "info",
        f"Validation is on {targets:,} {asked}{of}; {known or 'its interval cannot be told'}.",
        "Differences between runs on other data that are smaller than this say nothing, and the best "
        "epoch is chosen partly by chance.",
        f"Put more subjects into the tuning split ({run.option('data.tuning_fraction')}), or compare runs "
        "on the same one.",
    )


def unseen_codes(run: RunRecord) -> Iterator[Finding]:
    """Validation events whose code the train split does not know."""
    share = run.facts.unseen_share or 0.0
    if share > MUCH_UNSEEN:
        yield Finding.warning(
            "unseen-codes",
            f"{share:.1%} of the validation events have a code that is rare in the train split, or not in "
            "it.",
            "They are read as [UNK] or through a row that was never trained; the validation is easier or "
            "harder than the data is.",
            f"Lower {run.option('data.min_count')}, split by subject at random, or map codes to a coarser "
            "level.",
        )


def beyond_tables(run: RunRecord) -> Iterator[Finding]:
    """Ages and visits that share the last row of their table, and events before birth."""
    model = run.settings.get("model") or {}
    explained = {
        "ages": (
            "are older than the age table reaches "
            f"({model.get('age_rows', 0) * model.get('age_bin_years', 0):g} years)",
            f"raise {run.option('model.age_rows')}",
        ),
        "before_birth": ("come before the subject's birth", "see that births and times are right"),
        "visits": (
            f"are in later visits than the visit table has rows ({model.get('visit_rows')})",
            f"raise {run.option('model.visit_rows')}",
        ),
        "positions": (
            f"are in later visits than there are positions ({model.get('positions')}), which here count "
            "visits",
            f"raise {run.option('model.positions')}",
        ),
    }
    for name, share in run.facts.beyond_tables.items():
        if share > 0 and name in explained:
            lie, mend = explained[name]
            yield Finding(
                f"beyond-tables-{name.replace('_', '-')}",
                "warning" if share > MUCH_BEYOND else "info",
                f"{share:.2%} of the events {lie}.",
                "They share the embedding at the table's end, so the model cannot tell them apart.",
                f"If they matter, {mend}.",
            )


def cut_histories(run: RunRecord) -> Iterator[Finding]:
    """Events that the sequence length leaves out."""
    share, length = run.facts.cut_share or 0.0, run.facts.row_length
    if share <= MUCH_CUT:
        return
    window = run.setting("data", "window") or "all"
    if window == "all":
        yield Finding.info(
            "cut-histories",
            f"{share:.1%} of the train events are past the first {length} tokens of their history; such "
            "histories are read in several windows.",
            "Nothing is lost, but a window does not see what the others hold.",
            f"For longer context raise {run.option('model.positions')}.",
        )
    else:
        left_out = "unread in each epoch" if window == "random" else "never read"
        yield Finding.warning(
            "cut-histories",
            f"With data.window {window} {share:.1%} of the train events are {left_out}: histories are cut "
            f"to {length} tokens.",
            "The model learns nothing from what it does not read.",
            f"Raise {run.option('model.positions')}, or read histories whole with --data.window all.",
        )


def calendar_time(run: RunRecord) -> Iterator[Finding]:
    """A model that reads the calendar, on dates that were shifted by subject."""
    if run.setting("model", "time") == "time2vec" and run.facts.shifted_dates:
        yield Finding.warning("shifted-dates", run.facts.shifted_dates, SHIFTED_WHY, SHIFTED_MEND)


# How long and how fast a run trains, and on which masks.

FEW_STEPS, FEW_WARMUP_STEPS, FEW_STEPS_PER_EPOCH = 200, 10, 5
HIGH_RATE, LOW_RATE = 10.0, 1 / 30
"""Learning rate relative to :func:`usual_rate`."""


def static_masks(run: RunRecord) -> Iterator[Finding]:
    """Masks drawn once."""
    if run.setting("train", "static_masks"):
        yield Finding.warning(
            "static-masks",
            "train.static_masks: masks are drawn once and reused in each epoch.",
            "The training loss falls by memorising them.",
            "For study only; leave it out to draw new masks at each step.",
        )


def steps_for_schedule(run: RunRecord) -> Iterator[Finding]:
    """Too few steps for a warm-up and a schedule."""
    total, per_epoch = run.facts.total_steps, run.facts.steps_per_epoch
    if not total or not per_epoch:
        return
    # Tokens, where they are given, take the place of subjects.
    batch = "--train.batch_tokens" if run.setting("train", "batch_tokens") else "--train.batch_size"
    # A run that is cut short on purpose is no mistake.
    severity = "warning" if run.setting("train", "max_steps") is None else "info"
    if total < FEW_STEPS:
        yield Finding(
            "few-steps",
            severity,
            f"The whole run has {total:,} steps.",
            "From scratch a model hardly gets beyond code frequencies in so few.",
            f"Raise --train.epochs, or lower {batch}.",
        )
    warmup = run.warmup_steps(total)
    if total >= FEW_STEPS and 0 < warmup < FEW_WARMUP_STEPS:
        yield Finding(
            "few-warmup-steps",
            severity,
            f"The warm-up has {warmup} of {total:,} steps.",
            "The learning rate is at its peak before Adam's moments mean anything.",
            f"Raise --optimizer.warmup_fraction to {min(1.0, FEW_WARMUP_STEPS / total):.2g} or more, or "
            "set it to 0.",
        )
    if per_epoch < FEW_STEPS_PER_EPOCH:
        yield Finding(
            "few-steps-per-epoch",
            severity,
            f"An epoch has {per_epoch} steps.",
            "A batch holds most of the train split, and validations come after very few steps.",
            f"Lower {batch}.",
        )


def usual_rate(tokens_per_step: float, hidden_size: int) -> float:
    """A learning rate of AdamW that is known to work at this batch and width, within a factor of some five.

    Grows with the square root of the batch (Malladi et al. 2022, arXiv 2205.10287), at most by 4, and
    falls with the width (Yang et al. 2022, arXiv 2203.03466); 1e-3 at 2,000 tokens and width 256.
    """
    return 1e-3 * min(4.0, math.sqrt(tokens_per_step / 2000.0)) * 256.0 / hidden_size


def learning_rate_for_batch(run: RunRecord) -> Iterator[Finding]:
    """Learning rates far from what the effective batch and the width call for."""
    tokens, width = run.facts.tokens_per_step, run.setting("model", "hidden_size")
    common = run.setting("optimizer", "learning_rate")
    if not tokens or not width or not common:
        return
    usual = usual_rate(tokens, width)
    own = run.setting("optimizer", "learning_rates") or {}
    rates = {
        group: own.get(group) or common
        for group, counted in run.parameters.items()
        if isinstance(counted, Mapping) and counted.get("trainable")
    }
    high = {group: rate for group, rate in rates.items() if rate > HIGH_RATE * usual}
    low = {group: rate for group, rate in rates.items() if rate < LOW_RATE * usual}
    for name, odd, why, mend in (
        ("high", high, "Training tends to diverge, or never leaves the code frequencies.", "Lower"),
        ("low", low, "The model hardly moves in the steps that it has.", "Raise"),
    ):
        if odd:
            listed = ", ".join(f"{group} {rate:.2g}" for group, rate in odd.items())
            yield Finding.warning(
                f"learning-rate-{name}",
                f"Learning rate {listed} at {tokens:,.0f} tokens a step and width {width}; about "
                f"{usual:.1g} is usual.",
                why,
                f"{mend} --optimizer.learning_rate, or change the batch.",
            )
