"""What only the process that holds data and model can tell the doctor, as figures for config.json."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from behrt_jax.config import ModelConfig, PretrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.vocabulary import SEP, SPECIAL_TOKENS, UNK
from behrt_jax.training.state import Setup
from behrt_jax.training.step import example_logits
from behrt_jax.training.telemetry import leaf_names

# Which leaves of a tree a function's result depends on, found without computing anything.


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
    body = equation.params["jaxpr"].jaxpr
    # Versions of jax name the numbers of these differently; only what is scanned has an axis less inside.
    carries = _alike(equation.outvars, body.outvars)
    constants = _alike(equation.invars, body.invars) - carries
    while True:
        read = _read(body, wanted)
        needed_by_next = read[constants : constants + carries]
        carried = [a or b for a, b in zip(wanted[:carries], needed_by_next, strict=True)]
        if carried == wanted[:carries]:
            return read
        wanted = carried + wanted[carries:]


def _alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Number of variables of a scan that have the same shape in a step of it."""
    return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))


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


MOST_EVENTS = 20_000_000
"""Events looked at; of more, every n-th."""


def gather_facts(
    config: PretrainConfig, data: SequenceSet, setup: Setup, batches: TrainingBatches, total_steps: int
) -> dict[str, Any]:
    """Figures for `diagnosis.before`; no subject ids and no events.

    Returns:
        ``codes``: rows of the vocabulary that are codes; ``total_steps``, ``steps_per_epoch``,
        ``tokens_per_step`` (without padding), ``row_length``; ``validation_subjects``;
        ``unseen_share``: of validation events, those whose code the train split hardly or never has;
        ``cut_share``: of train tokens, those past the first row_length of their history;
        ``beyond_tables``: see :func:`beyond_tables`; ``unreached_adapters``: names of adapter leaves that
        the prediction does not depend on.
    """
    train, tuning = data.splits["train"], data.splits["tuning"]
    window = batches.row_length - batches.cls_token
    return {
        "codes": len(data.vocabulary) - len(SPECIAL_TOKENS),
        "total_steps": total_steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "tokens_per_step": batches.tokens_per_epoch / batches.steps_per_epoch,
        "row_length": batches.row_length,
        "validation_subjects": len(tuning),
        "unseen_share": unseen_share(tuning.codes, data.vocabulary.counts),
        "cut_share": float(np.maximum(train.lengths - window, 0).sum() / max(len(train.codes), 1)),
        "beyond_tables": beyond_tables(train, config.model),
        "unreached_adapters": unreached_adapters(setup),
    }


def unseen_share(codes: np.ndarray, counts: np.ndarray) -> float:
    """Share of events, int32 `[events]`, that are [UNK] or whose train count, int64 `[vocabulary]`, is 0."""
    events = codes[codes != SEP]
    if not len(events):
        return 0.0
    unseen = (counts == 0) & (np.arange(len(counts)) >= len(SPECIAL_TOKENS))
    unseen[UNK] = True
    return float(unseen[events].mean())


def beyond_tables(sequences: Sequences, model: ModelConfig) -> dict[str, float]:
    """Shares of events that share the row at the end of a table: by ``ages`` above, ``before_birth``,
    ``visits`` and ``positions`` (where those count visits).
    """
    step = -(-len(sequences.codes) // MOST_EVENTS) or 1
    ages, visits = sequences.ages[::step], sequences.visits[::step]
    if not len(ages):
        return {}
    found = {
        "ages": np.count_nonzero(ages >= model.age_rows * model.age_bin_years),
        "before_birth": np.count_nonzero(ages < 0),
    }
    if model.visit_embedding == "ordinal":
        found["visits"] = np.count_nonzero(visits >= model.visit_rows)
    if model.position_of == "visit":
        found["positions"] = np.count_nonzero(visits >= model.positions)
    return {name: int(count) / len(ages) for name, count in found.items()}


def unreached_adapters(setup: Setup) -> list[str]:
    """Names of adapter leaves that the prediction does not depend on; nothing is computed."""
    if not setup.layers:
        return []
    unread = unread_leaves(lambda variables: example_logits(setup.predictor, variables), setup.shapes)
    return [
        name
        for name, alone in zip(leaf_names(setup.shapes), unread, strict=True)
        if alone and name.startswith("lora/")
    ]
