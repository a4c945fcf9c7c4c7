"""A finished pretraining run, or its export: its settings, its vocabulary, its parameters."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.tree_util import tree_map_with_path

from behrt_jax.adapters import lora
from behrt_jax.adapters.lora import label, path_names
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import InitConfig, ObjectiveName, QueriesConfig
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.prepared import read_preparation
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, from_stored
from behrt_jax.models.behrt import BEHRTForMLM
from behrt_jax.models.questions import BEHRTForQueries, init_params, pretraining_model
from behrt_jax.models.stacked_layers import Tree, count_stacked_layers, unstack_layers, with_layout_of
from behrt_jax.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    SUMMARY_FILE,
    VOCABULARY_FILE,
    checked,
    read_config,
)
from behrt_jax.training.checkpoints import compare_leaves, leaf_table, open_checkpoints
from behrt_jax.training.devices import replicated_shapes, shardings_of
from behrt_jax.training.step import TrainState
from behrt_jax.weights.portable import MODEL_FILE, Portable, is_portable, open_portable, read_weights


class Pretrained(NamedTuple):
    """A run's model, told without reading its parameters."""

    run: Path
    model: ModelConfig
    vocabulary: Vocabulary
    preparation: Preparation | None
    """Rules by which its data were prepared, where they are known."""
    objective: ObjectiveName = "mlm"
    """What it was trained for."""
    queries: QueriesConfig = QueriesConfig()
    """What questions it was asked."""

    @property
    def network(self) -> BEHRTForMLM | BEHRTForQueries:
        """The Flax module of its parameters."""
        return pretraining_model(self.model, len(self.vocabulary), self.objective, len(self.queries.groups))


def open_pretrained(run: Path) -> Pretrained:
    """Read the small files of a finished pretraining run, or of an exported model.

    Raises:
        InputError: there is no such run, it is not finished, or it is none of pretraining.
    """
    if is_portable(run):
        found = open_exported(run, "--init")
        trained = found.config.objective, from_stored(QueriesConfig, found.config.queries)
        return Pretrained(run, found.model, found.vocabulary, found.preparation, *trained)
    check_finished(run, "--init", (CONFIG_FILE, SUMMARY_FILE, VOCABULARY_FILE))
    settings = stored_settings(run)
    if "masking" not in settings:
        raise InputError(f"--init: {run} is no run of pretraining: give the folder that pretrain.py wrote.")
    model = from_stored(ModelConfig, settings["model"])
    vocabulary = Vocabulary.read(checked(run, VOCABULARY_FILE))
    queries = from_stored(QueriesConfig, settings.get("queries") or {})
    trained = settings.get("objective", "mlm"), queries
    return Pretrained(run, model, vocabulary, read_preparation(run), *trained)


class EncoderParameters(NamedTuple):
    """The parameters of a pretrained encoder."""

    params: Tree
    """The model's tree under ``behrt``, on the devices."""
    step: int
    """Of the checkpoint that they are of."""


def read_encoder(pretrained: Pretrained, mesh: Mesh) -> EncoderParameters:
    """The encoder of the best checkpoint, or of the last where there is no best.

    Adapters of that run are merged into them.

    Raises:
        InputError: there is no checkpoint, or it cannot be read.
    """
    shapes = jax.eval_shape(partial(init_params, pretrained.network), jax.random.key(0))
    params, step = read_parameters(pretrained.run, "--init", replicated_shapes(shapes, mesh))
    return EncoderParameters(params["behrt"], step)


def open_exported(folder: Path, option: str) -> Portable:
    """An exported model that was pretrained.

    Raises:
        InputError: it is damaged, or was fine-tuned; names the option.
    """
    found = open_portable(folder)
    if found.config.task is not None:
        raise InputError(
            f"{option}: {folder} is an export of a fine-tuned model: give a pretraining run, or its export."
        )
    return found


class Weights(NamedTuple):
    """All parameters of a pretrained model, its adapters apart."""

    params: Tree
    lora: Tree
    """Adapters; empty where there are none, or all are merged."""
    adapters: LoRAConfig | None
    step: int
    """Of the checkpoint that they are of; 0 of an exported model for which it is not known."""

    def merged(self) -> Tree:
        """Parameters with the adapters in them (:func:`behrt_jax.adapters.lora.merge`)."""
        return self.params if self.adapters is None else lora.merge(self.params, self.lora, self.adapters)


def read_parameters(run: Path, option: str, shapes: Tree) -> tuple[Tree, int]:
    """As :func:`read_weights_of`, adapters merged into the parameters; and the step that they are of."""
    found = read_weights_of(run, option, shapes)
    return found.merged(), found.step


def read_weights_of(run: Path, option: str, shapes: Tree) -> Weights:
    """Parameters of a run's best checkpoint, or of its last where it has no best, or of an exported model.

    Args:
        run: its folder.
        option: that names the run, for messages.
        shapes: of the parameters, arrays or ``jax.ShapeDtypeStruct``, with the shardings that they get.

    Raises:
        InputError: there is no checkpoint, it cannot be read, or its parameters have other shapes.
    """
    if is_portable(run):
        return _read_exported(open_exported(run, option), shapes)
    with open_checkpoints(run / CHECKPOINTS_FOLDER) as checkpoints:
        checkpoints.refuse_damaged()
        step = checkpoints.best_step()
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise InputError(f"{option}: {run} has no checkpoint to start from: give another run.")
        stored = stored_settings(run)["lora"]
        if stored is None:
            return Weights(checkpoints.restore(step, params=shapes).params, {}, None, step)
        adapters = from_stored(LoRAConfig, stored)
        found = checkpoints.restore(step, params=shapes, lora=_adapter_shapes(shapes, adapters))
    return Weights(found.params, found.lora, adapters, step)


def _read_exported(portable: Portable, shapes: Tree) -> Weights:
    params, adapters = read_weights(portable)
    expected = jax.eval_shape(unstack_layers, shapes)
    where = f"{portable.folder} does not fit the model: params"
    compare_leaves(where, leaf_table(params), leaf_table(expected))
    stacked = count_stacked_layers(shapes) > 0
    return Weights(
        _like(shapes, params), with_layout_of(stacked, adapters), portable.lora, portable.config.step
    )


def check_readable(pretrained: Pretrained) -> None:
    """Check that there are parameters to start from, before data are read.

    Raises:
        InputError: a run without a checkpoint that is whole, or an export whose parameters are damaged.
    """
    run = pretrained.run
    if is_portable(run):
        checked(run, MODEL_FILE)
        return
    with open_checkpoints(run / CHECKPOINTS_FOLDER) as checkpoints:
        if checkpoints.latest_step() is None:
            raise InputError(f"--init: {run} has no checkpoint to start from: give another run.")


def check_finished(run: Path, option: str, files: Sequence[str] = (CONFIG_FILE, SUMMARY_FILE)) -> None:
    """Check that the folder holds a finished run.

    Raises:
        InputError: one of its files is not there, or is damaged; names the option and the file.
    """
    for name in files:
        if not (run / name).is_file():
            raise InputError(
                f"{option}: {run} holds no finished run ({name} is not there): give the folder of one."
            )
        checked(run, name)


def stored_settings(run: Path) -> JsonObject:
    """Settings that a run was made with, as its version of behrt_jax wrote them."""
    return read_config(run)["settings"]


def _adapter_shapes(params: Tree, config: LoRAConfig) -> Tree:
    """The adapters that a model with these parameters has, as shapes, whole on each of their devices."""
    shapes = jax.eval_shape(lambda key, tree: lora.init(key, tree, config), jax.random.key(0), params)
    return replicated_shapes(shapes, jax.tree.leaves(params)[0].sharding.mesh)


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
    if is_portable(init.run):
        stored = open_exported(init.run, "init.run").model
    else:
        check_finished(init.run, "init.run")
        stored = _stored_model(init.run)
    theirs, ours = asdict(stored.resolved()), asdict(model.resolved())
    for name in theirs:
        if name not in FREE and theirs[name] != ours[name]:
            raise InputError(
                f"init.run: model.{name} is {ours[name]}, but {theirs[name]} in the run {init.run}: "
                "give the same model, or another run."
            )


def _stored_model(run: Path) -> ModelConfig:
    """The model of a run that was made before or after some of its settings were there."""
    stored = stored_settings(run).get("model")
    if not isinstance(stored, dict):
        raise InputError(f"init.run: {run} is no run of pretraining: give the folder that pretrain.py wrote.")
    return from_stored(ModelConfig, stored)


def check_vocabulary(init: InitConfig, vocabulary: Vocabulary) -> None:
    """Check that the run to start from has the same codes at the same ids.

    Raises:
        InputError: it has not, or its vocabulary.parquet cannot be read.
    """
    if init.run is None:
        return
    theirs = Vocabulary.read(checked(init.run, VOCABULARY_FILE))
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
    # An export is read in either layout.
    shapes = params if is_portable(init.run) else _in_layout(_stored_model(init.run).scan_layers, params)
    found, step = read_parameters(init.run, "init.run", shapes)
    found = _like(params, found)
    return state._replace(variables={**state.variables, "params": _take(init.groups, params, found)}), step


def _in_layout(scan_layers: bool, params: Tree) -> Tree:
    """`params` themselves; or, in the other layout, shapes that are replicated over their mesh."""
    if scan_layers == (count_stacked_layers(params) > 0):
        return params
    shapes = jax.eval_shape(lambda tree: with_layout_of(scan_layers, tree), params)
    return replicated_shapes(shapes, jax.tree.leaves(params)[0].sharding.mesh)


def _like(params: Tree, found: Tree) -> Tree:
    """`found` in the layout of `params` and with their shardings."""
    shardings = shardings_of(params)
    if jax.tree.structure(found) == jax.tree.structure(params):
        return jax.device_put(found, shardings)
    convert = partial(with_layout_of, count_stacked_layers(params) > 0)
    return jax.jit(convert, out_shardings=shardings)(found)


def _take(groups: Sequence[str], own: Tree, found: Tree) -> Tree:
    """`found` where a leaf's group is among `groups`, else `own`."""
    return tree_map_with_path(
        lambda path, ours, theirs: theirs if label(("params", *path_names(path))) in groups else ours,
        own,
        found,
    )
