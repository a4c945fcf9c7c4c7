"""One adapter made of several on the same base: from their folders to a new one."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from behrt_jax.adapters.combine import Update, as_adapter, linear, truncated, updates_of
from behrt_jax.adapters.files import AdapterConfig, read_adapter, save_adapter
from behrt_jax.adapters.lora import leaves_by_path
from behrt_jax.config.commands import CombineConfig
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, check_new_folder, from_stored, json_text, read_json
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, example_batch
from behrt_jax.models.stacked_layers import Path as TreePath
from behrt_jax.models.stacked_layers import Tree, unstack_layers
from behrt_jax.run_folder import PREPARATION_FILE, VOCABULARY_FILE
from behrt_jax.workflows.finetune_run import TASK_FILE, Calibration
from behrt_jax.workflows.run import settings

ADAPTER_FOLDER = "adapter"
SAME_TASK = ("task", "pooling", "max_length", "model", "new_codes")
"""Entries of task.json that adapters must agree in to be combined."""


class Member(NamedTuple):
    """An adapter that is combined."""

    folder: Path
    updates: dict[TreePath, Update]
    trained: dict[TreePath, np.ndarray]
    """What else was trained: head, embeddings, rows of new codes."""
    config: AdapterConfig
    lora: LoRAConfig
    task: JsonObject | None
    """Content of its task.json; None of pretraining."""


def combine_adapters(config: CombineConfig) -> Path:
    """Write the combined adapter, and return its folder.

    Updates of kernels are combined by the method, with the weights; what else was trained is averaged, with
    the weights over their sum.

    Raises:
        InputError: wrong options, a folder that cannot be read, or adapters that do not go together: of other
            bases, vocabularies, tasks, or (`linear`) ranks.
    """
    weights = _checked_weights(config)
    members = [_read(folder) for folder in config.adapters]
    for member in members[1:]:
        _check_alike(members[0], member)
    updates = _combined(config, members, weights)
    adapters, lora = as_adapter(updates, members[0].lora)
    trained = _mean(members, weights)
    shapes = _shapes(members[0])
    # Frozen leaves are named, but not read: the adapter leaves them as they are.
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()} | trained
    first = members[0]
    beside = {
        name: (first.folder / name).read_bytes()
        for name in (VOCABULARY_FILE, PREPARATION_FILE)
        if (first.folder / name).is_file()
    }
    if first.task is not None:
        beside[TASK_FILE] = json_text(_task_of(members, adapters, lora), 2).encode()
    of_adapter = AdapterConfig(
        lora=settings(lora),
        model=first.config.model,
        vocabulary_fingerprint=first.config.vocabulary_fingerprint,
        base_fingerprint=first.config.base_fingerprint,
        base=first.config.base,
        new_codes=first.config.new_codes,
    )
    assert config.output is not None
    marks = {path: path in trained for path in params}
    save_adapter(config.output, unflatten_dict(params), adapters, unflatten_dict(marks), of_adapter, beside)
    print(
        f"Written to {config.output}: {len(members)} adapters combined by {config.method}, {len(updates)} "
        f"layers of rank {lora.rank}{' or less' if lora.rank_pattern else ''}."
    )
    return config.output


def _checked_weights(config: CombineConfig) -> list[float]:
    count = len(config.adapters)
    if not count or config.output is None:
        raise InputError("--adapters and --output are needed: the folders to combine, and a new one.")
    check_new_folder(config.output, "--output")
    if config.weights and len(config.weights) != count:
        raise InputError(
            f"--weights has {len(config.weights)} numbers for {count} adapters: give one for each."
        )
    weights = list(config.weights) or [1.0 / count] * count
    if not all(math.isfinite(weight) and weight for weight in weights):
        raise InputError(f"--weights are {weights}: give finite numbers other than 0.")
    if config.rank is not None and config.method == "linear":
        raise InputError("--rank is of --method svd: linear keeps the rank that all adapters have.")
    if config.rank is not None and config.rank < 1:
        raise InputError(f"--rank is {config.rank}: an adapter needs a rank of 1 or more.")
    return weights


def _read(given: Path) -> Member:
    folder = given / ADAPTER_FOLDER if (given / ADAPTER_FOLDER).is_dir() else given
    adapters, params, config = read_adapter(folder)
    if not adapters:
        raise InputError(f"{folder} holds no LoRA adapter, so there is nothing to combine.")
    if config.base_fingerprint is None:
        raise InputError(f"{folder} does not tell its base: save it by a run, or load it and save it again.")
    lora = from_stored(LoRAConfig, config.lora or {})
    task = read_json(folder / TASK_FILE) if (folder / TASK_FILE).is_file() else None
    trained = {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
    return Member(folder, updates_of(adapters, lora), trained, config, lora, task)


def _check_alike(one: Member, other: Member) -> None:
    """Raise InputError, which names both, where two adapters do not go together."""
    both = f"{one.folder} and {other.folder}"
    if one.config.vocabulary_fingerprint != other.config.vocabulary_fingerprint:
        raise InputError(f"{both} are adapters of different vocabularies, and cannot be combined.")
    if list(one.config.new_codes) != list(other.config.new_codes):
        raise InputError(f"{both} have added different codes to the vocabulary, and cannot be combined.")
    if (one.task is None) != (other.task is None):
        raise InputError(f"{both} cannot be combined: one is of pretraining, the other of a task.")
    if one.task is not None and other.task is not None:
        for name in SAME_TASK:
            if one.task.get(name) != other.task.get(name):
                raise InputError(
                    f"{both} are of different tasks ({name} differs), whose heads have nothing in common. "
                    "One base answers both at once by behrt_jax.adapters.bank."
                )
    shapes = [{path: leaf.shape for path, leaf in member.trained.items()} for member in (one, other)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{both} have not trained the same parameters beside their adapters: combine others."
        )
    if one.config.base_fingerprint != other.config.base_fingerprint:
        raise InputError(f"{both} are adapters of different bases, and cannot be combined.")


def _combined(
    config: CombineConfig, members: Sequence[Member], weights: Sequence[float]
) -> dict[TreePath, Update]:
    """The update of each layer that some member adapts."""
    found = {}
    for path in sorted({path for member in members for path in member.updates}):
        own = [
            (weight, member.updates[path])
            for weight, member in zip(weights, members, strict=True)
            if path in member.updates
        ]
        ranks = [update.a.shape[1] for _, update in own]
        if config.method == "svd":
            found[path] = truncated(own, config.rank or max(ranks))
        elif len(set(ranks)) == 1:
            found[path] = linear(own)
        else:
            raise InputError(
                f"--method linear: the adapters of {'/'.join(path)} have ranks {ranks}, but must have the "
                "same: give --method svd."
            )
    return found


def _mean(members: Sequence[Member], weights: Sequence[float]) -> dict[TreePath, np.ndarray]:
    """Means, by weight, of what was trained beside the adapters."""
    total = sum(weights)
    if members[0].trained and total <= 0:
        raise InputError(
            f"--weights add up to {total:g}, but the adapters have trained a head or embeddings too, of "
            "which a mean is taken: give weights with a sum above 0."
        )
    shares = np.array(weights) / total
    return {
        path: np.tensordot(shares, np.stack([member.trained[path] for member in members]), 1).astype(
            np.float32
        )
        for path in members[0].trained
    }


def _shapes(member: Member) -> dict[TreePath, tuple[int, ...]]:
    """Shapes of all parameters of the model, layer by layer."""
    model = from_stored(ModelConfig, member.config.model)
    new = len(member.config.new_codes)
    rows = len(Vocabulary.read(member.folder / VOCABULARY_FILE)) - new
    key, batch = jax.random.key(0), example_batch(model)
    if member.task is None:
        init = jax.eval_shape(lambda: BEHRTForMLM(model, rows).init(key, batch))
    else:
        task = Task.from_json(member.task["task"])
        network = BEHRTForTask(model, rows, task.outputs, member.task["pooling"])
        init = jax.eval_shape(lambda: network.init(key, batch, segments=1))
    leaves = leaves_by_path(jax.eval_shape(unstack_layers, init["params"]))
    rows_of_codes = {("new_codes", "rows"): (new, model.embedding_size)} if new else {}
    return {path: leaf.shape for path, leaf in leaves.items()} | rows_of_codes


def _task_of(members: Sequence[Member], adapters: Tree, lora: LoRAConfig) -> JsonObject:
    """task.json of the combined adapter: nothing is fitted on tuning, and it has no labels of its own."""
    record = members[0].task
    assert record is not None
    kind = Task.from_json(record["task"]).of
    size = sum(leaf.size for leaf in leaves_by_path(adapters).values())
    more = size - sum(update.a.size + update.b.size for update in members[0].updates.values())
    return {
        **{name: value for name, value in record.items() if name != "name"},
        "lora": settings(lora),
        "parameters": {name: count + more for name, count in record["parameters"].items()},
        "calibration": asdict(Calibration(threshold=0.5 if kind.thresholded else None)),
        "blend": None,
    }
