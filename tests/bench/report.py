"""Figures, their limits, and the table that shows both."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """One measured thing. What is compared with the limit is the ratio where there is one, else the value."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    limit: float | None = None
    at_least: bool = False

    @property
    def over(self) -> bool:
        """Whether the figure is on the wrong side of its limit."""
        if self.limit is None:
            return False
        measured = self.value if self.ratio is None else self.ratio
        return measured < self.limit if self.at_least else measured > self.limit

    def row(self) -> str:
        """The figure as one line of the table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        limit = "" if self.limit is None else f"{'≥' if self.at_least else '≤'} {self.limit:g}"
        judged = "" if self.limit is None else ("OVER" if self.over else "ok")
        value = f"{self.value:.4g} {self.unit}"
        return f"{self.name:<60}{value:>18}{ratio:>8}{limit:>9}  {judged}".rstrip()


HEADER = f"{'name':<60}{'value':>18}{'ratio':>8}{'limit':>9}"


@dataclass(frozen=True)
class Pair:
    """The same thing measured once for the pipe and once for its yardstick, one right after the other."""

    pipe: float
    bare: float


def compare(name: str, unit: str, pairs: list[Pair], limit: float | None, scale: float = 1.0) -> Figure:
    """The median of the pipe's values, and the median of the ratios of the pairs."""
    value = median(pair.pipe for pair in pairs) * scale
    return Figure(name, value, unit, median(pair.pipe / pair.bare for pair in pairs), limit)
