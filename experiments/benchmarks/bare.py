"""The yardstick of `startup`: scripts with jax, flax, optax and the model, and nothing else of this package.

As one would write them by hand: ``train`` takes one step of AdamW on all parameters and random codes,
``predict`` loads parameters and runs the model once, on one history. Run as
``python experiments/benchmarks/bare.py WHAT JSON``.
"""

import json
import sys
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from behrt_jax.config.model import ModelConfig
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask, PatientEmbedding, example_batch


def train(model, vocabulary_size, rows, targets):
    """Initialise the model and train it for a step."""
    network = BEHRTForMLM(ModelConfig(**model), vocabulary_size)
    random = np.random.default_rng(0)
    batch = example_batch(network.config, rows)
    labels = random.integers(5, vocabulary_size, (rows, targets), np.int32)
    columns = np.tile(np.arange(targets, dtype=np.int32), (rows, 1))
    batch = batch._replace(codes=random.integers(5, vocabulary_size, batch.codes.shape, np.int32))
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def init(key):
        params = network.init(key, batch)
        return params, optimizer.init(params)

    def loss_of(params, batch, columns, labels, key):
        logits: Any = network.apply(params, batch, columns, False, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, batch, columns, labels, key):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, columns, labels, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = init(jax.random.key(0))
    return step(params, opt_state, batch, columns, labels, jax.random.key(1))[2]


def predict(model, vocabulary_size, outputs, pooling, parameters, embeddings):
    """Load the parameters and run the model on one history of random codes."""
    if embeddings:
        network = PatientEmbedding(ModelConfig(**model), vocabulary_size, pooling)
    else:
        network = BEHRTForTask(ModelConfig(**model), vocabulary_size, outputs, pooling)
    with np.load(parameters) as stored:
        params = unflatten_dict({tuple(name.split("/")): stored[name] for name in stored.files})
    batch = example_batch(network.config)
    codes = np.random.default_rng(0).integers(5, vocabulary_size, batch.codes.shape, np.int32)
    run = jax.jit(lambda params, batch: network.apply({"params": params}, batch, 1))
    return run(params, batch._replace(codes=codes))


if __name__ == "__main__":
    jax.block_until_ready({"train": train, "predict": predict}[sys.argv[1]](**json.loads(sys.argv[2])))
