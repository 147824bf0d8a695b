"""What the OpenRouter simulator was asked, and what it shall answer next."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

Json = dict[str, Any]

_OURS = "asked by the tests themselves"
INFERENCE = ("/responses", "/chat/completions")


class Upstream:
    """The simulator behind the pipe, seen through its control endpoints."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._root = base_url.removesuffix("/api/v1")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _ask(self, path: str, body: Json | None = None) -> Json:
        headers = {
            "Content-Type": "application/json",
            "Authorization": "Bearer sk-or-v1-e2e",
            "X-Title": _OURS,
        }
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(
            urllib.request.Request(self._root + path, data, headers), timeout=30
        ) as response:
            return json.loads(response.read())

    def next(self, scenario: str, times: float = 1, **params: Any) -> None:
        """Answer the next question of a person with this scenario."""
        self._ask("/_control/next", {"scenario": scenario, "times": times, "params": params})

    def reset(self) -> None:
        """Forget what was queued and recorded."""
        self._ask("/_control/reset", {})

    def asked(self, containing: str = "") -> list[Json]:
        """Return the inference requests so far, oldest first, whose body contains these words."""
        return [
            record
            for record in self._ask("/_control/requests")["requests"]
            if record["path"].endswith(INFERENCE)
            and record["headers"].get("x-title") != _OURS
            and containing in json.dumps(record["body"], ensure_ascii=False)
        ]

    def last(self, containing: str = "") -> Json:
        """Return the newest such request."""
        found = self.asked(containing)
        assert found, f"no request containing {containing!r} has reached the simulator"
        return found[-1]

    def usage(self, record: Json) -> Json:
        """Return the usage that answered this request, which the simulator counts anew when asked again."""
        body = {**record["body"], "stream": False}
        return self._ask(record["path"], body)["usage"]
