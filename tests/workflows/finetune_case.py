"""A small base and fine-tuning runs on it, made when they are first asked for."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import (
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    SearchConfig,
    TaskConfig,
    TaskTrainConfig,
    TrainConfig,
)
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.predict import predict
from behrt_jax.workflows.pretrain import pretrain
from tests.models.rows import tiny_model
from tests.workflows.evaluated import Evaluated

ONE = jax.devices()[:1]
LORA = FinetuneConfig(
    name="lora",
    lora=LoRAConfig(rank=2, targets=("query", "key", "value", "out", "intermediate", "output")),
    freezing=FreezingConfig("lora_pretrained"),
    optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup_fraction=0.0),
    train=TaskTrainConfig(epochs=5, batch_size=32, log_every=2),
    task=TaskConfig(pooling="mean"),
    search=SearchConfig(size=0),
)
CONFIGS = {
    "lora": LORA,
    "full": replace(LORA, name="full", lora=None, freezing=FreezingConfig("full")),
    "probe": replace(
        LORA,
        name="probe",
        lora=None,
        freezing=FreezingConfig(groups=("head",)),
        optimizer=replace(LORA.optimizer, learning_rate=0.05),
        train=replace(LORA.train, epochs=15),
    ),
    "scratch": replace(LORA, name="scratch", lora=None, freezing=FreezingConfig("full"), from_scratch=True),
}


class FinetuneCase:
    """Prepared data, labels of every kind for it, a base, and runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.labelled = cache(lambda kind: Evaluated(folder / kind, kind))
        self._runs = cache(self._run)
        self.consoles: dict[str, str] = {}
        """What each run said."""

    @cached_property
    def data(self) -> Path:
        return self.labelled("binary").data

    @cached_property
    def base(self) -> Path:
        return self.pretrained("base")

    def pretrained(self, name: str, seed: int = 0, **model: Any) -> Path:
        """A pretraining run of a few steps."""
        config = PretrainConfig(
            model=tiny_model(**model),
            data=DataConfig(source="prepared", path=self.data),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            train=TrainConfig(max_steps=4, batch_size=32, seed=seed),
            output=self.folder / name,
        )
        return pretrain(config, ONE).folder

    def config(self, kind: str = "binary", name: str = "lora") -> FinetuneConfig:
        return replace(CONFIGS[name], data=self.data, labels=self.labelled(kind).labels, init=self.base)

    def run(self, kind: str = "binary", name: str = "lora") -> Path:
        """Folder of a finished run."""
        return self._runs(kind, name)

    def _run(self, kind: str, name: str) -> Path:
        folder, said = self.folder / "runs" / f"{kind}-{name}", io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            finetune(replace(self.config(kind, name), output=folder), ONE)
        self.consoles[f"{kind}-{name}"] = said.getvalue()
        return folder

    def predicted(self, output: Path, kind: str = "binary", **options: Any) -> pa.Table:
        """Predictions, of the held_out split where not said."""
        given = {"model": self.run(kind), "data": self.data, "labels": self.labelled(kind).labels, **options}
        predict(PredictConfig(output=output, **given), ONE)
        return pq.read_table(output)


def changed(config: FinetuneConfig, section: str, **values: Any) -> FinetuneConfig:
    """The configuration with some values of one section replaced."""
    return replace(config, **{section: replace(getattr(config, section), **values)})
