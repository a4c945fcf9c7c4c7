"""Which codes are selected, by patterns, and the error where nothing is."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from behrt_jax.data.events import BIRTH_CODE, EventCounts
from behrt_jax.errors import InputError


@dataclass(frozen=True)
class CodeChoice:
    """Which codes are read, and what for; its methods raise `InputError` where a pattern is wrong."""

    codes: tuple[str, ...] = ()
    """Patterns of those that become tokens; none: all."""
    exclude_codes: tuple[str, ...] = ()
    value_codes: tuple[str, ...] = ()
    """Tokens too, with the bin of their value."""
    static_codes: tuple[str, ...] = ()
    """Kept as facts about the subject where they have no time."""

    def tokens(self, names: Sequence[str]) -> np.ndarray:
        """Bool ``[names]``."""
        wanted = selects(names, self.codes, self.exclude_codes, options="")
        if not self.value_codes:
            return wanted
        valued = matches(names, self.value_codes, "value_codes")
        return wanted | (valued & selects(names, (), self.exclude_codes, options=""))

    def static(self, names: Sequence[str]) -> np.ndarray:
        """Bool ``[names]``."""
        return matches(names, self.static_codes, "static_codes")

    def read(self, names: Sequence[str]) -> np.ndarray:
        """Bool ``[names]``: one or the other."""
        return self.tokens(names) | self.static(names)


def selects(
    names: Sequence[str], codes: tuple[str, ...], exclude_codes: tuple[str, ...], options: str = "data."
) -> np.ndarray:
    """Which codes the patterns select: bool ``[names]``.

    Raises:
        InputError: a pattern is no regular expression; ``options`` goes before the option's name.
    """
    wanted = matches(names, codes, f"{options}codes") if codes else np.ones(len(names), bool)
    return wanted & ~matches(names, exclude_codes, f"{options}exclude_codes")


def matches(names: Sequence[str], patterns: tuple[str, ...], option: str) -> np.ndarray:
    """Whether any pattern matches at the start of each name: bool ``[names]``.

    Raises:
        InputError: a pattern is no regular expression; ``option`` is named as the place to mend it.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(
                f"{option} has {pattern!r}, which is no regular expression ({error}): mend it, or put a "
                "backslash before the sign to take it literally."
            ) from error
    if not compiled:
        return np.zeros(len(names), dtype=bool)
    return np.array([any(pattern.match(name) for pattern in compiled) for name in names], dtype=bool)


def nothing_left(by_code: Mapping[str, int], counts: EventCounts, options: str = "data.") -> InputError:
    """The error of a data set from which the rules leave nothing.

    Args:
        by_code: code, or prefix of codes -> events read, markers of birth and death aside.
        counts: what the rules dropped.
        options: goes before the names of the options.
    """
    by_prefix = Counter()
    for name, count in by_code.items():
        by_prefix[name.split("//")[0]] += count
    prefixes = ", ".join(prefix for prefix, count in by_prefix.most_common(10) if count)
    rules = ", ".join(f"{rule}: {count}" for rule, count in counts.dropped.items())
    return InputError(
        f"No event is left after filtering ({rules}): choose {options}codes and {options}exclude_codes to "
        f"fit the codes of the data set (most frequent prefixes: {prefixes or 'none'}), and see that "
        f"subjects have a {BIRTH_CODE} event with a time."
    )
