"""Checkpoints of a run: the latest and the best, each item restorable alone.

A step's folder holds, as separate Orbax items, the trees ``params``, ``lora`` and ``opt_state``, the
JSON values ``cursor`` and ``config``, and ``contents``: the metrics, and path, dtype and shape of
every leaf. A tree without leaves has no item. ``files.json`` has size and SHA-256 of each file: it is
written before the step's folder gets its name, and what is read is compared with it. Opening changes nothing
on disk, so that a run in progress can be read; leftovers of a killed run are removed by the first save.

Source: Orbax (https://orbax.readthedocs.io), its v0 ``CheckpointManager``.
"""

import json
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from behrt_jax.errors import InputError
from behrt_jax.files import (
    JsonObject,
    check_files,
    check_room,
    digests_of,
    is_record,
    read_json,
    say_unrecorded,
    sealed,
    write_json,
)
from behrt_jax.models.stacked_layers import Tree

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


UNREADABLE = (OSError, ValueError, KeyError, TypeError)
"""Errors that Orbax and the file system raise on a checkpoint that is damaged."""

FILES_FILE, ORBAX_METADATA = "files.json", "_CHECKPOINT_METADATA"

_logger = logging.getLogger(__name__)


class Contents(NamedTuple):
    """The item ``contents`` of one step."""

    leaves: dict[str, dict[str, str]]
    """Tree -> path of a leaf -> dtype and shape."""
    metrics: dict[str, float] | None

    @property
    def loss(self) -> float:
        """Validation loss in nats; NaN where there was no validation."""
        return math.nan if self.metrics is None else self.metrics["loss"]


class ContentsOnDisk:
    """The contents of each step in a folder, read when first asked for."""

    def __init__(self, folder: Path, plain: Path, read_json: Callable[[int, str], JsonObject]):
        """`plain` is the path for libraries, `read_json` reads a JSON item of a step by its name."""
        self._folder, self._plain = folder, plain
        self._read_json = read_json
        self._contents: dict[int, Contents] = {}
        self._whole: dict[int, bool] = {}

    def record(self, step: int, contents: Contents) -> None:
        """A step is being written with these contents: it need not be read."""
        self._contents[step], self._whole[step] = contents, True

    def contents(self, step: int) -> Contents:
        """Contents of a step; raises one of `UNREADABLE` where they cannot be read."""
        if step not in self._contents:
            self._contents[step] = Contents(**self._read_json(step, "contents"))
        return self._contents[step]

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The whole step with the lowest finite loss, the earlier of equals; None without any."""
        losses = [(self._contents[step].loss, step) for step in steps if self.is_whole(step)]
        return min(((loss, step) for loss, step in losses if math.isfinite(loss)), default=(0.0, None))[1]

    def is_whole(self, step: int) -> bool:
        """Tell whether all of this step's folder can be read: found out once, a warning logged if not."""
        if step not in self._whole:
            try:
                self._read_json(step, "cursor")
                self._read_json(step, "config")
                self.check_arrays(step, self.contents(step).leaves)
                self._whole[step] = True
            except UNREADABLE as error:
                self._whole[step] = False
                path = self._folder / str(step)
                _logger.warning("Checkpoint %s is damaged and ignored (%s).", path, first_line(error))
        return self._whole[step]

    def check_arrays(self, step: int, trees: Iterable[str]) -> None:
        """Check the files of these trees, unless the step is known to be whole.

        Raises one of `UNREADABLE` where one is damaged.
        """
        if self._whole.get(step):
            return
        folder = self._folder / str(step)
        for name in trees:
            if (folder / FILES_FILE).is_file():
                self.check_files(step, name)
            else:
                _read_through(self._plain / str(step) / name, len(self.contents(step).leaves[name]))

    def check_files(self, step: int, item: str) -> None:
        """Compare the files of an item with their digests; raises ValueError where one is damaged."""
        folder = self._folder / str(step)
        if not (folder / FILES_FILE).is_file():
            return say_unrecorded(self._folder.parent)
        record = read_json(folder / FILES_FILE)
        if not is_record(record):
            raise ValueError(f"{FILES_FILE} is not what was written")
        files = {name: one for name, one in record["files"].items() if name.startswith(f"{item}/")}
        return check_files(folder, files, "it is not what was written", at_most=None)


@dataclass
class LatestAndBest:
    """A preservation policy of Orbax: which checkpoints outlive the save that is under way."""

    best_of: Callable[[Sequence[int]], int | None] | None
    """Picks the best of some steps; None to keep the latest alone."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, whether to keep it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self.best_of(steps) if self.best_of else None
        # The latest is the one saved last, also where a torn one of a higher step lies about.
        return [step in (steps[-1], best) for step in steps]


def leaf_table(tree: Any) -> dict[str, str]:
    """Path of each leaf -> dtype and shape."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def compare_leaves(where: str, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raise InputError, which names the first leaf, where two tables of leaves differ."""
    for path in sorted(saved.keys() | here.keys()):
        if saved.get(path) != here.get(path):
            raise InputError(
                f"{where}/{path} is {saved.get(path, 'absent')} there and {here.get(path, 'absent')} here; "
                "use the configuration it was made with"
            )


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a leaf; the first device where it has no sharding."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def first_line(error: Exception) -> str:
    """The message of an error, in one line of at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax's progress notes off the console; its errors still show."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname

    absl_logger = logging.getLogger("absl")
    absl_logger.addFilter(is_wanted)
    _hush_failed_writes()
    try:
        yield
    finally:
        absl_logger.removeFilter(is_wanted)


def _hush_failed_writes() -> None:
    """From now on, tell a write that failed by its exception alone.

    Orbax logs it as well, from threads that may outlive the run, and what was to be written beside it
    complains of an event loop that is closed or a task that nobody asks for.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_failed_write)
    shown = sys.unraisablehook
    if shown is sys.__unraisablehook__:
        sys.unraisablehook = lambda args: str(args.exc_value) == "Event loop is closed" or shown(args)


def _is_no_failed_write(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not ("orbax" in record.pathname or "orbax" in record.getMessage())


def _read_through(item: Path, leaves: int) -> None:
    """Read every stored value of a tree once; a file that is missing or cut is an error here."""
    if not leaves:
        return
    import tensorstore

    base = {"driver": "file", "path": f"{item}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    if (
        not all(store.read(key).result().value for key in keys)
        or sum(key.endswith(b"/.zarray") for key in keys) != leaves
    ):
        raise ValueError(f"array data of {item.name} is missing")


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
        checkpoints = Checkpoints(folder.resolve(), keep_best)
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
        self._link: tempfile.TemporaryDirectory[str] | None = None
        self._plain = self._plain_path()
        self._on_disk = ContentsOnDisk(folder, self._plain, self._read_json)
        self._prepared = False
        self._keep_best = keep_best

    @cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        """Orbax is slow to import: it is when there is something to read or to save."""
        import orbax.checkpoint as ocp

        def record_files() -> None:
            """Called once all files of a step are written, before their folder gets its name."""
            if jax.process_index() == 0:
                [folder] = self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")
                files = digests_of(folder)
                files.pop(ORBAX_METADATA, None)  # gets the time of its completion yet
                write_json(folder / FILES_FILE, sealed({"files": files}))

        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=LatestAndBest(self._on_disk.best_of if self._keep_best else None),
            # Where a folder cannot be made in the background, threads wait for it for minutes and keep
            # the process from ending.
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False, post_finalization_callback=record_files
            ),
        )
        return ocp.CheckpointManager(self._plain, options=options)

    def _plain_path(self) -> Path:
        """The folder, by a link where its path has what Orbax takes for a pattern or tensorstore for `/`."""
        if not re.search(r"[][*?\\]", str(self._folder)):
            return self._folder
        self._link = tempfile.TemporaryDirectory(prefix="checkpoints-")
        link = Path(self._link.name) / "checkpoints"
        link.symlink_to(self._folder, target_is_directory=True)
        return link

    def save(
        self,
        step: int,
        params: Tree,
        lora: Tree,
        opt_state: Any,
        cursor: JsonObject,
        config: JsonObject,
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
            OSError: the disk has no room for it; what is there stays.
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
        check_room(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)), "a checkpoint")
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
        if self._link is not None:
            self._link.cleanup()

    def latest_step(self) -> int | None:
        """Highest step with a whole checkpoint; None without any."""
        self.wait()
        return next(filter(self._on_disk.is_whole, sorted(self._manager.all_steps(), reverse=True)), None)

    def best_step(self) -> int | None:
        """Step of the whole checkpoint with the lowest finite ``metrics["loss"]``; None without any."""
        self.wait()
        return self._on_disk.best_of(self._manager.all_steps())

    def refuse_damaged(self) -> None:
        """For a reader of the best checkpoint, which would take another one where it cannot be read.

        Raises:
            InputError: one of the checkpoints is damaged.
        """
        for step in self._manager.all_steps():
            if not self._on_disk.is_whole(step):
                raise InputError(
                    f"{self._folder / str(step)} is damaged: bring it back from a copy, or delete it, so "
                    "that another checkpoint of the run is taken."
                )

    def remove_older(self) -> None:
        """Remove what is neither the latest nor the best, as a process that died in a save may leave it."""
        self._prepare_folder()
        kept = {self.latest_step(), self.best_step() if self._keep_best else None}
        for step in set(self._manager.all_steps()) - kept:
            self._manager.delete(step)

    def restore(
        self, step: int, *, params: Tree | None = None, lora: Tree | None = None, opt_state: Any = None
    ) -> Restored:
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

    def read_cursor(self, step: int) -> JsonObject:
        """The ``cursor`` saved with a step; raises InputError where it cannot be read."""
        with self._reading(step):
            return self._read_json(step, "cursor")

    def read_config(self, step: int) -> JsonObject:
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

    def _read_json(self, step: int, name: str) -> JsonObject:
        import orbax.checkpoint as ocp

        self._on_disk.check_files(step, name)
        return self._manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore()}))[name]
