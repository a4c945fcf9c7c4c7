"""Into how many parts a step cuts its batch: found by trying, once for each machine and configuration.

On a CPU a part whose activations fit the cache is up to twice as fast as the whole batch; on a GPU the
largest part that fits the memory is the fastest. The result of a step does not depend on it, up to rounding.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

CACHED_BYTES = 2**22
"""Without a search, a CPU's parts are such that the widest activation takes about this much."""
EVEN_TOKENS = 512
"""On an accelerator the tokens of a part are a multiple of this, see :func:`even_rows`."""
MOST_EMPTY = 1 / 16
"""Of the rows of a part, how many may be empty for that."""
MOST_CANDIDATES = 4
TIMED_STEPS = 3


def likely_parts(rows: int, row_length: int, ffn_size: int, platform: str) -> int:
    """Number of parts that is taken where a search would not pay.

    Args:
        rows: of a batch, on one device.
        row_length: tokens of a row.
        ffn_size: width of the widest activation.
        platform: of the device, such as ``cpu``.
    """
    if platform != "cpu":
        return 1
    rows_of_part = max(1, CACHED_BYTES // (4 * ffn_size * row_length))
    return -(-rows // rows_of_part)


def even_rows(rows: int, row_length: int, platform: str) -> int:
    """Of what number the rows of a part are best a multiple, filled up with empty ones.

    An accelerator cuts sums over all tokens, which the gradients of all weights are, into parts of a power
    of two, and copies what does not divide: measured on an H200, 13 % of a step of `large` in 123 rows of
    200 tokens, none in 128. So the tokens of a part are brought to a multiple of 512, or of the largest
    power of two below for which at most a sixteenth of the rows is empty.

    Args:
        rows: of a part of a batch, on one device.
        row_length: tokens of a row.
        platform: of the device, such as ``cpu``.
    """
    if platform == "cpu":
        return 1
    multiple = EVEN_TOKENS // math.gcd(EVEN_TOKENS, row_length)
    while -(-rows // multiple) * multiple > rows * (1 + MOST_EMPTY):
        multiple //= 2
    return multiple


def candidates(rows: int, likely: int) -> list[int]:
    """Numbers of parts to try, ascending: around the likely one, none with less than a row a part.

    Each gives parts of as equal a size as can be, so that few empty rows fill the last one.
    """
    tried = {1, likely} | {round(likely * factor) for factor in (0.5, 2)}
    return sorted({-(-rows // -(-rows // min(max(parts, 1), rows))) for parts in tried})[:MOST_CANDIDATES]


def fastest(
    parts: Sequence[int], make_trial: Callable[[int], Callable[[], Any]], log: Callable[[str], None]
) -> int:
    """Time a step with each number of parts and return the best.

    Args:
        parts: see :func:`candidates`.
        make_trial: compiles a step with so many parts, and returns what runs it once.
        log: told what was measured, in one line.

    Raises:
        RuntimeError: not one of them runs, for want of memory; the last one's error.
    """
    seconds: dict[int, float] = {}
    failure: Exception | None = None
    for count in parts:
        try:
            trial = make_trial(count)
            jax.block_until_ready(trial())
            times = []
            for _ in range(TIMED_STEPS):
                started = time.perf_counter()
                jax.block_until_ready(trial())
                times.append(time.perf_counter() - started)
            seconds[count] = min(times)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failure = error
    if not seconds:
        raise RuntimeError("a step does not fit the memory with any number of micro-batches") from failure
    best = min(seconds, key=seconds.__getitem__)
    measured = ", ".join(f"{count}: {1e3 * value:,.0f} ms" for count, value in seconds.items())
    log(f"Micro-batches a step: {best} (measured {measured}).")
    return best


def remembered(file: Path, key: Mapping[str, Any], find: Callable[[], int]) -> int:
    """What `find` returned earlier for the same key, kept in a JSON file; a file that is not to be read or
    written is no error.

    Args:
        file: of earlier answers.
        key: all that the answer depends on, ready for JSON.
        find: called where there is no answer yet.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    known = _read(file)
    if isinstance(known.get(name), int):
        return known[name]
    answer = find()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**_read(file), name: answer}, indent=1) + "\n")
        temporary.replace(file)
    except OSError:
        pass
    return answer


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
