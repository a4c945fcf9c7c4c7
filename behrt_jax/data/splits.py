"""Splits of a data set by subject: by a hash of the subject id where the source has none of its own."""

from collections.abc import Mapping

import numpy as np

from behrt_jax.data.events import SPLITS
from behrt_jax.data.sorting import distinct, find_ids, leads
from behrt_jax.errors import InputError

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def hash_splits(
    subject_ids: np.ndarray,
    tuning_fraction: float,
    held_out_fraction: float,
    seed: int,
    options: str = "data.",
    may_be_empty: bool = False,
    exact: bool = False,
) -> dict[str, np.ndarray]:
    """Deal subjects out to train, tuning and held_out by a seeded hash of their ids.

    Args:
        subject_ids: int64 ``[subjects]``, in any order; repeats count once.
        tuning_fraction: share of subjects for tuning, above 0 and below 1.
        held_out_fraction: share of subjects for held_out, from 0 to below 1.
        seed: any integer.
        options: goes before the names of options in messages.
        may_be_empty: any split may be; the shares are taken as they are, up to 0 and 1.
        exact: the shares to the subject, rounded, in the order of the hash, and at least one subject for each
            split with a share where there are three; who joins may then move others. Else each subject by
            itself, so that shares are met about.

    Returns:
        Split name -> ascending int64 ids, for all three names; held_out may be empty.

    Raises:
        InputError: a fraction out of range, no subject, or none that fell into the train or tuning split.
    """
    if not may_be_empty:
        check_fractions(tuning_fraction, held_out_fraction, options)
    ids = distinct(np.asarray(subject_ids, dtype=np.int64))  # [S]
    if not len(ids):
        raise InputError("The data set holds no subject: give one that is not empty.")
    if exact:
        split = _exact_split_index(ids, tuning_fraction, held_out_fraction, seed)  # [S]
    else:
        split = hash_split_index(ids, tuning_fraction, held_out_fraction, seed)
    splits = {name: ids[split == index] for index, name in enumerate(SPLITS)}
    for name in ("train", "tuning"):
        if not len(splits[name]) and not may_be_empty:
            raise InputError(
                f"None of the {len(ids)} subjects fell into the {name} split: give more subjects, another "
                f"{options}seed, {'' if options or exact else 'splits.exact, '}or other values of "
                f"{options}tuning_fraction and {options}held_out_fraction."
            )
    return splits


def told_split(tuning_fraction: float, held_out_fraction: float, seed: int, exact: bool = False) -> str:
    """A sentence that says how subjects were dealt out by :func:`hash_splits`."""
    return (
        "The source has no splits of its own: its subjects were dealt out by a hash of their ids "
        f"({'exactly' if exact else 'about'} {tuning_fraction:.0%} tuning, {held_out_fraction:.0%} held_out, "
        f"seed {seed})."
    )


def check_fractions(tuning_fraction: float, held_out_fraction: float, options: str = "data.") -> None:
    """Refuse shares of subjects that are out of range; ``options`` goes before their names."""
    if not 0 < tuning_fraction < 1:
        raise InputError(f"{options}tuning_fraction is {tuning_fraction}: give a share above 0 and below 1.")
    if not 0 <= held_out_fraction < 1:
        raise InputError(
            f"{options}held_out_fraction is {held_out_fraction}: give a share from 0 to below 1."
        )
    if tuning_fraction + held_out_fraction >= 1:
        raise InputError(
            f"{options}tuning_fraction {tuning_fraction} and {options}held_out_fraction {held_out_fraction} "
            "leave nothing to train on: their sum must be below 1."
        )


def hash_split_index(
    ids: np.ndarray, tuning_fraction: float, held_out_fraction: float, seed: int
) -> np.ndarray:
    """The place in :data:`~behrt_jax.data.events.SPLITS` of each subject's split, by a hash of its id.

    A subject's split depends on its id, the fractions and the seed alone, so it stays where it is when
    other subjects join the data set. The hash is SplitMix64's finaliser (Steele, Lea and Flood 2014,
    doi 10.1145/2714064.2660195). Of ids int64 ``[n]`` come int8 ``[n]``; fractions are shares of subjects.
    """
    share = hash_shares(ids, seed)
    split = np.full(len(ids), SPLITS.index("train"), np.int8)
    split[share < held_out_fraction + tuning_fraction] = SPLITS.index("tuning")
    split[share < held_out_fraction] = SPLITS.index("held_out")
    return split


def _exact_split_index(
    ids: np.ndarray, tuning_fraction: float, held_out_fraction: float, seed: int
) -> np.ndarray:
    """As :func:`hash_split_index`, of all subjects together, with the shares met to the subject."""
    shares = {"held_out": held_out_fraction, "tuning": tuning_fraction}
    sizes = {name: int(len(ids) * share + 0.5) for name, share in shares.items()}
    if len(ids) >= len(SPLITS):
        sizes = {name: max(size, int(shares[name] > 0)) for name, size in sizes.items()}
        while sum(sizes.values()) >= len(ids):  # one at least is left to train on
            sizes[max(sizes, key=lambda name: sizes[name])] -= 1
    split = np.repeat(np.array([SPLITS.index(name) for name in sizes], np.int8), list(sizes.values()))
    split = np.append(split, np.full(len(ids) - len(split), SPLITS.index("train"), np.int8))
    placed = np.empty(len(ids), np.int8)
    placed[np.argsort(hash_shares(ids, seed), kind="stable")] = split
    return placed


def hash_shares(ids: np.ndarray, seed: int) -> np.ndarray:
    """A hash of each int64 id ``[n]`` as a float64 in [0, 1)."""
    key = _mix(np.array([(seed + _GOLDEN) & _WORD], dtype=np.uint64))  # [1]
    mixed = _mix(hash_words(ids) + key)  # [n]
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_words(numbers: np.ndarray) -> np.ndarray:
    """Hash int64 numbers ``[n]`` to uint64 ``[n]``, one to one."""
    return _mix(numbers.view(np.uint64) + np.uint64(_GOLDEN))


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def split_index(subject_ids: np.ndarray, splits: Mapping[str, np.ndarray]) -> np.ndarray:
    """The place in :data:`~behrt_jax.data.events.SPLITS` of each subject's split, -1 where it has none.

    Of ids int64 ``[n]``, in any order, repeats allowed, come int8 ``[n]``. A missing name is an empty split.
    """
    empty = np.empty(0, dtype=np.int64)
    parts = [np.asarray(splits.get(name, empty), dtype=np.int64) for name in SPLITS]
    listed = np.concatenate(parts)  # [S]
    index = np.repeat(np.arange(len(SPLITS), dtype=np.int8), [len(part) for part in parts])  # [S]
    return np.append(index, np.int8(-1))[find_ids(listed, subject_ids)]  # where it is not there: the last, -1


def check_disjoint(splits: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse splits (name -> int64 ids) that share subjects; ``where`` names the file or folder they are of.

    Raises:
        InputError: with the number of subjects that are in more than one split, never their ids.
    """
    listed = [distinct(np.asarray(ids, np.int64)) for ids in splits.values()]
    together = np.sort(np.concatenate([np.empty(0, np.int64), *listed]), kind="stable")
    shared = len(np.unique(together[~leads([together])]))
    if shared:
        raise InputError(f"{where} puts {shared} subjects into more than one split: keep each in one.")
