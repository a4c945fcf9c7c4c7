"""Compiling less: programs are kept on disk for the next start, those that run once are compiled quickly.

Source: JAX's persistent compilation cache
(https://docs.jax.dev/en/latest/persistent_compilation_cache.html), which saves compiling but not tracing and
lowering; :class:`KeptProgram` saves these too.
"""

import hashlib
import hmac
import os
import pickle
import platform
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jax.sharding import Mesh

from behrt_jax.files import JsonObject, json_text, write_bytes, written_whole

# How long a run takes from the start of its process to its first finished step.

_IMPORTED = time.perf_counter()


def process_seconds() -> float:
    """Seconds since this process was started; where the system does not tell, since this import."""
    try:
        # Field 22 of proc(5): clock ticks after boot. The name in parentheses may hold blanks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.perf_counter() - _IMPORTED


class Startup:
    """The way to the first step: when what was done, and which programs were compiled or read from disk."""

    def __init__(self) -> None:
        """Begin to watch, until the first step is marked."""
        self.marks: dict[str, float] = {}
        """Seconds since the start of the process."""
        self.processor: dict[str, float] = {}
        """Seconds of processor time since then, of all threads together."""
        self.programs: dict[str, dict[str, float]] = {}
        """Program -> seconds of its ``trace``, ``lower`` and ``compile`` (looking it up in JAX's cache, too),
        or of its ``load`` where it was kept whole. Those of one name together; threads overlap."""
        _listen()
        _watching[:] = [self]

    def mark(self, name: str) -> None:
        """Note that this is done; the first time counts."""
        self.marks.setdefault(name, round(process_seconds(), 3))
        self.processor.setdefault(name, round(time.process_time(), 3))
        if name == "first step" and self in _watching:
            _watching.remove(self)
            # What was only traced is a part of another one.
            self.programs = {
                name: parts for name, parts in self.programs.items() if len(parts) > 1 or "trace" not in parts
            }

    def note(self, part: str, program: str, seconds: float) -> None:
        """Add to the time that a program took."""
        parts = self.programs.setdefault(program.removeprefix("jit(").removesuffix(")"), {})
        parts[part] = round(parts.get(part, 0.0) + seconds, 3)


_watching: list[Startup] = []
"""The latest one, until its first step."""
_PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/behrt_jax/kept_program_load": "load",
}
"""Events of JAX, and our own -> part of :attr:`Startup.programs`."""


@cache
def _listen() -> None:
    """Watch what JAX compiles and what it finds in its cache; events come in the thread that does it."""

    def count(event: str, **details: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _hits.count = getattr(_hits, "count", 0) + 1

    def note(event: str, duration_secs: float, **details: Any) -> None:
        if event in _PARTS:
            for startup in _watching:
                startup.note(_PARTS[event], details.get("fun_name", ""), duration_secs)

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(note)


_hits = threading.local()


def _jax_cache_hits() -> int:
    """Programs that this thread found in JAX's cache since :func:`_listen`."""
    return getattr(_hits, "count", 0)


RUN_ONCE: dict[str, bool | int | float | str] = {"xla_backend_optimization_level": 0}
"""Compiler options of a program that runs once: to compile it well would take longer than to run it."""

MOST_BYTES = 2 * 1024**3
"""Programs unused for the longest time are removed at a start that finds more than this."""

_ours: str | None = None
"""The folder that an earlier call chose; another one is the user's."""


def use_compilation_cache(folder: Path | Literal["off"] | None = None) -> str | None:
    """Keep compiled programs in a folder, for this and later processes.

    A folder that the user gave JAX itself (``JAX_COMPILATION_CACHE_DIR``) is used in place of
    `folder`, as it is and without a limit of its size. Training works without a cache too: a folder
    that cannot be written is no error.

    Args:
        folder: where to keep them; :func:`default_folder` where not given; ``"off"`` for nowhere.

    Returns:
        None, or one line for the user where the folder cannot be used.
    """
    global _ours
    jax.config.update("jax_enable_compilation_cache", folder != "off")
    if folder == "off":
        jax_cache.reset_cache()  # JAX decides once a process
        return None
    # JAX leaves out what compiles in less than a second: most of what a start waits for.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    chosen = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (types do not know it)
    if chosen is not None and chosen != _ours:
        return None
    root = default_folder() if folder is None else folder.expanduser().absolute()
    place = root / host_fingerprint()
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_oldest(root, MOST_BYTES)
        usable = os.access(place, os.W_OK | os.X_OK)
        reason = "it is not writable"
    except OSError as error:
        usable, reason = False, error.strerror or str(error)
    _ours = str(place) if usable else None
    jax.config.update("jax_compilation_cache_dir", _ours)
    jax_cache.reset_cache()
    return None if usable else f"Compiled programs are not kept: {root}: {reason}. Give compilation_cache."


def default_folder() -> Path:
    """``behrt_jax/compiled`` in the user's folder for caches (XDG Base Directory Specification; macOS)."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        caches = Path(given)
    else:
        caches = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(os.path.expanduser(caches)) / "behrt_jax" / "compiled"  # noqa: PTH111 (never raises)


def host_fingerprint() -> str:
    """Name of a folder for programs of this processor: JAX's keys do not tell one CPU from another.

    A home folder is often shared by machines whose processors know different instructions.
    """
    return hashlib.sha256("\n".join([platform.machine(), *_processor()]).encode()).hexdigest()[:12]


def _processor() -> list[str]:
    """Model and instruction sets, in any order of the cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return [platform.processor(), platform.release()]
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    return sorted({line for line in lines if line.split(":")[0].strip() in names})


def _remove_oldest(root: Path, most_bytes: int) -> None:
    """Remove the files used longest ago until the rest is small enough."""
    found = []
    for path in [*root.glob("*/*-cache"), *root.glob("*/*.program")]:
        try:
            status = path.stat()
        except OSError:  # another process was quicker
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


# Programs kept whole: a second start neither traces nor lowers them.


class KeptProgram:
    """A jitted function compiled for arguments of certain shapes, on disk for the next start.

    What is on disk is used where it was made by this user (it is signed with a secret of theirs, since to
    load a program is to trust it), from the same settings, arguments, versions, source code and devices.
    It is kept in a folder that this package chose, not in one that the user gave JAX itself.
    """

    def __init__(
        self, program: Any, settings: JsonObject, arguments: Sequence[Any], devices: Sequence[Any]
    ) -> None:
        """Nothing is read or compiled yet.

        Args:
            program: a jitted function.
            settings: all that decides what it does, beside its arguments.
            arguments: arrays, or ``jax.ShapeDtypeStruct`` with shardings.
            devices: those that it runs on.
        """
        self._program, self._arguments, self._devices = program, arguments, devices
        self._file: Path | None = None
        self._made: Any = None
        self._name = getattr(program, "__name__", "program")
        if _ours is not None and jax.process_count() == 1 and (source := _source_digest()) is not None:
            key = _program_key(self._name, source, settings, arguments, devices)
            self._file = Path(_ours) / f"{self._name}-{key}.program"

    def compiled(self) -> Any:
        """The program as ``jax.stages.Compiled``, from disk or anew."""
        started = time.perf_counter()
        found = None if self._file is None else self._load()
        if found is not None:
            seconds = time.perf_counter() - started
            jax.monitoring.record_event_duration_secs(
                "/behrt_jax/kept_program_load", seconds, fun_name=self._name
            )
        else:
            _listen()
            hits = _jax_cache_hits()
            found = self._program.lower(*self._arguments).compile()
            # On the CPU, what came out of JAX's cache has lost a part of its code when it is written again.
            if _jax_cache_hits() == hits:
                self._made = found
        return found

    def keep(self) -> None:
        """Write it for the next start, where :meth:`compiled` has made it anew; no error where that fails."""
        if self._made is None or self._file is None or (secret := _secret()) is None:
            return
        with suppress(OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            content = pickle.dumps(serialize_executable.serialize(self._made))
            write_bytes(self._file, _signature(secret, self._file, content) + content)
        self._made = None

    def _load(self) -> Any:
        assert self._file is not None
        try:
            signed, secret = self._file.read_bytes(), _secret()
        except OSError:
            return None
        signature, content = signed[:32], signed[32:]
        if secret is None or not hmac.compare_digest(signature, _signature(secret, self._file, content)):
            return None
        try:
            found = serialize_executable.deserialize_and_load(
                *pickle.loads(content), execution_devices=self._devices
            )
        except Exception:  # whatever a library says of it, it is compiled anew
            return None
        with suppress(OSError):
            os.utime(self._file)
        fits = found.in_tree == jax.tree.structure((tuple(self._arguments), {}))
        return found if fits and _shapes(found.in_avals) == _shapes(self._arguments) else None


def kept(program: Any, settings: JsonObject, mesh: Mesh) -> Callable[..., Any]:
    """A function that does what `program` does, and keeps it on disk for each form of its arguments.

    Args:
        program: a jitted function.
        settings: all that decides what it does, beside its arguments.
        mesh: the devices that it runs on.
    """
    compiled: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        form = tuple(_shapes(arguments))
        if form not in compiled:
            own = KeptProgram(program, settings, arguments, list(mesh.devices.flat))
            compiled[form] = own.compiled()
            own.keep()
        return compiled[form](*arguments)

    return call


def _forms(arguments: Any) -> list[str]:
    """Structure, shapes, dtypes and shardings of arrays."""
    leaves = jax.tree.leaves(arguments)
    return [str(jax.tree.structure(arguments)), *(f"{x.shape} {x.dtype} {x.sharding}" for x in leaves)]


def _shapes(tree: Any) -> list[tuple[tuple[int, ...], np.dtype]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _program_key(name: str, source: str, settings: JsonObject, arguments: Any, devices: Sequence[Any]) -> str:
    """A name for all that a compiled program depends on."""
    flags = {k: v for k, v in jax.config.values.items() if "cache" not in k}  # where it is kept is no matter
    packages = (jax, jaxlib, flax, optax, np)
    parts = {
        "name": name,
        "settings": settings,
        "arguments": _forms(arguments),
        "devices": [f"{device.id} {device.device_kind}" for device in devices],
        "compiler": devices[0].client.platform_version,
        "versions": [sys.version, *(package.__version__ for package in packages)],
        "source": source,
        "flags": {key: str(value) for key, value in sorted(flags.items())},
        "environment": [os.environ.get(flag) for flag in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    }
    return hashlib.sha256(json_text(parts).encode()).hexdigest()[:32]


@cache
def _source_digest(root: Path = Path(__file__).parents[1]) -> str | None:
    """Digest of this package's code: a version alone does not tell what is being developed.

    None where a file was changed since this process began, which may run what was there before.
    """
    digest, began = hashlib.sha256(), time.time() - process_seconds()
    for path in sorted(root.rglob("*.py")):
        if path.stat().st_mtime > began:
            return None
        digest.update(str(path.relative_to(root)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _signature(secret: bytes, file: Path, content: bytes) -> bytes:
    return hmac.digest(secret, file.name.encode() + b"\n" + content, "sha256")


def _secret() -> bytes | None:
    """Random bytes that this user alone can read, made at the first start; None where there can be none."""
    place = default_folder().parent / "secret"
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(place) as temporary:
                temporary.touch(0o600)
                temporary.write_bytes(os.urandom(32))
        with place.open("rb") as file:  # of the very file that is read, whatever takes its place meanwhile
            status, secret = os.fstat(file.fileno()), file.read()
        own = status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077
    except (OSError, AttributeError):  # a system without owners of files
        return None
    return secret if own and len(secret) == 32 else None
