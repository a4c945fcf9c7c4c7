"""Checks before the first step of a training run: mistakes in its configuration, which stop it before any
data is read, and facts of data and model, by which the doctor judges it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TypeVar, get_args

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from behrt_jax.adapters.lora import GROUPS
from behrt_jax.config.model import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.config.training import FinetuneConfig, OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.events import DAY
from behrt_jax.data.packing import room_beside
from behrt_jax.data.questions import QuestionBatches
from behrt_jax.data.sequences import Sequences, SequenceSet, day_text
from behrt_jax.data.vocabulary import SEP, SPECIAL_TOKENS, UNK
from behrt_jax.diagnosis.finding import Facts
from behrt_jax.diagnosis.leakage_data import shifted_dates
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import example_batch
from behrt_jax.models.questions import BEHRTForQueries, example_questions
from behrt_jax.tracking.trackers import check_trackers
from behrt_jax.training.freezing import REGIMES, regime
from behrt_jax.training.state import Setup, set_up
from behrt_jax.training.telemetry import leaf_names


def check(config: PretrainConfig) -> None:
    """Raise one :class:`InputError` for the first setting that cannot work; it names the option."""
    _check_model(config.model)
    data, masking, optimizer, train = config.data, config.masking, config.optimizer, config.train

    max_length = data.max_length or config.model.positions
    require(
        max_length <= config.model.positions,
        f"data.max_length is {max_length}, but the model has {config.model.positions} positions: "
        "lower it or raise model.positions.",
    )
    require(max_length >= 2, f"data.max_length is {max_length}: give 2 or more.")
    positive("data.subjects", data.subjects)
    share("data.train_fraction", data.train_fraction)
    positive("data.train_fraction", data.train_fraction)
    positive("data.events_mean", data.events_mean)
    not_negative("data.events_spread", data.events_spread)
    share("data.difficulty", data.difficulty)
    if data.vocabulary_size is not None:
        require(
            data.vocabulary_size > 5,
            f"data.vocabulary_size is {data.vocabulary_size}: five rows go to special tokens, give more.",
        )

    share("masking.probability", masking.probability)
    require(masking.probability > 0, "masking.probability is 0: there would be nothing to predict.")
    share("masking.mask_share", masking.mask_share)
    share("masking.random_share", masking.random_share)
    require(
        masking.mask_share + masking.random_share <= 1,
        "masking.mask_share and masking.random_share add up to more than 1: lower one of them.",
    )

    require(
        config.init.run is None or config.init.vectors is None,
        "init.run and init.vectors both tell what the embedding starts from: leave one of them out.",
    )
    check_optimizer(optimizer, config.lora)
    for name in ("epochs", "batch_size", "log_every", "max_steps", "batch_tokens", "micro_batches"):
        positive(f"train.{name}", getattr(train, name))
    for name in ("validate_every", "patience", "steps_per_call"):
        positive(f"train.{name}", getattr(train, name))
    choices = get_args(TrainConfig.__annotations__["data_on_device"])
    require(
        train.data_on_device in choices,
        f"train.data_on_device is {train.data_on_device!r}: choose one of {', '.join(choices)}.",
    )

    if config.objective != "mlm":
        _check_queries(config)
    check_freezing(config.freezing, config.lora)
    set_up(config, vocabulary_size=8)  # adapters and regime; no arrays are made


def _check_queries(config: PretrainConfig) -> None:
    queries = config.queries
    require(bool(queries.horizon_days), "queries.horizon_days is empty: give a number of days.")
    for days in queries.horizon_days:
        positive("queries.horizon_days", days)
    require(queries.times >= 1, f"queries.times is {queries.times}: give 1 or more.")
    require(queries.questions >= 1, f"queries.questions is {queries.questions}: give 1 or more.")
    for name in ("positive_share", "group_share"):
        value = getattr(queries, name)
        require(0 <= value < 1, f"queries.{name} is {value}: give a share from 0 up to, but not, 1.")
    twice = sorted({name for name in queries.groups if queries.groups.count(name) > 1})
    require(not twice, f"queries.groups has {', '.join(twice)} twice: leave one out.")
    not_negative("queries.frequency_power", queries.frequency_power)
    positive("queries.mlm_weight", queries.mlm_weight)
    require(
        not config.train.static_masks,
        "train.static_masks is of masked codes alone: leave it out with --objective queries or both.",
    )
    require(
        config.train.data_on_device != "yes",
        "train.data_on_device is yes, but questions are drawn by the host: give auto or no.",
    )


def check_optimizer(optimizer: OptimizerConfig, adapters: LoRAConfig | None) -> None:
    """As :func:`check`, of the optimizer."""
    positive("optimizer.learning_rate", optimizer.learning_rate)
    share("optimizer.warmup_fraction", optimizer.warmup_fraction)
    positive("optimizer.clip_norm", optimizer.clip_norm)
    positive("optimizer.lora_plus", optimizer.lora_plus)
    require(
        optimizer.lora_plus is None or adapters is not None,
        "optimizer.lora_plus is of adapters, but the model has none: leave it out, or take a configuration "
        "with adapters.",
    )
    not_negative("optimizer.weight_decay", optimizer.weight_decay)
    for name in ("b1", "b2"):
        _dropout(f"optimizer.{name}", getattr(optimizer, name))
    for group in GROUPS:
        positive(f"optimizer.learning_rates.{group}", getattr(optimizer.learning_rates, group))
        not_negative(f"optimizer.weight_decays.{group}", getattr(optimizer.weight_decays, group))


def check_freezing(freezing: FreezingConfig, adapters: LoRAConfig | None) -> None:
    """As :func:`check`, of what trains."""
    require(
        freezing.regime in REGIMES,
        f"freezing.regime is {freezing.regime!r}: choose one of {', '.join(REGIMES)}.",
    )
    unknown = sorted(set(freezing.groups) - set(GROUPS))
    require(not unknown, f"freezing.groups has {unknown}: choose from {', '.join(GROUPS)}.")
    require(
        adapters is not None or freezing.regime == "full" or bool(freezing.groups),
        f"freezing.regime is {freezing.regime}, but the model has no adapters: take a configuration "
        "whose name ends in _lora, or name the groups to train with freezing.groups.",
    )


def _check_model(model: ModelConfig) -> None:
    for name in ("embedding_size", "hidden_size", "layers", "heads", "positions", "age_rows", "visit_rows"):
        positive(f"model.{name}", getattr(model, name))
    positive("model.age_bin_years", model.age_bin_years)
    positive("model.head_chunk", model.head_chunk)
    require(
        model.hidden_size % model.heads == 0,
        f"model.hidden_size {model.hidden_size} is not divisible by model.heads {model.heads}: change one.",
    )
    positive("model.rope_base", model.rope_base)
    size = model.hidden_size // model.heads
    require(
        not model.position_embedding.startswith("rope") or size % 2 == 0,
        f"model.position_embedding is {model.position_embedding}, which turns pairs of components, but heads "
        f"have the odd size {size} (hidden_size / heads): change one.",
    )
    require(
        model.position_embedding != "rope_time" or model.position_of == "event",
        "model.position_of is visit, but model.position_embedding rope_time counts days: leave position_of "
        "out, or take rope, which counts what it says.",
    )
    for name in ("dropout", "attention_dropout"):
        _dropout(f"model.{name}", getattr(model, name))
    if model.attention == "cudnn":
        _check_cudnn(model)


def _check_cudnn(model: ModelConfig) -> None:
    cudnn = "model.attention is cudnn, which "
    require(
        model.compute_dtype == "bfloat16",
        f"{cudnn}needs bfloat16, but model.compute_dtype is {model.compute_dtype}: change one.",
    )
    rate = model.dropout if model.attention_dropout is None else model.attention_dropout
    require(
        rate == 0,
        f"{cudnn}has no dropout here, but its rate is {rate}: set model.attention_dropout to 0.",
    )
    size = model.hidden_size // model.heads
    require(
        size % 8 == 0 and size <= 128,
        f"{cudnn}needs heads of a multiple of 8, at most 128, but model.hidden_size / model.heads is {size}: "
        "change one of them.",
    )
    require(
        jax.default_backend() == "gpu",
        f"{cudnn}needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}: take auto.",
    )


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` unless the condition holds."""
    if not condition:
        raise InputError(message)


def positive(name: str, value: float | None) -> None:
    """Raise :class:`InputError` unless the value, where it is given, is above 0."""
    require(value is None or 0 < value < math.inf, f"{name} is {value}: give a number above 0.")


def not_negative(name: str, value: float | None) -> None:
    """Raise :class:`InputError` unless the value, where it is given, is 0 or above."""
    require(value is None or 0 <= value < math.inf, f"{name} is {value}: give a number, 0 or more.")


def share(name: str, value: float) -> None:
    """Raise :class:`InputError` unless the value is from 0 to 1."""
    require(0 <= value <= 1, f"{name} is {value}: give a share from 0 to 1.")


def _dropout(name: str, rate: float | None) -> None:
    require(rate is None or 0 <= rate < 1, f"{name} is {rate}: give a rate from 0 up to, but not, 1.")


# The same of a fine-tuning run.


def check_finetune(config: FinetuneConfig) -> None:
    """Raise one :class:`InputError` for the first setting that cannot work; it names the option."""
    require(config.init is not None, "--init is missing: give the folder of a pretraining run.")
    check_trackers(config.tracking)
    task, train = config.task, config.train
    share("task.label_fraction", task.label_fraction)
    require(task.label_fraction > 0, "task.label_fraction is 0: there would be nothing to learn from.")
    positive("task.intervals", task.intervals)
    if not isinstance(task.threshold, str):
        share("task.threshold", task.threshold)
    positive("population.size", config.population.size)
    _check_label_tables(config)
    check_optimizer(config.optimizer, config.lora)
    check_freezing(config.freezing, config.lora)
    for name in (
        "epochs",
        "batch_size",
        "log_every",
        "max_steps",
        "micro_batches",
        "validate_every",
        "patience",
    ):
        positive(f"train.{name}", getattr(train, name))
    require(train.seed >= 0, f"train.seed is {train.seed}: give 0 or more.")
    _dropout("dropout", config.dropout)
    if config.from_scratch:
        trained = regime(config.freezing).groups
        require(
            {"base", "embedding"} <= trained,
            "--from_scratch leaves encoder and embeddings at random values, which this regime would never "
            "train: add --config scratch or --freezing.regime full.",
        )
    require(config.search.size >= 0, f"search.size is {config.search.size}: give 0 or more.")
    positive("search.labels", config.search.labels)
    require(
        config.task.blend == "off" or find_spec("sklearn") is not None,
        "task.blend is counts, which takes scikit-learn, which is not installed: pip install scikit-learn.",
    )
    if has_members(config):
        _check_population(config)
        require(
            find_spec("safetensors") is not None,
            "population: members are written as adapters, with safetensors, which is not installed: "
            "pip install safetensors.",
        )


def has_members(config: FinetuneConfig) -> bool:
    """Tell whether a population is trained, not a single model."""
    return config.population.size > 1 or config.population.vary == "task"


def _check_label_tables(config: FinetuneConfig) -> None:
    population, labels = config.population, config.population.labels
    if population.vary != "task":
        require(
            not labels,
            f"population.labels are of members that vary in task, but population.vary is {population.vary}: "
            "add --population.vary task, or give --labels alone.",
        )
        return
    require(
        config.labels is None,
        "--labels is given beside population.vary task: give all label tables with --population.labels.",
    )
    require(
        len(labels) > 1,
        f"population.vary is task, but population.labels has {len(labels)} tables: give one for each member, "
        "two at least.",
    )
    require(
        population.size in (1, len(labels)),
        f"population.size is {population.size}, but population.labels has {len(labels)} tables: leave the "
        "size out, it follows from them.",
    )
    names = [path.stem for path in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(
        not twice,
        f"population.labels has two tables called {', '.join(twice)}: rename one, members are called after "
        "their tables.",
    )


def _check_population(config: FinetuneConfig) -> None:
    population = config.population
    values = population.values
    require(not config.resume, "--resume: a population is trained in one go, give another --output.")
    trained = regime(config.freezing).groups
    require(
        "base" not in trained and "embedding" not in trained,
        "population: members share a frozen base, but this regime trains it: take --config lora or probe.",
    )
    require(
        not values or (len(values) == population.size and population.vary in ("learning_rate", "rank")),
        f"population.values has {len(values)} values for {population.size} members that vary in "
        f"{population.vary}: give one for each learning_rate or rank.",
    )
    for value in values:
        positive("population.values", value)
    require(
        population.vary != "task" or "head" in trained,
        "population.vary is task, but this regime leaves the head as it is, and each task needs its own: "
        "take --config lora or probe.",
    )
    if population.vary == "rank":
        require(config.lora is not None, "population.vary is rank, but the model has no adapters.")
        require(
            config.lora is None or config.lora.init != "pissa",
            "population.vary is rank, but lora.init pissa takes what adapters begin with out of the base, "
            "which all members share: give another init.",
        )
        require(all(value == int(value) for value in values), "population.values: ranks are whole numbers.")


def model_of(config: FinetuneConfig, pretrained: ModelConfig) -> ModelConfig:
    """The pretrained model, with the numerics that `config` gives.

    Raises:
        InputError: an option that does not go with it.
    """
    if config.task.pooling == "cls" and not pretrained.cls_token:
        raise InputError(
            "task.pooling is cls, but the pretrained model reads no [CLS] token: give mean, max or last."
        )
    length = config.task.max_length
    if length is not None and not 2 <= length <= pretrained.positions:
        raise InputError(
            f"task.max_length is {length}, but the model has {pretrained.positions} positions: give 2 to "
            f"{pretrained.positions}."
        )
    model = pretrained
    if config.dropout is not None:
        model = replace(model, dropout=config.dropout, attention_dropout=config.dropout)
    if config.compute_dtype is not None:
        model = replace(model, compute_dtype=config.compute_dtype)
    return model


# Facts that only the process which holds data and model can see.

FIRST_YEAR, LAST_YEAR = 1900, 2200
"""Years that a model with `model.time` time2vec reads."""


def check_days(model: ModelConfig, splits: Mapping[str, Sequences]) -> None:
    """Raise :class:`InputError` where a model that reads days has none, a train split of one day; or, where
    it reads the calendar, years that it does not know: it counts the events of the first split that has some.
    """
    train = splits.get("train")
    if model.reads_days and train is not None and len(train) > 1:
        day = train.times[0] // DAY
        require(
            bool((train.times // DAY != day).any()),
            f"All {len(train.times):,} events of the train split are on one day ({day_text(day)}), where "
            f"model.time {model.time} and model.position_embedding {model.position_embedding} say nothing: "
            "mend the times, or take model.time none and another model.position_embedding.",
        )
    if model.time != "time2vec":
        return
    first, last = (np.datetime64(f"{year}", "us").astype(np.int64) for year in (FIRST_YEAR, LAST_YEAR + 1))
    for name, part in splits.items():
        outside = int(np.count_nonzero((part.times < first) | (part.times >= last)))
        require(
            not outside,
            f"{outside:,} of {len(part.times):,} events of the {name} split are in years outside of "
            f"{FIRST_YEAR} to {LAST_YEAR}, which model.time time2vec does not read: mend their times, or, "
            "where dates were shifted by subject, take --model.time gaps.",
        )


MOST_EVENTS = 20_000_000
"""Events looked at; of more, every n-th."""


def gather_facts(
    config: PretrainConfig,
    data: SequenceSet,
    setup: Setup,
    batches: TrainingBatches | QuestionBatches,
    total_steps: int,
    micro_batches: int,
) -> Facts:
    """Figures for the checks of `diagnosis` that the files of a run folder do not tell."""
    train, tuning = data.splits["train"], data.splits["tuning"]
    room = batches.row_length - batches.cls_token
    facts = None if train.facts is None else train.facts.runs(np.arange(len(train)))
    window = room_beside(facts, room)
    return Facts(
        codes=len(data.vocabulary) - len(SPECIAL_TOKENS),
        total_steps=total_steps,
        steps_per_epoch=batches.steps_per_epoch,
        tokens_per_step=batches.tokens_per_epoch / batches.steps_per_epoch,
        row_length=batches.row_length,
        validation_subjects=len(tuning),
        unseen_share=_unseen_share(tuning.codes, data.event_counts),
        cut_share=float(np.maximum(train.lengths - window, 0).sum() / max(len(train.codes), 1)),
        beyond_tables=_beyond_tables(train, config.model),
        unreached_adapters=unreached_adapters(setup),
        micro_batches=micro_batches,
        shifted_dates=shifted_dates(data),
    )


def _unseen_share(codes: np.ndarray, counts: np.ndarray) -> float:
    """Share of events, int32 `[events]`, that are [UNK] or whose train count, int64 `[vocabulary]`, is 0."""
    events = codes[codes != SEP]
    if not len(events):
        return 0.0
    unseen = (counts == 0) & (np.arange(len(counts)) >= len(SPECIAL_TOKENS))
    unseen[UNK] = True
    return float(unseen[events].mean())


def _beyond_tables(sequences: Sequences, model: ModelConfig) -> dict[str, float]:
    """Shares of events that share the row at the end of a table: by ``ages`` above, ``before_birth``,
    ``visits`` and ``positions`` (where those count visits).
    """
    step = -(-len(sequences.codes) // MOST_EVENTS) or 1
    ages, visits = sequences.ages[::step], sequences.visits[::step]
    if not len(ages):
        return {}
    found = {
        "ages": np.count_nonzero(ages >= model.age_rows * model.age_bin_years),
        "before_birth": np.count_nonzero(ages < 0),
    }
    if model.visit_embedding == "ordinal":
        found["visits"] = np.count_nonzero(visits >= model.visit_rows)
    if model.position_of == "visit" and model.position_embedding in ("learned", "sinusoidal"):
        found["positions"] = np.count_nonzero(visits >= model.positions)
    return {name: int(count) / len(ages) for name, count in found.items()}


def unreached_adapters(setup: Setup) -> list[str]:
    """Names of adapter leaves that the prediction does not depend on; nothing is computed."""
    if not setup.layers:
        return []
    predictor = setup.predictor
    batch = example_batch(predictor.model.config)
    asked = example_questions(batch) if isinstance(predictor.model, BEHRTForQueries) else None
    unread = unread_leaves(lambda variables: predictor.outputs(variables, batch, asked), setup.shapes)
    return [
        name
        for name, alone in zip(leaf_names(setup.shapes), unread, strict=True)
        if alone and name.startswith("lora/")
    ]


T = TypeVar("T")


def unread_leaves(function: Callable[[T], object], tree: T) -> list[bool]:
    """Tell which leaves of `tree`, in tree order, are of no consequence for ``function(tree)``.

    The function is traced, and what its results do not need is left out of its jaxpr.

    Args:
        function: traceable by JAX, from a tree to arrays.
        tree: of arrays or ``jax.ShapeDtypeStruct``.
    """
    jaxpr = jax.make_jaxpr(function)(tree).jaxpr
    _, read = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [not needed for needed in read]
