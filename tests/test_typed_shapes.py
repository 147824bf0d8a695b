"""The values that travel between floors: frozen, telling, and silent about secrets."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    Connection,
    Emission,
    MediaProduced,
    ModelSpec,
    StreamError,
    ToolCall,
)

KINDS: Final = typing.get_args(Emission)


def fields_of(kind: Any) -> list[str]:
    """The names of the values that a shape carries."""
    return list(getattr(kind, "_fields", ())) or [field.name for field in dataclasses.fields(kind)]


def made(kind: Any) -> Any:
    """One of a kind; what it carries does not matter."""
    return kind(**{name: name for name in fields_of(kind)})


@pytest.mark.parametrize("kind", [*KINDS, ToolCall, ModelSpec, Connection, ChatRequest])
def test_shapes_are_frozen(kind: Any) -> None:
    shape = made(kind)
    assert fields_of(kind)
    for name in [*fields_of(kind), "something_new"]:
        with pytest.raises((AttributeError, TypeError)):
            setattr(shape, name, "other")
    assert [getattr(shape, name) for name in fields_of(kind)] == fields_of(kind)


def test_each_emission_is_a_type_of_its_own() -> None:
    assert len(set(KINDS)) == len(KINDS) >= 13
    assert all(kind.__doc__ for kind in KINDS)


def test_a_connection_does_not_show_its_key() -> None:
    connection = Connection(base_url="https://openrouter.ai/api/v1", key="sk-or-v1-secret")
    assert "secret" not in repr(connection)
    assert "openrouter.ai" in repr(connection)


def test_a_picture_does_not_fill_the_log() -> None:
    assert len(repr(MediaProduced(0, "data:image/png;base64," + "A" * 100_000))) < 200


def test_a_call_as_chat_clients_know_it() -> None:
    call = ToolCall("call_1", "get_weather", '{"city":"Oslo"}')
    assert call.function() == {"name": "get_weather", "arguments": '{"city":"Oslo"}'}


@pytest.mark.parametrize(
    ("changes", "text", "tools", "images"),
    [
        ({}, True, False, False),
        ({"output_modalities": frozenset({"image"})}, False, False, False),
        ({"output_modalities": frozenset({"image", "text"})}, True, False, False),
        ({"supported_parameters": frozenset({"tools", "tool_choice"})}, True, True, False),
        ({"supported_parameters": frozenset({"tool_choice"})}, True, False, False),
        ({"input_modalities": frozenset({"text", "image"})}, True, False, True),
    ],
)
def test_what_a_model_can(changes: dict[str, Any], text: bool, tools: bool, images: bool) -> None:
    spec = ModelSpec("a/b", "B", **changes)
    assert (spec.writes_text, spec.takes_tools, spec.takes_images) == (text, tools, images)


def test_an_error_can_be_said() -> None:
    assert "It broke." in StreamError("It broke").user_message
