"""
title: Which worker answers
author: the project's tests
version: 1.0
description: Writes down for each question the process that answers it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# The tests put the file here when they install this source, which is read by `big_host.BigHost`.
JOURNAL = ""


class Filter:
    """Open WebUI calls it before each question goes to a model."""

    def inlet(self, body: dict[str, Any], __metadata__: dict[str, Any] | None = None) -> dict[str, Any]:
        """Note who is here; the question stays as it is."""
        line = {"message_id": (__metadata__ or {}).get("message_id"), "worker": os.getpid()}
        with Path(JOURNAL).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        return body
