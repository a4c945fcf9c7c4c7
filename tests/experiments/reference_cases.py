"""Models, weights and padded batches on which the JAX model and the PyTorch reference are compared."""

import zlib
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from behrt_jax.adapters import lora as adapters
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.vocabulary import MASK, SPECIAL_TOKENS
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.models.losses import logit_losses
from behrt_jax.presets import LARGE, MEDIUM, SMALL
from behrt_jax.training.step import Predictor

VOCABULARY = 1000
TARGETS = 6
ALL_LINEARS = ("query", "key", "value", "out", "intermediate", "output")
SIZES = {
    name: replace(c, dropout=0.0) for name, c in {"small": SMALL, "medium": MEDIUM, "large": LARGE}.items()
}
MODERN = {
    "modern": replace(
        SIZES["small"], position_embedding="rope", time="time2vec", ffn="swiglu", norm="rms", bias=False,
        tied_decoder=True, visit_embedding="none",
    ),
    "by days": replace(
        SIZES["small"], position_embedding="rope_time", time="gaps", ffn="geglu",
        visit_embedding="alternating",
    ),
    "by visits": replace(SIZES["small"], position_embedding="rope", position_of="visit", tied_decoder=True),
}  # fmt: skip
"""Models of today, of the size of `small`."""
TOLERANCE = 5e-6
"""Of a difference relative to what is compared, in the 2-norm over a leaf."""


class PaddedCase(NamedTuple):
    """Rows of one subject each, some columns of which are masked."""

    shown: np.ndarray
    ages: np.ndarray
    visits: np.ndarray
    days: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    columns: np.ndarray
    """Masked columns, int32 ``[rows, TARGETS]``."""
    targets: np.ndarray
    """What stood there, int32 ``[rows, TARGETS]``."""

    def batch(self) -> Batch:
        """The rows as our model takes them."""
        rows = np.arange(len(self.shown), dtype=np.int32)
        return Batch(self.shown, self.ages, self.visits, self.days, self.positions, self.segment_ids, rows)


class Results(NamedTuple):
    """What is compared."""

    logits: np.ndarray
    """At the masked columns, ``[rows, TARGETS, vocabulary]``."""
    loss: float
    gradients: dict[tuple[str, ...], np.ndarray]
    """By path, the collection in front."""


def padded_case(config: ModelConfig) -> PaddedCase:
    """A full row, a half-full one and a short one; ages and visits reach over the ends of their tables."""
    length = config.positions
    lengths = np.array([length, length // 2, TARGETS + 1])
    real = np.arange(length) < lengths[:, None]
    codes = len(SPECIAL_TOKENS) + np.floor(
        (uniform("codes", real.shape) + 1) / 2 * (VOCABULARY - len(SPECIAL_TOKENS))
    )
    ages = 55 + 55 * uniform("ages", real.shape)
    visits = np.sort(np.floor(300 + 300 * uniform("visits", real.shape)))
    # Visits of twenty days, in this century and the one before. (Of dates two centuries away, gradients of
    # fast frequencies are sums that cancel: float32 loses their last digits, here and in PyTorch.)
    days = 20_000 * uniform("rows", (len(lengths), 1)).round() + 20 * (visits - visits[:, :1])
    columns = np.argsort(np.where(real, uniform("columns", real.shape), 2.0), axis=1)[:, :TARGETS]
    codes = np.where(real, codes, 0).astype(np.int32)
    shown = codes.copy()
    np.put_along_axis(shown, columns, MASK, axis=1)
    return PaddedCase(
        shown,
        np.where(real, ages, 0).astype(np.float32),
        np.where(real, visits, 0).astype(np.int32),
        np.where(real, days, 0).astype(np.int32),
        np.where(real, np.arange(length), 0).astype(np.int32),
        real.astype(np.int32),
        columns.astype(np.int32),
        np.take_along_axis(codes, columns, axis=1),
    )


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) from the raw words of PCG64, the same with any version of numpy: float64."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)


def weights(config: ModelConfig, lora: LoRAConfig | None = None) -> dict[str, Any]:
    """Variables from their paths alone, float32: of the size of initial ones, but no bias and no adapter is
    zero, so that none of them can be mistaken.
    """
    key = jax.random.key(0)
    model = BEHRTForMLM(config, VOCABULARY)
    variables = jax.eval_shape(model.init, key, example_batch(config))
    if lora is not None:
        grown = jax.eval_shape(lambda params: adapters.init(key, params, lora), variables["params"])
        variables = {**variables, "lora": grown}

    def drawn(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-2] in ("gap", "calendar"):  # turns in 4 years and more, as large as a code
            size, least = {"frequency": (80.0, 80.0), "phase": (3.0, 0.0), "scale": (0.03, 0.0)}[path[-1]]
            return (least + size * uniform("/".join(path), shape)).astype(np.float32)
        size = {"embedding": 0.035, "bias": 0.05, "scale": 0.2, "b": 0.05}.get(
            path[-1], (3 / shape[0]) ** 0.5
        )
        values = size * uniform("/".join(path), shape) + (path[-1] == "scale")
        return values.astype(np.float32)

    return unflatten_dict({path: drawn(path, leaf.shape) for path, leaf in flatten_dict(variables).items()})


def ours(
    config: ModelConfig,
    variables: dict[str, Any],
    lora: LoRAConfig | None = None,
    product: Any = "activations",
) -> Results:
    """Logits, loss and gradients of the JAX model."""
    case = padded_case(config)
    predictor = Predictor(BEHRTForMLM(config, VOCABULARY), lora, product)

    @jax.jit
    def results(variables):
        def loss_of(variables):
            logits = predictor.outputs(variables, case.batch(), case.columns)
            found = logit_losses(logits, jnp.asarray(case.targets), jnp.ones(case.targets.shape, bool))
            return found.loss / found.losses.size, logits

        return jax.value_and_grad(loss_of, has_aux=True)(variables)

    (loss, logits), gradients = results(variables)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(gradients).items()}
    return Results(np.asarray(logits), float(loss), leaves)  # pyright: ignore[reportArgumentType]


def is_key_bias(path: tuple[str, ...]) -> bool:
    """Whether the leaf moves all scores of a query alike, so that its true gradient is zero."""
    return path[-2:] == ("key", "bias")
