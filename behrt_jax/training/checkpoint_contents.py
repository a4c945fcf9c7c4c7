"""What the checkpoints of a run hold on disk, whether all of it can be read, and which of them to keep.

Orbax lists a step as soon as its folder has the right name. Here every item is read once before the
step counts, and each tree is compared leaf by leaf with the one that is to take its place.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from behrt_jax.errors import InputError

UNREADABLE = (OSError, ValueError, KeyError, TypeError)
"""What Orbax and the file system raise on a checkpoint that is damaged."""

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

    def __init__(self, folder: Path, read_json: Callable[[int, str], dict[str, Any]]):
        """`read_json` reads a JSON item of a step by its name."""
        self._folder = folder
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
        """Can everything in this step's folder be read? Found out once, and a warning logged if not."""
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
        """Read these trees through, unless the step is known to be whole.

        Raises one of `UNREADABLE` where one is damaged.
        """
        if not self._whole.get(step):
            for name in trees:
                _read_through(self._folder / str(step) / name, len(self.contents(step).leaves[name]))


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
    """What an error says, in one line of at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax's progress notes off the console; its errors still show."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname

    absl_logger = logging.getLogger("absl")
    absl_logger.addFilter(is_wanted)
    try:
        yield
    finally:
        absl_logger.removeFilter(is_wanted)


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
