"""`python -m tests.bench [--quick]`: what loading, the model list, a long chat, a round of tools, keeping
artifacts, streaming, size and more chats than may run cost.

Each figure stands beside its limit; ends with 1 when one is over it. `--quick` takes fewer and shorter
rounds: good enough to see a change of a third, not to judge one of a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Container
from pathlib import Path

import pytest_bootstrap  # noqa: F401 - the stand-in for the host
from openrouter_responses_pipe.webui import SimulatorServer
from tests.bench import artifacts, catalog, history, load, loading, scale, streaming, tools
from tests.bench.report import HEADER, Figure

ROUNDS, QUICK_ROUNDS = 7, 3
PARTS = ("loading", "catalog", "history", "tools", "artifacts", "streaming", "scale", "load")


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _streams(wanted: Container[str], rounds: int, quick: bool) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        simulator = SimulatorServer(Path(folder) / "simulator.log")
        try:
            simulator.launch()
            figures: list[Figure] = []
            if "streaming" in wanted:
                bench = streaming.Bench(simulator.base_url, rounds, quick, _say)
                figures += asyncio.run(bench.figures())
                figures += streaming.first_request_figures(simulator.base_url, rounds, _say)
            if "scale" in wanted:
                figures += asyncio.run(scale.ScaleBench(simulator.base_url, rounds, quick, _say).figures())
            if "load" in wanted:
                figures += asyncio.run(load.LoadBench(simulator.base_url, rounds, quick, _say).figures())
            return figures
        finally:
            simulator.stop()


def main() -> int:
    """Measure, print the table, say whether all is within its limits."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--only", choices=PARTS, help="one part of the figures")
    args = parser.parse_args()
    wanted = PARTS if args.only is None else (args.only,)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    os.environ.setdefault("WEBUI_SECRET_KEY", "a secret of this benchmark")
    logging.getLogger("openrouter_responses_pipe").setLevel(logging.WARNING)
    figures: list[Figure] = []
    if "loading" in wanted:
        _say("loading")
        figures += loading.figures(rounds)
    if "catalog" in wanted:
        figures += asyncio.run(catalog.figures(rounds, _say))
    if "history" in wanted:
        figures += history.figures(rounds, _say)
    if "tools" in wanted:
        figures += asyncio.run(tools.figures(rounds, _say))
    if "artifacts" in wanted:
        figures += asyncio.run(artifacts.figures(rounds, args.quick, _say))
    if {"streaming", "scale", "load"} & set(wanted):
        figures += _streams(wanted, rounds, args.quick)
    _say("")
    over = [figure for figure in figures if figure.over]
    print(f"medians of {rounds} rounds", HEADER, *(figure.row() for figure in figures), sep="\n")
    print(f"{len(over)} over their limit" if over else "all within their limits")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
