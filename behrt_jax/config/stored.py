"""Settings read back from what a run or an adapter was stored with."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import FreezingConfig

C = TypeVar("C", ModelConfig, LoRAConfig, FreezingConfig)


def from_stored(kind: type[C], values: Mapping[str, Any]) -> C:
    """Settings of this kind from their JSON, which another version of behrt_jax may have written.

    What is not there has its default, and what this version does not know is passed over.
    """
    known = {field.name for field in fields(kind)}
    read: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in known
    }
    return kind(**read)
