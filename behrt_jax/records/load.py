"""Sequences from whichever source the configuration names."""

from behrt_jax.config.data import DataConfig
from behrt_jax.data.events import EventSet
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.sequences import SequenceSet, build_sequences
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK
from behrt_jax.errors import InputError
from behrt_jax.records.synthetic.clinical import generate_clinical
from behrt_jax.records.synthetic.histories import generate_uniform
from behrt_jax.records.synthetic.latent import generate_latent

GENERATED_VOCABULARY_SIZE = 1000


# What training may choose anew on prepared data; the rest was settled when it was prepared.
_OF_TRAINING = ("source", "path", "window", "max_length", "packed", "train_fraction", "verify")


def load_sequences(config: DataConfig, sep_token: bool, fact_tokens: bool = False) -> SequenceSet:
    """Read or generate the events and turn them into sequences, or open prepared ones.

    Of the train split the share that ``train_fraction`` says is taken. With ``fact_tokens`` subjects have
    their static facts.

    Raises:
        InputError: options that do not fit the source, a source that cannot be read, or no train subject
            with a fact where there should be facts.
    """
    if config.source == "prepared":
        data = _open_prepared(config, sep_token)
    else:
        data = build_sequences(load_events(config), config, sep_token)
    if fact_tokens:
        data = data.with_facts()
        facts = data.splits["train"].facts
        if facts is None or not (facts.codes != UNK).any():
            raise InputError(
                "model.fact_tokens is on, but no subject of the train split has a static fact that is "
                "frequent enough for a row: leave it out, or prepare with --static_codes that match some."
            )
    return data if config.train_fraction == 1 else data.with_train_share(config.train_fraction, config.seed)


def _open_prepared(config: DataConfig, sep_token: bool) -> SequenceSet:
    if config.path is None:
        raise InputError("data.path is missing: give the folder of the prepared data, as --data DIR.")
    for name, given in vars(DataConfig()).items():
        if name not in _OF_TRAINING and getattr(config, name) != given:
            raise InputError(
                f"data.{name} has no effect on prepared data: leave it out, or prepare the data with it."
            )
    return read_prepared(config.path, sep_token, config.verify)


def load_events(config: DataConfig) -> EventSet:
    """Read or generate the events.

    Raises:
        InputError: options that do not fit the source, or a source that cannot be read.
    """
    if config.source == "meds":
        if config.path is None:
            raise InputError("data.path is missing: give the folder of the MEDS data set.")
        from behrt_jax.records.sources.meds import read_meds  # slow to import, and few runs need it

        return read_meds(config.path, config.visit_column)
    if config.path is not None:
        raise InputError(
            f"data.path is given but data.source is {config.source}, which is generated: "
            "add --data.source meds."
        )
    spread = config.events_spread
    options = (config.subjects, generated_code_count(config), config.events_mean, spread, config.seed)
    if config.source == "latent":
        _check_nothing_dropped(config)
        return generate_latent(*options, config.difficulty, config.covariates)
    return {"clinical": generate_clinical, "uniform": generate_uniform}[config.source](*options)


def generated_code_count(config: DataConfig) -> int:
    """Number of codes that a generated source has, special tokens aside."""
    return (config.vocabulary_size or GENERATED_VOCABULARY_SIZE) - len(SPECIAL_TOKENS)


def _check_nothing_dropped(config: DataConfig) -> None:
    for name in ("codes", "exclude_codes"):
        if getattr(config, name):
            raise InputError(
                f"data.{name} does not go with the latent source, whose optimum counts on every "
                "event: leave it out."
            )
    if config.duplicates == "drop":
        raise InputError(
            "data.duplicates is drop, but the optimum of the latent source counts on every "
            "event: leave it out, or give keep."
        )
