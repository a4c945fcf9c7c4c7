"""Mistakes in the configuration of a fine-tuning run that can be told before any data is read."""

from dataclasses import replace
from importlib.util import find_spec

from behrt_jax.config import FinetuneConfig, ModelConfig
from behrt_jax.errors import InputError
from behrt_jax.training.freezing import regime
from behrt_jax.workflows.checks import check_freezing, check_optimizer, positive, require, share


def check_finetune(config: FinetuneConfig) -> None:
    """Raise one :class:`InputError` for the first setting that cannot work; it names the option."""
    require(config.init is not None, "--init is missing: give the folder of a pretraining run.")
    task, train = config.task, config.train
    share("task.label_fraction", task.label_fraction)
    require(task.label_fraction > 0, "task.label_fraction is 0: there would be nothing to learn from.")
    positive("task.intervals", task.intervals)
    if not isinstance(task.threshold, str):
        share("task.threshold", task.threshold)
    positive("population.size", config.population.size)
    _check_label_tables(config)
    check_optimizer(config.optimizer)
    check_freezing(config.freezing, config.lora)
    for name in ("epochs", "batch_size", "log_every"):
        positive(f"train.{name}", getattr(train, name))
    for name in ("max_steps", "micro_batches", "validate_every", "patience"):
        value = getattr(train, name)
        require(value is None or value > 0, f"train.{name} is {value}: give more than 0.")
    require(train.seed >= 0, f"train.seed is {train.seed}: give 0 or more.")
    rate = config.dropout
    require(rate is None or 0 <= rate < 1, f"dropout is {rate}: give a rate from 0 up to, but not, 1.")
    if config.from_scratch:
        trained = regime(config.freezing).groups
        require(
            {"base", "embedding"} <= trained,
            "--from_scratch leaves encoder and embeddings at random values, which this regime would never "
            "train: add --config scratch or --freezing.regime full.",
        )
    if has_members(config):
        _check_population(config)
        require(
            find_spec("safetensors") is not None,
            "population: members are written as adapters, with safetensors, which is not installed: "
            "pip install safetensors.",
        )


def has_members(config: FinetuneConfig) -> bool:
    """Whether a population is trained, not a single model."""
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
