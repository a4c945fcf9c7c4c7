"""Golden files: what the PyTorch reference computes in float64, for machines without PyTorch.

``python -m tests.experiments.golden_reference`` writes them anew. Weights and batches are not in them: they
follow from names, see `reference_cases`.
"""

from pathlib import Path

import numpy as np

from behrt_jax.config.model import LoRAConfig
from tests.experiments.reference_cases import ALL_LINEARS, SIZES, Results, uniform, weights

FOLDER = Path(__file__).parent / "golden"
LORA = LoRAConfig(rank=4, targets=ALL_LINEARS)
CASES = {**{name: (config, None) for name, config in SIZES.items()}, "small_lora": (SIZES["small"], LORA)}
"""Name -> model and adapters."""
PROJECTIONS = 32


def projections(path: str, leaf: np.ndarray) -> np.ndarray:
    """Sums of a leaf's elements under random signs, float64 ``[PROJECTIONS]``.

    Their mean square over the draws is the leaf's squared 2-norm, so the projections of two leaves tell how
    far apart those are.

    Args:
        path: seed of the signs, which are products of signs of rows and of columns.
        leaf: any shape.
    """
    matrix = np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])  # [M, N]
    rows = np.sign(uniform(f"{path} rows", (PROJECTIONS, matrix.shape[0])) + 1e-300)
    columns = np.sign(uniform(f"{path} columns", (PROJECTIONS, matrix.shape[1])) + 1e-300)
    return ((rows @ matrix) * columns).sum(axis=1)


def summary(results: Results) -> dict[str, np.ndarray]:
    """What a golden file holds of `results`: every leaf's norm and projections, some of the logits."""
    leaves = {"/".join(path): leaf for path, leaf in sorted(results.gradients.items())}
    return {
        "loss": np.array(results.loss),
        "logits": results.logits[:, :, ::25],
        "paths": np.array(list(leaves)),
        "norms": np.array([np.linalg.norm(leaf.astype(np.float64)) for leaf in leaves.values()]),
        "projections": np.array([projections(path, leaf) for path, leaf in leaves.items()]),
    }


def main() -> None:
    """Write every golden file."""
    from tests.experiments.torch_results import torch_results  # the only part that needs PyTorch

    FOLDER.mkdir(exist_ok=True)
    for name, (config, lora) in CASES.items():
        results = torch_results(config, weights(config, lora), lora, double=True)
        np.savez_compressed(FOLDER / f"{name}.npz", **summary(results))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
