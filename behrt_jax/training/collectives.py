"""What devices send each other in a compiled program, read from its text (HLO, as XLA prints it)."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]+(?P<bits>\d*)\w*)\[(?P<shape>[\d,]*)\]")
_WHILE = re.compile(r" while\(.*body=%?(?P<body>[\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(?P<n>\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Groups are written out, {{0,1},{2,3}}; as an iota, [2,2]<=[4]; or by axes of a mesh,
# mesh['a'=2,'b'=2] {'b'}.
_LISTED = re.compile(r"replica_groups=\{\{(?P<first>[\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(?P<size>\d+)\]")
_AXES = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\][^{]*\{(?P<axes>[^}]*)\}")


class Array(NamedTuple):
    """Type and shape of an array on one device."""

    dtype: str
    """As in HLO: f32, s32, pred ..."""
    shape: tuple[int, ...]
    bytes: int


class Collective(NamedTuple):
    """One instruction; several arrays where the compiler sends them together."""

    kind: str
    """One of `KINDS`; an asynchronous pair counts once."""
    arrays: tuple[Array, ...]
    """What a device holds after it; after a reduce-scatter its share, after an all-gather the whole."""
    group: int
    """How many devices take part together; 0 where the text does not say."""
    times: int
    """Runs in one call of the program: inside loops, the product of their trip counts."""

    @property
    def bytes(self) -> int:
        """Of all arrays together, over all runs."""
        return self.times * sum(array.bytes for array in self.arrays)


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, in the order of its text.

    An instruction that moves nothing, since its groups are of one device, is left out. What is meant to be a
    reduce-scatter is found as an all-reduce of the whole where the backend has no pass that turns an
    all-reduce with a slice after it into one: XLA's CPU backend has not.

    Args:
        text: of ``jax.jit(f).lower(...).compile().as_text()``.
    """
    bodies = _computations(text)
    runs = _runs(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            group = _group_size(line) if match else 0
            if match and group != 1:
                arrays = _arrays(match["result"])
                if match["start"] and match["kind"] != "all-reduce":
                    # Its result is (operands, results), and for some kinds words of context, u32[].
                    arrays = [array for array in arrays if array.shape or array.dtype != "u32"]
                    arrays = arrays[len(arrays) // 2 :]
                found.append(Collective(match["kind"], tuple(arrays), group, runs.get(name, 1)))
    return found


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes of the results of all collectives of a kind, on one device; every kind of `KINDS` is there."""
    sums: dict[str, int] = dict.fromkeys(KINDS, 0)
    for collective in found:
        sums[collective.kind] += collective.bytes
    return sums


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start and " = " not in line.split("{")[0]:
            lines = bodies.setdefault(start["name"], [])
        lines.append(line)
    return bodies


def _runs(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Computation -> how often it runs in one call; a loop of unknown length counts as one turn."""
    callers: dict[str, tuple[str, int]] = {}
    for name, lines in bodies.items():
        for line in lines:
            loop = _WHILE.search(line)
            if loop:
                trips = _TRIPS.search(line)
                callers[loop["body"]] = name, int(trips["n"]) if trips else 1
            branches = [part.strip(" %") for found in _BRANCHES.findall(line) for part in found.split(",")]
            for called in [*_CALLED.findall(line), *branches]:
                callers.setdefault(called, (name, 1))

    def runs(name: str) -> int:
        caller = callers.get(name)
        return caller[1] * runs(caller[0]) if caller else 1

    return {name: runs(name) for name in bodies}


def _arrays(result: str) -> list[Array]:
    found = []
    for match in _ARRAY.finditer(result):
        shape = tuple(int(size) for size in match["shape"].split(",") if size)
        bits = int(match["bits"] or 8)  # pred has a byte
        found.append(Array(match["type"], shape, math.prod(shape) * bits // 8))
    return found


def _group_size(line: str) -> int:
    if match := _AXES.search(line):
        sizes = dict(pair.split("=") for pair in match["sizes"].split(",") if pair)
        # Part of an axis is 'a':(before)size.
        axes = [axis.strip() for axis in match["axes"].split(",") if axis.strip()]
        return math.prod(int(axis.split(")")[1] if ":(" in axis else sizes[axis]) for axis in axes)
    if match := _IOTA.search(line):
        return int(match["size"])
    if match := _LISTED.search(line):
        return len(match["first"].split(","))
    return 0
