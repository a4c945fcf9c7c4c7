"""Several members fine-tuned at once on one frozen base: seeds, a search, a cross-validation, or tasks."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from behrt_jax.config import FinetuneConfig, LoRAConfig
from behrt_jax.data.label_tables import read_label_tables
from behrt_jax.tracking.console import open_console
from behrt_jax.training.mesh import replicated
from behrt_jax.training.population import (
    init_population,
    largest,
    make_members,
    make_population_step,
    population_predict,
)
from behrt_jax.training.pretrained import read_encoder
from behrt_jax.training.state import first_state, run_keys
from behrt_jax.training.task_state import with_encoder
from behrt_jax.training.task_step import make_output_step, task_objective
from behrt_jax.workflows.finetune_setup import Finetuning, open_finetuning
from behrt_jax.workflows.labelled_data import read_data, read_labelled
from behrt_jax.workflows.population_results import write_population
from behrt_jax.workflows.population_training import Population, train_population
from behrt_jax.workflows.population_variation import Variation, vary
from behrt_jax.workflows.results import RunResult


def finetune_population(config: FinetuneConfig, devices: Sequence[Any] | None = None) -> RunResult:
    """Train all members in one program, keep each one's best epoch, and leave a run folder behind.

    Its ``members/0``, ``members/1``, ... are adapters of their own; task.json says which of them predict, or
    which tasks they are for.

    Args:
        config: every setting of the run.
        devices: devices to train on; all where not given.

    Raises:
        InputError: something in the configuration, the data or the labels is wrong; raised before training.
        DivergenceError: the loss of a member was never finite; of a search, that of all members.
    """
    started = time.perf_counter()
    population = config.population
    if population.vary == "task":
        labels = read_label_tables(population.labels)
        data, delays = read_data(config.data)
        config = replace(config, population=replace(population, size=len(population.labels)))
    else:
        data, labels, delays = read_labelled(config.data, config.labels)
    with open_console() as console:
        run = open_finetuning(config, data, labels, delays, devices, console)
        variation = vary(config, run.labelled)
        found = train_population(console, config, run, variation, make_population(config, run, variation))
        summary = write_population(console, config, run, variation, found, time.perf_counter() - started)
    return RunResult(run.folder, summary)


def make_population(config: FinetuneConfig, run: Finetuning, variation: Variation) -> Population:
    """Members before their first step, on the devices."""
    setup, mesh = run.setup, run.mesh
    keys = [run_keys(seed) for seed in variation.seeds]
    first = first_state(setup.init, setup.shapes, run.optimizer, keys[0][0], mesh)
    if not config.from_scratch:
        encoder = read_encoder(run.pretrained, mesh)
        first = with_encoder(first, encoder.params, run.labelled.first_rows(encoder.params))
    given = first.variables["params"].get("new_codes")

    def init(key: jax.Array, adapters: LoRAConfig | None) -> Any:
        variables = setup.init_with(key, adapters)
        if given is not None:  # what the rows begin with comes from the base
            variables["params"]["new_codes"] = given
        return variables

    configs = variation.adapters
    with_adapters = [one for one in configs if one is not None]
    predictor = setup.predictor
    if with_adapters:
        predictor = predictor._replace(lora=largest(with_adapters))
    alike = len(set(variation.seeds)) == 1
    step_keys = keys[0][1] if alike else jnp.stack([key[1] for key in keys])
    members = make_members(step_keys, variation.rates, with_adapters or None)
    first_keys = jnp.stack([jax.random.clone(key[0]) for key in keys])
    state = init_population(init, first_keys, configs, first.variables, setup.mask, run.optimizer)
    head = state.trained["params"]["task_head"]["dense"]
    if head["bias"] is not None:  # it trains: each member begins with the base rate of its own train examples
        head["bias"] = jnp.stack([jnp.asarray(one.base_outputs()) for one in variation.labelled])
    state, members = jax.device_put((state, members), replicated(mesh))
    step = make_population_step(
        task_objective(predictor),
        run.optimizer,
        setup.mask,
        clip_norm=config.optimizer.clip_norm,
        micro_batches=run.micro_batches,
        merged=predictor.merged,
        # On a CPU members side by side are no faster, and take more memory.
        at_once=1 if mesh.devices.flat[0].platform == "cpu" else None,
    )
    outputs = make_output_step(predictor)
    forward = jax.jit(lambda state, members, batch: population_predict(outputs, state, members, batch))
    return Population(state, members, jax.jit(step, donate_argnums=0), forward)
