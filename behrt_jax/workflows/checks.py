"""Mistakes in a configuration that can be told before any data is read."""

from typing import get_args

import jax

from behrt_jax.adapters.groups import GROUPS
from behrt_jax.config import (
    FreezingConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)
from behrt_jax.errors import InputError
from behrt_jax.training.freezing import REGIMES
from behrt_jax.training.state import set_up


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
    positive("data.events_mean", data.events_mean)
    require(data.events_spread >= 0, f"data.events_spread is {data.events_spread}: give 0 or more.")
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

    check_optimizer(optimizer)
    for name in ("epochs", "batch_size", "log_every"):
        positive(f"train.{name}", getattr(train, name))
    for name in (
        "max_steps",
        "batch_tokens",
        "micro_batches",
        "validate_every",
        "patience",
        "steps_per_call",
    ):
        value = getattr(train, name)
        require(value is None or value > 0, f"train.{name} is {value}: give more than 0.")
    choices = get_args(TrainConfig.__annotations__["data_on_device"])
    require(
        train.data_on_device in choices,
        f"train.data_on_device is {train.data_on_device!r}: choose one of {', '.join(choices)}.",
    )

    check_freezing(config.freezing, config.lora)
    set_up(config, vocabulary_size=8)  # adapters and regime; no arrays are made


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """As :func:`check`, of the optimizer."""
    positive("optimizer.learning_rate", optimizer.learning_rate)
    share("optimizer.warmup_fraction", optimizer.warmup_fraction)
    if optimizer.clip_norm is not None:
        positive("optimizer.clip_norm", optimizer.clip_norm)
    for group in GROUPS:
        rate = getattr(optimizer.learning_rates, group)
        require(rate is None or rate > 0, f"optimizer.learning_rates.{group} is {rate}: give more than 0.")


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
    if model.head_chunk is not None:
        positive("model.head_chunk", model.head_chunk)
    require(
        model.hidden_size % model.heads == 0,
        f"model.hidden_size {model.hidden_size} is not divisible by model.heads {model.heads}: change one.",
    )
    for name in ("dropout", "attention_dropout"):
        rate = getattr(model, name)
        require(
            rate is None or 0 <= rate < 1, f"model.{name} is {rate}: give a rate from 0 up to, but not, 1."
        )
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


def positive(name: str, value: float) -> None:
    """Raise :class:`InputError` unless the value is above 0."""
    require(value > 0, f"{name} is {value}: give more than 0.")


def share(name: str, value: float) -> None:
    """Raise :class:`InputError` unless the value is from 0 to 1."""
    require(0 <= value <= 1, f"{name} is {value}: give a share from 0 to 1.")
