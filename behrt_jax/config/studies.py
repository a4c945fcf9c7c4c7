"""Studies: many runs that answer one question."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from behrt_jax.config.pretraining import PretrainConfig


@dataclass(frozen=True)
class FreezingStudyConfig:
    """Train the same model under each freezing regime and compare what it learns, and what it costs.

    Broken off, it goes on where it stopped when started again with the same options: finished runs
    are not repeated.
    """

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """What all runs share: model, adapters, data, optimizer, length. Regime, source, masks, seeds and
    output are set by the study, and every run trains to its end (no patience)."""
    sources: tuple[Literal["uniform", "clinical", "latent"], ...] = ("uniform", "latent")
    """Generated data to train on."""
    masks: tuple[Literal["fresh", "once"], ...] = ("fresh", "once")
    """fresh: drawn anew in each epoch. once: drawn once and reused, on uniform data alone."""
    regimes: tuple[
        Literal["full", "lora", "lora_head", "lora_only", "all_but_adapted", "lora_pretrained"], ...
    ] = ("full", "lora", "lora_head", "lora_only", "all_but_adapted", "lora_pretrained")
    """full: all. lora: adapters, embeddings, head. lora_head: adapters and head, the embeddings frozen at
    random values. lora_only: adapters, all else frozen at random values. all_but_adapted: all but the
    adapted layers, which are `out` alone here, as in the mistake that it repeats. lora_pretrained:
    adapters and head, the embeddings frozen as the full run of the same seed and data left them."""
    seeds: int = 3
    """Runs of each kind; each has its own data, initialisation and masks."""
    timed_steps: int = 30
    """Steps of each regime that are timed, in turns; 0 leaves the timing out."""
    output: Path = Path("runs/freezing_study")
    """Folder of the study; each run has its own folder in it."""


@dataclass(frozen=True)
class ForecastStudyConfig:
    """Fine-tune on generated records whose best possible forecasts are known, in several ways and with
    several shares of the labels, and say how near each comes to them and what pretraining is worth.
    """

    label_fractions: tuple[float, ...] = (1.0, 0.05)
    """Shares of the train subjects whose labels are used."""
    subjects: int | None = None
    """Subjects to generate, of which 7 in 10 train; those of the base's configuration where not given.
    Epochs change with them, so that the number of steps stays about the same."""
    ways: tuple[str, ...] = ()
    """Ways of fine-tuning, by name; all where not given."""
    horizon_days: int = 730
    """In which the condition begins, after a subject's last visit."""
    output: Path = Path("runs/forecast_study")
    """Folder of all runs; what is there already is not made again."""
