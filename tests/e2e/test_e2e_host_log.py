"""What the servers wrote while all the other tests ran; collected last."""

from __future__ import annotations

import re

import pytest

from tests.e2e.host import KEY

# The host's note of an error that a person was shown, ours of a catalog that could not be reached, and
# the host's own of the one fallback that a test asks for without access to it.
EXPECTED = (
    "Provider returned error",
    "The model list could not be loaded: The connection was refused",
    "model_id='openrouter.openai/gpt-4o-mini' reason=model_read_denied",
)


@pytest.fixture(params=["host", "big_host"])
def log(request: pytest.FixtureRequest) -> str:
    """Return what one of the servers has written so far."""
    return request.getfixturevalue(request.param).log


def test_no_traceback(log: str) -> None:
    found = [match.start() for match in re.finditer(r"^Traceback", log, re.MULTILINE)]
    assert not found, f"{len(found)} tracebacks; the first:\n{log[found[0] - 500 : found[0] + 3000]}"


def test_no_warning_of_ours(log: str) -> None:
    """What the tests break is told to the user; the log says it once, and the host adds its own line."""
    found = [
        line
        for line in log.splitlines()
        if re.search(r"WARNING|ERROR|CRITICAL", line)
        and re.search(r"openrouter|function_", line, re.IGNORECASE)
        and not any(words in line for words in EXPECTED)
    ]
    assert not found, "\n".join(found[:20])


def test_no_unfinished_task(log: str) -> None:
    signs = ("never retrieved", "was never awaited", "Unclosed", "was destroyed but it is pending")
    found = [line for line in log.splitlines() if any(sign in line for sign in signs)]
    assert not found, "\n".join(found[:20])


def test_no_key_in_the_log(log: str) -> None:
    assert KEY not in log
    assert "sk-bad-key" not in log
