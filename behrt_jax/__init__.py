"""behrt_jax: BERT-style encoders on electronic health records, pretrained and adapted in JAX.

``behrt_jax.load(path)`` opens a trained model, see :func:`behrt_jax.workflows.loaded.load`.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load``, once it is asked for: JAX is slow to import."""
    if name == "load":
        from behrt_jax.workflows.loaded import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
