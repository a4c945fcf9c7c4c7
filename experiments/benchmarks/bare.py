"""The yardstick of `startup`: what a start costs with jax, flax, optax and the model alone.

Scripts as one would write them by hand, of which nothing comes from this package but the model and its
sizes: ``train`` takes one step of AdamW on random codes, ``predict`` loads parameters and runs the model on
one history. ``python -m experiments.benchmarks.bare WHAT JSON``; the last line of the output is JSON.
"""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from behrt_jax.config import ModelConfig
from behrt_jax.data.batches import Batch
from behrt_jax.models.behrt import BEHRTForMLM, BEHRTForTask


def train(task):
    """Initialise the model and train it for a step, all parameters, on rows of random codes."""
    config = ModelConfig(**task["model"])
    rows, length, targets = task["rows"], config.positions, task["targets"]
    model = BEHRTForMLM(config, task["vocabulary_size"])
    random = np.random.default_rng(0)
    batch = Batch(
        codes=random.integers(5, task["vocabulary_size"], (rows, length), np.int32),
        ages=random.uniform(20, 80, (rows, length)).astype(np.float32),
        visits=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, length), np.int32),
        row_ids=np.arange(rows, dtype=np.int32),
    )
    columns = np.sort(
        random.permuted(np.tile(np.arange(length, dtype=np.int32), (rows, 1)), axis=1)[:, :targets]
    )
    labels = np.take_along_axis(batch.codes, columns, axis=1)
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def init(key):
        params = model.init(key, batch)
        return params, optimizer.init(params)

    def loss_of(params, batch, columns, labels, key):
        logits = model.apply(params, batch, columns, False, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, opt_state, batch, columns, labels, key):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, columns, labels, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = init(jax.random.key(0))
    hidden = batch._replace(codes=np.where(np.isin(np.arange(length), columns[0]), 2, batch.codes))
    done = jax.jit(step, donate_argnums=(0, 1))(params, opt_state, hidden, columns, labels, jax.random.key(1))
    jax.block_until_ready(done)


if __name__ == "__main__":
    {"train": train}[sys.argv[1]](json.loads(sys.argv[2]))
    fields = open("/proc/self/stat").read().rpartition(")")[2].split()
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    print(json.dumps({"seconds": seconds, "processor": time.process_time()}))
