"""Start a run from the parameters of a finished one in place of random ones."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import jax
from jax.tree_util import tree_map_with_path

from behrt_jax.adapters.groups import label, path_names
from behrt_jax.config import InitConfig, ModelConfig
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import count_stacked_layers, with_layout_of
from behrt_jax.training.mesh import replicated_shapes
from behrt_jax.training.pretrained import check_finished, read_parameters, stored_settings
from behrt_jax.training.sharding import shardings_of
from behrt_jax.training.update import TrainState

FREE = (
    "dropout",
    "attention_dropout",
    "compute_dtype",
    "rematerialise",
    "scan_layers",
    "head_chunk",
    "attention",
)
"""Settings of the model that may differ: parameters mean the same under any value of them."""


def check_source(init: InitConfig, model: ModelConfig) -> None:
    """Check that there is a finished run to start from, and that it has this model; reads two small files.

    Raises:
        InputError: no finished run in `init.run`, no group to take, or a setting of the model (but for
            those in `FREE`) that differs: it is named, with both values.
    """
    if init.run is None:
        return
    if not init.groups:
        raise InputError("init.groups is empty: name what to take from init.run (embedding, head, base).")
    check_finished(init.run, "init.run")
    stored, given = stored_settings(init.run)["model"], asdict(model)
    for field in fields(ModelConfig):
        # A run made before there was such a setting had what is now the default.
        theirs, ours = stored.get(field.name, field.default), given[field.name]
        if field.name not in FREE and theirs != ours:
            raise InputError(
                f"init.run: model.{field.name} is {ours}, but {theirs} in the run {init.run}: "
                "give the same model, or another run."
            )


def check_vocabulary(init: InitConfig, vocabulary: Vocabulary) -> None:
    """Check that the run to start from has the same codes at the same ids.

    Raises:
        InputError: it has not, or its vocabulary.parquet cannot be read.
    """
    if init.run is None:
        return
    theirs = Vocabulary.read(init.run / "vocabulary.parquet")
    if theirs.codes == vocabulary.codes:
        return
    if len(theirs) != len(vocabulary):
        reason = f"{len(vocabulary)} rows here, {len(theirs)} there"
    else:
        pairs = enumerate(zip(vocabulary.codes, theirs.codes, strict=True))
        row = next(row for row, (ours, other) in pairs if ours != other)
        reason = f"the codes of row {row} differ"
    raise InputError(
        f"init.run: the vocabulary differs from that of the run {init.run} ({reason}): give data with the "
        "same vocabulary, or another run."
    )


def start_from(init: InitConfig, state: TrainState) -> tuple[TrainState, int]:
    """The state with the groups of `init` taken from its run, and the step that they are of.

    Which parameters of the run these are tells :func:`behrt_jax.training.pretrained.read_parameters`; the
    state's own adapters, its step and its optimizer stay fresh. Stacked layers fit a run without, and the
    other way round.

    Args:
        init: names the run and the groups.
        state: a fresh state; each leaf keeps its sharding.

    Raises:
        InputError: no readable checkpoint, or parameters of other shapes.
    """
    assert init.run is not None
    params = state.variables["params"]
    scan_layers = stored_settings(init.run)["model"].get("scan_layers", False)
    found, step = read_parameters(init.run, "init.run", _in_layout(scan_layers, params))
    found = _like(params, found)
    return state._replace(variables={**state.variables, "params": _take(init.groups, params, found)}), step


def _in_layout(scan_layers: bool, params: Any) -> Any:
    """`params` themselves; or, in the other layout, shapes that are replicated over their mesh."""
    if scan_layers == (count_stacked_layers(params) > 0):
        return params
    shapes = jax.eval_shape(lambda tree: with_layout_of(scan_layers, tree), params)
    return replicated_shapes(shapes, jax.tree.leaves(params)[0].sharding.mesh)


def _like(params: Any, found: Any) -> Any:
    """`found` in the layout of `params` and with their shardings."""
    shardings = shardings_of(params)
    if jax.tree.structure(found) == jax.tree.structure(params):
        return jax.device_put(found, shardings)
    convert = partial(with_layout_of, count_stacked_layers(params) > 0)
    return jax.jit(convert, out_shardings=shardings)(found)


def _take(groups: Sequence[str], own: Any, found: Any) -> Any:
    """`found` where a leaf's group is among `groups`, else `own`."""
    return tree_map_with_path(
        lambda path, ours, theirs: theirs if label(("params", *path_names(path))) in groups else ours,
        own,
        found,
    )
