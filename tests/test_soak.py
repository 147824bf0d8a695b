"""A minute of what `make soak` does for ten."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrouter_responses_pipe.webui import SimulatorServer
from pytest_bootstrap import host_functions
from tests.soak import Soak

SECONDS = 60.0
GROWTH = 1.1  # so soon after the start memory is still being taken


@pytest.mark.timeout(240)
async def test_nothing_fails_and_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    simulator = SimulatorServer(tmp_path / "simulator.log")
    try:
        simulator.launch()
        soak = Soak(simulator.base_url, SECONDS, GROWTH)
        assert await soak.run() == []
    finally:
        simulator.stop()
        host_functions.reset()
    assert min(soak.counts[deed] for deed in ("asks", "stops", "hangs_up", "calls_tools", "fails")) > 5
    assert soak.counts["saves"] > 3
