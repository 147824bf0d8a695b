"""Errors: OpenRouter's answers in every shape, and the words a person sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _ADVICE,
    AdmissionError,
    ConfigurationError,
    ErrorPage,
    InputError,
    OpenRouterAPIError,
    PipeError,
    StreamError,
    _api_error,
    _event_error,
    _in_words,
    _RetryableHTTPStatusError,
    render_error,
)

Json = dict[str, Any]
DATA: Final = Path(__file__).parent / "data" / "openrouter"
CASES: Final[list[Json]] = json.loads((DATA / "error_bodies.json").read_text("utf-8"))["cases"]
NOW: Final = 1787304000.0  # 2026-08-21 09:20:00 GMT is one of the recorded dates


def content_of(case: Json) -> bytes:
    body = case["body"]
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def error_of(case: Json) -> OpenRouterAPIError:
    return _api_error(case["status"], case["headers"], content_of(case), NOW)


# name -> (template, what the person must read: the provider's words, or ours where those say nothing)
WORDS: Final[dict[str, tuple[str, str]]] = {
    "400_bad_request_int_code": ("refused", 'Input required: specify "input"'),
    "400_responses_validation_string_code": ("refused", "Invalid input"),
    "400_provider_raw": ("provider_refused", "Invalid value for temperature: at most 1"),
    "400_thinking_signature": ("provider_refused", "Invalid `signature` in `thinking` block"),
    "400_context_too_long": ("too_long", "maximum context length is 8192 tokens"),
    "400_store_true": ("refused", "Store must be false"),
    "400_model_not_found": ("unknown_model", "acme/none-1 is not a valid model ID"),
    "401_bad_key": ("authentication", "did not accept the API key"),
    "402_credits": ("credits", "can only afford 2666"),
    "403_moderation": ("moderation", "Your input was flagged (harassment, violence)"),
    "403_guardrail": ("guardrail", "prompt injection patterns detected"),
    "404_privacy": ("not_found", "No endpoints for openai/gpt-5 match your data policy"),
    "404_no_providers": ("not_found", "No allowed providers are available"),
    "408_timeout": ("timeout", "did not answer in time"),
    "413_too_large": ("too_large", "Request body too large"),
    "422_unprocessable": ("refused", "Unprocessable request"),
    "429_free_daily": ("daily_limit", "Add 10 credits to unlock 1000 free model requests per day"),
    "429_capacity_exhausted": ("rate_limit", "All providers for anthropic/claude-sonnet-4.5 are at capacity"),
    "429_upstream": ("rate_limit", "z-ai/glm-4.6 is temporarily rate-limited upstream"),
    "429_http_date": ("rate_limit", "Too many requests"),
    "500_masked": ("server", "OpenRouter reported an error"),
    "502_provider": ("provider", "provider reported an error"),
    "503_no_provider": ("provider", "No instances available"),
    "524_edge_timeout": ("timeout", "Request timed out. Please try again later."),
    "529_overloaded": ("provider", "provider reported an error"),
    "502_html": ("server", "OpenRouter reported an error"),
    "200_error_body": ("provider", "provider reported an error"),
}
WAITS: Final = {
    "429_capacity_exhausted": 2.0,
    "503_no_provider": 5.0,
    "429_http_date": 0.0,
    "429_free_daily": 52_800.0,
}

bodies = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def test_every_recorded_body_has_its_words_here() -> None:
    assert {case["name"] for case in CASES} == set(WORDS)


@bodies
def test_recorded_bodies(case: Json) -> None:
    error = error_of(case)
    template, words = WORDS[case["name"]]
    assert error.retryable == case["retryable"]
    assert isinstance(error, _RetryableHTTPStatusError) == case["retryable"]
    assert error.template == template
    assert words in error.user_message
    assert error.retry_after == pytest.approx(WAITS.get(case["name"]))
    late = 502 if case["name"] == "200_error_body" else None
    assert error.status == (late or case["status"])


@bodies
def test_no_text_names_a_user(case: Json) -> None:
    text = error_of(case).user_message
    for secret in ("user_2abcDEF", "user_id", "<html", "cloudflare"):
        assert secret not in text


SHOWN: Final = {
    "403_guardrail": "ignore all previous instructions",
    "403_moderation": "I will …[truncated]… you",
    "400_responses_validation_string_code": "Invalid input",
    "500_masked": "OpenRouter",
    "502_html": "OpenRouter",
    "429_free_daily": "in 15 hours",
}
TO_DO: Final = {
    "413_too_large": ("smaller", "fewer", "attachments"),
    "400_context_too_long": ("chat", "larger context"),
    "400_model_not_found": ("choose another model",),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_page_has_to_show(name: str) -> None:
    (case,) = (case for case in CASES if case["name"] == name)
    assert SHOWN[name] in error_of(case).user_message
    if name in ("500_masked", "502_html"):
        assert "provider" not in error_of(case).user_message


@pytest.mark.parametrize("case", [case for case in CASES if not case["retryable"]], ids=lambda c: c["name"])
def test_a_page_of_a_final_error_says_what_to_do_now(case: Json) -> None:
    """And not to send the same again."""
    error = error_of(case)
    text = error.user_message.lower()
    advice = text.rpartition(error.detail.lower().rstrip("."))[2] or text
    assert re.search(r"please|administrator", advice), text
    assert not re.search(r"please try again(?! in \d)", text), text
    assert [words for words in TO_DO.get(case["name"], ()) if words not in advice] == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(400, "You should not retry this"), (412, "Precondition failed"), (451, "Not here"), (501, "Not made")],
)
def test_no_final_error_tells_to_send_the_same_again(status: int, words: str) -> None:
    error = _api_error(status, {}, json.dumps({"error": {"code": status, "message": words}}).encode(), NOW)
    assert not error.retryable
    assert "please" in error.user_message.lower()
    assert "please try again" not in error.user_message.lower()


@bodies
def test_a_page_does_not_repeat_itself(case: Json) -> None:
    text = error_of(case).user_message.lower()
    assert text.count("blocked") <= 1
    sentences = re.split(r"(?<=[.!?]) ", text)
    assert len(set(sentences)) == len(sentences)


ANY_ERROR: Final[dict[str, Callable[[Json], PipeError]]] = {
    "answer": lambda error: _api_error(400, {}, json.dumps({"error": error}).encode(), NOW),
    "late": lambda error: _api_error(200, {}, json.dumps({"error": {"code": 400, **error}}).encode(), NOW),
    "stream": lambda error: _event_error({"code": 400, **error}),
}
any_error = pytest.mark.parametrize("make", ANY_ERROR.values(), ids=ANY_ERROR)


@any_error
@pytest.mark.parametrize("place", ["message", "raw"])
def test_no_words_name_a_key_a_user_or_a_session(make: Callable[[Json], PipeError], place: str) -> None:
    words = "User user_2abcDEF of sess_12ab and session_9f8e with sk-or-v1-0123456789abcdef failed"
    error = {"message": words} if place == "message" else {"message": "m", "metadata": {"raw": words}}
    text = make(error).user_message
    assert "User […] of […] and […] with […] failed." in text
    assert not re.search(r"user_2|sess|sk-or", text)


@any_error
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ('[{"error": {"code": 400, "message": "Too many tokens", "status": "INVALID"}}]', "Too many tokens."),
        ('[{"code": "invalid_union", "path": ["input", 1], "message": "Invalid input"}]', "Invalid input."),
        ('{"detail": "Too large"}', "Too large."),
        ('{"message": {"detail": "Too large"}}', "Too large."),
        ({"error": {"message": "Inner words"}}, "Inner words."),
        ([{"message": "Inner words"}], "Inner words."),
        ("<html><head><title>502 Bad Gateway</title></head></html>", "Outer words."),
        ("<!DOCTYPE html>\n<html>x</html>", "Outer words."),
        ('data: {"error": {"nothing": 1}}\n\n', "Outer words."),
        ("event: error\ndata: x\n\n", "Outer words."),
    ],
)
def test_the_raw_words_of_a_provider(make: Callable[[Json], PipeError], raw: Any, words: str) -> None:
    text = make({"message": "Outer words", "metadata": {"raw": raw, "provider_name": "P"}}).user_message
    assert words in text
    assert not re.search(r"[<{\[]|data:|event:", text)


@any_error
@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"detail": "Too large"}, "Too large."),
        ({"message": "Too large"}, "Too large."),
        ({"message": {"detail": "Too large"}}, "Too large."),
        ({"a": "b"}, ""),
        (["Too large"], ""),
        ("bad \ud83d half", "Bad \ufffd half."),
    ],
    ids=str,
)
def test_a_message_of_any_kind(make: Callable[[Json], PipeError], message: Any, words: str) -> None:
    text = make({"message": message}).user_message
    assert words in text
    assert not re.search(r"[{}\[\]]", text)
    text.encode()


@pytest.mark.parametrize("words", ["server_error", "500", "invalid_prompt", "429", "RESOURCE_EXHAUSTED"])
@any_error
def test_words_that_are_only_an_identifier_are_left_out(
    make: Callable[[Json], PipeError], words: str
) -> None:
    assert words not in make({"message": words}).user_message


@pytest.mark.parametrize(
    ("headers", "inside"),
    [({"Retry-After": "5"}, {}), ({}, {"Retry-After": "5"}), ({"Retry-After": "5"}, {"Retry-After": "9"})],
)
def test_a_wait_is_told_whatever_numbers_the_words_hold(headers: Json, inside: Json) -> None:
    error = {"message": "Limit of 50 requests reached", "metadata": {"headers": inside}}
    found = _api_error(503, headers, json.dumps({"error": error}).encode(), NOW)
    assert found.retry_after == 5.0
    assert "in 5 seconds" in found.user_message


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("code", [429, "429"])
def test_the_end_of_a_limit_may_stand_in_the_body(where: str, code: Any) -> None:
    reset = {"X-RateLimit-Reset": str(round((NOW + 7_200) * 1000))}
    metadata = {"headers": reset} if where == "body" else {}
    error = {"code": code, "message": "Over: free-models-per-day", "metadata": metadata}
    for status in (200, 429):
        content = json.dumps({"error": error}).encode()
        found = _api_error(status, reset if where == "header" else {}, content, NOW)
        assert (found.template, found.retryable, found.status) == ("daily_limit", False, 429)
        assert found.retry_after == pytest.approx(7_200)


@bodies
def test_a_message_is_one_line_that_ends_a_sentence(case: Json) -> None:
    text = error_of(case).user_message
    assert "\n" not in text
    assert text[-1] in ".!?"
    assert text.lower().count("try again") <= 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 2.5 ", 2.5),
        ("-3", 0.0),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        ("soon", None),
        ("", None),
        ("Fri, 99 Foo 2026 09:20:00 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert _api_error(429, {"Retry-After": value}, b"", NOW).retry_after == seconds
    body = json.dumps({"error": {"availability": {"retry_after": value}}}).encode()
    assert _api_error(429, {}, body, NOW).retry_after == seconds


def test_the_header_wins_over_the_body() -> None:
    body = b'{"error": {"message": "m", "availability": {"retryable": true, "retry_after": 9}}}'
    assert _api_error(429, {"Retry-After": "3"}, body, NOW).retry_after == 3.0
    assert _api_error(429, {}, body, NOW).retry_after == 9.0


@pytest.mark.parametrize("value", ["inf", "1e400", "nan", "-inf", "9" * 400])
def test_a_wait_without_measure_can_be_said(value: str) -> None:
    error = _api_error(429, {"Retry-After": value}, b"", NOW)
    assert "Too many requests" in error.user_message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"error": "only words"}', "Only words."),
        (b'{"error": {"message": "outer words", "metadata": {"raw": "\\"a JSON text\\""}}}', "A JSON text."),
        (
            b'{"error": {"message": "outer words", "metadata": {"raw": "{\\"error\\": \\"inner words\\"}"}}}',
            "Inner words.",
        ),
        (
            b'{"error": {"message": "outer", "metadata": {"raw": "{\\"message\\": \\"inner words\\"}"}}}',
            "Inner words.",
        ),
        (b'{"error": {"message": "outer words", "metadata": {"raw": "{\\"error\\": {}}"}}}', "Outer words."),
        (b'{"error": {"message": "outer words", "metadata": {"raw": "null"}}}', "Outer words."),
        (b'{"error": {"message": "outer words", "metadata": {"raw": "  "}}}', "Outer words."),
        (b'{"error": {"message": "outer words", "metadata": {"raw": {"a": 1}}}}', "Outer words."),
        (b'{"error": {"message": "outer words", "metadata": "text"}}', "Outer words."),
        (b'{"error": {"message": "two\\nlines"}}', "Two lines."),
        (b'{"error": {"message": null}}', "HTTP 400"),
        (b'{"message": "only words"}', "Only words."),
        (b"Just a plain reason", "Just a plain reason."),
        (b"error code: 1015", "Error code: 1015."),
        (b"<html>busy</html>", "HTTP 400"),
        (b'{"error": []}', "HTTP 400"),
        (b"[]", "HTTP 400"),
        (b"", "HTTP 400"),
        (b"\xff\xfe", "HTTP 400"),
    ],
)
def test_words_in_every_place(content: bytes, words: str) -> None:
    assert words in _api_error(400, {}, content, NOW).user_message


def test_long_words_are_cut() -> None:
    body = {"error": {"message": "m", "metadata": {"raw": "x" * 100_000}}}
    assert len(_api_error(400, {}, json.dumps(body).encode(), NOW).user_message) < 1000


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "metadata", "raw", "code", "availability", "retryable"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    status=st.sampled_from([200, 400, 403, 429, 500, 599]),
    body=JSON | st.dictionaries(st.just("error"), JSON),
)
def test_any_body_can_be_said(status: int, body: Any) -> None:
    error = _api_error(status, {}, json.dumps(body).encode(), NOW)
    assert error.user_message
    assert isinstance(error.retryable, bool)
    assert isinstance(error, _RetryableHTTPStatusError) == error.retryable


@settings(max_examples=200, deadline=None)
@given(
    error=st.dictionaries(st.sampled_from(["code", "message", "metadata", "param"]), JSON), exact=st.text()
)
def test_any_failure_in_a_stream_can_be_said(error: Json, exact: str) -> None:
    assert _event_error(error, exact).user_message


# In the stream: exact type or code -> (template, whether another try may help); reference of the API
EXACT_TYPES: Final[dict[str, tuple[str, bool]]] = {
    "rate_limit_exceeded": ("rate_limit", True),
    "provider_overloaded": ("provider", True),
    "provider_unavailable": ("provider", True),
    "timeout": ("timeout", True),
    "server": ("server", True),
    "unmapped": ("server", True),
    "invalid_request": ("refused", False),
    "context_length_exceeded": ("too_long", False),
    "invalid_prompt": ("refused", False),
    "authentication": ("authentication", False),
    "permission_denied": ("refused", False),
    "payment_required": ("credits", False),
    "not_found": ("not_found", False),
    "payload_too_large": ("too_large", False),
    "unprocessable": ("refused", False),
    "precondition_failed": ("provider_refused", False),
    "content_policy_violation": ("moderation", False),
    "refusal": ("provider_refused", False),
    "invalid_image": ("provider_refused", False),
    "something_new": ("provider_refused", False),
}


@pytest.mark.parametrize("exact", EXACT_TYPES)
def test_exact_types(exact: str) -> None:
    error = _event_error({"code": "server_error", "message": "words of the provider"}, exact)
    assert isinstance(error, StreamError)
    assert (error.template, error.retryable) == EXACT_TYPES[exact]
    assert "Words of the provider." in error.user_message
    inside = {"message": "m", "metadata": {"error_type": exact}}
    assert (_event_error(inside).template, _event_error(inside).retryable) == EXACT_TYPES[exact]


@pytest.mark.parametrize(
    ("error", "template", "retryable", "words"),
    [
        ({"code": 429, "message": "too slow"}, "rate_limit", True, "too slow"),
        ({"code": 502, "message": "too down"}, "provider", True, "too down"),
        ({"code": 504, "message": "too late"}, "timeout", True, "too late"),
        ({"code": 401, "message": "too key"}, "authentication", False, "too key"),
        ({"code": 402, "message": "too money"}, "credits", False, "too money"),
        ({"code": 400, "message": "too bad"}, "refused", False, "too bad"),
        ({"code": "rate_limit_exceeded", "message": "too slow"}, "rate_limit", True, "too slow"),
        ({"code": "server_error", "message": "too odd"}, "provider", False, "too odd"),
        ({"code": "429", "message": "too slow"}, "rate_limit", True, "too slow"),
        ({"code": "401", "message": "too key"}, "authentication", False, "too key"),
        ({"code": 429, "message": "free-models-per-day is over"}, "daily_limit", False, "is over"),
        ({"code": "server_error"}, "provider", False, ""),
        ({"code": None, "message": None}, "provider", False, ""),
        ({}, "provider", False, ""),
        (
            {
                "code": 502,
                "message": "Provider returned error",
                "metadata": {"raw": '{"message": "real words"}'},
            },
            "provider",
            True,
            "real words",
        ),
    ],
)
def test_codes(error: Json, template: str, retryable: bool, words: str) -> None:
    found = _event_error(error)
    assert (found.template, found.retryable) == (template, retryable)
    assert words in found.user_message.lower()
    code = str(error.get("code"))
    assert found.status == (int(code) if code.isdecimal() else None)


# Words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 second"),
        (0.4, "1 second"),
        (1, "1 second"),
        (1.4, "1 second"),
        (2, "2 seconds"),
        (59, "59 seconds"),
        (90, "90 seconds"),
        (120, "2 minutes"),
        (300, "5 minutes"),
        (3600, "60 minutes"),
        (7199, "120 minutes"),
        (7200, "2 hours"),
        (86400, "24 hours"),
    ],
)
def test_waiting_times(seconds: float, words: str) -> None:
    assert _in_words(seconds) == words


CHANGE: Final = _ADVICE["refused"][1]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            StreamError("It is cut", template="refused"),
            f"OpenRouter refused the request. It is cut. {CHANGE}",
        ),
        (
            StreamError("Slow", template="rate_limit"),
            "Too many requests at the moment. Slow. Please try again later.",
        ),
        (
            StreamError("Slow", template="rate_limit", retry_after=40.0),
            "Too many requests at the moment. Slow. Please try again in 40 seconds.",
        ),
        (
            StreamError("Please try again later!", template="rate_limit", retry_after=7200.0),
            "Too many requests at the moment. Please try again later! Please try again in 2 hours.",
        ),
        (
            StreamError("Please TRY AGAIN later", template="network"),
            "OpenRouter could not be reached. Please TRY AGAIN later.",
        ),
        (
            StreamError("Retry shortly", template="timeout"),
            "OpenRouter did not answer in time. Retry shortly.",
        ),
        (ConfigurationError("No key is set. Ask."), "No key is set. Ask."),
        (AdmissionError("Retiring"), "Retiring."),
        (InputError("It holds no messages"), "This chat could not be sent. It holds no messages."),
        (
            PipeError("It is odd"),
            "Something went wrong inside this function. It is odd. The server's log says what.",
        ),
        (PipeError(template="unheard of"), render_error(PipeError())),
        (
            StreamError(" a \r\n  b\n\nc ", template="refused"),
            f"OpenRouter refused the request. A b c. {CHANGE}",
        ),
        (
            StreamError("a/b-1 is gone", template="refused"),
            f"OpenRouter refused the request. a/b-1 is gone. {CHANGE}",
        ),
        (StreamError("Really?", template="refused"), f"OpenRouter refused the request. Really? {CHANGE}"),
    ],
)
def test_rendering(error: PipeError, text: str) -> None:
    assert render_error(error) == text
    assert error.user_message == text


@pytest.mark.parametrize(
    "words", ["Provider returned error", "Internal Server Error.", "User not found.", "Rate limit exceeded"]
)
def test_words_that_say_nothing_are_not_repeated(words: str) -> None:
    """They stay in `detail`, for the log."""
    error = StreamError(words)
    assert words not in error.user_message
    assert error.user_message == StreamError("").user_message
    assert error.detail == words
    assert words.rstrip(".") in AdmissionError(words).user_message


def test_whom_to_ask_stands_last() -> None:
    error = StreamError("It broke")
    before = error.user_message
    page = ErrorPage(contact="help@example.org", error_id="1a2b3c4d")
    assert render_error(error, page) == f"{before} Contact: help@example.org (Error 1a2b3c4d)"


@pytest.mark.parametrize("template", sorted(_ADVICE))
def test_every_template_says_something(template: str) -> None:
    error = PipeError("The words", template=template)
    assert "The words." in render_error(error)
    assert "  " not in render_error(error)


def test_the_tree() -> None:
    for kind in (ConfigurationError, AdmissionError, InputError, OpenRouterAPIError, StreamError):
        assert kind.__bases__ == (PipeError,)
        assert kind("detail").template in _ADVICE
        assert not kind("detail").retryable
    assert issubclass(_RetryableHTTPStatusError, OpenRouterAPIError)
    assert str(StreamError("detail")) == "detail"


def test_an_error_inside_errors_has_an_end() -> None:
    deep: Any = "too deep"
    for _ in range(900):
        deep = {"error": deep}
    content = json.dumps({"error": {"message": deep, "metadata": {"raw": json.dumps(deep)}}}).encode()
    error = _api_error(400, {}, content, NOW)
    assert "refused" in error.user_message
    assert "too deep" not in error.user_message
