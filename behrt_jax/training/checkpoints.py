"""Checkpoints of a run: the latest and the best, each item restorable alone.

A step's folder holds, as separate Orbax items, the trees ``params``, ``lora`` and ``opt_state``, the
JSON values ``cursor`` and ``config``, and ``contents``: the metrics, and path, dtype and shape of
every leaf. A tree without leaves has no item. Opening changes nothing on disk, so that a run in
progress can be read; leftovers of a killed run are removed by the first save.

Source: Orbax (https://orbax.readthedocs.io), its v0 ``CheckpointManager``.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from behrt_jax.errors import InputError
from behrt_jax.training.checkpoint_contents import (
    UNREADABLE,
    Contents,
    ContentsOnDisk,
    LatestAndBest,
    abstract,
    compare_leaves,
    first_line,
    leaf_table,
    quiet_orbax,
)

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

TREES = ("params", "lora", "opt_state")


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
    with quiet_orbax():
        checkpoints = Checkpoints(folder.absolute(), keep_best)
        try:
            yield checkpoints
        finally:
            checkpoints.close()


class Checkpoints:
    """Save and restore; see :func:`open_checkpoints`, which makes one.

    Steps are numbers of updates. A torn checkpoint (an empty or half-copied folder) counts as
    absent: a warning is logged, and the one before it is the latest.
    """

    def __init__(self, folder: Path, keep_best: bool):
        self._folder = folder
        self._on_disk = ContentsOnDisk(folder, self._read_json)
        self._prepared = False
        self._keep_best = keep_best

    @cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        """Orbax is slow to import: it is when there is something to read or to save."""
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=LatestAndBest(self._on_disk.best_of if self._keep_best else None),
            # Where a folder cannot be made in the background, threads wait for it for minutes and keep
            # the process from ending.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._folder, options=options)

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

        ``params``, ``lora`` and ``opt_state`` are trees of arrays, on any mesh; ``cursor`` (where the
        run is) and ``config`` (what it was made with) must be ready for JSON. ``metrics``, with a
        ``loss``, come from a validation at this step; without them the checkpoint can be the latest
        but never the best. A step that is saved already stays as it is, unless it had no metrics and
        now has: then it is replaced.

        Raises:
            TypeError: cursor or config is not fit for JSON.
        """
        import orbax.checkpoint as ocp

        self.wait()
        exists = step in self._manager.all_steps()
        if (
            exists
            and self._on_disk.is_whole(step)
            and (metrics is None or self._on_disk.contents(step).metrics is not None)
        ):
            return
        trees = dict(zip(TREES, (params, lora, opt_state), strict=True))
        contents = Contents(
            {name: leaf_table(tree) for name, tree in trees.items()},
            None if metrics is None else {name: float(value) for name, value in metrics.items()},
        )
        documents = {"cursor": cursor, "config": config, "contents": contents._asdict()}
        # Copied now: the run goes on changing its cursor while the files are written.
        items = {name: ocp.args.JsonSave(json.loads(json.dumps(value))) for name, value in documents.items()}
        items |= {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if contents.leaves[name]}
        self._prepare_folder()
        if exists:
            self._manager.delete(step)
        self._on_disk.record(step, contents)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Return when everything saved so far is on disk; raise what went wrong in writing it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and free threads and files."""
        if "_manager" in self.__dict__:
            self._manager.close()

    def latest_step(self) -> int | None:
        """Highest step with a whole checkpoint; None without any."""
        self.wait()
        return next(filter(self._on_disk.is_whole, sorted(self._manager.all_steps(), reverse=True)), None)

    def best_step(self) -> int | None:
        """Step of the whole checkpoint with the lowest finite ``metrics["loss"]``; None without any."""
        self.wait()
        return self._on_disk.best_of(self._manager.all_steps())

    def restore(self, step: int, *, params: Any = None, lora: Any = None, opt_state: Any = None) -> Restored:
        """Read the trees for which a template is given, and nothing else.

        A template is a tree of ``jax.ShapeDtypeStruct`` or of arrays; each leaf comes back with the
        template's sharding, on whatever devices (without one, on the first).

        Raises:
            InputError: there is no such checkpoint, it cannot be read, or a template's leaves differ
                from what was saved in path, shape or dtype: the first such leaf is named.
        """
        import orbax.checkpoint as ocp

        templates = Restored(params, lora, opt_state)._asdict()
        wanted = {name: jax.tree.map(abstract, tree) for name, tree in templates.items() if tree is not None}
        with self._reading(step):
            saved = self._on_disk.contents(step).leaves
        for name, tree in wanted.items():
            where = f"{self._folder / str(step)} does not fit the model: {name}"
            compare_leaves(where, saved[name], leaf_table(tree))
        filled = {name: tree for name, tree in wanted.items() if saved[name]}
        with self._reading(step):
            self._on_disk.check_arrays(step, filled)
            items = {name: ocp.args.StandardRestore(tree) for name, tree in filled.items()}
            found = self._manager.restore(step, args=ocp.args.Composite(**items)) if items else {}
        return Restored(**{**wanted, **dict(found.items())})

    def read_cursor(self, step: int) -> dict[str, Any]:
        """The ``cursor`` saved with a step; raises InputError where it cannot be read."""
        with self._reading(step):
            return self._read_json(step, "cursor")

    def read_config(self, step: int) -> dict[str, Any]:
        """The ``config`` saved with a step; raises InputError where it cannot be read."""
        with self._reading(step):
            return self._read_json(step, "config")

    def _prepare_folder(self) -> None:
        """Before the first save: the folder exists, without half-written leftovers."""
        if self._prepared:
            return
        import orbax.checkpoint as ocp

        self._folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for leftover in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(leftover)
        self._prepared = True

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        self.wait()
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise InputError(f"{self._folder} has no checkpoint of step {step}; it has {steps or 'none'}")
        try:
            yield
        except UNREADABLE as error:
            path, reason = self._folder / str(step), first_line(error)
            raise InputError(f"{path} is damaged ({reason}); use a checkpoint of another step") from error

    def _read_json(self, step: int, name: str) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        return self._manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore()}))[name]
