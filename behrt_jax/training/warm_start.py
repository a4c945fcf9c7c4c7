"""Start a run from the parameters of a finished one in place of random ones."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.tree_util import tree_map_with_path

from behrt_jax.adapters import lora
from behrt_jax.adapters.groups import label, path_names
from behrt_jax.config import InitConfig, LoRAConfig, ModelConfig
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import count_stacked_layers, with_layout_of
from behrt_jax.tracking.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, SUMMARY_FILE, read_json
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.mesh import replicated
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
    for name in (CONFIG_FILE, SUMMARY_FILE):
        if not (init.run / name).is_file():
            raise InputError(
                f"init.run: {init.run} holds no finished run ({name} is not there): give the folder of one."
            )
    stored, given = _settings(init.run)["model"], asdict(model)
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

    Read is the run's best checkpoint, or its last where it has no best. Adapters of that run are
    merged into its parameters (:func:`behrt_jax.adapters.lora.merge`); the state's own adapters, its
    step and its optimizer stay fresh. Stacked layers fit a run without, and the other way round.

    Args:
        init: names the run and the groups.
        state: a fresh state; each leaf keeps its sharding.

    Raises:
        InputError: no readable checkpoint, or parameters of other shapes.
    """
    assert init.run is not None
    params = state.variables["params"]
    with open_checkpoints(init.run / CHECKPOINTS_FOLDER) as checkpoints:
        step = checkpoints.best_step()
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise InputError(f"init.run: {init.run} has no checkpoint to start from: give another run.")
        templates = _in_layout(_settings(init.run)["model"].get("scan_layers", False), params)
        adapters = lora_config(init.run)
        if adapters is None:
            found = checkpoints.restore(step, params=templates).params
        else:
            restored = checkpoints.restore(step, params=templates, lora=adapter_shapes(templates, adapters))
            found = lora.merge(restored.params, restored.lora, adapters)
    found = _like(params, found)
    return state._replace(variables={**state.variables, "params": _take(init.groups, params, found)}), step


def _in_layout(scan_layers: bool, params: Any) -> Any:
    """`params` themselves; or, in the other layout, shapes that are replicated over their mesh."""
    if scan_layers == (count_stacked_layers(params) > 0):
        return params
    shapes = jax.eval_shape(lambda tree: with_layout_of(scan_layers, tree), params)
    sharding = replicated(jax.tree.leaves(params)[0].sharding.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


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


def adapter_shapes(params: Any, config: LoRAConfig) -> Any:
    """The adapters that a model with these parameters has, as shapes, whole on each of their devices."""
    shapes = jax.eval_shape(lambda key, tree: lora.init(key, tree, config), jax.random.key(0), params)
    sharding = replicated(jax.tree.leaves(params)[0].sharding.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def lora_config(run: Path) -> LoRAConfig | None:
    """Adapters of a run; None where it has none."""
    stored = _settings(run)["lora"]
    if stored is None:
        return None
    known = {field.name for field in fields(LoRAConfig)}
    values = {name: value for name, value in stored.items() if name in known}
    return LoRAConfig(**{**values, "targets": tuple(values["targets"])})


def _settings(run: Path) -> dict[str, Any]:
    return read_json(run / CONFIG_FILE)["settings"]
