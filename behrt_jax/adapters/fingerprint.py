"""A short name for the exact values of a tree of arrays."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint_tree(tree: Any) -> str:
    """SHA-256, in hexadecimal, of every leaf's path, shape, dtype and bytes.

    Leaves are taken in the order of their paths, so the order in which a dict was filled does not
    matter. Leaves may have any shape and dtype; all of their values must be reachable from this
    process.
    """
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves, key=lambda item: item[0]):
        values = np.asarray(leaf)
        # Shape and dtype fix the number of bytes that follow, so two trees never give one stream.
        digest.update(f"{path}\n{values.dtype}{list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
