"""What it costs to load the file, beside a file of the same size that does nothing in particular.

Each measurement runs in a fresh process in which the packages that Open WebUI itself imports are already
there. `python -m tests.bench.loading time|memory [reference-first]` is that process.
"""

from __future__ import annotations

import ast
import gc
import importlib
import json
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.hosting import MODULE, load
from tests.bench.report import Figure, Pair, compare

ROOT: Final = Path(__file__).parents[2]

# Of the packages that Open WebUI 0.12.4 has imported before it loads a function, those that matter here,
# and parts of the standard library that any web server on asyncio has loaded.
HOST_PACKAGES: Final = """
    aiohttp aiosqlite cryptography.fernet cryptography.hazmat.primitives.ciphers.aead httpx orjson pydantic
    redis.asyncio sqlalchemy.ext.asyncio sqlalchemy.orm tenacity anyio
    asyncio base64 concurrent.futures contextvars csv email.utils fnmatch hashlib hmac html ipaddress
    logging.handlers mimetypes queue secrets sqlite3 ssl statistics tempfile urllib.request uuid zlib zoneinfo
    pytest_bootstrap
""".split()  # noqa: SIM905 - a list of fifty names reads better as words

WARM_UP: Final = """
from __future__ import annotations
from dataclasses import dataclass
from pydantic import BaseModel

@dataclass(frozen=True, slots=True)
class Shape:
    a: int

class Model(BaseModel):
    a: int = 1

class Pipe:
    pass
"""

METHOD: Final = '''
    def step_{number}(self, values: list[int], limit: int = {number}) -> dict[str, int]:
        """Count the values of one step that stay below the limit.

        Raises:
            ValueError: there is nothing to count.
        """
        if not values:
            raise ValueError(f"step {number} needs values, {{self.name}} gave none")
        found: dict[str, int] = {{}}
        for index, value in enumerate(values):
            if value > limit and index % 2:
                continue  # an odd one, and too large
            key = str(value) if value else "zero"
            found[key] = found.get(key, 0) + self.weight(value, scale={number})
        self.seen.update(found)
        return {{key: count for key, count in found.items() if count < limit}}
'''

CLASS: Final = '''
class Part{number}:
    """Part {number}: holds what its steps have seen."""

    def __init__(self, name: str = "part") -> None:
        self.name = name
        self.seen: dict[str, int] = {{}}

    def weight(self, value: int, scale: int = 1) -> int:
        """The weight of one value."""
        return value * scale
'''


def reference(source: str) -> str:
    """A file as long as `source`, with as many classes, of plain methods and nothing else."""
    classes = sum(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(source)))
    parts = ["from __future__ import annotations\n\n\nclass Pipe:\n    pass\n"]
    room = len(source.encode()) - len(parts[0])
    for number in range(classes - 1):
        parts.append(CLASS.format(number=number))
        share = room // (classes - 1)
        size = len(parts[-1])
        while size + len(METHOD) < share * 1.02:
            text = METHOD.format(number=len(parts))
            parts.append(text)
            size += len(text)
    text = "\n".join(parts)
    return text + "#" * max(0, len(source.encode()) - len(text.encode()))


def _seconds(source: str, name: str) -> float:
    gc.collect()
    started = time.process_time()
    load(name, source)
    return time.process_time() - started


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure_here(what: str, reference_first: bool) -> dict[str, Any]:
    """Measure in this process, which must be a fresh one."""
    for name in HOST_PACKAGES:
        importlib.import_module(name)
    source = MODULE.read_text("utf-8")
    load("warm_up", WARM_UP)
    if what == "memory":
        return _memory(source)
    # The first large file of a process also pays for the memory that compiling takes from the system.
    load("warm_up", reference(source))
    jobs = [("pipe", source), ("bare", reference(source))]
    return {name: _seconds(text, name) for name, text in (reversed(jobs) if reference_first else jobs)}


def _memory(source: str) -> dict[str, Any]:
    gc.collect()
    before = set(sys.modules)
    resident = _resident_mb()
    tracemalloc.start()
    loaded = load("pipe", source)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    new = sorted(set(sys.modules) - before)
    assert loaded.pipe
    return {"kept_mb": kept, "resident_mb": _resident_mb() - resident, "modules": new}


def _measure(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.loading", *arguments]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def figures(rounds: int) -> list[Figure]:
    """Time, memory and new modules of one load."""
    flags = [["reference-first"] if number % 2 else [] for number in range(rounds)]
    pairs = [Pair(**_measure("time", *flag)) for flag in flags]
    memory = _measure("memory")
    if memory["modules"]:
        print("modules that only the file brings in:", *memory["modules"])
    return [
        compare("loading: CPU, to a featureless file of this size", "ms", pairs, 1.5, scale=1e3),
        Figure("loading: CPU", median(pair.pipe for pair in pairs) * 1e3, "ms", limit=250),
        Figure("loading: memory kept by the load", memory["kept_mb"], "MB", limit=12),
        Figure("loading: new modules", len(memory["modules"]), "", limit=12),
    ]


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], "reference-first" in sys.argv)))
