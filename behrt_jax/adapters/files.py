"""An adapter on disk: what was trained, without the frozen base it belongs to.

A folder with two files. ``adapter.safetensors`` holds every LoRA leaf and every trained leaf of the
parameters (head, embeddings, ...) as float32, under keys such as
``lora/behrt/encoder/layer_0/attention/query/a`` and ``params/mlm_head/dense/kernel``.
``adapter_config.json`` holds the configuration, the table of tensors and the fingerprints of the
vocabulary, of the frozen base and of the tensor file, and the codes that the adapter added to the vocabulary
(`new_codes`), in the order of their rows ``params/new_codes/rows``. On disk a model is always layer by
layer, so that an adapter fits its base whether or not the layers are stacked in memory
(`models.stacked_layers`).

Source of the tensor format: https://github.com/huggingface/safetensors.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import behrt_jax
from behrt_jax.adapters.lora import label
from behrt_jax.errors import InputError
from behrt_jax.files import replace_folder
from behrt_jax.models.stacked_layers import count_stacked_layers, stack_layers, unstack_layers

# A short name for the exact values of a tree of arrays.


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


# The folder of an adapter: replaced in one go, and its two files read back with all checks on them.

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter.safetensors"
FORMAT_VERSION = 1


def import_safetensors() -> Any:
    """The module ``safetensors.numpy``; raises InputError, which names the package, where it is missing."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise InputError("adapter files need the package safetensors: pip install safetensors") from error
    return safetensors.numpy


def refuse_other_files(folder: Path) -> None:
    """Replacing a folder deletes what is in it: raise InputError unless this is an adapter's or absent."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the adapter")
    other = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG_FILE, TENSOR_FILE))
    if other:
        raise InputError(f"{folder} holds {other[0]}, which is no adapter's; give a folder of its own")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration; raises InputError where it is missing, damaged or of another format version."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give the folder of an adapter") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged (not JSON); save the adapter again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {version}; this version of behrt_jax reads {FORMAT_VERSION}"
        )
    for entry in ("vocabulary_fingerprint", "base_fingerprint", "tensors_sha256", "tensors"):
        if entry not in config:
            raise InputError(f"{path} has no entry {entry}; save the adapter again")
    return config


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All tensors, after a check against the table and the digest in the configuration.

    Raises:
        InputError: the file is missing or damaged, or safetensors is not installed.
    """
    path = folder / TENSOR_FILE
    deserialise = import_safetensors().load
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; copy the whole adapter folder") from error
    try:
        tensors = deserialise(data)
    except Exception as error:  # the reader's own error type, and others on garbage
        raise InputError(f"{path} is damaged (not a safetensors file); save the adapter again") from error
    table = config["tensors"]
    for key in sorted(table.keys() ^ tensors.keys()):
        state = "is missing" if key in table else f"is not in the table of {CONFIG_FILE}"
        raise InputError(f"{path}: tensor {key} {state}; save the adapter again")
    for key in sorted(table):
        check_shape(folder, key, tensors[key].shape, table[key])
    if hashlib.sha256(data).hexdigest() != config["tensors_sha256"]:
        raise InputError(f"{path} is damaged (its digest differs); save the adapter again")
    return {key: tensors[key] for key in sorted(tensors)}


def check_shape(folder: Path, key: str, found: Iterable[int], expected: Iterable[int]) -> None:
    """Raise InputError, which names the tensor, where two shapes differ."""
    if tuple(found) != tuple(expected):
        raise InputError(
            f"{folder}: tensor {key} has shape {list(found)} where {list(expected)} is expected; "
            "use the configuration that the adapter was trained with"
        )


NEW_ROWS, CODE_TABLE = "new_codes/rows", "behrt/embeddings/code/embedding"


def save_adapter(
    folder: Path,
    *,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    trained: Mapping[str, Any],
    lora_config: Mapping[str, Any] | None,
    model_config: Mapping[str, Any],
    vocabulary_fingerprint: str,
    base_fingerprint: str | None = None,
    new_codes: Sequence[str] = (),
) -> list[Path]:
    """Write an adapter folder in one go, in place of an older one, and return its two files.

    ``trained`` mirrors ``params`` with a bool for each leaf: the True ones are written, the others
    are the base. ``base_fingerprint`` is :func:`base_fingerprint_of` the base where the caller has it
    already; it is computed otherwise. ``new_codes`` name the rows of ``params["new_codes"]``; the vocabulary
    is that of the base, without them. ``lora`` leaves are ``a`` [in, rank] and ``b``
    [rank, out], stacked where the params are; it may be empty, and then ``lora_config`` may be None. Both
    configurations must be ready for JSON.

    Raises:
        InputError: ``folder`` holds files that are no adapter's, or safetensors is not installed.
        ValueError: ``trained`` does not mirror ``params``, what is written fits no parameter group, or
            there is not one new code for each trained row of them.
    """
    serialise = import_safetensors().save
    refuse_other_files(folder)
    flat_params, marks = _flatten(params), _flatten(trained)
    if flat_params.keys() != marks.keys():
        raise ValueError("trained must mark every leaf of params, and no other")
    rows = flat_params[NEW_ROWS].shape[0] if marks.get(NEW_ROWS) else 0
    if rows != len(new_codes):
        raise ValueError(f"{rows} trained rows of new codes, but {len(new_codes)} new_codes")
    trained_leaves = {path: leaf for path, leaf in flat_params.items() if marks[path]}
    written = {f"lora/{path}": leaf for path, leaf in _by_layer(_flatten(lora)).items()}
    written |= {f"params/{path}": leaf for path, leaf in _by_layer(trained_leaves).items()}
    base = {path: leaf for path, leaf in flat_params.items() if not marks[path]}
    tensors = {key: np.asarray(leaf, np.float32, order="C") for key, leaf in sorted(written.items())}
    data = serialise(tensors)
    config = {
        "format_version": FORMAT_VERSION,
        "behrt_jax_version": behrt_jax.__version__,
        "lora": lora_config,
        "model": model_config,
        "groups": sorted({label(tuple(key.split("/"))) for key in tensors}),
        "vocabulary_fingerprint": vocabulary_fingerprint,
        "base_fingerprint": base_fingerprint or fingerprint_tree(_by_layer(base)),
        "new_codes": list(new_codes),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "tensors": {key: list(values.shape) for key, values in tensors.items()},
    }
    replace_folder(folder, {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), TENSOR_FILE: data})
    return [folder / CONFIG_FILE, folder / TENSOR_FILE]


def base_fingerprint_of(base: Mapping[str, Any]) -> str:
    """:func:`fingerprint_tree` of frozen parameters, layer by layer however they are in memory."""
    return fingerprint_tree(_by_layer(_flatten(base)))


def load_adapter(
    folder: Path,
    params: Mapping[str, Any],
    vocabulary_fingerprint: str | None = None,
    base_fingerprint: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read an adapter folder: ``(params, lora, config)``.

    The returned params are the given ones with the adapter's trained leaves in their place (same
    dtype and sharding as before); the frozen leaves are shared, and the given tree is left as it is.
    ``lora`` is float32, its leaves ``a`` [in, rank] and ``b`` [rank, out], stacked where the params are.
    Rows of new codes, which a base has not, are added to the params (see `adapters.new_codes`). The
    vocabulary, the base's own, is checked only where its fingerprint is given. ``base_fingerprint`` is
    :func:`base_fingerprint_of` what the adapter leaves frozen, where the caller has it already.

    Raises:
        InputError: a file is missing or damaged, the adapter belongs to another vocabulary or
            another base, a tensor is missing, unknown or of another shape, or the params are stacked and the
            adapter has not the same leaves in each layer.
    """
    config = read_config(folder)
    if vocabulary_fingerprint not in (None, config["vocabulary_fingerprint"]):
        raise InputError(
            f"{folder}: this adapter was trained with another vocabulary; "
            "prepare the data with the vocabulary of its run"
        )
    tensors = read_tensors(folder, config)
    lora, trained = _part(tensors, "lora/"), _part(tensors, "params/")
    flat_params = _flatten(params)
    known = _flatten(jax.eval_shape(unstack_layers, params))
    if NEW_ROWS in trained and CODE_TABLE in known:
        rows = (len(config.get("new_codes", ())), known[CODE_TABLE].shape[1])
        known[NEW_ROWS] = jax.ShapeDtypeStruct(rows, np.float32)
    _check_shapes(folder, lora, trained, known)
    if layers := count_stacked_layers(params):
        lora, trained = (_flatten(stack_layers(_nest(part), layers)) for part in (lora, trained))
    base = {path: leaf for path, leaf in flat_params.items() if path not in trained}
    if (base_fingerprint or fingerprint_tree(_by_layer(base))) != config["base_fingerprint"]:
        raise InputError(
            f"{folder}: the frozen parameters differ from those this adapter was trained on; "
            "load it onto the base of its own run"
        )
    like = {**flat_params, NEW_ROWS: flat_params.get(CODE_TABLE)}
    flat_params |= {path: _like(values, like[path]) for path, values in trained.items()}
    return _nest(flat_params), _nest({path: jnp.asarray(values) for path, values in lora.items()}), config


def _flatten(tree: Any) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    return flatten_dict(tree, sep="/")


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(dict(flat), sep="/")


def _by_layer(flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flat leaves on the host, those of stacked layers as one for each layer."""
    return _flatten(unstack_layers(_nest({path: np.asarray(leaf) for path, leaf in flat.items()})))


def _part(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): values for key, values in tensors.items() if key.startswith(prefix)}


def _like(values: np.ndarray, leaf: Any) -> jax.Array:
    """The values with a leaf's dtype, on a leaf's devices."""
    return jax.device_put(values.astype(leaf.dtype), getattr(leaf, "sharding", None))


def _check_shapes(
    folder: Path,
    lora: Mapping[str, np.ndarray],
    trained: Mapping[str, np.ndarray],
    flat_params: Mapping[str, Any],
) -> None:
    """Each tensor has a place of its shape in the model."""
    for path, values in trained.items():
        if path not in flat_params:
            raise InputError(f"{folder}: tensor params/{path} has no place in this model; use its own model")
        check_shape(folder, f"params/{path}", values.shape, flat_params[path].shape)
    for path, values in lora.items():
        layer, _, side = path.rpartition("/")
        kernel = flat_params.get(f"{layer}/kernel")
        if kernel is None or side not in ("a", "b"):
            raise InputError(f"{folder}: tensor lora/{path} has no kernel in this model; use its own model")
        rank = lora[f"{layer}/a"].shape[-1]
        check_shape(
            folder,
            f"lora/{path}",
            values.shape,
            (kernel.shape[0], rank) if side == "a" else (rank, kernel.shape[1]),
        )
