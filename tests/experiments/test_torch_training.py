"""Batches and the train step of the PyTorch reference."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch  # pyright: ignore[reportMissingImports]

from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import MaskingConfig, OptimizerConfig
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import MASK, SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM
from behrt_jax.training.optimizer import clip_factor, make_optimizer
from experiments.benchmarks.torch_model import load_params
from experiments.benchmarks.torch_training import (
    IGNORED,
    TorchBatch,
    full_batches,
    make_torch_step,
    mask_codes,
    padded_batches,
)
from tests.experiments.reference_cases import ALL_LINEARS, MODERN, SIZES, VOCABULARY, padded_case, weights
from tests.models.rows import random_batch, tiny_model

pytestmark = pytest.mark.slow

FIRST_CODE = len(SPECIAL_TOKENS)


def some_sequences(lengths):
    """Token number n has code `FIRST_CODE + n`."""
    count = sum(lengths)
    tokens = np.arange(count)
    return Sequences(
        subject_ids=np.arange(len(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        codes=(FIRST_CODE + tokens).astype(np.int32),
        ages=tokens.astype(np.float32) / 2,
        visits=(tokens % 7).astype(np.int32),
        times=tokens.astype(np.int64),
    )


def example_batch(config):
    """Eight rows of one subject each for a tiny model."""
    rows = random_batch(0, rows=8, length=config.positions, segments=1)
    return TorchBatch(
        torch.from_numpy(rows.codes).long(),
        torch.from_numpy(rows.ages),
        torch.from_numpy(rows.visits).long(),
        torch.from_numpy(rows.segment_ids == 0),
    )


def test_padded_batches_hold_the_last_events_of_each_subject():
    lengths = [3, 9, 1, 5, 4]
    sequences = some_sequences(lengths)
    batches = list(padded_batches(sequences, length=4, batch_size=2))
    assert [batch.codes.shape for batch in batches] == [(2, 4), (2, 4)]
    seen = []
    for batch in batches:
        for codes, ages, visits, padding in zip(*(x.numpy() for x in batch if x is not None), strict=True):
            subject = np.searchsorted(sequences.offsets, codes[0] - FIRST_CODE, side="right") - 1
            end = sequences.offsets[subject + 1]
            recent = slice(end - min(lengths[subject], 4), end)
            events = recent.stop - recent.start
            np.testing.assert_array_equal(padding, np.arange(4) >= events)
            np.testing.assert_array_equal(codes[:events], sequences.codes[recent])
            np.testing.assert_array_equal(ages[:events], sequences.ages[recent])
            np.testing.assert_array_equal(visits[:events], sequences.visits[recent])
            seen.append(subject)
    assert len(set(seen)) == 4
    with pytest.raises(InputError, match="batch_size is 6"):
        next(padded_batches(sequences, length=4, batch_size=6))


def test_full_batches_hold_every_token_once():
    sequences = some_sequences([3, 9, 1, 5, 6])
    batches = list(full_batches(sequences, length=4, batch_size=2))
    codes = np.concatenate([batch.codes.numpy() for batch in batches])
    np.testing.assert_array_equal(np.sort(codes, axis=None), sequences.codes)
    np.testing.assert_array_equal(np.diff(codes, axis=1), 1)
    ages = np.concatenate([batch.ages.numpy() for batch in batches])
    np.testing.assert_array_equal(ages, (codes - FIRST_CODE) / 2)
    assert all(batch.padding is None for batch in batches)


def test_shares_of_masked_random_and_kept_codes():
    torch.manual_seed(0)
    vocabulary = 40
    codes = torch.randint(FIRST_CODE, vocabulary, (4000, 32))
    codes[:, -8:] = torch.arange(8) % FIRST_CODE
    shown, labels = (x.numpy() for x in mask_codes(codes, vocabulary, MaskingConfig()))
    codes = codes.numpy()
    chosen = labels != IGNORED
    np.testing.assert_array_equal(labels[chosen], codes[chosen])
    np.testing.assert_array_equal(shown[~chosen], codes[~chosen])
    assert not chosen[:, -8:].any()
    assert abs(chosen[:, :-8].mean() - 0.15) < 0.004
    assert abs((shown == MASK)[chosen].mean() - 0.8) < 0.01
    others = shown[chosen & (shown != MASK) & (shown != codes)]
    assert abs(len(others) / chosen.sum() - 0.1 * (1 - 1 / (vocabulary - FIRST_CODE))) < 0.01
    assert set(others) == set(range(FIRST_CODE, vocabulary))


@pytest.mark.parametrize("regime", ["full", "frozen", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_steps_move_what_trains_and_nothing_else(regime, precision):
    config = tiny_model(dropout=0.1)
    lora = LoRAConfig(rank=2, targets=ALL_LINEARS) if regime == "lora" else None
    step = make_torch_step(config, 60, regime=regime, lora=lora, precision=precision)
    before = {name: parameter.detach().clone() for name, parameter in step.module.named_parameters()}
    batch = example_batch(config)
    losses = [step(batch) for _ in range(2)]
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in losses)
    for name, parameter in step.module.named_parameters():
        in_encoder = name.startswith(("behrt.encoder.", "behrt.layer_norm."))
        trains = regime == "full" or not in_encoder or name.endswith((".a", ".b"))
        assert bool((parameter != before[name]).any()) == trains, name


@pytest.mark.parametrize("name", ["small", "modern"])
def test_updates_are_those_of_our_optimizer(name):
    """Losses of some updates with clipping and weight decay, from the same weights and masks."""
    config, settings = (
        {**SIZES, **MODERN}[name],
        OptimizerConfig(
            learning_rate=3e-3, weight_decay=0.3, clip_norm=0.5, schedule="constant", warmup_fraction=0.0
        ),
    )
    case, variables = padded_case(config), weights(config)
    step = make_torch_step(config, VOCABULARY, optimizer=settings)
    load_params(step.module, variables["params"])
    shown = torch.from_numpy(case.shown).long()
    labels = np.full(case.shown.shape, IGNORED)
    np.put_along_axis(labels, case.columns, case.targets, axis=1)
    batch = TorchBatch(
        shown,
        torch.from_numpy(case.ages),
        torch.from_numpy(case.visits).long(),
        torch.from_numpy(case.segment_ids == 0),
        torch.from_numpy(case.days).long(),
    )
    theirs = [step.update(batch, shown, torch.from_numpy(labels)).item() for _ in range(6)]

    model = BEHRTForMLM(config, VOCABULARY)
    optimizer = make_optimizer(settings, 6, jax.tree.map(lambda _: "base", variables))

    @jax.jit
    def update(variables, state):
        def loss_of(variables):
            logits = model.apply(variables, case.batch(), case.columns)
            return optax.softmax_cross_entropy_with_integer_labels(logits, case.targets).mean()

        loss, gradient = jax.value_and_grad(loss_of)(variables)
        factor = clip_factor(optax.tree.norm(gradient), settings.clip_norm)
        updates, state = optimizer.update(
            jax.tree.map(lambda leaf: factor * leaf, gradient), state, variables
        )
        return optax.apply_updates(variables, updates), state, loss

    state, own = optimizer.init(variables), []
    for _ in range(6):
        variables, state, loss = update(variables, state)
        own.append(float(loss))
    assert own[0] - own[-1] > 1.0
    np.testing.assert_allclose(theirs, own, rtol=1e-4)


# Warned of by PyTorch itself, when it is first asked to compile.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
@pytest.mark.parametrize("regime", ["full", "lora"])
def test_compiled_updates_equal_eager_ones(regime):
    config = replace(tiny_model(), dropout=0.0)
    lora = LoRAConfig(rank=2, targets=ALL_LINEARS) if regime == "lora" else None
    batch = example_batch(config)
    shown, labels = mask_codes(batch.codes, 60, MaskingConfig(probability=0.5))

    def losses(compiled):
        step = make_torch_step(config, 60, regime=regime, lora=lora, compiled=compiled)
        return [step.update(batch, shown, labels).item() for _ in range(4)]

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-5)
