"""LoRA (Hu et al. 2021, arXiv 2106.09685) as a second tree beside the parameters.

``variables = {"params": base, "lora": adapters}``: for each targeted kernel at ``params/<path>/kernel``
there is ``lora/<path>/{a, b}`` with ``a`` `[in, rank]` and ``b`` `[rank, out]`. The modules know
nothing of it: :func:`applying` adds the adapters while a model is applied, by one of three products, and
:func:`merge` folds them into the kernels for good. Where a model stacks its layers (`models.stacked_layers`),
kernels, ``a`` and ``b`` all have a leading axis over layers.

Every leaf of the two trees is in one group of :data:`GROUPS`; groups are what trains or stays frozen.
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax.tree_util import DictKey, KeyPath, tree_map_with_path

from behrt_jax.adapters.targets import AdaptedLayer, adapted_layers, leaves_by_path, rank_of, scale
from behrt_jax.config.model import LoRAConfig
from behrt_jax.errors import InputError
from behrt_jax.models.layers import dropout
from behrt_jax.models.stacked_layers import Path, Tree, is_stacked

GROUPS = ("lora", "embedding", "head", "base")
"""Of parameters, by their path."""
Factors = tuple[jax.Array, jax.Array]
Product = Literal["activations", "extended", "merged"]
"""Ways to compute ``x @ (kernel + scale * a @ b)``, with equal results."""


def path_names(path: KeyPath) -> Path:
    """Names along a key path of nested dicts."""
    return tuple(str(key.key) if isinstance(key, DictKey) else str(key) for key in path)


def label(path: Path) -> str:
    """Group of the leaf at `path` in ``{"params": ..., "lora": ...}``: exactly one of `GROUPS`.

    Raises:
        ValueError: the path fits no group, or more than one.
    """
    collection, inner = path[0], path[1:]
    rules = {
        # Embedding rows that an adapter adds are a part of it.
        "lora": collection == "lora" or path[:2] == ("params", "new_codes"),
        "embedding": collection == "params" and "embeddings" in inner,
        "head": collection == "params" and any(name.endswith("_head") for name in inner),
        "base": collection == "params" and "encoder" in inner,
    }
    fitting = [group for group, fits in rules.items() if fits]
    if len(fitting) != 1:
        raise ValueError(
            f"leaf {'/'.join(path)} must belong to one parameter group, found: {fitting or 'none'}"
        )
    return fitting[0]


def labels(variables: Tree) -> Tree:
    """Tree of group names with the structure of `variables`."""
    return tree_map_with_path(lambda path, _: label(path_names(path)), variables)


def init(key: jax.Array, params: Tree, config: LoRAConfig) -> Tree:
    """Fresh adapters, by ``config.init``; whichever it is, they change nothing at first, but for rounding.

    - ``default``: ``a`` uniform (Kaiming), ``b`` zero.
    - ``orthogonal``: both random, ``a`` in one half of the rank and ``b`` in the other, so that their product
      is zero (as ``init_lora_weights="orthogonal"`` of PEFT; a single rank has ``b`` zero).
    - ``pissa`` (Meng et al. 2024, arXiv 2404.02948): with the kernel's singular values ``u * s @ v``, the
      largest of them in ``a = u * sqrt(s / scale)`` and ``b = sqrt(s / scale) * v``. There it is the frozen
      kernel from which ``scale * a @ b`` is taken; here ``a0`` and ``b0`` beside ``a`` and ``b`` are what
      they began with, and the kernel stays what it was, see :func:`factors`.

    Each adapter's key comes from its layer's name, so that it does not depend on which others there are, nor
    on whether layers are stacked.

    Args:
        key: typed PRNG key.
        params: parameter tree with float kernels `[in, out]`, or `[layers, in, out]` where stacked.
        config: rank, targets and so on.

    Returns:
        Tree of float32 ``a`` `[in, rank]` and ``b`` `[rank, out]`, or `[layers, in, rank]` and
        `[layers, rank, out]`; with ``pissa`` also ``a0`` and ``b0``.

    Raises:
        InputError: see :func:`behrt_jax.adapters.targets.adapted_layers`.
    """
    kernels = leaves_by_path(params)
    parts: dict[Path, list[jax.Array]] = {}
    for layer in adapted_layers(params, config):
        own_key = jax.random.fold_in(key, zlib.crc32(layer.name.encode()))
        kernel = kernels[(*layer.path, "kernel")]
        kernel = kernel if layer.layer is None else kernel[layer.layer]
        for side, leaf in _first_values(own_key, kernel, layer, config).items():
            parts.setdefault((*layer.path, side), []).append(leaf)
    return unflatten_dict(
        {path: jnp.stack(leaves) if is_stacked(path) else leaves[0] for path, leaves in parts.items()}
    )


def _first_values(
    key: jax.Array, kernel: jax.Array, layer: AdaptedLayer, config: LoRAConfig
) -> dict[str, jax.Array]:
    inputs, outputs, rank = layer.inputs, layer.outputs, layer.rank
    if config.init == "pissa":
        u, s, v = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)  # [I, M], [M], [M, O]
        root = jnp.sqrt(s[:rank] / scale(config, layer.path))
        a, b = u[:, :rank] * root[None], root[:, None] * v[:rank]
        return {"a": a, "b": b, "a0": a, "b0": b}
    if config.init == "orthogonal":
        of_rank, of_a, of_b = jax.random.split(key, 3)
        q = jnp.linalg.qr(jax.random.normal(of_rank, (rank, rank)))[0]
        left, right = q[0::2], q[1::2]  # rows at right angles
        exactly = partial(jnp.matmul, precision="highest")
        a = exactly(0.1 * jax.random.normal(of_a, (inputs, len(left))), left)
        return {"a": a, "b": exactly(right.T, 0.1 * jax.random.normal(of_b, (len(right), outputs)))}
    bound = inputs**-0.5
    a = jax.random.uniform(key, (inputs, rank), jnp.float32, -bound, bound)
    return {"a": a, "b": jnp.zeros((rank, outputs), jnp.float32)}


def merge(params: Tree, lora: Tree, config: LoRAConfig) -> Tree:
    """Parameters with ``scale * a @ b`` added to each adapted kernel; every other leaf is the same.

    Of a ``pissa`` adapter it is ``scale * (a @ b - a0 @ b0)``.
    """
    leaves, adapters = leaves_by_path(params), leaves_by_path(lora)
    paths = [(*path, "kernel") for path in layer_paths(lora)]
    found = _merged_kernels(
        [leaves[path] for path in paths],
        [_factors_at(adapters, path[:-1]) for path in paths],
        tuple(scale(config, path[:-1]) for path in paths),
    )
    return unflatten_dict({**leaves, **dict(zip(paths, found, strict=True))})


@partial(jax.jit, static_argnums=2)  # one program: it is compiled while somebody waits for one patient
def _merged_kernels(
    kernels: list[jax.Array], products: list[Factors], scales: tuple[float, ...]
) -> list[jax.Array]:
    return [
        (kernel + scale * jnp.matmul(*both, precision="highest")).astype(kernel.dtype)
        for kernel, both, scale in zip(kernels, products, scales, strict=True)
    ]


def unmerge(params: Tree, lora: Tree, config: LoRAConfig) -> Tree:
    """Inverse of :func:`merge`, up to rounding."""
    return merge(params, scaled(lora, -1.0), config)


def merged_kernels(params: Tree, lora: Tree, config: LoRAConfig) -> Tree:
    """The ``merged`` collection: at ``<path>/kernel``, each adapted kernel as :func:`merge` makes it.

    With it beside ``params`` and ``lora``, the `merged` product of :func:`applying` does not merge anew: a
    step that applies the model once for each micro-batch merges once.
    """
    kernels, adapters = leaves_by_path(params), leaves_by_path(lora)
    return unflatten_dict(
        {
            (*path, "kernel"): merged_kernel(
                kernels[(*path, "kernel")], *_factors_at(adapters, path), scale(config, path)
            )
            for path in layer_paths(lora)
        }
    )


def factors(a: jax.Array, b: jax.Array, a0: jax.Array | None = None, b0: jax.Array | None = None) -> Factors:
    """Two factors whose product is ``a @ b``; or ``a @ b - a0 @ b0`` where an adapter keeps its first values.

    Args:
        a: `[..., in, rank]`.
        b: `[..., rank, out]`.
        a0: as `a`, at first.
        b0: as `b`, at first.

    Returns:
        ``a`` and ``b``; or of twice the rank, without a gradient for ``a0`` and ``b0``.
    """
    if a0 is None or b0 is None:
        return a, b
    a0, b0 = jax.lax.stop_gradient((a0, b0))
    return jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -2)


def _factors_at(adapters: Mapping[Path, jax.Array], path: Path) -> Factors:
    a, b, a0, b0 = (adapters.get((*path, side)) for side in ("a", "b", "a0", "b0"))
    assert a is not None and b is not None
    return factors(a, b, a0, b0)


def layer_paths(lora: Tree) -> list[Path]:
    """Where the adapted layers are, in the order of the tree."""
    return sorted({path[:-1] for path in leaves_by_path(lora)})


@contextmanager
def applying(
    config: LoRAConfig,
    product: Product = "activations",
    deterministic: bool = True,
    rows: jax.Array | None = None,
) -> Iterator[None]:
    """Within this context, every Dense that has an entry in the `lora` collection uses it.

    Enter it inside the function that is jitted: around a function that has been traced already it
    has no effect.

    Args:
        config: gives scale and dropout.
        product: how the product is computed, see :func:`resolve_product`.
        deterministic: no adapter dropout; otherwise a `dropout` PRNG key is needed.
        rows: number of each row of the batch, for dropout, see `models.layers.dropout`.

    Example:
        >>> with applying(config):
        ...     logits = model.apply({"params": params, "lora": lora}, *inputs)
    """

    def add_adapter(dense, args, kwargs, context):
        module = context.module
        if not (isinstance(module, nn.Dense) and context.method_name == "__call__"):
            return dense(*args, **kwargs)
        if not module.has_variable("lora", "a"):
            return dense(*args, **kwargs)
        (x,) = args
        a, b = factors(*(module.get_variable("lora", side) for side in ("a", "b", "a0", "b0")))
        factor = scale(config, module.path)
        if product == "merged":
            if module.has_variable("merged", "kernel"):
                merged = module.get_variable("merged", "kernel")
            else:
                merged = merged_kernel(module.get_variable("params", "kernel"), a, b, factor)
            return _with_bias(module, merged_product(x, merged, a, b, factor))
        # In the layer's own precision: what comes out of a LayerNorm is float32.
        dtype = module.dtype or x.dtype
        x = x.astype(dtype)
        if product == "extended" and module.dot_general is None:
            kernel = module.get_variable("params", "kernel")
            y = extended_product(x, *(part.astype(dtype) for part in (kernel, a, b)), factor)
            return _with_bias(module, y)  # pyright: ignore[reportArgumentType]
        key = None if deterministic or config.dropout == 0.0 else module.make_rng("dropout")
        y = dense(x)
        return y + activation_product(x, a, b, factor, config.dropout, key, rows).astype(y.dtype)

    with nn.intercept_methods(add_adapter):
        yield


def _with_bias(module: nn.Dense, y: jax.Array) -> jax.Array:
    bias: jax.Array | None = module.get_variable("params", "bias")
    return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def resolve_product(config: LoRAConfig, compute_dtype: str, adapted_kernels_frozen: bool) -> Product:
    """Choose between the forms of the adapted product.

    Raises:
        InputError: `merged` or `extended` is asked for where it would be wrong: their backward pass leaves
            out the kernel's gradient, they have no place for adapter dropout, and with weights merged in
            bfloat16 the update of a young adapter is rounded away.
    """
    reasons = []
    if not adapted_kernels_frozen:
        reasons.append("adapted kernels are trained")
    if config.dropout > 0.0:
        reasons.append("lora.dropout is above 0")
    against: dict[str, list[str]] = {"activations": [], "extended": reasons, "merged": reasons}
    if compute_dtype != "float32":
        against["merged"] = [*reasons, f"model.compute_dtype is {compute_dtype}"]
    if config.product == "auto":
        if not against["merged"]:
            return "merged"
        return "activations" if against["extended"] else "extended"
    if found := against[config.product]:
        raise InputError(
            f"lora.product {config.product}: not possible while {' and '.join(found)}. Use auto."
        )
    return config.product


def activation_product(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: float,
    rate: float = 0.0,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """``scale * dropout(x) @ a @ b``, to be added to the layer's own output.

    Args:
        x: `[..., in]`, in the dtype of the computation.
        a: float32 `[in, rank]`.
        b: float32 `[rank, out]`.
        scale: factor on the product.
        rate: dropout rate on `x`, applied where a key is given.
        key: typed PRNG key.
        rows: number of each row of `x`, for dropout, see `models.layers.dropout`.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    if key is not None:
        x = dropout(key, x, rate, rows)
    return scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def extended_product(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """``x @ kernel + scale * x @ a @ b`` in one product, of `x` with the columns ``x @ a`` beside its own and
    the kernel with the rows ``scale * b`` below its own.

    No sum of two full outputs is read and written again, nor is it of two gradients of `x`: measured on an
    H200 in bfloat16, layers of 512 to 3,072 take 7 to 10 % less time than by :func:`activation_product`, and
    the sum is rounded once. The kernel must be frozen: its cotangent is zero by definition.

    Args:
        x: `[..., in]`.
        kernel: `[in, out]`, of the same dtype as all others.
        a: `[in, rank]`.
        b: `[rank, out]`.
        scale: factor on ``a @ b``.

    Returns:
        `[..., out]`.
    """
    return _extended_forward(x, kernel, a, b, scale)[0]


def _extended_forward(x, kernel, a, b, scale):
    through = x @ a  # [..., R]
    y = jnp.concatenate([x, through], -1) @ jnp.concatenate([kernel, scale * b], 0)  # [..., O]
    return y, (x, through, kernel, a, b)


def _extended_backward(scale, residuals, gradient):
    x, through, kernel, a, b = residuals
    through_b = scale * (gradient @ b.T)  # [..., R]
    dx = jnp.concatenate([gradient, through_b], -1) @ jnp.concatenate([kernel, a], 1).T  # [..., I]
    da = _flat(x).T @ _flat(through_b)
    return dx, jnp.zeros_like(kernel), da, scale * (_flat(through).T @ _flat(gradient))


extended_product.defvjp(_extended_forward, _extended_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged_product(x: jax.Array, merged: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """``x @ merged`` where ``merged`` is ``kernel + scale * a @ b`` of a frozen kernel.

    The forward pass is one full product on the merged weight, where XLA's skinny products are slow
    (2.2 to 2.5 times on CPU). The backward pass goes through the rank for `a` and `b` and never
    forms the kernel's gradient, which plain differentiation of a merged weight would: the cotangent of
    `merged` is zero by definition, so the kernel must be frozen and `merged` be made outside of what is
    differentiated.

    Args:
        x: `[..., in]`.
        merged: `[in, out]`, see :func:`merged_kernel`.
        a: `[in, rank]`.
        b: `[rank, out]`.
        scale: factor on ``a @ b``.

    Returns:
        `[..., out]`.
    """
    return x @ merged


def merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """``kernel + scale * a @ b``, without gradient: `[in, out]`."""
    return jax.lax.stop_gradient(kernel + scale * jnp.matmul(a, b, precision="highest"))


def _merged_forward(x, merged, a, b, scale):
    return x @ merged, (x, merged, a, b)


def _merged_backward(scale, residuals, gradient):
    x, merged, a, b = residuals
    rows, gradient_rows = _flat(x), _flat(gradient)  # [N, I], [N, O]
    through_b = scale * (gradient_rows @ b.T)  # [N, R]
    through_a = scale * (rows @ a)  # [N, R]
    return gradient @ merged.T, jnp.zeros_like(merged), rows.T @ through_b, through_a.T @ gradient_rows


merged_product.defvjp(_merged_forward, _merged_backward)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


# Adapters of several ranks in one shape, so that they can be stacked and trained together.


def pad(adapters: Tree, config: LoRAConfig) -> Tree:
    """Adapters filled up with zeros to the ranks of `config`."""

    def longer(path, leaf):
        names = path_names(path)
        axis = leaf.ndim - (1 if _is_a(names) else 2)
        more = rank_of(config, names[:-1]) - leaf.shape[axis]
        return jnp.pad(leaf, [(0, more if place == axis else 0) for place in range(leaf.ndim)])

    return tree_map_with_path(longer, adapters)


def cut(adapters: Tree, config: LoRAConfig) -> Tree:
    """The first ranks, as many as `config` gives each layer: undoes :func:`pad`."""

    def shorter(path, leaf):
        names = path_names(path)
        rank = rank_of(config, names[:-1])
        return leaf[..., :rank] if _is_a(names) else leaf[..., :rank, :]

    return tree_map_with_path(shorter, adapters)


def scaled(adapters: Tree, factor: jax.Array | float) -> Tree:
    """Adapters whose product ``a @ b`` is `factor` times as large: a scalar, or one for each layer."""
    paths = layer_paths(adapters)
    by_layer = dict(zip(paths, jnp.broadcast_to(factor, (len(paths),)), strict=True))

    def multiplied(path, leaf):
        names = path_names(path)
        return leaf if _is_a(names) else by_layer[names[:-1]] * leaf

    return tree_map_with_path(multiplied, adapters)


def with_scale(adapters: Tree, config: LoRAConfig) -> Tree:
    """Adapters whose product ``a @ b`` has the scale in it."""
    return scaled(adapters, jnp.asarray([scale(config, path) for path in layer_paths(adapters)]))


def _is_a(path: Path) -> bool:
    return path[-1] in ("a", "a0")
