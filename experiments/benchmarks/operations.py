"""What a function's matrix products compute and must move, from its jaxpr.

Nothing is compiled or computed: these are the counts of the algorithm, whatever a compiler makes of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.core import Literal as Constant

Group = Literal["products", "attention", "adapters", "optimiser"]


class Operation(NamedTuple):
    """A matrix product, as often as it runs; or, without an equation, all that only passes memory by."""

    group: Group
    flops: float
    """``2 m n k`` of a product of ``[m, k]`` and ``[k, n]``, of one run."""
    bytes: float
    """That no schedule can do without, of one run; see :func:`operations`."""
    times: int
    equation: JaxprEqn | None


def operations(
    function: Callable[..., Any], *arguments: Any, cache_bytes: float = float("inf"), rank: int = 0
) -> list[Operation]:
    """Matrix products of all that a function does, and what its arguments and results cost beside them.

    The body of a scan counts once a turn, of the branches of a ``cond`` the one of most FLOPs counts, and
    every other nested computation counts once (that of ``shard_map`` is one device's). Convolutions and a
    Pallas kernel's grid are not known.

    Bytes are counted so that no schedule moves fewer that does one product after the other, each on the whole
    of its operands (one that takes a batch through several products in parts may move less):

    - an operand of a product is read once, however many products it is an operand of (queries, keys and
      values, and adapters, from one read of their common input), at the size in which it is smallest (before
      it is broadcast, after it is cast);
    - one that was computed before was also written once; what lies between two products (biases, activations,
      norms, dropout) is free, fused into either, and so is what it keeps for the backward pass;
    - what fits the last cache may never leave it: it is free, as is so much of a larger array; where all
      arguments and results together fit, these are free too, else as much of them as the cache holds from one
      step to the next;
    - between the two products of attention nothing is moved, as when it is computed in tiles;
    - arguments that are in no product (moments of an optimizer) are read once, and results that are not an
      argument as it was are written once.

    Args:
        function: what would be jitted.
        arguments: arrays or ``jax.ShapeDtypeStruct``.
        cache_bytes: of the last cache.
        rank: products with an axis of this size, or a smaller one, are of adapters; those with a batch axis
            are of attention.

    Raises:
        ValueError: products within a ``while``, whose number of turns is not known.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    taken = [_Array(_bytes(var), "argument") for var in jaxpr.invars]
    written = {var: _bytes(var) for var in jaxpr.outvars if var not in jaxpr.invars}
    held = sum(array.bytes for array in taken) + sum(written.values())
    walk = _Walk(cache_bytes, held > cache_bytes, rank)
    found = list(walk.operations(jaxpr, taken, 1))
    rest = sum(array.bytes for array in taken if not array.read) + sum(written.values())
    # What is in the cache at the end need not be written, nor be read at the next step.
    rest = max(0.0, rest - 2 * cache_bytes) if walk.arguments_cost else 0.0
    return [*found, Operation("optimiser", 0.0, rest, 1, None)]


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of all matrix products, see :func:`operations`; elementwise work does not count."""
    return float(sum(one.flops * one.times for one in operations(function, *arguments)))


@dataclass(eq=False)
class _Array:
    """An array, under whatever names and in whatever forms it is passed on."""

    bytes: float
    origin: Literal["argument", "computed", "attention"]
    """attention: it comes out of a product of attention, with no other product in between."""
    times: int = 1
    """How often there is one like it: of a loop's body, once a turn."""
    read: bool = False


_FORMS = frozenset(
    ("broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "squeeze", "transpose")
)
"""Primitives that give the same array in another form."""


class _Walk:
    def __init__(self, cache_bytes: float, arguments_cost: bool, rank: int):
        self.cache_bytes, self.arguments_cost, self.rank = cache_bytes, arguments_cost, rank

    def operations(
        self, jaxpr: Jaxpr, taken: Sequence[_Array], times: int, given: list[_Array] | None = None
    ) -> Iterator[Operation]:
        """Operations of a jaxpr that takes these arrays; its results are added to `given`."""
        arrays: dict[Any, _Array] = dict(zip(jaxpr.invars, taken, strict=True))

        def array_of(var: Any) -> _Array:
            if isinstance(var, Constant) or var not in arrays:  # a constant that was closed over
                return _Array(_bytes(var), "argument", times)
            return arrays[var]

        for equation in jaxpr.eqns:
            inputs = [array_of(var) for var in equation.invars]
            outputs: list[_Array] = []
            if equation.primitive.name == "dot_general":
                one = self._product(equation, inputs, times)
                yield one
                origin = "attention" if one.group == "attention" else "computed"
                outputs = [_Array(_bytes(equation.outvars[0]), origin, times)]
            elif equation.primitive.name in _FORMS:
                outputs = inputs[:1]
            else:
                yield from self._nested(equation, inputs, times, outputs)
            if len(outputs) != len(equation.outvars):
                origin = "attention" if any(one.origin == "attention" for one in inputs) else "computed"
                outputs = [_Array(_bytes(var), origin, times) for var in equation.outvars]
            arrays |= zip(equation.outvars, outputs, strict=True)
        if given is not None:
            given += map(array_of, jaxpr.outvars)

    def _nested(
        self, equation: JaxprEqn, inputs: list[_Array], times: int, outputs: list[_Array]
    ) -> Iterator[Operation]:
        name, params = equation.primitive.name, equation.params
        jaxprs = list(_jaxprs(list(params.values())))
        if name == "scan":
            (body,) = jaxprs
            turns = times * params["length"]
            # Versions of JAX name constants, carry and what is gone through in other ways: the last has an
            # axis of turns outside, and so have the results that are no carry.
            through = sum(map(_differ, equation.invars, body.invars))
            carry = len(body.outvars) - sum(map(_differ, equation.outvars, body.outvars))
            constants = len(body.invars) - carry - through
            # A turn's part of what is gone through, and the carry after each turn, are arrays of their own.
            own = [
                one if k < constants else _Array(_bytes(var), one.origin, turns)
                for k, (one, var) in enumerate(zip(inputs, body.invars, strict=True))
            ]
            yield from self.operations(body, own, turns)
            for one, part in zip(inputs[constants + carry :], own[constants + carry :], strict=True):
                one.read |= part.read
        elif name == "cond":
            branches = [list(self.operations(one, inputs[1:], times)) for one in jaxprs]
            yield from max(branches, key=lambda found: sum(one.flops * one.times for one in found))
        elif name == "while":
            if any(_has_products(one) for one in jaxprs):
                raise ValueError("matrix products within a while loop: the number of its turns is not known")
        else:
            for one in jaxprs:
                fits = len(one.invars) == len(inputs)
                taken = inputs if fits else [_Array(_bytes(var), "computed", times) for var in one.invars]
                yield from self.operations(one, taken, times, outputs if len(jaxprs) == 1 else None)

    def _product(self, equation: JaxprEqn, inputs: list[_Array], times: int) -> Operation:
        (contracted, _), (batch, _) = equation.params["dimension_numbers"]
        avals: list[Any] = [var.aval for var in (*equation.invars, *equation.outvars)]
        left, right, out = (prod(aval.shape) for aval in avals)
        k = prod(avals[0].shape[axis] for axis in contracted)
        together = prod(avals[0].shape[axis] for axis in batch)
        sides = k, left // max(together * k, 1), right // max(together * k, 1)
        narrow = not batch and min(sides) <= self.rank
        group: Group = "attention" if batch else "adapters" if narrow else "products"
        moved = 0.0
        for array, var in zip(inputs, equation.invars, strict=True):
            if not array.read and not (group == "attention" and array.origin == "attention"):
                moved += self._cost(array, _bytes(var)) * array.times / times
            array.read = True
        return Operation(group, 2.0 * out * k, moved, times, equation)

    def _cost(self, array: _Array, in_this_form: float) -> float:
        size = min(array.bytes, in_this_form)
        if array.origin == "argument":
            return size if self.arguments_cost else 0.0
        return 2 * max(0.0, size - self.cache_bytes)


def _bytes(var: Any) -> float:
    aval = var.aval
    if not hasattr(aval, "shape"):
        return 0.0
    # Keys have a dtype of their own, of two words.
    return float(prod(aval.shape)) * (aval.dtype.itemsize if isinstance(aval.dtype, np.dtype) else 8)


def _differ(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) != len(inner.aval.shape)


def _has_products(jaxpr: Jaxpr) -> bool:
    nested = (one for equation in jaxpr.eqns for one in _jaxprs(list(equation.params.values())))
    return any(one.primitive.name == "dot_general" for one in jaxpr.eqns) or any(map(_has_products, nested))


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)
