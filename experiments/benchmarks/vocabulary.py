"""What a large vocabulary costs a train step, with all logits held at once and in parts.

Each step is compiled for one device and run on made-up packed rows. Beside it, on arrays of the same sizes,
are timed alone: the head's last layer with its loss and gradients, and the gradient of the code table.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.models.losses import decoder_losses, logit_losses, vocabulary_chunk
from behrt_jax.training.devices import make_mesh, put_rows
from behrt_jax.training.masking import masking_budget
from behrt_jax.training.state import assemble_pretraining


@dataclass(frozen=True)
class VocabularyBenchmark:
    """Time the train step at several sizes of the vocabulary, all logits at once and in parts."""

    vocabularies: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Sizes of the vocabulary."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model; its head_chunk, where given, is the size of the parts."""
    tokens: int = 2_000
    """Tokens a step."""
    repeats: int = 5
    """Runs of each program; the median counts."""
    heads: tuple[Literal["whole", "parts"], ...] = ("whole", "parts")
    """All logits at once, and in parts."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_vocabulary(config: VocabularyBenchmark) -> dict[str, Any]:
    """Run every step, print the figures side by side, and return them.

    Returns:
        ``settings``, ``machine`` and ``runs``, a dict for each vocabulary and head: ``vocabulary``,
        ``head``, ``chunk`` (codes at a time), ``step_ms``, ``head_ms`` and ``table_ms`` (see the module),
        ``head_share`` and ``table_share`` of the step, ``temporary_mib`` of the compiled step, and
        ``chosen``, whether it is what a run takes by itself.

    Raises:
        InputError: sizes that make no batch.
    """
    if min(config.vocabularies, default=0) <= len(SPECIAL_TOKENS) or config.repeats < 1:
        raise InputError(
            f"--vocabularies is {config.vocabularies} and --repeats {config.repeats}: give sizes above "
            f"{len(SPECIAL_TOKENS)}, the special tokens, and 1 repeat or more."
        )
    if config.tokens < config.model.positions:
        raise InputError(
            f"--tokens is {config.tokens}: give at least one row, {config.model.positions} tokens."
        )
    runs = [_measure(config, size, head) for size in config.vocabularies for head in config.heads]
    machine = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
    }
    settings = json.loads(json.dumps(asdict(replace(config, output=None))))
    report = {"settings": settings, "machine": machine, "runs": runs}
    print(as_table(report))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def as_table(report: Mapping[str, Any]) -> str:
    """The figures of :func:`benchmark_vocabulary` as aligned text; a star marks what a run would choose."""
    titles = ("vocabulary", "head", "chunk", "step ms", "head", "code table", "temporary MiB")
    lines = ["{:>10} {:<6} {:>8} {:>9} {:>7} {:>10} {:>13}".format(*titles)]
    for run in report["runs"]:
        lines.append(
            f"{run['vocabulary']:>10,} {run['head'] + ('*' if run['chosen'] else ''):<6} {run['chunk']:>8,} "
            f"{run['step_ms']:>9.1f} {run['head_share']:>7.0%} {run['table_share']:>10.0%} "
            f"{run['temporary_mib']:>13,.0f}"
        )
    return "\n".join(lines)


def _measure(config: VocabularyBenchmark, vocabulary: int, head: str) -> dict[str, Any]:
    rows = config.tokens // config.model.positions
    slots = rows * masking_budget(config.model.positions, PretrainConfig().masking.probability)
    # A forced choice of parts takes the size that a batch too large to hold would get.
    parts = vocabulary_chunk(config.model.head_chunk, 2**31, vocabulary) or -(-vocabulary // 2)
    chunk = parts if head == "parts" else vocabulary
    run = PretrainConfig(model=replace(config.model, head_chunk=chunk))
    step_ms, temporary = _time_step(run, vocabulary, rows, config.repeats)
    head_ms = _time_head(run.model, vocabulary, slots, config.repeats)
    table_ms = _time_table(run.model, vocabulary, rows * config.model.positions, config.repeats)
    by_itself = vocabulary_chunk(config.model.head_chunk, slots, vocabulary)
    return {
        "vocabulary": vocabulary,
        "head": head,
        "chunk": chunk,
        "step_ms": step_ms,
        "head_ms": head_ms,
        "table_ms": table_ms,
        "head_share": head_ms / step_ms,
        "table_share": table_ms / step_ms,
        "temporary_mib": temporary,
        "chosen": (by_itself is None) == (head == "whole"),
    }


def _time_step(run: PretrainConfig, vocabulary: int, rows: int, repeats: int) -> tuple[float, float]:
    """Milliseconds and MiB of temporaries of the whole train step."""
    mesh = make_mesh(jax.devices()[:1])
    assembly = assemble_pretraining(run, vocabulary, mesh)
    state = assembly.first_state()
    batch = put_rows(_batch(run.model, vocabulary, rows), mesh)
    program = assembly.jit(assembly.step()).lower(state, batch).compile()
    memory: Any = program.memory_analysis()

    def once() -> Any:
        nonlocal state
        state, totals = program(state, batch)
        return totals

    return _milliseconds(once, repeats), memory.temp_size_in_bytes / 2**20


def _time_head(model: ModelConfig, vocabulary: int, slots: int, repeats: int) -> float:
    chunk, dtype = model.head_chunk or vocabulary, jnp.dtype(model.compute_dtype)
    features_key, kernel_key = jax.random.split(jax.random.key(0))
    features = jax.random.normal(features_key, (slots, model.hidden_size))
    kernel = 0.02 * jax.random.normal(kernel_key, (model.hidden_size, vocabulary))
    labels, weights = jnp.arange(slots, dtype=jnp.int32) % vocabulary, jnp.ones(slots, bool)

    def loss(features: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        if chunk < vocabulary:
            found = decoder_losses(features, kernel, bias, labels, weights, chunk=chunk, dtype=dtype)
        else:
            logits = jnp.matmul(
                features.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32
            )
            found = logit_losses(logits + bias[None, :], labels, weights)
        return found.loss, found.ranks

    program = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    return _milliseconds(lambda: program(features, kernel, jnp.zeros(vocabulary)), repeats)


def _time_table(model: ModelConfig, vocabulary: int, tokens: int, repeats: int) -> float:
    codes = jnp.asarray(_codes(vocabulary, (tokens,)))
    table, of_rows = jnp.zeros((vocabulary, model.embedding_size)), jnp.ones((tokens, model.embedding_size))
    program = jax.jit(lambda table, of_rows: jax.vjp(lambda table: table[codes], table)[1](of_rows))
    return _milliseconds(lambda: program(table, of_rows), repeats)


def _milliseconds(once: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(once())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(once())
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def _codes(vocabulary: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes with the frequencies of Zipf's law, int32."""
    uniform = np.random.default_rng(0).random(shape)
    rank = (vocabulary - len(SPECIAL_TOKENS)) ** uniform - 1.0
    return (len(SPECIAL_TOKENS) + rank).astype(np.int32)


def _batch(model: ModelConfig, vocabulary: int, rows: int) -> Batch:
    """Full rows of one history each."""
    shape = (rows, model.positions)
    positions = np.broadcast_to(np.arange(model.positions, dtype=np.int32), shape)
    return Batch(
        codes=_codes(vocabulary, shape),
        ages=(40.0 + positions / 10).astype(np.float32),
        visits=positions // 3,
        days=14_000 + 40 * positions,
        positions=positions,
        segment_ids=np.ones(shape, np.int32),
        row_ids=np.arange(rows, dtype=np.int32),
    )
