"""The command `python -m openrouter_responses_pipe metrics`: what all workers have done and used.

It reads the rows that they leave in the database of Open WebUI, also while that runs, and makes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from openrouter_responses_pipe import artifacts
from openrouter_responses_pipe import openrouter_responses_pipe as pipe

HOUR_S: Final = 3600.0
OUTCOMES: Final = ("answered", "failed", "stopped", "refused")
# what is said of a sum -> its name in the rows
TOKENS: Final = {
    "input": "input_tokens",
    "of these cached": "cached_tokens",
    "output": "output_tokens",
    "of these reasoning": "reasoning_tokens",
}
# what is said of a spread -> its name in the rows, its unit
SPREADS: Final = {
    "to the first token": ("first_token_seconds", " s"),
    "to the end": ("seconds", " s"),
    "waiting requests": ("waiting_requests", ""),
}
QUANTILES: Final = {"median": 0.5, "p95": 0.95}


def run(args: argparse.Namespace) -> bool:
    """Run the command; return whether all is well.

    Raises:
        CommandError: it cannot be done.
    """
    return artifacts.in_database(_sum_up, args)


async def _sum_up(database: pipe.Database, args: argparse.Namespace) -> bool:
    """Print what the rows of the last hours come to, whichever worker has written them."""
    table = pipe.MetricsTable(database, args.id.lower())
    await artifacts.require(database, table.table.name)
    rows = await table.rows(time.time() - args.hours * HOUR_S)
    facts = {"table": table.table.name, "hours": args.hours, **summary(rows)}
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return True


def summary(rows: Sequence[pipe.MetricsRow]) -> dict[str, Any]:
    """Return the facts of several rows together; what is no number in them counts nothing."""
    counts: Counter[str] = Counter()
    spreads: dict[str, list[int]] = {}
    for row in rows:
        counts.update({name: amount for name, amount in row.counts.items() if pipe._is_number(amount)})
        for name, spread in row.spreads.items():
            if _is_spread(spread):
                sums = spreads.get(name) or [0] * len(spread)
                spreads[name] = [one + other for one, other in zip(sums, spread, strict=True)]
    errors = {
        name.partition(".")[2]: int(sum_) for name, sum_ in counts.items() if name.startswith("errors.")
    }
    return {
        "rows": len(rows),
        "workers": len({row.worker for row in rows}),
        "requests": {outcome: int(counts[f"requests.{outcome}"]) for outcome in OUTCOMES},
        "errors": dict(sorted(errors.items(), key=lambda error: (-error[1], error[0]))),
        "tokens": {name: int(counts[name]) for name in TOKENS.values()},
        "cost": round(counts["cost"], 9),
        "tools": {"calls": int(counts["tools"]), "failed": int(counts["tools_failed"])},
        "retries": int(counts["retries"]),
        "spreads": {name: _quantiles(spreads.get(name, ())) for name, _ in SPREADS.values()},
    }


def _is_spread(spread: Any) -> bool:
    is_whole = isinstance(spread, list) and len(spread) == len(pipe.METRIC_BOUNDS) + 1
    return is_whole and all(isinstance(count, int) and count >= 0 for count in spread)


def _quantiles(spread: Sequence[int]) -> dict[str, float | None]:
    """Return how many values there are, and estimates; None: there are none, or it is above all bounds."""
    return {
        "count": sum(spread),
        **{name: quantile(spread, share) for name, share in QUANTILES.items()},
    }


def quantile(spread: Sequence[int], share: float) -> float | None:
    """Return the value that this share of all is not above, as if a bucket were filled evenly.

    None where there are no values, or where it is in the bucket that has no upper bound.
    """
    rank, below, lower = share * sum(spread), 0, 0.0
    for count, upper in zip(spread, pipe.METRIC_BOUNDS, strict=False):
        if count and below + count >= rank:
            return round(lower + (upper - lower) * (rank - below) / count, 3)
        below, lower = below + count, upper
    return None


def _text(facts: Mapping[str, Any]) -> str:
    requests: Mapping[str, int] = facts["requests"]
    head = (
        f"{facts['table']}: {sum(requests.values()):,} requests in the last {facts['hours']:g} hours, "
        f"{facts['workers']:,} workers"
    )
    sums = [
        ("calls of tools", f"{facts['tools']['calls']:,}"),
        ("of these failed", f"{facts['tools']['failed']:,}"),
        ("further tries", f"{facts['retries']:,}"),
        ("cost", f"${facts['cost']:,.4f}"),
    ]
    times = [(words, *_spread_cells(facts["spreads"][name], unit)) for words, (name, unit) in SPREADS.items()]
    parts = [
        head,
        artifacts._table(("outcome", "requests"), _cells(requests.items())),
        artifacts._table(("error", "requests"), _cells(facts["errors"].items())) if facts["errors"] else "",
        artifacts._table(
            ("tokens", "number"), _cells((words, facts["tokens"][name]) for words, name in TOKENS.items())
        ),
        artifacts._table(("besides", "sum"), sums),
        artifacts._table(("how long, how many", "values", *QUANTILES), times),
    ]
    return "\n\n".join(filter(None, parts))


def _cells(sums: Iterable[tuple[str, int]]) -> list[tuple[str, ...]]:
    return [(name, f"{amount:,}") for name, amount in sums]


def _spread_cells(found: Mapping[str, float | None], unit: str) -> list[str]:
    count = int(found["count"] or 0)
    above = f"over {math.floor(pipe.METRIC_BOUNDS[-1])}{unit}" if count else "-"
    estimates = [above if (value := found[name]) is None else f"{value:.2f}{unit}" for name in QUANTILES]
    return [f"{count:,}", *estimates]
