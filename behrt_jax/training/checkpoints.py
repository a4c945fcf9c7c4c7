"""Checkpoints of a run: the latest and the best, each item restorable alone.

A step's folder holds, as separate Orbax items, the trees ``params``, ``lora`` and ``opt_state``, the
JSON values ``cursor`` and ``config``, and ``contents``: the metrics and the path, dtype and shape of
every leaf. A tree without leaves has no item. Opening changes nothing on disk, so that a run in
progress can be read; leftovers of a killed run are removed by the first save.

Source: Orbax (https://orbax.readthedocs.io), its v0 ``CheckpointManager``.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import tensorstore

from behrt_jax.errors import InputError

TREES = ("params", "lora", "opt_state")

_logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    """Trees that were asked for; None for the others."""

    params: Any = None
    lora: Any = None
    opt_state: Any = None


@contextmanager
def open_checkpoints(folder: Path, *, keep_best: bool = True) -> Iterator["Checkpoints"]:
    """Checkpoints in a folder, which need not exist yet; leaving waits until all is written.

    The latest checkpoint is kept and, with ``keep_best``, the one of lowest ``metrics["loss"]`` too
    (the earlier of equals). An older one is deleted only when its successor is complete.
    """
    with _quiet_orbax():
        checkpoints = Checkpoints(folder.absolute(), keep_best)
        try:
            yield checkpoints
        finally:
            checkpoints.close()


class Checkpoints:
    """Save and restore; see :func:`open_checkpoints`, which makes one.

    Steps are numbers of updates. A checkpoint that is torn (an empty or half-copied folder) counts
    as absent: a warning is logged, and the one before it is the latest.
    """

    def __init__(self, folder: Path, keep_best: bool):
        self._folder = folder
        self._writable = False
        self._contents: dict[int, _Contents | None] = {}
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=_LatestAndBest(self._best_of if keep_best else None),
            # Orbax would read metrics of its own here, and fail on a torn checkpoint.
            lightweight_initialize=True,
            # Created in the background, a folder that cannot be made shows after minutes of waiting.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(
        self,
        step: int,
        params: Any,
        lora: Any,
        opt_state: Any,
        cursor: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write a checkpoint in the background; the arrays may be donated as soon as this returns.

        Args:
            step: number of updates made.
            params: tree of arrays.
            lora: tree of arrays, possibly empty.
            opt_state: optax state.
            cursor: where the run is, ready for JSON.
            config: what the run was made with, ready for JSON.
            metrics: of a validation at this step, with a ``loss``; None for a checkpoint that must
                not become the best (a run interrupted halfway).

        A step that is saved already is left as it is, unless it had no metrics and now has: then it
        is replaced.

        Raises:
            TypeError: cursor or config is not fit for JSON.
        """
        self.wait()
        self._make_writable()
        existing = self._whole(step)
        if existing and (metrics is None or existing.metrics is not None):
            return
        if step in self._manager.all_steps():
            self._manager.delete(step)
        trees = dict(zip(TREES, (params, lora, opt_state), strict=True))
        contents = _Contents(
            {name: _table(tree) for name, tree in trees.items()},
            None if metrics is None else {name: float(value) for name, value in metrics.items()},
        )
        documents = {"cursor": cursor, "config": config, "contents": contents._asdict()}
        # Copied now: the run goes on changing its cursor while the files are written.
        items = {name: ocp.args.JsonSave(json.loads(json.dumps(value))) for name, value in documents.items()}
        items |= {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        self._contents[step] = contents
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Return when everything saved so far is on disk; raise what went wrong in writing it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and free threads and files."""
        self._manager.close()

    def latest_step(self) -> int | None:
        """Highest step with a whole checkpoint; None without any."""
        self.wait()
        return next(
            (step for step in sorted(self._manager.all_steps(), reverse=True) if self._whole(step)), None
        )

    def best_step(self) -> int | None:
        """Step of the whole checkpoint with the lowest finite ``metrics["loss"]``; None without any."""
        self.wait()
        return self._best_of(self._manager.all_steps())

    def _best_of(self, steps: Sequence[int]) -> int | None:
        losses = [(contents.loss, step) for step in steps if (contents := self._whole(step))]
        return min(((loss, step) for loss, step in losses if math.isfinite(loss)), default=(0.0, None))[1]

    def restore(self, step: int, *, params: Any = None, lora: Any = None, opt_state: Any = None) -> Restored:
        """Read the trees for which a template is given, and nothing else.

        A template is a tree of ``jax.ShapeDtypeStruct`` or of arrays; each leaf comes back with the
        template's sharding, on whatever devices (without one, on the first).

        Raises:
            InputError: there is no such checkpoint, it cannot be read, or a template's leaves differ
                from what was saved in path, shape or dtype: the first such leaf is named.
        """
        templates = Restored(params, lora, opt_state)._asdict()
        tables = self._require(step).leaves
        for name, template in templates.items():
            if template is not None:
                self._check_leaves(step, name, tables[name], _table(template))
        wanted = {name: jax.tree.map(_abstract, tree) for name, tree in templates.items() if tree is not None}
        filled = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items() if tables[name]}
        return Restored(**{**wanted, **self._read(step, filled)})

    def read_cursor(self, step: int) -> dict[str, Any]:
        """The ``cursor`` saved with a step. Raises InputError as :meth:`restore` does."""
        self._require(step)
        return self._read(step, {"cursor": ocp.args.JsonRestore()})["cursor"]

    def read_config(self, step: int) -> dict[str, Any]:
        """The ``config`` saved with a step. Raises InputError as :meth:`restore` does."""
        self._require(step)
        return self._read(step, {"config": ocp.args.JsonRestore()})["config"]

    def _make_writable(self) -> None:
        if self._writable:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for leftover in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(leftover)
        self._writable = True

    def _whole(self, step: int) -> "_Contents | None":
        """What a checkpoint holds; None where there is none, or not a whole one."""
        if step not in self._manager.all_steps():
            return None
        if step not in self._contents:
            try:
                self._contents[step] = self._check_whole(step)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._contents[step] = None
                _logger.warning(
                    "Checkpoint %s is incomplete and is ignored (%s).", self._path(step), _line(error)
                )
        return self._contents[step]

    def _check_whole(self, step: int) -> "_Contents":
        items = {name: ocp.args.JsonRestore() for name in ("contents", "cursor", "config")}
        contents = _Contents(**self._manager.restore(step, args=ocp.args.Composite(**items))["contents"])
        for name in TREES:
            if contents.leaves[name]:
                _read_through(self._path(step) / name)
        return contents

    def _require(self, step: int) -> "_Contents":
        self.wait()
        contents = self._whole(step)
        if contents is None:
            steps = [step for step in sorted(self._manager.all_steps()) if self._whole(step)]
            raise InputError(
                f"{self._folder} has no whole checkpoint of step {step}; it has {steps or 'none'}"
            )
        return contents

    def _read(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        if not items:
            return {}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._path(step)} cannot be read ({_line(error)}); delete it to go on from an earlier one"
            ) from error

    def _check_leaves(self, step: int, name: str, saved: dict[str, str], here: dict[str, str]) -> None:
        for path in sorted(saved.keys() | here.keys()):
            if saved.get(path) != here.get(path):
                raise InputError(
                    f"{self._path(step)} does not fit the model: {name}/{path} is {saved.get(path, 'absent')} "
                    f"there and {here.get(path, 'absent')} here; use the configuration it was made with"
                )

    def _path(self, step: int) -> Path:
        return self._folder / str(step)


class _Contents(NamedTuple):
    leaves: dict[str, dict[str, str]]
    """Tree -> path of a leaf -> dtype and shape."""
    metrics: dict[str, float] | None

    @property
    def loss(self) -> float:
        return math.nan if self.metrics is None else self.metrics["loss"]


@dataclass
class _LatestAndBest:
    """A preservation policy: which checkpoints outlive the next save."""

    best_of: Callable[[Sequence[int]], int | None] | None
    """Picks the best of some steps; None to keep the latest alone."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self.best_of(steps) if self.best_of else None
        # The latest is the last one saved, also where a torn one of a higher step lies about.
        return [step in (steps[-1], best) for step in steps]


def _table(tree: Any) -> dict[str, str]:
    """Path of each leaf -> dtype and shape."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_through(item: Path) -> None:
    """Read every stored byte of an item once: a missing or cut file shows, and nothing else does."""
    store = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}
    ).result()
    for key in store.list().result():
        store.read(key).result()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep Orbax's progress notes off the console; its errors still show."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname

    absl_logger = logging.getLogger("absl")
    absl_logger.addFilter(is_wanted)
    try:
        yield
    finally:
        absl_logger.removeFilter(is_wanted)
