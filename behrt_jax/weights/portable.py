"""A model in one portable form: a folder with all that it takes to use it, and nothing of the run's subjects.

::

    model.safetensors   every parameter, float32, layer by layer, by its path, such as
                        behrt/encoder/layer_0/attention/query/kernel [in, out]; its metadata have the version
                        of the format and the fingerprints of parameters, vocabulary and data
    config.json         :class:`PortableConfig`: the model with every value resolved, and its task
    vocabulary.parquet  preparation.json    as in a run, see `data.prepared`
    adapter/            adapters that are not merged, see `adapters.files`
    files.json          digests of these files, as in a run
    README.md           for people, who may change it

Source of the tensor format: https://github.com/huggingface/safetensors.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

import behrt_jax
from behrt_jax.adapters.combine import ordinary
from behrt_jax.adapters.files import (
    AdapterConfig,
    base_fingerprint_of,
    import_safetensors,
    load_adapter,
    save_adapter,
    serialised,
)
from behrt_jax.adapters.lora import leaves_by_path
from behrt_jax.adapters.targets import with_alphas
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import ObjectiveName, QueriesConfig
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.prepared import read_preparation, rule_files
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import (
    JsonObject,
    check_new_folder,
    from_stored,
    json_text,
    read_json,
    work_folder,
    write_text,
)
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, example_batch
from behrt_jax.models.questions import BEHRTForQueries, init_params, pretraining_model
from behrt_jax.models.stacked_layers import Tree, unstack_layers
from behrt_jax.run_folder import CONFIG_FILE, VOCABULARY_FILE, checked, write_files

MODEL_FILE = "model.safetensors"
ADAPTER_FOLDER = "adapter"
CARD_FILE = "README.md"
FORMAT, FORMAT_VERSION = "behrt_jax model", 1
NEW_CODES = "new_codes"
"""Subtree of the parameters with the rows of codes that adapters add (`adapters.new_codes`)."""

_ARCHITECTURES = {
    "mlm": BEHRTForMLM.__name__,
    "queries": BEHRTForQueries.__name__,
    "both": BEHRTForQueries.__name__,
}


@dataclass(frozen=True, kw_only=True)
class PortableConfig:
    """Content of ``config.json``."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    behrt_jax_version: str = behrt_jax.__version__
    architecture: str
    """BEHRTForMLM, BEHRTForQueries, or BEHRTForTask where there is a task."""
    model: JsonObject
    """Of `config.model.ModelConfig`."""
    vocabulary_size: int
    """Rows of vocabulary.parquet."""
    vocabulary_fingerprint: str
    parameters_fingerprint: str
    """Of the tensors, see `adapters.files.fingerprint_tree`."""
    data_fingerprint: str | None = None
    """Of the data that the model was trained on, where they are known."""
    step: int = 0
    """Updates that it was trained for, 0 where that is not known."""
    task: JsonObject | None = None
    """Of a fine-tuned model: ``task``, ``pooling``, ``max_length``, ``calibration``, ``blend``, ``freezing``
    and ``parameters``, as in the run's task.json."""
    lora: JsonObject | None = None
    """Of `config.model.LoRAConfig`, where adapters are not merged."""
    objective: ObjectiveName = "mlm"
    """What a pretrained model was trained for."""
    queries: JsonObject = field(default_factory=dict)
    """Of `config.training.QueriesConfig`: what questions it was asked; empty where none."""
    new_codes: int = 0
    """Codes at the end of the vocabulary whose rows are the adapter's."""
    tensors: Mapping[str, list[int]] = field(default_factory=dict)
    """Shape of each tensor."""
    recorded: bool = True
    """files.json belongs to the folder."""


class Portable(NamedTuple):
    """An exported model, told without reading its parameters."""

    folder: Path
    config: PortableConfig
    model: ModelConfig
    vocabulary: Vocabulary
    """With the adapter's new codes, if there are any."""
    preparation: Preparation | None
    lora: LoRAConfig | None
    """Of adapters that are not merged."""


class Beside(NamedTuple):
    """Adapters that are written beside the parameters, not merged into them."""

    config: LoRAConfig
    lora: Tree
    trained: Tree
    """Mirrors the parameters with a bool for each leaf: the True ones belong to the adapter too."""


def write_model(
    folder: Path,
    model: ModelConfig,
    vocabulary: Vocabulary,
    preparation: Preparation | None,
    params: Tree,
    *,
    task: JsonObject | None = None,
    objective: ObjectiveName = "mlm",
    queries: QueriesConfig | None = None,
    beside: Beside | None = None,
    step: int = 0,
    data_fingerprint: str | None = None,
    card: str = "",
    files: Mapping[str, bytes] | None = None,
) -> PortableConfig:
    """Write an exported folder, whole or not at all.

    Args:
        folder: new or empty.
        model: its settings.
        vocabulary: a row for each of the code table; what its counts tell is written as it is.
        preparation: rules by which events become its tokens, where they are known.
        params: float arrays, stacked or not; of the model of the objective, or where there is a task of a
            `BEHRTForTask`. Rows of new codes (`adapters.new_codes`) are written with an adapter alone.
        task: as in `PortableConfig`.
        objective: as in `PortableConfig`.
        queries: as in `PortableConfig`; None where it was asked none.
        beside: adapters to write into a folder of their own.
        step: as in `PortableConfig`.
        data_fingerprint: as in `PortableConfig`.
        card: text of README.md; none is written where it is empty.
        files: others, by name.

    Raises:
        InputError: the folder holds files, a parameter is missing, not known or of another shape (it is
            named), new codes without an adapter, or safetensors is not installed.
    """
    import_safetensors()
    check_new_folder(folder, "--output")
    new_codes = len(params[NEW_CODES]["rows"]) if NEW_CODES in params else 0
    if new_codes and beside is None:
        raise InputError(
            f"the parameters have {new_codes} rows of new codes beside their table: merge them, or write the "
            "adapter that they belong to."
        )
    model = model.resolved()
    base = {name: part for name, part in params.items() if name != NEW_CODES}
    codes = vocabulary.codes[: len(vocabulary) - new_codes]
    flat = {
        path: np.asarray(leaf, np.float32, order="C") for path, leaf in _flat(unstack_layers(base)).items()
    }
    found = {path: leaf.shape for path, leaf in flat.items()}
    shapes = expected_shapes(model, len(codes), task, objective, len(queries.groups) if queries else 0)
    _check_tensors("the model", found, shapes)
    if beside is not None:
        lora, adapters = ordinary(beside.lora, beside.config)
        beside = Beside(with_alphas(adapters), lora, beside.trained)
    config = PortableConfig(
        architecture=BEHRTForTask.__name__ if task else _ARCHITECTURES[objective],
        model=asdict(model),
        vocabulary_size=len(vocabulary),
        vocabulary_fingerprint=vocabulary.fingerprint(),
        parameters_fingerprint=base_fingerprint_of(base),
        data_fingerprint=data_fingerprint,
        step=step,
        task=task,
        objective=objective,
        queries=asdict(queries) if queries else {},
        lora=beside and asdict(beside.config),
        new_codes=new_codes,
        tensors={path: list(shape) for path, shape in found.items()},
    )
    contents = {
        MODEL_FILE: serialised(flat, _metadata(config)),
        **rule_files(vocabulary, preparation),
    }
    contents |= {**(files or {}), CONFIG_FILE: json_text(config, 2).encode()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.absolute().parent, f"exporting-{folder.name}") as place:
        fresh = place / folder.name
        fresh.mkdir()
        write_files(fresh, contents)
        if beside is not None:
            of_adapter = AdapterConfig(
                lora=asdict(beside.config),
                model=asdict(model),
                vocabulary_fingerprint=replace(vocabulary, codes=codes).fingerprint(),
                new_codes=vocabulary.codes[len(codes) :],
            )
            save_adapter(fresh / ADAPTER_FOLDER, params, beside.lora, beside.trained, of_adapter)
        if card:
            write_text(fresh / CARD_FILE, card)
        fresh.rename(folder)
    return config


def is_portable(folder: Path) -> bool:
    """Whether a folder is one that :func:`write_model` wrote, damaged or not."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return (folder / MODEL_FILE).is_file()
    config = read_json(file)
    return isinstance(config, dict) and config.get("format") == FORMAT


def open_portable(folder: Path) -> Portable:
    """Read the small files of an exported folder.

    Raises:
        InputError: one is missing or damaged, or of another version.
    """
    stored = read_json(checked(folder, CONFIG_FILE))
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG_FILE} is not of an exported model: give the folder of one.")
    if (version := stored.get("format_version")) != FORMAT_VERSION:
        raise InputError(
            f"{folder / CONFIG_FILE} has format_version {version}; this version of behrt_jax reads "
            f"{FORMAT_VERSION}: export the model again with it."
        )
    config = from_stored(PortableConfig, stored)
    vocabulary = Vocabulary.read(checked(folder, VOCABULARY_FILE))
    if vocabulary.fingerprint() != config.vocabulary_fingerprint:
        raise InputError(f"{folder / VOCABULARY_FILE} is not the vocabulary of this model: copy its own.")
    return Portable(
        folder,
        config,
        from_stored(ModelConfig, config.model),
        vocabulary,
        read_preparation(folder),
        None if config.lora is None else from_stored(LoRAConfig, config.lora),
    )


def read_weights(portable: Portable) -> tuple[Tree, Tree]:
    """Parameters and adapters of an exported model.

    Returns:
        Nested dicts, layer by layer: float32 numpy arrays of the parameters, and the leaves ``a`` [in, rank]
        and ``b`` [rank, out] of adapters that are not merged, none where all are. With the latter, the
        parameters are on a device, and have the rows of new codes.

    Raises:
        InputError: a file is missing or damaged; a tensor is missing, not known, of another shape or type.
    """
    import_safetensors()
    from safetensors import safe_open

    folder, config = portable.folder, portable.config
    path = checked(folder, MODEL_FILE)
    if not path.is_file():
        raise InputError(f"{path} is missing: copy the whole folder again.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the reader's own error type, and others on garbage
        raise InputError(f"{path} is damaged (not a safetensors file): copy it again.") from error
    codes = config.vocabulary_size - config.new_codes
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    groups = from_stored(QueriesConfig, config.queries).groups
    own = config.task, config.objective, len(groups)
    _check_tensors(str(path), shapes, expected_shapes(portable.model, codes, *own))
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, not float32: export the model again.")
    for name, value in _metadata(config).items():
        if metadata.get(name) != value:
            raise InputError(
                f"{path} does not belong to the {CONFIG_FILE} beside it ({name} is {metadata.get(name)}, not "
                f"{value}): copy the whole folder again."
            )
    params: Tree = unflatten_dict(tensors, sep="/")
    if portable.lora is None:
        return params, {}
    base = replace(portable.vocabulary, codes=portable.vocabulary.codes[:codes]).fingerprint()
    params, lora, _ = load_adapter(folder / ADAPTER_FOLDER, params, base)
    return params, lora


def expected_shapes(
    model: ModelConfig,
    vocabulary_size: int,
    task: JsonObject | None = None,
    objective: ObjectiveName = "mlm",
    groups: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each parameter of a model, layer by layer; `task` as in `PortableConfig`."""

    def init() -> Tree:
        key = jax.random.key(0)
        if task is None:
            pretrained = pretraining_model(model, vocabulary_size, objective, groups)
            return unstack_layers(init_params(pretrained, key))
        outputs = Task.from_json(task["task"]).outputs
        network = BEHRTForTask(model, vocabulary_size, outputs, task["pooling"])
        return unstack_layers(network.init(key, example_batch(model), 1)["params"])

    return {path: leaf.shape for path, leaf in _flat(jax.eval_shape(init)).items()}


def _check_tensors(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise InputError, which names all missing and surplus tensors, or the first of another shape."""
    problems = {
        "has no tensor": sorted(expected.keys() - found.keys()),
        "has a tensor that its model does not know:": sorted(found.keys() - expected.keys()),
    }
    told = [f"{what} {', '.join(names)}" for what, names in problems.items() if names]
    if told:
        raise InputError(f"{where} {' and '.join(told)}: export it again, or give the settings of its model.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise InputError(
                f"{where}: tensor {name} has shape {list(found[name])} where {list(shape)} is expected: "
                "export it again, or give the settings and the vocabulary of its model."
            )


def _metadata(config: PortableConfig) -> dict[str, str]:
    """Of the tensor file, whose values are text."""
    names = ("format", "format_version", "behrt_jax_version", "architecture")
    prints = ("parameters_fingerprint", "vocabulary_fingerprint", "data_fingerprint")
    found = {name: getattr(config, name) for name in (*names, *prints)}
    return {name: str(value) for name, value in found.items() if value is not None}


def _flat(tree: Tree) -> dict[str, jax.Array]:
    return {"/".join(path): leaf for path, leaf in leaves_by_path(tree).items()}
