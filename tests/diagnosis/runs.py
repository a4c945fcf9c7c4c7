"""What is known of a healthy run, to be broken in one place by each test."""

from typing import Any

from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.diagnosis.finding import Facts, Finding
from behrt_jax.presets import PRETRAIN
from behrt_jax.training.freezing import count_parameters
from behrt_jax.training.state import set_up
from behrt_jax.workflows.run import settings

RANK_8 = LoRAConfig(8)
FACTS = Facts(
    codes=995,
    total_steps=1890,
    steps_per_epoch=63,
    tokens_per_step=1000.0,
    row_length=50,
    validation_subjects=500,
    unseen_share=0.0,
    cut_share=0.02,
    beyond_tables={"ages": 0.0, "before_birth": 0.0, "visits": 0.0},
)
BASELINES: dict[str, Any] = {
    "unigram": {"loss": 5.5, "accuracy": 0.03, "targets": 1100, "interval": [5.45, 5.55]},
    "co-occurrence": {"loss": 4.5, "accuracy": 0.1, "targets": 1100, "interval": [4.4, 4.6]},
}


def settings_of(config: PretrainConfig = PRETRAIN["small_lora"]) -> dict[str, Any]:
    """Settings as in config.json."""
    return settings(config)


def parameters_of(
    regime: Any = "lora", groups: Any = (), lora: LoRAConfig | None = RANK_8, vocabulary: int = 1000
) -> dict[str, Any]:
    """Parameter report of the small model."""
    config = PretrainConfig(model=PRETRAIN["small"].model, lora=lora, freezing=FreezingConfig(regime, groups))
    setup = set_up(config, vocabulary)
    return {**count_parameters(setup.shapes, setup.mask), "regime": "+".join(groups) or regime}


def train_line(step: int, loss: float | None = 5.0, **more: Any) -> dict[str, Any]:
    """A healthy line of the train split, after a step of the run in `FACTS`."""
    return {
        "step": step, "epoch": step / 63, "split": "train", "loss": loss, "targets": 2800,
        "data_share": 0.05, "device_share": 0.8, "compilations": 1,
        "gradient_norms": {"lora": 0.5, "lora_a": 0.3, "lora_b": 0.4, "embedding": 1.0, "head": 1.0},
        "without_gradient": [], **more,
    }  # fmt: skip


def validation_line(step: int, loss: float | None = 5.0, **more: Any) -> dict[str, Any]:
    """A healthy line of the tuning split."""
    moved = {"layer": "behrt/encoder/layer_0/attention/key", "movement": 0.3}
    return {
        "step": step, "epoch": step / 63, "split": "tuning", "loss": loss,
        "adapters": {"a": moved, "b": moved}, "embedding_rows": {"expected": 990, "untouched": 0}, **more,
    }  # fmt: skip


def history(train: list[float], tuning: list[float]) -> list[dict[str, Any]]:
    """An epoch of 63 steps for each pair of losses."""
    return [
        line
        for epoch, (fitted, validated) in enumerate(zip(train, tuning, strict=True), start=1)
        for line in (train_line(63 * epoch, fitted), validation_line(63 * epoch, validated))
    ]


HEALTHY = history([5.6, 5.0, 4.6, 4.3, 4.1, 4.0, 3.9, 3.85], [5.4, 4.9, 4.5, 4.3, 4.15, 4.1, 4.08, 4.07])


def ids(findings: list[Finding], *severities: str) -> list[str]:
    """Ids of findings that are no info, or of those severities."""
    return [found.id for found in findings if found.severity in (severities or ("error", "warning"))]


def only(findings: list[Finding], name: str) -> Finding:
    """The finding of that id, once there."""
    (found,) = [found for found in findings if found.id == name]
    assert all((found.seen, found.why, found.mend))
    return found
