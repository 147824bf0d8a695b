"""`python -m tests.valves_atlas`: write the tables of the valve atlas from the code.

The prose of the page is written by hand; what stands between its two markers is generated from `Valves`
and `UserValves`, and `test_atlas.py` fails when the two differ.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal

from pydantic.fields import FieldInfo

from openrouter_responses_pipe.openrouter_responses_pipe import EncryptedStr, UserValves, Valves

PAGE: Final = Path(__file__).parents[1] / "docs" / "valves_and_configuration_atlas.md"
BEGIN: Final = "<!-- tables: written by `python -m tests.valves_atlas`, not by hand -->"
END: Final = "<!-- end of the tables -->"
# What a user may set only if something else allows it.
CONDITIONS: Final = {"API_KEY": "if `ALLOW_USER_API_KEYS` is on"}


def tables() -> str:
    """The generated part: a table for each group of `Valves`, in the order of the form, and one for users."""
    parts: list[str] = []
    for title, names in _groups():
        parts += [f"## {title}", "", *_admin_table(names), ""]
    parts += ["## What each user may set", "", *_user_table(), ""]
    return "\n".join(parts)


def render(page: str) -> str:
    """`page` with fresh tables between its markers.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head + tail:
        raise ValueError("The page needs each of its two markers once, in order")
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def _groups() -> Iterator[tuple[str, list[str]]]:
    """Each class of the chain that adds valves: its name in words, and the valves it adds."""
    seen: set[str] = set()
    for owner in reversed(Valves.__mro__):
        names = [name for name in getattr(owner, "model_fields", ()) if name not in seen]
        seen.update(names)
        if names:
            words = re.findall(r"[A-Z][a-z]*", owner.__name__.removesuffix("Valves"))
            yield " ".join(words).capitalize() or "General", names


def _admin_table(names: Iterable[str]) -> Iterator[str]:
    yield "| Valve | Type | Default | Bounds | A user may change it | What it does |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        info = Valves.model_fields[name]
        allowed = CONDITIONS.get(name, "yes") if name in UserValves.model_fields else "no"
        yield _row(f"`{name}`", _kind(info), _value(info), _bounds(info), allowed, info.description)


def _user_table() -> Iterator[str]:
    yield "| Valve | Type | Default | Bounds | What it does |"
    yield "|---|---|---|---|---|"
    for name, info in UserValves.model_fields.items():
        bounds = _bounds(Valves.model_fields[name])
        yield _row(f"`{name}`", _kind(info), _value(info), bounds, info.description)


def _row(*cells: str | None) -> str:
    return "| " + " | ".join((cell or "").replace("|", "\\|") for cell in cells) + " |"


def _kind(info: FieldInfo) -> str:
    """The type of a field in words: `text`, `secret`, or the values it takes."""
    return _type_words(info.annotation)


def _type_words(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return " or ".join(map(_type_words, typing.get_args(annotation)))
    names = {EncryptedStr: "secret", str: "text", bool: "switch", int: "whole number", float: "number"}
    return names[annotation]


def _value(info: FieldInfo) -> str:
    """The default as the form shows it."""
    default = info.get_default()
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default}`" if default != "" else "empty"


def _bounds(info: FieldInfo) -> str:
    low = next((bound.ge for bound in info.metadata if hasattr(bound, "ge")), None)
    high = next((bound.le for bound in info.metadata if hasattr(bound, "le")), None)
    if low is None and high is None:
        return ""
    return f"{'' if low is None else low} to {'' if high is None else high}".strip()


def main() -> int:
    """Bring the page up to date, and say whether that changed it."""
    old = PAGE.read_text(encoding="utf-8")
    new = render(old)
    if new != old:
        PAGE.write_text(new, encoding="utf-8")
    print(f"{PAGE.name}: {'written' if new != old else 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
