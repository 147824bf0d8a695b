"""The host seam: which Open WebUI this is, and whether it will do."""

from __future__ import annotations

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import ConfigurationError, OpenWebUIHost


@pytest.mark.parametrize(
    "version",
    [
        "0.11.2",
        "0.11.3",
        "0.11.4",
        "0.12.0",
        "0.12.4",
        "0.100.0",
        "1.0",
        "1.0.0",
        "v0.12.4",
        "0.12.4-dev",
        "0.12.4.dev1",
        "0.11.10",
        "",
        "dev",
        None,
    ],
)
def test_hosts_that_will_do(version: str | None) -> None:
    OpenWebUIHost(version).check_version()


@pytest.mark.parametrize(
    "version", ["0.11.1", "0.11.0", "0.10.99", "0.9.6", "0.6.43", "v0.6.5", "0.11.1-dev1"]
)
def test_hosts_that_are_too_old(version: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OpenWebUIHost(version).check_version()
    message = caught.value.user_message
    assert "0.11.2 or newer" in message
    assert version in message
    assert not caught.value.retryable


def test_it_knows_the_host_that_runs() -> None:
    """The version comes from the host's own module (here its stand-in)."""
    assert OpenWebUIHost().version is not None
    OpenWebUIHost().check_version()
