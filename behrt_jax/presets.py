"""Named configurations of the experiments."""

from dataclasses import replace

from behrt_jax.config import (
    DataConfig,
    FinetuneConfig,
    FreezingConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)

SMALL = ModelConfig(embedding_size=64, hidden_size=128, layers=2, heads=4, positions=50)
MEDIUM = ModelConfig(embedding_size=128, hidden_size=256, layers=4, heads=8, positions=100)
LARGE = ModelConfig(embedding_size=256, hidden_size=512, layers=6, heads=8, positions=200, dropout=0.2)

# bfloat16 is for accelerators; on a CPU give --model.compute_dtype float32. Without dropout on the weights,
# attention is cuDNN's on an NVIDIA GPU.
BASE = ModelConfig(
    embedding_size=768,
    hidden_size=768,
    layers=12,
    heads=12,
    positions=512,
    attention_dropout=0.0,
    compute_dtype="bfloat16",
)
XL = ModelConfig(
    embedding_size=1024,
    hidden_size=1024,
    layers=24,
    heads=16,
    positions=1024,
    attention_dropout=0.0,
    compute_dtype="bfloat16",
    rematerialise=True,
    scan_layers=True,
)
LONG = replace(MEDIUM, positions=8192, visit_rows=4096)
"""The medium model, for histories of thousands of events."""

PAPER = ModelConfig(
    embedding_size=288,
    hidden_size=288,
    layers=6,
    heads=12,
    ffn_size=512,
    positions=256,
    position_embedding="sinusoidal",
    position_of="visit",
    age_bin_years=1 / 12,
    age_rows=1321,
    visit_embedding="alternating",
    cls_token=True,
    sep_token=True,
)
"""Sizes, embeddings and tokens of Li et al. 2020 (ages in months up to 110 years)."""


def _with_lora(config: PretrainConfig, rank: int) -> PretrainConfig:
    return replace(
        config,
        name=f"{config.name}_lora",
        lora=LoRAConfig(rank=rank),
        freezing=FreezingConfig(regime="lora"),
    )


_SMALL = PretrainConfig(
    name="small",
    model=SMALL,
    data=DataConfig(subjects=5000),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TrainConfig(epochs=30, batch_size=64, patience=5),
)
_SMALL_LATENT = PretrainConfig(
    name="small_latent",
    model=replace(SMALL, dropout=0.0),
    # window first: the optimum is known for histories that are read from their beginning.
    data=DataConfig(
        source="latent",
        subjects=400_000,
        vocabulary_size=300,
        window="first",
        tuning_fraction=0.0125,
        held_out_fraction=0.001,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3),
    # Many subjects seen a few times: what is left to the optimum is then not memorising.
    train=TrainConfig(epochs=6, batch_size=256, log_every=50),
)
_MEDIUM = PretrainConfig(
    name="medium",
    model=MEDIUM,
    data=DataConfig(subjects=5000),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    train=TrainConfig(epochs=50, batch_size=128, patience=10),
)
_LARGE = PretrainConfig(
    name="large",
    model=LARGE,
    data=DataConfig(subjects=5000),
    optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.01),
    train=TrainConfig(epochs=100, batch_size=128, patience=10),
)
_BASE = PretrainConfig(
    name="base",
    model=BASE,
    data=DataConfig(subjects=20_000, events_mean=100.0),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    train=TrainConfig(epochs=20, batch_tokens=65_536, patience=5),
)
_XL = PretrainConfig(
    name="xl",
    model=XL,
    data=DataConfig(subjects=20_000, events_mean=200.0),
    optimizer=OptimizerConfig(learning_rate=2e-4),
    train=TrainConfig(epochs=20, batch_tokens=65_536, patience=5),
)
_LONG = PretrainConfig(
    name="long",
    model=LONG,
    data=DataConfig(subjects=4000, events_mean=1500.0),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    train=TrainConfig(epochs=20, batch_tokens=65_536, patience=5),
)
_PAPER = PretrainConfig(
    name="paper",
    model=PAPER,
    data=DataConfig(subjects=5000),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    train=TrainConfig(epochs=50, batch_size=128, patience=10),
)

PRETRAIN: dict[str, PretrainConfig] = {
    config.name: config
    for config in (
        _SMALL,
        _with_lora(_SMALL, rank=8),
        _MEDIUM,
        _with_lora(_MEDIUM, rank=8),
        _LARGE,
        _with_lora(_LARGE, rank=16),
        _BASE,
        _with_lora(_BASE, rank=16),
        _XL,
        _with_lora(_XL, rank=16),
        _LONG,
        _with_lora(_LONG, rank=16),
        _PAPER,
        _SMALL_LATENT,
        _with_lora(_SMALL_LATENT, rank=8),
    )
}


FINETUNE = {
    config.name: config
    for config in (
        FinetuneConfig(
            name="lora",
            lora=LoRAConfig(rank=8, targets=("query", "key", "value", "out", "intermediate", "output")),
            freezing=FreezingConfig(regime="lora_pretrained"),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        FinetuneConfig(name="full", optimizer=OptimizerConfig(learning_rate=1e-4)),
        FinetuneConfig(
            name="probe",
            freezing=FreezingConfig(groups=("head",)),
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
        FinetuneConfig(name="scratch", from_scratch=True, optimizer=OptimizerConfig(learning_rate=3e-4)),
    )
}
"""Fine-tuning: adapters and head; everything; the head alone; everything from random parameters."""
