"""Embedding rows for codes that the base was not pretrained on.

``params["new_codes"]["rows"]`` holds them as a leaf of its own, in the parameter group of adapters: it trains
and is saved with them. The base's own table stays as it is, in memory and on disk; the model, whose
vocabulary is then that of the base followed by the new codes, gets both as one table from
:func:`with_new_codes`, inside the jitted step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import Tree

SHORTEST_PREFIX = 3
"""Characters that relatives in a code hierarchy have in common at least."""


class NewRows(NamedTuple):
    """First values of the rows of new codes."""

    rows: np.ndarray
    """float32 `[codes, embedding]`."""
    relatives: np.ndarray
    """Of how many codes of the base each is the mean, int32 `[codes]`; 0 where it has no relative and is the
    mean of all."""


def new_rows(params: Tree, base_codes: Sequence[str], new_codes: Sequence[str]) -> NewRows:
    """Start each new code at the mean of its nearest relatives in the base, or of all its codes.

    Relatives are of the same code system (the same text up to the last ``//``) and share the longest
    beginning of the code proper that any of the base's codes does, of `SHORTEST_PREFIX` characters at least:
    the hierarchy that systems such as ICD and ATC write into their codes.

    Args:
        params: parameters of the base.
        base_codes: its vocabulary, special tokens included, in the order of the ids.
        new_codes: distinct, none of them in the base.

    Raises:
        InputError: the vocabulary is not the base's, or a new code is in it or named twice.
    """
    table = np.asarray(params["behrt"]["embeddings"]["code"]["embedding"], np.float32)  # [V, E]
    if len(base_codes) != len(table):
        raise InputError(
            f"the vocabulary has {len(base_codes)} codes, but the base {len(table)} embedding rows: give the "
            "vocabulary of its run."
        )
    taken = set(base_codes)
    for code in new_codes:
        if code in taken:
            raise InputError(f"the new code {code} is in the vocabulary already: leave it out.")
        taken.add(code)
    first = len(SPECIAL_TOKENS)
    family: dict[tuple[str, str], list[int]] = {}
    for row, code in enumerate(base_codes[first:], start=first):
        for beginning in _beginnings(code):
            family.setdefault(beginning, []).append(row)
    found = [next((family[key] for key in _beginnings(code) if key in family), []) for code in new_codes]
    mean = table[first:].mean(axis=0)
    rows = [table[relatives].mean(axis=0) if relatives else mean for relatives in found]
    return NewRows(
        np.stack(rows) if rows else np.zeros((0, table.shape[1]), np.float32),
        np.array([len(relatives) for relatives in found], np.int32),
    )


def with_new_codes(params: Tree) -> Tree:
    """Parameters of a model of the larger vocabulary: the base's table with the new rows after it.

    Enter it inside the function that is jitted, after gradients are stopped at frozen leaves
    (`training.freezing.stop_frozen`): then no gradient of the base's table is computed. Without
    ``params["new_codes"]`` the params come back as they are.

    Args:
        params: code table `[V, embedding]`, and ``new_codes`` with ``rows`` `[n, embedding]`.

    Returns:
        Params without ``new_codes``, whose code table is `[V + n, embedding]`.
    """
    params = dict(params)
    if "new_codes" not in params:
        return params
    rows = params.pop("new_codes")["rows"]
    embeddings = params["behrt"]["embeddings"]
    table = embeddings["code"]["embedding"]
    whole = jnp.concatenate([table, rows.astype(table.dtype)])
    embeddings = {**embeddings, "code": {"embedding": whole}}
    return {**params, "behrt": {**params["behrt"], "embeddings": embeddings}}


def _beginnings(code: str) -> list[tuple[str, str]]:
    """(code system, beginning of the code proper), the longest first."""
    system, _, proper = code.rpartition("//")
    return [(system, proper[:length]) for length in range(len(proper), SHORTEST_PREFIX - 1, -1)]
