"""Batches on their way to the steps: rows gathered on the device, or read ahead by the host.

Both give the same batches, a pure function of the step. Where the tokens lie on the device, many steps are
one call of a compiled program, and the host hands over nothing but the rows of each epoch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from behrt_jax.config.training import TrainConfig
from behrt_jax.data.batches import (
    Batch,
    EpochRows,
    RowBatches,
    TrainingBatches,
    ValidationBatches,
    reading_ahead,
)
from behrt_jax.data.events import DAY
from behrt_jax.data.facts import FACT_VISIT
from behrt_jax.data.questions import QuestionBatches
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS
from behrt_jax.errors import InputError
from behrt_jax.training.devices import own_rows, put_rows, replicated, split_rows
from behrt_jax.training.loop import Feed, Schedule
from behrt_jax.training.state import Assembly
from behrt_jax.training.step import Step, Totals, TrainState

MOST_TOKENS = np.iinfo(np.int32).max
"""More cannot be numbered in int32, the widest integer of a device by default."""


class Tokens(NamedTuple):
    """Each token of a split, as a batch has it."""

    codes: Any
    """int32 ``[tokens]``."""
    ages: Any
    """float32 ``[tokens]``."""
    visits: Any
    """int32 ``[tokens]``."""
    days: Any
    """int32 ``[tokens]``."""
    facts: Any = None
    """int32 ``[facts]``, codes of static facts; None where the model reads none."""


def tokens_of(sequences: Sequences) -> Tokens:
    """Flat host arrays, ready to be put on a device; not copied where they have their dtype."""
    return Tokens(
        np.asarray(sequences.codes, np.int32),
        np.asarray(sequences.ages, np.float32),
        np.asarray(sequences.visits, np.int32),
        (sequences.times // DAY).astype(np.int32),
        None if sequences.facts is None else np.asarray(sequences.facts.codes, np.int32),
    )


def device_bytes(batches: TrainingBatches) -> int:
    """Bytes of the tokens and of the rows of two epochs, the one that is trained on and the next."""
    facts = batches.sequences.facts
    segments = (8 if facts is None else 16) * batches.windows_per_epoch
    rows = 4 * (batches.rows + 1 + batches.steps_per_epoch * batches.batch_rows)
    tokens = 16 * len(batches.sequences.codes) + (0 if facts is None else 4 * len(facts.codes))
    return tokens + 2 * (segments + rows)


def gather_on_device(
    tokens: Tokens, epoch: EpochRows, rows: jax.Array, *, row_length: int, cls_token: bool, most_segments: int
) -> Batch:
    """Copy the tokens of some rows of an epoch into a batch ``[rows, row_length]``, inside a jitted function.

    Args:
        tokens: of the split, on the device.
        epoch: what is in its rows, on the device; `epoch.rows` and `epoch.first_step` are not read.
        rows: int32 ``[rows]``, row indices of the epoch; -1 gives an empty row.
        row_length: tokens of a row; no row of the epoch holds more.
        cls_token: put [CLS] before each segment, with the age and visit of its first event. Static facts come
            next, where the epoch has any: see `data.batches.gather_rows`.
        most_segments: segments of the fullest row, or more.
    """
    row = jnp.maximum(rows, 0)  # [B]
    first = epoch.offsets[row]  # [B]
    count = jnp.where(rows < 0, 0, epoch.offsets[row + 1] - first)  # [B]
    slots = jnp.arange(most_segments, dtype=jnp.int32)[None]  # [1, S]
    held = slots < count[:, None]  # [B, S]
    segment = jnp.where(held, first[:, None] + slots, 0)  # [B, S]
    before: Any = int(cls_token)  # tokens before the first event, [B, S] where there are facts
    if epoch.fact_lengths is not None:
        before = epoch.fact_lengths[segment] + before
    lengths = jnp.where(held, epoch.lengths[segment] + before, 0)  # [B, S]
    starts = epoch.starts[segment]  # [B, S]

    ends = jnp.cumsum(lengths, axis=1)  # [B, S]
    cells = jnp.arange(row_length, dtype=jnp.int32)  # [L]
    # A cell is in the slot that follows all those that end before or at it.
    slot = jax.vmap(lambda e: jnp.searchsorted(e, cells, side="right", method="scan_unrolled"))(
        ends
    )  # [B, L]
    used = cells[None] < ends[:, -1:]  # [B, L]
    at = jnp.minimum(slot, most_segments - 1)  # [B, L]
    position = cells[None] - jnp.take_along_axis(ends - lengths, at, axis=1)  # [B, L]
    before = before if epoch.fact_lengths is None else jnp.take_along_axis(before, at, axis=1)  # [B, L]
    token = jnp.take_along_axis(starts, at, axis=1) + jnp.maximum(position - before, 0)
    token = jnp.where(used, token, 0)  # [B, L]

    codes, visits = tokens.codes[token], tokens.visits[token]
    if epoch.fact_starts is not None:
        is_fact = used & (position >= int(cls_token)) & (position < before)  # [B, L]
        fact = jnp.take_along_axis(epoch.fact_starts[segment], at, axis=1) + position - int(cls_token)
        codes = jnp.where(is_fact, tokens.facts[jnp.where(is_fact, fact, 0)], codes)
        visits = jnp.where(is_fact, FACT_VISIT, visits)
    if cls_token:
        codes = jnp.where(position == 0, CLS, codes)

    def or_padding(values: jax.Array) -> Any:
        return jnp.where(used, values, jnp.zeros_like(values))  # [B, L]; PAD is 0

    return Batch(
        codes=or_padding(codes),
        ages=or_padding(tokens.ages[token]),
        visits=or_padding(visits),
        days=or_padding(tokens.days[token]),
        positions=or_padding(position),
        segment_ids=or_padding(slot + 1),
        row_ids=rows,  # pyright: ignore[reportArgumentType]
    )


AHEAD = 2
"""Batches that are copied to the devices before they are asked for."""
DATA_SHARE = 0.25
"""Of a device's free memory, how much data may take: the rest is for the model and its activations."""
KEPT_IN_HOST_MEMORY = 256 * 2**20
"""Bytes of batches that are kept where the device is the host."""


def place_batch(batches: RowBatches, step: int, mesh: Mesh) -> Any:
    """Gather the batch of a step and put it on the devices, rows split; returns before the copy is done.

    Where several processes share the mesh, each gathers the rows of its own devices alone.
    """
    rows = batches.batch_rows
    return put_rows(batches.batch(step, own_rows(rows, mesh)), mesh, rows)


def one_step(assembly: Assembly, step: Step) -> Any:
    """The program of one step on a batch that the host has put on the devices; see :func:`open_feed`."""

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Totals]:
        return _stacked(step(state, batch))

    return assembly.jit(train_step)


def open_feed(
    config: TrainConfig,
    assembly: Assembly,
    step: Step,
    program: Any,
    batches: TrainingBatches | QuestionBatches,
    first_step: int,
    schedule: Schedule,
) -> AbstractContextManager[Feed]:
    """Choose how the steps are fed. What was begun in the background ends with the context.

    Args:
        config: `data_on_device` and `steps_per_call`.
        assembly: of the run; a batch is split over its devices by rows, tokens are on each.
        step: a train step of `assembly`, not jitted.
        program: :func:`one_step` of it, used where the host reads the batches.
        batches: of the train split.
        first_step: where the run begins or goes on.
        schedule: of the run; no call goes past a validation.

    Raises:
        InputError: the data cannot be on the device, although it should.
    """
    steps = range(first_step, schedule.total_steps)
    if isinstance(batches, QuestionBatches) or not on_device(config, batches, assembly.mesh):
        return from_host(program, batches, assembly.mesh, steps)
    length = call_length(_stretches(steps, schedule), config.steps_per_call or config.log_every)
    return _from_device(assembly, step, batches, steps, length)


def _stretches(steps: range, schedule: Schedule) -> np.ndarray:
    """Numbers of steps that follow each other without a validation or a new epoch, int64 `[stretches]`."""
    every = (schedule.validate_every, schedule.steps_per_epoch)
    stops = [stop for n in every for stop in range(n * (steps.start // n + 1), steps.stop, n)]
    return np.diff(np.unique([steps.start, *stops, max(steps.start, steps.stop)]))


def call_length(stretches: np.ndarray, most: int) -> int:
    """Steps of a call, 1 to `most`, with which the stretches of a run take the fewest calls.

    Args:
        stretches: integers `[stretches]`, steps that follow each other without a stop. A rest that is shorter
            than a call is done in calls of one step.
        most: largest answer.
    """
    lengths, counts = np.unique(stretches, return_counts=True)
    calls = [((lengths // n + lengths % n) * counts).sum() for n in range(1, most + 1)]
    return 1 + int(np.argmin(calls))


def fits(needed: int, mesh: Mesh) -> bool:
    """Tell whether so many bytes on each device leave enough of its memory free; False where unknown."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    return all(s and needed <= DATA_SHARE * (s["bytes_limit"] - s["bytes_in_use"]) for s in stats)


def on_device(config: TrainConfig, batches: TrainingBatches | QuestionBatches, mesh: Mesh) -> bool:
    """Tell whether batches are gathered on the device; questions are drawn by the host.

    Raises:
        InputError: the data cannot be on the device, although it should.
    """
    if config.data_on_device == "no" or isinstance(batches, QuestionBatches):
        return False
    possible = len(batches.sequences.codes) <= MOST_TOKENS
    if config.data_on_device == "auto":
        # On a CPU nothing is won: tokens lie in the same memory either way, and steps one by one took no
        # longer than the same steps in a loop.
        fitting = possible and fits(device_bytes(batches), mesh)
        # All processes run the same program.
        return bool(np.all(multihost_utils.process_allgather(np.array(fitting))))
    if not possible:
        raise InputError(
            f"train.data_on_device is yes, but the train split has {len(batches.sequences.codes):,} tokens, "
            f"more than the {MOST_TOKENS:,} that a device can number: give auto or no."
        )
    return True


@contextmanager
def from_host(program: Any, batches: RowBatches, mesh: Mesh, steps: range) -> Iterator[Feed]:
    """The host reads the batches ahead of their steps; arguments as in :func:`open_feed`."""

    def read(number: int) -> tuple[Any, int]:
        return place_batch(batches, number, mesh), batches.tokens(number)

    with reading_ahead(map(read, steps), AHEAD) as ahead:

        def next_inputs(number: int, limit: int) -> tuple[Any, Sequence[int]]:
            batch, tokens = next(ahead)
            return batch, [tokens]

        yield Feed(next_inputs, program, (program,))


@contextmanager
def _from_device(
    assembly: Assembly, step: Step, batches: TrainingBatches, steps: range, length: int
) -> Iterator[Feed]:
    mesh, per_epoch = assembly.mesh, batches.steps_per_epoch
    tokens = _put_on_each(tokens_of(batches.sequences), mesh)

    def next_step(state: TrainState, data: Any) -> tuple[TrainState, Totals]:
        tokens, epoch = data
        rows = jax.lax.with_sharding_constraint(epoch.rows[state.step - epoch.first_step], split_rows(mesh))
        batch = gather_on_device(
            tokens,
            epoch,
            rows,
            row_length=batches.row_length,
            cls_token=batches.cls_token,
            most_segments=batches.most_segments,
        )
        return step(state, jax.lax.with_sharding_constraint(batch, split_rows(mesh)))

    one = assembly.jit(lambda state, data: _stacked(next_step(state, data)))
    many = assembly.jit(
        lambda state, data: jax.lax.scan(lambda s, _: next_step(s, data), state, length=length)
    )

    def read(epoch: int) -> tuple[int, Any, list[int]]:
        rows, counts = batches.epoch_rows(epoch)
        return epoch, _put_on_each(rows, mesh), counts.tolist()

    epochs = range(steps.start // per_epoch, -(-steps.stop // per_epoch))
    with reading_ahead(map(read, epochs), 1) as ahead:
        current = None

        def next_inputs(number: int, limit: int) -> tuple[Any, Sequence[int]]:
            nonlocal current
            epoch, index = divmod(number, per_epoch)
            while current is None or current[0] < epoch:
                current = next(ahead)
            count = length if length <= min(limit, per_epoch - index) else 1
            return (count, (tokens, current[1])), current[2][index : index + count]

        def train_step(state: TrainState, inputs: Any) -> tuple[TrainState, Totals]:
            count, data = inputs
            return (one if count == 1 else many)(state, data)

        yield Feed(next_inputs, train_step, (one, many))


def _put_on_each(tree: Any, mesh: Mesh) -> Any:
    """Copy host arrays to every device, whole; returns before the copy is done."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # device_put would first compare what the processes have, and wait for all of them.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: np.asarray(x[i])), tree
    )


def _stacked(result: tuple[TrainState, Totals]) -> tuple[TrainState, Totals]:
    """The result of one step as that of a scan over one."""
    state, metrics = result
    return state, jax.tree.map(lambda x: x[None], metrics)


class PlacedBatches:
    """Validation batches on the devices; those that fit stay there from the first pass on."""

    def __init__(self, batches: ValidationBatches, mesh: Mesh):
        """Nothing is read yet."""
        self._batches, self._mesh = batches, mesh
        self._kept: list[Batch] | None = None
        needed = len(batches) * batches.batch_rows * (6 * batches.row_length + 1) * 4
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._keep = needed <= KEPT_IN_HOST_MEMORY if on_cpu else fits(needed, mesh)

    def __iter__(self) -> Iterator[Batch]:
        """The batches in order, rows split over the devices."""
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[Batch]:
        placed = []
        batches, mesh = self._batches, self._mesh
        put: Iterable[Batch] = (place_batch(batches, index, mesh) for index in range(len(batches)))
        with reading_ahead(put, AHEAD) as ahead:
            for batch in ahead:
                if self._keep:
                    placed.append(batch)
                yield batch
        if self._keep:
            self._kept = placed
