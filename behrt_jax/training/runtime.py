"""Compiling less: programs are kept on disk for the next start, those that run once are compiled quickly.

Source: JAX's persistent compilation cache
(https://docs.jax.dev/en/latest/persistent_compilation_cache.html).
"""

import ctypes
import hashlib
import os
import platform
import sys
import time
from pathlib import Path
from typing import Literal

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

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
    """Marks on the way to the first step, in seconds since the start of the process."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note that this is done; the first time counts."""
        self.marks.setdefault(name, round(process_seconds(), 3))


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
    for path in root.glob("*/*-cache"):
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


# Memory that a CPU step frees and needs again at the next one stays with the process.

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**30
_OLD_LIMIT = 32 * 2**20  # the most that older versions of glibc accept


def keep_freed_memory() -> bool:
    """Keep blocks of up to a GiB in the heap when they are freed, and up to a GiB free at its top.

    On the CPU, XLA asks the C library for its buffers at each step. Where those come as maps of their own,
    the kernel clears every page anew: measured on 2 cores, `small` took 45 ms a step in place of 29.
    glibc adapts by itself, unless it has seen larger blocks first, as in loading a large data set.

    Returns:
        Whether the C library took the settings; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, musl for one
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _KEPT) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _KEPT))
