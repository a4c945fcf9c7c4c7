"""Parameter groups by path: lora, embedding, head, base."""

from collections.abc import Mapping
from typing import Any

from jax.tree_util import DictKey, tree_map_with_path

GROUPS = ("lora", "embedding", "head", "base")


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names along a key path of nested dicts."""
    return tuple(str(key.key) if isinstance(key, DictKey) else str(key) for key in path)


def label(path: tuple[str, ...]) -> str:
    """Group of the leaf at `path` in ``{"params": ..., "lora": ...}``: exactly one of `GROUPS`.

    Raises:
        ValueError: the path fits no group, or more than one.
    """
    collection, inner = path[0], path[1:]
    rules = {
        # Embedding rows that an adapter adds are a part of it.
        "lora": collection == "lora" or path[:2] == ("params", "new_codes"),
        "embedding": collection == "params" and "embeddings" in inner,
        "head": collection == "params" and any(name.endswith("_head") for name in inner),
        "base": collection == "params" and "encoder" in inner,
    }
    fitting = [group for group, fits in rules.items() if fits]
    if len(fitting) != 1:
        raise ValueError(
            f"leaf {'/'.join(path)} must belong to one parameter group, found: {fitting or 'none'}"
        )
    return fitting[0]


def labels(variables: Mapping[str, Any]) -> Any:
    """Tree of group names with the structure of `variables`."""
    return tree_map_with_path(lambda path, _: label(path_names(path)), variables)
