"""Commands about a database, as an administrator types them; in this process: another takes a second.

status, printed, errors = await Command(capsys)("metrics", url, "--json")
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from openrouter_responses_pipe.__main__ import main

VARIABLES = ("DATABASE_URL", "DATABASE_SCHEMA", "WEBUI_JWT_SECRET_KEY", "ARTIFACT_ENCRYPTION_KEY")


class Command:
    """What is typed, as words with a blank between them, about the database at `url`, if any."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, words: str, url: str, *options: str) -> tuple[int, str, str]:
        """(exit status, what was printed, what was said of errors)."""
        where = ("--database", url) if url else ()
        status = await asyncio.to_thread(_status, [*words.split(), *where, *options])
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err

    async def facts(self, words: str, url: str, *options: str) -> dict[str, Any]:
        """What is printed for machines."""
        _, printed, errors = await self(words, url, "--json", *options)
        assert errors == ""
        return json.loads(printed)


def _status(arguments: Sequence[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:  # of argparse
        return int(ended.code or 0)


@contextlib.contextmanager
def shell(environment: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell in which nothing of a server is set."""
    for name in VARIABLES:
        environment.delenv(name, raising=False)
    yield
    logging.disable(logging.NOTSET)  # the commands want no log beside what they print
