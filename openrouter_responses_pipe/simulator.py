"""An imitation of OpenRouter on a loopback port, for tests, benchmarks and demonstrations.

It answers `POST /responses` and `POST /chat/completions` (streamed or whole), the catalog and the key
endpoints, and it refuses what OpenRouter refuses. What it answers is a *scenario*: chosen by control
words in the last user message (`[[drip rate=50 tokens=500]]`), by a plain word ("weather"), or queued
through `Simulator.next` and `POST /_control/next`. Page: docs/simulator.md.

How an answer comes to be, from the top of the file to the bottom:

    body ─▶ check ─▶ Turn ─▶ scenario(Turn) = Plan ─▶ wire (SSE chunks, or an object) ─▶ script ─▶ socket

A Plan holds finished output items; the wires derive every event from them, so the streamed and the whole
answer cannot differ. A script is a list of bytes (one write), float (seconds of silence) and CUT or RESET.

Public: `Simulator`, `Settings`, `RecordedRequest`, `SCENARIOS`, `WORDS`, `HTTP_ERRORS`, `CATALOG`,
`synthetic_catalog`, `main`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import copy
import hashlib
import itertools
import json
import math
import re
import secrets
import signal
import socket
import struct
import sys
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from aiohttp import web

try:
    import orjson
except ImportError:  # the standard library does the same, slower
    orjson = None

__all__ = [
    "CATALOG", "HTTP_ERRORS", "SCENARIOS", "WORDS", "RecordedRequest", "Settings", "Simulator", "main",
    "synthetic_catalog",
]  # fmt: skip

Json = dict[str, Any]
FOREVER: Final = math.inf
CUT: Final = "cut"  # close the connection without ending the body
RESET: Final = "reset"  # the same with a TCP reset
BLOCK: Final = 16_384  # bytes per write at full speed
MAX_BODY: Final = 512 * 1024 * 1024
MAX_RECORDS: Final = 20_000  # the oldest tenth is forgotten beyond that
GOLDEN_DIR: Final = Path(__file__).resolve().parent.parent / "tests" / "data" / "golden"
DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": OPENROUTER PROCESSING\n\n"


def _dumps(value: object) -> bytes:
    if orjson is not None:
        return orjson.dumps(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


# ── 1. Catalog ───────────────────────────────────────────────────────────────
# The built-in models, in the shape of GET /models. Prices are plausible, not current.

_EFFORTS: Final = ["high", "medium", "low", "minimal"]
_MANDATORY: Final[Json] = {
    "mandatory": True, "default_enabled": True, "supported_efforts": _EFFORTS, "default_effort": "medium",
}  # fmt: skip
_OPTIONAL: Final[Json] = {
    "mandatory": False, "default_enabled": False, "supported_efforts": [*_EFFORTS[:3], "none"],
    "default_effort": "none", "supports_max_tokens": True,
}  # fmt: skip
_BASE_PARAMETERS: Final = ["max_tokens", "temperature", "top_p", "response_format", "structured_outputs"]


def _model(
    slug: str, name: str, prices: str, modality: str, reasoning: Json | None = None, **extra: Any
) -> Json:
    """Build one catalog row: `prices` is "prompt completion" in USD per token, `modality` "a+b->c"."""
    prompt, completion = prices.split()
    inputs, outputs = (side.split("+") for side in modality.split("->"))
    context = extra.pop("context_length", 200_000)
    parameters = _BASE_PARAMETERS + (["tools", "tool_choice"] if extra.pop("tools", True) else [])
    row: Json = {
        "id": slug,
        "canonical_slug": slug.lstrip("~").split(":")[0] + "-2026-01-01",
        "hugging_face_id": "",
        "name": name,
        "created": 1_767_225_600,
        "description": f"{name}, as the simulator plays it.",
        "context_length": context,
        "architecture": {
            "modality": modality, "input_modalities": inputs, "output_modalities": outputs,
            "tokenizer": "Other", "instruct_type": None,
        },
        "pricing": {"prompt": prompt, "completion": completion},
        "top_provider": {"context_length": context, "max_completion_tokens": 64_000, "is_moderated": False},
        "per_request_limits": None,
        "supported_parameters": parameters + (["reasoning", "include_reasoning"] if reasoning else []),
        "default_parameters": None,
        "knowledge_cutoff": None,
        "expiration_date": None,
        "links": {"details": f"/api/v1/models/{slug}/endpoints"},
        "supported_voices": None,
    }  # fmt: skip
    if reasoning:
        row["reasoning"] = reasoning
    return row | extra


_SEES: Final = "text+image+file->text"
_HEARS: Final = "text+image+file+audio+video->text"
_ALIAS: Final[Json] = {"slug": "anthropic/claude-sonnet-4.6", "name": "Anthropic: Claude Sonnet 4.6"}
CATALOG: Final[tuple[Json, ...]] = (
    _model("openai/gpt-5-mini", "OpenAI: GPT-5 Mini", "0.00000025 0.000002", _SEES, _MANDATORY),
    _model("openai/gpt-5", "OpenAI: GPT-5", "0.00000125 0.00001", _SEES, _MANDATORY),
    _model("openai/gpt-4o-mini", "OpenAI: GPT-4o mini", "0.00000015 0.0000006", _SEES),
    _model("openai/gpt-5-image", "OpenAI: GPT-5 Image", "0.00001 0.00001", _SEES + "+image", _OPTIONAL),
    _model("anthropic/claude-sonnet-4.6", _ALIAS["name"], "0.000003 0.000015", _SEES, _OPTIONAL),
    _model("~anthropic/claude-sonnet-latest", "Anthropic: Claude Sonnet Latest", "0.000003 0.000015", _SEES,
           _OPTIONAL, alias_target=_ALIAS),
    _model("google/gemini-2.5-pro", "Google: Gemini 2.5 Pro", "0.00000125 0.00001", _HEARS, _MANDATORY,
           context_length=1_048_576),
    _model("google/gemini-2.5-flash", "Google: Gemini 2.5 Flash", "0.0000003 0.0000025", _HEARS, _OPTIONAL,
           context_length=1_048_576),
    _model("google/gemini-2.5-flash-image", "Google: Gemini 2.5 Flash Image", "0.0000003 0.0000025",
           "text+image->text+image", tools=False),
    _model("deepseek/deepseek-r1-0528", "DeepSeek: R1 0528", "0.0000005 0.00000215", "text->text",
           {"mandatory": True, "default_enabled": True}, context_length=163_840),
    _model("meta-llama/llama-3.3-70b-instruct", "Meta: Llama 3.3 70B Instruct", "0.0000001 0.00000032",
           "text->text", context_length=131_072),
    _model("openai/gpt-oss-20b:free", "OpenAI: gpt-oss-20b (free)", "0 0", "text->text",
           {**_OPTIONAL, "default_enabled": True, "supported_efforts": _EFFORTS[:3]}, context_length=131_072),
    _model("black-forest-labs/flux.2-pro", "Black Forest Labs: FLUX.2 Pro", "0 0", "text+image->image",
           tools=False),
    _model("openrouter/auto", "Auto Router", "-1 -1", _SEES, context_length=2_000_000),
)  # fmt: skip


# What `synthetic_catalog` composes its rows of.
_AUTHORS: Final = (
    ("ai21", "AI21"), ("amazon", "Amazon"), ("anthropic", "Anthropic"), ("cohere", "Cohere"),
    ("deepseek", "DeepSeek"), ("google", "Google"), ("inception", "Inception"), ("meta-llama", "Meta"),
    ("microsoft", "Microsoft"), ("minimax", "MiniMax"), ("mistralai", "Mistral"),
    ("moonshotai", "MoonshotAI"), ("nousresearch", "Nous"), ("nvidia", "NVIDIA"), ("openai", "OpenAI"),
    ("perplexity", "Perplexity"), ("qwen", "Qwen"), ("tencent", "Tencent"), ("x-ai", "xAI"), ("z-ai", "Z.AI"),
)  # fmt: skip
_FAMILIES: Final = ("Atlas", "Birch", "Cobalt", "Delta", "Ember", "Fjord", "Granite", "Harbor", "Indigo",
                    "Juniper", "Krypton", "Lumen", "Maple")  # fmt: skip
_SENTENCES: Final = (
    "It was trained on text and code in more than forty languages, with a stress on long documents.",
    "In agentic work it plans, calls tools in parallel and checks its own results before it answers.",
    "Compared with its predecessor it needs about *40% fewer tokens* for the same task.",
    "It follows instructions closely and keeps to JSON schemas, which suits extraction and routing.",
    "On **mathematics** and **science** it is level with models several times its size.",
    "Read more in the [announcement](https://example.org/models) and in the technical report.",
    "Usage of this model is subject to the terms of the company that made it.",
)
_SAMPLING: Final = [
    "frequency_penalty", "include_reasoning", "logprobs", "max_completion_tokens", "parallel_tool_calls",
    "presence_penalty", "repetition_penalty", "seed", "stop", "top_k", "top_logprobs",
]  # fmt: skip
_DEFAULTED: Final = (
    "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


def synthetic_catalog(count: int) -> list[Json]:
    """Make `count` rows of about 2 kB in the shape of GET /models, the same ones every time.

    The first rows have the ids, modalities and reasoning of `CATALOG`, in its order; the others are its
    ordinary models under invented names of 20 vendors, every id once. Descriptions have 300 to 800
    characters. The rows are the caller's own; a `count` below 1 gives none.
    """
    rows = [_grown(row, number) for number, row in enumerate(CATALOG[: max(count, 0)])]
    ordinary = [row for row in CATALOG if not row["id"].startswith(("~", "openrouter/"))]
    return rows + [_invented(ordinary, number) for number in range(len(rows), count)]


def _invented(templates: Sequence[Json], number: int) -> Json:
    """Give one of the templates a name, a vendor and a price of its own; same number, same row."""
    template = templates[number % len(templates)]
    author, vendor = _AUTHORS[(number + number // len(templates)) % len(_AUTHORS)]
    family = _FAMILIES[number // 7 % len(_FAMILIES)]
    free = template["id"].endswith(":free")
    slug = f"{author}/{family.lower()}-{number}"
    prices = {
        key: format(Decimal(price) * (1 + number % 20), "f") for key, price in template["pricing"].items()
    }
    named: Json = {
        "id": f"{slug}:free" if free else slug, "canonical_slug": f"{slug}-2026-01-01", "pricing": prices,
        "name": f"{vendor}: {family} {number}{' (free)' if free else ''}",
        "links": {"details": f"/api/v1/models/{slug}/endpoints"},
    }  # fmt: skip
    return _grown(template | named, number)


def _grown(row: Json, number: int) -> Json:
    """Copy a row with everything that real ones carry: long description, all prices, limits, defaults."""
    length = 303 + number * 37 % 495
    sentences = (_SENTENCES[(number + step) % len(_SENTENCES)] for step in range(12))
    said = f"{row['name']} is a general-purpose model. {' '.join(sentences)}"
    prompt, free = Decimal(row["pricing"]["prompt"]), row["pricing"]["prompt"] in ("0", "-1")
    more = {} if free else {
        "request": "0", "image": format(prompt * 1000, "f"), "web_search": "0.01",
        "internal_reasoning": row["pricing"]["completion"] if "reasoning" in row else "0",
        "input_cache_read": format(prompt / 10, "f"), "input_cache_write": format(prompt * 5 / 4, "f"),
    }  # fmt: skip
    return copy.deepcopy(row) | {
        "description": said[:length].rstrip() + "...",
        "pricing": row["pricing"] | more,
        "created": row["created"] - number * 43_200,
        "hugging_face_id": "" if number % 3 else row["id"].split(":")[0],
        "top_provider": row["top_provider"] | {"max_completion_tokens": None if number % 4 == 3 else 64_000},
        "supported_parameters": sorted({*row["supported_parameters"], *_SAMPLING}),
        "default_parameters": dict.fromkeys(_DEFAULTED),
        "knowledge_cutoff": "2025-06-30" if number % 2 else None,
        "expiration_date": "2099-12-31" if number % 50 == 49 else None,
    }  # fmt: skip


def _keyed(rows: Sequence[Any]) -> dict[str, Any]:
    """Index catalog entries by id, in their order; what has none, or one that came before, by "#place"."""
    found: dict[str, Any] = {}
    for place, row in enumerate(rows):
        slug = row.get("id") if isinstance(row, dict) else None
        found[slug if isinstance(slug, str) and slug not in found else f"#{place}"] = row
    return found


def _over(usual: Any, given: Any) -> Any:
    """`given` where it has the type of `usual`, else `usual`; objects key by key, lists only with strings."""
    if usual is None:
        return given
    if not isinstance(given, type(usual)):
        return usual
    if isinstance(given, dict):
        return usual | {key: _over(usual.get(key), value) for key, value in given.items()}
    return [value for value in given if isinstance(value, str)] if isinstance(given, list) else given


def _readable(row: Json) -> Json:
    """A catalog row as the simulator can play it: what it lacks or garbles is that of a plain text model."""
    slug = _over("", row.get("id"))
    usual = _model(slug, slug, "0 0", "text->text")
    return _over(usual | {"alias_target": {"slug": ""}, "reasoning": {}}, row)


def _lookup(catalog: Mapping[str, Any], model_id: str) -> Json | None:
    """Find the model that an id means (aliases, presets and `:nitro` and the like resolved), or None."""
    base, preset, _ = model_id.partition("@preset/")
    if preset and not base:
        base = next(iter(catalog), "")
    while base not in catalog and base.endswith((":nitro", ":floor", ":exacto", ":online")):
        base = base.rpartition(":")[0]
    if not isinstance(catalog.get(base), dict) or base.startswith("#"):
        return None
    row = _readable(catalog[base])
    target = catalog.get(row["alias_target"]["slug"])
    return _readable(target) if isinstance(target, dict) else row


# ── 2. HTTP errors ───────────────────────────────────────────────────────────
# Every error body we know, by name: (status, extra headers, body). Scenario `http_error name=…`.

_USER: Final = {"user_id": "user_2abcDEF"}
_DAY: Final = {
    "X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1787356800000",
}  # fmt: skip
HttpError = tuple[int, Mapping[str, str], Json | str]


def _gateway(code: int, message: str, user: bool = False, **metadata: Any) -> Json:
    error: Json = {"code": code, "message": message}
    if metadata:
        error["metadata"] = metadata
    return {"error": error, **(_USER if user else {})}


def _availability(status: int, kind: str, message: str, code: str, models: list[str], **more: Any) -> Json:
    metadata = {"metadata": more.pop("metadata")} if "metadata" in more else {}
    details = {"code": code, "retryable": status in (429, 503), "requested_models": models, **more}
    details["docs_url"] = f"https://openrouter.ai/docs/errors#{code}"
    return {"error": {
        "message": message, "error_type": kind, "http_status": status, "availability": details, **metadata,
    }}  # fmt: skip


def _model_not_found(model_id: str) -> Json:
    return _availability(
        400, "invalid_request", f"{model_id} is not a valid model ID", "model_not_found", [model_id]
    )


def _invalid(message: str, issues: list[Json] | None = None) -> Json:
    metadata = None if issues is None else {"raw": _dumps(issues).decode()}
    return {"error": {"code": "invalid_prompt", "message": message}, "metadata": metadata}


def _provider_400(raw: str, provider: str = "ProviderA") -> Json:
    return _gateway(400, "Provider returned error", True, provider_name=provider, raw=raw)


_RAW_A: Final = (
    '{"error":{"message":"Invalid value for temperature: at most 1","type":"invalid_request_error",'
    '"param":"temperature","code":null}}'
)
_RAW_B: Final = '{"type":"error","error":{"type":"invalid_request_error","message":"temperature too high"}}'
_RAW_SIGNATURE: Final = (
    '{"type":"error","error":{"type":"invalid_request_error",'
    '"message":"messages.1.content.0: Invalid `signature` in `thinking` block"}}'
)
_RAW_ENCRYPTED: Final = (
    '{"error":{"message":"The encrypted content could not be verified.","type":"invalid_request_error",'
    '"param":null,"code":"invalid_encrypted_content"}}'
)
_PARSED_PDF: Final = {
    "type": "file",
    "file": {"hash": "abc123", "name": "a.pdf", "content": [{"type": "text", "text": "Parsed"}]},
}  # fmt: skip
_ISSUE: Final = [{"code": "invalid_union", "path": ["input", 1], "message": "Invalid input"}]
_NO_CREDIT: Final = (
    "This request requires more credits, or fewer max_tokens. You requested up to 65536 tokens, but can only "
    "afford 2666."
)
_FREE_DAILY: Final = (
    "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day"
)
_TOO_LONG: Final = (
    "This endpoint's maximum context length is 8192 tokens. However, you requested about 9000 tokens."
)
_SONNET: Final = "anthropic/claude-sonnet-4.5"
HTTP_ERRORS: Final[dict[str, HttpError]] = {
    "400_bad_request_int_code": (400, {}, _gateway(400, 'Input required: specify "input"', True)),
    "400_responses_validation_string_code": (400, {}, _invalid("Invalid Responses API request", _ISSUE)),
    "400_provider_raw": (400, {}, _gateway(
        400, "Provider returned error", True, provider_name="ProviderA", is_byok=False, raw=_RAW_A,
        previous_errors=[{"code": 400, "message": "Provider returned error", "provider_name": "ProviderB",
                          "raw": _RAW_B}])),
    "400_thinking_signature": (400, {}, _provider_400(_RAW_SIGNATURE, "Anthropic")),
    "400_encrypted_content": (400, {}, _provider_400(_RAW_ENCRYPTED, "OpenAI")),
    "400_context_too_long": (400, {}, _gateway(400, _TOO_LONG, True, provider_name=None)),
    "400_store_true": (400, {}, _invalid("store must be false")),
    "400_model_not_found": (400, {}, _model_not_found("acme/none-1")),
    "400_wrong_endpoint": (400, {}, _availability(
        400, "invalid_request", "This model is not available on this endpoint.", "wrong_endpoint",
        ["openai/gpt-4o-audio-preview"],
        constraint={"field": "endpoint", "detail": "Use /api/v1/chat/completions for this model."})),
    "401_bad_key": (401, {}, _gateway(401, "User not found.")),
    "401_no_key": (401, {}, _gateway(401, "No auth credentials found")),
    "402_credits": (402, {}, _gateway(402, _NO_CREDIT, True, provider_name=None)),
    "403_moderation": (403, {}, _gateway(
        403, "openai/gpt-4o requires moderation. Your input was flagged.", True,
        reasons=["harassment", "violence"], flagged_input="I will …[truncated]… you", provider_name="OpenAI",
        model_slug="openai/gpt-4o")),
    "403_guardrail": (403, {}, _gateway(
        403, "Request blocked: prompt injection patterns detected",
        patterns=["ignore all previous instructions"])),
    "404_privacy": (404, {}, _availability(
        404, "not_found", "No endpoints for openai/gpt-5 match your data policy.", "privacy_restricted",
        ["openai/gpt-5"], affected_providers=["openai", "azure"], excluded_by=["data_policy:zdr"])),
    "404_no_providers": (404, {}, _gateway(
        404, "No allowed providers are available for the selected model.")),
    "404_no_tool_use": (404, {}, _gateway(
        404, "No endpoints found that support tool use. To learn more about provider routing, visit: "
        "https://openrouter.ai/docs/provider-routing")),
    "408_timeout": (408, {}, _gateway(408, "Request timed out")),
    "413_too_large": (413, {}, _gateway(413, "Request body too large")),
    "422_unprocessable": (422, {}, _gateway(422, "Unprocessable request")),
    "429_free_daily": (429, _DAY, _gateway(429, _FREE_DAILY, True, headers=_DAY)),
    "429_capacity_exhausted": (429, {"Retry-After": "2"}, _availability(
        429, "rate_limit_exceeded", f"All providers for {_SONNET} are at capacity. Retry after 2 seconds.",
        "capacity_exhausted", [_SONNET], retry_after=2, affected_providers=["anthropic", "google-vertex"],
        fallback_models=["anthropic/claude-haiku-4.5"],
        metadata={"previous_errors": [
            {"provider": "anthropic", "code": "capacity_exhausted", "status": 429}]})),
    "429_upstream": (429, {}, _gateway(
        429, "Provider returned error", True,
        raw="z-ai/glm-4.6 is temporarily rate-limited upstream. Please retry shortly.",
        provider_name="ProviderA", limit_source="upstream_provider_shared_pool",
        remedy_hint="Retry shortly, add your own provider key, or route to another provider")),
    "429_http_date": (
        429, {"Retry-After": "Fri, 21 Aug 2026 09:20:00 GMT"}, _gateway(429, "Rate limit exceeded")),
    "500_masked": (500, {}, _gateway(500, "Internal Server Error")),
    "502_provider": (502, {}, _gateway(
        502, "Provider returned an error", error_type="provider_unavailable", provider_code="upstream_reset",
        file_annotations=[_PARSED_PDF])),
    "503_no_provider": (503, {"Retry-After": "5"}, _gateway(503, "No instances available")),
    "524_edge_timeout": (524, {}, _gateway(524, "Request timed out. Please try again later.")),
    "529_overloaded": (529, {}, _gateway(529, "Provider returned error")),
    "502_html": (502, {}, "<html><head><title>502 Bad Gateway</title></head><body>cloudflare</body></html>"),
    "200_error_body": (200, {}, _gateway(502, "Provider returned error", provider_name="ProviderA")),
}  # fmt: skip


class RefusalError(Exception):
    """A request that is answered with an HTTP error; carries its status, headers and body."""

    def __init__(self, status: int, body: Json | str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.body, self.headers = status, body, dict(headers or {})

    @classmethod
    def named(cls, name: str, retry_after: object = None) -> RefusalError:
        """Build the refusal of one row of `HTTP_ERRORS`; raises KeyError for an unknown name."""
        status, headers, body = HTTP_ERRORS[name]
        extra = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return cls(status, body, {**headers, **extra})


# ── 3. Request checks ────────────────────────────────────────────────────────
# What OpenRouter refuses, as tables. A spec is a type name, "!" if required, "?" if null is accepted.

_TYPES: Final[dict[str, Callable[[Any], bool]]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "string_or_array": lambda v: isinstance(v, str | list),
    "string_or_object": lambda v: isinstance(v, str | dict),
    "id": lambda v: isinstance(v, str) and len(v) <= 256,
    "function_name": lambda v: isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", v) is not None,
    "any": lambda v: True,
}
Spec = Mapping[str, str]
Where = tuple[str | int, ...]
_FIELDS: Final[Spec] = {
    "background": "boolean?", "cache_control": "object", "debug": "object", "frequency_penalty": "number?",
    "image_config": "object", "include": "array?", "input": "string_or_array!", "instructions": "string?",
    "max_output_tokens": "integer?", "max_tool_calls": "integer?", "metadata": "object?",
    "modalities": "array", "model": "string", "models": "array", "parallel_tool_calls": "boolean?",
    "plugins": "array", "presence_penalty": "number?", "previous_response_id": "any?", "prompt": "object?",
    "prompt_cache_key": "string?", "prompt_cache_options": "object?", "provider": "object?",
    "reasoning": "object?", "route": "string?", "safety_identifier": "string?", "service_tier": "string?",
    "session_id": "id", "stop_server_tools_when": "array", "store": "boolean", "stream": "boolean",
    "temperature": "number?", "text": "object", "tool_choice": "string_or_object", "tools": "array",
    "top_k": "integer", "top_logprobs": "integer?", "top_p": "number?", "trace": "object",
    "truncation": "string?", "user": "id", "x_search_filter": "object",
}  # fmt: skip
_PROVIDER: Final[Spec] = {
    "allow_fallbacks": "boolean?", "data_collection": "string?", "enforce_distillable_text": "boolean?",
    "ignore": "array?", "max_price": "object", "only": "array?", "order": "array?",
    "preferred_max_latency": "any?", "preferred_min_throughput": "any?", "quantizations": "array?",
    "require_parameters": "boolean?", "sort": "string_or_object?", "zdr": "boolean?",
}  # fmt: skip
_ENUMS: Final[dict[tuple[str, ...], frozenset[str]]] = {
    ("service_tier",): frozenset({"auto", "default", "fast", "flex", "priority", "scale"}),
    ("truncation",): frozenset({"auto", "disabled"}),
    ("reasoning", "effort"): frozenset({"max", "xhigh", "high", "medium", "low", "minimal", "none"}),
    ("reasoning", "summary"): frozenset({"auto", "concise", "detailed"}),
    ("text", "verbosity"): frozenset({"low", "medium", "high", "xhigh", "max"}),
    ("provider", "data_collection"): frozenset({"allow", "deny"}),
}
_MEMBERS: Final[dict[str, frozenset[str]]] = {
    "modalities": frozenset({"text", "image"}),
    "include": frozenset({
        "reasoning.encrypted_content", "file_search_call.results", "message.input_image.image_url",
        "computer_call_output.output.image_url", "code_interpreter_call.outputs"}),
}  # fmt: skip
_PLUGINS: Final = frozenset({
    "web", "web-fetch", "file-parser", "context-compression", "response-healing", "auto-router",
    "auto-beta-router", "pareto-router", "fusion", "moderation"})  # fmt: skip
_TOOLS: Final[Mapping[str, Spec]] = {
    "function": {"name": "function_name!", "parameters": "object?", "strict": "boolean?",
                 "description": "string?"},
    "custom": {"name": "string!"},
    "mcp": {"server_label": "string!"},
} | {
    kind: {}
    for kind in (
        "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11",
        "image_generation", "code_interpreter", "file_search", "computer_use_preview", "local_shell", "shell",
        "apply_patch", "namespace")
}  # fmt: skip
_CALL: Final[Spec] = {"call_id": "string!", "name": "string!", "arguments": "string!", "id": "string"}
_OUTPUT: Final[Spec] = {"call_id": "string!", "output": "string_or_array!", "id": "string?"}
_ITEMS: Final[Mapping[str, Spec]] = {
    "message": {"role": "string!", "content": "string_or_array?"},
    "function_call": _CALL,
    "function_call_output": _OUTPUT,
    "reasoning": {"id": "string!", "summary": "array!", "content": "array", "encrypted_content": "string?",
                  "signature": "string?", "format": "string?"},
    "custom_tool_call": {"call_id": "string!", "name": "string!", "input": "string!"},
    "custom_tool_call_output": {"call_id": "string!", "output": "string_or_array!"},
    "web_search_call": {"id": "string!"},
    "image_generation_call": {"id": "string!"},
    "compaction": {"encrypted_content": "string!"},
    "item_reference": {"id": "string!"},
} | {
    kind: {}
    for kind in (
        "file_search_call", "code_interpreter_call", "computer_call", "computer_call_output",
        "context_compaction", "apply_patch_call", "apply_patch_call_output", "shell_call",
        "shell_call_output", "local_shell_call", "local_shell_call_output", "mcp_list_tools",
        "mcp_approval_request", "mcp_approval_response", "mcp_call", "additional_tools", "agent_message")
}  # fmt: skip
_PARTS: Final[dict[str, Spec]] = {
    "input_text": {"text": "string!"},
    "input_image": {"image_url": "string?", "detail": "string!"},
    "input_file": {"filename": "string", "file_data": "string", "file_url": "string", "file_id": "string?"},
    "input_audio": {"input_audio": "object!"},
    "input_video": {"video_url": "string!"},
}
_ASSISTANT_PARTS: Final[dict[str, Spec]] = {
    "output_text": {"text": "string!", "annotations": "array"}, "refusal": {"refusal": "string!"},
}  # fmt: skip
_ROLES: Final = frozenset({"user", "system", "developer", "assistant"})
_DETAILS: Final = frozenset({"auto", "low", "high", "original"})
_NEEDS: Final = {
    "input_image": "image", "image_url": "image", "input_audio": "audio", "input_video": "video",
    "video_url": "video",
}  # fmt: skip


def _list(body: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key, [] when there is something else."""
    value = body.get(key)
    return value if isinstance(value, list) else []


class _Checker:
    """Collects the issues of one body, in the shape the API's own validator reports them."""

    def __init__(self) -> None:
        self.issues: list[Json] = []

    def issue(self, path: Sequence[str | int], message: str, code: str = "invalid_type") -> None:
        self.issues.append({"code": code, "path": list(path), "message": message})

    def fields(self, path: Where, value: Mapping[str, Any], spec: Spec) -> None:
        """Check required keys, types and nulls of one object against one spec."""
        for key, kind in spec.items():
            name = kind.rstrip("!?")
            if key not in value:
                if kind.endswith("!"):
                    self.issue((*path, key), f"Required: {name}")
            elif value[key] is None:
                if not kind.endswith("?"):
                    self.issue((*path, key), f"Expected {name}, received null")
            elif not _TYPES[name](value[key]):
                self.issue((*path, key), f"Expected {name}, received {type(value[key]).__name__}")

    def kind(self, path: Where, value: Any, table: Mapping[str, Spec], default: str = "") -> str:
        """Check one member of a union; return its type, or "" when it is not one of the table."""
        kind = value.get("type", default) if isinstance(value, dict) else None
        open_union = table is _TOOLS or table is _ITEMS
        if isinstance(kind, str) and (kind in table or (open_union and kind.startswith("openrouter:"))):
            self.fields(path, value, table.get(kind, {}))
            return kind
        self.issue(path, f"Invalid input: {kind!r}", "invalid_union")
        return ""

    def parts(self, path: Where, parts: list[Any], table: Mapping[str, Spec]) -> None:
        """Check the content parts of a message or of a tool output."""
        for index, part in enumerate(parts):
            where = (*path, index)
            kind = self.kind(where, part, table)
            if kind == "input_image" and str(part.get("detail")) not in _DETAILS:
                self.issue((*where, "detail"), "Invalid enum value", "invalid_enum_value")
            audio = part.get("input_audio") if kind == "input_audio" else None
            if isinstance(audio, dict) and not (
                audio.get("format") in ("wav", "mp3") and isinstance(audio.get("data"), str)
            ):
                self.issue((*where, "input_audio", "format"), "Expected 'wav' | 'mp3'", "invalid_enum_value")

    def item(self, index: int, item: Any) -> None:
        """Check one input item."""
        path = ("input", index)
        kind = self.kind(path, item, _ITEMS, default="message")
        if kind == "message":
            self.message(path, item)
        elif kind == "function_call_output" and isinstance(item.get("output"), list):
            self.parts((*path, "output"), item["output"], _PARTS)

    def message(self, path: Where, item: Json) -> None:
        """Check role and content: an assistant turn is a plain string, or output parts with an id."""
        if str(item.get("role")) not in _ROLES:
            self.issue((*path, "role"), "Invalid enum value", "invalid_enum_value")
        content = item.get("content")
        if not isinstance(content, list):
            return
        assistant = item.get("role") == "assistant"
        self.parts((*path, "content"), content, _ASSISTANT_PARTS if assistant else _PARTS)
        if assistant and not isinstance(item.get("id"), str):
            self.issue((*path, "id"), "Required: string")

    def body(self, body: Json) -> None:
        """Check everything of a /responses body that one look at the body can tell."""
        self.fields((), body, _FIELDS)
        for path, allowed in _ENUMS.items():
            value: Any = body
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None and not (isinstance(value, str) and value in allowed):
                self.issue(path, f"Invalid enum value: {value!r}", "invalid_enum_value")
        for key, members in _MEMBERS.items():
            for value in _list(body, key):
                if not (isinstance(value, str) and value in members):
                    self.issue((key,), f"Invalid enum value: {value!r}", "invalid_enum_value")
        self.options(body)
        for index, tool in enumerate(_list(body, "tools")):
            self.kind(("tools", index), tool, _TOOLS)
        if isinstance(body.get("input"), list):
            for index, item in enumerate(body["input"]):
                self.item(index, item)

    def options(self, body: Json) -> None:
        """Check provider, plugins, text.format and metadata."""
        provider = body.get("provider")
        if isinstance(provider, dict):
            self.fields(("provider",), provider, _PROVIDER)
            for key in provider.keys() - _PROVIDER.keys():
                self.issue(("provider",), f"Unrecognized key: {key!r}", "unrecognized_keys")
        for index, plugin in enumerate(_list(body, "plugins")):
            if not isinstance(plugin, dict) or str(plugin.get("id")) not in _PLUGINS:
                self.issue(("plugins", index), "Invalid plugin", "invalid_union")
        text = body.get("text")
        layout = text.get("format") if isinstance(text, dict) else None
        if isinstance(layout, dict) and layout.get("type") == "json_schema":
            self.fields(("text", "format"), layout, {"name": "string!", "schema": "object!"})
        pairs = body.get("metadata")
        pairs = pairs if isinstance(pairs, dict) else {}
        fits = all(isinstance(v, str) and len(v) <= 512 and len(k) <= 64 for k, v in pairs.items())
        if len(pairs) > 16 or not fits:
            self.issue(("metadata",), "At most 16 pairs of strings, keys ≤ 64, values ≤ 512", "too_big")


def _check_responses(body: Json) -> None:
    """Raise RefusalError for a /responses body that the gateway itself refuses."""
    if "input" not in body:
        raise RefusalError.named("400_bad_request_int_code")
    checker = _Checker()
    checker.body(body)
    if checker.issues:
        if body.get("store") is True and len(checker.issues) == 1:
            raise RefusalError.named("400_store_true")
        raise RefusalError(400, _invalid("Invalid Responses API request", checker.issues))
    if body.get("store"):
        raise RefusalError.named("400_store_true")
    if body.get("previous_response_id") is not None:
        raise RefusalError(400, _invalid("previous_response_id is not supported"))
    if isinstance(body["input"], list):
        _check_pairs(body["input"])
    names = Counter(t["name"] for t in body.get("tools") or [] if t["type"] == "function")
    if twice := [name for name, count in names.items() if count > 1]:
        raise RefusalError(400, _provider_400(f"Tool names must be unique: {twice[0]}"))


def _check_pairs(items: list[Json]) -> None:
    """Raise RefusalError unless every function_call is followed by exactly one output, and the reverse."""
    open_calls: set[str] = set()
    seen: set[str] = set()
    for item in items:
        kind, call_id = item.get("type"), item.get("call_id", "")
        if kind == "function_call":
            if call_id in seen:
                raise RefusalError(400, _provider_400(f"Duplicate function call id {call_id}."))
            open_calls.add(call_id)
            seen.add(call_id)
        elif kind == "function_call_output":
            if call_id not in open_calls:
                raise RefusalError(400, _provider_400(f"No tool call found for output {call_id}."))
            open_calls.discard(call_id)
    if open_calls:
        raise RefusalError(400, _provider_400(f"No tool output found for function call {min(open_calls)}."))


def _check_chat(body: Json) -> None:
    """Raise RefusalError for a /chat/completions body without usable messages (integer code, chat style)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusalError(400, _gateway(400, 'Input required: specify "prompt" or "messages"', True))
    pending: set[str] = set()
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in {*_ROLES, "tool"}:
            raise RefusalError(400, _gateway(400, "messages: invalid role", True))
        if message["role"] == "tool":
            if message.get("tool_call_id") not in pending:
                raise RefusalError(400, _provider_400("tool message without a matching tool call"))
            pending.discard(message["tool_call_id"])
        elif pending:
            break
        pending |= {call["id"] for call in message.get("tool_calls") or []}
    if pending:
        raise RefusalError(400, _provider_400(f"No tool output found for tool call {min(pending)}."))
    flat = [tool for tool in body.get("tools") or [] if tool.get("type") == "function"]
    if not all(isinstance(tool.get("function", {}).get("name"), str) for tool in flat):
        raise RefusalError(400, _gateway(400, "tools: function.name: Required", True))


def _wanted(body: Json) -> list[str]:
    """The modalities that a body asks for; without any it is text."""
    return body.get("modalities") or ["text"]


def _check_offers(body: Json, model: Json) -> None:
    """Raise RefusalError when the model cannot use tools or give the modalities asked for.

    The words about modalities are OpenRouter's: https://github.com/BerriAI/litellm/pull/34908.
    """
    wanted = _wanted(body)
    if not set(wanted) <= set(model["architecture"]["output_modalities"]):
        listed = ", ".join(wanted)
        raise RefusalError(
            404, _gateway(404, f"No endpoints found that support the requested output modalities: {listed}")
        )
    if body.get("tools") and "tools" not in model["supported_parameters"]:
        raise RefusalError.named("404_no_tool_use")


def _check_model(body: Json, model: Json, kinds: set[str]) -> None:
    """Raise RefusalError when the model cannot take the media, give what is offered or reason as asked."""
    architecture = model["architecture"]
    for kind in sorted(kinds & _NEEDS.keys()):
        if _NEEDS[kind] not in architecture["input_modalities"]:
            raise RefusalError(404, _gateway(404, f"No endpoints found that support {_NEEDS[kind]} input"))
    _check_offers(body, model)
    reasoning = body.get("reasoning") or {}
    if reasoning.get("effort") == "none" and (model.get("reasoning") or {}).get("mandatory"):
        raise RefusalError(400, _provider_400("Reasoning is mandatory for this model."))
    budget, cap = reasoning.get("max_tokens"), body.get("max_output_tokens")
    if budget and cap and cap <= budget:
        raise RefusalError(400, _provider_400("max_output_tokens must be greater than the reasoning budget"))


# ── 4. Turn ──────────────────────────────────────────────────────────────────
# What one request asks, read once: both endpoints end in the same shape.


@dataclass(frozen=True)
class Turn:
    """One inference request. `text` is the last user message, `outputs` the tool outputs that follow it."""

    chat: bool
    body: Json
    model_id: str
    model: Json
    text: str
    outputs: list[str]
    tools: list[Json]
    tool_types: frozenset[str]
    include: frozenset[str]
    input_tokens: int
    kinds: set[str]
    rid: str = field(default_factory=lambda: secrets.token_hex(6))
    now: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """The response id, also sent as X-Generation-Id."""
        return f"gen-{self.now}-{self.rid}"

    @property
    def author(self) -> str:
        """The model family that signs reasoning: the part of the id before the slash."""
        return self.model["id"].lstrip("~").split("/")[0]

    @property
    def writes(self) -> bool:
        """Whether the answer has text: it is asked for unless `modalities` says otherwise."""
        return "text" in _wanted(self.body)

    @property
    def reasons(self) -> bool:
        """Whether this request gets reasoning: the model's default, unless the body says otherwise."""
        asked = self.body.get("reasoning") or {}
        effort = asked.get("effort") or self.body.get("reasoning_effort")
        if effort is not None:
            return effort != "none"
        if asked.get("enabled") is not None or asked.get("max_tokens"):
            return bool(asked.get("enabled", True))
        able = self.model.get("reasoning") or {}
        usual = able.get("default_enabled") and able.get("default_effort") != "none"
        return bool(able.get("mandatory") or usual)

    def offers(self, word: str) -> bool:
        """Whether a tool type or plugin whose name contains `word` is on offer."""
        plugins = {str(plugin.get("id")) for plugin in self.body.get("plugins") or []}
        return any(word in kind for kind in self.tool_types | plugins) or self.model_id.endswith(f":{word}")


def _flatten(content: Any, kinds: set[str]) -> str:
    """Join the text parts of a message content and note the part types seen."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    kinds.update(part.get("type", "") for part in content)
    return "".join(part.get("text") or "" for part in content)


# Open WebUI hands pictures that tools made to the model in a user message of its own; nobody asked it.
_PICTURES_OF_TOOLS: Final = "Here are the images from the tool results"


def _read_turn(chat: bool, body: Json, model_id: str, model: Json) -> Turn:
    """Read a checked body of either endpoint into a Turn."""
    source = body.get("messages") if chat else body["input"]
    items: list[Json] = [{"role": "user", "content": source}] if isinstance(source, str) else source or []
    kinds: set[str] = set()
    text, outputs, length = "", [], len(body.get("instructions") or "")
    for item in items:
        said = _flatten(item.get("content"), kinds) or item.get("arguments") or ""
        if item.get("role") == "user" and not said.startswith(_PICTURES_OF_TOOLS):
            text, outputs = said, []
        elif item.get("role") == "tool":
            outputs.append(said)
        elif item.get("type") == "function_call_output":
            said = _flatten(item["output"], kinds)
            outputs.append(said)
        length += len(said)
    offered = body.get("tools") or []
    flat = [tool.get("function", tool) for tool in offered if tool.get("type") == "function"]
    media = 256 * len(kinds & _NEEDS.keys())
    return Turn(
        chat=chat, body=body, model_id=model_id, model=model, text=text, outputs=outputs, tools=flat,
        tool_types=frozenset(tool.get("type", "") for tool in offered),
        include=frozenset(body.get("include") or []),
        input_tokens=max(1, (length + len(_dumps(offered))) // 4 + media), kinds=kinds,
    )  # fmt: skip


def _seal(item: Json, author: str) -> str:
    """Sign a reasoning item: whoever replays it changed, or to another family, is refused."""
    signed = [item["id"], item["summary"], item.get("content") or [], item.get("format")]
    digest = hashlib.sha256(_dumps(signed) + author.encode()).hexdigest()[:32]
    return base64.b64encode(f"simulator:{author}:{digest}".encode()).decode()


_SEALS: Final = (("encrypted_content", "400_encrypted_content"), ("signature", "400_thinking_signature"))


def _check_seals(turn: Turn) -> None:
    """Raise RefusalError when a replayed reasoning item of ours was altered or belongs to another family."""
    items = turn.body.get("input")
    for item in items if isinstance(items, list) else []:
        if item.get("type") != "reasoning":
            continue
        for key, name in _SEALS:
            seal = item.get(key) or ""
            if seal.startswith("c2ltdWxhdG9yO") and seal != _seal(item, turn.author):
                raise RefusalError.named(name)


# ── 5. Scenarios ─────────────────────────────────────────────────────────────
# A scenario is a function from a Turn and its parameters to a Plan, plus default parameters.

Params = dict[str, Any]
_LOST: Final = ("server_error", "provider_unavailable", "Provider disconnected unexpectedly")


@dataclass
class Plan:
    """What will be answered: finished output items, how it ends, and how the bytes are delivered."""

    items: list[Json] = field(default_factory=list)
    ending: str = "completed"  # a key of _ENDINGS
    reason: str = "max_output_tokens"
    error: tuple[str, str, str] = _LOST  # code, error_type, message
    style: str = "deltas"  # function calls: deltas, interleaved, whole
    reasoning_tokens: int = 0
    searches: int = 0
    server_tools: int = 0
    raw: bytes | None = None  # replay these SSE bytes instead of anything derived
    params: Params = field(default_factory=dict)


def _text_item(turn: Turn, text: str, annotations: list[Json] | None = None, item_id: str = "") -> Json:
    part = {"type": "output_text", "text": text, "annotations": annotations or []}
    item_id = item_id or f"msg_tmp_{turn.rid}"
    return {"type": "message", "id": item_id, "role": "assistant", "status": "completed", "content": [part]}


def _reasoning_item(
    turn: Turn, summary: Sequence[str] = (), content: str = "", sealed: bool = False, item_id: str = ""
) -> Json:
    """Build a reasoning item: summary parts, or raw content with a signature."""
    item: Json = {"type": "reasoning", "id": item_id or f"rs_tmp_{turn.rid}", "status": "completed",
                  "summary": [{"type": "summary_text", "text": part} for part in summary]}  # fmt: skip
    if content:
        item |= {"content": [{"type": "reasoning_text", "text": content}], "format": "anthropic-claude-v1"}
        item["signature"] = _seal(item, turn.author)
    else:
        item["format"] = "openai-responses-v1"
        if sealed or "reasoning.encrypted_content" in turn.include:
            item["encrypted_content"] = _seal(item, turn.author)
    return item


def _quote(text: str, limit: int = 200) -> str:
    """Cut a text for quoting; control words are left out, they would work again when they come back."""
    text = " ".join(_CONTROL.sub("", _cut_script(text)[0]).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _thoughts(turn: Turn, params: Params) -> list[Json]:
    """The reasoning summary that precedes an answer, if the request gets one."""
    if not params.get("reason", turn.reasons):
        return []
    said = _quote(turn.text, 80) or "an empty message"
    parts = [f"**Reading the message**\n\nThe user says: {said}", "**Answering**\n\nA short answer will do."]
    return [_reasoning_item(turn, parts, sealed=bool(params.get("encrypted")))]


def _reply(turn: Turn, params: Params) -> str:
    """The text of an ordinary answer: `text` if given, else a greeting that quotes the user."""
    if "text" in params:
        return str(params["text"])
    said = _quote(turn.text)
    quoted = f"You said: “{said}”." if said else "You said nothing."
    return f"Hello! This is {turn.model['name']}, played by a simulator. {quoted} How can I help?"


def _plain(turn: Turn, params: Params) -> Plan:
    """A short text, or a picture where no text is asked for."""
    said = _text_item(turn, _reply(turn, params)) if turn.writes else _picture(turn, _png())
    return Plan([*_thoughts(turn, params), said])


_MARKDOWN: Final = """## A tour of Markdown

A paragraph with **bold**, *italic*, `code` and a [link](https://example.org/tour).

1. First point
2. Second point
   - a nested one

| metric | value |
| --- | ---: |
| tokens | 1,024 |
| cost | $0.002 |

```python
def greet(name: str) -> str:
    return f"Hello, {name}!"
```

> A quotation, and some mathematics: $e^{i\\pi} + 1 = 0$.

Unicode stays whole: naïve café, 漢字, 👩‍👩‍👧, 🇳🇴.
"""


def _markdown(turn: Turn, params: Params) -> Plan:
    return Plan([*_thoughts(turn, params), _text_item(turn, "\n".join([_MARKDOWN] * int(params["parts"])))])


@lru_cache(maxsize=16)
def _numbered(count: int) -> str:
    return "".join(f"word{index} " for index in range(count))


def _stream(turn: Turn, params: Params) -> Plan:
    """`tokens` deltas, equal for every request, so that their frames are built once and shared."""
    return Plan([_text_item(turn, _numbered(int(params["tokens"])), item_id="msg_tmp_stream")])


def _reasoning_text(turn: Turn, params: Params) -> Plan:
    said = _quote(turn.text, 80)
    thought = _reasoning_item(turn, content=f"The user wrote: {said}. I should answer briefly and kindly.")
    return Plan([thought, _text_item(turn, _reply(turn, params))])


_EXAMPLES: Final[dict[str, Any]] = {
    "city": "Oslo", "location": "Oslo", "place": "Oslo", "unit": "c", "url": "https://example.org/",
    "tz": "Europe/Oslo", "timezone": "Europe/Oslo", "query": "openrouter responses api", "date": "2026-08-21",
}  # fmt: skip
_BY_TYPE: Final[dict[str, Callable[[Json], Any]]] = {
    "integer": lambda schema: schema.get("minimum", 1),
    "number": lambda schema: schema.get("minimum", 1.5),
    "boolean": lambda schema: True,
    "array": lambda schema: [_example("", schema.get("items") or {})],
    "object": lambda schema: _arguments(schema),
    "null": lambda schema: None,
}


def _example(name: str, schema: Json) -> Any:
    """A value that fits one property of a tool's JSON schema."""
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "string")
    kind = next(iter(kind), "string") if isinstance(kind, list) else kind
    return _BY_TYPE[kind](schema) if kind in _BY_TYPE else _EXAMPLES.get(name, "example")


def _arguments(schema: Json) -> Json:
    """Arguments for a tool: its required properties, or all of them when none is required."""
    properties: Json = schema.get("properties") or {}
    names = schema.get("required") or list(properties)
    return {name: _example(name, properties.get(name) or {}) for name in names}


_CITY: Final = {"properties": {"city": {"type": "string"}}}
_DEFAULT_TOOL: Final[Json] = {"name": "get_weather", "parameters": _CITY}


def _call_item(turn: Turn, index: int, name: str, arguments: Any, call_id: str = "") -> Json:
    """One function call; arguments that are a string go out as they are, valid or not."""
    tail = f"{turn.rid}_{index}"
    return {
        "type": "function_call", "id": f"fc_tmp_{tail}", "call_id": call_id or f"call_{tail}", "name": name,
        "arguments": arguments if isinstance(arguments, str) else _dumps(arguments).decode(),
        "status": "completed",
    }  # fmt: skip


def _tool(turn: Turn, params: Params) -> Plan:
    """Call `n` functions out of the offered ones; answer in text once the outputs of `rounds` are in."""
    count, rounds = int(params["n"]), float(params["rounds"])
    if len(turn.outputs) >= count * rounds:
        return _tool_answer(turn, params)
    by_name = {tool["name"]: tool for tool in turn.tools}
    named = str(params.get("name", ""))
    chosen = [by_name.get(named, {"name": named})] if named else turn.tools or [_DEFAULT_TOOL]
    calls = []
    for index in range(count):
        tool = chosen[index % len(chosen)]
        arguments = params.get("args", _arguments(tool.get("parameters") or {}))
        calls.append(_call_item(turn, index, tool["name"], arguments))
    said = [_text_item(turn, str(params["say"])) | {"phase": "commentary"}] if params.get("say") else []
    return Plan([*_thoughts(turn, params), *said, *calls], style=str(params["style"]))


def _tool_answer(turn: Turn, params: Params) -> Plan:
    """After tool outputs: a text that quotes them, so that no call is repeated."""
    quoted = "\n".join(f"- {_quote(output)}" for output in turn.outputs)
    asked = _quote(turn.text, 80)
    return Plan([_text_item(turn, f"The tools returned:\n\n{quoted}\n\nThat answers “{asked}”.")])


# A script says, answer by answer, what the model thinks, says and calls.

Step = tuple[str, Any]  # a kind of _ACTS, and what is thought, said or called
_SCRIPT: Final = re.compile(r"\[\[\s*script\s+(?=\{)")
_SCRIPT_END: Final = re.compile(r"\s*\]\]")


def _cut_script(text: str) -> tuple[str, Params | None]:
    """A message without its script, and the script; None if it has none that can be read."""
    start = _SCRIPT.search(text)
    if start is None:
        return text, None
    try:
        script, end = json.JSONDecoder().raw_decode(text, start.end())
    except ValueError:
        return text, None
    closed = _SCRIPT_END.match(text, end)
    return (text[: start.start()] + text[closed.end() :], script) if closed else (text, None)


def _read_answer(written: Any) -> tuple[list[Step], Params]:
    """One answer of a script: its steps, and parameters for it alone."""
    params = {"steps": written} if not isinstance(written, dict) else written
    params = {key: value for key, value in params.items() if key not in _QUEUED_ONLY}
    steps = params.pop("steps", [])
    return [_read_step(step) for step in ([steps] if isinstance(steps, str) else steps)], params


def _read_step(written: Any) -> Step:
    """One step: a string is said, an object with a name is a call, any other has its kind as its only key."""
    if isinstance(written, str):
        return "say", written
    if isinstance(written, dict) and "name" in written:
        return "call", written
    if isinstance(written, dict) and len(written) == 1:
        (kind,) = written
        if kind in _ACTS and kind != "call":
            return kind, written[kind]
    raise ValueError(f"no step of a script: {written!r}")


def _act_call(turn: Turn, params: Params, index: int, call: Params) -> list[Json]:
    arguments = call.get("arguments", {})
    return [_call_item(turn, index, call["name"], arguments, str(call.get("call_id", "")))]


def _act_say(turn: Turn, params: Params, index: int, text: Any) -> list[Json]:
    quoted = "\n".join(f"- {_quote(output, int(params['quote']))}" for output in turn.outputs)
    text = str(text).replace("{outputs}", quoted).replace("{count}", str(len(turn.outputs)))
    return [_text_item(turn, text, item_id=f"msg_tmp_{turn.rid}_{index}")]


def _act_reasoning(turn: Turn, params: Params, index: int, thought: Any) -> list[Json]:
    if not thought:
        return []
    parts = [str(part) for part in (thought if isinstance(thought, list) else [thought])]
    sealed = bool(params.get("encrypted"))
    return [_reasoning_item(turn, parts, sealed=sealed, item_id=f"rs_tmp_{turn.rid}_{index}")]


def _act_thinking(turn: Turn, params: Params, index: int, thought: Any) -> list[Json]:
    return [_reasoning_item(turn, content=str(thought), item_id=f"rs_tmp_{turn.rid}_{index}")]


_ACTS: Final[dict[str, Callable[[Turn, Params, int, Any], list[Json]]]] = {
    "call": _act_call,
    "say": _act_say,
    "reasoning": _act_reasoning,
    "thinking": _act_thinking,
}


def _act(turn: Turn, params: Params, steps: Sequence[Step]) -> Plan:
    """The items of an answer, in the order of its steps; the usual thoughts go first if it has none."""
    kinds = {kind for kind, _ in steps}
    items = [] if kinds & {"reasoning", "thinking"} else _thoughts(turn, params)
    for index, (kind, value) in enumerate(steps):
        items += _ACTS[kind](turn, params, index, value)
    if "call" in kinds:
        items = [item | ({"phase": "commentary"} if item["type"] == "message" else {}) for item in items]
    return Plan(items, style=str(params["style"]))


def _follow_script(turn: Turn, params: Params) -> Plan:
    """Make the calls of the first round that lack outputs; after all of them, or without tools, the end."""
    rounds = [_read_answer(written) for written in params["rounds"]]
    numbers = [sum(kind == "call" for kind, _ in steps) for steps, _ in rounds]
    if not all(numbers):
        raise ValueError("a round without a call would never end")
    answered = len(turn.outputs)
    able = bool(turn.tools) and turn.body.get("tool_choice") != "none"
    for (steps, own), number in zip(rounds, numbers, strict=True):
        if able and answered < number:
            params |= own
            return _act(turn, params, _unanswered(steps, answered))
        answered -= number
    if able and rounds and params["endless"]:
        params |= rounds[-1][1]
        return _act(turn, params, rounds[-1][0])
    return _end_script(turn, params)


def _unanswered(steps: Sequence[Step], answered: int) -> list[Step]:
    """The steps of a round of which so many calls have outputs: all, or only the calls that are left."""
    return [step for step in steps if step[0] == "call"][answered:] if answered else list(steps)


def _end_script(turn: Turn, params: Params) -> Plan:
    """The last answer: steps, another scenario, or the usual text that quotes the outputs."""
    steps, own = _read_answer(params["final"])
    if scenario := SCENARIOS.get(str(own.get("scenario", ""))):
        params |= scenario.defaults | own
        return scenario.plan(turn, params)
    params |= own
    if steps:
        return _act(turn, params, steps)
    return (_tool_answer if turn.outputs else _plain)(turn, params)


_SOURCES: Final = (
    ("https://example.org/towers", "World towers", "Burj Khalifa — 828 m\n[...]\nMerdeka 118 — 678.9 m"),
    ("https://example.net/list", "Height list", "The list of the tallest buildings"),
)


def _web_search(turn: Turn, params: Params) -> Plan:
    """A search item (native, or OpenRouter's own) and an answer with flat citations."""
    kind = "web_search_call" if params["native"] else "openrouter:web_search"
    sources = [{"type": "url", "url": url} for url, _, _ in _SOURCES]
    action = {"type": "search", "query": _quote(turn.text, 100) or "news", "sources": sources}
    search = {"type": kind, "id": f"ws_tmp_{turn.rid}", "status": "completed", "action": action}
    text, annotations = "Two sources agree:", []
    for url, title, content in _SOURCES:
        text += " "
        start = len(text)
        text += f"[{title}]({url})"
        annotations.append({"type": "url_citation", "url": url, "title": title, "start_index": start,
                            "end_index": len(text), "content": content})  # fmt: skip
    return Plan([search, _text_item(turn, text + ".", annotations)], searches=1, server_tools=1)


def _datetime(turn: Turn, params: Params) -> Plan:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(turn.now))
    item = {"type": "openrouter:datetime", "id": f"dt_tmp_{turn.rid}", "status": "completed",
            "datetime": stamp, "timezone": "UTC"}  # fmt: skip
    return Plan([item, _text_item(turn, f"It is {stamp}.")], server_tools=1)


@lru_cache(maxsize=8)
def _png(size: int = 32) -> str:
    """A valid square PNG (a colour gradient) of `size` pixels, in base64."""
    shades = [number * 255 // size for number in range(size)]
    rows = b"".join(b"\0" + b"".join(bytes((x, y, 160)) for x in shades) for y in shades)
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(packed)).decode()


def _picture(turn: Turn, data: str) -> Json:
    return {"type": "image_generation_call", "id": f"ig_tmp_{turn.rid}", "status": "completed",
            "result": f"data:image/png;base64,{data}"}  # fmt: skip


def _image(turn: Turn, params: Params) -> Plan:
    """An image as image_generation_call with a data URL, or as server tool item with bare base64."""
    data = _png(int(params["size"]))
    server = {"type": "openrouter:image_generation", "id": f"ig_tmp_{turn.rid}", "status": "completed",
              "prompt": _quote(turn.text, 100), "result": data}  # fmt: skip
    items = [_picture(turn, data) if params["native"] else server]
    if turn.writes:
        items.append(_text_item(turn, "Here is your picture."))
    return Plan(items, server_tools=0 if params["native"] else 1)


def _refusal(turn: Turn, params: Params) -> Plan:
    item = _text_item(turn, "")
    item["content"] = [{"type": "refusal", "refusal": "I'm sorry, but I can't help with that."}]
    return Plan([item])


def _incomplete(turn: Turn, params: Params) -> Plan:
    """The answer breaks off in mid-word; `text=0` spends the whole budget on reasoning."""
    reason = str(params["reason_code"])
    if not params["text"]:
        thoughts = _thoughts(turn, params | {"reason": True})
        return Plan(thoughts, ending="incomplete", reason=reason, reasoning_tokens=2048)
    story = _text_item(turn, "Once upon a time there was a very long sto") | {"status": "incomplete"}
    return Plan([*_thoughts(turn, params), story], ending="incomplete", reason=reason)


def _failing(turn: Turn, params: Params) -> Plan:
    """`after` words of text, then one of the error shapes; after=0: the error comes before any item."""
    after = int(params["after"])
    text = "".join(_split(_reply(turn, params))[:after])
    error = (str(params["code"]), str(params["type"]), str(params["message"]))
    return Plan([_text_item(turn, text)] if after else [], ending=str(params["shape"]), error=error)


def _http_error(turn: Turn, params: Params) -> Plan:
    if params["name"] not in HTTP_ERRORS:
        raise RefusalError(400, _gateway(400, f"simulator: no http_error named {params['name']}"))
    raise RefusalError.named(str(params["name"]), params.get("retry_after"))


def _golden(turn: Turn, params: Params) -> Plan:
    """Replay `body` (text), `base64` (bytes), the file at `path`, or a recording by `name`."""
    if "body" in params:
        return Plan(raw=str(params["body"]).encode())
    if "base64" in params:
        return Plan(raw=base64.b64decode(str(params["base64"])))
    name = Path(str(params.get("name", "01_plain_text"))).name
    path = Path(params.get("path") or Path(params["dir"]) / f"{name}.sse")
    if not path.is_file():
        raise RefusalError(400, _gateway(400, f"simulator: no recording named {path.stem}"))
    return Plan(raw=path.read_bytes())


_TASKS: Final[dict[str, Callable[[str], Json]]] = {
    '"title"': lambda topic: {"title": f"💬 {topic}"},
    '"tags"': lambda topic: {"tags": ["General", "Simulation"]},
    '"follow_ups"': lambda topic: {"follow_ups": [
        "Can you explain that in more detail?", "What would be an example?", "What should I try next?"]},
    '"queries"': lambda topic: {"queries": [topic]},
    '"prompt"': lambda topic: {"prompt": f"A friendly picture about {topic}"},
    '"text"': lambda topic: {"text": "and then some more"},
}  # fmt: skip


def _task_kind(turn: Turn) -> str:
    """Which of Open WebUI's task prompts this is (a key of _TASKS), or "" for a message of a person."""
    if not turn.text.lstrip().startswith("### Task:"):
        return ""
    return next((key for key in _TASKS if key in turn.text), "")


def _task(turn: Turn, params: Params) -> Plan:
    said = re.findall(r"^USER: (.+)$", turn.text, flags=re.MULTILINE)
    topic = _quote(said[-1] if said else "A friendly chat", 40)
    return Plan([_text_item(turn, _dumps(_TASKS[_task_kind(turn) or '"title"'](topic)).decode())])


@dataclass(frozen=True)
class Scenario:
    """One way to answer: the function that plans it, its default parameters, and a line for the page."""

    plan: Callable[[Turn, Params], Plan]
    about: str
    defaults: Params = field(default_factory=dict)


def _error(shape: str, about: str, code: str, kind: str, message: str, **more: Any) -> Scenario:
    defaults = {"shape": shape, "after": 3, "code": code, "type": kind, "message": message}
    return Scenario(_failing, about, defaults | more)


_LIMIT: Final = ("rate_limit_exceeded", "rate_limit_exceeded", "Rate limit exceeded. Please try again later.")
_BUSY: Final = ("server_error", "provider_overloaded", "Provider is temporarily overloaded")
_CALLS: Final[Params] = {"n": 1, "rounds": 1, "style": "deltas"}
SCENARIOS: Final[dict[str, Scenario]] = {
    "plain": Scenario(_plain, "a short text that quotes the user, or a picture; `text=` sets it"),
    "markdown": Scenario(_markdown, "headings, table, code, Unicode; `parts` times", {"parts": 3}),
    "reasoning": Scenario(_plain, "a reasoning summary in two parts, then text", {"reason": True}),
    "reasoning_text": Scenario(_reasoning_text, "raw reasoning with signature, then text"),
    "tool": Scenario(_tool, "one function call; `name`, `args`, `say`, `rounds`", _CALLS),
    "tools": Scenario(_tool, "parallel calls, deltas interleaved", _CALLS | {"n": 2, "style": "interleaved"}),
    "tool_whole": Scenario(_tool, "a call whose arguments come only in item.done",
                           _CALLS | {"style": "whole"}),
    "tool_answer": Scenario(_tool_answer, "a text that quotes the tool outputs"),
    "script": Scenario(_follow_script, "rounds of calls written down in JSON, then an end",
                       {"rounds": [], "endless": False, "final": [], "quote": 200, "style": "deltas"}),
    "web_search": Scenario(_web_search, "web_search_call, progress events, citations", {"native": 1}),
    "or_search": Scenario(_web_search, "openrouter:web_search item, citations", {"native": 0}),
    "datetime": Scenario(_datetime, "openrouter:datetime item, then text"),
    "image": Scenario(_image, "image_generation_call with a PNG data URL of `size` pixels",
                      {"native": 1, "size": 32}),
    "or_image": Scenario(_image, "openrouter:image_generation with bare base64", {"native": 0, "size": 32}),
    "refusal": Scenario(_refusal, "a refusal part; the response is still completed"),
    "incomplete": Scenario(_incomplete, "ends with max_output_tokens; `text=0`: reasoning only",
                           {"reason_code": "max_output_tokens", "text": 1}),
    "content_filter": Scenario(_incomplete, "ends with content_filter",
                               {"reason_code": "content_filter", "text": 1}),
    "empty": Scenario(lambda turn, params: Plan(), "completed without any output"),
    "completed_only": Scenario(_plain, "response.completed is the only event", {"reason": False, "only": 1}),
    "failed": _error("failed", "response.failed after `after` words", *_BUSY),
    "failed_first": _error("failed", "response.failed as the first event", *_BUSY, after=0, bare=1),
    "error_flat": _error("error_flat", "flat error event", *_LIMIT),
    "error_nested": _error("error_nested", "error event with a nested object, no [DONE]", *_LOST, done=0),
    "response_error": _error("response_error", "response.error event", *_LIMIT),
    "error_untyped": _error("error_untyped", "an error frame without a type", *_LOST, done=0),
    "http_error": Scenario(_http_error, "an HTTP error by `name`; `retry_after` sets the header",
                           {"name": "429_upstream"}),
    "drip": Scenario(_stream, "`tokens` deltas at `rate` per second", {"rate": 50, "tokens": 500}),
    "burst": Scenario(_stream, "`tokens` deltas at full speed", {"rate": 0, "tokens": 10_000}),
    "stall": Scenario(_plain, "silence after `hang` writes, for `seconds` (default: for ever)", {"hang": 4}),
    "stall_headers": Scenario(_plain, "not even headers, for `wait` seconds", {"wait": FOREVER}),
    "abrupt": Scenario(_plain, "the connection is cut after `cut` writes (how=reset: by RST)",
                       {"cut": 4, "how": CUT}),
    "eof": Scenario(_plain, "a clean end after `cut` writes without a terminal event",
                    {"cut": 4, "how": "eof"}),
    "keepalive": Scenario(_plain, "`comments` comments, `gap` seconds apart, then text",
                          {"comments": 3, "gap": 0.05}),
    "bytewise": Scenario(_plain, "every byte in a write of its own", {"bytes": 1}),
    "golden": Scenario(_golden, "a recorded stream by `name`"),
    "replay": Scenario(_golden, "the bytes of `body` or `base64`, or of the file at `path`; queued only"),
    "task": Scenario(_task, "the JSON that Open WebUI's task prompts ask for"),
}  # fmt: skip

_CONDITIONS: Final[dict[str, Callable[[Turn], bool]]] = {
    "": lambda turn: True,
    "tools": lambda turn: bool(turn.tools) and turn.body.get("tool_choice") != "none",
    "search": lambda turn: turn.offers("web") or turn.offers("online"),
    "images": lambda turn: (
        turn.offers("image_generation") or "image" in turn.model["architecture"]["output_modalities"]
    ),
}
# word in the last user message → (scenario, condition, parameters); what breaks an answer has a hyphen,
# so that nobody says it by chance
WORDS: Final[dict[str, tuple[str, str, Params]]] = {
    "weather": ("tool", "tools", {}),
    "compare": ("tools", "tools", {}),
    "search": ("or_search", "search", {}),
    "news": ("or_search", "search", {}),
    "draw": ("image", "images", {}),
    "picture": ("image", "images", {}),
    "think": ("reasoning", "", {}),
    "ponder": ("reasoning_text", "", {}),
    "markdown": ("markdown", "", {"rate": 60}),
    "essay": ("markdown", "", {"rate": 60, "parts": 6}),
    "slowly": ("drip", "", {"rate": 10, "tokens": 120}),
    "cut-short": ("incomplete", "", {}),
    "refuse-me": ("refusal", "", {}),
    "overloaded": ("failed", "", {}),
    "ratelimit": ("http_error", "", {"name": "429_upstream", "times": 1}),
    "nocredit": ("http_error", "", {"name": "402_credits"}),
    "cut-off": ("abrupt", "", {}),
    "freeze-up": ("stall", "", {}),
    "say-nothing": ("empty", "", {}),
}
_WORD: Final = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)
_VALUE: Final = r"(?:\"[^\"]*\"|\{.*?\}(?=\s|\]\]|$)|[^\s\]]+)"
_CONTROL: Final = re.compile(rf"\[\[\s*([a-z_]+)((?:\s+[a-z_]+={_VALUE})*)\s*\]\]", re.DOTALL)
_PAIR: Final = re.compile(rf"([a-z_]+)=({_VALUE})", re.DOTALL)


def _value(text: str) -> Any:
    """Read the value of a control word: JSON if it is JSON (inf counts), else the text itself."""
    with contextlib.suppress(ValueError):
        return float(text) if text == "inf" else json.loads(text)
    return text


_QUEUED_ONLY: Final = frozenset({"dir", "path"})  # no chat message may name a file


def _choose(turn: Turn) -> tuple[str, Params]:
    """Pick the scenario of a request from its text: (name, parameters)."""
    if _task_kind(turn):
        return "task", {}
    if _SCRIPT.search(turn.text):
        script = _cut_script(turn.text)[1]
        if script is None:
            raise RefusalError(400, _gateway(400, "simulator: the script is no JSON object followed by ]]"))
        return "script", {key: value for key, value in script.items() if key not in _QUEUED_ONLY}
    if control := _CONTROL.search(turn.text):
        name, params = control[1], {key: _value(text) for key, text in _PAIR.findall(control[2])}
        params = {key: value for key, value in params.items() if key not in _QUEUED_ONLY}
        if name not in SCENARIOS:
            raise RefusalError(400, _gateway(400, f"simulator: no scenario named {name}"))
        if turn.outputs and SCENARIOS[name].plan is not _tool:
            return "tool_answer", {}
        wanted = params.get("rounds", 1) * params.get("n", 1)
        if turn.outputs and "then" in params and len(turn.outputs) >= wanted:
            return str(params["then"]), {}
        return name, params
    if turn.outputs:
        return "tool_answer", {}
    for word in _WORD.findall(turn.text):
        name, condition, params = WORDS[word.lower()]
        if _CONDITIONS[condition](turn):
            return name, dict(params)
    return "plain", {}


# ── 6. The wire of /responses ────────────────────────────────────────────────
# Plan → SSE chunks (each one write), or one response object. Events are derived from finished items.


def _split(text: str) -> list[str]:
    """Cut a text into deltas, a word and one following blank each; joined they are the text."""
    return re.findall(r"\S+\s?|\s", text)


def _price(model: Json, key: str) -> float:
    """USD per token; nothing where the catalog's price is unknown, negative or no number."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(model["pricing"][key]))
    return 0.0


def _counts(turn: Turn, plan: Plan) -> tuple[int, int, int, float, float]:
    """Input, output and reasoning tokens (about 4 characters each) and the two costs in USD."""
    texts = {"reasoning": 0, "": 0}
    for item in plan.items:
        kind = "reasoning" if item["type"] == "reasoning" else ""
        parts = [*item.get("summary", []), *(item.get("content") or [])]
        texts[kind] += sum(len(part.get("text") or part.get("refusal") or "") for part in parts)
        texts[kind] += len(item.get("arguments", "")) + (4000 if item.get("result") else 0)
    reasoning = plan.reasoning_tokens or math.ceil(texts["reasoning"] / 4)
    output = reasoning + math.ceil(texts[""] / 4)
    paid_in = turn.input_tokens * _price(turn.model, "prompt")
    return turn.input_tokens, output, reasoning, paid_in, output * _price(turn.model, "completion")


def _usage(turn: Turn, plan: Plan) -> Json:
    """The usage object with the names of /responses; cost in USD."""
    taken, given, reasoning, paid_in, paid_out = _counts(turn, plan)
    usage: Json = {
        "input_tokens": taken, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": given, "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": taken + given, "cost": paid_in + paid_out + 0.005 * plan.searches, "is_byok": False,
        "cost_details": {"upstream_inference_cost": None, "upstream_inference_input_cost": paid_in,
                         "upstream_inference_output_cost": paid_out},
    }  # fmt: skip
    if plan.server_tools:
        usage["server_tool_use_details"] = {
            "web_search_requests": plan.searches, "tool_calls_requested": plan.server_tools,
            "tool_calls_executed": plan.server_tools}  # fmt: skip
    return usage


def _response(turn: Turn, status: str = "in_progress", **changes: Any) -> Json:
    """A response object that echoes the request, with the given status."""
    body = turn.body
    return {
        "id": turn.id, "object": "response", "created_at": turn.now,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status, "model": turn.model["id"], "output": [], "error": None, "incomplete_details": None,
        "instructions": body.get("instructions"), "metadata": body.get("metadata"),
        "temperature": body.get("temperature"), "top_p": body.get("top_p"),
        "presence_penalty": body.get("presence_penalty"), "frequency_penalty": body.get("frequency_penalty"),
        "max_output_tokens": body.get("max_output_tokens"),
        "parallel_tool_calls": body.get("parallel_tool_calls", True) is not False,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [{"parameters": None, "strict": None} | tool if tool["type"] == "function" else tool
                  for tool in body.get("tools") or []],
        "store": False, "service_tier": "default" if status == "completed" else None,
    } | changes  # fmt: skip


def _final_response(turn: Turn, plan: Plan) -> Json:
    """The response object of the terminal event, and the whole answer of a request without stream."""
    usage = _usage(turn, plan)
    extra: Json = {}
    if plan.params.get("router_metadata"):
        extra["openrouter_metadata"] = _router_metadata(turn)
    if plan.ending == "incomplete":
        extra["incomplete_details"] = {"reason": plan.reason}
    return _response(turn, plan.ending, output=plan.items, usage=usage, **extra)


def _router_metadata(turn: Turn) -> Json:
    row = {"provider": "SimulatedProvider", "model": turn.model["id"]}
    return {
        "requested": turn.model_id, "strategy": "direct", "region": "local", "summary": "available=1",
        "attempt": 1, "is_byok": False, "endpoints": {"total": 1, "available": [{**row, "selected": True}]},
        "attempts": [{**row, "status": 200}],
    }  # fmt: skip


@lru_cache(maxsize=64)
def _delta_frames(head: bytes, tail: bytes, text: str, seq: int) -> tuple[bytes, ...]:
    """One frame per delta of `text`: head, delta, tail; the sequence number takes the place of `%d`."""
    return tuple(
        b"data: " + head + _dumps(piece) + tail.replace(b"%d", b"%d" % number) + b"\n\n"
        for number, piece in enumerate(_split(text), seq)
    )


class _ResponsesWire:
    """Derives the events of one streamed answer; `chunks` grows by one entry per timed write."""

    def __init__(self, turn: Turn, plan: Plan) -> None:
        self.turn, self.plan = turn, plan
        self.seq = 0
        self.chunks: list[bytes] = []
        self.pending: list[bytes] = []
        self.broken = plan.ending not in ("completed", "incomplete")

    def render(self) -> list[bytes]:
        """Return all chunks of the stream, [DONE] included."""
        params = self.plan.params
        if not params.get("only") and not params.get("bare"):
            started = _response(self.turn)
            self.event("response.created", response=started)
            self.event("response.in_progress", response=started)
            self.tick()
        if not params.get("only"):
            self.items()
        _ENDINGS[self.plan.ending](self)
        if params.get("done", 1):
            self.pending.append(DONE)
        self.tick()
        return self.chunks

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event frame."""
        self.frame({"type": kind, **fields, "sequence_number": self.seq})
        self.seq += 1

    def frame(self, value: Json) -> None:
        self.pending.append(b"data: " + _dumps(value) + b"\n\n")

    def tick(self) -> None:
        """End the current write."""
        if self.pending:
            self.chunks.append(b"".join(self.pending))
            self.pending.clear()

    def deltas(self, kind: str, where: Json, text: str, logprobs: bool = False) -> None:
        """Append the deltas of one text, a write each."""
        head = _dumps({"type": kind, **where})[:-1] + b',"delta":'
        tail = (b',"logprobs":[]' if logprobs else b"") + b',"sequence_number":%d}'
        frames = _delta_frames(head, tail, text, self.seq)
        self.seq += len(frames)
        if frames:
            self.pending.append(frames[0])
            self.tick()
            self.chunks.extend(frames[1:])

    def items(self) -> None:
        """Stream every item; parallel calls that interleave go last, together."""
        together: list[tuple[int, Json]] = []
        for index, item in enumerate(self.plan.items):
            if item["type"] == "function_call" and self.plan.style == "interleaved":
                together.append((index, item))
            else:
                _STREAMERS.get(item["type"], _ResponsesWire.server_tool)(self, index, item)
        self.interleaved(together)

    def added(self, index: int, item: Json, **changes: Any) -> None:
        started = item | {"status": "in_progress"} | changes
        self.event("response.output_item.added", output_index=index, item=started)

    def closed(self, index: int, item: Json) -> None:
        self.event("response.output_item.done", output_index=index, item=item)

    def message(self, index: int, item: Json) -> None:
        """Message item: parts of text (with annotations) or refusal."""
        self.added(index, item, content=[])
        for number, part in enumerate(item["content"]):
            where = {"output_index": index, "item_id": item["id"], "content_index": number}
            kind, key = ("refusal", "refusal") if part["type"] == "refusal" else ("output_text", "text")
            logprobs = {"logprobs": []} if key == "text" else {}
            empty = {"annotations": []} if key == "text" else {}
            self.event("response.content_part.added", **where, part={"type": part["type"], key: "", **empty})
            self.deltas(f"response.{kind}.delta", where, part[key], logprobs=key == "text")
            if self.broken:
                return
            for place, annotation in enumerate(part.get("annotations", [])):
                note = {"annotation_index": place, "annotation": annotation}
                self.event("response.output_text.annotation.added", **where, **note)
            self.event(f"response.{kind}.done", **where, **{key: part[key]}, **logprobs)
            self.event("response.content_part.done", **where, part=part)
        self.closed(index, item)

    def reasoning(self, index: int, item: Json) -> None:
        """Reasoning item: summary parts and raw text; seals and format come with item.done only."""
        self.added(index, {"type": "reasoning", "id": item["id"]}, summary=[])
        for number, part in enumerate(item["summary"]):
            where = {"output_index": index, "item_id": item["id"], "summary_index": number}
            self.event("response.reasoning_summary_part.added", **where, part=part | {"text": ""})
            self.deltas("response.reasoning_summary_text.delta", where, part["text"])
            self.event("response.reasoning_summary_text.done", **where, text=part["text"])
            self.event("response.reasoning_summary_part.done", **where, part=part)
        for number, part in enumerate(item.get("content", [])):
            where = {"output_index": index, "item_id": item["id"], "content_index": number}
            self.event("response.content_part.added", **where, part=part | {"text": ""})
            self.deltas("response.reasoning_text.delta", where, part["text"])
            self.event("response.reasoning_text.done", **where, text=part["text"])
            self.event("response.content_part.done", **where, part=part)
        self.closed(index, item)

    def call(self, index: int, item: Json) -> None:
        """Function call: argument deltas, or none at all in style "whole"."""
        self.added(index, item, arguments="")
        if self.plan.style != "whole":
            for piece in _fragments(item["arguments"]):
                self.call_delta(index, item, piece)
            self.call_done(index, item)
        self.closed(index, item)

    def call_delta(self, index: int, item: Json, piece: str) -> None:
        where = {"output_index": index, "item_id": item["id"]}
        self.event("response.function_call_arguments.delta", **where, delta=piece)
        self.tick()

    def call_done(self, index: int, item: Json) -> None:
        self.event("response.function_call_arguments.done", output_index=index, item_id=item["id"],
                   name=item["name"], arguments=item["arguments"])  # fmt: skip

    def interleaved(self, calls: list[tuple[int, Json]]) -> None:
        """Parallel calls: all added, deltas in turns, done in reverse order."""
        for index, item in calls:
            self.added(index, item, arguments="")
        for pieces in itertools.zip_longest(*(_fragments(item["arguments"]) for _, item in calls)):
            for (index, item), piece in zip(calls, pieces, strict=True):
                if piece is not None:
                    self.call_delta(index, item, piece)
        for index, item in reversed(calls):
            self.call_done(index, item)
            self.closed(index, item)

    def progress(self, index: int, item: Json, *steps: str) -> None:
        for step in steps:
            self.event(f"response.{item['type']}.{step}", output_index=index, item_id=item["id"])
            self.tick()

    def native_search(self, index: int, item: Json) -> None:
        started = {"type": item["type"], "id": item["id"], "status": "in_progress"}
        self.event("response.output_item.added", output_index=index, item=started)
        self.progress(index, item, "in_progress", "searching", "completed")
        self.closed(index, item)

    def native_image(self, index: int, item: Json) -> None:
        self.added(index, item, result=None)
        self.progress(index, item, "in_progress", "generating")
        self.event("response.image_generation_call.partial_image", output_index=index, item_id=item["id"],
                   partial_image_index=0, partial_image_b64=_png(8))  # fmt: skip
        self.progress(index, item, "completed")
        self.closed(index, item)

    def server_tool(self, index: int, item: Json) -> None:
        """openrouter:* items have no progress events of their own."""
        hidden = ("action", "result")
        started = {key: value for key, value in item.items() if key not in hidden}
        self.added(index, started, **({"datetime": ""} if "datetime" in item else {}))
        self.tick()
        self.closed(index, item)

    def terminal(self) -> None:
        final = _final_response(self.turn, self.plan)
        self.event(f"response.{final['status']}", response=final)

    def failed(self) -> None:
        code, kind, message = self.plan.error
        error = {"code": code, "message": message}
        self.event("response.failed", response=_response(self.turn, "failed", error=error, error_type=kind))

    def error_flat(self) -> None:
        self.event("error", code=self.plan.error[0], message=self.plan.error[2], param=None)

    def error_nested(self) -> None:
        self.frame({"type": "error", "error": {"code": self.plan.error[0], "message": self.plan.error[2]}})

    def response_error(self) -> None:
        self.event("response.error", error={"code": self.plan.error[0], "message": self.plan.error[2]})

    def error_untyped(self) -> None:
        error = {"code": 502, "message": self.plan.error[2], "metadata": {"error_type": self.plan.error[1]}}
        self.frame({"error": error})


def _fragments(arguments: str) -> list[str]:
    """Cut JSON arguments into deltas of a few characters."""
    return [arguments[start : start + 7] for start in range(0, len(arguments), 7)]


_STREAMERS: Final[dict[str, Callable[[_ResponsesWire, int, Json], None]]] = {
    "message": _ResponsesWire.message,
    "reasoning": _ResponsesWire.reasoning,
    "function_call": _ResponsesWire.call,
    "web_search_call": _ResponsesWire.native_search,
    "image_generation_call": _ResponsesWire.native_image,
}
_ENDINGS: Final[dict[str, Callable[[_ResponsesWire], None]]] = {
    "completed": _ResponsesWire.terminal,
    "incomplete": _ResponsesWire.terminal,
    "failed": _ResponsesWire.failed,
    "error_flat": _ResponsesWire.error_flat,
    "error_nested": _ResponsesWire.error_nested,
    "response_error": _ResponsesWire.response_error,
    "error_untyped": _ResponsesWire.error_untyped,
}


# ── 7. The wire of /chat/completions ─────────────────────────────────────────
# The same plans in the older dialect.

_CHAT_CODES: Final = {"rate_limit_exceeded": 429, "provider_overloaded": 503}


def _chat_usage(turn: Turn, plan: Plan) -> Json:
    """The usage object with the names of /chat/completions; cost in USD."""
    taken, given, reasoning, paid_in, paid_out = _counts(turn, plan)
    return {
        "prompt_tokens": taken, "completion_tokens": given, "total_tokens": taken + given,
        "cost": paid_in + paid_out + 0.005 * plan.searches, "is_byok": False,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "cost_details": {"upstream_inference_cost": None, "upstream_inference_prompt_cost": paid_in,
                         "upstream_inference_completions_cost": paid_out},
    }  # fmt: skip


def _chat_error(plan: Plan) -> Json:
    _, kind, message = plan.error
    return {"code": _CHAT_CODES.get(kind, 502), "message": message, "metadata": {"error_type": kind}}


def _finish_reason(plan: Plan) -> str:
    if plan.ending == "incomplete":
        return "length" if plan.reason == "max_output_tokens" else "content_filter"
    return "tool_calls" if any(item["type"] == "function_call" for item in plan.items) else "stop"


def _chat_citations(part: Json) -> list[Json]:
    """Annotations in the nested form of /chat/completions."""
    return [
        {"type": "url_citation", "url_citation": {key: value for key, value in flat.items() if key != "type"}}
        for flat in part.get("annotations", [])
    ]


def _chat_image(item: Json) -> Json:
    url = item["result"]
    url = url if url.startswith("data:") else f"data:image/png;base64,{url}"
    return {"type": "image_url", "image_url": {"url": url}}


def _chat_reasoning(item: Json, piece: str | None, index: int = 0) -> Json:
    """One reasoning_details entry: text, summary, or (piece None) what comes at the end of the item."""
    base = {"id": item["id"], "format": item["format"], "index": index}
    if item.get("content"):
        signature = None if piece is not None else item.get("signature")
        return {"type": "reasoning.text", "text": piece, "signature": signature, **base}
    if piece is not None:
        return {"type": "reasoning.summary", "summary": piece, **base}
    return {"type": "reasoning.encrypted", "data": item.get("encrypted_content") or "", **base}


class _ChatWire:
    """Derives the chunks of one streamed chat completion; `chunks` grows by one entry per timed write."""

    def __init__(self, turn: Turn, plan: Plan) -> None:
        self.turn, self.plan = turn, plan
        self.chunks: list[bytes] = []
        shared = any(item.get("id") == "msg_tmp_stream" for item in plan.items)
        self.base = {
            "id": "gen-stream" if shared else turn.id, "object": "chat.completion.chunk",
            "created": 0 if shared else turn.now, "model": turn.model["id"], "provider": "SimulatedProvider",
        }  # fmt: skip
        self.broken = plan.ending not in ("completed", "incomplete")

    def render(self) -> list[bytes]:
        """Return all chunks of the stream, [DONE] included."""
        if self.broken and not self.plan.items:
            self.frame(choices=[], error=_chat_error(self.plan))
            self.chunks.append(DONE)
            return self.chunks
        self.delta({"role": "assistant", "content": ""})
        calls = [item for item in self.plan.items if item["type"] == "function_call"]
        for item in self.plan.items:
            if stream := _CHAT_STREAMERS.get(item["type"]):
                stream(self, item)
        self.calls(calls)
        if self.broken:
            self.delta({"content": ""}, finish="error", error=_chat_error(self.plan))
            return self.chunks
        self.delta({"content": ""}, finish=_finish_reason(self.plan))
        self.frame(choices=[], usage=_chat_usage(self.turn, self.plan))
        self.chunks.append(DONE)
        return self.chunks

    def frame(self, **fields: Any) -> None:
        self.chunks.append(b"data: " + _dumps({**self.base, **fields}) + b"\n\n")

    def delta(self, delta: Json, finish: str | None = None, **fields: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "native_finish_reason": finish}
        self.frame(choices=[choice], **fields)

    def message(self, item: Json) -> None:
        """Text deltas from a template, then annotations."""
        for part in item["content"]:
            if part["type"] == "refusal":
                for piece in _split(part["refusal"]):
                    self.delta({"content": "", "refusal": piece})
                continue
            head = _dumps(self.base)[:-1] + b',"choices":[{"index":0,"delta":{"content":'
            tail = b'},"finish_reason":null,"native_finish_reason":null}]}'
            self.chunks.extend(_delta_frames(head, tail, part["text"], 0))
            if citations := _chat_citations(part):
                self.delta({"content": "", "annotations": citations})

    def reasoning(self, item: Json) -> None:
        """reasoning and reasoning_details fragments; signature or encrypted data comes alone, last."""
        parts = [*item["summary"], *item.get("content", [])]
        for index, part in enumerate(parts):
            for piece in _split(part["text"]):
                details = [_chat_reasoning(item, piece, index)]
                self.delta({"content": "", "reasoning": piece, "reasoning_details": details})
        if item.get("signature") or item.get("encrypted_content"):
            last = 0 if item.get("content") else len(parts)
            self.delta({"content": "", "reasoning_details": [_chat_reasoning(item, None, last)]})

    def image(self, item: Json) -> None:
        self.delta({"content": "", "images": [_chat_image(item)]})

    def calls(self, calls: list[Json]) -> None:
        """Tool calls by index, ids and names in the first fragment only, arguments in turns."""
        for index, item in enumerate(calls):
            function = {"name": item["name"], "arguments": ""}
            call = {"index": index, "id": item["call_id"], "type": "function", "function": function}
            self.delta({"tool_calls": [call]})
        for pieces in itertools.zip_longest(*(_fragments(item["arguments"]) for item in calls)):
            for index, piece in enumerate(pieces):
                if piece is not None:
                    self.delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})


_CHAT_STREAMERS: Final[dict[str, Callable[[_ChatWire, Json], None]]] = {
    "message": _ChatWire.message,
    "reasoning": _ChatWire.reasoning,
    "image_generation_call": _ChatWire.image,
    "openrouter:image_generation": _ChatWire.image,
}


def _chat_completion(turn: Turn, plan: Plan) -> Json:
    """The whole answer of a chat request without stream."""
    message: Json = {"role": "assistant", "content": "", "refusal": None}
    for item in plan.items:
        if item["type"] == "message":
            message["content"] += "".join(part.get("text", "") for part in item["content"])
            citations = [citation for part in item["content"] for citation in _chat_citations(part)]
            message |= {"annotations": citations} if citations else {}
        elif item["type"] == "reasoning":
            parts = [*item["summary"], *item.get("content", [])]
            message["reasoning"] = "".join(part["text"] for part in parts)
            details = [_chat_reasoning(item, part["text"], index) for index, part in enumerate(parts)]
            message["reasoning_details"] = [*details, _chat_reasoning(item, None, len(parts))]
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif item.get("result"):
            message.setdefault("images", []).append(_chat_image(item))
    finish = _finish_reason(plan)
    choice = {"index": 0, "message": message, "finish_reason": finish, "native_finish_reason": finish}
    return {
        "id": turn.id, "object": "chat.completion", "created": turn.now, "model": turn.model["id"],
        "provider": "SimulatedProvider", "choices": [choice], "usage": _chat_usage(turn, plan),
    }  # fmt: skip


# ── 8. Delivery ──────────────────────────────────────────────────────────────
# Scripts and the code that plays them. One timer per dripping stream, no task switch per delta.

Script = list[bytes | float | str]


def _script(chunks: list[bytes], params: Params) -> Script:
    """Turn chunks into a script: comments, time to first token, silence and cuts where `params` put them."""
    script: Script = list(chunks)
    if "cut" in params:
        how = str(params.get("how", CUT))
        script = [*script[: int(params["cut"])], *([how] if how in (CUT, RESET) else [])]
    if "hang" in params:
        script.insert(int(params["hang"]), float(params.get("seconds", FOREVER)))
    if params.get("ttft"):
        script.insert(1, float(params["ttft"]))
    if count := int(params.get("comments", 0)):
        gap = float(params.get("gap", 0))
        script[:0] = [COMMENT, gap] * count
        script.insert(2 * count + 2, COMMENT)
    return script


def _blocks(chunks: Sequence[bytes]) -> Iterator[bytes]:
    """Join small chunks into writes of about BLOCK bytes."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= BLOCK:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


class _Drip:
    """Writes one chunk per tick of 1/rate seconds straight to the transport, in HTTP chunked encoding."""

    def __init__(self, transport: asyncio.WriteTransport, chunks: Sequence[bytes], rate: float) -> None:
        self.transport, self.chunks, self.rate = transport, chunks, rate
        self.loop = asyncio.get_running_loop()
        self.start = self.loop.time()
        self.index = 0
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.handle: asyncio.TimerHandle | None = None

    async def play(self) -> None:
        """Return when all chunks are written; a vanished client cancels it."""
        self.tick()
        try:
            await self.done
        finally:
            if self.handle:
                self.handle.cancel()

    def tick(self) -> None:
        """Write what is due (more than one chunk if the loop was late) and set the next timer."""
        due = int((self.loop.time() - self.start) * self.rate + 1e-6) + 1
        if self.transport.get_write_buffer_size() < 4 * BLOCK and not self.transport.is_closing():
            data = b"".join(self.chunks[self.index : due])
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.index = due
        if self.index >= len(self.chunks):
            self.done.set_result(None)
        else:
            self.handle = self.loop.call_at(self.start + max(due, self.index) / self.rate, self.tick)


async def _pause(seconds: float) -> None:
    """Wait; for ever if `seconds` is infinite (the client's disconnect cancels it)."""
    if math.isinf(seconds):
        await asyncio.get_running_loop().create_future()
    await asyncio.sleep(seconds)


def _set_option(transport: asyncio.BaseTransport, level: int, option: int, value: int | bytes) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(level, option, value)


async def _play(request: web.Request, response: web.StreamResponse, script: Script, params: Params) -> bool:
    """Play a script on an answer whose headers are out; return False if the script cut the connection."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    for kind, steps in itertools.groupby(script, key=type):
        run = list(steps)
        if kind is float:
            for seconds in run:
                await _pause(float(seconds))
        elif kind is str:
            if run[0] == RESET:
                _set_option(transport, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.close()
            return False
        else:
            chunks = [chunk for chunk in run if isinstance(chunk, bytes)]
            await _write(response, transport, chunks, params)
    await response.write_eof()
    return True


async def _write(
    response: web.StreamResponse, transport: asyncio.WriteTransport, chunks: list[bytes], params: Params
) -> None:
    """Write chunks: byte by byte, at a rate, or in blocks as fast as the client takes them."""
    rate = float(params.get("rate", 0))
    if params.get("bytes"):
        for byte in b"".join(chunks):
            await response.write(bytes((byte,)))
            await asyncio.sleep(0)
    elif rate > 0:
        await _Drip(transport, chunks, rate).play()
    else:
        for block in _blocks(chunks):
            await response.write(block)


# ── 9. Server ────────────────────────────────────────────────────────────────
# Routes, the record of requests, the queue of scenarios, and the control endpoints.

_KEPT_HEADERS: Final = frozenset({
    "authorization", "content-type", "accept", "user-agent", "http-referer", "x-title", "x-openrouter-title",
    "x-openrouter-categories", "x-openrouter-metadata", "x-session-id", "x-anthropic-beta",
    "x-openrouter-cache", "x-openrouter-cache-ttl", "x-openrouter-cache-clear", "accept-encoding",
    "content-encoding", "if-none-match", "cache-control"})  # fmt: skip
_KEPT_PREFIX: Final = "x-openwebui-"  # who asks, where a server forwards that
OPEN, COMPLETED, GONE = "open", "completed", "client_disconnected"
STOPPED, FAILED = "server_stopped", "failed"


@dataclass
class RecordedRequest:
    """One request as it arrived and how it ended.

    `ended` is "open", "completed", "client_disconnected", "cut" (by a scenario) or "server_stopped";
    `seconds` is the time from arrival to that end. `unknown` names the top-level keys that /responses does
    not have. `key` is a short hash of the bearer key; `connection` counts TCP connections from 1.
    """

    number: int
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    key: str
    connection: int
    at: float
    body: Any = None
    length: int = 0
    scenario: str = ""
    status: int = 0
    ended: str = OPEN
    seconds: float | None = None
    streaming: bool = False
    unknown: list[str] = field(default_factory=list)


class Settings(TypedDict, total=False):
    """What the catalog and account endpoints say. None stands for what they say by themselves.

    `catalog`: the entries of GET /models; any JSON, so that junk can be served too (None: CATALOG).
    `zdr_models`: the ids with zero data retention (None: the rule of `_keeps_nothing`); one that the catalog
    does not have gets endpoints all the same. `user_models`: the ids in GET /models/user (None: all).
    `key_info`, `credits`: replace single values of GET /key and GET /credits. `credits_need_management_key`:
    GET /credits is 403 unless `key_info` has is_management_key. `etag`: the validator of GET /models and
    /models/user, "weak", "strong" or "off".
    """

    catalog: Sequence[Any] | None
    zdr_models: Sequence[str] | None
    user_models: Sequence[str] | None
    key_info: Json
    credits: Json
    credits_need_management_key: bool
    etag: str


_SETTINGS: Final[Spec] = {
    "catalog": "array?", "zdr_models": "array?", "user_models": "array?", "key_info": "object",
    "credits": "object", "credits_need_management_key": "boolean", "etag": "string",
}  # fmt: skip
_USUAL: Final[Settings] = {
    "catalog": None, "zdr_models": None, "user_models": None, "key_info": {}, "credits": {},
    "credits_need_management_key": False, "etag": "weak",
}  # fmt: skip
_ETAGS: Final = {"weak": 'W/"{}"', "strong": '"{}"', "off": ""}
_CACHE_CONTROL: Final = "private, no-cache"
_ZDR_AUTHORS: Final = frozenset({"anthropic", "google", "meta-llama", "mistralai"})
_SPANS: Final = ("", "_daily", "_weekly", "_monthly")
_KEY_INFO: Final[Json] = {
    "label": "sk-or-v1-sim...000", "limit": 25, "limit_reset": "monthly", "limit_remaining": 25,
    "include_byok_in_limit": False,
    **{f"{kind}usage{span}": 0 for kind in ("", "byok_") for span in _SPANS},
    "is_free_tier": False, "is_management_key": False, "is_provisioning_key": False,
    "creator_user_id": None, "expires_at": None,
}  # fmt: skip
_CREDITS: Final[Json] = {"total_credits": 100.5, "total_usage": 25.75}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError that names every unknown or unusable setting of the server."""
    checker = _Checker()
    checker.fields((), settings, _SETTINGS)
    for name in settings.keys() - _SETTINGS.keys():
        checker.issue((name,), "Unknown setting")
    for name in ("zdr_models", "user_models"):
        if not all(isinstance(slug, str) for slug in _list(settings, name)):
            checker.issue((name,), "Expected model ids")
    if settings["etag"] not in _ETAGS:
        checker.issue(("etag",), f"Expected one of {', '.join(_ETAGS)}")
    if checker.issues:
        raise ValueError("; ".join(f"{issue['path'][0]}: {issue['message']}" for issue in checker.issues))


@dataclass
class _Queued:
    """A queued scenario: for the next `times` requests whose path ends with `on`."""

    name: str
    times: float
    params: Params
    on: str
    tasks: bool


_NUMBERS: Final = frozenset({
    "rate", "wait", "ttft", "hang", "seconds", "cut", "comments", "gap", "times", "tokens"})  # fmt: skip


class Simulator:
    """A loopback server that speaks OpenRouter's API; use it as `async with Simulator() as sim`.

    `port` 0 takes a free one. `key`: the only accepted key; None accepts any non-empty key that does not
    begin with "sk-bad". `rate`: deltas per second of scenarios that name none (0 = full speed). `golden`:
    folder of recorded streams. `keep_keys`: keep the Authorization header in the record as it came.
    `settings`: see Settings; `configure` changes them, `reset` brings these back. Raises ValueError for an
    unusable one.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        key: str | None = None,
        rate: float = 0,
        golden: str | Path | None = None,
        keep_keys: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        self.host, self.port, self.key, self.rate, self.keep_keys = host, port, key, rate, keep_keys
        self._settings: Json = {}
        self.catalog: dict[str, Any] = {}  # the entries of settings["catalog"] by id
        self.configure(**{**_USUAL, **settings})
        self._initial = dict(self._settings)
        self.golden = Path(golden) if golden else GOLDEN_DIR
        self.requests: list[RecordedRequest] = []
        self._queue: list[_Queued] = []
        self._spent: Counter[tuple[str, str]] = Counter()
        self._records: dict[int, RecordedRequest] = {}  # by id() of the request being answered
        self._connections: weakref.WeakKeyDictionary[asyncio.BaseTransport, int] = weakref.WeakKeyDictionary()
        self._connection_count, self._numbers = itertools.count(1), itertools.count(1)
        self._changed = asyncio.Event()
        self._closing = False
        self._runner: web.AppRunner | None = None

    @property
    def root_url(self) -> str:
        """The server's root, for the control endpoints: "http://127.0.0.1:PORT"."""
        return f"http://{self.host}:{self.port}"

    @property
    def base_url(self) -> str:
        """What a client takes for https://openrouter.ai/api/v1."""
        return f"{self.root_url}/api/v1"

    async def start(self) -> None:
        """Listen; raises OSError if the port is taken."""
        app = web.Application(middlewares=[self._middleware], client_max_size=MAX_BODY)
        app.add_routes(self._routes())
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, keepalive_timeout=75, shutdown_timeout=0.05
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port, backlog=2048).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._closing, self._runner = False, runner
        self.port = runner.addresses[0][1]

    async def aclose(self) -> None:
        """Stop listening and end every open stream; harmless when not started."""
        self._closing = True
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def __aenter__(self) -> Simulator:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def next(self, scenario: str, times: float = 1, **params: Any) -> None:
        """Queue a scenario for the next `times` requests (math.inf: until reset); raises KeyError if unknown.

        `on` (default: both inference endpoints) restricts it to paths with that ending and reaches the other
        endpoints too (`on="/models"`; only http_error and stall_headers make sense there). Open WebUI's task
        prompts do not use the queue up unless `tasks=True`.
        """
        if scenario not in SCENARIOS:
            raise KeyError(scenario)
        on, tasks = str(params.pop("on", "")), bool(params.pop("tasks", False))
        self._queue.append(_Queued(scenario, times, params, on, tasks))

    def configure(self, **changes: Unpack[Settings]) -> None:
        """Change some settings from the next request on; raises ValueError, and then nothing has changed.

        A new `catalog` replaces the old one whole. `self.catalog` may also be changed row by row.
        """
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
        settings = {**_USUAL, **self._settings, **given}
        _check_settings(settings)
        self._settings = settings
        if "catalog" in given:
            self.catalog = _keyed(CATALOG if settings["catalog"] is None else settings["catalog"])

    def reset(self) -> None:
        """Forget the queue, the counted `times`, and all records but those of open requests.

        The settings, the catalog among them, become those of the start again.
        """
        self.configure(**self._initial)
        self._queue.clear()
        self._spent.clear()
        self.requests[:] = [record for record in self.requests if record.ended == OPEN]
        self._notify()

    @property
    def open(self) -> int:
        """The number of requests that are being answered now."""
        return sum(record.ended == OPEN for record in self.requests)

    def statuses(self, on: str) -> list[int]:
        """The HTTP statuses of the answers so far, oldest first, where the path ends with `on`."""
        return [record.status for record in self.requests if record.status and record.path.endswith(on)]

    async def wait_until(self, condition: Callable[[Simulator], bool], timeout: float = 5.0) -> None:
        """Wait until `condition(self)` holds; raises TimeoutError.

        It is looked at when a request arrives, gets its scenario, begins to stream, and ends.
        """
        async with asyncio.timeout(timeout):
            while not condition(self):
                await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _routes(self) -> list[web.RouteDef]:
        base = "/api/v1"
        return [
            web.get(f"{base}/models", self._models),
            web.get(f"{base}/models/user", self._models_user),
            web.get(f"{base}/models/count", self._models_count),
            web.get(f"{base}/models/{{author}}/{{slug}}/endpoints", self._endpoints),
            web.get(f"{base}/endpoints/zdr", self._endpoints_zdr),
            web.get(f"{base}/key", self._key),
            web.get(f"{base}/credits", self._credits),
            web.post(f"{base}/responses", self._responses),
            web.post(f"{base}/chat/completions", self._chat),
            web.get("/_control/requests", self._control_requests),
            web.get("/_control/open", self._control_open),
            web.post("/_control/next", self._control_next),
            web.post("/_control/settings", self._control_settings),
            web.post("/_control/reset", self._control_reset),
        ]

    # The record

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Record every request that is not a control call, and how it ends."""
        if request.path.startswith("/_control/"):
            return await handler(request)
        record = self._record(request)
        began = time.monotonic()
        try:
            response = await self._guarded(request, handler, record)
            record.status = response.status
            record.ended = COMPLETED if record.ended == OPEN else record.ended
            return response
        except web.HTTPException as error:
            record.status, record.ended = error.status, COMPLETED
            raise
        except ConnectionError:
            record.ended = GONE
            raise
        except asyncio.CancelledError:
            if record.ended == OPEN:
                record.ended = STOPPED if self._closing else GONE
            raise
        finally:
            record.ended = FAILED if record.ended == OPEN else record.ended
            record.seconds = time.monotonic() - began
            del self._records[id(request)]
            self._notify()

    async def _guarded(
        self, request: web.Request, handler: Any, record: RecordedRequest
    ) -> web.StreamResponse:
        """Run a handler; a RefusalError becomes its HTTP error, a queued scenario overrides a GET."""
        try:
            if request.method == "GET" and (queued := self._take(request.path, task=False)):
                record.scenario = queued.name
                params: Params = SCENARIOS[queued.name].defaults | queued.params
                await _pause(float(params.get("wait", 0)))
                if queued.name == "http_error":
                    raise RefusalError.named(str(params["name"]), params.get("retry_after"))
            return await handler(request)
        except RefusalError as refusal:
            if isinstance(refusal.body, str):
                return web.Response(status=refusal.status, text=refusal.body, content_type="text/html")
            return _json(refusal.body, status=refusal.status, headers=refusal.headers)

    def _record(self, request: web.Request) -> RecordedRequest:
        transport = request.transport
        number = self._connections.get(transport, 0) if transport else 0
        if transport is not None and not number:
            number = self._connections[transport] = next(self._connection_count)
        lowered = {k.lower(): v for k, v in request.headers.items()}
        headers = {k: v for k, v in lowered.items() if k in _KEPT_HEADERS or k.startswith(_KEPT_PREFIX)}
        key = _bearer(request)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8] if key else ""
        if key and not self.keep_keys:
            headers["authorization"] = f"Bearer #{digest}"
        record = RecordedRequest(
            next(self._numbers), request.method, request.path, dict(request.query), headers, digest,
            number, time.time())  # fmt: skip
        if len(self.requests) >= MAX_RECORDS:
            del self.requests[: MAX_RECORDS // 10]
        self.requests.append(record)
        self._records[id(request)] = record
        self._notify()
        return record

    def _take(self, path: str, task: bool) -> _Queued | None:
        """Take the first queued scenario that is meant for this path."""
        inference = path.endswith(("/responses", "/chat/completions"))
        for queued in self._queue:
            meant = path.endswith(queued.on) if queued.on else inference
            if meant and (queued.tasks or not task):
                queued.times -= 1
                if queued.times < 1:
                    self._queue.remove(queued)
                return queued
        return None

    def _authorize(self, request: web.Request) -> None:
        """Raise RefusalError 401 without a usable bearer key."""
        key = _bearer(request)
        if not key:
            raise RefusalError.named("401_no_key")
        if key.startswith("sk-bad") or (self.key is not None and key != self.key):
            raise RefusalError.named("401_bad_key")

    # Catalog and account

    async def _models(self, request: web.Request) -> web.Response:
        return self._listed(request, list(self.catalog.values()))

    async def _models_user(self, request: web.Request) -> web.Response:
        self._authorize(request)
        chosen = self._settings["user_models"]
        return self._listed(
            request, [row for slug, row in self.catalog.items() if chosen is None or slug in chosen]
        )

    async def _models_count(self, request: web.Request) -> web.Response:
        rows = _filtered(list(self.catalog.values()), request.query, self._zdr_models())
        return _json({"data": {"count": len(rows)}})

    def _listed(self, request: web.Request, rows: list[Any]) -> web.Response:
        """Answer with the page of rows that the query asks for, or with 304 if the client has it."""
        rows = _filtered(rows, request.query, self._zdr_models())
        offset, limit = int(request.query.get("offset", 0)), int(request.query.get("limit", len(rows) or 1))
        body = _dumps({
            "data": rows[offset : offset + limit], "total_count": len(rows), "links": {"next": None},
        })  # fmt: skip
        mark = hashlib.sha256(body).hexdigest()[:32]
        headers = {"Cache-Control": _CACHE_CONTROL}
        if pattern := _ETAGS[self._settings["etag"]]:
            headers["ETag"] = pattern.format(mark)
            if {mark, "*"} & {tag.value for tag in request.if_none_match or ()}:
                return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers, content_type="application/json")

    def _zdr_models(self) -> list[str]:
        """The ids with zero data retention: as set, else by the rule."""
        chosen = self._settings["zdr_models"]
        return [slug for slug in self.catalog if _keeps_nothing(slug)] if chosen is None else list(chosen)

    async def _endpoints(self, request: web.Request) -> web.Response:
        """Two providers for any model of the catalog."""
        slug = f"{request.match_info['author']}/{request.match_info['slug']}"
        row = _lookup(self.catalog, slug)
        if row is None:
            raise RefusalError(404, _gateway(404, f"No model named {slug}"))
        kept = ("id", "name", "created", "description", "architecture")
        return _json({"data": {key: row[key] for key in kept} | {"endpoints": _public_endpoints(row)}})

    async def _endpoints_zdr(self, request: web.Request) -> web.Response:
        """Two endpoints for every model with zero data retention."""
        rows = [(_lookup(self.catalog, slug) or _readable({"id": slug}), slug) for slug in self._zdr_models()]
        return _json(
            {"data": [line | {"model_id": slug} for row, slug in rows for line in _public_endpoints(row)]}
        )

    async def _key(self, request: web.Request) -> web.Response:
        self._authorize(request)
        return _json({"data": _KEY_INFO | self._settings["key_info"]})

    async def _credits(self, request: web.Request) -> web.Response:
        self._authorize(request)
        manages = self._settings["key_info"].get("is_management_key")
        if self._settings["credits_need_management_key"] and not manages:
            raise RefusalError(403, _gateway(403, "Only management keys can perform this operation"))
        return _json({"data": _CREDITS | self._settings["credits"]})

    # Inference

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        return await self._inference(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._inference(request, chat=True)

    async def _inference(self, request: web.Request, chat: bool) -> web.StreamResponse:
        """Check, choose a scenario, plan, deliver."""
        record = self._records[id(request)]
        raw = await request.read()
        record.length = len(raw)
        self._authorize(request)
        try:
            body = orjson.loads(raw) if orjson is not None else json.loads(raw)
        except ValueError:
            raise RefusalError(400, _gateway(400, "Request body is not valid JSON", True)) from None
        record.body = body
        if not isinstance(body, dict):
            raise RefusalError(400, _gateway(400, "Request body must be an object", True))
        record.unknown = [] if chat else sorted(body.keys() - _FIELDS.keys())
        turn = self._turn(chat, body)
        plan = self._plan(turn, request, record)
        await _pause(float(plan.params.get("wait", 0)))
        if not body.get("stream"):
            return await self._whole(request, turn, plan)
        return await self._stream(request, turn, plan, record)

    def _turn(self, chat: bool, body: Json) -> Turn:
        """Check a body and read it into a Turn; raises RefusalError."""
        try:
            return self._checked_turn(chat, body)
        except (KeyError, TypeError, AttributeError) as error:  # what no table describes and no code can read
            raise RefusalError(400, _gateway(400, f"Invalid request body: {error!r}", True)) from error

    def _checked_turn(self, chat: bool, body: Json) -> Turn:
        (_check_chat if chat else _check_responses)(body)
        asked = [body["model"]] if body.get("model") else []
        wanted = asked + (body.get("models") or []) or [next(iter(self.catalog), "")]
        found = [(name, model) for name in wanted if (model := _lookup(self.catalog, name))]
        if not found:
            raise RefusalError(400, _model_not_found(str(wanted[0])))
        turn = _read_turn(chat, body, *found[0])
        _check_model(body, turn.model, turn.kinds)
        _check_seals(turn)
        return turn

    def _plan(self, turn: Turn, request: web.Request, record: RecordedRequest) -> Plan:
        """Pick the scenario (queue first, then the text) and let it plan; raises RefusalError."""
        if queued := self._take(request.path, task=bool(_task_kind(turn))):
            name, given = queued.name, queued.params
        else:
            name, given = _choose(turn)
            given = dict(given)
            if "times" in given:
                spent = (name, turn.text)
                self._spent[spent] += 1
                if self._spent[spent] > given.pop("times"):
                    name, given = "plain", {}
        scenario = SCENARIOS.get(name)
        if scenario is None:
            raise RefusalError(400, _gateway(400, f"simulator: no scenario named {name}"))
        record.scenario = name
        self._notify()
        params = {"rate": self.rate, "dir": self.golden, **scenario.defaults, **given}
        if request.headers.get("X-OpenRouter-Metadata") == "enabled":
            params["router_metadata"] = True
        try:
            params |= {key: float(params[key]) for key in _NUMBERS & params.keys()}
            plan = scenario.plan(turn, params)
        except (TypeError, ValueError, AttributeError) as error:
            raise RefusalError(400, _gateway(400, f"simulator: unusable parameters: {error}")) from error
        plan.params = params
        return plan

    async def _whole(self, request: web.Request, turn: Turn, plan: Plan) -> web.Response:
        """An answer without stream; what would fail in the stream is an error body under status 200."""
        if "hang" in plan.params:
            await _pause(float(plan.params.get("seconds", FOREVER)))
        if "cut" in plan.params and request.transport is not None:
            request.transport.close()
        headers = {"X-Generation-Id": turn.id}
        if plan.raw is not None or plan.ending not in ("completed", "incomplete"):
            return _json({"error": _chat_error(plan)}, headers=headers)
        return _json((_chat_completion if turn.chat else _final_response)(turn, plan), headers=headers)

    async def _stream(
        self, request: web.Request, turn: Turn, plan: Plan, record: RecordedRequest
    ) -> web.StreamResponse:
        """Send the event stream."""
        if plan.raw is not None:
            chunks = re.findall(rb".+?(?:\r?\n\r?\n|\Z)", plan.raw, flags=re.DOTALL)
        else:
            chunks = (_ChatWire if turn.chat else _ResponsesWire)(turn, plan).render()
        headers = {"Cache-Control": "no-cache", "X-Generation-Id": turn.id}
        response = web.StreamResponse(headers=headers | {"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        if request.transport is not None:
            _set_option(request.transport, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await response.prepare(request)
        record.status, record.streaming = response.status, True
        self._notify()
        if not await _play(request, response, _script(chunks, plan.params), plan.params):
            record.ended = CUT
        return response

    # Control

    async def _control_requests(self, request: web.Request) -> web.Response:
        return _json({"requests": [asdict(record) for record in self.requests]})

    async def _control_open(self, request: web.Request) -> web.Response:
        return _json({"open": self.open})

    async def _control_next(self, request: web.Request) -> web.Response:
        """Queue a scenario: {"scenario", "params"?, "times"?}."""
        order = await request.json()
        try:
            self.next(str(order["scenario"]), float(order.get("times", 1)), **order.get("params", {}))
        except (KeyError, TypeError, ValueError) as error:
            return _json({"error": f"unusable order: {error!r}", "scenarios": sorted(SCENARIOS)}, status=400)
        return _json({"queued": len(self._queue)})

    async def _control_settings(self, request: web.Request) -> web.Response:
        """Change settings: an object with some of the names of Settings."""
        try:
            self.configure(**await request.json())
        except (TypeError, ValueError) as error:
            return _json({"error": f"unusable settings: {error}", "settings": sorted(_SETTINGS)}, status=400)
        return _json({"models": len(self.catalog)})

    async def _control_reset(self, request: web.Request) -> web.Response:
        self.reset()
        return _json({"queued": 0})


def _json(value: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=_dumps(value), status=status, headers=headers, content_type="application/json")


def _bearer(request: web.Request) -> str:
    """The bearer key of a request, "" if there is none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _keeps_nothing(slug: str) -> bool:
    """The rule for zero data retention: the models of four vendors, but no free variant and no alias."""
    return slug.split("/")[0] in _ZDR_AUTHORS and not slug.endswith(":free")


def _public_endpoints(row: Json) -> list[Json]:
    """Two providers for a readable row, as PublicEndpoint objects."""
    shared: Json = {
        "model_id": row["id"], "model_name": row["name"], "quantization": None, "status": 0,
        "context_length": row["context_length"], "max_completion_tokens": None, "max_prompt_tokens": None,
        "pricing": {**row["pricing"], "discount": 0}, "supported_parameters": row["supported_parameters"],
        "supports_implicit_caching": False, "latency_last_30m": None, "throughput_last_30m": None,
        "uptime_last_5m": 99.9, "uptime_last_30m": 99.5, "uptime_last_1d": None,
    }  # fmt: skip
    return [
        shared | {"name": f"{name} | {row['id']}", "provider_name": name, "tag": tag}
        for name, tag in (("DeepInfra", "deepinfra"), ("Together", "together/fp8"))
    ]


def _named(row: Any, *path: str) -> set[str] | None:
    """The strings of the list at a path of a catalog entry; None where there is no such list."""
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return {value for value in row if isinstance(value, str)} if isinstance(row, list) else None


def _slugs(row: Any) -> set[str]:
    """What a catalog entry goes by: its id, its dated slug and, if it is an alias, its target."""
    row = _readable(row if isinstance(row, dict) else {})
    return {row["id"], row["canonical_slug"], row["alias_target"]["slug"]}


def _filtered(rows: list[Any], query: Mapping[str, str], zdr: Sequence[str]) -> list[Any]:
    """Filter catalog entries as GET /models does: output (default text) and input modalities, parameters, q,
    zdr. An entry whose modalities or parameters cannot be read is not filtered by them.
    """
    outputs = set(query.get("output_modalities", "text").split(","))
    inputs = set(filter(None, query.get("input_modalities", "").split(",")))
    parameters = set(filter(None, query.get("supported_parameters", "").split(",")))
    words, private = query.get("q", "").lower(), query.get("zdr") == "true"

    def fits(row: Any) -> bool:
        title = f"{row.get('id')} {row.get('name')}" if isinstance(row, dict) else ""
        gives, takes = (_named(row, "architecture", f"{side}_modalities") for side in ("output", "input"))
        named = _named(row, "supported_parameters")
        return (
            ("all" in outputs or gives is None or bool(outputs & gives))
            and (takes is None or inputs <= takes)
            and (named is None or parameters <= named)
            and words in title.lower()
            and (not private or not _slugs(row).isdisjoint(zdr))
        )

    return [row for row in rows if fits(row)]


# ── 10. Command line ─────────────────────────────────────────────────────────


async def _serve(simulator: Simulator) -> None:
    """Listen until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(name, stop.set)
    async with simulator:
        print(f"OpenRouter simulator listening on {simulator.base_url}", flush=True)
        await stop.wait()


def main(argv: list[str] | None = None) -> int:
    """Run the simulator from the command line until it is interrupted; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m openrouter_responses_pipe simulate",
        description="Imitate OpenRouter on a loopback port.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--key", help="accept only this key (default: any that does not begin with sk-bad)")
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--catalog", type=Path, help='JSON file with models: a list, or {"data": [...]}')
    models.add_argument("--models", type=int, metavar="N", help="serve a synthetic catalog of N models")
    parser.add_argument("--rate", type=float, default=0, help="deltas per second (default: all at once)")
    parser.add_argument("--golden", type=Path, help="folder of recorded streams")
    options = parser.parse_args(argv)
    catalog = None if options.models is None else synthetic_catalog(options.models)
    try:
        if options.catalog:
            read = json.loads(options.catalog.read_text(encoding="utf-8"))
            catalog = read["data"] if isinstance(read, dict) else read
        asyncio.run(_serve(Simulator(
            host=options.host, port=options.port, key=options.key, catalog=catalog, rate=options.rate,
            golden=options.golden)))  # fmt: skip
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        print(f"The simulator cannot start: {error.strerror or error}.", file=sys.stderr)
        return 1
    except (ValueError, KeyError) as error:
        print(f"The catalog cannot be read: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
