"""Every setting of a run, as frozen dataclasses, cut by what they configure.

A field's docstring is its ``--help`` text on the command line. Checks that concern several fields
live in :mod:`behrt_jax.workflows.checks`; nothing here imports anything else of the package.
"""

from behrt_jax.config.data import DataConfig
from behrt_jax.config.diagnosis import DoctorConfig
from behrt_jax.config.finetuning import (
    FinetuneConfig,
    PopulationConfig,
    TaskConfig,
    TaskKind,
    TaskTrainConfig,
)
from behrt_jax.config.labels import MakeLabelsConfig
from behrt_jax.config.model import Attention, LoRAConfig, ModelConfig
from behrt_jax.config.prediction import EvaluateConfig, PredictConfig
from behrt_jax.config.preparation import PrepareConfig, TableColumns
from behrt_jax.config.pretraining import MaskingConfig, PretrainConfig, TrainConfig
from behrt_jax.config.studies import ForecastStudyConfig, FreezingStudyConfig
from behrt_jax.config.training import FreezingConfig, GroupValues, InitConfig, MeshConfig, OptimizerConfig

__all__ = [
    "Attention",
    "DataConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "ForecastStudyConfig",
    "FreezingConfig",
    "FreezingStudyConfig",
    "GroupValues",
    "InitConfig",
    "LoRAConfig",
    "MakeLabelsConfig",
    "MaskingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PopulationConfig",
    "PredictConfig",
    "PrepareConfig",
    "PretrainConfig",
    "TableColumns",
    "TaskConfig",
    "TaskKind",
    "TaskTrainConfig",
    "TrainConfig",
]
