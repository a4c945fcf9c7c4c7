"""Defects of earlier EHR models, each with the test that would catch it here.

Found by reading or measured in BEHRT (2020), BONSAI, the PyTorch original of this library, and maxtext.
Where the test stands with the code it is about, it is listed here; the others follow below.

BEHRT

- Codes and labels misalign after a code that is kept:
  tests/training/test_masking.py::test_labels_are_the_codes_that_were_hidden_and_nothing_else_changes
- Special tokens as random replacements:
  tests/training/test_masking.py::test_shares_of_masked_random_and_kept_codes
- The best epoch chosen on the test set: below, `test_held_out_*`, `test_tuning_*`, `test_the_best_*`.

BONSAI

- Accumulation that forgets all micro-batches but the last:
  tests/training/test_step.py::test_micro_batches_equal_one_batch
  tests/training/test_step.py::test_uneven_micro_batches_are_weighted_by_their_targets
- Training rows never shuffled: below, `test_a_run_*`, and
  tests/data/test_batches.py::test_epochs_and_seeds_differ
- A later checkpoint in place of the best: below, `test_the_best_*`, and
  tests/training/test_checkpoints.py::test_the_latest_and_the_best_are_kept

The PyTorch original

- Adapters outside the graph: below, `test_every_adapter_*`, `test_the_output_*`, and
  tests/training/test_step.py::test_after_two_steps_every_adapter_has_moved_and_the_base_is_bit_identical
  tests/adapters/test_lora.py::test_merged_parameters_give_the_adapted_output
- An adapter saved without the trained embeddings and head:
  tests/workflows/test_pretrain.py::test_the_adapter_alone_on_its_base_gives_the_best_model
- 92.3 % of the parameters train although there are adapters: below, `test_what_hardly_*`, and
  tests/training/test_freezing.py::test_parameter_table
- Embeddings and head frozen at random values: below, `test_frozen_random_*`, and
  tests/workflows/test_pretrain.py::test_known_mistakes_are_allowed_with_a_warning
- [MASK] has the id of padding, so that nobody attends to it: below, `test_the_place_*`.
- Masks drawn once and reused: below, `test_no_configuration_*`, and
  tests/training/test_step.py::test_masks_are_new_at_each_step_unless_they_are_static
- Pooling by a [CLS] that no sequence has:
  tests/models/test_behrt.py::test_cls_pooling_without_a_cls_token_is_refused
- Months added to years of age, events unsorted: tests/data/test_known_pitfalls.py

maxtext

- The frozen base in the norm that clips: below, `test_clipping_*`, and
  tests/training/test_step.py::test_clipping_and_gradient_norm_are_over_trainable_leaves_alone
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from behrt_jax.adapters import lora
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import TrainingBatches
from behrt_jax.data.vocabulary import MASK, PAD, Vocabulary
from behrt_jax.diagnosis.before import check_before
from behrt_jax.diagnosis.finding import RunRecord
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.presets import LARGE, PRETRAIN
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import put_rows
from behrt_jax.training.freezing import count_parameters, trainable_leaves
from behrt_jax.training.masking import mask_codes
from behrt_jax.training.state import set_up
from behrt_jax.workflows import announce
from behrt_jax.workflows.checks import check
from behrt_jax.workflows.pretrain import pretrain
from behrt_jax.workflows.run import settings
from tests.data import test_known_pitfalls
from tests.models.rows import VOCABULARY, random_batch, tiny_model
from tests.records.meds_folder import DAY, Row, by_remainder, history_rows, write_meds
from tests.training.test_step import ALL_LINEARS, TINY, start
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
HISTORIES = history_rows(subjects=60, days=6)
EPOCHS = 5
TESTS = Path(__file__).parent
BY_THE_CLOCK = {"steps_per_second", "tokens_per_second", "data_share", "device_share"}


def test_every_test_named_above_exists():
    named = re.findall(r"tests/(\S+)\.py::(\w+)", (__doc__ or "") + (test_known_pitfalls.__doc__ or ""))
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (TESTS / f"{file}.py").read_text(), (file, name)


# A run as a whole: which split decides what, order of the rows, the best checkpoint.


def other_histories(split: str) -> list[Row]:
    """The histories, but those of one split with other codes, days and lengths."""
    subjects = set(by_remainder(HISTORIES)[split])
    rows = []
    for row in HISTORIES:
        if row.subject not in subjects or row.code == "MEDS_BIRTH":
            rows.append(row)
        elif row.time % 3:
            rows += [row._replace(code="DIAGNOSIS//0", time=row.time + day * DAY) for day in range(4)]
        else:
            rows += [row._replace(code="DIAGNOSIS//never seen elsewhere"), row._replace(code="DIAGNOSIS//1")]
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Pretrain on rows; returns the configuration and step -> batch as the run asked for them."""
    done = {}

    def run(name, rows=HISTORIES, **train):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            meds = write_meds(folder / "meds", rows, splits=by_remainder(HISTORIES))
            data = DataConfig(source="meds", path=meds, min_count=1)
            model = tiny_model(positions=32, layers=1)
            config = replace(SMALL_RUN, model=model, data=data, output=folder / "run")
            train = {"epochs": EPOCHS, "batch_size": 8, "validate_every": None, **train}
            config = changed(config, "train", **train)
            config = changed(config, "optimizer", learning_rate=3e-2)  # it overfits within the epochs
            shown, original = {}, TrainingBatches.batch

            def batch(self, step, *places):
                shown[step] = original(self, step, *places)
                return shown[step]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(TrainingBatches, "batch", batch)
                summary = pretrain(config, ONE).summary
            done[name] = config, summary, shown
        return done[name]

    return run


def lines(config: PretrainConfig, split: str) -> list[dict]:
    """Lines of metrics.jsonl about a split, without what the clock decides."""
    found = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if name not in BY_THE_CLOCK}
        for line in found
        if line["split"] == split
    ]


def best_trees(config: PretrainConfig) -> tuple[int, list[np.ndarray]]:
    """Step and leaves of the best checkpoint."""
    vocabulary = Vocabulary.read(config.output / "vocabulary.parquet")
    shapes = set_up(config, len(vocabulary)).shapes
    with open_checkpoints(config.output / "checkpoints") as checkpoints:
        step = checkpoints.best_step()
        assert step is not None
        found = checkpoints.restore(step, params=shapes["params"], lora=shapes["lora"])
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves((found.params, found.lora))]


def assert_same_leaves(one, other):
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_held_out_histories_decide_nothing(run):
    """The best epoch chosen on the test set (BEHRT): other held-out histories change not one bit of a run."""
    config, summary, _ = run("plain")
    other, other_summary, _ = run("held_out", other_histories("held_out"))
    assert summary["data"]["splits"]["held_out"] != other_summary["data"]["splits"]["held_out"]
    for split in ("train", "tuning"):
        assert lines(config, split) == lines(other, split) != []
    assert lines(other, "held_out") == []
    files = [(one.output / "vocabulary.parquet").read_bytes() for one in (config, other)]
    assert files[0] == files[1]
    (step, leaves), (other_step, other_leaves) = best_trees(config), best_trees(other)
    assert step == other_step
    assert_same_leaves(leaves, other_leaves)


@pytest.mark.slow
def test_tuning_histories_are_validated_on_and_never_trained_on(run):
    """The best epoch chosen on another split (BEHRT): other tuning histories change validations alone."""
    config, other = run("plain")[0], run("tuning", other_histories("tuning"))[0]
    assert lines(config, "train") == lines(other, "train")
    pairs = list(zip(lines(config, "tuning"), lines(other, "tuning"), strict=True))
    assert pairs
    assert all(one["loss"] != two["loss"] for one, two in pairs)


def test_the_best_checkpoint_outlives_later_ones(run):
    """Periodic saves over the best checkpoint (BONSAI): it holds the parameters of the lowest tuning loss."""
    config, summary, _ = run("plain")
    validations = lines(config, "tuning")
    lowest = min(validations, key=lambda line: line["loss"])["step"]
    assert lowest < validations[-1]["step"], "the test needs a run that overfits"
    step, leaves = best_trees(config)
    assert (step, summary["best"]["step"]) == (lowest, lowest)
    # A run that ends there has no later checkpoint to mix it up with.
    short = run("short", max_steps=lowest)[0]
    assert_same_leaves(leaves, best_trees(short)[1])


def test_a_run_shuffles_its_rows_anew_in_each_epoch(run):
    """A training order that is always the same (BONSAI): epochs show the same windows in other batches."""
    _, _, shown = run("plain")
    steps = len(shown) // EPOCHS
    assert steps > 2
    assert sorted(shown) == list(range(EPOCHS * steps))
    epochs = [[shown[epoch * steps + step].codes for step in range(steps)] for epoch in range(EPOCHS)]
    assert len({np.concatenate(epoch).tobytes() for epoch in epochs}) == EPOCHS
    assert len({np.sort(np.concatenate(epoch), None).tobytes() for epoch in epochs}) == 1


@pytest.mark.parametrize("name", PRETRAIN)
def test_no_configuration_reuses_its_masks(name):
    """Masks drawn once and reused every epoch (PyTorch original): only ever on demand."""
    assert PRETRAIN[name].train.static_masks is False


# Adapters, freezing and clipping.


@pytest.fixture(scope="module", params=["activations", "merged"])
def adapted(request):
    """Functions of the adapters (gradient of the masked-code loss, logits), and fresh adapters."""
    config = replace(TINY, model=tiny_model(layers=1))
    predictor = set_up(config, VOCABULARY).predictor._replace(product=request.param)
    params = jax.jit(predictor.model.init)(jax.random.key(0), example_batch(config.model))["params"]
    batch = random_batch(0)
    mask = jax.jit(lambda key: mask_codes(key, batch.codes, batch.row_ids, config.masking, VOCABULARY))
    masked = jax.device_get(mask(jax.random.key(3)))

    def logits(adapters):
        shown = batch._replace(codes=masked.codes)
        return predictor.outputs({"params": params, "lora": adapters}, shown, masked.columns)

    def loss(adapters):
        return optax.softmax_cross_entropy_with_integer_labels(logits(adapters), masked.labels).sum()

    init = jax.jit(lora.init, static_argnums=2)
    adapters = jax.device_get(init(jax.random.key(1), params, config.lora))
    return jax.jit(jax.grad(loss)), jax.jit(logits), adapters


def randomised_b(adapters, only=None):
    """The adapters with b at random, in all layers or in one."""

    def at_random(path, leaf):
        names = tuple(part.key for part in path)
        if names[-1] != "b" or only not in (None, names):
            return leaf
        return 0.1 * np.random.default_rng(len(str(names))).normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(at_random, adapters)


def test_every_adapter_is_in_the_graph(adapted):
    """Adapters outside the graph (PyTorch original): b has a gradient at step 0, a once b is not 0."""
    gradient, _, adapters = adapted
    for factor, trees in (("b", adapters), ("a", randomised_b(adapters))):
        found = {path: leaf for path, leaf in flatten_dict(gradient(trees)).items() if path[-1] == factor}
        assert len(found) == len(ALL_LINEARS)
        assert {path[-2] for path in found} == set(ALL_LINEARS)
        for path, leaf in found.items():
            assert np.abs(leaf).max() > 1e-4, path


def test_the_output_depends_on_every_single_adapter(adapted):
    """Adapters without effect (PyTorch original): with one b at random the output is another."""
    _, logits, adapters = adapted
    before = np.asarray(logits(adapters))
    for path in flatten_dict(adapters):
        if path[-1] == "b":
            assert np.abs(logits(randomised_b(adapters, path)) - before).max() > 1e-4, path


def keep_gradient() -> optax.GradientTransformation:
    """Moves nothing and keeps, as its state, what it was given."""
    zeros = jax.tree_util.Partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradient, *_: (zeros(gradient), gradient))


def gradient_of_a_step(regime: str, clip_norm: float | None):
    """Mask of what trains, the gradient that reaches the optimiser, and the reported norm."""
    config = replace(
        TINY,
        model=tiny_model(layers=1, dropout=0.0),
        freezing=FreezingConfig(regime),  # pyright: ignore[reportArgumentType]
        optimizer=replace(TINY.optimizer, clip_norm=clip_norm),
    )
    setup, state, step, mesh = start(config, optimizer=keep_gradient())
    state, totals = step(state, put_rows(random_batch(0), mesh))
    return setup.mask, state.opt_state, float(totals["gradient_norm"])


def test_clipping_is_by_the_norm_of_what_trains():
    """The frozen base in the clipped norm (maxtext): the more is frozen, the less is the rest scaled down."""
    _, raw, full_norm = gradient_of_a_step("full", None)
    mask, clipped, norm = gradient_of_a_step("lora_only", 1e-3)
    raw, clipped = jax.device_get((raw, clipped))
    expected = np.sqrt(sum(float((leaf**2).sum()) for leaf in trainable_leaves(raw, mask)))
    assert 1e-3 < expected < 0.9 * full_norm
    np.testing.assert_allclose(norm, expected, rtol=1e-4)
    for ours, theirs, trains in zip(*map(jax.tree.leaves, (clipped, raw, mask)), strict=True):
        factor = 1e-3 / expected if trains else 0.0
        np.testing.assert_allclose(ours, factor * theirs, rtol=1e-3, atol=1e-9)


class Recorder:
    """Stands in for a console: keeps the cells of tables."""

    def __init__(self):
        self.cells = []

    def table(self, title, columns, rows):
        self.cells += [cell for row in rows for cell in row]


def test_what_hardly_saves_anything_is_plain_in_the_parameter_table():
    """92.3 % of the parameters train in spite of LoRA (PyTorch original): the printed table says so."""
    adapters = LoRAConfig(rank=16, targets=("out",))
    config = PretrainConfig(model=LARGE, lora=adapters, freezing=FreezingConfig("all_but_adapted"))
    setup = set_up(config, 1000)
    report = {**count_parameters(setup.shapes, setup.mask), "regime": "all_but_adapted", "adapters": []}
    console = Recorder()
    announce.parameters(console, report, "activations")  # pyright: ignore[reportArgumentType]
    assert console.cells[-4:] == ["all", "20,366,312", "18,790,376", "92.3 %"]


def told(**freezing) -> str:
    """What is said about a choice of what trains beside fresh adapters: warnings, or a refusal."""
    config = replace(SMALL_RUN, freezing=FreezingConfig(**freezing))
    try:
        check(config)
    except InputError as error:
        return str(error)
    setup = set_up(config, 200)
    report = {**count_parameters(setup.shapes, setup.mask), "regime": config.freezing.regime}
    found = check_before(RunRecord(settings(config), report))
    return " ".join(finding.seen for finding in found if finding.severity != "info")


def test_what_hardly_saves_anything_is_warned_of():
    """92.3 % of the parameters train in spite of LoRA (PyTorch original): a warning tells the regime."""
    assert "all_but_adapted" in told(regime="all_but_adapted")
    assert told(regime="lora") == ""


@pytest.mark.parametrize(
    "freezing",
    [
        {"regime": "lora_only"},
        {"regime": "lora_pretrained"},
        {"groups": ("lora",)},
        {"groups": ("lora", "base")},
    ],
    ids=str,
)
def test_frozen_random_embeddings_are_warned_of(freezing):
    """Embeddings frozen at random values (PyTorch original): from scratch there is a warning or a refusal."""
    assert "embedding" in told(**freezing)


# [MASK].


def test_the_place_of_a_mask_is_read_and_that_of_padding_is_not():
    """[MASK] with the id of padding (PyTorch original): the age at a masked code still reaches the others."""
    assert MASK != PAD
    model = BEHRTForMLM(tiny_model(), VOCABULARY)
    variables = jax.jit(model.init)(jax.random.key(0), example_batch(model.config))
    batch = random_batch(0, rows=1, segments=1)
    length = int((batch.segment_ids > 0).sum())
    assert 3 < length < batch.codes.shape[1]
    apply = jax.jit(lambda b: model.apply(variables, b))

    def logits(batch):
        return np.asarray(apply(batch))

    def effect_of_age_at(column):
        codes, ages = batch.codes.copy(), batch.ages.copy()
        codes[0, 1] = MASK
        before = logits(batch._replace(codes=codes))
        ages[0, column] = 97.0 - ages[0, column]
        after = logits(batch._replace(codes=codes, ages=ages))
        others = np.setdiff1d(np.arange(length), [column])
        return np.abs(after - before)[0, others].max(axis=1)

    assert effect_of_age_at(1).min() > 1e-5
    assert effect_of_age_at(length).max() == 0.0
