"""Texts of codes, also of those that the preparation made."""

from collections.abc import Mapping

from behrt_jax.data.filtering import REPEATS


class Descriptions:
    """Texts of codes, also of those with a quantile or a count behind them."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    def of(self, code: str) -> str | None:
        if code in self._texts or not self._texts:
            return self._texts.get(code)
        for count in REPEATS:
            if code.endswith(count) and (text := self.of(code.removesuffix(count))) is not None:
                return f"{text} ({count.removeprefix('//')})"
        base, _, place = code.rpartition("//Q")
        if base in self._texts and place.isdigit():
            return f"{self._texts[base]} (Q{place})"
        return None
