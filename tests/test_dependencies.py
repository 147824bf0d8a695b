"""What the module stands on: the standard library, what comes with Open WebUI, and what may be missing.

Works offline. `ADVISORIES` is the list to add to when a hole becomes known; then the minimum in
`pyproject.toml` has to rise with it. What an Open WebUI has installed, only its own updates change.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
MODULE: Final = ROOT / "openrouter_responses_pipe" / "openrouter_responses_pipe.py"
WEBUI: Final = ROOT / ".webui" / "venv"
# what is imported -> the package that brings it, and its version in Open WebUI 0.12.4
SHIPPED: Final[dict[str, tuple[str, str]]] = {
    "PIL": ("pillow", "13.0.0"),
    "aiohttp": ("aiohttp", "3.14.5"),
    "cryptography": ("cryptography", "48.0.1"),
    "jsonschema": ("jsonschema", "4.26.0"),
    "opentelemetry": ("opentelemetry-api", "1.45.2"),
    "orjson": ("orjson", "3.11.9"),
    "pydantic": ("pydantic", "2.13.4"),
    "pydantic_core": ("pydantic_core", "2.46.4"),
    "redis": ("redis", "8.0.1"),
    "sqlalchemy": ("sqlalchemy", "2.0.50"),
    "starlette": ("starlette", "1.10.0"),
    "tenacity": ("tenacity", "9.2.1"),
}
# what the module does without; neither comes with Open WebUI
OPTIONAL: Final = frozenset({"lz4", "ulid"})


class Advisory(NamedTuple):
    """A hole in a package that versions before `fixed` have, and whether it can reach us."""

    package: str
    name: str
    fixed: str
    what: str


ADVISORIES: Final = (
    Advisory("aiohttp", "CVE-2025-69223", "3.13.3", "a small packed body becomes any amount of memory"),
    Advisory("aiohttp", "CVE-2026-22815", "3.13.4", "headers and trailers without a limit"),
    Advisory("aiohttp", "CVE-2026-47265", "3.14.0", "cookies of a request follow a redirect; we send none"),
    Advisory("aiohttp", "CVE-2026-128131", "3.14.4", "a server can stop a client with a packed answer"),
    Advisory("cryptography", "CVE-2024-12797", "44.0.1", "the OpenSSL in its wheels; TLS with raw keys"),
    Advisory("cryptography", "CVE-2026-39892", "46.0.7", "buffers in pieces may be read beyond their end"),
    Advisory("httpx", "CVE-2021-41945", "0.23.0", "an address may be read as another one"),
    Advisory("orjson", "CVE-2024-27454", "3.9.15", "reading JSON of any depth ends the process"),
    Advisory("orjson", "CVE-2025-67221", "3.11.6", "writing JSON of any depth ends the process"),
    Advisory("pillow", "GHSA-wjx4-4jcj-g98j", "12.2.0", "a font may overflow; ours is built in"),
    Advisory("pillow", "CVE-2026-59200", "12.3.0", "pictures that are read; we read none"),
    Advisory("pydantic", "CVE-2024-3772", "2.4.0", "an e-mail address that takes long; no valve is one"),
    Advisory("redis", "CVE-2023-28858", "4.5.3", "after a cancellation somebody gets another's answer"),
    Advisory("redis", "CVE-2023-28859", "4.5.4", "the same without a pipeline"),
    Advisory("sqlalchemy", "CVE-2019-7164", "1.3.0", "SQL in an order by; ours is fixed"),
)
NOTHING_KNOWN: Final = frozenset(
    {"jsonschema", "lz4", "opentelemetry-api", "python-ulid", "tenacity"}
)  # as of December 2026


def _numbers(text: str) -> tuple[int, ...]:
    return (*map(int, re.findall(r"\d+", text)), 0, 0)[:3]


def _imports(node: ast.AST, *, is_guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """(what is imported, whether the file goes on without it), everywhere in the file."""
    for child in ast.iter_child_nodes(node):
        guarded = is_guarded
        if isinstance(child, ast.Try):
            parts = [part for handler in child.handlers for part in ast.walk(handler)]
            caught = {part.id for part in parts if isinstance(part, ast.Name)}
            guarded = is_guarded or "ImportError" in caught
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], is_guarded) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").partition(".")[0], is_guarded
        yield from _imports(child, is_guarded=guarded)


IMPORTS: Final = sorted(set(_imports(ast.parse(MODULE.read_text("utf-8")))))


@pytest.mark.parametrize(("name", "is_guarded"), IMPORTS)
def test_every_import_is_there_or_may_be_missing(name: str, is_guarded: bool) -> None:
    known = name in sys.stdlib_module_names or name in SHIPPED or name == "open_webui"
    assert known or (name in OPTIONAL and is_guarded), f"{name} neither comes with Open WebUI nor is guarded"


def test_nothing_is_asked_for_that_would_have_to_be_installed() -> None:
    head = MODULE.read_text("utf-8").split('"""')[1]
    assert not re.search(r"^requirements:", head, re.MULTILINE | re.IGNORECASE)


def test_the_tables_name_only_what_is_used() -> None:
    used = {name for name, _ in IMPORTS}
    assert set(SHIPPED) | OPTIONAL <= used


@pytest.mark.parametrize("name", SHIPPED)
def test_open_webui_brings_it(name: str) -> None:
    """Where Open WebUI is installed beside the project; `make e2e` does that."""
    folders = [str(folder) for folder in WEBUI.glob("lib/python3*/site-packages")]
    if not folders:
        pytest.skip("no Open WebUI here")
    package, shipped = SHIPPED[name]
    found = {_plain(one.metadata["Name"]): one.version for one in distributions(path=folders)}
    assert found[_plain(package)] == shipped


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _minimums() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    found = (re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=|==)([\d.]+)", line) for line in listed)
    return {_plain(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: advisory.name)
def test_no_version_with_a_known_hole_is_allowed(advisory: Advisory) -> None:
    fixed = _numbers(advisory.fixed)
    assert _numbers(_minimums()[advisory.package]) >= fixed, "in pyproject.toml"
    shipped = dict(SHIPPED.values())
    if advisory.package in shipped:
        assert _numbers(shipped[advisory.package]) >= fixed, "in Open WebUI 0.12.4"
    try:
        assert _numbers(version(advisory.package)) >= fixed, "here"
    except PackageNotFoundError:
        pytest.fail(f"{advisory.package} is not installed here")


def test_every_package_of_ours_has_been_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = {_plain(re.split(r"[\[>=]", line)[0]) for line in project["dependencies"]}
    ours |= {_plain(package) for package, _ in SHIPPED.values()} - {"pydantic-core", "starlette"}
    assert ours <= {advisory.package for advisory in ADVISORIES} | NOTHING_KNOWN
