"""An adapter on disk: what was trained, without the frozen base it belongs to.

A folder in the form of PEFT (`adapters.peft`): ``adapter_model.safetensors`` holds every LoRA leaf and every
trained leaf of the parameters (head, embeddings, ...) as float32, ``adapter_config.json`` the settings that
PEFT knows. ``behrt_jax.json`` beside them holds all settings, the table of tensors, the fingerprints of the
vocabulary and of the frozen base, the digests of the tensor file, of what else lies in the folder and of
itself, and the codes that the adapter added to the vocabulary (`new_codes`), in the order of their rows
``params/new_codes/rows``. On disk a model is always layer by layer, so that an adapter fits its base whether
or not the layers are stacked in memory (`models.stacked_layers`).

Two other forms are read. Of format version 1, ``adapter_config.json`` is what ``behrt_jax.json`` is now, and
``adapter.safetensors`` has keys of ours, such as ``lora/behrt/encoder/layer_0/attention/query/a`` and
``params/mlm_head/dense/kernel``. A folder that PEFT has saved has no ``behrt_jax.json``: nothing tells its
base and its vocabulary, and it is loaded onto the given ones.

Source of the tensor format: https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import behrt_jax
from behrt_jax.adapters import peft
from behrt_jax.adapters.lora import label, leaves_by_path
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.files import (
    SEAL,
    JsonObject,
    check_files,
    digest_of,
    from_stored,
    is_sealed,
    json_text,
    replace_folder,
    say_unrecorded,
    sealed,
)
from behrt_jax.models.stacked_layers import Tree, count_stacked_layers, stack_layers, unstack_layers

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
OWN_FILE = "behrt_jax.json"
FORMAT_VERSION = 2
FORMER_TENSOR_FILE = "adapter.safetensors"
"""Of format version 1."""
MARK = "behrt_jax_format_version"
"""In the metadata of the tensor file: it was written here, with ``behrt_jax.json`` beside it."""
NEW_ROWS, CODE_TABLE = "new_codes/rows", "behrt/embeddings/code/embedding"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Content of ``behrt_jax.json``; what follows from the tensors, :func:`save_adapter` fills in."""

    format_version: int = FORMAT_VERSION
    behrt_jax_version: str = behrt_jax.__version__
    lora: JsonObject | None = None
    """Settings of the adapters; may be None where there are none."""
    model: JsonObject = field(default_factory=dict)
    """Settings of the model."""
    groups: Sequence[str] = ()
    """Parameter groups that the tensors belong to."""
    vocabulary_fingerprint: str | None
    """Of the base's vocabulary, without the new codes; None in what PEFT has saved."""
    base_fingerprint: str | None = None
    """:func:`base_fingerprint_of` what the adapter leaves frozen; computed where not given. None in what PEFT
    has saved."""
    base: str | None = None
    """Folder of the run that the base is of."""
    new_codes: Sequence[str] = ()
    """Names of the rows of ``params["new_codes"]``."""
    tensors_sha256: str = ""
    """Digest of the tensor file."""
    tensors: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Shape of each tensor, as it is here: ``lora/...`` and ``params/...``."""
    files: Mapping[str, JsonObject] = field(default_factory=dict)
    """Size and SHA-256 of each other file of the folder."""


def save_adapter(
    folder: Path,
    params: Tree,
    lora: Tree,
    trained: Tree,
    config: AdapterConfig,
    beside: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Write an adapter folder in one go, in place of an older one, and return its files.

    Args:
        folder: new, or that of an adapter.
        params: of the model, with the new codes' rows where there are any.
        lora: leaves ``a`` [in, rank] and ``b`` [rank, out], stacked where the params are; may be empty.
        trained: mirrors ``params`` with a bool for each leaf: the True ones are written, the others are the
            base.
        config: its settings must be ready for JSON.
        beside: other files of the folder, by name.

    Raises:
        InputError: ``folder`` holds files that are no adapter's, or safetensors is not installed.
        ValueError: ``trained`` does not mirror ``params``, what is written fits no parameter group,
            there is not one new code for each trained row of them, or there are adapters without settings.
    """
    import_safetensors()
    beside = beside or {}
    _refuse_other_files(folder, {CONFIG_FILE, TENSOR_FILE, OWN_FILE, FORMER_TENSOR_FILE, *beside})
    flat_params, marks = _flatten(params), _flatten(trained)
    if flat_params.keys() != marks.keys():
        raise ValueError("trained must mark every leaf of params, and no other")
    rows = flat_params[NEW_ROWS].shape[0] if marks.get(NEW_ROWS) else 0
    if rows != len(config.new_codes):
        raise ValueError(f"{rows} trained rows of new codes, but {len(config.new_codes)} new_codes")
    changed = _by_layer({path: leaf for path, leaf in flat_params.items() if marks[path]})
    base = _by_layer({path: leaf for path, leaf in flat_params.items() if not marks[path]})
    written = {f"lora/{path}": leaf for path, leaf in _by_layer(_flatten(lora)).items()}
    written |= {f"params/{path}": leaf for path, leaf in changed.items()}
    tensors = {key: np.asarray(leaf, np.float32, order="C") for key, leaf in sorted(written.items())}
    data = serialised(peft.as_peft(tensors), {"format": "pt", MARK: str(FORMAT_VERSION)})
    settings = None if config.lora is None else from_stored(LoRAConfig, config.lora)
    for_peft = json_text(peft.peft_config(tensors, base, settings, config.base), 2).encode()
    whole = replace(
        config,
        groups=sorted({label(tuple(key.split("/"))) for key in tensors}),
        base_fingerprint=config.base_fingerprint or fingerprint_tree(base),
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        tensors={key: list(values.shape) for key, values in tensors.items()},
        files={name: digest_of(content) for name, content in {CONFIG_FILE: for_peft, **beside}.items()},
    )
    own = json_text(sealed(asdict(whole)), 2).encode()
    files = {CONFIG_FILE: for_peft, TENSOR_FILE: data, OWN_FILE: own, **beside}
    replace_folder(folder, files)
    return [folder / name for name in files]


def read_adapter(folder: Path) -> tuple[Tree, Tree, AdapterConfig]:
    """An adapter folder without its base: ``(lora, trained parameters, config)``, layer by layer, float32.

    Raises:
        InputError: a file is missing or damaged.
    """
    config = read_config(folder)
    tensors = _read_tensors(folder, config)
    return _nest(_part(tensors, "lora/")), _nest(_part(tensors, "params/")), config


def load_adapter(
    folder: Path,
    params: Tree,
    vocabulary_fingerprint: str | None = None,
    base_fingerprint: str | None = None,
) -> tuple[Tree, Tree, AdapterConfig]:
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
    unbound = config.base_fingerprint is None
    if unbound:
        _logger.warning(
            "%s was saved by PEFT: whether it fits this base and this vocabulary is unknown.", folder
        )
    elif vocabulary_fingerprint not in (None, config.vocabulary_fingerprint):
        raise InputError(
            f"{folder}: this adapter was trained with another vocabulary; "
            "prepare the data with the vocabulary of its run"
        )
    tensors = _read_tensors(folder, config)
    lora, trained = _part(tensors, "lora/"), _part(tensors, "params/")
    flat_params = _flatten(params)
    shapes = {path: leaf.shape for path, leaf in _flatten(jax.eval_shape(unstack_layers, params)).items()}
    if NEW_ROWS in trained and CODE_TABLE in shapes:
        shapes[NEW_ROWS] = (len(config.new_codes), shapes[CODE_TABLE][1])
    _check_shapes(folder, lora, trained, shapes)
    if layers := count_stacked_layers(params):
        lora, trained = (_on_host(stack_layers(_nest(part), layers)) for part in (lora, trained))
    base = {path: leaf for path, leaf in flat_params.items() if path not in trained}
    if not unbound and (base_fingerprint or fingerprint_tree(_by_layer(base))) != config.base_fingerprint:
        raise InputError(
            f"{folder}: the frozen parameters differ from those this adapter was trained on; "
            "load it onto the base of its own run"
        )
    for path, values in trained.items():
        like = flat_params[CODE_TABLE if path == NEW_ROWS else path]
        sharding = getattr(like, "sharding", None)
        flat_params[path] = jax.device_put(values.astype(like.dtype), sharding)
    return _nest(flat_params), _nest({path: jnp.asarray(values) for path, values in lora.items()}), config


def base_fingerprint_of(base: Tree) -> str:
    """:func:`fingerprint_tree` of frozen parameters, layer by layer however they are in memory."""
    return fingerprint_tree(_by_layer(_flatten(base)))


def fingerprint_tree(tree: Tree) -> str:
    """SHA-256, in hexadecimal, of every leaf's path, shape, dtype and bytes.

    Leaves are taken in the order of their paths, so the order in which a dict was filled does not
    matter. Leaves may have any shape and dtype; all of their values must be reachable from this
    process.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_flatten(tree).items(), key=lambda item: item[0]):
        values = np.asarray(leaf)
        # Shape and dtype fix the number of bytes that follow, so two trees never give one stream.
        digest.update(f"{path}\n{values.dtype}{list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def import_safetensors() -> ModuleType:
    """The module ``safetensors.numpy``; raises InputError, which names the package, where it is missing."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise InputError("files of weights need the package safetensors: pip install safetensors.") from error
    return safetensors.numpy


def serialised(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: the library puts metadata in any order.

    Raises:
        InputError: safetensors is not installed.
    """
    data = import_safetensors().save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(end - 8) + data[end:]


def _refuse_other_files(folder: Path, own: Set[str]) -> None:
    """Replacing a folder deletes what is in it: raise InputError unless this is an adapter's or absent."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the adapter")
    other = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if other:
        raise InputError(f"{folder} holds {other[0]}, which is no adapter's; give a folder of its own")


def read_config(folder: Path) -> AdapterConfig:
    """The configuration, once the files beside it are checked.

    Raises:
        InputError: it or one of them is missing or damaged, or it is of another format version.
    """
    path = folder / OWN_FILE
    if not path.is_file():
        path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give the folder of an adapter") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged (not JSON); save the adapter again") from error
    if path.name == CONFIG_FILE and isinstance(config, dict) and "peft_type" in config:
        return _saved_by_peft(folder, config)
    version = config.get("format_version") if isinstance(config, dict) else None
    expected = FORMAT_VERSION if path.name == OWN_FILE else 1
    if version != expected:
        raise InputError(f"{path} has format_version {version}; this version of behrt_jax reads {expected}")
    for entry in ("vocabulary_fingerprint", "base_fingerprint", "tensors_sha256", "tensors"):
        if entry not in config:
            raise InputError(f"{path} has no entry {entry}; save the adapter again")
    if SEAL not in config and "files" not in config:
        say_unrecorded(folder)
    elif not is_sealed(config):
        raise InputError(f"{path} is damaged (it is not what was written); save the adapter again")
    read = from_stored(AdapterConfig, config)
    check_files(folder, read.files, "save the adapter again, or copy the whole folder.")
    return read


def _saved_by_peft(folder: Path, config: JsonObject) -> AdapterConfig:
    """What can be told of a folder that PEFT has saved, with its tensors as the table."""
    data, found = _read_file(folder / TENSOR_FILE)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if MARK in header.get("__metadata__", {}):
        raise InputError(f"{folder / OWN_FILE} is missing; copy the whole adapter folder")
    shapes = {key: list(values.shape) for key, values in sorted(found.items())}
    layers = {tuple(key.split("/")[1:-1]): shape[-1] for key, shape in shapes.items() if key.endswith("/a")}
    settings = peft.settings_of(config, layers, folder / CONFIG_FILE)
    return AdapterConfig(lora=asdict(settings), vocabulary_fingerprint=None, tensors=shapes)


def _read_tensors(folder: Path, config: AdapterConfig) -> dict[str, np.ndarray]:
    """All tensors, after a check against the table and the digest in the configuration.

    Raises:
        InputError: the file is missing or damaged, or safetensors is not installed.
    """
    path = folder / (FORMER_TENSOR_FILE if config.format_version == 1 else TENSOR_FILE)
    data, tensors = _read_file(path)
    table = config.tensors
    for key in sorted(table.keys() ^ tensors.keys()):
        state = "is missing" if key in table else "is not in its table"
        raise InputError(f"{path}: tensor {key} {state}; save the adapter again")
    for key in sorted(table):
        _check_shape(folder, key, tensors[key].shape, table[key])
    if config.tensors_sha256 and hashlib.sha256(data).hexdigest() != config.tensors_sha256:
        raise InputError(f"{path} is damaged (its digest differs); save the adapter again")
    return {key: tensors[key] for key in sorted(tensors)}


def _read_file(path: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """Content of a tensor file, and its tensors as they are here."""
    import_safetensors()
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; copy the whole adapter folder") from error
    try:
        tensors = tensors_of(data)
    except Exception as error:  # the reader's own error type, and others on garbage
        raise InputError(f"{path} is damaged (not a safetensors file); save the adapter again") from error
    if path.name == FORMER_TENSOR_FILE:
        return data, tensors
    keys = {peft.key_of(name): values for name, values in tensors.items()}
    return data, {key: peft.turned(key, values) for key, values in keys.items()}


def tensors_of(data: bytes) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file by name, those of any precision as float32.

    Raises:
        SafetensorError: it is no such file.
        KeyError: a tensor is not of floating point.
    """
    from safetensors import deserialize

    found = {}
    for name, tensor in deserialize(data):
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(
                tensor["data"], {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor["dtype"]]
            )
        found[name] = values.astype(np.float32, copy=False).reshape(tensor["shape"])
    return found


def _check_shape(folder: Path, key: str, found: Iterable[int], expected: Iterable[int]) -> None:
    """Raise InputError, which names the tensor, where two shapes differ."""
    if tuple(found) != tuple(expected):
        raise InputError(
            f"{folder}: tensor {key} has shape {list(found)} where {list(expected)} is expected; "
            "use the configuration that the adapter was trained with"
        )


def _flatten(tree: Tree) -> dict[str, jax.Array]:
    """Nested dict -> {"a/b/c": leaf}."""
    return {"/".join(path): leaf for path, leaf in leaves_by_path(tree).items()}


def _nest(flat: Mapping[str, jax.Array | np.ndarray]) -> Tree:
    return unflatten_dict(dict(flat), sep="/")


def _on_host(tree: Tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in _flatten(tree).items()}


def _by_layer(flat: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Flat leaves on the host, those of stacked layers as one for each layer."""
    return _on_host(unstack_layers(_nest({path: np.asarray(leaf) for path, leaf in flat.items()})))


def _part(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): values for key, values in tensors.items() if key.startswith(prefix)}


def _check_shapes(
    folder: Path,
    lora: Mapping[str, np.ndarray],
    trained: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Each tensor has a place of its shape in the model."""
    for path, values in trained.items():
        if path not in shapes:
            raise InputError(f"{folder}: tensor params/{path} has no place in this model; use its own model")
        _check_shape(folder, f"params/{path}", values.shape, shapes[path])
    for path, values in lora.items():
        layer, _, side = path.rpartition("/")
        kernel = shapes.get(f"{layer}/kernel")
        if kernel is None or side not in ("a", "b"):
            raise InputError(f"{folder}: tensor lora/{path} has no kernel in this model; use its own model")
        rank = lora[f"{layer}/a"].shape[-1]
        expected = (kernel[0], rank) if side == "a" else (rank, kernel[1])
        _check_shape(folder, f"lora/{path}", values.shape, expected)
