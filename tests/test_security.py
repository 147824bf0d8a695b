"""Secrets at rest, header values, and the names that the host and OpenRouter give."""

from __future__ import annotations

import json
import re
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ConfigurationError,
    EncryptedStr,
    _header_value,
    _new_item_id,
    _pipe_id,
    _upstream_model_id,
)

SECRET: Final = "the secret of this server"
KEY: Final = "sk-or-v1-0123456789"


@settings(max_examples=60, deadline=None)
@given(value=st.text(), secret=st.text(min_size=1))
def test_what_was_sealed_comes_back(value: str, secret: str) -> None:
    sealed = EncryptedStr.encrypt(value, secret)
    assert sealed.decrypt(secret) == value
    assert EncryptedStr(str(sealed)).decrypt(secret) == value


def test_sealed_text_does_not_hold_the_key() -> None:
    sealed = EncryptedStr.encrypt(KEY, SECRET)
    for shown in (str(sealed), f"{sealed}", json.dumps(sealed), repr(sealed)):
        assert KEY not in shown
    assert str(sealed).startswith("encrypted:")


def test_sealing_again_changes_nothing() -> None:
    sealed = EncryptedStr.encrypt(KEY, SECRET)
    for secret in (SECRET, "another", ""):
        assert EncryptedStr.encrypt(sealed, secret) == sealed
    assert EncryptedStr.encrypt(str(sealed), SECRET) == sealed


def test_sealed_twice_looks_different_each_time() -> None:
    assert EncryptedStr.encrypt(KEY, SECRET) != EncryptedStr.encrypt(KEY, SECRET)


@pytest.mark.parametrize("secret", ["another", ""])
def test_the_wrong_secret(secret: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EncryptedStr.encrypt(KEY, SECRET).decrypt(secret)
    assert "entered again" in caught.value.user_message
    assert KEY not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["encrypted:", "encrypted:not a token", "encrypted:gAAAAA==", "encrypted:é"])
def test_what_was_never_sealed_here(text: str) -> None:
    with pytest.raises(ConfigurationError):
        EncryptedStr(text).decrypt(SECRET)


def test_a_changed_seal_is_refused() -> None:
    sealed = str(EncryptedStr.encrypt(KEY, SECRET))
    changed = sealed[:40] + ("A" if sealed[40] != "A" else "B") + sealed[41:]
    with pytest.raises(ConfigurationError):
        EncryptedStr(changed).decrypt(SECRET)


@pytest.mark.parametrize("value", ["", KEY])
def test_without_a_secret_it_stays_plain(value: str) -> None:
    plain = EncryptedStr.encrypt(value, "")
    assert plain == value
    assert plain.decrypt("") == plain.decrypt(SECRET) == value


def test_empty_stays_empty() -> None:
    assert EncryptedStr.encrypt("", SECRET) == ""


@pytest.mark.parametrize("value", [KEY, "encrypted:abc", "x"])
def test_repr_hides(value: str) -> None:
    assert repr(EncryptedStr(value)) == "EncryptedStr('…')"
    assert repr([EncryptedStr(value)]) == "[EncryptedStr('…')]"
    assert repr(EncryptedStr("")) == "EncryptedStr('')"


class Model(BaseModel):
    key: EncryptedStr


def test_to_pydantic_it_is_a_string() -> None:
    assert Model.model_json_schema()["properties"]["key"]["type"] == "string"
    model = Model.model_validate({"key": KEY})
    assert type(model.key) is EncryptedStr
    assert KEY not in repr(model)
    assert json.loads(model.model_dump_json()) == {"key": KEY}
    for wrong in (5, None, [KEY], b"\xff"):
        with pytest.raises(ValueError, match="key"):
            Model.model_validate({"key": wrong})


# Headers


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Open WebUI", "Open WebUI"),
        ("  Open WebUI \t", "Open WebUI"),
        ("a\r\nX-Evil: 1", "aX-Evil: 1"),
        ("a\x00\x7f\x1bb", "ab"),
        ("Café 漢字", "Caf"),
        ("\N{GRINNING FACE}", ""),
        ("", ""),
        ("~!@#", "~!@#"),
    ],
)
def test_header_values(text: str, clean: str) -> None:
    assert _header_value(text) == clean


@given(text=st.text())
def test_any_header_value(text: str) -> None:
    clean = _header_value(text)
    assert clean.isascii()
    assert clean.isprintable()
    assert clean == clean.strip()
    assert _header_value(clean) == clean


# Names


@pytest.mark.parametrize(
    ("module", "model", "expected"),
    [
        ("function_openrouter", "", "openrouter"),
        ("function_openrouter", "other.openai/gpt-4.1", "openrouter"),
        ("function_openrouter_0123456789abcdef0123456789abcdef", "", "openrouter"),
        ("function_open_router_2", "", "open_router_2"),
        ("function_a_0123456789ABCDEF0123456789ABCDEF", "", "a_0123456789ABCDEF0123456789ABCDEF"),
        ("function_a_0123456789abcdef", "", "a_0123456789abcdef"),
        ("openrouter_responses_pipe", "my_pipe.openai/gpt-4.1", "my_pipe"),
        ("openrouter_responses_pipe", "", "openrouter_responses_pipe"),
    ],
)
def test_pipe_ids(module: str, model: str, expected: str) -> None:
    assert _pipe_id(module, model) == expected


UPSTREAM_IDS: Final = [
    "openai/gpt-4.1",
    "openai/gpt-4o-mini",
    "anthropic/claude-sonnet-4.5:nitro",
    "z-ai/glm-4.6",
    "~anthropic/claude-sonnet-latest",
    "~anthropic/claude-sonnet-4.x",
    "@preset/support",
    "@preset/support-1.2",
    "openai/gpt-4.1@preset/support",
    "a/b/c.d/e",
]


@pytest.mark.parametrize("model", UPSTREAM_IDS)
@pytest.mark.parametrize("function", ["", "openrouter.", "my_pipe_2."])
def test_upstream_model_ids(function: str, model: str) -> None:
    assert _upstream_model_id(function + model) == model


@pytest.mark.parametrize(
    ("model", "expected"), [("openrouter.setup", "setup"), ("auto", "auto"), ("", ""), ("openrouter.", "")]
)
def test_upstream_ids_without_an_author(model: str, expected: str) -> None:
    assert _upstream_model_id(model) == expected


def test_item_ids_are_fresh() -> None:
    made = {_new_item_id("msg") for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(r"msg_[0-9a-f]{24}", item_id) for item_id in made)
