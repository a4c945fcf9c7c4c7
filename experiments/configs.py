"""Named configurations of the experiments."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from behrt_jax.config import (
    DataConfig,
    FinetuneConfig,
    FreezingConfig,
    FreezingStudyConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TaskTrainConfig,
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


def _study(name: str, of: str, seeds: int = 3, **changes: dict[str, Any]) -> FreezingStudyConfig:
    """The freezing study of configuration `of`, some sections of it changed."""
    base = PRETRAIN[f"{of}_lora"]
    sections = {section: replace(getattr(base, section), **values) for section, values in changes.items()}
    output = Path("runs") / f"freezing_study_{name}"
    return FreezingStudyConfig(replace(base, name=of, **sections), seeds=seeds, output=output)


# The optimum of latent data is known for histories that are read from their beginning.
_FIRST = {"subjects": 5000, "window": "first"}
# 18 epochs: as many as the longest of the recorded runs that the study repeats.
FREEZING_STUDIES: dict[str, FreezingStudyConfig] = {
    **{name: _study(name, name, data=_FIRST, train={"epochs": 18}) for name in ("small", "medium", "large")},
    "quick": _study(
        "quick",
        "small",
        seeds=1,
        data={"subjects": 1000, "window": "first"},
        optimizer={"learning_rate": 1e-3, "schedule": "constant"},
        train={"epochs": 10, "batch_size": 32},
    ),
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

_FEW = {"batch_size": 256, "patience": 8, "log_every": 50}
FORECAST_BASE = replace(
    _SMALL_LATENT,
    name="forecast_base",
    model=replace(SMALL, positions=64, dropout=0.0),
    data=DataConfig(
        source="latent",
        subjects=100_000,
        vocabulary_size=300,
        events_spread=0.6,
        window="first",
        tuning_fraction=0.1,
        held_out_fraction=0.2,
    ),
    train=TrainConfig(epochs=10, batch_size=256, log_every=50),
)
FORECASTS = (
    replace(
        FINETUNE["full"],
        optimizer=OptimizerConfig(learning_rate=3e-4),
        train=TaskTrainConfig(epochs=5, **_FEW),
    ),
    replace(
        FINETUNE["lora"],
        lora=LoRAConfig(rank=2, targets=("query", "key", "value", "out", "intermediate", "output")),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TaskTrainConfig(epochs=5, **_FEW),
    ),
    replace(FINETUNE["scratch"], train=TaskTrainConfig(epochs=8, **_FEW)),
)
"""Study of forecasts: a base for generated records, and ways of fine-tuning it."""
