"""Which leaves of a tree a function's result depends on, found without computing anything."""

from collections.abc import Callable
from typing import Any

import jax


def unread_leaves(function: Callable[[Any], Any], tree: Any) -> list[bool]:
    """Tell which leaves of `tree`, in tree order, are of no consequence for ``function(tree)``.

    The function is traced and its jaxpr walked from the results back. Inside ``while`` loops and branches
    every argument counts as read.

    Args:
        function: traceable by JAX, from a tree to arrays.
        tree: of arrays or ``jax.ShapeDtypeStruct``.
    """
    jaxpr = jax.make_jaxpr(function)(tree).jaxpr
    return [not read for read in _read(jaxpr, [True] * len(jaxpr.outvars))]


def _read(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Tell which inputs of `jaxpr` an output depends on, of those where `wanted` is True."""
    needed = {
        variable for variable, want in zip(jaxpr.outvars, wanted, strict=True) if want and _named(variable)
    }
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            inner = _called(equation)
            used = [variable in needed for variable in equation.outvars]
            if equation.primitive.name == "scan":
                read = _read_scan(equation, used)
            elif inner is None:
                read = [True] * len(equation.invars)
            else:
                read = _read(inner, used)
            needed |= {
                variable
                for variable, is_read in zip(equation.invars, read, strict=True)
                if is_read and _named(variable)
            }
    return [variable in needed for variable in jaxpr.invars]


def _read_scan(equation: Any, wanted: list[bool]) -> list[bool]:
    """As :func:`_read`, for a scan: what a step reads of its carry, the step before it must compute."""
    body, constants = equation.params["jaxpr"].jaxpr, equation.params["num_consts"]
    carries = equation.params["num_carry"]
    while True:
        read = _read(body, wanted)
        needed_by_next = read[constants : constants + carries]
        carried = [a or b for a, b in zip(wanted[:carries], needed_by_next, strict=True)]
        if carried == wanted[:carries]:
            return read
        wanted = carried + wanted[carries:]


def _called(equation: Any) -> Any:
    """The jaxpr that an equation calls once with its own inputs and outputs, or None."""
    if equation.primitive.name in ("while", "scan", "cond"):
        return None
    for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)  # closed, or open already
        if (
            hasattr(inner, "eqns")
            and len(inner.invars) == len(equation.invars)
            and len(inner.outvars) == len(equation.outvars)
        ):
            return inner
    return None


def _named(variable: Any) -> bool:
    return not hasattr(variable, "val")  # a literal has a value in place of a name
