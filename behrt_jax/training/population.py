"""Many adapters at once on one frozen base, in one program: seeds, learning rates, ranks, folds or tasks.

Each member takes the update step of `training.step` as if it were alone, mapped over members. The frozen
leaves are held once, whatever the number of members, and what does not depend on a member is computed once:
`jax.vmap` keeps it unbatched.

Members of smaller rank are filled up with zeros to the largest, see `adapters.lora`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from behrt_jax.adapters import lora
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.stacked_layers import Path as TreePath
from behrt_jax.models.stacked_layers import Tree
from behrt_jax.training.freezing import part, whole
from behrt_jax.training.step import Objective, Totals, TrainState, Variables, make_update_step

Init = Callable[[jax.Array, LoRAConfig | None], Variables]


class Members(NamedTuple):
    """In what the members differ, besides their first values and their batches."""

    keys: jax.Array
    """Typed PRNG keys of the runs `[members]`; or one `[]`, where all draw the same: what is alike
    is then computed once."""
    rates: jax.Array
    """Factor of each on the optimizer's learning rates, float32 `[members]`."""
    scales: jax.Array
    """Scale of each one's adapters over that of the largest rank, float32 `[members, layers]`, or
    `[members, 1]` where it is alike in all layers."""
    embedding: jax.Array
    """Factor of each on the learning rate of the embeddings, float32 `[members]`: 0 where they stay."""


class PopulationState(NamedTuple):
    """All that changes from step to step, and the frozen base once."""

    step: jax.Array
    """Steps done, int32 scalar."""
    frozen: Variables
    """The variables with None where a leaf trains."""
    trained: Variables
    """The variables with None where a leaf is frozen; the others `[members, ...]`."""
    opt_state: optax.OptState
    """`[members, ...]`."""


def largest(configs: Sequence[LoRAConfig]) -> LoRAConfig:
    """The configuration of the largest rank, which the model is applied with.

    Raises:
        InputError: the members' adapters differ in more than rank and alpha.
    """
    one = max(configs, key=lambda config: config.rank)
    for number, config in enumerate(configs):
        if replace(config, rank=one.rank, alpha=one.alpha) != one:
            raise InputError(
                f"population: the adapters of member {number} differ from the others' in more than lora.rank "
                "and lora.alpha: give all the same targets, dropout and product, or train it by itself."
            )
        if one.init == "pissa" and config.rank != one.rank:
            raise InputError(
                "population: lora.init pissa takes what adapters begin with out of the base, which all "
                "members share: give all members the same rank, or another init."
            )
    return one


def make_members(
    keys: jax.Array,
    rates: Sequence[float],
    configs: Sequence[LoRAConfig] | None = None,
    embedding: Sequence[float] | None = None,
    layers: Sequence[TreePath] = ((),),
) -> Members:
    """Members with these keys, factors on the learning rate `[members]`, adapters, and factors on that of the
    embeddings. The layers are those of `lora.layer_paths`, needed where rank or alpha go by pattern.
    """
    scales = [[1.0]] * len(rates)
    if configs is not None:
        most = largest(configs)
        scales = [[lora.scale(one, path) / lora.scale(most, path) for path in layers] for one in configs]
    columns = (rates, scales, embedding or [1.0] * len(rates))
    return Members(keys, *(jnp.asarray(column, jnp.float32) for column in columns))


def init_population(
    init: Init,
    keys: jax.Array,
    configs: Sequence[LoRAConfig | None],
    variables: Variables,
    mask: Tree,
    optimizer: optax.GradientTransformation,
) -> PopulationState:
    """The first state: the frozen leaves of `variables`, and each member's own of all others.

    Args:
        init: from a key and the adapters' configuration to the first variables of a run, all leaves that
            train among them.
        keys: typed PRNG keys of initialisation `[members]`.
        configs: adapters of each member.
        variables: give the frozen leaves, which are not copied: when the state is donated, they are gone.
        mask: tree of booleans with the structure of the variables, True where a leaf trains.
        optimizer: see `optimizer.make_optimizer`.
    """
    with_adapters = [config for config in configs if config]
    most = largest(with_adapters) if with_adapters else None
    frozen = part(variables, mask, trains=False)

    def first(key: jax.Array, config: LoRAConfig | None) -> Variables:
        found = init(key, config)
        if most is not None:
            found = {**found, "lora": lora.pad(found["lora"], most)}
        return part(found, mask, trains=True)

    @jax.jit
    def build(keys: jax.Array, frozen: Variables):
        groups = []
        for config in dict.fromkeys(configs):
            numbers = np.flatnonzero([other == config for other in configs])
            own_keys = jax.random.clone(keys)[numbers]
            groups.append((numbers, jax.vmap(partial(first, config=config))(own_keys)))
        order = np.argsort(np.concatenate([numbers for numbers, _ in groups]))
        trained = jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *(own for _, own in groups))
        opt_state = jax.vmap(lambda member: optimizer.init(whole(frozen, member)))(trained)
        return trained, opt_state

    trained, opt_state = build(keys, frozen)
    return PopulationState(jnp.zeros((), jnp.int32), frozen, trained, opt_state)


def make_population_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mask: Tree,
    *,
    clip_norm: float | None,
    micro_batches: int = 1,
    at_once: int | None = None,
) -> Callable[[PopulationState, Members, Any, Mapping[str, Any]], tuple[PopulationState, Totals]]:
    """Build a train step of all members; arguments but the last as in `step.make_update_step`.

    Args:
        objective: of a single member, with the adapters of :func:`largest`.
        optimizer: of a single member, with a learning-rate factor of 1.
        mask: which leaves train.
        clip_norm: largest norm of a member's gradient.
        micro_batches: parts into which each member's batch is cut.
        at_once: members that are computed side by side (`jax.vmap`), the others after them
            (`jax.lax.map`); all where not given. On a CPU 1 is fastest, as with micro-batches: what is at
            work then stays in the cache. What no member changes is computed once in either form.

    Returns:
        A function from (state, members, batch, own) to the new state and the totals `[members]`. ``own`` has
        the fields of the batch (a named tuple) in which members differ, by name, `[members, ...]`: targets
        (tasks), weights of examples (folds). Jit it with its first argument donated.
    """

    def population_step(state: PopulationState, members: Members, batch: Any, own: Mapping[str, Any]):
        keys = members.keys
        words = jax.random.key_data(keys) if keys.ndim else None

        def step_of(of_member):
            trained, opt_state, (words, rate, scale, embedding), fields = of_member
            scaled = partial(_scaled, scale=scale)
            own_objective = objective._replace(
                loss=lambda variables, *rest: objective.loss(scaled(variables), *rest),
                merged=lambda variables: objective.merged(scaled(variables)),
                mesh=None,
            )
            update = make_update_step(
                own_objective,
                _at_rate(optimizer, rate, embedding),
                mask,
                keys if words is None else jax.random.wrap_key_data(words, impl=jax.random.key_impl(keys)),
                clip_norm=clip_norm,
                micro_batches=micro_batches,
            )
            alone = TrainState(state.step, whole(state.frozen, trained), opt_state)
            alone, totals = update(alone, batch._replace(**fields))
            return part(alone.variables, mask, trains=True), alone.opt_state, totals

        factors = (words, members.rates, members.scales, members.embedding)
        each = state.trained, state.opt_state, factors, dict(own)
        trained, opt_state, totals = _map(step_of, each, at_once)
        return PopulationState(state.step + 1, state.frozen, trained, opt_state), totals

    return population_step


def _map(function: Callable[[Any], Any], members: Any, at_once: int | None) -> Any:
    """`function` of each member; `members` is a tree of arrays `[members, ...]`."""
    count = jax.tree.leaves(members)[0].shape[0]
    if at_once is None or at_once >= count:
        return jax.vmap(function)(members)
    return jax.lax.map(function, members, batch_size=None if at_once == 1 else at_once)


def population_predict(
    forward: Callable[..., Any], state: PopulationState, members: Members, *inputs: Any
) -> Any:
    """Results of `forward` (variables, inputs), with the adapters of :func:`largest`, for each member:
    `[members, ...]`.
    """

    def of(trained: Variables, scale: jax.Array) -> Any:
        return forward(_scaled(whole(state.frozen, trained), scale), *inputs)

    return jax.vmap(of)(state.trained, members.scales)


def member(state: PopulationState, number: int, config: LoRAConfig | None) -> Variables:
    """Variables of one member, as if it had been trained alone: its adapters have the rank of `config`."""
    variables = whole(state.frozen, jax.tree.map(lambda leaf: leaf[number], state.trained))
    if config is None:
        return variables
    return {**variables, "lora": lora.cut(variables["lora"], config)}


def _at_rate(
    optimizer: optax.GradientTransformation, rate: jax.Array, embedding: jax.Array
) -> optax.GradientTransformation:
    """AdamW's update, weight decay included, is proportional to its learning rate."""

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(
            lambda group, leaf: rate * (embedding if group == "embedding" else 1.0) * leaf,
            lora.labels(updates),  # pyright: ignore[reportArgumentType]
            updates,
        ), state

    return optax.GradientTransformation(optimizer.init, update)


def _scaled(variables: Variables, scale: jax.Array) -> Variables:
    """`variables` with the factors `scale` `[layers]` on the products of the adapters."""
    return {**variables, "lora": lora.scaled(variables["lora"], scale)}
