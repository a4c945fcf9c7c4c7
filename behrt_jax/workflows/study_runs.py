"""The runs of the freezing study: one for each kind of data, masks, regime and seed."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from behrt_jax.config import FreezingConfig, FreezingStudyConfig, InitConfig, PretrainConfig
from behrt_jax.tracking.run_folder import CONFIG_FILE, PARAMETERS_FILE

LEFT_BEFORE_THE_START = {"vocabulary.parquet", PARAMETERS_FILE}
"""Files of a run that may be there before its config.json is."""

Masks = Literal["fresh", "once"]
Source = Literal["uniform", "clinical", "latent"]


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    source: Source
    masks: Masks
    regime: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.source}-{self.masks}-{self.regime}-{self.seed}"


def cells_of(config: FreezingStudyConfig) -> list[Cell]:
    """All runs, each full run before those that take its embeddings."""
    regimes = sorted(config.regimes, key=lambda name: name != "full")
    return [
        Cell(source, masks, regime, seed)
        for source in config.sources
        for masks in config.masks
        if source == "uniform" or masks == "fresh"
        for seed in range(config.seeds)
        for regime in regimes
    ]


def regime_config(shared: PretrainConfig, regime: str) -> PretrainConfig:
    """The shared configuration under a regime of the study."""
    assert shared.lora is not None
    if regime == "full":
        return replace(shared, lora=None, freezing=FreezingConfig("full"))
    if regime in ("lora_head", "lora_pretrained"):
        return replace(shared, freezing=FreezingConfig("lora", groups=("lora", "head")))
    if regime == "all_but_adapted":
        only_out = replace(shared.lora, targets=("out",))
        return replace(shared, lora=only_out, freezing=FreezingConfig("all_but_adapted"))
    if regime == "lora_only":
        return replace(shared, freezing=FreezingConfig("lora_only"))
    return replace(shared, freezing=FreezingConfig("lora"))


def config_of(config: FreezingStudyConfig, cell: Cell, folder: Path) -> PretrainConfig:
    """The configuration of one run, as :func:`behrt_jax.workflows.pretrain.pretrain` takes it."""
    shared = regime_config(config.pretrain, cell.regime)
    init = InitConfig()
    if cell.regime == "lora_pretrained":
        init = InitConfig(folder / "runs" / replace(cell, regime="full").name, ("embedding",))
    output = folder / "runs" / cell.name
    return replace(
        shared,
        name=cell.name,
        data=replace(shared.data, source=cell.source, seed=shared.data.seed + cell.seed),
        train=replace(
            shared.train,
            seed=shared.train.seed + cell.seed,
            static_masks=cell.masks == "once",
            validate_every=None,
            patience=None,
        ),
        init=init,
        output=output,
        resume=_started(output),
    )


def _started(output: Path) -> bool:
    """Is there a run to go on with? What was written before it could start is removed."""
    if (output / CONFIG_FILE).is_file():
        return True
    if output.is_dir() and {path.name for path in output.iterdir()} <= LEFT_BEFORE_THE_START:
        shutil.rmtree(output)
    return False
