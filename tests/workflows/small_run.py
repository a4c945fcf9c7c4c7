"""A pretraining configuration that runs in seconds."""

from dataclasses import replace

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, TrainConfig
from tests.models.rows import tiny_model

SMALL_RUN = PretrainConfig(
    name="tiny_lora",
    model=tiny_model(positions=32, layers=1, dropout=0.1),
    lora=LoRAConfig(rank=2),
    freezing=FreezingConfig("lora"),
    data=DataConfig(subjects=600, vocabulary_size=200),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0),
    # Three validations: each takes as long as twenty steps.
    train=TrainConfig(epochs=7, batch_size=32, validate_every=42, log_every=2),
)


def changed(config: PretrainConfig, section: str, **values) -> PretrainConfig:
    """The configuration with some values of one section replaced."""
    return replace(config, **{section: replace(getattr(config, section), **values)})
