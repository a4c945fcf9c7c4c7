"""Named configurations: the sizes of the model, and the runs that ``--config NAME`` starts from."""

from dataclasses import replace

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.config.training import FinetuneConfig, OptimizerConfig, PretrainConfig, TrainConfig

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
XL = replace(
    BASE,
    embedding_size=1024,
    hidden_size=1024,
    layers=24,
    heads=16,
    positions=1024,
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


MODERN = {
    "position_embedding": "rope",
    "visit_embedding": "alternating",
    "ffn": "swiglu",
    "norm": "rms",
    "bias": False,
}
"""Of `ModelConfig`, what ``modern_*`` configurations change: distances in place of ordinals (rotary
positions, and visits told apart by two rows in turn), gated layers, RMSNorm, and no biases.
"""


def _modern(config: PretrainConfig) -> PretrainConfig:
    """The same sizes with what pays on `latent` or `clinical` records, and a fifth of the codes masked."""
    return replace(
        config,
        name=f"modern_{config.name}",
        model=replace(config.model, **MODERN),
        masking=replace(config.masking, probability=0.2),
    )


def _pretraining(
    name: str, model: ModelConfig, data: DataConfig, learning_rate: float, train: TrainConfig
) -> PretrainConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate)
    return PretrainConfig(name=name, model=model, data=data, optimizer=optimizer, train=train)


def _with_lora(config: PretrainConfig, rank: int) -> PretrainConfig:
    return replace(
        config,
        name=f"{config.name}_lora",
        lora=LoRAConfig(rank=rank),
        freezing=FreezingConfig(regime="lora"),
    )


_SHORT = DataConfig(subjects=5000)
# Large models read many tokens a step, however long the histories are.
_TOKENS = TrainConfig(epochs=20, batch_tokens=65_536, patience=5)
_LATENT = DataConfig(
    source="latent",
    subjects=400_000,
    vocabulary_size=300,
    window="first",  # the optimum is known for histories that are read from their beginning
    tuning_fraction=0.0125,
    held_out_fraction=0.001,
)

_SIZES = [
    (_pretraining("small", SMALL, _SHORT, 3e-3, TrainConfig(epochs=30, batch_size=64, patience=5)), 8),
    (_pretraining("medium", MEDIUM, _SHORT, 1e-3, TrainConfig(epochs=50, patience=10)), 8),
    (_pretraining("large", LARGE, _SHORT, 3e-4, TrainConfig(epochs=100, patience=10)), 16),
    (_pretraining("base", BASE, DataConfig(subjects=20_000, events_mean=100.0), 3e-4, _TOKENS), 16),
]
_LATENT_SMALL = _pretraining(
    "small_latent",
    replace(SMALL, dropout=0.0),
    _LATENT,
    4e-3,
    # Many subjects seen a few times: what is left to the optimum is then not memorising.
    TrainConfig(epochs=6, batch_size=256, log_every=50),
)

_RANKS = [
    *_SIZES,
    (_pretraining("xl", XL, DataConfig(subjects=20_000, events_mean=200.0), 2e-4, _TOKENS), 16),
    (_pretraining("long", LONG, DataConfig(subjects=4000, events_mean=1500.0), 1e-3, _TOKENS), 16),
    (_pretraining("paper", PAPER, _SHORT, 3e-4, TrainConfig(epochs=50, patience=10)), None),
    (_LATENT_SMALL, 8),
    *((_modern(config), rank) for config, rank in (*_SIZES, (_LATENT_SMALL, 8))),
]
"""Configurations, each with the rank of its adapters in ``<name>_lora``."""

PRETRAIN: dict[str, PretrainConfig] = {
    config.name: config
    for plain, rank in _RANKS
    for config in ([plain] if rank is None else [plain, _with_lora(plain, rank)])
}
"""Pretraining, by ``--config``: in full, and as ``<name>_lora`` with adapters on a frozen base."""


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
"""Fine-tuning, by ``--config``: adapters and head; everything; the head alone; everything, from random
parameters."""
