"""Several processes that train as one: they find each other, share what one of them knows, and end together.

Each runs the same recipe; whatever computes on the mesh, or saves a checkpoint, is done by all of them in the
same order. The first one alone counts baselines and writes logs, reports and adapters (:func:`is_first`).

Source: JAX's distributed runtime (https://docs.jax.dev/en/latest/multi_process.html), whose coordination
service in the first process also carries what is said here: small texts, each under a name of its own.
"""

import itertools
import json
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # what multihost_utils and Orbax use, too: JAX has no public name for it
from jax.sharding import Mesh

from behrt_jax.config.training import DistributedConfig
from behrt_jax.errors import PEER_LOST, InputError
from behrt_jax.files import JsonObject
from behrt_jax.tracking.console import tell
from behrt_jax.training.devices import replicated, split_rows
from behrt_jax.training.loop import IN_FLIGHT, Interruption

FOREVER = 10**9
"""Milliseconds; the end of another process ends a wait before."""
START = 300
"""Seconds in which all processes must have been started."""
GRACE = 2.0
"""Seconds in which a process tells its own error, if it has one, before it is ended by that of another."""
_ENDED = "behrt_jax/ended"
"""Name under which is said that a process has ended before the others, and which; empty at the common end."""

_ALIVE = "behrt_jax/alive"
"""Under which each process counts on while it lives."""

_numbers = itertools.count()


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or the first of several."""
    return jax.process_index() == 0


@contextmanager
def together(config: DistributedConfig) -> Iterator[None]:
    """Join the other processes, before JAX starts its devices, and end with them.

    Where one of them ends before, by an error or a signal that kills it, this one ends as well: it says which
    one it was in a line on standard error, and exits with status `errors.PEER_LOST`. An error of this one
    ends it likewise, with its own line and status: where there are others it is not raised. A process joins
    once.

    Args:
        config: who the processes are; without `auto` and `coordinator` this one stays alone, or with those
            that the caller has joined by ``jax.distributed.initialize``.

    Raises:
        InputError: the settings do not fit together, or no cluster is found.
    """
    if not _join(config):
        yield
        return
    service, ending = _service(), threading.Event()
    listener = threading.Thread(target=_listen, args=(service, ending), daemon=True)
    listener.start()
    threading.Thread(target=_beat, args=(service, ending, config.timeout), daemon=True).start()
    try:
        yield
        service.wait_at_barrier(f"behrt_jax/end/{next(_numbers)}", FOREVER)
        ending.set()
        if is_first():
            service.key_value_set(_ENDED, "")
        listener.join()
        jax.distributed.shutdown()
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # So a sum over devices fails where another process is gone: which one it was is told soon.
            listener.join(2 * config.timeout + 30)
        ending.set()
        _say_ended(service, f"{_name()} has ended ({type(error).__name__}): see what it said")
        status = tell(error)
        if is_first():
            time.sleep(2 * GRACE)  # the service, by which the others hear of it, ends with this process
        os._exit(status)  # at another exit JAX would wait for the others, which do not come


def _join(config: DistributedConfig) -> bool:
    """Initialise JAX's distributed runtime as the settings say; False where they ask for none."""
    given = {name: getattr(config, name) for name in ("coordinator", "processes", "process")}
    if not config.auto and not any(value is not None for value in given.values()):
        return False
    if config.timeout < 5:
        raise InputError(f"distributed.timeout is {config.timeout:g} seconds: give 5 or more.")
    if config.auto and any(value is not None for value in given.values()):
        raise InputError(
            "--distributed auto finds the processes by itself: leave out auto, or distributed.coordinator, "
            "distributed.processes and distributed.process."
        )
    if not config.auto:
        for name, value in given.items():
            if value is None:
                raise InputError(
                    f"distributed.{name} is missing: give distributed.coordinator HOST:PORT (of the first "
                    "process), distributed.processes (how many) and distributed.process (which one, from 0)."
                )
        assert config.coordinator is not None and config.processes is not None and config.process is not None
        host, _, port = config.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"distributed.coordinator is {config.coordinator}: give HOST:PORT.")
        if not 0 <= config.process < config.processes:
            raise InputError(
                f"distributed.process is {config.process} of {config.processes}: give 0 to "
                f"{config.processes - 1}."
            )
    if jax.distributed.is_initialized():
        raise InputError("--distributed: this process has joined others already: leave it out.")
    # Signals are dealt with by `agreed`: the service's own handler would swallow those that come before.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=START,
            # Longer than that of `_beat`, which says more clearly what happened.
            heartbeat_timeout_seconds=round(config.timeout) + 30,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--distributed: the processes do not find each other ({what}): start all of them within "
            f"{START} seconds; auto is for clusters that JAX knows (Slurm, Open MPI, Cloud TPU, "
            "Kubernetes), elsewhere give distributed.coordinator, distributed.processes and "
            "distributed.process."
        ) from error
    return True


def _service() -> Any:
    """The client of JAX's coordination service."""
    return distributed.global_state.client


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} ({platform.node()})"


def _say_ended(service: Any, text: str) -> None:
    """Tell the other processes, unless one of them was first."""
    with suppress(RuntimeError):  # said already, or the service is gone
        service.key_value_set(_ENDED, text)


def _listen(service: Any, ending: threading.Event) -> None:
    """End this process once another one has ended; to be run in a thread."""
    try:
        said = service.blocking_key_value_get(_ENDED, FOREVER)
    except RuntimeError:
        said = f"process 0 of {jax.process_count()} is gone"
    grace = 3 * GRACE if is_first() else GRACE  # the service lasts until the others have ended
    if not said or ending.wait(grace):
        return
    print(
        f"error: {said}. The run goes on from its last checkpoint with --resume.", file=sys.stderr, flush=True
    )
    os._exit(PEER_LOST)  # whatever else this process waits for will not come


def _beat(service: Any, ending: threading.Event, timeout: float) -> None:
    """Say again and again that this process lives; the first one looks whether the others do."""
    own = jax.process_index()
    others = {number: ("", time.monotonic()) for number in range(1, jax.process_count())}
    for beat in itertools.count():
        try:
            service.key_value_set(f"{_ALIVE}/{own}", str(beat), allow_overwrite=True)
            heard = dict(service.key_value_dir_get(_ALIVE)) if own == 0 else {}
            for number, (last, since) in list(others.items()) if own == 0 else ():
                now = heard.get(f"{_ALIVE}/{number}", "")
                if now != last:
                    others[number] = now, time.monotonic()
                elif time.monotonic() - since > timeout:
                    what = f"was not heard of for {timeout:g} seconds"
                    _say_ended(service, f"process {number} of {jax.process_count()} {what}")
                    return
        except RuntimeError:  # the service is gone: `_listen` says so
            return
        if ending.wait(timeout / 10):
            return


def from_first(make: Callable[[], JsonObject]) -> JsonObject:
    """What `make` gives in the first process, in all of them; a JSON object. The others wait for it."""
    if jax.process_count() == 1:
        return make()
    service, name = _service(), f"behrt_jax/shared/{next(_numbers)}"
    if not is_first():
        return json.loads(service.blocking_key_value_get(name, FOREVER))
    found = make()
    service.key_value_set(name, json.dumps(found))
    return found


def check_same(own: JsonObject, mend: str) -> None:
    """Refuse to go on where a process has other values than the first one. All must ask for it.

    Args:
        own: name -> value of this process, a JSON object.
        mend: what to do, after a colon.

    Raises:
        InputError: names the first value that differs, with both.
    """
    first = from_first(lambda: own)
    for name in sorted(own.keys() | first.keys()):
        if own.get(name) != first.get(name):
            raise InputError(
                f"{name} is {own.get(name)} in {_name()}, but {first.get(name)} in the first one: {mend}"
            )


def agreed(interruption: Interruption, mesh: Mesh) -> Callable[[], bool]:
    """Whether a signal has come, to be asked before each call of the steps: the same answer in all processes.

    Alone it is told at once. Among several, each puts its own signal on its devices, and what all of them
    have put there is read `IN_FLIGHT` calls later, when it has long been worked out: no process waits for
    another, and all of them stop after the same step.
    """
    if jax.process_count() == 1:
        return lambda: bool(interruption)
    split = split_rows(mesh)
    largest = jax.jit(lambda numbers: numbers.max(), out_shardings=replicated(mesh))
    waiting: deque[jax.Array] = deque()

    def stops() -> bool:
        own = np.full(mesh.size, interruption.number, np.int32)
        waiting.append(largest(jax.make_array_from_callback(own.shape, split, own.__getitem__)))
        if len(waiting) > IN_FLIGHT and (number := int(waiting.popleft())):
            interruption.number = number
            return True
        return False

    return stops


def whole_here(tree: Any, mesh: Mesh) -> Any:
    """A tree with each array whole in this process, as it is where there is no other. All must ask for it."""
    if jax.process_count() == 1:
        return tree
    gathered = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, gathered)
