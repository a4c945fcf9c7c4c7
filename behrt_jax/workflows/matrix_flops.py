"""FLOPs of the matrix products of a function, from its jaxpr: of the algorithm, whatever a compiler makes of
it. A compiler's own count leaves out what a GPU's libraries do and counts the body of a loop once.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """``2 m n k`` of each product of ``[m, k]`` and ``[k, n]``, summed over all that `function` does.

    Nothing is compiled or computed. The body of a scan counts once a turn, of the branches of a ``cond`` the
    costliest counts, and every other nested computation counts once (that of ``shard_map`` is one device's).
    Elementwise work does not count; convolutions and a Pallas kernel's grid are not known.

    Args:
        function: what would be jitted.
        arguments: arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: products within a ``while``, whose number of turns is not known.
    """
    return float(_flops(jax.make_jaxpr(function)(*arguments).jaxpr))


def _flops(jaxpr: Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: JaxprEqn) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        avals: list[Any] = [equation.invars[0].aval, equation.outvars[0].aval]
        left, out = avals
        return 2 * prod(out.shape) * prod(left.shape[axis] for axis in contracted)
    nested = [_flops(jaxpr) for jaxpr in _jaxprs(list(equation.params.values()))]
    if name == "scan":
        return equation.params["length"] * sum(nested)
    if name == "cond":
        return max(nested)
    if name == "while" and sum(nested):
        raise ValueError("matrix products within a while loop: the number of its turns is not known")
    return sum(nested)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)
