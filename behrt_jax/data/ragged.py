import numpy as np


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``starts[i], ..., starts[i] + lengths[i] - 1``.

    Args:
        starts: integers ``[ranges]``.
        lengths: integers ``[ranges]``, zero or more.

    Returns:
        int64 ``[sum of lengths]``.
    """
    ends = np.cumsum(lengths, dtype=np.int64)  # [ranges]
    total = ends[-1] if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
