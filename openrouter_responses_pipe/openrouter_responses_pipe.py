"""
title: OpenRouter Responses
author: the openrouter-responses-pipe authors
version: 0.1.0
license: MIT
description: Every OpenRouter model in the chat menu, over OpenRouter's Responses API.
required_open_webui_version: 0.11.2

The floors of this file, from the ground up. A floor names only floors below it.

 1. Imports & constants
 2. Typed shapes
3a. Errors & templates
3b. OpenRouter's errors
4a. Security & helpers
4b. Files & schemas
 5. Session logging
 6. Valves
7a. Host calls
7b. Host seam
8a. Model registry
8b. Model publisher
9a. History
9b. Request models
10. SSE decoder
11. Event reducer
12. HTTP client
13. Emitters & outlet
14. Media intake
15. Artifact store
16. Ledger & metrics
17. Tool orchestrator
18. Streaming engine
19. Context keeper
20. Media makers
21. Turn loop
22. Runtime
23. Service functions
24. Pipe
"""

# ── 1. Imports & constants ───────────────────────────────────────────────────
# Everything from outside enters here; what may be missing is guarded in one block.
# Promise: importing this module opens nothing and starts nothing.

from __future__ import annotations

import asyncio
import base64
import bisect
import codecs
import contextlib
import contextvars
import copy
import fnmatch
import functools
import hashlib
import hmac
import importlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import queue
import random
import re
import secrets
import socket
import sqlite3
import sys
import threading
import time
import traceback
import types
import uuid
import weakref
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Container,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import date
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, Self, TypedDict, TypeGuard, TypeVar, cast
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import sqlalchemy as sa
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http import HttpProcessingError
from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import core_schema
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

# What may be missing
try:
    import orjson
except ImportError:  # the standard library serves, more slowly
    orjson = None
try:
    import lz4.frame as lz4_frame
except ImportError:  # zlib serves, more slowly
    lz4_frame = None
try:
    from ulid import ULID
except ImportError:  # a few lines of ours serve
    ULID = None
try:
    from redis.exceptions import RedisError
except ImportError:  # it comes with Open WebUI, not with this file
    RedisError = OSError
try:
    import fcntl
except ImportError:  # Windows: the workers of one server then write side by side
    fcntl = None
try:
    from open_webui.env import VERSION as _HOST_VERSION  # pyright: ignore[reportMissingImports]  # host only
except ImportError:  # the terminal, or a test without the host
    _HOST_VERSION = None
try:
    from starlette.responses import StreamingResponse  # pyright: ignore[reportMissingImports]  # host only
except ImportError:
    StreamingResponse = None

# Limits and sizes
_CATALOG_REFRESH_S: Final = 3600.0
_MAX_CATALOGS: Final = 32  # more than one only where keys or addresses differ
_BALANCE_S: Final = 60.0  # for so long an account's balance is not asked for again
_BALANCE_WAIT_S: Final = 3.0
_CATALOG_RETRY_S: Final = 15.0  # after the first failure; twice as long after each further one
_CATALOG_LONGEST_RETRY_S: Final = 300.0
_CATALOG_TIMEOUT_S: Final = 30.0
_CATALOG_WAIT_S: Final = 5.0  # what a page load or a chat waits for the very first catalog
_MAX_FRAME_BYTES: Final = 128 * 1024 * 1024
_MAX_ERROR_BYTES: Final = 256 * 1024
_MAX_CARRIER_CHARS: Final = 64 * 1024  # of reasoning that rides with a message in the host's own history
_MAX_RECORD_BYTES: Final = 1024 * 1024  # of the same, opened
_MAX_ARTIFACT_BYTES: Final = 16 * 1024 * 1024  # of what is kept in a row, opened
_MAX_WORDS_CHARS: Final = 600  # of what a provider says about its error
_LARGE_BODY_BYTES: Final = 1024 * 1024
_HEAVY_FRAME_BYTES: Final = 256 * 1024  # decoded in a thread
_NOT_MODIFIED: Final = 304
_MAX_JSON_BYTES: Final = 32 * 1024 * 1024
_OUTLET_MAX_CHARS: Final = 1_000_000
_OUTLET_MAX_ENTRIES: Final = 2_000
_RETIRE_DEADLINE_S: Final = 300.0
_CLEANUP_S: Final = 5.0
_EMIT_S: Final = 5.0  # what the host may take for one event
_STORAGE_S: Final = 30.0  # what it may take to fetch or keep a file
_HOST_CALL_S: Final = 1.0  # what a question to the host may take when nothing depends on it
_MAX_URL_CHARS: Final = 8_192
_MAX_HOST_CHARS: Final = 253
_MAX_REDIRECTS: Final = 5
_DOWNLOAD_S: Final = 30.0
_SNIFFED_BYTES: Final = 2_048
_MAX_TOOL_NAME: Final = 64
_CUT_MARK_CHARS: Final = 60
_QUEUE_MAXSIZE: Final = 500  # requests that wait because too many run
_TOOL_QUEUE: Final = 50  # calls of one request that wait for a worker
_CANCEL_S: Final = 1.0  # what a tool may take to end when it is told to
_MEGABYTE: Final = 1024 * 1024
_ENCODED_AT_ONCE: Final = 384 * 1024  # bytes, a multiple of 3: base64 of the pieces is that of the whole
_REMOTE_FILE_MAX_SIZE_DEFAULT_MB: Final = 50
_MINIMUM_HOST: Final = (0, 11, 2)

# name -> (characters that may leave at once, milliseconds that fewer may wait for company)
_STREAMING_PRESETS: Final[dict[str, tuple[int, int]]] = {
    "auto": (0, 0),
    "quick": (10, 100),
    "normal": (20, 250),
    "slow": (80, 600),
}

# Patterns
_MODULE_NAME_RE: Final = re.compile(r"function_(?P<id>.+?)(?:_[0-9a-f]{32})?")
_BASE64_HEAD_RE: Final = re.compile(r"[A-Za-z0-9+/]{2,64}={0,2}")
_ID_RE: Final = re.compile(r"[\w.:@-]{1,200}")
_EMPTY_BRACKETS_RE: Final = re.compile(r"\(\s*\)|\[\s*\]")
_MARKDOWN_RE: Final = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|[*`]+")  # links keep their words
_UNPRINTABLE_RE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LINE_BREAKS_RE: Final = re.compile(r"(?<!\s)[^\S\r\n]*+[\r\n]\s*+")  # a megabyte of spaces is no work
_IDS_RE: Final = re.compile(r"\bsk-[\w-]{8,}|\b(?:user|sess|session|org|key)_(?=[a-z]*[A-Z0-9])\w+")
_PLAIN_WORD_RE: Final = re.compile(r"[a-z]+(?:[ ,;!?]|\.?$)")  # no model id, no path, no name of a parameter
_CODE_WORD_RE: Final = re.compile(r"\d+|[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+|None|null")
_NOT_IN_URLS_RE: Final = re.compile(r"[\s\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_URL_RE: Final = re.compile(  # letters by name: with IGNORECASE, [a-z] also matches ſ and the Kelvin sign
    r"[A-Za-z]+://((?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::([0-9]{1,5}))?(?:[/?#].*)?"
)
_NUMBER_RE: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that makes a host an IPv4 address
_MARKUP_RE: Final = re.compile(rb"(?i)<(?:\w+:)?(svg|html|head|body|script|iframe|!doctype\s+html)\b")
# ![alt](address "title"), what a page shows as a picture; possessive, so that no text takes long to search
_MARKDOWN_IMAGE_RE: Final = re.compile(
    r"!\[((?:[^\[\]\n]++|\[[^\[\]\n]*+\])*+)\]\(\s{0,9}+<?((?:[^\s()<>]++|\([^\s()<>]*+\))++)>?"
    r"""(?:\s{1,9}+(?:"[^"\n]*+"|'[^'\n]*+'|\([^()\n]*+\)))?\s{0,9}+\)"""
)
_DATA_ADDRESS_RE: Final = re.compile(r"(\]\(\s{0,9}+<?)data:[^\s()<>]*+")
_TEXT_NAME_RE: Final = re.compile(
    r"(?is).*\.(?:txt|md|csv|tsv|json|jsonl|xml|ya?ml|toml|sql|log|ini|cfg|conf|py|js|ts|html?|css|sh|tex|srt)"
)
_HOST_FILE_RE: Final = re.compile(
    r"/api/v1/files/([\w-]{1,64})(?:/content(?:/[^?#]{0,255})?)?(?:[?#].{0,999})?"
)
_NOT_IN_TOOL_NAMES_RE: Final = re.compile(r"[^A-Za-z0-9_-]")
_ULID_RE: Final = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_UUID_RE: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_BASE64_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

_MAX_LINE_CHARS: Final = 4_000


def _printable(text: str) -> str:
    """`text` in one line that steers no terminal, so that nobody can make it look like several."""
    return _UNPRINTABLE_RE.sub(" ", text)


class _FileLogger(logging.Logger):
    """The logger of one load of this file: a load that still answers while another begins has its own.

    While nobody has taken its lines they go to the server's logger of the same name.
    """

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - so it is called
        """Whether somebody takes lines of this level."""
        return bool(self.handlers) or logging.getLogger(self.name).isEnabledFor(level)

    def handle(self, record: logging.LogRecord) -> None:
        """Take a line. Names, words and ids in it may have come from anywhere: it stays one, and bounded."""
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a line that cannot be said must not fail a chat
            text = str(record.msg)
        record.msg, record.args = _printable(text[:_MAX_LINE_CHARS]), None
        super().handle(record)

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Give a line to whoever takes them, else to the server's log."""
        for handler in tuple(self.handlers):
            handler.handle(record)
        if not self.handlers:
            self.pass_on(record)

    def pass_on(self, record: logging.LogRecord) -> None:
        """Give a line to the server's log, if that one shows its level."""
        public = logging.getLogger(self.name)
        if public.isEnabledFor(record.levelno):
            public.handle(record)


# Every line we log goes through this one
LOGGER: Final = _FileLogger("openrouter_responses_pipe")

_SEPARATORS: Final = " ·•|–—-,;:/"

# Other tools of OpenRouter's own are refused in a history; this one remembers by it (reference §4).
_REPLAYED_TOOLS: Final = ("openrouter:advisor",)

# Names shared with other loads of this file
_RUNTIMES_KEY: Final = "_openrouter_responses_pipe_runtimes"
_SETUP_MODEL_ID: Final = "setup"

_fast_loads: Final[Callable[[bytes | str], Any]] = orjson.loads if orjson is not None else json.loads


def _json_loads(data: bytes | str) -> Any:
    """Decode JSON, else raise ValueError. Lone surrogates, which orjson refuses, are kept as they are."""
    try:
        return _fast_loads(data)
    except ValueError:
        return _slow_loads(data)


def _slow_loads(data: bytes | str) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_dumps(value: Any) -> bytes:
    """Encode as UTF-8 JSON, else raise TypeError; a lone surrogate leaves as U+FFFD."""
    if orjson is not None:
        with contextlib.suppress(TypeError, ValueError):
            return orjson.dumps(value)
    return _whole_text(json.dumps(value, ensure_ascii=False, separators=(",", ":"))).encode()


# What a named tuple's constructor calls, without the Python function around it: half the time.
_new_tuple: Final = tuple.__new__


def _whole_text(text: str) -> str:
    """Join split UTF-16 pairs in `text`; a surrogate without partner becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# ── 2. Typed shapes ──────────────────────────────────────────────────────────
# The values that travel between floors; no methods with I/O.
# Promise: a frozen shape is never changed after it was made.
# Named tuples where a frozen dataclass would do: an eighth of the time to define (every load of
# the file pays it), a third of the time to make (every token pays it).

T = TypeVar("T")
JSONObject = dict[str, Any]
SSEFrame = bytes  # the data of one event of an SSE stream, its lines joined
StreamEvent = JSONObject  # a frame, decoded; its `type` says what it is
Dialect = Literal["browser", "browser_json", "api_stream", "api_json", "task"]
HostEventEmitter = Callable[[JSONObject], Awaitable[Any]]


class Message(TypedDict, total=False):
    """One chat message as Open WebUI sends it (contract of `/chat/completions`)."""

    role: str
    content: str | list[JSONObject] | None
    tool_calls: list[JSONObject]
    tool_call_id: str


class UsageStats(TypedDict, total=False):
    """`usage` as OpenRouter reports it: tokens, and `cost` in US dollars."""

    input_tokens: int
    input_tokens_details: JSONObject
    output_tokens: int
    output_tokens_details: JSONObject
    total_tokens: int
    cost: float | None


class FunctionCall(TypedDict):
    """The function part of a tool call on the wire; `arguments` is a JSON string."""

    name: str
    arguments: str


class ToolCall(NamedTuple):
    """A function the model wants to have called. `arguments` is JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str

    def function(self) -> FunctionCall:
        """The function part, as chat clients know it."""
        return {"name": self.name, "arguments": self.arguments}


class OfferedTool(NamedTuple):
    """A tool that a model may call. `name` is what the model sees, `host_name` what others know it by."""

    name: str
    host_name: str


class ToolResult(NamedTuple):
    """What a call came to: `text` for the model, `images` (addresses or data URLs) for one that sees.

    `files` and `embeds` are shown with the call, `sources` below the answer, all in the host's own form.
    """

    call: ToolCall
    text: str
    failed: bool = False
    images: tuple[str, ...] = ()
    files: tuple[Any, ...] = ()
    embeds: tuple[Any, ...] = ()
    sources: tuple[JSONObject, ...] = ()
    remark: str = ""  # for the person

    @property
    def status(self) -> str:
        """As an item has it."""
        return "failed" if self.failed else "completed"


class ToolLimits(NamedTuple):
    """What the tools of a request may take. Times in seconds, `most_chars` of one result."""

    at_once: int = 5
    at_once_everywhere: int = 200
    timeout_s: float = 60.0
    batch_timeout_s: float = 120.0
    most_chars: int = 100_000
    failures: int = 5  # within the window: then a tool is left alone for as long
    window_s: float = 60.0


class ReasoningSpec(NamedTuple):
    """How a model reasons. `efforts` from high to low; None: any; empty: there is no choice."""

    mandatory: bool = False
    by_default: bool = False
    efforts: tuple[str, ...] | None = None
    default_effort: str = ""
    takes_budget: bool = False


class PriceOverride(NamedTuple):
    """Other prices above so many input tokens, or within a time of day (UTC, HHMM, end exclusive)."""

    prices: Mapping[str, float]
    above_tokens: int | None = None
    hours: tuple[int, int] | None = None


def _lists(field: str, word: str, doc: str) -> property:
    return property(lambda spec: word in getattr(spec, field), doc=doc)


class ModelSpec(NamedTuple):
    """What the catalog says of one model; None where it does not say.

    Limits in tokens, `created` in seconds of the epoch, `expires` as a date. `prices` in US dollars under
    the names of the catalog: per token, but `request`, `image` and `web_search` per unit.
    """

    id: str
    name: str
    context_length: int | None = None
    input_modalities: frozenset[str] = frozenset({"text"})
    output_modalities: frozenset[str] = frozenset({"text"})
    supported_parameters: frozenset[str] = frozenset()
    reasoning: ReasoningSpec | None = None
    prices: Mapping[str, float] = types.MappingProxyType({})
    overrides: tuple[PriceOverride, ...] = ()
    max_output: int | None = None
    created: int = 0
    expires: str = ""
    description: str = ""
    canonical: str = ""  # the dated id that never changes
    alias_of: str = ""  # what a `~…-latest` id stands for now
    zdr: bool = False  # there is a provider that keeps nothing; False also where nobody asked
    is_known: bool = True  # False: it is not in the catalog, and may take anything
    title: str = ""  # its name in the menu, as the valve forms it

    @property
    def vendor(self) -> str:
        """The author's slug."""
        return self.id.partition("/")[0].lstrip("~")

    writes_text = _lists("output_modalities", "text", "Whether the model can answer in words.")
    writes_images = _lists("output_modalities", "image", "Whether the model makes pictures.")
    takes_tools = _lists("supported_parameters", "tools", "Whether functions may be offered to the model.")
    takes_images = _lists("input_modalities", "image", "Whether the model sees pictures.")
    takes_files = _lists("input_modalities", "file", "Whether the model itself reads files such as PDF.")
    takes_audio = _lists("input_modalities", "audio", "Whether the model hears.")
    takes_video = _lists("input_modalities", "video", "Whether the model sees films.")
    takes_schemas = _lists(
        "supported_parameters", "structured_outputs", "Whether its answer can be bound to a JSON schema."
    )

    @property
    def price_in(self) -> float | None:
        """US dollars per input token."""
        return self.prices.get("prompt")

    @property
    def price_out(self) -> float | None:
        """US dollars per output token."""
        return self.prices.get("completion")

    @property
    def is_free(self) -> bool:
        """Whether it costs nothing, in and out."""
        return self.price_in == 0 and self.price_out == 0

    @property
    def reasons(self) -> bool:
        """Whether the model can think before it answers."""
        return self.reasoning is not None

    def reads_whole_files(self, native_files: str) -> bool:
        """Whether it gets the files of a chat whole, by the valve `NATIVE_FILES`."""
        return native_files == "always" or (native_files == "supported" and self.takes_files)

    @property
    def takes_plugins(self) -> bool:
        """Whether OpenRouter's plugins (web search, PDF parsing) apply to it."""
        return self.writes_text

    @property
    def searches_web(self) -> bool:
        """Whether its provider has a web search of its own."""
        return "web_search_options" in self.supported_parameters or "web_search" in self.prices


class ModelRef(NamedTuple):
    """A model id taken apart: `base` is what the catalog lists, the rest says how to route it."""

    id: str
    base: str
    shortcuts: tuple[str, ...] = ()
    preset: str = ""

    @property
    def remark(self) -> str:
        """What a name needs to tell it from its base: `nitro`, `preset brief`."""
        return ", ".join([*self.shortcuts, *([f"preset {self.preset}"] if self.preset else [])])


class ModelRow(NamedTuple):
    """A row of Open WebUI's model table: what the menu and the admins say of a model.

    `grants` holds (kind of principal, its id, permission).
    """

    id: str
    name: str = ""
    meta: Mapping[str, Any] = types.MappingProxyType({})
    params: Mapping[str, Any] = types.MappingProxyType({})
    grants: frozenset[tuple[str, str, str]] = frozenset()
    is_active: bool = True
    is_workspace: bool = False  # a model that somebody has made of another one


class Connection(NamedTuple):
    """Where one request goes and how it introduces itself. Times in seconds."""

    base_url: str
    key: str
    headers: tuple[tuple[str, str], ...] = ()
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 300.0

    def __repr__(self) -> str:
        return f"Connection({self.base_url})"  # never the key


class RequestRights(NamedTuple):
    """Who may set what of a request.

    `approved` has, by field, what administrators have set: first the value in force (None: none), then
    those that people may choose instead.
    """

    is_admin: bool = False
    opened: str = ""
    approved: Mapping[str, Sequence[Any]] = types.MappingProxyType({})


class RequestSettings(NamedTuple):
    """What valves and the kind of client decide about a request; empty texts are not sent.

    `effort` counts where the chat names none; `cache_ttl` is that of Anthropic's automatic caching.
    Tools: `tool_names` are what the model knows them by, `only_tools` those that somebody can run (None:
    all), `available_tools` globs of names, `all` for all; outputs stay whole for `retain_outputs` questions
    at least, 0: always.
    `keeps_media`: what a chat names by an address is kept in the host's files; `trusted_hosts` are names,
    or `name:port`, that an administrator vouches for; `webui_url` is where the host is reached.
    """

    offer_tools: bool = True
    only_tools: frozenset[str] | None = None
    available_tools: str = "all"
    strict_tools: bool = False
    tool_names: Mapping[str, str] = types.MappingProxyType({})
    most_tool_chars: int = 100_000
    retain_outputs: int = 10
    is_task: bool = False
    effort: str = ""
    summary: str = "auto"
    whole_output: bool = False
    session_id: str = ""
    user: str = ""
    metadata: Mapping[str, str] = types.MappingProxyType({})
    cache_ttl: str = ""
    replay: Literal["off", "next_reply", "conversation"] = "conversation"
    most_images: int = 20
    answer_images: bool = True
    most_bytes: int = 50 * _MEGABYTE
    most_video_bytes: int = 100 * _MEGABYTE
    most_remote_bytes: int = _REMOTE_FILE_MAX_SIZE_DEFAULT_MB * _MEGABYTE
    native_files: Literal["off", "supported", "always"] = "off"
    keeps_media: bool = False
    trusted_hosts: frozenset[str] = frozenset()
    webui_url: str = ""
    pdf_engine: str = ""


TurnEntries = Sequence[Mapping[str, Any]]  # one upstream call's output in order, see `TurnRecord`


class MediaKind(NamedTuple):
    """A kind of medium: where its address or content stands in a block of a message, and who takes it."""

    name: Literal["image", "file", "audio", "video"]
    source: Callable[[Mapping[str, Any]], str]
    is_taken: Callable[[ModelSpec], bool]


class MediaRef(NamedTuple):
    """A medium that a history names by its address. `in_answer`: a picture that an earlier answer showed."""

    kind: str
    address: str
    in_answer: bool = False


class MediaBlob(NamedTuple):
    """What has become of a reference: a data URL, or `text`, or the `reason` why it is not sent.

    `size` is in bytes, before they were encoded; `mime` is what they are by themselves.
    """

    url: str = ""
    name: str = ""
    mime: str = ""
    size: int = 0
    text: str = ""
    reason: str = ""

    def __repr__(self) -> str:
        return f"MediaBlob({self.name}, {self.mime}, {self.size} bytes, {self.reason})"  # never the content


class ChatFiles(NamedTuple):
    """What is attached to a chat, as the host hands it over.

    `sources` are the ids of what the host has put passages of into the prompt, "" for what has none; the
    prompts are those before it did, `is_retrieved` whether it does that for this model at all.
    """

    files: tuple[Mapping[str, Any], ...] = ()
    sources: tuple[str, ...] = ()
    user_prompt: str = ""
    system_prompt: str = ""
    is_retrieved: bool = True
    question_id: str = ""  # the message that is being answered


class ArtifactPayload(NamedTuple):
    """Something to keep with a chat, because the host keeps only a reference to it; `data` is JSON."""

    data: Any
    kind: Literal["turn", "tool_output", "server_tool", "summary"]
    user_id: str
    chat_id: str
    message_id: str = ""
    model: str = ""


class ArtifactRow(NamedTuple):
    """The same as it is stored. `codec` and `key_id` say how `payload` was made of `raw_bytes` of JSON.

    Times are seconds since 1970; a row that another chat of the same person uses has a copy of its own.
    """

    ulid: str
    chat_id: str
    message_id: str
    user_id: str
    model: str
    kind: str
    codec: str
    key_id: str  # of the key that sealed it; empty: it is not sealed
    raw_bytes: int
    payload: bytes
    created_at: float
    last_used_at: float


class LoadedArtifacts(NamedTuple):
    """What could be had of the artifacts of a history, by ULID, and how many could not be read."""

    found: Mapping[str, Any] = types.MappingProxyType({})
    unreadable: int = 0


class Database(NamedTuple):
    """The host's database: its asynchronous engine, and the schema that its tables are in."""

    engine: AsyncEngine
    schema: str | None = None


class IntakePlan(NamedTuple):
    """What a history needs from elsewhere before it can be translated: records that ride with it, media.

    `turns` are the ULIDs of records that are stored, `sealed` those that ride with it themselves;
    `shown` are the addresses of pictures that answers show, by the place of the message.
    """

    sealed: tuple[str, ...] = ()
    media: tuple[MediaRef, ...] = ()
    shown: Mapping[int, list[str]] = types.MappingProxyType({})
    turns: tuple[str, ...] = ()


class Intake(NamedTuple):
    """What could be had of a plan: records by their ULID or sealed text, media by their reference."""

    records: Mapping[str, TurnEntries] = types.MappingProxyType({})
    takes_unsealed: bool = False  # the server has no secret, so nothing could be sealed
    shown: Mapping[int, list[str]] | None = None  # as planned; None: nobody has looked
    media: Mapping[MediaRef, MediaBlob] = types.MappingProxyType({})


class HostCall(NamedTuple):
    """What the host handed over with a request and wants back when its tools are run.

    `tools` are its own tools by name; `metadata` is its picture of the request.
    """

    tools: Mapping[str, Any] = types.MappingProxyType({})
    metadata: Mapping[str, Any] = types.MappingProxyType({})
    request: Any = None  # the HTTP request that it answers
    event_call: Callable[[JSONObject], Awaitable[Any]] | None = None  # asks the page
    event_emitter: HostEventEmitter | None = None  # tells it something


class ChatContext(NamedTuple):
    """Which chat and message a request is of; empty where it is of none."""

    chat_id: str = ""
    message_id: str = ""


class Fetched(NamedTuple):
    """An answer to `GET`, decoded; `content` is None where nothing has changed since `etag`."""

    content: Any
    etag: str = ""


class ChatRequest(NamedTuple):
    """The arguments of one `pipe()` call, normalised once."""

    body: Mapping[str, Any]
    dialect: Dialect
    model: str
    chat_id: str = ""
    message_id: str = ""
    session_id: str = ""  # of the page
    user_id: str = ""
    is_admin: bool = False
    is_task: bool = False  # a title, tags …: nobody reads anything but the text
    chose_tools: bool = False
    picked_model: str = ""  # as Open WebUI knows it; of a workspace model not the base
    files: ChatFiles = ChatFiles()
    user: Mapping[str, Any] = types.MappingProxyType({})
    host: HostCall = HostCall()
    user_valves: Any = None


class _PipeJob:
    """One chat request on its way through the runtime.

    `remarks` are said before anything else, `tally` counts what it took, `at_end` is called when it is over.
    """

    __slots__ = (
        *("at_end", "context", "emitter", "ended_by", "outlet", "remarks", "request", "request_id"),
        *("started_at", "tally", "task", "valves"),
    )

    def __init__(
        self, request: ChatRequest, valves: Valves, emitter: Emitter, outlet: Outlet, context: LogContext
    ) -> None:
        self.request = request
        self.valves = valves
        self.emitter = emitter
        self.outlet = outlet
        self.context = context
        self.request_id = context.request
        self.started_at = 0.0  # by the clock of the runtime
        self.remarks: tuple[Notice, ...] = ()
        self.tally: Counter[str] = Counter()
        self.task: asyncio.Task[None] | None = None
        self.ended_by: PipeError | None = None  # why the runtime cancelled it
        self.at_end: Callable[[], None] | None = None


class _QueuedToolCall(NamedTuple):
    """A call that waits for a worker; `deadline` by the clock of the event loop."""

    call: ToolCall
    deadline: float
    results: asyncio.Queue[ToolResult]


class _ToolExecutionContext:
    """The tools of one request: a queue, and the workers on it."""

    __slots__ = ("_repeats", "limits", "offered", "queue", "request", "workers")

    def __init__(self, request: ChatRequest, offered: Container[str], limits: ToolLimits) -> None:
        self.request = request
        self.offered = offered  # the host's names of what may be called
        self.limits = limits
        self.queue: asyncio.Queue[_QueuedToolCall] = asyncio.Queue(_TOOL_QUEUE)
        self.workers: list[asyncio.Task[None]] = []
        self._repeats: dict[tuple[str, str], int] = {}  # the last round's calls: in how many rounds on end

    def note_round(self, calls: Iterable[ToolCall]) -> None:
        """Count which calls the model makes again with the same arguments."""
        made = {(call.name, _same_arguments(call.arguments)) for call in calls}
        self._repeats = {key: self._repeats.get(key, 0) + 1 for key in made}

    def remark_on(self, call: ToolCall) -> str:
        """What the model is told of a call that it makes over and over."""
        count = self._repeats.get((call.name, _same_arguments(call.arguments)), 0)
        return _REPEATED.format(count) if count >= _MOST_REPEATS else ""


def _same_arguments(arguments: str) -> str:
    """Arguments however they are written."""
    try:
        return json.dumps(_json_loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


_MOST_REPEATS: Final = 3
_REPEATED: Final = (
    "\n\n[The same call has been made {} times on end. "
    "Its result will not change: use it, or try something else.]"
)


# Emissions: what the pure core says has happened


class TextDelta(NamedTuple):
    """More text of the answer; `item` numbers the output item within its upstream call."""

    item: int
    text: str


class RefusalDelta(NamedTuple):
    """More text of a refusal."""

    item: int
    text: str


class ReasoningDelta(NamedTuple):
    """More visible reasoning. An empty first delta says that reasoning has begun."""

    item: int
    text: str
    part: int = 0
    kind: Literal["summary", "text"] = "summary"


class ItemClosed(NamedTuple):
    """An item is complete; `payload` is the provider's own. Of server tools: only what has to be replayed."""

    item: int
    kind: Literal["message", "reasoning", "server_tool"]
    payload: JSONObject


class StatusUpdate(NamedTuple):
    """A line of progress for the person who waits."""

    description: str
    done: bool = False
    hidden: bool = False


class CitationFound(NamedTuple):
    """A source of the answer; each URL once."""

    url: str
    title: str
    snippet: str = ""


class Notice(NamedTuple):
    """Something the person must know although the answer goes on."""

    text: str


class ToolRequested(NamedTuple):
    """The model asked for a function call, arguments final; `item` is its place in the output."""

    call: ToolCall
    item: int = 0


class ToolStarted(NamedTuple):
    """A call is being run here."""

    call: ToolCall


class ToolFinished(NamedTuple):
    """A call that was run here has its result."""

    result: ToolResult


class ServerToolProgress(NamedTuple):
    """A tool that OpenRouter or the provider runs itself has begun or finished."""

    type: str
    status: str
    query: str = ""


class MediaProduced(NamedTuple):
    """The model made an image; `source` is a data URL, bare base64 or a URL."""

    item: int
    source: str

    def __repr__(self) -> str:
        return f"MediaProduced({self.item}, {len(self.source)} characters)"  # never the picture


class UsageReported(NamedTuple):
    """What one upstream call used, as OpenRouter said it."""

    usage: UsageStats


class TurnEnded(NamedTuple):
    """An upstream call ended well. `reason` is set when the answer is not complete.

    `goes_on`: its calls are run here, and another upstream call follows.
    """

    outcome: Literal["completed", "incomplete"]
    reason: str = ""
    goes_on: bool = False


class CarrierReady(NamedTuple):
    """What the host is to keep with the reasoning item `item`, and hands back with the message."""

    item: int
    details: list[JSONObject]


class Failed(NamedTuple):
    """The request failed; nothing follows. `log`: its lines, for whoever may read them."""

    error: PipeError
    log: str = ""


_SaidByTheModel = TextDelta | RefusalDelta | ReasoningDelta | ItemClosed | CitationFound | MediaProduced
_ToolEmission = ToolRequested | ToolStarted | ToolFinished | ServerToolProgress
_CallEmission = StatusUpdate | Notice | UsageReported | CarrierReady | TurnEnded | Failed
Emission = _SaidByTheModel | _ToolEmission | _CallEmission
Sink = Callable[[Sequence[Emission]], Awaitable[None]]


class _NothingToAwait:
    """What a sink returns that is ready for more; a coroutine of its own would be made per delta."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


_NOTHING_TO_AWAIT: Final = _NothingToAwait()


# ── 3a. Errors & templates ───────────────────────────────────────────────────
# One tree of errors that carry data; one place that turns them into words.
# Promise: nothing rendered here names a key, a user or a session.
# Doc: docs/errors_and_user_messages.md   Tests: tests/test_errors.py
#
# PipeError                     user_message, template, detail, retryable, retry_after
# ├─ ConfigurationError         no API key, a host that is too old
# ├─ AdmissionError             retiring
# ├─ InputError                 the request cannot be translated
# │  ├─ UnsafeURLError          an address that could lead into the server's own network
# │  └─ PayloadTooLargeError    a file above its limit
# ├─ OpenRouterAPIError         OpenRouter refused, with its own words
# │  └─ _RetryableHTTPStatusError   the same, and trying again may help
# ├─ StreamError                the stream was malformed, cut or failed
# └─ StorageError               what was kept cannot be read

_UPDATED: Final = "This function has just been updated. Please send the message again"


class PipeError(Exception):
    """Base of every failure that a person may see.

    `template` names the row of `_ADVICE`; `detail` holds the words of whoever refused;
    `retry_after` is in seconds and None when nobody named a time.
    """

    template: str = "internal"

    def __init__(
        self,
        detail: str = "",
        *,
        template: str | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.template = template or type(self).template
        self.retryable = retryable
        self.retry_after = retry_after
        self.status = status
        self.code = ""  # OpenRouter's word for what is not available, where it gave one
        self.hint = ""  # one more sentence, for whoever may know it
        self.shown = ""  # the words that the person gets, once they are known

    @property
    def user_message(self) -> str:
        """The failure in plain words."""
        return self.shown or render_error(self)


class ConfigurationError(PipeError):
    """Something an administrator has to set."""

    template = "configuration"


class AdmissionError(PipeError):
    """The request could not be taken or carried to its end here."""

    template = "admission"


class InputError(PipeError):
    """The chat holds something that cannot be sent."""

    template = "input"


class UnsafeURLError(InputError):
    """The chat names an address that is not fetched: it leads inward, or could be read to."""


class PayloadTooLargeError(InputError):
    """The chat holds or names a file above its limit."""


class OpenRouterAPIError(PipeError):
    """OpenRouter answered with an error before the stream began."""

    template = "provider"


class _RetryableHTTPStatusError(OpenRouterAPIError):
    """An error that another try may cure: 408, 429, 5xx, or `retryable` in the body."""


class ToolError(PipeError):
    """A call failed; the words are for the model. `by_tool`: it is the tool that is out of order."""

    by_tool = True


class ToolInputError(ToolError):
    """A call was not run: there is no such tool, the arguments do not fit, or there was no time for it."""

    by_tool = False


class StorageError(PipeError):
    """What was kept cannot be read, or cannot be kept; an answer never fails of it."""


class StreamError(PipeError):
    """The stream broke, or said that it failed."""

    template = "provider"


_CHANGE_SOMETHING: Final = "Please change the message or the settings of the chat, or choose another model."
# template -> (what happened, what to do now)
_ADVICE: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys(("configuration", "admission", "catalog"), ("", "")),
    "input": ("This chat could not be sent.", ""),
    "refused": ("OpenRouter refused the request.", _CHANGE_SOMETHING),
    "unknown_model": ("OpenRouter does not know this model.", "Please choose another model."),
    "too_long": (
        "The chat is too long for this model.",
        "Please begin a new chat, or choose a model with a larger context.",
    ),
    "too_large": ("The request is too large.", "Please send fewer or smaller attachments."),
    "authentication": (
        "OpenRouter did not accept the API key.",
        "An administrator has to replace it in the valves of this function; "
        "a key of your own you replace in your own valves.",
    ),
    "credits": (
        "The OpenRouter account has too little credit for this request.",
        "An administrator can add credit; a lower limit for output tokens may help too.",
    ),
    "rate_limit": ("Too many requests at the moment.", "Please try again later."),
    "daily_limit": ("The free requests of this day are used up.", "Please choose a model that is not free."),
    "moderation": ("The request was refused by moderation.", "Please change the message."),
    "guardrail": (
        "A guardrail of the OpenRouter account stopped the request.",
        "Please change the message; an administrator can change the guardrail.",
    ),
    "not_found": ("No provider can serve this model.", "Please choose another model."),
    "provider": ("The model's provider reported an error.", "Please try again, or choose another model."),
    "provider_refused": ("The model's provider refused the request.", _CHANGE_SOMETHING),
    "server": ("OpenRouter reported an error of its own.", "Please try again later."),
    "broken": ("The answer broke off.", "Please try again."),
    "network": ("OpenRouter could not be reached.", "Please try again."),
    "timeout": ("OpenRouter did not answer in time.", "Please try again."),
    "internal": ("Something went wrong inside this function.", "The server's log says what."),
}
# What some errors say instead of a reason; shown, it would only confuse.
_EMPTY_WORDS: Final = (
    *("provider returned error", "provider returned an error", "internal server error"),
    *("user not found", "request timed out", "rate limit exceeded"),
)

# what an administrator may word anew -> the rows that it covers
_TEMPLATE_CLASSES: Final[dict[str, str]] = {
    **dict.fromkeys(("refused", "unknown_model", "too_long", "too_large", "not_found"), "provider"),
    **dict.fromkeys(("provider", "provider_refused", "server"), "provider"),
    **dict.fromkeys(("rate_limit", "daily_limit"), "rate_limit"),
    **dict.fromkeys(("moderation", "guardrail"), "moderation"),
    **dict.fromkeys(("network", "broken"), "network"),
    **{kind: kind for kind in ("authentication", "credits", "timeout", "internal")},
}


class ErrorPage(NamedTuple):
    """What goes with an error: wordings of the administrator by class, whom to ask, an id for the log."""

    templates: Mapping[str, str] = types.MappingProxyType({})
    contact: str = ""
    error_id: str = ""


_PLAIN_PAGE: Final = ErrorPage()


def render_error(error: PipeError, page: ErrorPage = _PLAIN_PAGE) -> str:
    """Say what happened, in the provider's own words where there are some, and what to do.

    A template of `page` may use `{title}`, `{message}`, `{advice}`, `{id}` and `{contact}`.
    """
    title, advice = _ADVICE.get(error.template, _ADVICE["internal"])
    message = _provider_sentence(error.detail, bool(title))
    wait_s = error.retry_after or 0.0
    if "try again" in advice and any(phrase in message.lower() for phrase in ("try again", "retry")):
        advice = ""
    if wait_s > 1 and not re.search(rf"\b{round(wait_s)}\b", message):
        advice = f"Please try again in {_in_words(wait_s)}."
    advice = " ".join(part for part in (advice, error.hint) if part)
    kind = _TEMPLATE_CLASSES.get(error.template, "")
    error_id = page.error_id if kind else ""  # the others are no failures that a log could explain
    if kind in page.templates:
        fields = {"title": title, "message": message, "advice": advice, "contact": page.contact}
        return _fill_template(page.templates[kind], {**fields, "id": error_id})
    contact = f"Contact: {page.contact}" if page.contact else ""
    reference = f"(Error {error_id})" if error_id else ""
    return " ".join(part for part in (title, message, advice, contact, reference) if part)


def _provider_sentence(detail: str, optional: bool) -> str:
    """The words of whoever refused as one line with an end; nothing where they say nothing."""
    words = _IDS_RE.sub("[…]", _LINE_BREAKS_RE.sub(" ", _whole_text(detail)).strip())
    if optional and words.rstrip(".").lower() in _EMPTY_WORDS:
        return ""
    if len(words) > _MAX_WORDS_CHARS:
        words = words[:_MAX_WORDS_CHARS] + " …"
    # Control characters steer terminals, and PostgreSQL takes no U+0000.
    words = "".join(char for char in words if char.isprintable() or char.isspace())
    if _PLAIN_WORD_RE.match(words):
        words = words[0].upper() + words[1:]
    return words + "." if words and words[-1] not in ".!?…" else words


def _fill_template(template: str, fields: Mapping[str, str]) -> str:
    """`template` with its placeholders filled; other braces stay as they are."""
    for name, text in fields.items():
        template = template.replace("{" + name + "}", text)
    return template.strip()


def _in_words(seconds: float) -> str:
    """A waiting time as a person says it: `40 seconds`, `5 minutes`, `3 hours`."""
    for size, name in ((3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {name}s"
    whole = max(1, round(seconds))
    return f"{whole} second" + ("s" if whole > 1 else "")


# ── 3b. OpenRouter's errors ──────────────────────────────────────────────────
# What OpenRouter says when it refuses or fails, read into one of our errors (reference §10).
# Promise: any body is read; what it says of keys and people never leaves.
# Doc: docs/errors_and_user_messages.md   Tests: tests/test_errors.py

_STATUS_TEMPLATES: Final[dict[int, str]] = {
    **dict.fromkeys((400, 403, 422), "refused"),
    **dict.fromkeys((500, *range(520, 527)), "server"),
    **dict.fromkeys((408, 504, 524), "timeout"),
    401: "authentication",
    402: "credits",
    404: "not_found",
    413: "too_large",
    429: "rate_limit",
}
# `error_type` is exact where `error.code` is coarse (reference §10.2)
_ERROR_TYPES: Final[dict[str, tuple[str, bool]]] = {
    **dict.fromkeys(("provider_overloaded", "provider_unavailable"), ("provider", True)),
    **dict.fromkeys(("server", "unmapped"), ("server", True)),
    "rate_limit_exceeded": ("rate_limit", True),
    "timeout": ("timeout", True),
    **dict.fromkeys(("permission_denied", "invalid_request", "invalid_prompt"), ("refused", False)),
    "unprocessable": ("refused", False),
    "authentication": ("authentication", False),
    "context_length_exceeded": ("too_long", False),
    "payload_too_large": ("too_large", False),
    "payment_required": ("credits", False),
    "not_found": ("not_found", False),
    "content_policy_violation": ("moderation", False),
}
_WRONG_ENDPOINT: Final = "wrong_endpoint"
_RETRYABLE_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504, 529, *range(520, 527)})


def _is_object(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return type(value) is dict or isinstance(value, Mapping)  # the second takes ten times as long


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one: any part of an error may be missing."""
    return value if _is_object(value) else {}


def _text(value: Any) -> str:
    """`value` if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number that can be added; True, False, NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _as_float(value: Any) -> float:
    """A number, also one in a string; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _error_object(value: Any) -> Mapping[str, Any]:
    """The `error` of an answer: an object, or only its words."""
    return {"message": value} if isinstance(value, str) else _mapping(value)


def _strings(value: Any) -> list[str]:
    """The strings of a list in order; nothing for anything else."""
    return sorted({v for v in value if isinstance(v, str)}) if isinstance(value, list) else []


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; nothing for anything else."""
    return [entry for entry in value if _is_object(entry)] if isinstance(value, list) else []


def _words_in(value: Any, depth: int = 6) -> str:
    """The sentence in a text, in JSON as a text, in an object or a list; no markup, no bare code."""
    if not depth:
        return ""
    if isinstance(value, Mapping):
        keys = ("error", "message", "detail", "msg", "description")
        return next(filter(None, (_words_in(value.get(key), depth - 1) for key in keys)), "")
    if isinstance(value, list):
        return "; ".join(filter(None, (_words_in(entry, depth - 1) for entry in value[:3])))
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] in ("{", "[", '"'):
        with contextlib.suppress(ValueError):
            return _words_in(_json_loads(text), depth - 1)
    return "" if text.startswith(("<", "data:", "event:")) or _CODE_WORD_RE.fullmatch(text) else text


class _Refusal(NamedTuple):
    """An error of OpenRouter's before or in a stream: what it says, and the headers beside it."""

    error: Mapping[str, Any]
    metadata: Mapping[str, Any]
    headers: Mapping[str, str]

    @property
    def availability(self) -> Mapping[str, Any]:
        """What it says of the model's availability."""
        return _mapping(self.error.get("availability"))

    def words(self) -> str:
        """Its own words, with the reasons and the ways out that it names."""
        told = (self.metadata.get("raw"), self.error.get("message"), self.error.get("detail"))
        words = next(filter(None, map(_words_in, told)), "")  # the most telling comes first
        reasons = _strings(self.metadata.get("reasons")) + _strings(self.metadata.get("patterns"))
        reasons += [f"excluded by {rule}" for rule in _strings(self.availability.get("excluded_by"))]
        if words and reasons:
            words = f"{words.rstrip('.')} ({', '.join(reasons)})"
        flagged = self.metadata.get("flagged_input")
        if words and isinstance(flagged, str) and flagged:
            words = f"{words}: “{flagged}”"
        instead = _strings(self.availability.get("fallback_models"))
        if words and instead:
            words = f"{words.rstrip('.')}. OpenRouter suggests {' or '.join(instead)} instead"
        return words

    def verdict(self, words: str, template: str, retryable: bool) -> tuple[str, bool]:
        """(template, whether another try may help), where the words or the metadata know more."""
        metadata, availability = self.metadata, self.availability
        said = availability.get("retryable")
        retryable = said if isinstance(said, bool) else retryable
        if "free-models-per-day" in words:
            return "daily_limit", False
        if metadata.get("reasons"):
            return "moderation", retryable
        if metadata.get("patterns"):
            return "guardrail", retryable
        if availability.get("code") == "model_not_found":
            return "unknown_model", retryable
        if "maximum context length" in words or "context_length" in _strings(availability.get("excluded_by")):
            return "too_long", retryable
        if metadata.get("provider_name"):
            template = {"refused": "provider_refused", "server": "provider"}.get(template, template)
        return template, retryable

    def wait_s(self, template: str, now: float) -> float | None:
        """Seconds to wait before another try; None when nobody says."""
        others = _mapping(self.metadata.get("headers"))
        beside = {str(name).lower(): str(text) for name, text in others.items()}

        def header(name: str) -> str:
            return str(self.headers.get(name) or beside.get(name.lower()) or "")

        seconds = _retry_after_s(header("Retry-After") or self.availability.get("retry_after"), now)
        if seconds is None and template == "daily_limit":
            left = _as_float(header("X-RateLimit-Reset")) / 1000 - now  # of the epoch, in milliseconds
            return left if 0 < left < 7 * 24 * 3600 else None
        return seconds


def _retry_after_s(value: Any, now: float) -> float | None:
    """Seconds to wait, given as a number or an HTTP date; None for anything else."""
    text = str(value or "").strip()
    seconds = _as_float(text)
    if text and math.isnan(seconds):
        with contextlib.suppress(ValueError, OverflowError):
            seconds = parsedate_to_datetime(text).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _as_status(code: Any) -> int | None:
    """A code that is a number, also one in a string."""
    if isinstance(code, str) and code.isdecimal() and code.isascii():
        return int(code[:9])
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def _api_error(status: int, headers: Mapping[str, str], content: bytes, now: float) -> OpenRouterAPIError:
    """Turn an error answer of any shape of reference §10.1 into one error; `now` in seconds of the epoch."""
    decoded: Any = None
    with contextlib.suppress(ValueError):
        decoded = content.decode()
        decoded = _json_loads(content)
    if isinstance(decoded, list):
        decoded = next(iter(_objects(decoded)), {})
    body = _mapping(decoded)
    error = _error_object(body.get("error"))
    if status < 400:  # a late failure leaves with HTTP 200
        status = _as_status(error.get("code")) or status
    refusal = _Refusal(error or body, _mapping(error.get("metadata") or body.get("metadata")), headers)
    words = refusal.words() or ("" if body else _words_in(decoded))
    template = _STATUS_TEMPLATES.get(status, "provider")
    if not body and template == "provider":
        template = "server"  # an edge in between, not a provider
    template, retryable = refusal.verdict(words, template, status in _RETRYABLE_STATUS)
    if template in ("provider", "server") and not retryable:
        template = "refused"
    kind = _RetryableHTTPStatusError if retryable else OpenRouterAPIError
    wait_s = refusal.wait_s(template, now)
    words = words or ("" if error.get("message") else f"HTTP {status}")
    api_error = kind(words, template=template, retryable=retryable, retry_after=wait_s, status=status)
    api_error.code = str(refusal.availability.get("code") or "")
    if status == 405 or (status == 404 and not error):  # no OpenRouter said this: the path is unknown
        api_error.code = _WRONG_ENDPOINT
    return api_error


def _event_error(error: Mapping[str, Any], error_type: str = "", now: float | None = None) -> StreamError:
    """Turn an error that came inside a stream (reference §10.2) into one error."""
    metadata = _mapping(error.get("metadata"))
    code = error.get("code")
    error_type = error_type or str(metadata.get("error_type") or error.get("error_type") or "")
    status = _as_status(code)
    refusal = _Refusal(error, metadata, {})
    words = refusal.words()
    fallback = ("rate_limit", True) if code == "rate_limit_exceeded" else ("provider", False)
    if status is not None:
        fallback = (_STATUS_TEMPLATES.get(status, "provider"), status in _RETRYABLE_STATUS)
    elif error_type:
        fallback = ("provider_refused", False)  # all types that may pass by are in the table
    template, retryable = refusal.verdict(words, *_ERROR_TYPES.get(error_type, fallback))
    wait_s = refusal.wait_s(template, time.time() if now is None else now)
    return StreamError(words, template=template, retryable=retryable, retry_after=wait_s, status=status)


# ── 4a. Security & helpers ───────────────────────────────────────────────────
# Secrets at rest, and the small helpers that more than one floor needs.
# Promise: what is sealed leaves only through `decrypt`; a secret is never in a repr.
# Doc: docs/security_and_encryption.md   Tests: tests/test_security.py

_ENCRYPTED_PREFIX: Final = "encrypted:"


class EncryptedStr(str):
    """A secret valve: Fernet ciphertext behind `encrypted:`, or plain text where no key is known.

    Open WebUI stores and shows what the model dumps, so the value itself is the ciphertext.
    """

    __slots__ = ()

    @classmethod
    def encrypt(cls, value: str, secret: str) -> EncryptedStr:
        """Seal `value` with `secret`. Already sealed, empty, or without a secret: kept as it is."""
        if not value or not secret or value.startswith(_ENCRYPTED_PREFIX):
            return cls(value)
        return cls(_ENCRYPTED_PREFIX + Fernet(_fernet_key(secret)).encrypt(value.encode()).decode())

    def decrypt(self, secret: str) -> str:
        """The plain text.

        Raises:
            ConfigurationError: it was sealed with another secret, or the secret is gone.
        """
        text = str.__str__(self)
        if not text.startswith(_ENCRYPTED_PREFIX):
            return text
        try:
            return _fernet_decrypt(text[len(_ENCRYPTED_PREFIX) :], secret)
        except (InvalidToken, ValueError):
            raise ConfigurationError(
                "The stored API key can no longer be read: the server's secret key is another one now, "
                "or missing. The key has to be entered again."
            ) from None

    def __repr__(self) -> str:
        return "EncryptedStr('…')" if self else "EncryptedStr('')"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Validate as a string; the class is kept, the JSON schema says `string`."""
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


@functools.lru_cache(maxsize=256)
def _fernet_decrypt(token: str, secret: str) -> str:
    """Kept, because every request asks, and once costs as much as a tenth of a short request."""
    return Fernet(_fernet_key(secret)).decrypt(token.encode()).decode()


def _fernet_key(secret: str) -> bytes:
    return base64.urlsafe_b64encode(hashlib.sha256(f"openrouter-responses-pipe:{secret}".encode()).digest())


class ArtifactCipher:
    """Seals what is kept with a chat (AES-256-GCM), bound to its owner; without a secret it seals nothing.

    `older` secrets open what they have sealed, and seal nothing any more.
    """

    def __init__(self, secret: str, pipe_id: str, older: tuple[str, ...] = ()) -> None:
        self._secrets = tuple(dict.fromkeys((secret, *filter(None, older))))
        self._info = f"openrouter-responses-pipe artifacts {pipe_id}".encode()

    @functools.cached_property
    def _keys(self) -> dict[str, AESGCM]:
        keys: dict[str, AESGCM] = {}
        for secret in self._secrets:
            key = HKDF(hashes.SHA256(), 32, salt=None, info=self._info).derive(secret.encode())
            keys[hashlib.sha256(key).hexdigest()[:8]] = AESGCM(key)
        return keys

    @property
    def can_seal(self) -> bool:
        """Whether there is a secret."""
        return bool(self._secrets[0])

    def encrypt(self, data: bytes, owner: str) -> tuple[str, bytes]:
        """(the id of the key, `data` sealed for `owner`)."""
        key_id, key = next(iter(self._keys.items()))
        nonce = secrets.token_bytes(12)
        return key_id, nonce + key.encrypt(nonce, data, owner.encode())

    def decrypt(self, key_id: str, sealed: bytes, owner: str) -> bytes:
        """What `encrypt` was given.

        Raises:
            StorageError: it was sealed by or for somebody else, or with another secret.
        """
        try:
            return self._keys[key_id].decrypt(sealed[:12], sealed[12:], owner.encode())
        except (KeyError, InvalidTag, TypeError, ValueError):
            raise StorageError("What was kept could not be opened") from None

    def seal(self, data: bytes, owner: str) -> str:
        """`data`, compressed and sealed, as text that only `owner`'s requests can open."""
        return base64.urlsafe_b64encode(self.encrypt(zlib.compress(data, 1), owner)[1]).decode()

    def open(self, text: str, owner: str) -> bytes:
        """What `seal` was given.

        Raises:
            StorageError: it was sealed by or for somebody else, with another secret, or not at all.
        """
        with contextlib.suppress(ValueError):
            raw = base64.urlsafe_b64decode(text)
            # In many forms one record could be opened many times.
            whole = raw if base64.urlsafe_b64encode(raw).decode() == text else b""
            for key_id in self._keys:
                with contextlib.suppress(StorageError):
                    opened = self.decrypt(key_id, whole, owner)
                    return zlib.decompressobj().decompress(opened, _MAX_RECORD_BYTES)
        raise StorageError("Kept reasoning could not be opened")


@functools.lru_cache(maxsize=8)
def _artifact_cipher(pipe_id: str, secret: str, *older: str) -> ArtifactCipher:
    """Kept, because deriving keys takes longer than all else that is done with them in a request."""
    return ArtifactCipher(secret, pipe_id, older)


def _new_ulid(now: float) -> str:
    """An id that nobody can guess and that sorts by the time it was made (github.com/ulid/spec)."""
    if ULID is not None:
        return str(ULID.from_timestamp(max(now, 0.0)))
    number = int(now * 1000) % 2**48 << 80 | secrets.randbits(80)
    crockford = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    return "".join(crockford[number >> shift & 31] for shift in range(125, -1, -5))


def _header_value(text: str) -> str:
    """`text` as an HTTP header may carry it: printable ASCII, everything else dropped."""
    return "".join(char for char in text if " " <= char <= "~").strip()


def _new_item_id(kind: str) -> str:
    """A fresh id for an item that the host keeps: `msg_…`, `rs_…`, `fc_…`."""
    return f"{kind}_{secrets.token_hex(12)}"


def _unique_id(wanted: str, used: dict[str, int]) -> str:
    """`wanted`, or with the first number behind it that makes it new; the result is added to `used`.

    `used` has with each id the last number that was tried behind it.
    """
    name = wanted
    while name in used:
        used[wanted] += 1
        name = f"{wanted}_{used[wanted]}"
    used[name] = 1
    return name


def _safe_tool_name(name: str) -> str:
    """A name that every provider takes: 64 letters, digits, _ and - at most."""
    return _safe_short_name(name[:_MAX_TOOL_NAME])  # cut first: what is kept must not be of any length


@functools.lru_cache(maxsize=1_000)
def _safe_short_name(name: str) -> str:
    return _NOT_IN_TOOL_NAMES_RE.sub("_", name) or "tool"


def _cut_text(text: str, most_chars: int) -> str:
    """`text`, or its beginning and its end with a mark of what was left out between them."""
    if len(text) <= most_chars:
        return text
    kept = max(0, most_chars - _CUT_MARK_CHARS)
    head = kept * 2 // 3
    mark = f"\n[… {len(text) - kept:,} characters left out …]\n"
    return f"{text[:head]}{mark}{text[len(text) - (kept - head) :]}"


def _end_unheard(task: asyncio.Task[Any]) -> None:
    """Let a task say nothing when its loop is closed before it has ended: there is nobody left to care."""
    setattr(task, _SAYS_WHEN_LOST, False)


async def _end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """End tasks of ours, within a few seconds."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_CLEANUP_S)


def _drop_oldest(kept: dict[Any, Any], most: int) -> None:
    """Leave the `most` entries that were added last."""
    while len(kept) > most:
        del kept[next(iter(kept))]


def _matches_any(text: str, globs: str) -> bool:
    """Whether `text`, a model id, matches one of a comma list of globs, letter case aside."""
    return any(fnmatch.fnmatchcase(text.lower(), glob.lower()) for glob in _listed(globs))


def _dollars(cost: float) -> str:
    """A price with two significant digits below ten cents, cents above: `$0.00023`, `$1.20`."""
    if not cost > 1e-12:
        return "$0"
    decimals = max(2, 1 - math.floor(math.log10(cost)))
    text = f"{cost:.{decimals}f}"
    return "$" + text[: len(text) - decimals + 2] + text[len(text) - decimals + 2 :].rstrip("0")


def _without_host_prefix(model: str) -> str:
    """`author/slug` of an id as the host writes it, `function_id.author/slug`; any other as it is."""
    head, dot, tail = model.partition(".")
    return tail if dot and head.isidentifier() and ("/" in tail or tail.startswith("@")) else model


def _listed(text: str) -> list[str]:
    """The model ids or globs of a comma list, without blanks and without the host's prefix."""
    return [_without_host_prefix(entry.strip()) for entry in text.split(",") if entry.strip()]


def _pipe_id(module_name: str, model: str = "") -> str:
    """The id of the function of this code: the host names the module by it, else `model` begins with it."""
    match = _MODULE_NAME_RE.fullmatch(module_name)
    return match["id"] if match else model.split(".", 1)[0] or module_name


def _upstream_model_id(model: str) -> str:
    """OpenRouter's id of a model that the host calls `<function id>.<model id>`."""
    head, dot, tail = model.partition(".")
    return tail if dot and "/" not in head and "@" not in head else model


_SAYS_WHEN_LOST: Final = "_log_destroy_pending"  # the switch by which asyncio's own functions do the same
# What is not the open internet (IANA's registries of special addresses, and all of IPv6 beside 2000::/3)
_INWARD_NETWORKS: Final = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
    168.63.129.16/32
    ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 2002::/16 3fff::/20
"""  # 168.63.129.16 looks public and is Azure's own, within each of its machines
_NAT64_PREFIX: Final = 0x0064_FF9B << 64  # 64:ff9b::/96 without its last 32 bits, which are an IPv4 address


@functools.cache
def _inward_networks() -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(network) for network in _INWARD_NETWORKS.split())


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, an IPv4 address inside of an IPv6 one too.

    Behind NAT64 every IPv4 server has an address of 64:ff9b::/96, so these are judged by what they hold.
    All other forms that embed one (mapped, compatible, 6to4, Teredo, local NAT64) are refused unread.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if int(ip) >> 32 == _NAT64_PREFIX:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    return "%" not in address and ip.is_global and not any(ip in network for network in _inward_networks())


class _WebAddress(NamedTuple):
    """Where a URL leads, or the `problem` that is plain before its name is resolved.

    `literal` is the host where that is an IP address already; `is_allowed`: an administrator vouches for it.
    """

    problem: str
    host: str = ""
    port: int = 0
    literal: str = ""
    is_allowed: bool = False


def _web_address(url: str, allowed_hosts: frozenset[str] = frozenset()) -> _WebAddress:
    """Read a URL so strictly that no other reader can find another host in it.

    Any port will do: what speaks no TLS does not answer, and a host without TLS has to be allowed.
    """
    if len(url) > _MAX_URL_CHARS:
        return _WebAddress("the address is too long")
    if _NOT_IN_URLS_RE.search(url):
        return _WebAddress("the address holds a blank or another character that no address may hold")
    scheme, _, rest = url.partition(":")
    if scheme.lower() not in ("http", "https"):
        return _WebAddress("only https addresses are fetched")
    if "@" in re.split(r"[/?#]", rest.removeprefix("//"), maxsplit=1)[0]:
        return _WebAddress("the address holds a user name or a password")
    match = _URL_RE.fullmatch(url)
    host = match[1].lower() if match else ""
    port = int(match[2] or (443 if scheme.lower() == "https" else 80)) if match else 0
    try:
        literal = _literal_address(host)
    except ValueError:
        host = literal = ""
    if not 0 < len(host) <= _MAX_HOST_CHARS or not 0 < port < 65536:
        return _WebAddress("the address does not name its server in the plain form")
    is_allowed = any(name.lower() in (host, f"{host}:{port}") for name in allowed_hosts)
    if scheme.lower() == "http" and not is_allowed:
        return _WebAddress("only https addresses are fetched")
    return _WebAddress("", host, port, literal, is_allowed)


def _literal_address(host: str) -> str:
    """The IP address that a host is, else ""; ValueError for what only some readers take for one: `127.1`."""
    if host.startswith("["):
        return str(ipaddress.IPv6Address(host[1:-1]))
    return str(ipaddress.IPv4Address(host)) if _NUMBER_RE.fullmatch(host.rpartition(".")[2]) else ""


def _is_safe_url(url: str, addresses: Iterable[str], allowed_hosts: frozenset[str] = frozenset()) -> str:
    """Why `url`, whose name has these `addresses`, is not fetched; "" if it may be.

    `allowed_hosts` are names as in the URL, or `name:port`, that may use http and addresses of any kind.
    """
    where = _web_address(url, allowed_hosts)
    if where.problem:
        return where.problem
    judged = [*addresses, *filter(None, [where.literal])]
    if not judged:
        return "its server has no address"
    is_fine = where.is_allowed or all(map(_is_public, judged))
    return "" if is_fine else "its server is not on the open internet"


def _megabytes(size: int) -> str:
    return f"{round(size / _MEGABYTE, 1):g} MB"


def _padding(data: str) -> int:
    return 2 if data.endswith("==") else int(data.endswith("="))


def _base64_bytes(data: str, start: int = 0) -> int:
    """The number of bytes that base64 from `start` on decodes to."""
    return (len(data) - start - _padding(data)) * 3 // 4


def _validate_base64_size(data: str, max_bytes: int) -> int:
    """How many bytes base64 in one line decodes to; InputError if it is damaged, or above `max_bytes`."""
    size = _base64_bytes(data)
    if size > max_bytes:
        raise PayloadTooLargeError(f"A file in it is larger than {_megabytes(max_bytes)}, which is the limit")
    body = len(data) - _padding(data)
    is_whole = body % 4 != 1 and (body == len(data) or len(data) % 4 == 0)
    # In pieces, to copy little at a time.
    pieces = (data[start : min(start + _MEGABYTE, body)] for start in range(0, body, _MEGABYTE))
    others = (piece.encode().translate(None, _BASE64_ALPHABET) for piece in pieces)
    if not is_whole or not data.isascii() or any(others):
        raise InputError("A file in it is damaged: it is not in base64")
    return size


# ── 4b. Files & schemas ──────────────────────────────────────────────────────
# What a file is by its bytes, and what a tool's schema says of arguments.
# Promise: no I/O; work is bounded, whatever the bytes and the schema say.
# Doc: docs/security_and_encryption.md   Tests: tests/test_media_intake.py, tests/test_tool_schemas.py


def _sniffed(content: bytes) -> str:
    """What a file is by its first bytes: what a header or a name says of it counts nothing."""
    head = content[:_SNIFFED_BYTES]
    for beginning, mime in _SIGNATURES.items():
        if re.match(beginning, head, re.DOTALL):
            return mime
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<") and (tag := _MARKUP_RE.search(head)):
        return "image/svg+xml" if tag[1].lower() == b"svg" else "text/html"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "application/octet-stream"
    return "application/octet-stream" if b"\0" in content else "text/plain"


def _data_url(pieces: Iterable[bytes | memoryview], mime: str) -> str:
    """A data URL of pieces, each but the last of a multiple of 3 bytes."""
    # In pieces, because base64 lets no other thread run meanwhile: 50 MB at once would be felt by everybody.
    return "".join([f"data:{mime};base64,", *(base64.b64encode(piece).decode() for piece in pieces)])


def _blob_of(content: bytes, name: str) -> MediaBlob:
    """A file as it is sent: text as text, all else as a data URL."""
    mime = _sniffed(content)
    if mime in _PERHAPS_TEXT and (text := _text_of(content, name)):
        return MediaBlob(name=name, mime="text/plain", size=len(content), text=text)
    if mime == "application/octet-stream" and _OFFICE_MIME_RE.fullmatch(_guessed_mime(name)):
        mime = _guessed_mime(name)  # a kind of file, but none that the first bytes would show
    whole = memoryview(content)
    pieces = (whole[start : start + _ENCODED_AT_ONCE] for start in range(0, len(content), _ENCODED_AT_ONCE))
    return MediaBlob(_data_url(pieces, mime), name, mime, len(content))


# How a file begins -> what it is; the first that fits counts
_SIGNATURES: Final[dict[bytes, str]] = {
    rb"\x89PNG\r\n\x1a\n": "image/png",
    rb"\xff\xd8\xff": "image/jpeg",
    rb"GIF8[79]a": "image/gif",
    rb"RIFF.{4}WEBP": "image/webp",
    rb"BM.{4}\0{4}": "image/bmp",
    rb".{4}ftyp(?:avi[fs]|mif1.{4}(?:.{4}){0,9}?avif)": "image/avif",
    rb".{4}ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)": "image/heic",
    rb".{4}ftypM4[AB] ": "audio/mp4",
    rb".{4}ftypqt  |\0.{3}(?:moov|mdat|wide)": "video/quicktime",
    rb".{4}ftyp": "video/mp4",
    rb"(?:\xef\xbb\xbf)?\s{0,9}%PDF-|.{0,1000}?[\r\n]%PDF-\d\.\d\s{1,2}%[\x80-\xff]": "application/pdf",
    rb"RIFF.{4}WAVE": "audio/wav",
    rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]": "audio/mpeg",
    rb"\xff[\xf0\xf1\xf8\xf9]": "audio/aac",
    rb"OggS.{24,99}?\x80theora": "video/ogg",
    rb"OggS": "audio/ogg",
    rb"fLaC": "audio/flac",
    rb"\x1aE\xdf\xa3.{0,60}?webm": "video/webm",
    rb"\x1aE\xdf\xa3": "video/x-matroska",
    rb"\0\0\x01[\xba\xb3]": "video/mpeg",
}
_OFFICE_MIME_RE: Final = re.compile(r"application/(?!pdf$).+")
_PERHAPS_TEXT: Final = ("text/plain", "text/html", "image/svg+xml", "application/octet-stream")


def _text_of(content: bytes, name: str) -> str:
    """The text in a file, "" if it holds none; the code page of Windows only where its name says text."""
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = ""
    with contextlib.suppress(UnicodeDecodeError):
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    if not text and not is_wide and _TEXT_NAME_RE.fullmatch(name):
        text = content.decode("cp1252", "replace")
    return "" if "\0" in text else text


def _guessed_mime(name: str) -> str:
    """What a file should be by its name."""
    with contextlib.suppress(ValueError):  # some versions read a name as an address
        return mimetypes.guess_type(name)[0] or ""
    return ""


def _name_of(address: str) -> str:
    """What a file at an address is called, else its server; those of the host do not say it."""
    if not address.lower().startswith("http"):
        return ""
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        return _shown_name(re.split(r"[/\\]", unquote(parts.path.rstrip("/")))[-1]) or parts.hostname or ""
    return ""


def _shown_name(name: str) -> str:
    """A name that somebody gave to a file, fit for one line: nothing in it that cannot be seen."""
    return _one_line(name)[:80]


def _one_line(text: str) -> str:
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _host_file_id(address: str, webui_url: str = "") -> str:
    """The id in an address of one of Open WebUI's own files, else ""."""
    match = _HOST_FILE_RE.fullmatch(address.removeprefix(webui_url) if webui_url else address)
    return match[1] if match else ""


# Schemas of arguments

# what says something about a value, as OpenAI's strict mode knows it
_SAID_STRICTLY: Final = frozenset(
    {
        *("type", "enum", "const", "description", "pattern", "multipleOf", "minItems", "maxItems"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
)
# what it need not know, because it can be said otherwise, or says nothing
_STRICT_KEYWORDS: Final = _SAID_STRICTLY | {
    *("properties", "required", "additionalProperties", "items", "anyOf", "allOf", "nullable"),
    *("$ref", "$defs", "definitions", "$schema", "$id", "$comment", "title", "default", "format"),
    *("examples", "example", "deprecated", "readOnly", "writeOnly"),
}
# what arguments are checked against: no patterns, which may take for ever
_CHECKED: Final = _SAID_STRICTLY - {"pattern"} | {"minLength", "maxLength", "minProperties", "maxProperties"}
_KINDS: Final = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_MOST_PARTS: Final = 2_000
_DEEPEST_PART: Final = 64


class _NotPlainError(Exception):
    """A schema that cannot be written out, or not as it is wanted."""


class _SchemaReader:
    """Writes a schema out in full: without references, and as JSON Schema says what OpenAPI says otherwise.

    `exact`: for a model that must keep to it, so nothing may be lost; else what is dear to check is left out.
    """

    def __init__(self, root: Mapping[str, Any], *, exact: bool = False) -> None:
        self._root = root
        self._exact = exact
        self._left = _MOST_PARTS
        self._depth = 0

    def plain(self, part: Any) -> JSONObject:
        """`part` written out; _NotPlainError if it leads nowhere, has no end, or contradicts itself."""
        if not isinstance(part, Mapping):
            if self._exact or part is not True:
                raise _NotPlainError
            return {}
        with self._deeper():
            return self._plain(part)

    def _plain(self, part: Mapping[str, Any]) -> JSONObject:
        if self._exact and not _STRICT_KEYWORDS.issuperset(part):
            raise _NotPlainError
        if "$ref" in part or "allOf" in part:
            return self.plain(self._merged(part))
        said = _SAID_STRICTLY if self._exact else _CHECKED
        plain = {key: value for key, value in part.items() if key in said}
        if not all(isinstance(kind, str) and kind in _KINDS for kind in _kinds_of(plain)) and "type" in plain:
            if self._exact:
                raise _NotPlainError
            del plain["type"]
        _take_bounds(plain)
        self._take_inner(plain, part)
        return _nullable(plain) if part.get("nullable") is True else plain

    def _take_inner(self, plain: JSONObject, part: Mapping[str, Any]) -> None:
        """The schemas within a schema."""
        properties = part.get("properties")
        is_sound = isinstance(properties, Mapping | None) and isinstance(part.get("required"), list | None)
        if self._exact and not is_sound:
            raise _NotPlainError
        if isinstance(properties, Mapping):
            plain["properties"] = {str(name): self.plain(inner) for name, inner in properties.items()}
        if isinstance(part.get("required"), list):
            plain["required"] = [name for name in part["required"] if isinstance(name, str)]
        if part.get("additionalProperties") is not None and "patternProperties" not in part:
            more = part["additionalProperties"]
            plain["additionalProperties"] = more if isinstance(more, bool) else self.plain(more)
        if isinstance(part.get("items"), Mapping):
            plain["items"] = self.plain(part["items"])
        for key in ("anyOf", "oneOf"):
            if isinstance(part.get(key), list) and part[key]:
                plain[key] = [self.plain(option) for option in part[key]]

    def _merged(self, part: Mapping[str, Any]) -> JSONObject:
        """A schema with what it refers to, or is made of, in its place; the last description counts."""
        own = {key: value for key, value in part.items() if key not in ("$ref", "allOf")}
        pieces = [self._referred(part["$ref"])] if "$ref" in part else []
        pieces += part["allOf"] if isinstance(part.get("allOf"), list) else []
        merged: JSONObject = {}
        for piece in (*pieces, own):
            if not isinstance(piece, Mapping):
                raise _NotPlainError
            with self._deeper():
                inner = self._merged(piece) if "$ref" in piece or "allOf" in piece else piece
            for one, other in ((merged, inner), (inner, merged)):
                if one.get("additionalProperties") is False and other.get("properties"):
                    raise _NotPlainError  # one half forbids the properties of the other
            for key, value in inner.items():
                merged[key] = _joined(key, merged[key], value) if key in merged else value
        return merged

    @contextlib.contextmanager
    def _deeper(self) -> Iterator[None]:
        """One part more, within another; both are bounded."""
        self._left -= 1
        self._depth += 1
        if self._left < 0 or self._depth > _DEEPEST_PART:
            raise _NotPlainError
        yield
        self._depth -= 1

    def _referred(self, reference: Any) -> Any:
        """What a reference within the schema leads to."""
        found: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise _NotPlainError
        for step in reference[2:].split("/") if len(reference) > 1 else ():
            found = _mapping(found).get(step.replace("~1", "/").replace("~0", "~"))
        return found


def _take_bounds(plain: JSONObject) -> None:
    """OpenAPI 3.0 says of a bound by true or false whether it is itself meant."""
    for bound in ("minimum", "maximum"):
        name = "exclusive" + bound.capitalize()
        if isinstance(plain.get(name), bool) and plain.pop(name) and bound in plain:
            plain[name] = plain.pop(bound)


def _plain_schema(schema: Mapping[str, Any], *, exact: bool = False) -> JSONObject | None:
    """A schema written out in full; None where it cannot be."""
    try:
        return _SchemaReader(schema, exact=exact).plain(schema)
    except _NotPlainError:
        return None


def _kinds_of(part: Mapping[str, Any]) -> list[Any]:
    kind = part.get("type")
    return kind if isinstance(kind, list) else [kind]


def _nullable(plain: JSONObject) -> JSONObject:
    """The same, or null."""
    if _takes_null(plain):
        return plain
    if plain.keys() <= {"anyOf", "description"} and "anyOf" in plain:
        return {**plain, "anyOf": [*plain["anyOf"], {"type": "null"}]}
    if plain.keys() & {"enum", "const", "anyOf", "oneOf"} or "type" not in plain:
        words = {key: plain[key] for key in ("description",) if key in plain}
        bare = {key: value for key, value in plain.items() if key != "description"}
        return {**words, "anyOf": [bare, {"type": "null"}]}
    return {**plain, "type": [*_kinds_of(plain), "null"]}


def _takes_null(plain: Any) -> bool:
    """Whether null is a value of a schema that is written out."""
    part = _mapping(plain)
    options = _objects(part.get("anyOf")) or _objects(part.get("oneOf"))
    return (
        ("type" not in part or "null" in _kinds_of(part))
        and ("const" not in part or part["const"] is None)
        and (not isinstance(part.get("enum"), list) or None in part["enum"])
        and (not options or any(map(_takes_null, options)))
    )


def _joined(key: str, one: Any, other: Any) -> Any:
    """A keyword of two schemas that both hold."""
    if one == other or key in ("title", "description", "default", "examples", "$defs", "definitions"):
        return other
    if key == "properties" and not _mapping(one).keys() & _mapping(other).keys():
        return {**_mapping(one), **_mapping(other)}
    if key == "required" and isinstance(one, list) and isinstance(other, list):
        return [*one, *(name for name in other if name not in one)]
    raise _NotPlainError


def _without_nulls_of(value: Any, schema: Any) -> Any:
    """Arguments without the nulls that stand for "not given"; `schema` is written out.

    Of several schemas the first counts for which the value is right then.
    """
    part = _mapping(schema)
    options = _objects(part.get("anyOf")) or _objects(part.get("oneOf"))
    if options and isinstance(value, dict | list):
        cleaned = ((_without_nulls_of(value, option), option) for option in options)
        return next((plain for plain, option in cleaned if not _problem_with(plain, option)), value)
    if isinstance(value, list):
        return [_without_nulls_of(entry, part.get("items")) for entry in value]
    if not isinstance(value, dict):
        return value
    properties, required = _mapping(part.get("properties")), _strings(part.get("required"))
    return {
        name: _without_nulls_of(inner, properties.get(name))
        for name, inner in value.items()
        if inner is not None or name in required or name not in properties or _takes_null(properties[name])
    }


def _problem_with(value: Any, schema: Mapping[str, Any]) -> str:
    """What is wrong with a value by its schema, written out; nothing where that makes no sense."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:  # it comes with Open WebUI
        return _kind_problem(value, schema)
    try:
        errors = Draft202012Validator(dict(schema)).iter_errors(value)
        error = next((error for error in errors if not _is_forgiven(error)), None)
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RecursionError):
        return ""
    if error is None:
        return ""
    return f"{'.'.join(map(str, error.absolute_path)) or 'they'}: {error.message[:300]}"


def _kind_problem(value: Any, schema: Mapping[str, Any]) -> str:
    """The first argument of a wrong kind; what may be of several is not looked at."""
    for name, part in _mapping(schema.get("properties")).items():
        kind = _mapping(part).get("type")
        wanted = _KIND_TYPES.get(kind) if isinstance(kind, str) else None
        given = _mapping(value).get(name)
        is_number = isinstance(given, str | int | float) and kind in ("string", "integer", "number")
        if wanted is not None and name in _mapping(value) and not (isinstance(given, wanted) or is_number):
            return f"{name}: it is not of type {kind}"
    return ""


_KIND_TYPES: Final = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def _is_forgiven(error: Any) -> bool:
    """Whether the host puts a value right: numbers as texts, and texts as numbers."""
    if error.validator in ("anyOf", "oneOf"):
        options: dict[Any, list[Any]] = {}
        for inner in error.context:
            options.setdefault(inner.relative_schema_path[0], []).append(inner)
        return any(all(map(_is_forgiven, inner)) for inner in options.values())
    if error.validator != "type":
        return False
    wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
    if isinstance(error.instance, str):
        is_number = error.instance.strip().removeprefix("-").isdecimal()
        return is_number and any(kind in ("integer", "number") for kind in wanted)
    return "string" in wanted and _is_number(error.instance)


# ── 5. Session logging ───────────────────────────────────────────────────────
# Lines that know whose they are: kept for a while, and written without anybody waiting for it.
# Promise: a log that is slow or broken holds up no chat; what people see of it holds no key and no id.
# Doc: docs/session_logging.md   Tests: tests/test_session_logging.py


class LogContext(NamedTuple):
    """Whose lines these are. `level` is the least that goes to the server's log, `owner` takes them."""

    session: str = ""
    user: str = ""
    request: str = ""
    level: int = logging.INFO
    owner: Any = None

    @property
    def marks(self) -> str:
        """What stands at the end of each line; nothing where it is nobody's."""
        named = {"request": self.request, "user": self.user, "session": self.session}
        words = ", ".join(f"{name} {_printable(value[:64])}" for name, value in named.items() if value)
        return f" [{words}]" if self.request else ""


_LOG_CONTEXT: Final = contextvars.ContextVar("openrouter_log", default=LogContext())  # noqa: B039 - a tuple


def _nobodys_context() -> contextvars.Context:
    """For what serves all: it is of no request, although one may have begun it."""
    context = contextvars.copy_context()
    context.run(_LOG_CONTEXT.set, LogContext())
    return context


class LogLine(NamedTuple):
    """A line of a request; `created` is in seconds since 1970."""

    request: str
    created: float
    level: str
    text: str


class SessionLog(NamedTuple):
    """The latest lines of one session, and when it was used by the logger's clock."""

    lines: deque[LogLine]
    used_at: float


class SessionLogger(logging.Handler):
    """Takes the lines of `LOGGER`: into the ring of their session at once, to the server's log by a thread.

    Rings have every line, the server's log those of `level` and above. `clock` gives seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.logs: OrderedDict[tuple[str, str], SessionLog] = OrderedDict()  # by user and session
        self.least = logging.INFO  # of lines that are of no request
        self._clock = clock
        self._waiting: queue.Queue[logging.LogRecord | threading.Event | None] = queue.Queue(_MOST_LOG_LINES)
        self._dropped = 0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def bind(self, context: LogContext, most_lines: int) -> Iterator[None]:
        """What is logged inside, also by tasks that are made there, is of `context`."""
        self.cleanup()
        key = context.user, context.session
        known = self.logs.pop(key, None)
        lines = known.lines if known is not None else deque[LogLine]()
        if lines.maxlen != most_lines:
            lines = deque(lines, most_lines)
        self.logs[key] = SessionLog(lines, self._clock())
        token = _LOG_CONTEXT.set(context._replace(owner=self))
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # thrown away together with its loop, from elsewhere
                _LOG_CONTEXT.reset(token)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line; of several loggers (of a runtime that ends and one that has begun) only one does."""
        context = _LOG_CONTEXT.get()
        there = [handler for handler in LOGGER.handlers if isinstance(handler, SessionLogger)]
        if self is not (context.owner if context.owner in there else there[0]):
            return
        text, key = record.getMessage(), (context.user, context.session)
        log = self.logs.pop(key, None) if context.request else None
        if log is not None:
            lines = "\n".join(filter(None, (text, _traceback_of(record))))
            log.lines.append(LogLine(context.request, record.created, record.levelname, lines))
            self.logs[key] = log._replace(used_at=self._clock())  # to the end: it is in use
        if record.levelno >= (context.level if context.request else self.least):
            self._enqueue(record, text + context.marks)

    def _enqueue(self, record: logging.LogRecord, text: str) -> None:
        """Hand a line to the thread; where it does not come along, lines are dropped and counted."""
        line = copy.copy(record)
        line.msg, line.args, line.exc_text = text, None, _traceback_of(record) or None
        if self._dropped:
            line.msg = f"{text} (before this line {self._dropped} were dropped: the log is too slow)"
        try:
            self._waiting.put_nowait(line)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def flush_for_citation(self, context: LogContext) -> str:
        """The lines of one request for people to read: without keys, ids and addresses."""
        log = self.logs.get((context.user, context.session))
        lines = [line for line in list(log.lines) if line.request == context.request] if log else []
        text = "\n".join(map(_as_read, lines))
        for own in (context.user, context.session):
            text = text.replace(own, "[…]") if len(own) > _SHORT_ID_CHARS else text
        return _UUID_RE.sub("[…]", _IDS_RE.sub("[…]", text))

    def cleanup(self) -> None:
        """Forget sessions that nobody has used for an hour, and the oldest of very many."""
        before = self._clock() - _SESSION_LOG_S
        while self.logs and (
            len(self.logs) > _MOST_SESSION_LOGS or next(iter(self.logs.values())).used_at < before
        ):
            self.logs.popitem(last=False)

    def start(self) -> None:
        """Take over from the loggers of the server, and write to them from a thread. Idempotent."""
        if self not in LOGGER.handlers:
            self._waiting = queue.Queue(_MOST_LOG_LINES)
            self._thread = threading.Thread(
                target=self._run, args=(self._waiting,), name="openrouter log", daemon=True
            )
            self._thread.start()
            LOGGER.addHandler(self)

    def stop(self) -> None:
        """Take nothing more; the thread ends when it has written what waits. Idempotent."""
        is_told = self not in LOGGER.handlers
        LOGGER.removeHandler(self)
        while not is_told:
            with contextlib.suppress(queue.Full, queue.Empty):  # where the log hangs, the oldest makes room
                if self._waiting.full():
                    self._waiting.get_nowait()
                self._waiting.put_nowait(None)
                is_told = True

    def flush(self) -> None:
        """Wait until what was logged before is written, for a second at most."""
        if self._thread is not None and self not in LOGGER.handlers:
            self._thread.join(_LOG_FLUSH_S)
        elif self._thread is not None:
            written = threading.Event()
            with contextlib.suppress(queue.Full):
                self._waiting.put(written, timeout=_LOG_FLUSH_S)
                written.wait(_LOG_FLUSH_S)

    # Three functions deep, so that the server's log finds one of this file where it looks for the caller.
    def _run(self, waiting: queue.Queue[logging.LogRecord | threading.Event | None]) -> None:
        while (line := waiting.get()) is not None:
            self._write(line)

    def _write(self, line: logging.LogRecord | threading.Event) -> None:
        if isinstance(line, threading.Event):
            line.set()
            return
        try:
            LOGGER.pass_on(line)
        except Exception:  # a handler of the server's that raises: the next line may fare better
            self.handleError(line)


def _traceback_of(record: logging.LogRecord) -> str:
    if record.exc_info is None or record.exc_info[0] is None:
        return ""
    lines = "".join(traceback.format_exception(*record.exc_info)).splitlines()
    return "\n".join(f"    {_printable(line)}" for line in lines)


def _as_read(line: LogLine) -> str:
    clock = time.strftime("%H:%M:%S", time.gmtime(line.created))
    text, half = line.text, _MOST_LINE_CHARS // 2
    if len(text) > _MOST_LINE_CHARS:  # the end of a traceback says what it was
        text = f"{text[:half]} […] {text[-half:]}"
    return f"{clock}.{int(line.created % 1 * 1000):03} {line.level} {text}"


_MOST_LOG_LINES: Final = 10_000  # that wait for the server's log
_MOST_LINE_CHARS: Final = 4_000
_MOST_SESSION_LOGS: Final = 1_500  # more than may run and wait
_SHORT_ID_CHARS: Final = 5  # could be any word
_SESSION_LOG_S: Final = 3600.0
_LOG_FLUSH_S: Final = 1.0


# ── 6. Valves ────────────────────────────────────────────────────────────────
# What an administrator and a user may set, and what the environment decides.
# Promise: a stored value that no longer fits neither raises nor vanishes.
# Doc: docs/valves_and_configuration_atlas.md   Tests: tests/test_valves.py


class HostEnvironment(NamedTuple):
    """What the host's environment decides, read once. `secret` seals valves; may be empty."""

    secret: str = ""
    webui_url: str = ""
    has_redis: bool = False
    workers: int = 1

    def __repr__(self) -> str:
        return f"HostEnvironment({self.webui_url})"  # never the secret

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> HostEnvironment:
        """Read the variables that Open WebUI itself reads."""
        secret = environ.get("WEBUI_SECRET_KEY") or environ.get("WEBUI_JWT_SECRET_KEY") or ""
        workers = environ.get("UVICORN_WORKERS", "1")
        return cls(
            secret=secret,
            webui_url=environ.get("WEBUI_URL", "").rstrip("/"),
            has_redis=bool(environ.get("REDIS_URL") or environ.get("REDIS_SENTINEL_HOSTS")),
            workers=int(workers) if workers.isdecimal() else 1,
        )


class _LenientModel(BaseModel):
    """Valves that load whatever was stored: numbers are clamped, what else does not fit is set aside.

    A value set aside is not used (its valve has the default) but stays in the dump as it was stored.
    """

    _set_aside: JSONObject = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _never_raise(cls, stored: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(stored)
        except ValidationError as exc:
            wrong = {str(error["loc"][0]) for error in exc.errors() if error["loc"]}
        usable, aside = dict(stored), {}
        for name in wrong:
            value = usable.pop(name)
            clamped = _clamp(cls.model_fields[name], value)
            if clamped is None:
                aside[name] = value
            else:
                usable[name] = clamped
        model = handler(usable)
        model._set_aside = aside
        return model

    @field_validator("API_KEY", "ARTIFACT_ENCRYPTION_KEY", mode="after", check_fields=False)
    @classmethod
    def _seal(cls, value: EncryptedStr) -> EncryptedStr:
        return EncryptedStr.encrypt(value, HostEnvironment.read().secret)

    def model_dump(self, **options: Any) -> JSONObject:
        """What the host stores: the values in use, and those set aside as they were."""
        return super().model_dump(**options) | self._set_aside

    def problems(self) -> list[str]:
        """The names of valves whose stored value is not used."""
        return list(self._set_aside)


def _clamp(valve: FieldInfo, value: Any) -> int | float | None:
    """`value` as a number within the bounds of `valve`; None where it, or the valve, is no number."""
    limits = [(getattr(bound, "ge", None), getattr(bound, "le", None)) for bound in valve.metadata]
    low = max((low for low, _ in limits if low is not None), default=None)
    high = min((high for _, high in limits if high is not None), default=None)
    if low is None or high is None or isinstance(value, bool):
        return None
    try:
        number = min(max(float(value), low), high)
    except OverflowError:
        number = high if value > 0 else low
    except (TypeError, ValueError):
        return None
    if math.isnan(number):
        return None
    return round(number) if valve.annotation is int else number


def _valve(default: Any, description: str, low: float | None = None, high: float | None = None) -> Any:
    return Field(default=default, description=description, ge=low, le=high)


def _secret(description: str) -> Any:
    """A valve that is sealed, and shown as a password."""
    shown: JSONObject = {"input": {"type": "password"}}
    return Field(default=EncryptedStr(""), description=description, json_schema_extra=shown)


class _ConnectionValves:
    # The groups are plain classes: only the model at their end is built, once.
    API_KEY: EncryptedStr = _secret("OpenRouter API key (sk-or-…); encrypted if WEBUI_SECRET_KEY is set.")
    BASE_URL: str = _valve("https://openrouter.ai/api/v1", "Address of the API.")
    ALLOW_USER_API_KEYS: bool = _valve(False, "Let users enter a key of their own.")
    CONNECT_TIMEOUT_SECONDS: int = _valve(10, "Seconds to wait for a connection.", 1, 60)
    TIMEOUT: int = _valve(300, "Seconds of silence after which a request counts as failed.", 10, 3600)
    REQUEST_DEADLINE_SECONDS: int = _valve(3600, "Seconds for one whole answer; 0 = no limit.", 0, 86400)
    RETRY_ATTEMPTS: int = _valve(3, "Further tries after a passing failure, while nothing was shown.", 0, 10)
    RETRY_MAX_WAIT_SECONDS: int = _valve(30, "Longest wait before a try; a longer one is an error.", 1, 300)
    APP_URL: str = _valve("", "Sent as HTTP-Referer; empty = Open WebUI's own address.")
    APP_TITLE: str = _valve("Open WebUI", "Sent as the application's name.")
    APP_CATEGORIES: str = _valve(
        "general-chat", "What the application is for, in OpenRouter's terms: a comma list of two at most."
    )
    SUPPORT_CONTACT: str = _valve("", "Whom to ask for help; shown under error messages.")


class _ModelValves(_ConnectionValves):
    MODEL_ID: str = _valve("auto", "Models of the menu: auto = all, or a comma list of ids, * allowed.")
    EXCLUDE_KEYWORDS: str = _valve("", "A comma list: models with such a word in id or name are left out.")
    FREE_MODEL_FILTER: Literal["all", "only", "exclude"] = _valve(
        "all", "Free models: show all models, only the free ones, or none of them."
    )
    TOOL_CALLING_FILTER: Literal["all", "only", "exclude"] = _valve(
        "all", "Models that can call tools: show all, only these, or none of them."
    )
    ZDR_MODELS_ONLY: bool = _valve(
        False,
        "Only models that a provider without data retention serves (which one answers, the account's "
        "settings at OpenRouter decide).",
    )
    MIN_CONTEXT: int = _valve(0, "Smallest context of a model shown, in tokens; 0 = any.", 0, 100_000_000)
    MAX_PRICE: float = _valve(
        0.0,
        "Highest price of a model shown, in US dollars per million output tokens; 0 = any.",
        0.0,
        1_000_000.0,
    )
    HIDE_EXPIRING_DAYS: int = _valve(0, "Leave out models that go away within these days; 0 = none.", 0, 365)
    VARIANT_MODELS: str = _valve(
        "",
        "Models shown besides, filters or not: a comma list of ids with a shortcut or preset, such as "
        "openai/gpt-5:nitro or @preset/brief.",
    )
    MODEL_SORT: Literal["name", "newest", "price", "context"] = _valve(
        "name", "Order of the menu: by name, newest, cheapest or largest context first."
    )
    MODEL_NAME_FORMAT: str = _valve(
        "{name}", "Name of a model in the menu; filled in: {name}, {id}, {vendor}, {price}, {context}."
    )
    MODEL_CATALOG_REFRESH_SECONDS: int = _valve(3600, "Seconds until the model list is renewed.", 60, 86400)
    ACCOUNT_MODELS_ONLY: bool = _valve(
        False, "Only models that the privacy and provider settings of the key's account allow."
    )
    SYNC_MODEL_METADATA: Literal["off", "capabilities", "all"] = _valve(
        "capabilities",
        "What Open WebUI is told of each model in the menu. capabilities: what it can do; all: also "
        "description, price, tags and an icon. What you change there stays; off takes everything back.",
    )
    NEW_MODEL_ACCESS: Literal["admins", "everyone"] = _valve(
        "admins",
        "Who sees the models whose access nobody has set in Open WebUI; with SYNC_MODEL_METADATA off, "
        "administrators only.",
    )


class _StreamingValves(_ModelValves):
    STREAMING_UPDATE_PROFILE: Literal["auto", "quick", "normal", "slow", "custom"] = _valve(
        "auto", "How often text reaches the page. auto = at once; custom = the two valves below."
    )
    STREAMING_UPDATE_CHAR_LIMIT: int = _valve(20, "Profile custom: so many letters leave at once.", 10, 500)
    STREAMING_IDLE_FLUSH_MS: int = _valve(250, "Profile custom: milliseconds that fewer may wait.", 0, 2000)
    SHOW_THINKING: bool = _valve(True, "Show the model's reasoning.")
    SHOW_FINAL_USAGE_STATUS: bool = _valve(True, "Show time, tokens and cost when an answer is complete.")
    STREAMING_CHUNK_QUEUE_MAXSIZE: int = _valve(100, "Network reads of an answer that may wait.", 1, 10_000)
    STREAMING_EVENT_QUEUE_MAXSIZE: int = _valve(100, "Decoded reads that may wait for others.", 1, 10_000)
    SSE_WORKERS_PER_REQUEST: int = _valve(2, "Decoders at work for one answer with large pictures.", 1, 8)
    FORCE_CHAT_COMPLETIONS_MODELS: str = _valve(
        "", "Models that are asked over Chat Completions instead: a comma list of ids, * allowed."
    )
    ERROR_TEMPLATES: str = _valve(
        "",
        "Own words for errors, a JSON map: authentication, credits, rate_limit, moderation, provider, "
        "network, timeout or internal to a text with {title}, {message}, {advice}, {id}, {contact}.",
    )


class _RequestValves(_StreamingValves):
    REASONING_EFFORT: Literal["", "none", "minimal", "low", "medium", "high", "xhigh", "max"] = _valve(
        "", "How long models think, where the chat does not say; empty = their own default."
    )
    REASONING_SUMMARY: Literal["auto", "concise", "detailed", "off"] = _valve(
        "auto", "The summary of its thinking that a model is asked for."
    )
    PERSIST_REASONING: Literal["off", "next_reply", "conversation"] = _valve(
        "conversation",
        "How long models get their own earlier thinking back: never, for one reply, or always.",
    )
    USE_MODEL_MAX_OUTPUT_TOKENS: bool = _valve(
        False, "Ask for as many output tokens as the model can write, where a chat does not say."
    )
    UNSUPPORTED_PARAMETERS: Literal["drop", "use_chat_completions"] = _valve(
        "drop",
        "Parameters that only Chat Completions has (stop, seed, min_p …): leave them out, or send such "
        "requests there.",
    )
    MAX_INPUT_IMAGES_PER_REQUEST: int = _valve(20, "The latest pictures of a request; 0 = none.", 0, 100)
    IMAGE_INPUT_SELECTION: Literal["user_only", "user_then_assistant"] = _valve(
        "user_then_assistant",
        "Which: those of people, or also those that earlier answers show, where there is room.",
    )
    NATIVE_FILES: Literal["off", "supported", "always"] = _valve(
        "off",
        "Files attached to a chat: leave them to Open WebUI's search (off), give them whole to models "
        "that read files (supported), or to all models, by OpenRouter's parser (always).",
    )
    PDF_ENGINE: Literal["auto", "native", "mistral-ocr", "cloudflare-ai"] = _valve(
        "auto", "Who reads PDF files: OpenRouter's choice, the model itself, or a service."
    )
    BASE64_MAX_SIZE_MB: int = _valve(
        50, "Largest picture, file or recording that a chat may hold, in MB.", 1, 500
    )
    VIDEO_MAX_SIZE_MB: int = _valve(100, "Largest film that a chat may hold, in MB.", 1, 500)
    SAVE_REMOTE_MEDIA: bool = _valve(
        True,
        "Keep what a chat names by an address among the person's files, so that the chat can go on when"
        " the address is gone; off = OpenRouter fetches it each time.",
    )
    REMOTE_FILE_MAX_SIZE_MB: int = _valve(
        _REMOTE_FILE_MAX_SIZE_DEFAULT_MB,
        "Largest file that is fetched from an address, in MB; of films VIDEO_MAX_SIZE_MB counts.",
        1,
        500,
    )
    ALLOW_HTTP_HOSTS: str = _valve(
        "",
        "Servers that files may be fetched from over plain http, or inside your network: a comma list "
        "of names, or name:port.",
    )
    USER_REQUEST_FIELDS: str = _valve(
        "",
        "Fields of OpenRouter's that people may set themselves, a comma list, * allowed: models, "
        "plugins, service_tier, session_id, user, safety_identifier, metadata, trace, "
        "stop_server_tools_when.",
    )
    PROMPT_CACHING: Literal["auto", "off"] = _valve(
        "auto", "Let Anthropic's models keep the chat so far, which makes long chats cheaper."
    )
    PROMPT_CACHE_TTL: Literal["5m", "1h"] = _valve("5m", "How long they keep it; an hour is dearer to write.")
    SEND_IDENTIFIERS: Literal["none", "hashed", "plain"] = _valve(
        "hashed", "How OpenRouter may tell people and chats apart: not at all, by pseudonyms or by ids."
    )


class _ToolValves(_RequestValves):
    ENABLE_TOOLS: bool = _valve(True, "Offer tools to models that can call them.")
    AVAILABLE_TOOLS: str = _valve("all", "All, or a comma list of names, * allowed (get_*, search_web).")
    TOOL_EXECUTION_MODE: Literal["auto", "pipe", "open_webui"] = _valve(
        "auto",
        "Who runs what a model calls: this function, several at once, except for what needs Open WebUI "
        "(auto); the same, and tools of the browser too (pipe); Open WebUI, one after another.",
    )
    STRICT_TOOL_SCHEMAS: bool = _valve(False, "Make models keep to a tool's schema, where that can be said.")
    MAX_FUNCTION_CALL_LOOPS: int = _valve(25, "Rounds of tools; then the model has to answer.", 1, 200)
    MAX_PARALLEL_TOOLS_GLOBAL: int = _valve(200, "Tools that run at the same time, of all answers.", 1, 2000)
    MAX_PARALLEL_TOOLS_PER_REQUEST: int = _valve(5, "Tools that run at the same time, of one answer.", 1, 50)
    TOOL_TIMEOUT_SECONDS: int = _valve(60, "What one call may take, in seconds.", 1, 3600)
    TOOL_BATCH_TIMEOUT_SECONDS: int = _valve(120, "What all calls of a round may take, in seconds.", 1, 3600)
    TOOL_BREAKER_FAILURES: int = _valve(5, "Failures in the window that let a tool be left alone.", 1, 100)
    TOOL_BREAKER_WINDOW_SECONDS: int = _valve(60, "The window; it is left alone as long.", 1, 3600)
    MAX_TOOL_OUTPUT_CHARS: int = _valve(
        100_000,
        "What a model gets of one result, in characters; the middle of more is left out.",
        1000,
        2_000_000,
    )
    TOOL_OUTPUT_RETENTION_TURNS: int = _valve(
        10, "For so many questions results stay whole, then they are shortened; 0 = for ever.", 0, 1000
    )


class _StorageValves(_ToolValves):
    ENABLE_ARTIFACT_STORE: bool = _valve(
        True,
        "Keep what models need to get back (their thinking) in a table of Open WebUI's database; off = "
        "with the messages of a chat, where only little fits.",
    )
    PERSIST_TOOL_RESULTS: bool = _valve(
        True, "Keep also what tools of OpenRouter's own need to get back, such as an advisor."
    )
    ARTIFACT_ENCRYPTION_KEY: EncryptedStr = _secret(
        "Secret that seals it; empty = the server's WEBUI_SECRET_KEY. A comma list: the first seals, "
        "the others still open what they have sealed."
    )
    ENCRYPT_ARTIFACTS: Literal["off", "reasoning", "all"] = _valve(
        "reasoning", "What of it is sealed: nothing, thinking, or everything."
    )
    ENABLE_LZ4_COMPRESSION: bool = _valve(
        True, "Compress with LZ4 where the server has it (faster), else with zlib."
    )
    MIN_COMPRESS_BYTES: int = _valve(256, "What is smaller, in bytes, is not compressed.", 0, 1_000_000)
    DB_BATCH_SIZE: int = _valve(10, "Rows written to the database at once, where several wait.", 1, 500)
    ARTIFACT_CLEANUP_DAYS: int = _valve(90, "What is unused for so many days is deleted; 0 = never.", 0, 3650)
    ARTIFACT_CLEANUP_INTERVAL_HOURS: float = _valve(1.0, "Hours from one clean-up to the next.", 0.1, 168)
    ENABLE_REDIS_CACHE: Literal["auto", "on", "off"] = _valve(
        "auto", "Write through Open WebUI's Redis, where it has one: with several workers, or always."
    )
    REDIS_CACHE_TTL_SECONDS: int = _valve(600, "Seconds that Redis keeps what was written.", 1, 86400)
    REDIS_PENDING_WARN_THRESHOLD: int = _valve(100, "The log warns of more rows in Redis.", 1, 1_000_000)


class _OperationValves(_StorageValves):
    MAX_CONCURRENT_REQUESTS: int = _valve(500, "Answers written at once; 500 more may wait.", 1, 5000)
    MAX_CONCURRENT_REQUESTS_PER_USER: int = _valve(
        0, "Of these, answers for one person; further ones wait. 0 = no limit.", 0, 5000
    )
    MAX_CONCURRENT_TASKS: int = _valve(20, "Titles, tags and the like written at once, besides.", 1, 500)
    ENABLE_STARTUP_CHECKS: bool = _valve(True, "Ask at the start whether OpenRouter takes the key.")
    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _valve(
        "INFO", "Which lines go to the server's log: these and more serious ones."
    )
    SESSION_LOG_MAX_LINES: int = _valve(
        2000,
        "Lines of each session that are kept in memory for an hour, for when something fails.",
        100,
        20_000,
    )
    SHOW_ERROR_LOG_CITATION: Literal["off", "admins", "everyone"] = _valve(
        "admins", "Who gets the log of a request that failed, under its error, without keys and ids."
    )
    DEBUG: bool = _valve(False, "Print the log of each request to the console of the browser.")


class Valves(_OperationValves, _LenientModel):
    """What an administrator may set (Admin Panel → Functions → valves)."""


class UserValves(_LenientModel):
    """What each user may set for themselves; `inherit` keeps the administrator's value."""

    API_KEY: EncryptedStr = _secret("Your own OpenRouter key, used if the administrator allows it.")
    STREAMING_UPDATE_PROFILE: Literal["inherit", "auto", "quick", "normal", "slow", "custom"] = _valve(
        "inherit", "How often text reaches the page."
    )
    STREAMING_UPDATE_CHAR_LIMIT: Literal["inherit"] | int = _valve(
        "inherit", "Profile custom: so many characters (10 to 500) leave at once."
    )
    STREAMING_IDLE_FLUSH_MS: Literal["inherit"] | int = _valve(
        "inherit", "Profile custom: so many milliseconds (0 to 2000) fewer characters may wait."
    )
    REASONING_EFFORT: Literal["inherit", "none", "minimal", "low", "medium", "high", "xhigh", "max"] = _valve(
        "inherit", "How long models think, where the chat does not say."
    )
    PERSIST_REASONING: Literal["inherit", "off", "next_reply"] = _valve(
        "inherit", "Give the model its earlier thinking back: never, or for one reply only."
    )
    ENABLE_TOOLS: Literal["inherit", "off"] = _valve("inherit", "Offer no tools to models.")
    SHOW_THINKING: Literal["inherit", "on", "off"] = _valve("inherit", "Show the model's reasoning.")
    SHOW_FINAL_USAGE_STATUS: Literal["inherit", "on", "off"] = _valve(
        "inherit", "Show time, tokens and cost when an answer is complete."
    )
    LOG_LEVEL: Literal["inherit", "DEBUG", "INFO", "WARNING", "ERROR"] = _valve(
        "inherit", "Which lines of your requests go to the server's log."
    )
    DEBUG: Literal["inherit", "on", "off"] = _valve(
        "inherit", "Print the log of your requests to the console of the browser."
    )


def _merge_user_valves(valves: Valves, user_valves: Any, is_admin: bool = False) -> Valves:
    """`valves` with what a user has set in place of `inherit`; what does not fit is ignored.

    `user_valves` is the host's `UserValves` object, of this load of the file or an earlier one.
    """
    changes: JSONObject = {}
    for name in UserValves.model_fields:
        value = getattr(user_valves, name, "inherit")
        if value in ("inherit", "", None):
            continue
        if name == "API_KEY" and not valves.ALLOW_USER_API_KEYS:
            continue
        if name in _ADMIN_VALVES and not is_admin:
            continue
        value = _SWITCHES.get(value, value) if name in _SWITCH_VALVES else value
        if name == "PERSIST_REASONING" and valves.PERSIST_REASONING == "off":
            continue  # a person may only keep less
        clamped = _clamp(Valves.model_fields[name], value)
        changes[name] = value if clamped is None else clamped
    return valves.model_copy(update=changes) if changes else valves


def _resolve_valves(valves: Valves, user_valves: Any = None, is_admin: bool = False) -> Valves:
    """The settings of one request: the administrator's, then the user's own."""
    return _merge_user_valves(valves, user_valves, is_admin)


def _connection(valves: Valves, env: HostEnvironment) -> Connection:
    """Where and how a request with these valves goes out (reference §2).

    Raises:
        ConfigurationError: there is no key, or the address is none.
    """
    key = EncryptedStr(valves.API_KEY).decrypt(env.secret).strip()
    if not key:
        raise ConfigurationError(
            "No OpenRouter API key is set. An administrator can enter one under "
            "Admin Panel → Functions, in the valves of this function (API_KEY)."
        )
    base_url = valves.BASE_URL.strip().rstrip("/")
    if not _is_http_address(base_url):
        raise ConfigurationError(
            "The valve BASE_URL is not an http(s) address; an administrator has to correct it."
        )
    named = {
        "HTTP-Referer": valves.APP_URL or env.webui_url,
        "X-OpenRouter-Title": valves.APP_TITLE,
        "X-OpenRouter-Categories": valves.APP_CATEGORIES,
    }
    headers = tuple((name, clean) for name, text in named.items() if (clean := _header_value(text)))
    return Connection(
        base_url=base_url,
        key=_header_value(key),
        headers=headers,
        connect_timeout_s=float(valves.CONNECT_TIMEOUT_SECONDS),
        idle_timeout_s=float(valves.TIMEOUT),
    )


def _pseudonym(secret: str, kind: str, plain: str) -> str:
    """An id that tells nobody outside who or what it is, and is the same each time."""
    return hmac.new(secret.encode(), f"{kind} {plain}".encode(), hashlib.sha256).hexdigest()[:32]


def _request_settings(
    valves: Valves, request: ChatRequest, spec: ModelSpec, env: HostEnvironment, *, offer_tools: bool
) -> RequestSettings:
    """What the valves decide about one request, identifiers included (reference §3)."""
    ids = {"user": request.user_id, "chat": request.chat_id}
    if valves.SEND_IDENTIFIERS == "hashed":
        ids = {kind: _pseudonym(env.secret, kind, plain) for kind, plain in ids.items() if plain}
    elif valves.SEND_IDENTIFIERS == "none":
        ids = {}
    is_task = request.is_task
    caches = valves.PROMPT_CACHING == "auto" and spec.vendor == "anthropic" and not is_task
    return RequestSettings(
        offer_tools=offer_tools and valves.ENABLE_TOOLS,
        available_tools=valves.AVAILABLE_TOOLS,
        strict_tools=valves.STRICT_TOOL_SCHEMAS,
        most_tool_chars=valves.MAX_TOOL_OUTPUT_CHARS,
        retain_outputs=valves.TOOL_OUTPUT_RETENTION_TURNS,
        is_task=is_task,
        effort=valves.REASONING_EFFORT,
        summary=valves.REASONING_SUMMARY,
        whole_output=valves.USE_MODEL_MAX_OUTPUT_TOKENS and not is_task,
        # Keeps a chat with the provider that has it in its cache; it says nothing of anybody.
        session_id=_pseudonym(env.secret, "session", request.chat_id) if request.chat_id else "",
        user=ids.get("user", ""),
        metadata={"chat_id": ids["chat"]} if ids.get("chat") else {},
        cache_ttl=valves.PROMPT_CACHE_TTL if caches else "",
        replay=valves.PERSIST_REASONING,
        most_images=valves.MAX_INPUT_IMAGES_PER_REQUEST,
        most_bytes=valves.BASE64_MAX_SIZE_MB * _MEGABYTE,
        most_video_bytes=valves.VIDEO_MAX_SIZE_MB * _MEGABYTE,
        most_remote_bytes=valves.REMOTE_FILE_MAX_SIZE_MB * _MEGABYTE,
        answer_images=valves.IMAGE_INPUT_SELECTION == "user_then_assistant",
        native_files="off" if is_task else valves.NATIVE_FILES,
        keeps_media=valves.SAVE_REMOTE_MEDIA and _is_kept_chat(request.chat_id) and not is_task,
        trusted_hosts=frozenset(filter(None, map(str.strip, valves.ALLOW_HTTP_HOSTS.split(",")))),
        webui_url=env.webui_url,
        pdf_engine="" if valves.PDF_ENGINE == "auto" else valves.PDF_ENGINE,
    )


class ArtifactSettings(NamedTuple):
    """How artifacts are kept; `cipher` also seals what rides with the messages of a chat."""

    cipher: ArtifactCipher
    is_on: bool = True
    keeps_tool_results: bool = True
    sealed_kinds: Container[str] = frozenset({"turn"})
    uses_lz4: bool = True
    least_compressed: int = 256
    batch: int = 10
    keep_s: float = 90 * 86400.0  # since it was last used; 0: for ever
    cleanup_s: float = 3600.0
    uses_redis: bool = False
    redis_ttl_s: int = 600
    redis_warn_at: int = 100


def _artifact_settings(valves: Valves, env: HostEnvironment, pipe_id: str) -> ArtifactSettings:
    """What the valves decide about artifacts."""
    try:
        own = EncryptedStr(valves.ARTIFACT_ENCRYPTION_KEY).decrypt(env.secret)
    except ConfigurationError:  # sealed with a secret that the server does not have any more
        own = ""
    has_several = env.workers > 1 or valves.ENABLE_REDIS_CACHE == "on"
    return ArtifactSettings(
        cipher=_artifact_cipher(pipe_id, *filter(None, map(str.strip, own.split(","))), env.secret),
        is_on=valves.ENABLE_ARTIFACT_STORE,
        keeps_tool_results=valves.PERSIST_TOOL_RESULTS,
        sealed_kinds=_SEALED_KINDS[valves.ENCRYPT_ARTIFACTS],
        uses_lz4=valves.ENABLE_LZ4_COMPRESSION,
        least_compressed=valves.MIN_COMPRESS_BYTES,
        batch=valves.DB_BATCH_SIZE,
        keep_s=valves.ARTIFACT_CLEANUP_DAYS * 86400.0,
        cleanup_s=valves.ARTIFACT_CLEANUP_INTERVAL_HOURS * 3600,
        uses_redis=env.has_redis and has_several and valves.ENABLE_REDIS_CACHE != "off",
        redis_ttl_s=valves.REDIS_CACHE_TTL_SECONDS,
        redis_warn_at=valves.REDIS_PENDING_WARN_THRESHOLD,
    )


_SWITCHES: Final[dict[str, bool]] = {"on": True, "off": False}
_SWITCH_VALVES: Final = frozenset({"ENABLE_TOOLS", "SHOW_THINKING", "SHOW_FINAL_USAGE_STATUS", "DEBUG"})
_ADMIN_VALVES: Final = frozenset({"LOG_LEVEL", "DEBUG"})
_SEALED_KINDS: Final[dict[str, Container[str]]] = {
    "off": frozenset(),
    "reasoning": frozenset({"turn"}),
    "all": frozenset({"turn", "tool_output", "server_tool", "summary"}),
}


def _tool_limits(valves: Valves) -> ToolLimits:
    return ToolLimits(
        at_once=valves.MAX_PARALLEL_TOOLS_PER_REQUEST,
        at_once_everywhere=valves.MAX_PARALLEL_TOOLS_GLOBAL,
        timeout_s=float(valves.TOOL_TIMEOUT_SECONDS),
        batch_timeout_s=float(valves.TOOL_BATCH_TIMEOUT_SECONDS),
        most_chars=valves.MAX_TOOL_OUTPUT_CHARS,
        failures=valves.TOOL_BREAKER_FAILURES,
        window_s=float(valves.TOOL_BREAKER_WINDOW_SECONDS),
    )


def _is_kept_chat(chat_id: str) -> bool:
    """Whether the host keeps this chat: a temporary one, or a channel, leaves no traces."""
    return bool(chat_id) and not chat_id.startswith(("temporary:", "local:", "channel:"))


def _error_templates(valves: Valves) -> Mapping[str, str]:
    """The administrator's wordings; none where the valve holds no JSON map of texts."""
    try:
        templates = _json_loads(valves.ERROR_TEMPLATES) if valves.ERROR_TEMPLATES.strip() else {}
    except ValueError:
        templates = None
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        LOGGER.warning("The valve ERROR_TEMPLATES is no JSON map of texts; it is not used")
        return {}
    return templates


def _is_http_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _update_limits(valves: Valves) -> tuple[int, float]:
    """(characters, seconds) of the chosen streaming profile."""
    custom = (valves.STREAMING_UPDATE_CHAR_LIMIT, valves.STREAMING_IDLE_FLUSH_MS)
    chars, wait_ms = _STREAMING_PRESETS.get(valves.STREAMING_UPDATE_PROFILE, custom)
    return chars, wait_ms / 1000


# ── 7a. Host calls ───────────────────────────────────────────────────────────
# What Open WebUI does and keeps, each of its symbols where it is used.
# Promise: nothing here is imported before it is needed, and what may fail has words for it.
# Doc: docs/open_webui_compatibility.md   Tests: tests/test_host_seam.py


def _host(module: str, name: str = "") -> Any:
    """`from open_webui.<module> import <name>`, or the module, when it is needed; else ImportError."""
    found = importlib.import_module(f"open_webui.{module}")
    try:
        return getattr(found, name) if name else found
    except AttributeError:
        raise ImportError(f"cannot import name '{name}' from 'open_webui.{module}'") from None


def _model_row(row: Any) -> ModelRow:
    """A row as the host's own class holds it; what was never set is not there."""
    return ModelRow(
        id=row.id,
        name=row.name,
        meta=row.meta.model_dump(exclude_unset=True),
        params=row.params.model_dump(exclude_unset=True),
        grants=frozenset((g.principal_type, g.principal_id, g.permission) for g in row.access_grants),
        is_active=row.is_active,
        is_workspace=bool(row.base_model_id),
    )


def _model_form(row: ModelRow) -> Any:
    names = ("principal_type", "principal_id", "permission")
    grants = [dict(zip(names, grant, strict=True)) for grant in sorted(row.grants)]
    return _host("models.models", "ModelForm")(
        id=row.id,
        base_model_id=None,
        name=row.name,
        meta=dict(row.meta),
        params=dict(row.params),
        access_grants=grants,
        is_active=row.is_active,
        commit_message="OpenRouter's catalog",  # shown in the history of the model, where there is one
    )


@functools.lru_cache(maxsize=256)
def _badge(letters: str, colour: str) -> str:
    """A square with letters on a colour (`#rrggbb`) as a data URL; nothing where no picture can be made."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:  # it comes with Open WebUI, not with this file
        return ""
    pixels = 64
    size = 4 * pixels  # drawn large and made small: smooth edges
    picture = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((0, 0, size - 1, size - 1), radius=size // 4, fill=colour)
    font = ImageFont.load_default(size=size * (0.62 if len(letters) == 1 else 0.5))
    draw.text((size / 2, size / 2), letters, font=font, fill="white", anchor="mm", stroke_width=size // 90)
    file = io.BytesIO()  # a PNG, because Open WebUI takes no SVG: it could hold a script
    picture.resize((pixels, pixels), Image.Resampling.LANCZOS).quantize(32).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def _host_answer(question: Awaitable[T], fallback: T, words: str, longest_s: float = _HOST_CALL_S) -> T:
    """The host's answer to a question, or `fallback` and a line in the log."""
    try:
        async with asyncio.timeout(longest_s):
            return await question
    except Exception as exc:
        LOGGER.info("%s: %s", words, type(exc).__name__)
        return fallback


async def _saved_cost(chat_id: str) -> float:
    chat_message = _host("models.chat_messages", "ChatMessage")
    async with _host("internal.db", "get_async_db_context")() as session:
        usages = await session.scalars(sa.select(chat_message.usage).where(chat_message.chat_id == chat_id))
        costs = [_mapping(usage).get("cost") for usage in usages]
    return math.fsum(cost for cost in costs if _is_number(cost) and cost > 0)


async def _known_chats(chat_ids: Sequence[str]) -> set[str]:
    chat = _host("models.chats", "Chat")
    async with _host("internal.db", "get_async_db_context")() as session:
        return set(await session.scalars(sa.select(chat.id).where(chat.id.in_(chat_ids))))


async def _inline_internal_file_url(address: str, user_id: str, most_bytes: int) -> MediaBlob:
    looking = _readable_file(_host_file_id(address) or address, user_id)
    row = await _host_answer(looking, None, "a file could not be looked up", _STORAGE_S)
    if row is None:
        raise InputError("There is no such file, or it is not yours")
    size = _mapping(row.meta).get("size")
    _check_size(size if _is_number(size) else 0, most_bytes)
    # Where files are kept elsewhere (S3 …) this downloads it.
    fetching = asyncio.to_thread(_host("storage.provider", "Storage").get_file, row.path)
    path = await _host_answer(fetching, "", "a file could not be had from the storage", _STORAGE_S)
    if not path:
        raise InputError("It is not there any more")
    name = _text(_mapping(row.meta).get("name")) or _text(row.filename)
    return await asyncio.to_thread(_blob_at, path, name, most_bytes)


def _is_described(file: Mapping[str, Any]) -> bool:
    """Whether an entry of the host's list of files says enough; only files can be looked up."""
    return file.get("type", "file") != "file" or not file.get("id") or bool(file.get("name"))


async def _readable_file(file_id: str, user_id: str) -> Any:
    """The row of a file, None if it is not there or not for this person."""
    row = await _host("models.files", "Files").get_file_by_id(file_id)
    if row is None or row.user_id == user_id:
        return row
    user = await _host("models.users", "Users").get_user_by_id(user_id)
    may_read = _host("utils.access_control.files", "has_access_to_file")
    return row if user is not None and await may_read(file_id, "read", user) else None


def _check_size(size: float, most_bytes: int) -> None:
    """Raise PayloadTooLargeError for a file above its limit."""
    if size > most_bytes:
        raise PayloadTooLargeError(f"It is larger than {_megabytes(most_bytes)}, which is the limit")


def _blob_at(path: str, name: str, most_bytes: int) -> MediaBlob:
    """The file at `path`, of which the storage said that it is there."""
    try:
        with Path(path).open("rb") as file:
            _check_size(os.fstat(file.fileno()).st_size, most_bytes)
            content = file.read(most_bytes)
    except OSError:
        raise InputError("It is not there any more") from None
    if not content:
        raise InputError("It is empty")
    return _blob_of(content, name)


async def _save_file(file_id: str, blob: MediaBlob, content: bytes, request: ChatRequest) -> bool:
    tags = {"OpenWebUI-File-Id": file_id, "OpenWebUI-User-Id": request.user_id}
    plain_name = re.sub(r"[^\w.-]+", "_", blob.name).encode()[-80:].decode(errors="ignore")
    upload = _host("storage.provider", "Storage").upload_file
    _, path = await asyncio.to_thread(upload, io.BytesIO(content), f"{file_id}_{plain_name}", tags)
    meta = {"name": blob.name, "content_type": blob.mime, "size": blob.size}
    form = _host("models.files", "FileForm")(id=file_id, filename=blob.name, path=path, data={}, meta=meta)
    row = await _host("models.files", "Files").insert_new_file(request.user_id, form)
    if row is not None and request.message_id:
        await _host_answer(_link_file(file_id, request), None, "a file could not be linked to its chat")
    return row is not None


async def _link_file(file_id: str, request: ChatRequest) -> None:
    """Let whoever may read the chat or channel have a file of it."""
    if request.chat_id.startswith("channel:"):
        channel_id, channels = request.chat_id.removeprefix("channel:"), _host("models.channels", "Channels")
        await channels.add_file_to_channel_by_id(channel_id, file_id, request.user_id)
    elif _is_kept_chat(request.chat_id):
        link = _host("models.chats", "Chats").insert_chat_files
        await link(request.chat_id, request.message_id, [file_id], request.user_id)


async def _questions(chat_id: str, question_id: str) -> list[tuple[str, frozenset[str]]]:
    messages = _mapping(await _host("models.chats", "Chats").get_messages_map_by_chat_id(chat_id))
    found: list[tuple[str, frozenset[str]]] = []
    seen: set[str] = set()
    while question_id in messages and question_id not in seen:
        seen.add(question_id)
        message = _mapping(messages[question_id])
        ids = frozenset(_text(file.get("id")) for file in _objects(message.get("files")))
        if message.get("role") == "user":
            found.append((_text(message.get("content")), ids))
        question_id = _text(message.get("parentId"))
    return found[::-1]


async def _call_in_page(tool: Mapping[str, Any], name: str, arguments: JSONObject, call: HostCall) -> Any:
    """Have a tool server of the browser's called by the page."""
    if call.event_call is None:
        raise ToolError("No browser is connected that could run this tool")
    data = {"id": str(uuid.uuid4()), "name": name, "params": arguments, "server": tool.get("server") or {}}
    data["session_id"] = call.metadata.get("session_id")
    return await call.event_call({"type": "execute:tool", "data": data})


def _run_to_its_end(run: Callable[..., Any], arguments: JSONObject) -> Any:
    """Call a function that waits for nothing; the coroutine that the host wraps it in is driven here."""
    result = run(**arguments)
    if not inspect.iscoroutine(result):
        return result
    try:
        result.send(None)
    except StopIteration as done:
        return done.value
    result.close()
    raise ToolError("This tool waits for something although it is not asynchronous")


def _plain_result(call: ToolCall, result: Any) -> ToolResult:
    """A result as text, where no host is there to read it."""
    if result is None or isinstance(result, str):
        return ToolResult(call, _NO_OUTPUT if result is None else result)
    failed = bool(_mapping(result).get("error"))
    return ToolResult(call, json.dumps(result, ensure_ascii=False, default=str), failed)


async def _processed_result(
    call: ToolCall, tool: Mapping[str, Any], arguments: JSONObject, result: Any, host: HostCall
) -> ToolResult:
    middleware = _host("utils", "middleware")
    user = await _host("models.users", "Users").get_user_by_id(_text(host.metadata.get("user_id")))
    metadata = dict(host.metadata)
    shown = middleware.build_terminal_file_tool_result(call.name, arguments, result, tool, metadata)
    kind, is_direct = _text(tool.get("type")), bool(tool.get("direct"))
    text, files, embeds = await middleware.process_tool_result(
        host.request, call.name, shown or result, kind, is_direct, metadata, user
    )
    text = _NO_OUTPUT if text is None else str(text)
    if host.event_emitter is not None:
        await middleware.terminal_event_handler(call.name, arguments, text, host.event_emitter)
    store = getattr(middleware, "store_tool_result_image", None)  # where the host keeps pictures as files
    images: list[str] = []
    displayed: list[Any] = []
    for file in _objects(files):
        url = _text(file.get("url"))
        if store is not None and file.get("type") == "image" and url.startswith("data:"):
            url = await store(host.request, url, metadata, user)
            file = {**file, "url": url}
        if file.get("type") == "image" and url:
            images.append(url)
        if not url.startswith("data:"):
            displayed.append(dict(file))
    sources = _tool_sources(middleware, call, _text(tool.get("tool_id")), arguments, text, metadata)
    failed = bool(_host("utils.middleware", "_is_tool_result_error")(text))
    return ToolResult(call, text, failed, tuple(images), tuple(displayed), tuple(embeds), sources)


_NO_OUTPUT: Final = "(The tool gave no output.)"
# 0.12 names them in CITATION_TOOL_NAMES
_CITED: Final = ("fetch_url", "view_file", "view_knowledge_file", "query_knowledge_files", "query_chat_files")


def _model_meta(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the host keeps of the chosen model, as it hands it over with a request."""
    return _mapping(_mapping(_mapping(metadata.get("model")).get("info")).get("meta"))


def _tool_sources(
    middleware: Any, call: ToolCall, tool_id: str, arguments: JSONObject, text: str, metadata: JSONObject
) -> tuple[JSONObject, ...]:
    """The sources that a result names, where the host shows those."""
    may_cite = _mapping(_model_meta(metadata).get("capabilities")).get("citations") is not False
    if not may_cite or not text or call.name not in getattr(middleware, "CITATION_TOOL_NAMES", _CITED):
        return ()
    found = middleware.get_citation_source_from_tool_result(
        tool_name=call.name, tool_params=arguments, tool_result=text, tool_id=tool_id
    )
    return tuple(dict(source) for source in _objects(found))


async def _function_digest(function_id: str) -> str:
    row = await _host("models.functions", "Functions").get_function_by_id(function_id)
    code = _text(getattr(row, "content", ""))
    return hashlib.sha256(code.encode()).hexdigest() if row is not None and row.is_active else ""


async def _identity_headers(request: ChatRequest) -> dict[str, str]:
    include_user_info_headers = _host("utils.headers", "include_user_info_headers")
    person = {name: _text(request.user.get(name)) for name in ("id", "name", "email", "role")}
    user = types.SimpleNamespace(**person)
    try:
        headers = include_user_info_headers({}, user, request=request.host.request)
    except TypeError:  # older ones do not ask for the request
        headers = include_user_info_headers({}, user)
    chat = {_host("env").FORWARD_SESSION_INFO_HEADER_CHAT_ID: request.chat_id} if request.chat_id else {}
    return {**headers, **chat}


async def _as_sse(chunks: AsyncGenerator[JSONObject, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            yield b"data: " + _json_dumps(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"


# ── 7b. Host seam ────────────────────────────────────────────────────────────
# Every symbol of Open WebUI that is used, old or new, behind one class.
# Promise: no other floor knows which version of the host is running.
# Doc: docs/open_webui_compatibility.md   Tests: tests/test_host_seam.py


class OpenWebUIHost:
    """What is asked of the host. Without a host (terminal) every answer is neutral."""

    def __init__(self, version: str | None = _HOST_VERSION) -> None:
        self.version = version

    def data_folder(self) -> Path | None:
        """Where files of ours may lie; no other program reads them."""
        with contextlib.suppress(ImportError):
            if self.version is not None:
                return Path(_host("env", "DATA_DIR")) / "openrouter_responses_pipe"
        return None

    def database(self) -> Database | None:
        """The database that the host keeps everything in; None without a host."""
        if self.version is None:
            return None
        engine = _host("internal.db", "async_engine")
        return None if engine is None else Database(engine, _host("env", "DATABASE_SCHEMA") or None)

    def redis(self) -> tuple[Any, str] | None:
        """(a client of the host's Redis that speaks bytes, the prefix of its keys); None if it has none."""
        if self.version is None:
            return None
        env, redis = _host("env"), _host("utils.redis")
        sentinels = redis.get_sentinels_from_env(env.REDIS_SENTINEL_HOSTS, env.REDIS_SENTINEL_PORT)
        if not env.REDIS_URL and not sentinels:
            return None
        client = redis.get_redis_connection(
            env.REDIS_URL, sentinels, env.REDIS_CLUSTER, async_mode=True, decode_responses=False
        )
        return client, env.REDIS_KEY_PREFIX

    async def deleted_chats(self, chat_ids: Sequence[str]) -> list[str]:
        """Those of these chats that are not there any more; none where that cannot be asked."""
        if self.version is None or not chat_ids:
            return []
        there = await _host_answer(_known_chats(chat_ids), None, "which chats there are could not be read")
        return [] if there is None else [chat_id for chat_id in chat_ids if chat_id not in there]

    async def function_digest(self, function_id: str) -> str | None:
        """What code the host has for a function; empty: none, or it is switched off; None: nobody knows."""
        if self.version is None:
            return None
        return await _host_answer(_function_digest(function_id), None, "this function could not be looked up")

    def meter(self) -> Any:
        """OpenTelemetry's meter, where the server exports metrics by it; else None."""
        if self.version is None or not getattr(_host("env"), "ENABLE_OTEL_METRICS", False):
            return None
        from opentelemetry import metrics  # pyright: ignore[reportMissingImports]  # it comes with Open WebUI

        return metrics.get_meter("openrouter_responses_pipe")

    @contextlib.contextmanager
    def only_one(self, what: str) -> Iterator[bool]:
        """Whether nobody else on this machine does `what` now: other workers, other loads of this file."""
        folder = self.data_folder()
        if folder is None or fcntl is None:
            yield True
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / f"{what}.lock").open("w")
        except OSError:  # a server whose database is elsewhere may not be able to write here
            yield True
            return
        with lock:
            is_ours = False
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = True
            yield is_ours

    async def model_rows(self, prefix: str) -> list[ModelRow]:
        """What the host keeps of the models whose id begins with `prefix`."""
        rows = await _host("models.models", "Models").get_base_models()
        return [_model_row(row) for row in rows if row.id.startswith(prefix)]

    async def model_row(self, row_id: str) -> ModelRow | None:
        """What the host keeps of one model."""
        row = await _host("models.models", "Models").get_model_by_id(row_id)
        return None if row is None else _model_row(row)

    async def insert_model_row(self, row: ModelRow) -> bool:
        """Add a row, owned by the host's first administrator; False while there is none.

        Raises:
            Exception: whatever the host's database says.
        """
        owner = await _host("models.users", "Users").get_super_admin_user()
        insert = _host("models.models", "Models").insert_new_model
        return owner is not None and bool(await insert(_model_form(row), owner.id))

    async def update_model_row(self, row: ModelRow, *, grants_too: bool) -> bool:
        """Write a row anew.

        Raises:
            Exception: whatever the host's database says.
        """
        form = _model_form(row)
        if grants_too:  # 0.12 keeps them apart from the rest, older ones write them twice
            grants = _host("models.access_grants", "AccessGrants")
            await grants.set_access_grants("model", row.id, form.access_grants)
        return bool(await _host("models.models", "Models").update_model_by_id(row.id, form))

    async def delete_model_row(self, row_id: str) -> bool:
        """Remove a row with its grants.

        Raises:
            Exception: whatever the host's database says.
        """
        return bool(await _host("models.models", "Models").delete_model_by_id(row_id))

    async def admin_params(self, model_ids: Iterable[str]) -> dict[str, list[Any]]:
        """What administrators have set as parameters of these models, the first before the others, or of all.

        By name: the value in force, or None, then the options of controls, among which people choose.
        What somebody else has set, in a workspace model of their own, does not count.
        """
        sets: list[Any] = []
        for model_id in dict.fromkeys(filter(None, model_ids)):
            row = await _host("models.models", "Models").get_model_by_id(model_id)
            owner = await _host("models.users", "Users").get_user_by_id(row.user_id) if row else None
            if owner is not None and owner.role == "admin":
                sets.append(row.params.model_dump(exclude_unset=True))
        sets.append(await _host("models.config", "Config").get("models.default_params", {}))
        values: JSONObject = {}
        options: dict[str, list[Any]] = {}
        for params in map(_mapping, sets):
            values = {**params, **_mapping(params.get("custom_params")), **values}
            for control in _mapping(params.get("model_controls")).values():
                for option in _mapping(_mapping(control).get("options")).values():
                    for name, value in _mapping(_mapping(option).get("params")).items():
                        options.setdefault(name, []).append(value)
        return {name: [values.get(name), *options.get(name, ())] for name in values | options}

    async def may_use(self, user_id: str, model_id: str) -> bool:
        """Whether the host lets this person chat with a model."""

        async def check() -> bool:
            user = await _host("models.users", "Users").get_user_by_id(user_id)
            if user is not None:
                # says no with a bare Exception
                await _host("utils.models", "check_model_access")(user, {"id": model_id})
            return user is not None

        return await _host_answer(check(), False, f"{model_id} is not for everybody")

    async def admin_grants(self) -> frozenset[tuple[str, str, str]]:
        """What lets every administrator see a row; nothing is needed where the host lets them see all."""
        if _host("config", "BYPASS_ADMIN_ACCESS_CONTROL"):
            return frozenset()
        admins = await _host("models.users", "Users").get_users(filter={"roles": ["admin"]})
        return frozenset(("user", user.id, "read") for user in admins["users"])

    async def inline_file(self, address: str, user_id: str, most_bytes: int) -> MediaBlob:
        """A file of the host's as it is sent.

        Raises:
            InputError: it is not there, not for this person, too large, or cannot be read.
        """
        if self.version is None:
            raise InputError("There is no such file here")
        return await _inline_internal_file_url(address, user_id, most_bytes)

    async def save_file(self, file_id: str, blob: MediaBlob, content: bytes, request: ChatRequest) -> bool:
        """Whether a file could be kept with the person whose chat it is of, under this id."""
        if self.version is None:
            return False
        saving = _save_file(file_id, blob, content, request)
        return await _host_answer(saving, False, "a file of a chat could not be kept", _STORAGE_S)

    async def described(self, files: ChatFiles, user_id: str) -> ChatFiles:
        """The list of files with names and kinds in it; programs name files by their ids alone."""
        if self.version is None or all(_is_described(file) for file in files.files):
            return files
        return files._replace(files=tuple([await self._described(file, user_id) for file in files.files]))

    async def _described(self, file: Mapping[str, Any], user_id: str) -> Mapping[str, Any]:
        if _is_described(file):
            return file
        looking = _readable_file(_text(file.get("id")), user_id)
        row = await _host_answer(looking, None, "a file could not be looked up")
        if row is None:
            return file
        meta = _mapping(row.meta)
        return {**file, "name": _text(meta.get("name")) or _text(row.filename), "meta": meta}

    async def questions(self, chat_id: str, question_id: str) -> list[tuple[str, frozenset[str]]]:
        """The questions of a saved chat up to this one, oldest first: (text, ids of attached files)."""
        if self.version is None or not chat_id or not question_id:
            return []
        asking = _questions(chat_id, question_id)
        return await _host_answer(asking, [], "where files were attached could not be read")

    async def identity_headers(self, request: ChatRequest) -> dict[str, str]:
        """Who asks, for the upstream, where the server forwards that (ENABLE_FORWARD_USER_INFO_HEADERS)."""
        is_known = self.version is not None and request.user_id
        if not is_known or not getattr(_host("env"), "ENABLE_FORWARD_USER_INFO_HEADERS", False):
            return {}
        headers = await _host_answer(_identity_headers(request), {}, "who asks could not be said")
        return {name: clean for name, text in headers.items() if (clean := _header_value(text))}

    async def call_tool(
        self, tool: Mapping[str, Any], name: str, arguments: JSONObject, call: HostCall, threads: Executor
    ) -> Any:
        """Run one of the host's tools, a plain function in a thread; the result is whatever it gives back.

        Raises:
            Exception: whatever the tool raises.
        """
        if tool.get("direct"):
            return await _call_in_page(tool, name, arguments, call)
        run = tool["callable"]
        if self.version is not None:
            bound = {"__files__": call.metadata.get("files") or []}
            run = await _host("utils.tools", "get_updated_tool_function")(function=run, extra_params=bound)
        if inspect.iscoroutinefunction(getattr(run, "__function__", run)):
            return await run(**arguments)
        job = threads.submit(contextvars.copy_context().run, _run_to_its_end, run, arguments)
        ended = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            if not job.cancel():  # nobody can stop a thread: this call ends when it does
                await asyncio.wait((ended,))
            raise

    async def tool_result(
        self, call: ToolCall, tool: Mapping[str, Any], arguments: JSONObject, result: Any, host: HostCall
    ) -> ToolResult:
        """What a tool gave back, as the host itself would show and send it.

        Raises:
            Exception: it is nothing that the host can read.
        """
        if self.version is None or host.request is None:
            return _plain_result(call, result)
        return await _processed_result(call, tool, arguments, result, host)

    def sse_response(self, chunks: AsyncGenerator[JSONObject, None]) -> Any:
        """A stream for an API client, sent as it is.

        What a pipe yields one by one the host ends with a chunk of its own, whose `finish_reason`
        says `stop` whatever ours said; clients keep the last. Without a host: `chunks` themselves.
        """
        if self.version is None or StreamingResponse is None:
            return chunks
        return StreamingResponse(_as_sse(chunks), media_type="text/event-stream")

    async def chat_cost(self, chat_id: str) -> float:
        """US dollars that the answers saved in a chat have cost; 0 if there are none, or nobody knows."""
        if self.version is None or not chat_id:
            return 0.0
        # Whatever it is that fails: the answer is there, and a sum may not spoil it.
        return await _host_answer(_saved_cost(chat_id), 0.0, "what this chat has cost could not be read")

    def check_version(self) -> None:
        """Refuse a host that would show or save nothing.

        Raises:
            ConfigurationError: Open WebUI is older than 0.11.2.
        """
        if self.version is None:
            return
        numbers = tuple(int(part) for part in re.findall(r"\d+", self.version)[:3])
        if numbers and numbers < _MINIMUM_HOST:
            needed = ".".join(map(str, _MINIMUM_HOST))
            raise ConfigurationError(
                f"This function needs Open WebUI {needed} or newer; this server runs {self.version}."
            )


# ── 8a. Model registry ───────────────────────────────────────────────────────
# The catalog of OpenRouter, fresh enough, and what it says of each model.
# Promise: a page load never fails because of it, and concurrent ones cause one fetch.
# Doc: docs/model_catalog_and_routing.md   Tests: tests/test_model_registry.py

# (connection, path, etag of what is known) -> the answer
CatalogFetcher = Callable[[Connection, str, str], Awaitable[Fetched]]
_CatalogKey = tuple[str, str, bool, str]  # address, path, with ZDR, digest of the key where it matters


class CatalogChoice(NamedTuple):
    """Which list of models, and for how many seconds it is new enough."""

    refresh_s: float = _CATALOG_REFRESH_S
    account_only: bool = False
    zdr: bool = False

    @classmethod
    def of(cls, valves: Valves) -> CatalogChoice:
        """As the valves choose."""
        refresh_s = float(valves.MODEL_CATALOG_REFRESH_SECONDS)
        return cls(refresh_s, valves.ACCOUNT_MODELS_ONLY, valves.ZDR_MODELS_ONLY)

    @property
    def path(self) -> str:
        """Where the list is (reference §11)."""
        return "/models/user" if self.account_only else "/models?output_modalities=all"


_PLAIN_CHOICE: Final = CatalogChoice()


class _Catalog(NamedTuple):
    models: dict[str, ModelSpec]
    fetched_at: float
    etag: str = ""


class _Loading(NamedTuple):
    task: asyncio.Task[None]
    started_at: float


class _Outage(NamedTuple):
    error: PipeError
    failed_at: float
    times: int = 1

    @property
    def ends_at(self) -> float:
        """When the catalog may be asked for again."""
        return self.failed_at + min(_CATALOG_RETRY_S * 2 ** min(self.times - 1, 10), _CATALOG_LONGEST_RETRY_S)


# Entries of the catalog (reference §11)


def _model_spec(entry: Mapping[str, Any]) -> ModelSpec | None:
    """One entry of `GET /models` (reference §11); None without an id. Unknown keys are ignored."""
    model_id = entry.get("id")
    if not isinstance(model_id, str) or not model_id or not model_id.isprintable():
        return None
    architecture, pricing = _mapping(entry.get("architecture")), _mapping(entry.get("pricing"))
    outputs = frozenset(_strings(architecture.get("output_modalities")) or ("text",))
    created, alias = entry.get("created"), _mapping(entry.get("alias_target"))
    parameters = frozenset(_strings(entry.get("supported_parameters")))
    return ModelSpec(
        id=model_id,
        name=_one_line(_text(entry.get("name")))[:_MAX_NAME_CHARS] or model_id,
        context_length=_count(entry.get("context_length")),
        input_modalities=frozenset(_strings(architecture.get("input_modalities")) or ("text",)),
        output_modalities=outputs,
        supported_parameters=parameters,
        reasoning=_reasoning_spec(entry.get("reasoning"), parameters),
        prices=_prices(pricing, is_for_text="text" in outputs or model_id.endswith(":free")),
        overrides=tuple(map(_price_override, _objects(pricing.get("overrides")))),
        max_output=_count(_mapping(entry.get("top_provider")).get("max_completion_tokens")),
        created=int(created) if _is_number(created) else 0,
        expires=_text(entry.get("expiration_date")),
        description=_text(entry.get("description")),
        canonical=_text(entry.get("canonical_slug")),
        alias_of=_text(alias.get("slug")),
    )


_MAX_NAME_CHARS: Final = 200


def _count(value: Any) -> int | None:
    """A limit in tokens; None for none, and for what cannot be one."""
    return int(value) if _is_number(value) and value >= 1 else None


def _reasoning_spec(value: Any, parameters: frozenset[str]) -> ReasoningSpec | None:
    """`reasoning` of an entry: no list of efforts means no choice, null means all of them."""
    if not isinstance(value, Mapping):
        return ReasoningSpec() if "reasoning" in parameters else None
    listed = value.get("supported_efforts", ())
    return ReasoningSpec(
        mandatory=value.get("mandatory") is True,
        by_default=value.get("default_enabled") is True,
        efforts=tuple(map(str, listed)) if isinstance(listed, list | tuple) else None,
        default_effort=_text(value.get("default_effort")),
        takes_budget=value.get("supports_max_tokens") is True,
    )


def _prices(pricing: Mapping[str, Any], *, is_for_text: bool = True) -> Mapping[str, float]:
    """The prices that somebody knows; a model that only makes pictures has its own elsewhere, and 0 here."""
    # Texts in US dollars; routers have -1, which says nothing.
    known = {name: price for name, text in pricing.items() if 0 <= (price := _as_float(text)) < 1e300}
    known.pop("discount", None)
    if not is_for_text and not known.get("prompt") and not known.get("completion"):
        known = {name: price for name, price in known.items() if name not in ("prompt", "completion")}
    return known


def _price_override(entry: Mapping[str, Any]) -> PriceOverride:
    start, end = entry.get("utc_start"), entry.get("utc_end")
    hours = (int(start), int(end)) if _is_number(start) and _is_number(end) else None
    conditions = ("min_prompt_tokens", "utc_start", "utc_end")
    prices = {name: text for name, text in entry.items() if name not in conditions}
    return PriceOverride(_prices(prices), _count(entry.get("min_prompt_tokens")), hours)


def _read_models(entries: Any, zdr: frozenset[str] | None) -> dict[str, ModelSpec]:
    """The models of a list that write text or pictures, by id; `zdr`: the ids that keep nothing."""
    specs = [spec for spec in map(_model_spec, _objects(entries)) if spec is not None]
    usable = {spec.id: spec for spec in specs if spec.writes_text or spec.writes_images}
    if zdr is not None:
        for spec in usable.values():
            # A variant such as `:free` has other providers, but the dated id of its model.
            ids = (spec.id,) if ":" in spec.id else (spec.id, spec.canonical, spec.alias_of)
            usable[spec.id] = spec._replace(zdr=not zdr.isdisjoint(ids))
    return usable


# Ids


def _parse_model_id(model_id: str) -> ModelRef:
    """Take an id apart (reference §2): `author/slug:free:nitro@preset/name`, each part but one optional.

    Variants such as `:free` are entries of the catalog and stay with the base; shortcuts may follow any id.
    """
    model_id = _without_host_prefix(model_id.strip())
    base, _, preset = model_id.partition("@preset/")
    parts = base.split(":")
    kept = len(parts)
    while kept > 1 and parts[kept - 1] in ("nitro", "floor", "exacto", "online"):
        kept -= 1
    return ModelRef(model_id, ":".join(parts[:kept]), tuple(parts[kept:]), preset)


def _spec_of(models: Mapping[str, ModelSpec], ref: ModelRef) -> ModelSpec | None:
    """What the catalog says of a reference, under its own id; a variant that it lacks is as its base."""
    plain = ref.base.partition(":")[0]
    known = models.get(ref.id) or models.get(ref.base) or models.get(plain)
    if known is None:  # perhaps it is a permanent slug; the variants of its model have the same
        dated = [spec for spec in models.values() if plain and spec.canonical == plain]
        known = min(dated, key=lambda spec: len(spec.id), default=None)
    return None if known is None else known._replace(id=ref.id)


def _pick_model(models: Mapping[str, ModelSpec], model_id: str) -> ModelSpec:
    """The model that an id means; one that the catalog lacks takes all; OpenRouter says what it cannot."""
    spec = models.get(model_id) or _spec_of(models, _parse_model_id(model_id))
    return spec or ModelSpec(
        model_id,
        model_id,
        input_modalities=frozenset({"text", "image"}),
        supported_parameters=frozenset({"tools"}),
        reasoning=ReasoningSpec(),
        is_known=False,
    )


# What a model can take of a request: each gate changes the body and names what it took away
_Gate = Callable[[JSONObject, ModelSpec], Iterable[str]]


def _inject_model_capabilities(payload: JSONObject, spec: ModelSpec) -> tuple[JSONObject, tuple[str, ...]]:
    """(a body for `/responses` that the model can take, the names of what was taken away or limited)."""
    if not spec.is_known:
        return payload, ()
    fitted = dict(payload)
    return fitted, tuple(name for gate in _CAPABILITY_GATES for name in gate(fitted, spec))


def _fit_reasoning(payload: JSONObject, spec: ModelSpec) -> Iterable[str]:
    """Only efforts that the model has; no other field of `reasoning` changes."""
    wanted, how = payload.get("reasoning"), spec.reasoning
    if wanted is None or how is None:
        return ()
    if "max_tokens" in wanted:
        other = "effort" if how.takes_budget else "max_tokens"  # never both (reference §3)
        wanted = payload["reasoning"] = {name: value for name, value in wanted.items() if name != other}
        if not how.takes_budget:
            return ("reasoning max_tokens", *_fit_reasoning(payload, spec))
    if "effort" not in wanted:
        return ()
    effort = wanted["effort"]
    fitted = _fit_effort(effort, how)
    if fitted == {"enabled": False}:
        payload["reasoning"] = fitted
        payload.pop("include", None)
        return ()
    payload["reasoning"] = {name: value for name, value in wanted.items() if name != "effort"} | fitted
    return () if fitted.get("effort") == effort else (f"reasoning effort {effort}",)


def _fit_effort(effort: str, how: ReasoningSpec) -> JSONObject:
    """What asks for this effort, or for the nearest that there is, rather less than more."""
    options = _EFFORTS if how.efforts is None else how.efforts
    if effort not in _EFFORTS or (effort in options and not (effort == "none" and how.mandatory)):
        return {"effort": effort}
    if effort == "none" and not how.mandatory:
        return {"enabled": False}
    ranks = [_EFFORTS.index(option) for option in options if option in _EFFORTS[1:]]
    if not ranks:
        return {}
    nearest = max((rank for rank in ranks if rank <= _EFFORTS.index(effort)), default=min(ranks))
    return {"effort": _EFFORTS[nearest]}


def _fit_output(payload: JSONObject, spec: ModelSpec) -> Iterable[str]:
    """A limit below 1 means none, as Ollama has it; one above the model's own excludes its providers."""
    wanted, limit = payload.get("max_output_tokens"), spec.max_output or spec.context_length
    if wanted is None or (wanted >= 1 and (limit is None or wanted <= limit)):
        return ()
    if wanted < 1:
        del payload["max_output_tokens"]
    else:
        payload["max_output_tokens"] = limit
    return ("max_output_tokens",)


def _fit_sampling(payload: JSONObject, spec: ModelSpec) -> Iterable[str]:
    if not spec.supported_parameters:
        return ()
    foreign = [name for name in _SAMPLING if name in payload and name not in spec.supported_parameters]
    for name in foreign:
        del payload[name]
    return foreign


def _fit_modalities(payload: JSONObject, spec: ModelSpec) -> Iterable[str]:
    """A model that only makes pictures is served only to those who ask for a picture."""
    if spec.writes_images and not spec.writes_text and "modalities" not in payload:
        payload["modalities"] = ["image"]
    return ()


_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SAMPLING: Final = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "top_logprobs")
_CAPABILITY_GATES: Final[tuple[_Gate, ...]] = (_fit_reasoning, _fit_output, _fit_sampling, _fit_modalities)


# The catalog itself


class CatalogCopies:
    """The last lists, through restarts: files in a folder of the host's data. Without a folder, nowhere."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @property
    def are_kept(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def load(self, name: str) -> Mapping[str, Any]:
        """What was kept under `name`; empty where there is nothing that can be read."""
        if self._folder is None:
            return {}
        try:
            return _mapping(_json_loads((self._folder / name).read_bytes()))
        except (OSError, ValueError):
            return {}

    def save(self, name: str, copy: JSONObject) -> None:
        """Keep `copy`, whole or not at all; a folder that cannot be written costs only a log line."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh = self._folder / f"{name}.{os.getpid()}-{secrets.token_hex(4)}"
            try:
                fresh.write_bytes(_json_dumps(copy))
                fresh.replace(self._folder / name)
            finally:
                fresh.unlink(missing_ok=True)
            kept = sorted(self._folder.glob("models-*.json*"), key=lambda path: path.stat().st_mtime)
            for old in kept[:-_MAX_CATALOGS]:  # of keys that are gone, and of writers that were killed
                old.unlink(missing_ok=True)
        except OSError as exc:
            LOGGER.info("The model list could not be kept for the next start: %s", type(exc).__name__)


_NO_LIST: Final = "OpenRouter's model list did not come in time"


class OpenRouterModelRegistry:
    """The catalog of each connection: fetched when first asked for, renewed in the background.

    `fetch` gives the answers of OpenRouter; `clock` seconds that only grow, `now` those of the epoch.
    """

    def __init__(
        self,
        fetch: CatalogFetcher,
        clock: Callable[[], float],
        copies: CatalogCopies | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._copies = copies or CatalogCopies()
        self._now = now
        self._catalogs: dict[_CatalogKey, _Catalog] = {}
        # A request with another key is another try: who mends a wrong key must not wait for it.
        self._loading: dict[tuple[_CatalogKey, str], _Loading] = {}
        self._outages: dict[tuple[_CatalogKey, str], _Outage] = {}
        self._looked_for: set[_CatalogKey] = set()
        self._restoring: dict[_CatalogKey, asyncio.Task[None]] = {}
        self._keeping: set[asyncio.Task[None]] = set()
        self._told: set[tuple[str, str]] = set()

    async def ensure_loaded(
        self, connection: Connection, choice: CatalogChoice = _PLAIN_CHOICE
    ) -> dict[str, ModelSpec]:
        """The models by id. An old list serves until a new one has come.

        Raises:
            PipeError: there is no catalog; it is asked for again 15 seconds later, then less and less often.
        """
        digest = hashlib.sha256(connection.key.encode()).hexdigest()
        key = (connection.base_url, choice.path, choice.zdr, digest if choice.account_only else "")
        catalog = self._catalogs.get(key) or await self._restored(key)
        if catalog is not None and self._clock() - catalog.fetched_at < choice.refresh_s:
            return catalog.models
        asked = (key, digest)
        loading = self._loading.get(asked) or self._start_loading(asked, connection)
        if catalog is None and loading is not None:
            # Counted from its start: who comes later to a request that hangs does not wait anew.
            wait_s = loading.started_at + _CATALOG_WAIT_S - self._clock()
            await asyncio.wait([loading.task], timeout=max(0.0, wait_s))
            catalog = self._catalogs.get(key)
        if catalog is not None:
            return catalog.models
        outage = self._outages.get(asked)
        raise outage.error if outage is not None else StreamError(_NO_LIST, template="catalog")

    async def get(
        self, connection: Connection, model_id: str, choice: CatalogChoice = _PLAIN_CHOICE
    ) -> ModelSpec:
        """What is known of a model; one that takes everything where the catalog does not have it."""
        models: dict[str, ModelSpec] = {}
        with contextlib.suppress(PipeError):
            models = await self.ensure_loaded(connection, choice)
        return _pick_model(models, model_id)

    def fit(self, payload: JSONObject, spec: ModelSpec) -> JSONObject:
        """A body for `/responses` that the model can take; what it cannot is logged, once per model."""
        fitted, taken = _inject_model_capabilities(payload, spec)
        news = [name for name in taken if (spec.id, name) not in self._told]
        if news:
            LOGGER.info("%s does not take, so it is left out or limited: %s", spec.id, ", ".join(news))
            self._told.update((spec.id, name) for name in news)
        return fitted

    async def aclose(self) -> None:
        """End what is being fetched."""
        loading = [loading.task for loading in self._loading.values()]
        await _end_tasks([*loading, *self._restoring.values(), *self._keeping])

    async def _restored(self, key: _CatalogKey) -> _Catalog | None:
        """The list of an earlier start; it is looked for once."""
        if not self._copies.are_kept:
            return None
        task = self._restoring.get(key)
        if task is None and key not in self._looked_for:
            self._looked_for.add(key)
            task = asyncio.get_running_loop().create_task(self._restore(key), name="kept model list")
            self._restoring[key] = task
            task.add_done_callback(lambda _: self._restoring.pop(key, None))
        if task is not None:
            await asyncio.wait([task], timeout=_CATALOG_WAIT_S)
        return self._catalogs.get(key)

    async def _restore(self, key: _CatalogKey) -> None:
        copy = await asyncio.to_thread(self._copies.load, _copy_name(key))
        models = _read_models(copy.get("data"), frozenset(_strings(copy.get("zdr"))) if key[2] else None)
        fetched_at = copy.get("fetched_at")
        if models and key not in self._catalogs and _is_number(fetched_at):
            age_s = max(0.0, self._now() - fetched_at)
            self._catalogs[key] = _Catalog(models, self._clock() - age_s, _text(copy.get("etag")))

    def _start_loading(self, asked: tuple[_CatalogKey, str], connection: Connection) -> _Loading | None:
        outage = self._outages.get(asked)
        if outage is not None and self._clock() < outage.ends_at:
            return None
        task = asyncio.get_running_loop().create_task(
            self._load(asked, connection), name="model list", context=_nobodys_context()
        )
        self._loading[asked] = _Loading(task, self._clock())
        task.add_done_callback(lambda _: self._loading.pop(asked, None))
        return self._loading[asked]

    async def _load(self, asked: tuple[_CatalogKey, str], connection: Connection) -> None:
        try:
            async with asyncio.timeout(_CATALOG_TIMEOUT_S):
                await self._renew(asked[0], connection)
        except (PipeError, TimeoutError) as exc:
            error = exc if isinstance(exc, PipeError) else StreamError(_NO_LIST, template="catalog")
            outage = self._outages.get(asked)
            if outage is None:  # one warning for an outage, however long it is
                said = _provider_sentence(error.detail, False)
                LOGGER.warning("The model list could not be loaded: %s", said)
            self._outages[asked] = _Outage(error, self._clock(), 1 + (outage.times if outage else 0))
        else:
            if self._outages.pop(asked, None) is not None:
                LOGGER.info("The model list is there again")
        _drop_oldest(self._catalogs, _MAX_CATALOGS)
        _drop_oldest(self._outages, _MAX_CATALOGS)

    async def _renew(self, key: _CatalogKey, connection: Connection) -> None:
        """Fetch the list, else raise PipeError; one that says the same leaves its models the same objects."""
        _, path, with_zdr, _ = key
        old = self._catalogs.get(key)
        # A list that is marked is always fetched whole: its copy must hold the marks of today.
        answer = await self._fetch(connection, path, old.etag if old and not with_zdr else "")
        zdr = _zdr_ids((await self._fetch(connection, "/endpoints/zdr", "")).content) if with_zdr else None
        listed = _mapping(answer.content).get("data")
        models = old.models if old and answer.content is None else _read_models(listed, zdr)
        if not models:
            raise OpenRouterAPIError("OpenRouter's model list is empty", template="catalog", retryable=True)
        if old is not None and models == old.models:
            models = old.models
        self._catalogs.pop(key, None)  # to the end: what is renewed is in use
        self._catalogs[key] = _Catalog(models, self._clock(), answer.etag)
        self._keep(key, answer, models, zdr)

    def _keep(
        self, key: _CatalogKey, answer: Fetched, models: Mapping[str, ModelSpec], zdr: frozenset[str] | None
    ) -> None:
        """Write the copy for the next start, while nobody waits for it."""
        entries = _objects(_mapping(answer.content).get("data"))
        if not entries or not self._copies.are_kept:
            return
        copy = {
            "fetched_at": self._now(),
            "etag": answer.etag,
            "data": [entry for entry in entries if _text(entry.get("id")) in models],
            "zdr": None if zdr is None else sorted(zdr),
        }
        writing = asyncio.to_thread(self._copies.save, _copy_name(key), copy)
        task = asyncio.get_running_loop().create_task(writing, name="keep model list")
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)


def _zdr_ids(answer: Any) -> frozenset[str]:
    """The ids of the models that an endpoint without data retention serves (reference §1)."""
    ids = frozenset(_text(entry.get("model_id")) for entry in _objects(_mapping(answer).get("data"))) - {""}
    if not ids:  # every model would vanish without a word
        problem = "OpenRouter's list of providers without data retention is empty"
        raise OpenRouterAPIError(problem, template="catalog", retryable=True)
    return ids


def _copy_name(key: _CatalogKey) -> str:
    return f"models-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


# What an account may still spend


class Balance(NamedTuple):
    """In US dollars; None where OpenRouter does not say, or the key knows no limit."""

    key_left: float | None = None
    key_limit: float | None = None
    resets: str = ""
    credit: float | None = None

    def words(self) -> str:
        """One sentence for whoever may know; empty where nothing is known."""
        facts = []
        if self.key_left is not None:
            limit = f" of {_dollars(self.key_limit)}" if self.key_limit else ""
            period = f" ({self.resets})" if self.resets else ""
            facts.append(f"the key may still spend {_dollars(self.key_left)}{limit}{period}")
        if self.credit is not None:
            facts.append(f"the account has {_dollars(self.credit)} left")
        sentence = ", ".join(facts)
        return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


class AccountReader:
    """What OpenRouter says of a key (`/key`, `/credits`; reference §11), kept for a minute."""

    def __init__(self, fetch: CatalogFetcher, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._kept: dict[str, tuple[float, Balance]] = {}

    async def balance(self, connection: Connection) -> Balance:
        """What may still be spent; never a failure, within 3 seconds."""
        digest = hashlib.sha256(f"{connection.base_url} {connection.key}".encode()).hexdigest()
        asked_at, balance = self._kept.get(digest, (-math.inf, Balance()))
        if self._clock() - asked_at < _BALANCE_S:
            return balance
        key, credits = await asyncio.gather(*(self._data(connection, path) for path in ("/key", "/credits")))
        bought, used = credits.get("total_credits"), credits.get("total_usage")
        balance = Balance(
            key_left=_amount(key.get("limit_remaining")),
            key_limit=_amount(key.get("limit")),
            resets=_text(key.get("limit_reset")),
            credit=max(0.0, bought - used) if _is_number(bought) and _is_number(used) else None,
        )
        self._kept[digest] = (self._clock(), balance)
        _drop_oldest(self._kept, _MAX_CATALOGS)
        return balance

    async def _data(self, connection: Connection, path: str) -> Mapping[str, Any]:
        """`data` of an answer; empty where it cannot be had: `/credits` may need a management key."""
        with contextlib.suppress(PipeError, TimeoutError):
            async with asyncio.timeout(_BALANCE_WAIT_S):
                return _mapping(_mapping((await self._fetch(connection, path, "")).content).get("data"))
        return {}


def _amount(value: Any) -> float | None:
    return max(0.0, float(value)) if _is_number(value) else None


# The menu: each filter says whether a model stays, with the valves and the date of today (YYYY-MM-DD)
_MenuFilter = Callable[[ModelSpec, Valves, str], bool]


def _is_not_excluded(spec: ModelSpec, valves: Valves, today: str) -> bool:
    text = f"{spec.id} {spec.name}".lower()
    words = (word.strip().lower() for word in valves.EXCLUDE_KEYWORDS.split(","))
    return not any(word in text for word in words if word)


def _fits_choice(has: bool, choice: str) -> bool:
    return choice == "all" or has == (choice == "only")


def _stays(spec: ModelSpec, valves: Valves, today: str) -> bool:
    """Whether it does not go away soon."""
    if not valves.HIDE_EXPIRING_DAYS:
        return True
    with contextlib.suppress(ValueError):
        left = date.fromisoformat(spec.expires[:10]) - date.fromisoformat(today)
        return left.days > valves.HIDE_EXPIRING_DAYS
    return True


_MENU_FILTERS: Final[tuple[_MenuFilter, ...]] = (
    lambda spec, valves, today: spec.writes_text,  # a picture alone could not be shown yet
    lambda spec, valves, today: (
        valves.MODEL_ID.strip().lower() in ("", "auto") or _matches_any(spec.id, valves.MODEL_ID)
    ),
    _is_not_excluded,
    lambda spec, valves, today: _fits_choice(spec.is_free, valves.FREE_MODEL_FILTER),
    lambda spec, valves, today: _fits_choice(spec.takes_tools, valves.TOOL_CALLING_FILTER),
    lambda spec, valves, today: spec.zdr or not valves.ZDR_MODELS_ONLY,
    lambda spec, valves, today: (spec.context_length or 0) >= valves.MIN_CONTEXT,
    lambda spec, valves, today: (  # a price that nobody knows, as that of a router, is not below any limit
        not valves.MAX_PRICE
        or (spec.price_out is not None and spec.price_out * 1e6 <= valves.MAX_PRICE * (1 + 1e-9))
    ),
    _stays,
)
# order -> what a model is placed by; equal ones stand by name
MODEL_ORDERS: Final[dict[str, Callable[[ModelSpec], float]]] = {
    "name": lambda spec: 0,
    "newest": lambda spec: -spec.created,
    "price": lambda spec: math.inf if spec.price_out is None else spec.price_out,
    "context": lambda spec: -(spec.context_length or 0),
}


def in_order(models: Iterable[ModelSpec], order: str) -> list[ModelSpec]:
    """The models by `order`, a row of `MODEL_ORDERS`."""
    place = MODEL_ORDERS[order]
    return sorted(models, key=lambda spec: (place(spec), spec.name.lower(), spec.id))


def _menu(models: Mapping[str, ModelSpec], valves: Valves, today: str) -> list[ModelSpec]:
    """The models of the menu, as the valves choose, order and name them, else ConfigurationError."""
    shown = [spec for spec in models.values() if all(stays(spec, valves, today) for stays in _MENU_FILTERS)]
    shown += _extra_models(models, valves.VARIANT_MODELS, {spec.id for spec in shown})
    if not shown:
        raise ConfigurationError(
            "OpenRouter: no model passes the filters in the valves of this function; "
            "an administrator can loosen them."
        )
    named = valves.MODEL_NAME_FORMAT
    return [spec._replace(title=_menu_name(spec, named)) for spec in in_order(shown, valves.MODEL_SORT)]


def _extra_models(models: Mapping[str, ModelSpec], listed: str, known: set[str]) -> list[ModelSpec]:
    """The entries that an administrator adds by name; no filter applies to them."""
    extra: dict[str, ModelSpec] = {}
    for ref in map(_parse_model_id, _listed(listed)):
        if not ref.base and (ref.shortcuts or not ref.preset):
            continue
        spec = _spec_of(models, ref) if ref.base else _pick_model({}, ref.id)._replace(name="OpenRouter")
        if spec is not None and ref.id not in known:
            extra[ref.id] = spec._replace(name=f"{spec.name} ({ref.remark})" if ref.remark else spec.name)
    return list(extra.values())


def _unmatched(models: Mapping[str, ModelSpec], valves: Valves) -> list[str]:
    """What `MODEL_ID` and `VARIANT_MODELS` name and the catalog does not have."""
    refs = map(_parse_model_id, _listed(valves.VARIANT_MODELS))
    unmatched = [ref.id for ref in refs if (ref.base or not ref.preset) and _spec_of(models, ref) is None]
    for name in _listed(valves.MODEL_ID):
        if name.lower() != "auto" and not any(_matches_any(model_id, name) for model_id in models):
            unmatched.append(name)
    return unmatched


def _menu_name(spec: ModelSpec, template: str) -> str:
    """`template` filled in; the plain name where nothing is left of it."""
    fields = {"name": spec.name, "id": spec.id, "vendor": spec.vendor}
    fields |= {"price": format_price(spec), "context": format_tokens(spec.context_length)}
    title = _fill_template(template, fields)
    if not all(text for field, text in fields.items() if "{" + field + "}" in template):
        title = _EMPTY_BRACKETS_RE.sub("", title).strip(_SEPARATORS)  # of what nobody knows
    return title or spec.name


def format_price(spec: ModelSpec) -> str:
    """In US dollars per million tokens, in and out: `$0.25 / $2`; `free`; nothing where nobody knows."""
    if spec.is_free:
        return "free"
    if spec.price_in is None or spec.price_out is None:
        return ""
    return f"{_dollars_per_million(spec.price_in)} / {_dollars_per_million(spec.price_out)}"


def _dollars_per_million(per_token: float) -> str:
    amount = f"{per_token * 1e6:.4f}".rstrip("0").rstrip(".")
    return "$" + (amount if len(amount.partition(".")[2]) != 1 else amount + "0")


def format_tokens(count: int | None) -> str:
    """A limit as people say it: `400K`, `1M`, `131K`, `8.2K`; nothing where nobody knows."""
    if not count:
        return ""
    for size, unit in ((1_000_000, "M"), (1_000, "K")):
        if count >= size:
            return f"{round(count / size, 1 if count < 100 * size else None):g}{unit}"
    return str(count)


def _setup_entry(error: PipeError) -> list[dict[str, str]]:
    """One entry that says in the menu, in one sentence, why there are no models."""
    sentence = render_error(error).partition(". ")[0].rstrip(".")
    name = sentence if "OpenRouter" in sentence else f"OpenRouter: {sentence}"
    return [{"id": _SETUP_MODEL_ID, "name": name}]


# ── 8b. Model publisher ──────────────────────────────────────────────────────
# What Open WebUI's own model table says of our models follows the catalog.
# Promise: what somebody else has set is never touched, and what was written can be taken back.
# Doc: docs/model_catalog_and_routing.md   Tests: tests/test_model_publisher.py


class ModelFamily(NamedTuple):
    """Whose models they are, and how a list shows that: `letters` on `colour`."""

    vendor: str
    name: str
    letters: str
    colour: str

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelFamily:
        """The family of a model; one that has no row gets its name, first letter and a colour of its own."""
        vendor = "openrouter" if spec.id.startswith("@") else spec.vendor
        if vendor in _FAMILIES:
            return cls(vendor, *_FAMILIES[vendor])
        author, colon, _ = spec.name.partition(":")
        name = author.strip() if colon and author.strip() else vendor.replace("-", " ").title()
        hue = hashlib.sha256(vendor.encode()).digest()
        colour = "#" + "".join(f"{60 + byte % 110:02x}" for byte in hue[:3])  # dark enough for white letters
        return cls(vendor, name, name[:1].upper(), colour)


# vendor -> its name, and the letters and colour of its badge
_FAMILIES: Final[dict[str, tuple[str, str, str]]] = {
    "openai": ("OpenAI", "AI", "#0f8a6c"),
    "anthropic": ("Anthropic", "A", "#c8643c"),
    "google": ("Google", "G", "#3367d6"),
    "meta-llama": ("Meta", "M", "#0668e1"),
    "mistralai": ("Mistral", "Mi", "#e8590c"),
    "deepseek": ("DeepSeek", "DS", "#4a5cf0"),
    "qwen": ("Qwen", "Q", "#6440dc"),
    "x-ai": ("xAI", "xA", "#23262b"),
    "moonshotai": ("Moonshot AI", "K", "#16324f"),
    "z-ai": ("Z.AI", "Z", "#2d5cd0"),
    "minimax": ("MiniMax", "MM", "#d6336c"),
    "perplexity": ("Perplexity", "P", "#1f7a84"),
    "nvidia": ("NVIDIA", "N", "#5b8f00"),
    "amazon": ("Amazon", "a", "#b86e00"),
    "microsoft": ("Microsoft", "MS", "#0078a8"),
    "cohere": ("Cohere", "C", "#39594d"),
    "black-forest-labs": ("Black Forest Labs", "BF", "#1e4030"),
    "openrouter": ("OpenRouter", "OR", "#5a5fd6"),
}
# What Open WebUI may offer with a model, and what the model needs for it. All of it is on unless a row
# says otherwise, so only what is missing is written: an administrator's defaults stay in force.
_HOST_CAPABILITIES: Final[dict[str, Callable[[ModelSpec], bool]]] = {
    "vision": lambda spec: spec.takes_images,
    "file_upload": lambda spec: spec.writes_text,
    # The host gives these to the model as tools.
    **dict.fromkeys(
        ("builtin_tools", "web_search", "image_generation", "code_interpreter", "terminal"),
        lambda spec: spec.takes_tools,
    ),
}
_TAGS: Final[dict[str, Callable[[ModelSpec], bool]]] = {
    "Free": lambda spec: spec.is_free,
    "Images": lambda spec: spec.writes_images,
    "Vision": lambda spec: spec.takes_images,
    "Tools": lambda spec: spec.takes_tools,
    "Reasoning": lambda spec: spec.reasons,
}
_EVERYONE: Final = frozenset({("user", "*", "read")})
_MAX_DESCRIPTION_CHARS: Final = 300


class PublishChoice(NamedTuple):
    """What is told of a model (`SYNC_MODEL_METADATA`), and to whom (`NEW_MODEL_ACCESS`).

    `native_files`: which models get the files of a chat whole, so that nobody need search in them.
    """

    mode: Literal["off", "capabilities", "all"] = "off"
    access: Literal["admins", "everyone"] = "admins"
    native_files: Literal["off", "supported", "always"] = "off"


def _row_fields(
    spec: ModelSpec, choice: PublishChoice, private: frozenset[tuple[str, str, str]]
) -> dict[str, Any]:
    """What the row of a model shall say, by field; `private`: the grants of a model for admins alone."""
    if choice.mode == "off":
        return {}
    fields: dict[str, Any] = {
        "name": spec.title or spec.name,
        "access": _EVERYONE if choice.access == "everyone" else private,
        "capabilities.usage": True,
    }
    fields |= {f"capabilities.{name}": False for name, can in _HOST_CAPABILITIES.items() if not can(spec)}
    # Without tools nothing else that is attached could be found any more.
    if spec.takes_tools and spec.reads_whole_files(choice.native_files):
        fields["capabilities.file_context"] = False
    if choice.mode == "all":
        family = ModelFamily.of(spec)
        tags = [family.name, *(tag for tag, has in _TAGS.items() if has(spec))]
        fields |= {
            "description": _describe(spec),
            "tags": [{"name": tag} for tag in tags],
            "profile_image_url": _badge(family.letters, family.colour),
        }
    return {field: value for field, value in fields.items() if field == "access" or not _is_unset(value)}


def _describe(spec: ModelSpec) -> str:
    """What a person wants to know before choosing: context, price, end, and the author's own words."""
    context, price = format_tokens(spec.context_length), format_price(spec)
    costlier = min((o.above_tokens for o in spec.overrides if o.above_tokens), default=None)
    facts = [
        f"{context} context" if context else "",
        f"{price} per million tokens in / out" if " / " in price else price,
        f"other prices above {format_tokens(costlier)} tokens" if costlier else "",
        f"stands for {spec.alias_of}" if spec.alias_of else "",
        f"ends on {spec.expires[:10]}" if spec.expires else "",
    ]
    begin = spec.description[: 4 * _MAX_DESCRIPTION_CHARS]
    words = _LINE_BREAKS_RE.sub(" ", _MARKDOWN_RE.sub(r"\1", begin)).strip()
    if len(words) > _MAX_DESCRIPTION_CHARS:
        words = words[:_MAX_DESCRIPTION_CHARS].rpartition(" ")[0].rstrip(",.;:") + " …"
    return "\n".join(part for part in (" · ".join(fact for fact in facts if fact), words) if part)


# A row is planned field by field. Its `meta` says what was written, so that every worker and every
# later version knows it: a field that holds something else now has been changed by somebody.
_RECORD: Final = "openrouter_responses_pipe"


class _Record(NamedTuple):
    created: bool = False  # the row itself is ours
    wrote: Mapping[str, Any] = types.MappingProxyType({})
    theirs: frozenset[str] = frozenset()

    @classmethod
    def of(cls, row: ModelRow) -> _Record:
        """What the row says of us; nothing where it was never ours, or says something else."""
        record = _mapping(row.meta.get(_RECORD))
        theirs = frozenset(_strings(record.get("theirs")))
        return cls(record.get("created") is True, _mapping(record.get("wrote")), theirs)

    def dump(self) -> JSONObject:
        """The record as JSON."""
        return {"created": self.created, "wrote": dict(self.wrote), "theirs": sorted(self.theirs)}


def _plan_row(row: ModelRow | None, row_id: str, wanted: Mapping[str, Any]) -> ModelRow | None:
    """The row as it shall be, None: none. `wanted` may be empty: then all that was written is taken back."""
    if row is None:
        row, record = ModelRow(row_id), _Record(created=True)
        if not wanted:
            return None
    elif row.is_workspace:
        return row  # somebody has given a model of their own the id of ours
    else:
        record = _Record.of(row)
    wrote, theirs = dict(record.wrote), set(record.theirs)
    for field in sorted((wanted.keys() | wrote.keys()) - theirs):
        current = _field(row, field)
        if field in wrote and wrote.pop(field) != _mark(current) and current != wanted.get(field):
            theirs.add(field)
            continue
        is_theirs = not _is_unset(current) or (field == "access" and not record.created)
        if is_theirs and field not in record.wrote:
            continue
        row = _with_field(row, field, wanted.get(field))
        if field in wanted:
            wrote[field] = _mark(wanted[field])
    if wanted:
        return _with_field(row, _RECORD, _Record(record.created, wrote, frozenset(theirs)).dump())
    row = _with_field(row, _RECORD, None)
    is_plain = row.is_active and not row.params and not row.grants and theirs.isdisjoint(("name", "access"))
    return None if record.created and is_plain and all(map(_is_unset, row.meta.values())) else row


def _differing_rows(rows: Mapping[str, ModelRow], fields: Mapping[str, JSONObject]) -> dict[str, JSONObject]:
    """The rows that have to be written, each with what it shall say; those of models no longer shown too."""
    nothing: JSONObject = {}
    wanted = {row_id: nothing for row_id, row in rows.items() if _RECORD in row.meta} | {**fields}
    pairs = ((row_id, rows.get(row_id), say) for row_id, say in wanted.items())
    return {row_id: say for row_id, row, say in pairs if _plan_row(row, row_id, say) != row}


def _field(row: ModelRow, field: str) -> Any:
    if field in ("name", "access"):
        return row.name if field == "name" else row.grants
    name, _, part = field.partition(".")
    return _mapping(row.meta.get(name)).get(part) if part else row.meta.get(name)


def _with_field(row: ModelRow, field: str, value: Any) -> ModelRow:
    """The row with one field changed; None takes it away (a name stays, because there must be one)."""
    if field == "name":
        return row._replace(name=value or row.name)
    if field == "access":
        return row._replace(grants=value or frozenset())
    name, _, part = field.partition(".")
    if part:
        whole = {key: old for key, old in _mapping(row.meta.get(name)).items() if key != part}
        value = (whole if value is None else {**whole, part: value}) or None
    meta = {key: old for key, old in row.meta.items() if key != name}
    return row._replace(meta=meta if value is None else {**meta, name: value})


def _is_unset(value: Any) -> bool:
    """Whether a field says nothing; that is not False."""
    return value is None or (isinstance(value, str | list | dict | frozenset) and not value)


def _mark(value: Any) -> Any:
    """What is remembered of a value that was written: a switch as it is, all else by its digest."""
    if isinstance(value, bool):
        return value
    plain = sorted(value) if isinstance(value, frozenset) else value
    return hashlib.sha256(_json_dumps(plain)).hexdigest()[:8]


class ModelPublisher:
    """Keeps Open WebUI's model rows as the catalog and the valves have them, behind the scenes.

    `clock` gives seconds that only grow.
    """

    def __init__(self, host: OpenWebUIHost, pipe_id: str, clock: Callable[[], float]) -> None:
        self._host = host
        self._pipe_id = pipe_id
        self._clock = clock
        self._asked: tuple[Sequence[ModelSpec], PublishChoice] = ((), PublishChoice())
        self._is_due = False
        self._is_failing = False  # the log has it
        self._next_try_at = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._said_access = False

    def publish(self, shown: Sequence[ModelSpec], choice: PublishChoice) -> None:
        """See to it that the rows say what they shall. Returns at once; for the same list it is done once.

        After a failure it is tried again a minute later, when it is asked for.
        """
        if self._host.version is None:
            return
        if shown is not self._asked[0] or choice != self._asked[1]:
            self._asked, self._is_due = (shown, choice), True
        is_busy = self._task is not None and not self._task.done()
        if self._is_due and not is_busy and self._clock() >= self._next_try_at:
            self._task = asyncio.get_running_loop().create_task(
                self._catch_up(), name="publish models", context=_nobodys_context()
            )

    async def wait(self, longest_s: float) -> None:
        """Wait until what was asked for is written, for so many seconds at most."""
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=longest_s)

    async def aclose(self) -> None:
        """Stop writing."""
        await _end_tasks([self._task] if self._task is not None else ())

    async def _catch_up(self) -> None:
        """Publish what was asked for last, and once more if something else has been asked for meanwhile."""
        try:
            while self._is_due:
                self._is_due = False
                with self._host.only_one(f"models-{self._pipe_id}") as alone:
                    if not (alone and await self._write_all(*self._asked)):
                        self._is_due = True
                        break
        except Exception as exc:  # whatever the host's database says: the chats go on without
            level = logging.DEBUG if self._is_failing else logging.WARNING
            LOGGER.log(level, "Open WebUI's model settings could not be written: %s", type(exc).__name__)
            self._is_due = self._is_failing = True
        else:
            self._is_failing = False
        if self._is_due:
            self._next_try_at = self._clock() + _PUBLISH_RETRY_S

    async def _write_all(self, shown: Sequence[ModelSpec], choice: PublishChoice) -> bool:
        """Write what differs, row by row; False where nobody can own a row yet."""
        private = await self._host.admin_grants()
        rows = {row.id: row for row in await self._host.model_rows(f"{self._pipe_id}.")}

        def differing() -> dict[str, JSONObject]:
            fields = {f"{self._pipe_id}.{spec.id}": _row_fields(spec, choice, private) for spec in shown}
            return _differing_rows(rows, fields)

        due = await asyncio.to_thread(differing)
        for row_id, wanted in due.items():
            if not await self._write(row_id, wanted):
                return False
        if due:
            LOGGER.info("Open WebUI's settings of %d models have been brought up to date", len(due))
        self._say_access(choice)
        return True

    async def _write(self, row_id: str, wanted: Mapping[str, Any]) -> bool:
        """Write one row, planned anew: while the others were written somebody may have changed it."""
        row = await self._host.model_row(row_id)
        planned = _plan_row(row, row_id, wanted)
        if planned == row:
            return True
        if planned is None:
            return await self._host.delete_model_row(row_id)
        if row is None:
            try:
                return await self._host.insert_model_row(planned)
            except SQLAlchemyError:  # somebody else has made it in the same moment
                row = await self._host.model_row(row_id)
                planned = _plan_row(row, row_id, wanted)
                if row is None or planned is None:
                    raise
        return await self._host.update_model_row(planned, grants_too=planned.grants != row.grants)

    def _say_access(self, choice: PublishChoice) -> None:
        """Once: who is new to this expects that everybody sees the models."""
        if self._said_access or (choice.access == "everyone" and choice.mode != "off"):
            return
        self._said_access = True
        LOGGER.info(
            "Only administrators see these models, unless access is given: by the valve NEW_MODEL_ACCESS, "
            "or model by model under Admin Panel → Settings → Models."
        )


_PUBLISH_RETRY_S: Final = 60.0
_PUBLISH_WAIT_S: Final = 1.0


# ── 9a. History ──────────────────────────────────────────────────────────────
# The messages of a chat in, input items out.
# Promise: pure; a call never stands without its output, and what is not sent is counted.
# Doc: docs/history_and_request_transforms.md   Tests: tests/test_request_models.py

_PLAIN_SETTINGS: Final = RequestSettings()
_NOTHING_TAKEN_IN: Final = Intake()
# what is left out -> (one of it, several, how the sentence goes on); None: only the log need know
_LEFT_OUT: Final[dict[str, tuple[str, str, str] | None]] = {
    "picture": ("a picture", "{} pictures", ", because this model cannot see"),
    "unreadable picture": ("a picture", "{} pictures", " that could not be read"),
    "file": ("a file", "{} files", " that could not be read"),
    "large file": ("a file that is", "{} files that are", " too large"),
    "recording": ("a recording", "{} recordings", ", because this model cannot hear"),
    "recording format": ("a recording that is", "{} recordings that are", " neither WAV nor MP3"),
    "film": ("a film", "{} films", ", because this model cannot watch films"),
    "many pictures": ("a picture", "{} pictures", ", because there are too many in this chat"),
    "refused": None,  # each is named
    "block": ("a part of a message", "{} parts of messages", " that cannot be sent yet"),
    "role": ("a message", "{} messages", " of an unknown kind"),
    "tool": None,  # said where it is known whether somebody chose them
    **dict.fromkeys(("second tool of a name", "unanswered call", "output without call"), None),
}
_UNNAMED: Final = {"image": "a picture", "file": "a file", "audio": "a recording", "video": "a film"}


class _History:
    """The items of a history while it is translated, and what had to be left out."""

    __slots__ = (
        *("_media", "_refused", "_used_ids", "instructions", "items", "left_out"),
        *("most_output_chars", "pictures", "settings", "shown"),
    )

    def __init__(self, settings: RequestSettings, intake: Intake = _NOTHING_TAKEN_IN) -> None:
        self.settings = settings
        self.instructions = ""
        self.items: list[JSONObject] = []
        self.left_out: dict[str, int] = {}
        self.most_output_chars = settings.most_tool_chars
        self.pictures = 0
        self.shown: list[JSONObject] = []  # pictures of answers, which go with the next question
        self._media = intake.media
        self._refused: list[str] = []
        self._used_ids: dict[str, int] = {}

    def leave_out(self, what: str) -> None:
        """Remember that one `what`, a row of `_LEFT_OUT`, was not sent."""
        self.left_out[what] = self.left_out.get(what, 0) + 1

    def medium(self, kind: str, source: str, name: str = "") -> MediaBlob | None:
        """What a block of this kind holds, as it is or as it could be had; None if it is not sent."""
        if len(source) > _MAX_URL_CHARS:  # content, which would take time to be looked up
            return MediaBlob(source)
        blob = self._media.get(MediaRef(kind, source), MediaBlob(source))
        if not blob.reason:
            return blob
        if blob.reason in _LEFT_OUT:
            self.leave_out(blob.reason)
        else:
            self.leave_out("refused")
            self._refused.append(f"{_shown_name(name or blob.name) or _UNNAMED[kind]}. {blob.reason}.")
        return None

    def notices(self) -> tuple[str, ...]:
        """A sentence for each kind of thing that was left out and a person put there."""
        sentences = [f"Not sent to the model: {words}" for words in dict.fromkeys(self._refused)]
        for what, count in self.left_out.items():
            words = _LEFT_OUT[what]
            if words is not None:
                sentences.append(f"Not sent to the model: {words[count > 1].format(count)}{words[2]}.")
        return tuple(sentences)

    def unique_call_id(self, call_id: str) -> str:
        """`call_id`, renamed if an earlier call of the history has it."""
        return _unique_id(call_id, self._used_ids)


def plan_intake(
    messages: Sequence[Mapping[str, Any]], spec: ModelSpec, settings: RequestSettings = _PLAIN_SETTINGS
) -> IntakePlan:
    """What the history needs before it can be translated; nothing is fetched here.

    Media come in the order of their importance: the latest of the person's first.
    """
    carriers = [
        _carried(detail)
        for message in reversed(messages)
        if message.get("reasoning_details")
        for detail in _objects(message["reasoning_details"])
        if detail.get("type") == _CARRIER
    ]
    media: list[MediaRef] = []
    for message in reversed(messages):
        if message.get("role") == "user" and not isinstance(message.get("content"), str):
            blocks = reversed(_objects(message.get("content")))
            media += [ref for block in blocks for ref in _wanted(block, spec, settings)]
    shown = _pictures_of_answers(messages, spec, settings)
    for position in sorted(shown, reverse=True):
        addresses = [address for address in shown[position] if not address.startswith("data:")]
        media += [MediaRef("image", address, in_answer=True) for address in addresses]
    turns = tuple(dict.fromkeys(key for key in carriers if _ULID_RE.fullmatch(key)))
    sealed = tuple(dict.fromkeys(key for key in carriers if key not in turns and key))
    return IntakePlan(sealed, tuple(dict.fromkeys(media)), shown, turns)


def _transform_messages_to_input(
    messages: Sequence[Mapping[str, Any]],
    spec: ModelSpec,
    settings: RequestSettings = _PLAIN_SETTINGS,
    intake: Intake = _NOTHING_TAKEN_IN,
) -> _History:
    """Translate chat messages to input items (reference §4), in their order.

    System messages at the head become the instructions; a call without its output, or an output
    without its call, is dropped, because the API refuses a history that holds one.
    """
    history = _History(settings, intake)
    history.instructions, rest = _extract_system_prompt(messages)
    open_calls: dict[str, str] = {}
    records = dict(intake.records)  # each is used once: it stands for one call
    replay_from = _replay_from(rest, settings.replay) if spec.reasons else len(rest)
    before = len(messages) - len(rest)
    shown = _pictures_of_answers(messages, spec, settings) if intake.shown is None else intake.shown
    whole_from = _whole_from(rest, settings.retain_outputs)
    outputs = 0  # of tools, one after the other
    for position, message in enumerate(rest):
        role = str(message.get("role") or "")
        if shown and position + before in shown:
            history.shown += _shown_parts(shown[position + before], intake, settings)
        if role == "tool":
            outputs += 1
            is_old = position < whole_from
            history.most_output_chars = _RETAINED_CHARS if is_old else settings.most_tool_chars
            _add_tool_output(history, message, open_calls)
            continue
        build = _ROLE_BUILDERS.get(role)
        if build is None:
            history.leave_out("role")
            continue
        if outputs > 1:
            _sort_outputs(history.items)
        outputs = 0
        calls = _answered_calls(history, message, rest, position + 1) if message.get("tool_calls") else []
        is_recorded = role == "assistant" and position >= replay_from and message.get("reasoning_details")
        entries = _entries_of(message, records, intake) if is_recorded else []
        if entries and _add_replayed(history, _plain_text(message.get("content")), calls, entries):
            open_calls = {call.call_id: sent for call, sent in calls}
            for detail in _objects(message.get("reasoning_details")):
                records.pop(_carried(detail), None)
            continue
        build(history, message, spec)
        if calls:
            open_calls = {call.call_id: sent for call, sent in calls}
            history.items += [_call_item(call, sent, settings.tool_names) for call, sent in calls]
    if outputs > 1:
        _sort_outputs(history.items)
    _keep_latest_images(history)
    return history


def _sort_outputs(items: list[JSONObject]) -> None:
    """Bring the outputs at the end into the order of their calls, whichever tool was ready first."""
    start = len(items)
    while start and items[start - 1]["type"] == "function_call_output":
        start -= 1
    if len(items) - start > 1:
        wanted = {item["call_id"] for item in items[start:]}
        calls: dict[str, int] = {}
        for place in range(start - 1, -1, -1):  # they stand shortly before: never the whole history
            if len(calls) == len(wanted):
                break
            call_id = _text(items[place].get("call_id"))
            if call_id in wanted:
                calls.setdefault(call_id, place)
        items[start:] = sorted(items[start:], key=lambda item: calls.get(item["call_id"], 0))


def _keep_latest_images(history: _History) -> None:
    """Leave out the earliest pictures above the limit; a message that held nothing else goes with them."""
    left = history.settings.most_images
    if history.pictures <= left:
        return
    for item in reversed(history.items):
        content = item.get("content")
        if item.get("role") != "user" or not isinstance(content, list):
            continue
        kept: list[JSONObject] = []
        for part in reversed(content):
            if part["type"] == "input_image":
                left -= 1
                if left < 0:
                    history.leave_out("many pictures")
                    continue
            kept.append(part)
        item["content"] = kept[::-1]
    history.items = [item for item in history.items if item.get("content") != []]


def _replay_from(messages: Sequence[Mapping[str, Any]], replay: str) -> int:
    """The place from which on the model gets its reasoning back; `next_reply`: that of the last reply."""
    if replay == "off":
        return len(messages)
    asked = _questions_in(messages) if replay == "next_reply" else []
    return asked[-2] if len(asked) > 1 else 0


def _questions_in(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of what people have asked; the host hands pictures of tools over as if they had."""
    return [
        place
        for place, message in enumerate(messages)
        if message.get("role") == "user"
        and next((block.get("text") for block in _objects(message.get("content"))), "") != _TOOL_PICTURES
    ]


def _whole_from(messages: Sequence[Mapping[str, Any]], turns: int) -> int:
    """The place from which on outputs of tools stay whole, for `turns` questions at least; 0 turns: always.

    It moves in steps: with each move the rest of the chat has to be read anew by a provider's cache.
    """
    if not turns or not any(message.get("role") == "tool" for message in messages):
        return 0
    asked = _questions_in(messages)
    step = max(1, turns // 2)
    old = (len(asked) - turns) // step * step
    return asked[old] if old > 0 else 0


def _extract_system_prompt(messages: Sequence[Mapping[str, Any]]) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """(the text of the leading system messages, the messages after them)."""
    texts: list[str] = []
    for position, message in enumerate(messages):
        if message.get("role") not in ("system", "developer"):
            return "\n\n".join(texts), messages[position:]
        if (text := _plain_text(message.get("content"))).strip():
            texts.append(text)
    return "\n\n".join(texts), ()


def _with_own_prompt(instructions: str, parameters: Mapping[str, Any]) -> str:
    """The system prompt of a body's own fields before that of its messages, unless these hold it already.

    Open WebUI merges what a model, a folder or a chat says into the messages; other callers may not.
    """
    own = _text(parameters.get("system")) or _text(_mapping(parameters.get("params")).get("system"))
    return instructions if own.strip() in instructions else "\n\n".join(filter(None, (own, instructions)))


def _plain_text(content: Any) -> str:
    """The text of a message's content, a string or a list of blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    blocks = [block.get("text") for block in content if isinstance(block, Mapping)]
    return "\n".join(text for text in blocks if isinstance(text, str))


def _add_user(history: _History, message: Mapping[str, Any], spec: ModelSpec) -> None:
    blocks = map(_mapping, _blocks(message.get("content")))
    parts = [part for block in blocks if (part := _input_part(block, spec, history))]
    if parts:
        if history.shown:
            parts = [{"type": "input_text", "text": _SHOWN_ABOVE}, *history.shown, *parts]
            history.shown = []
        history.items.append({"type": "message", "role": "user", "content": parts})


def _add_system(history: _History, message: Mapping[str, Any], spec: ModelSpec) -> None:
    if (text := _plain_text(message.get("content"))).strip():
        part = {"type": "input_text", "text": text}
        history.items.append({"type": "message", "role": message["role"], "content": [part]})


def _add_answer(history: _History, text: str, phase: str = "") -> None:
    """An earlier answer; the easy form needs neither the id nor the status that the full form asks for."""
    if (text := _clean_answer(text)).strip():
        item: JSONObject = {"type": "message", "role": "assistant", "content": text}
        history.items.append({**item, "phase": phase} if phase else item)


def _clean_answer(text: str) -> str:
    """An answer as the model wrote it: without marks of other pipes and what was only shown."""
    if "data:" in text:  # a whole picture in base64; what can be shown goes as a picture
        text = _DATA_ADDRESS_RE.sub(r"\1data", text)
    if "]: #" in text:
        text = _MARKER_LINE_RE.sub("", text)
    if "<details" in text:
        text = _without_blocks(text, _DETAILS_RE, "</details>")
    if "<think>" in text:
        text = _without_blocks(text, _THINK_RE, "</think>")
    return text


def _without_blocks(text: str, begins: re.Pattern[str], end: str) -> str:
    """`text` without the blocks that begin so and come to their end."""
    kept, position = [], 0
    while match := begins.search(text, position):
        close = text.find(end, match.end())
        if close < 0:
            break
        kept.append(text[position : match.start()])
        position = close + len(end)
        while text.startswith("\n", position):
            position += 1
    return "".join([*kept, text[position:]])


# as Open WebUI puts it
_TOOL_PICTURES: Final = "Here are the images from the tool results above. Please analyze them."
_RETAINED_CHARS: Final = 1_000
_MARKER_LINE_RE: Final = re.compile(r"^[ \t]*\[[0-9A-HJKMNP-TV-Z]{26}\]: #[^\n]*(?:\n|\Z)", re.MULTILINE)
_DETAILS_RE: Final = re.compile(  # looked at twice, each time to its end at most: no text takes long
    r'<details(?=\s[^<>]*+>)(?=[^<>]*?\stype="(?:reasoning|tool_calls|code_interpreter)")[^<>]*+>'
)
_THINK_RE: Final = re.compile(r"^[ \t]*<think>", re.MULTILINE)
_ROLE_BUILDERS: Final[dict[str, Callable[[_History, Mapping[str, Any], ModelSpec], None]]] = {
    "user": _add_user,
    "assistant": lambda history, message, spec: _add_answer(history, _plain_text(message.get("content"))),
    "system": _add_system,
    "developer": _add_system,
}


def _answered_calls(
    history: _History, message: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], after: int
) -> list[tuple[ToolCall, str]]:
    """The calls of a message that have an output from `after` on, each with the id that is sent."""
    answered: set[str] = set()
    while after < len(messages) and messages[after].get("role") == "tool":
        answered.add(str(messages[after].get("tool_call_id") or ""))
        after += 1
    found: dict[str, tuple[ToolCall, str]] = {}
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = _mapping(_mapping(call).get("function"))
        call_id, name = str(_mapping(call).get("id") or ""), str(function.get("name") or "")
        if not call_id or not name or call_id not in answered or call_id in found:
            history.leave_out("unanswered call")
            continue
        arguments = function.get("arguments") or "{}"
        if not isinstance(arguments, str):
            arguments = _json_dumps(arguments).decode()
        found[call_id] = (ToolCall(call_id, name, arguments), history.unique_call_id(call_id))
    return list(found.values())


def _call_item(call: ToolCall, sent_id: str, names: Mapping[str, str]) -> JSONObject:
    name = names.get(call.name) or _safe_tool_name(call.name)
    return {"type": "function_call", "call_id": sent_id, "name": name, "arguments": call.arguments}


def _add_tool_output(history: _History, message: Mapping[str, Any], open_calls: dict[str, str]) -> None:
    call_id = open_calls.pop(str(message.get("tool_call_id") or ""), None)
    if call_id is None:
        history.leave_out("output without call")
        return
    output = _plain_text(message.get("content"))
    history.items.append(_output_item(call_id, _cut_text(output, history.most_output_chars)))


def _output_item(call_id: str, output: str) -> JSONObject:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


# Reasoning that goes back to the model as it came

_CARRIER: Final = "openrouter_responses_pipe"
# kind of thing a record holds -> of which key; what an entry of a record is, is said by its one key
_REASONING_FIELDS: Final[dict[str, type]] = {
    **dict.fromkeys(("id", "encrypted_content", "signature", "format", "status"), str),
    **dict.fromkeys(("summary", "content"), list),
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


class TurnRecord:
    """The output of one upstream call in its order: reasoning verbatim, of the rest what finds it again.

    An entry is `{"reasoning": item}`, `{"message": digest, "chars": n, "phase": word}`, `{"call": id}` or
    `{"tool": item}` of a tool that is not run here and has to find its own words again.
    """

    __slots__ = ("_calls", "_entries", "_texts")

    def __init__(self) -> None:
        self._entries: dict[int, JSONObject] = {}
        self._texts: dict[int, str] = {}
        self._calls: dict[int, ToolCall] = {}

    def note(self, emission: Emission) -> None:
        """Remember what belongs into the record; anything else is passed over."""
        if isinstance(emission, StatusUpdate) and not emission.done:
            self._entries.clear()  # the try has failed, another one comes
        elif isinstance(emission, ToolRequested):
            self._entries[emission.item] = {"call": emission.call.call_id}
            self._calls[emission.item] = emission.call
        elif isinstance(emission, ItemClosed):
            if emission.kind == "message":
                text = self._texts[emission.item] = _said_in(emission.payload)
                bare = text.strip()  # Open WebUI takes the spaces around an answer away
                phase = _text(emission.payload.get("phase"))
                entry: JSONObject = {"message": _digest(bare), "chars": len(bare)}
                self._entries[emission.item] = {**entry, "phase": phase} if phase else entry
            elif emission.kind == "server_tool":
                self._entries[emission.item] = {"tool": emission.payload}
            elif items := _replayable(emission.payload):
                self._entries[emission.item] = {"reasoning": items[0]} if len(items) == 1 else {"all": items}

    @property
    def carrier_item(self) -> int | None:
        """The item that the record rides with: the first that the host does not keep whole."""
        return min((number for number, entry in self._entries.items() if _hidden_items(entry)), default=None)

    def dump(self) -> list[JSONObject]:
        """The entries in the order of the output."""
        return [self._entries[number] for number in sorted(self._entries)]

    @property
    def calls(self) -> list[ToolCall]:
        """The calls as the model wrote them, whichever was finished first."""
        return [self._calls[number] for number in sorted(self._calls) if number in self._entries]

    def input_items(self, names: Mapping[str, str], *, is_kept: bool) -> list[JSONObject]:
        """The output as the next upstream call gets it, which is as a later turn of the chat will have it.

        `is_kept`: the host keeps the record. Without reasoning there is none: then one text stands before the
        calls, as the host hands it back.
        """
        history = _History(_PLAIN_SETTINGS)
        if self.carrier_item is None:
            texts = [self._texts[number] for number in sorted(self._texts) if number in self._entries]
            _add_answer(history, "\n".join(texts))
            return [*history.items, *(_call_item(call, call.call_id, names) for call in self.calls)]
        for number in sorted(self._entries):
            entry = self._entries[number]
            if "call" in entry:
                call = self._calls[number]
                history.items.append(_call_item(call, call.call_id, names))
            elif "message" in entry:
                phase = _text(entry.get("phase")) if is_kept else ""
                _add_answer(history, self._texts[number].strip(), phase)
            else:
                history.items += _hidden_items(entry)
        return history.items


def _said_in(payload: Mapping[str, Any]) -> str:
    """The text of a message item."""
    parts = _objects(payload.get("content"))
    return _whole_text("".join(str(part.get("text") or part.get("refusal") or "") for part in parts))


def _replayable(payload: Mapping[str, Any]) -> list[JSONObject]:
    """A reasoning item as it may be sent again; none if there is nothing in it that a provider would read."""
    details = _objects(payload.get("reasoning_details"))
    return _from_chat_details(details) if details else _reasoning_items([payload])


def _reasoning_items(values: Iterable[Any]) -> list[JSONObject]:
    return [item for item in map(_reasoning_item, values) if item is not None]


def _reasoning_item(value: Any) -> JSONObject | None:
    """The fields of a reasoning item and nothing else (reference §4)."""
    known: JSONObject = {
        field: part
        for field, part in _mapping(value).items()
        if isinstance(part, _REASONING_FIELDS.get(field, ()))
    }
    for field, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = map(_mapping, known.get(field, ()))
        if not all(part.get("type") == kind and isinstance(part.get("text"), str) for part in parts):
            return None
    texts = any(part["text"] for part in known.get("content", ()))
    if not (known.get("encrypted_content") or known.get("signature") or texts):
        return None
    known.setdefault("id", "rs_" + _digest(str(known)))
    return {"type": "reasoning", "summary": [], **known}


def _from_chat_details(details: Iterable[Mapping[str, Any]]) -> list[JSONObject]:
    """Reasoning items of `reasoning_details`, as `/chat/completions` gives them (reference §13)."""
    items: dict[str, JSONObject] = {}
    named: dict[Any, str] = {}  # the id of what stands at an index
    for detail in details:
        row = _DETAIL_KINDS.get(_text(detail.get("type")))
        if row is None:
            continue
        index = detail["index"] if isinstance(detail.get("index"), int) else None
        item_id = _text(detail.get("id")) or named.get(index, "")
        if index is not None and item_id:
            named[index] = item_id
        item = items.setdefault(item_id or str(index), {"id": item_id} if item_id else {})
        for field in ("format", "signature"):
            if _text(detail.get(field)):
                item[field] = detail[field]
        field, part_type, key = row
        if part_type:
            _add_part(item, field, {"type": part_type, "text": _text(detail.get(key))}, detail)
        else:
            item[field] = _text(detail.get(key))
    return _reasoning_items(items.values())


def _add_part(item: JSONObject, field: str, part: JSONObject, detail: Mapping[str, Any]) -> None:
    """Fragments of one index are one part; `_last` is gone before the item is sent."""
    parts = item.setdefault(field, [])
    index = detail.get("index")
    if parts and isinstance(index, int) and item.get("_last") == (field, index):
        parts[-1]["text"] += part["text"]
    else:
        parts.append(part)
    item["_last"] = (field, index)


# kind of detail -> (field of the item, type of the part, where its text stands); secrets are no parts
_DETAIL_KINDS: Final[dict[str, tuple[str, str, str]]] = {
    "reasoning.text": ("content", "reasoning_text", "text"),
    "reasoning.summary": ("summary", "summary_text", "summary"),
    "reasoning.encrypted": ("encrypted_content", "", "data"),
}


def _to_chat_details(item: Mapping[str, Any]) -> list[JSONObject]:
    """`reasoning_details` of a reasoning item, for `/chat/completions`."""
    named = {field: item[field] for field in ("id", "format") if item.get(field)}
    signed = {"signature": item["signature"]} if item.get("signature") else {}
    summary = [part.get("text", "") for part in item.get("summary", ())]
    texts = [part.get("text", "") for part in item.get("content", ())]
    details = [{"type": "reasoning.summary", "summary": text, **named} for text in summary]
    details += [{"type": "reasoning.text", "text": text, **signed, **named} for text in texts]
    if item.get("encrypted_content"):
        details.append({"type": "reasoning.encrypted", "data": item["encrypted_content"], **named})
    return [{**detail, "index": index} for index, detail in enumerate(details)]


def _entries_of(
    message: Mapping[str, Any], records: Mapping[str, TurnEntries], intake: Intake
) -> list[Mapping[str, Any]]:
    """The records that ride with an assistant message, one after the other.

    What nobody sealed may have been made by hand: of that only reasoning is believed, and no great lot.
    """
    entries: list[Mapping[str, Any]] = []
    unsealed: list[Mapping[str, Any]] = []
    for detail in _objects(message.get("reasoning_details")):
        if detail.get("type") != _CARRIER:
            unsealed.append(detail)
        elif key := _carried(detail):
            entries += records.get(key, ())
        elif intake.takes_unsealed and _is_small(detail):
            entries += [{**entry, "phase": None, "tool": None} for entry in _objects(detail.get("record"))]
    if entries or not _is_small(unsealed):
        return entries
    return [{"reasoning": item} for item in _from_chat_details(unsealed)]


def _carried(detail: Mapping[str, Any]) -> str:
    """By what a record is found: the ULID under which it is stored, or itself, sealed; "" for neither."""
    key = _text(detail.get("turn")) or _text(detail.get("sealed"))
    return key if len(key) <= _MAX_CARRIER_CHARS else ""


def _is_small(value: Any) -> bool:
    try:
        return len(_json_dumps(value)) <= _MAX_RECORD_BYTES
    except (TypeError, ValueError, RecursionError):
        return False


def _hidden_items(entry: Mapping[str, Any]) -> list[JSONObject]:
    """What of an entry only the record holds."""
    tool = _mapping(entry.get("tool"))
    if tool.get("type") in _REPLAYED_TOOLS:
        return [dict(tool)]
    return _reasoning_items([entry["reasoning"]] if "reasoning" in entry else _objects(entry.get("all")))


def _add_replayed(
    history: _History, text: str, calls: Sequence[tuple[ToolCall, str]], entries: TurnEntries
) -> bool:
    """Add an assistant message in the order in which the model wrote it; False if it is not that any more.

    Then somebody has edited it, or a call has gone: thinking must not stand before something else.
    """
    has_order = any("message" in entry or "call" in entry for entry in entries)
    texts = _split_answer(text, [entry for entry in entries if "message" in entry]) if has_order else [text]
    wanted_calls = [entry["call"] for entry in entries if "call" in entry]
    if texts is None or (has_order and wanted_calls != [call.call_id for call, _ in calls]):
        return False
    if has_order:
        _add_answer(history, texts.pop(0))
    left_calls = deque(calls)
    for entry in entries:
        if "message" in entry:
            _add_answer(history, texts.pop(0), _text(entry.get("phase")))
        elif "call" in entry:
            history.items.append(_call_item(*left_calls.popleft(), history.settings.tool_names))
        else:
            history.items += _hidden_items(entry)
    for rest in texts:
        _add_answer(history, rest)
    history.items += [_call_item(call, sent, history.settings.tool_names) for call, sent in left_calls]
    return True


def _split_answer(text: str, messages: TurnEntries) -> list[str] | None:
    """[what stands before them, the text of each message entry, the rest]; None if they are not in `text`.

    Open WebUI joins the messages of an answer, with line breaks or, after Continue, without, and takes
    the spaces around the last one away: they do not count. What nobody recorded stands before or after.
    """
    if not messages:
        return [text]
    lengths = [chars if isinstance(chars := entry.get("chars"), int) else -1 for entry in messages]
    found = _pieces_of(text, messages, lengths)
    if found is not None:
        return ["", *found]
    mirrored = _pieces_of(text[::-1], messages[::-1], lengths[::-1], -1)
    return None if mirrored is None else [piece[::-1] for piece in reversed(mirrored)]


def _pieces_of(
    text: str, messages: TurnEntries, lengths: Sequence[int], direction: int = 1
) -> list[str] | None:
    """The messages from the start of `text`, and what follows them."""
    pieces: list[str] = []
    position = 0
    for entry, length in zip(messages, lengths, strict=True):
        start = position
        while length and text[start : start + 1].isspace():
            start += 1
        piece = text[start : start + length]
        if length < 0 or _digest(piece[::direction]) != entry["message"]:
            return None
        pieces.append(piece)
        position = start + length
    return [*pieces, text[position:]]


# Content blocks


def _input_part(block: Mapping[str, Any], spec: ModelSpec, history: _History) -> JSONObject | None:
    """A content block as it is sent; None if it is not, which `history` then knows."""
    if block.get("type") in ("text", "input_text"):
        text = _text(block.get("text"))
        return {"type": "input_text", "text": text} if text else None
    kind = _MEDIA_KINDS.get(_text(block.get("type")))
    if kind is None:
        return history.leave_out("block")
    if not kind.is_taken(spec):
        return history.leave_out(_NOT_TAKEN[kind.name])
    name = _text((_mapping(block.get("file")) or block).get("filename")) if kind is _FILE else ""
    blob = history.medium(kind.name, kind.source(block), name)
    return blob and _TO_INPUT[kind.name](block, blob, history)


def _to_input_image(block: Mapping[str, Any], blob: MediaBlob, history: _History) -> JSONObject | None:
    is_drawing = blob.url.startswith("data:image/svg")  # no model takes one, and the request would fail
    if is_drawing or not blob.url.startswith(("data:image/", "https://")):
        return history.leave_out("unreadable picture")
    if not _fits(blob.url, history, "unreadable picture"):
        return None
    history.pictures += 1
    detail = _mapping(block.get("image_url")).get("detail") or block.get("detail")
    return _image_part(blob.url, detail if detail in _IMAGE_DETAILS else "auto")


def _image_part(url: str, detail: str = "auto") -> JSONObject:
    return {"type": "input_image", "image_url": url, "detail": detail}


def _fits(source: str, history: _History, damaged: str, most_bytes: int | None = None) -> bool:
    """Whether a data URL may hold base64 within the limit; what does not is left out. Other URLs do.

    Of the content, which may be large, only the first piece is looked at; nothing is copied.
    """
    if not source.startswith("data:"):
        return True
    start = source.find(",", 0, _MAX_URL_CHARS) + 1
    if not source.startswith(";base64", start - 8):
        history.leave_out(damaged)
        return False
    return _is_base64_within(source, start, history, damaged, most_bytes)


def _is_base64_within(
    source: str, start: int, history: _History, damaged: str, most_bytes: int | None = None
) -> bool:
    is_damaged = not _BASE64_HEAD_RE.fullmatch(source[start : start + 64])
    if is_damaged or _base64_bytes(source, start) > (most_bytes or history.settings.most_bytes):
        history.leave_out(damaged if is_damaged else "large file")
        return False
    return True


def _to_input_file(block: Mapping[str, Any], blob: MediaBlob, history: _History) -> JSONObject | None:
    """A file as chat or `/responses` has it; a model that does not read files gets the text of a PDF."""
    file = _mapping(block.get("file")) or block
    source, name = blob.url, _text(file.get("filename")) or blob.name
    if blob.text:
        return {"type": "input_text", "text": _file_as_text(name, blob.text)}
    if source.startswith("https://"):
        name = name or _name_of(source)
        return {"type": "input_file", "filename": name or _NAMELESS_FILE, "file_url": source}
    if not source and _text(file.get("file_id")):
        return {"type": "input_file", "filename": name or _NAMELESS_FILE, "file_id": file["file_id"]}
    if not source:
        return history.leave_out("file")
    if not source.startswith("data:"):
        source = f"data:{_guessed_mime(name) or 'application/pdf'};base64,{source}"
    if not _fits(source, history, "file"):
        return None
    return {"type": "input_file", "filename": name or _NAMELESS_FILE, "file_data": source}


def _file_as_text(name: str, text: str) -> str:
    return f'<file name="{_shown_name(name).translate(_NOT_IN_TAGS)}">\n{text}\n</file>'


def _to_input_audio(block: Mapping[str, Any], blob: MediaBlob, history: _History) -> JSONObject | None:
    kind, data = blob.mime or _text(_mapping(block.get("input_audio")).get("format")), blob.url
    kind = _AUDIO_FORMATS.get(kind, kind)
    if kind not in ("wav", "mp3"):
        return history.leave_out("recording format")
    start = data.find(",", 0, _MAX_URL_CHARS) + 1  # behind the head of a data URL, if there is one
    if not _is_base64_within(data, start, history, "file"):
        return None
    return {"type": "input_audio", "input_audio": {"data": data[start:], "format": kind}}


def _to_input_video(block: Mapping[str, Any], blob: MediaBlob, history: _History) -> JSONObject | None:
    if not blob.url.startswith(("data:video/", "https://")):
        return history.leave_out("file")
    fits = _fits(blob.url, history, "file", history.settings.most_video_bytes)
    return {"type": "input_video", "video_url": blob.url} if fits else None


_NAMELESS_FILE: Final = "file.pdf"
_NOT_IN_TAGS: Final = str.maketrans('"<>', "'()")
_AUDIO_FORMATS: Final = {
    **dict.fromkeys(("mpeg", "audio/mpeg"), "mp3"),
    **dict.fromkeys(("x-wav", "wave", "audio/wav"), "wav"),
}
_IMAGE_DETAILS: Final = ("auto", "low", "high", "original")
_NOT_TAKEN: Final = {"image": "picture", "audio": "recording", "video": "film"}  # rows of `_LEFT_OUT`
_TO_INPUT: Final[dict[str, Callable[[Mapping[str, Any], MediaBlob, _History], JSONObject | None]]] = {
    "image": _to_input_image,
    "file": _to_input_file,
    "audio": _to_input_audio,
    "video": _to_input_video,
}


# Media that have to be fetched first


def _at(block: Mapping[str, Any], field: str) -> str:
    """An address that stands in a field itself, or in its `url`."""
    return _text(block.get(field)) or _text(_mapping(block.get(field)).get("url"))


def _image_source(block: Mapping[str, Any]) -> str:
    return _at(block, "image_url")


def _file_source(block: Mapping[str, Any]) -> str:
    file = _mapping(block.get("file")) or block
    source = _text(file.get("file_data")) or _text(file.get("file_url"))
    file_id = _text(file.get("file_id"))
    return source or (_host_file_address(file_id) if _UUID_RE.fullmatch(file_id) else "")


def _audio_source(block: Mapping[str, Any]) -> str:
    return _text(_mapping(block.get("input_audio")).get("data")) or _at(block, "input_audio")


def _host_file_address(file_id: str) -> str:
    return f"/api/v1/files/{file_id}/content"


_IMAGE: Final = MediaKind("image", _image_source, lambda spec: spec.takes_images)
_FILE: Final = MediaKind("file", _file_source, lambda spec: True)
_VIDEO: Final = MediaKind("video", lambda block: _at(block, "video_url"), lambda spec: spec.takes_video)
_MEDIA_KINDS: Final[dict[str, MediaKind]] = {
    **dict.fromkeys(("image_url", "input_image"), _IMAGE),
    **dict.fromkeys(("file", "input_file"), _FILE),
    "input_audio": MediaKind("audio", _audio_source, lambda spec: spec.takes_audio),
    **dict.fromkeys(("video_url", "input_video"), _VIDEO),
}


def _wanted(block: Mapping[str, Any], spec: ModelSpec, settings: RequestSettings) -> list[MediaRef]:
    """The medium of a content block, if it has to be fetched and the model takes it."""
    kind = _MEDIA_KINDS.get(_text(block.get("type")))
    if kind is None or not kind.is_taken(spec):
        return []
    source = kind.source(block)
    return [MediaRef(kind.name, source)] if _is_fetched(kind.name, source, settings) else []


def _is_fetched(kind: str, source: str, settings: RequestSettings) -> bool:
    """Whether the pipe fetches what is at this address; else it is content, or OpenRouter's to fetch."""
    if len(source) > _MAX_URL_CHARS:
        return False
    if _host_file_id(source, settings.webui_url):
        return True
    if not source[:8].lower().startswith(("http://", "https://")) or _is_youtube(source):
        return False
    if settings.keeps_media or kind == "audio" or source[:5].lower() == "http:":
        return True
    return _web_address(source, settings.trusted_hosts).is_allowed  # OpenRouter may not reach it


def _is_youtube(url: str) -> bool:
    """Whether it is a film that some models can watch where it is."""
    where = _web_address(url)
    return where.host.removeprefix("www.").removeprefix("m.") in ("youtube.com", "youtu.be")


def _pictures_of_answers(
    messages: Sequence[Mapping[str, Any]], spec: ModelSpec, settings: RequestSettings
) -> dict[int, list[str]]:
    """The addresses of pictures that answers show, by place; the latest, where those of people leave room."""
    if not (settings.answer_images and spec.takes_images):
        return {}
    answers = [
        (position, message)
        for position, message in enumerate(messages)
        if message.get("role") == "assistant"
        and ("![" in content if isinstance(content := message.get("content"), str) else content)
    ]
    if not answers:
        return {}
    asked = [
        _image_source(block)
        for message in messages
        if message.get("role") == "user"
        for block in _objects(message.get("content"))
        if _MEDIA_KINDS.get(_text(block.get("type"))) is _IMAGE
    ]
    room, seen = settings.most_images - len(asked), set(asked)
    found: dict[int, list[str]] = {}
    for position, message in reversed(answers):
        pictures = [url for url in _pictures_in(message, settings.webui_url) if url not in seen]
        if room > 0 and pictures:
            found[position] = pictures[-room:]
            seen.update(found[position])
            room -= len(found[position])
    return found


def _pictures_in(message: Mapping[str, Any], webui_url: str) -> list[str]:
    """The addresses of the pictures that an answer shows, in its text or as blocks of its own."""
    in_text = [match[2] for match in _MARKDOWN_IMAGE_RE.finditer(_plain_text(message.get("content")))]
    blocks = map(_image_source, _objects(message.get("content")))
    return [
        address
        for address in dict.fromkeys([*in_text, *blocks])
        if address.startswith(("data:image/", "https://", "http://")) or _host_file_id(address, webui_url)
    ]


def _shown_parts(addresses: Iterable[str], intake: Intake, settings: RequestSettings) -> list[JSONObject]:
    """The pictures of an answer that could be had; the others nobody misses: a model made them up."""
    urls: list[str] = []
    for address in addresses:
        if not address.startswith("data:image/"):
            urls.append(intake.media.get(MediaRef("image", address, True), _NO_MEDIUM).url)
        elif _is_picture_data(address, settings.most_bytes):
            urls.append(address)
    return [_image_part(url) for url in urls if url]


def _is_picture_data(address: str, most_bytes: int) -> bool:
    """Whether a data URL holds a picture, and nothing that only says that it is one."""
    head, _, content = address.partition(",")
    if not head.endswith(";base64"):
        return False
    try:
        _validate_base64_size(content, most_bytes)
        kind = _sniffed(base64.b64decode(content[: _SNIFFED_BYTES // 3 * 4] + "===", validate=False))
    except (InputError, ValueError):
        return False
    return kind.startswith("image/") and kind != "image/svg+xml"


_NO_MEDIUM: Final = MediaBlob()
_SHOWN_ABOVE: Final = "(Pictures that your answers above show:)"


# Files attached to a chat


def _file_key(file: Mapping[str, Any]) -> str:
    """What an entry of the host's list of files is known by."""
    return _text(file.get("id")) or _text(file.get("url"))


def _whole_files(files: ChatFiles, spec: ModelSpec, settings: RequestSettings) -> dict[str, JSONObject]:
    """The files that the model gets whole, by their key, each as a block of a message."""
    if settings.native_files == "off":
        return {}
    blocks = {_file_key(file): _whole_file(file, spec, settings) for file in files.files}
    return {key: block for key, block in blocks.items() if key and block is not None}


def _whole_file(file: Mapping[str, Any], spec: ModelSpec, settings: RequestSettings) -> JSONObject | None:
    """The block for an attached file; None if it is left to the host, which searches in it."""
    address, name = _text(file.get("url")), _text(file.get("name"))
    if _is_youtube(address):
        return _FILE_BLOCKS["video"](address, name) if spec.takes_video else None
    inner = _mapping(file.get("file"))
    meta = {**_mapping(file.get("meta")), **_mapping(inner.get("meta"))}
    file_id, kind = _text(file.get("id")), file.get("type", "file")
    text = _text(file.get("content")) or _text(_mapping(inner.get("data")).get("content"))
    if kind in _READ_BY_THE_PAGE and text and spec.reads_whole_files(settings.native_files):
        return _FILE_BLOCKS["read"](text, name or address) if len(text) <= _room_for_text(spec) else None
    if kind != "file" or not _HOST_FILE_RE.fullmatch(_host_file_address(file_id)):
        return None
    mime = _text(file.get("content_type")) or _text(meta.get("content_type"))
    mime = (mime or _guessed_mime(name)).partition(";")[0]
    kind = next((kind for kind, mimes in _WHOLE_MIMES.items() if mimes.fullmatch(mime)), "")
    size = file.get("size") or meta.get("size")
    is_long = kind == "text" and _is_number(size) and size > _room_for_text(spec)
    is_taken = {"video": spec.takes_video, "audio": spec.takes_audio, "": False}
    if is_long or not is_taken.get(kind, spec.reads_whole_files(settings.native_files)):
        return None
    return _FILE_BLOCKS[kind](_host_file_address(file_id), name)


def _room_for_text(spec: ModelSpec) -> float:
    """How long a text may be that is sent whole, in characters: half of what the model reads at once."""
    return _CHARS_PER_TOKEN * (spec.context_length or _USUAL_CONTEXT) / 2


# a temporary chat does not upload its files, and web pages are none: the page hands over their text
_READ_BY_THE_PAGE: Final = ("text", "doc")
_CHARS_PER_TOKEN: Final = 4
_USUAL_CONTEXT: Final = 32_000  # tokens of a model of which nobody knows it
_WHOLE_MIMES: Final[dict[str, re.Pattern[str]]] = {
    "file": re.compile(r"application/pdf"),
    "text": re.compile(r"text/.+|application/(?:json|xml|(?:x-)?(?:yaml|toml|javascript|sh|sql|ndjson))"),
    "audio": re.compile(r"audio/(?:x-)?(?:wav|wave|mpeg|mp3)"),
    "video": re.compile(r"video/(?:mp4|mpeg|quicktime|webm)"),
}
_FILE_BLOCKS: Final[dict[str, Callable[[str, str], JSONObject]]] = {
    **dict.fromkeys(
        ("file", "text"),
        lambda address, name: {"type": "file", "file": {"file_url": address, "filename": name}},
    ),
    "read": lambda text, name: {"type": "text", "text": _file_as_text(name, text)},
    "audio": lambda address, name: {"type": "input_audio", "input_audio": {"url": address}},
    "video": lambda address, name: {"type": "video_url", "video_url": {"url": address}},
}


def _with_files(
    messages: Sequence[Mapping[str, Any]],
    blocks: Mapping[str, JSONObject],
    questions: Sequence[tuple[str, Container[str]]],
) -> Sequence[Mapping[str, Any]]:
    """The messages, each file before the question that it came with; the last question has all others.

    So what was sent once stays where it is, and providers find it in their caches. `questions` are those of
    the saved chat: a question is known by its text, which the host may have put something before.
    """
    asked = [position for position, message in enumerate(messages) if message.get("role") == "user"]
    if not blocks or not asked:
        return messages
    waiting = dict(blocks)
    placed: dict[int, list[JSONObject]] = {}
    places = asked[:]  # from the end, because the host may have summed up the beginning
    for text, keys in reversed(questions):
        mine = [key for key in blocks if key in keys]
        place = next((n for n in reversed(places) if _is_question(messages[n], text, mine)), None)
        if place is not None:
            del places[places.index(place) :]
            placed[place] = [blocks[key] for key in mine]
            waiting = {key: block for key, block in waiting.items() if key not in mine}
    placed[asked[-1]] = [*placed.get(asked[-1], ()), *waiting.values()]
    seen: list[JSONObject] = []
    whole = list(messages)
    for position in asked:
        files = [block for block in placed.get(position, ()) if block not in seen]
        if files:
            seen += files
            content = [*files, *_blocks(messages[position].get("content"))]
            whole[position] = {**messages[position], "content": content}
    return whole


def _is_question(message: Mapping[str, Any], text: str, keys: Iterable[str]) -> bool:
    """Whether a message ends with this text; what the host puts before it ends with a line."""
    sent, text = _plain_text(message.get("content")).strip(), text.strip()
    if not text:
        is_bare = not sent or (sent.startswith(_PASSAGES_BEGIN) and sent.endswith(_PASSAGES_END))
        return is_bare or any(key in sent for key in keys)
    return sent.endswith(text) and sent.removesuffix(text)[-1:] in ("", "\n")


def _blocks(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content if isinstance(content, list) else []


def _sent_whole(blocks: Mapping[str, JSONObject], intake: Intake) -> frozenset[str]:
    """The keys of the files that could be had."""
    failed = {
        key
        for key, block in blocks.items()
        if (kind := _MEDIA_KINDS.get(block["type"]))
        and intake.media.get(MediaRef(kind.name, kind.source(block)), _NO_MEDIUM).reason
    }
    return frozenset(blocks.keys() - failed)


def _without_passages(
    messages: Sequence[Mapping[str, Any]], files: ChatFiles, whole: frozenset[str]
) -> Sequence[Mapping[str, Any]]:
    """The messages without the passages that the host found, if all of them are of files sent whole."""
    if not files.sources or not whole.issuperset(files.sources):
        return messages
    restored = list(messages)
    last = _first_text(messages[-1]) if messages else ""
    is_apart = len(messages) > 1 and messages[-2].get("role") == "assistant"
    if is_apart and _PASSAGE in last and not last.endswith(files.user_prompt):
        restored.pop()  # Continue: with no question at the end, they are a message of their own
    for position in range(len(restored) - 1, -1, -1):
        first = _first_text(messages[position])
        before = first.removesuffix(files.user_prompt) if files.user_prompt else first
        if not files.user_prompt and not first.strip().endswith(_PASSAGES_END):
            continue
        is_longer = before != first or not files.user_prompt
        if messages[position].get("role") == "user" and is_longer and _PASSAGE in before:
            plain = [
                {**block, "text": text.removeprefix(before)}
                if (text := _text(_mapping(block).get("text")))
                else block
                for block in _blocks(messages[position].get("content"))
            ]
            restored[position] = {**messages[position], "content": plain}
            break
    head = messages[0] if messages else {}
    if head.get("role") == "system":
        prompt = _without_their_end(_plain_text(head.get("content")), files.system_prompt)
        restored[0] = {**head, "content": prompt}
    return restored


def _without_their_end(text: str, prompt: str) -> str:
    """A system prompt without the passages at its end; `prompt` may hold the chat's own part twice."""
    if _PASSAGE not in text or not text.rstrip().endswith(_PASSAGES_END):
        return text
    for begin in itertools.islice(_PASSAGES_BEGIN_RE.finditer(text), _MOST_BEGINNINGS):
        before = text[: begin.start()].strip()
        if prompt.strip().endswith(before) and bool(before) == bool(prompt.strip()):
            return before
    return text


def _first_text(message: Mapping[str, Any]) -> str:
    blocks = _blocks(message.get("content"))
    return next(filter(None, (_text(_mapping(block).get("text")) for block in blocks)), "")


_PASSAGE: Final = '<source id="'
# so Open WebUI's own template begins and ends; behind another one the passages stay
_PASSAGES_BEGIN: Final = ("### Task:", "<context>", "<source")
_PASSAGES_BEGIN_RE: Final = re.compile(r"^(?:### Task:|<context>|<source)", re.MULTILINE)
_MOST_BEGINNINGS: Final = 20
_PASSAGES_END: Final = ("</source>", "</context>")
_LOOKED_INTO_BY_TOOLS: Final = ("file", "collection", "note", "chat", "folder")


def _missed_files(files: ChatFiles, whole: Container[str], has_tools: bool) -> tuple[str, ...]:
    """A sentence for what is attached and reaches the model in no way."""
    if files.is_retrieved:
        return ()
    looked_into = _LOOKED_INTO_BY_TOOLS if has_tools else ()
    names = [
        _shown_name(_text(file.get("name"))) or _UNNAMED["file"]
        for file in files.files
        if _file_key(file) not in whole and file.get("type", "file") not in looked_into
    ]
    return tuple(f"Not sent to the model: {name}. Open WebUI looks into no files for it." for name in names)


# ── 9b. Request models ───────────────────────────────────────────────────────
# Open WebUI's chat body in, the body of `POST /responses` out.
# Promise: pure; a bad chat raises InputError with a sentence, nothing else.
# Doc: docs/history_and_request_transforms.md   Tests: tests/test_request_models.py

_MOST_NAMED: Final = 20
_READ_ELSEWHERE: Final = frozenset({"system", "params", "chat_id", "message_id"})


def _get_chat_context(metadata: Mapping[str, Any], body: Mapping[str, Any]) -> ChatContext:
    """The ids of a request: the host's, else those that a client names; what is no id counts as none."""
    sources = (metadata, body, _mapping(body.get("metadata")))

    def first(name: str) -> str:
        return next((found for source in sources if _ID_RE.fullmatch(found := _text(source.get(name)))), "")

    return ChatContext(first("chat_id"), first("message_id"))


class CompletionsBody(NamedTuple):
    """The body that Open WebUI hands over, taken apart; `parameters` is all that is not history."""

    model: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> CompletionsBody:
        """Check the outline of a chat body.

        Raises:
            InputError: `messages` is missing, empty, or no list of objects.
        """
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InputError("It holds no messages")
        if not all(map(_is_object, messages)):
            raise InputError("One of its messages is not an object")
        tools = body.get("tools")
        return cls(
            model=_upstream_model_id(str(body.get("model") or "")),
            messages=tuple(messages),
            tools=tuple(_objects(tools)),
            parameters={
                name: value
                for name, value in body.items()
                # A guarded null is kept: with it somebody may mean to undo what is in force.
                if name not in _NOT_PARAMETERS and (value is not None or name in _GUARDED_PARAMETERS)
            },
        )

    @property
    def is_guarded(self) -> bool:
        """Whether it sets a field that not everybody may set."""
        return not _GUARDED_PARAMETERS.isdisjoint(self.parameters)

    def within(self, rights: RequestRights) -> CompletionsBody:
        """The body as it may be sent: of `provider` only what narrows the administrators' choice.

        Raises:
            InputError: a field that only administrators may set.
        """
        parameters = dict(self.parameters)
        for name in sorted(_GUARDED_PARAMETERS.intersection(parameters)):
            in_force, *options = map(_decoded, rights.approved.get(name) or (None,))
            value = _decoded(parameters[name])
            if value is None:
                parameters[name] = in_force
            elif rights.is_admin or value == in_force or value in options:
                continue
            elif name == "provider":
                parameters[name] = _stricter(_mapping(in_force), _as_provider(name, value), rights.opened)
            elif not _matches_any(name, rights.opened):
                raise InputError(f"The parameter {name} can only be set by an administrator")
        sent = {name: value for name, value in parameters.items() if value is not None}
        return self._replace(parameters=sent)

    @property
    def unsent(self) -> tuple[str, ...]:
        """The parameters that `/responses` does not have, their names fit for a log."""
        names = (name for name in self.parameters if name not in _PARAMETERS and name not in _READ_ELSEWHERE)
        return tuple(ascii(str(name)[:40])[1:-1] for name in itertools.islice(names, _MOST_NAMED))

    @property
    def wants_chat(self) -> bool:
        """Whether one of them is known to `/chat/completions`."""
        return any(name in self.parameters for name in _CHAT_ONLY_PARAMETERS)


class ResponsesBody(NamedTuple):
    """A body for `POST /responses`, what the person must know about it, and what the log may count."""

    payload: JSONObject
    notices: tuple[str, ...] = ()
    left_out: Mapping[str, int] = types.MappingProxyType({})
    tools: tuple[OfferedTool, ...] = ()

    @classmethod
    def from_completions(
        cls,
        body: CompletionsBody,
        spec: ModelSpec,
        settings: RequestSettings = _PLAIN_SETTINGS,
        intake: Intake = _NOTHING_TAKEN_IN,
    ) -> ResponsesBody:
        """Translate a chat for the model `spec`; functions are offered if it takes them.

        Raises:
            InputError: nothing is left to send, or a parameter has a value of the wrong kind.
        """
        offered = _to_response_tools(body.tools, settings) if settings.offer_tools else {}
        names = {tool.host_name: tool.name for tool in offered}
        settings = settings._replace(tool_names=names)
        history = _transform_messages_to_input(body.messages, spec, settings, intake)
        if not history.items:
            raise InputError(" ".join(("It holds nothing to answer.", *history.notices())))
        payload: JSONObject = {"model": spec.id, "input": history.items, "stream": True, "store": False}
        parameters = dict(body.parameters)
        if instructions := _with_own_prompt(history.instructions, parameters):
            payload["instructions"] = instructions
        tool_names = [_text(_mapping(tool.get("function")).get("name")) for tool in body.tools]
        if settings.offer_tools and (doubled := len(tool_names) - len(set(tool_names))):
            history.left_out["second tool of a name"] = doubled
        if offered and not spec.takes_tools:
            history.left_out["tool"], offered = len(offered), {}
        if offered:
            payload["tools"] = list(offered.values())
        else:
            parameters = {k: v for k, v in parameters.items() if k not in _TOOL_PARAMETERS}
        _set_parameters(payload, parameters)
        _set_tool_choice(payload, names)
        _set_reasoning(payload, spec, settings)
        _set_pdf_engine(payload, settings)
        _set_identity(payload, settings)
        if settings.whole_output and spec.max_output:
            payload.setdefault("max_output_tokens", spec.max_output)
        return cls(payload, history.notices(), history.left_out, tuple(offered))


_NOT_PARAMETERS: Final = frozenset({"model", "messages", "tools", "stream", "stream_options"})
_TOOL_PARAMETERS: Final = frozenset({"tool_choice", "parallel_tool_calls"})


# Parameters


def _as_number(name: str, value: Any) -> float:
    number = math.nan
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(value, bool) else float(value)
    if not math.isfinite(number):
        raise InputError(f"The parameter {name} must be a number, not “{str(value)[:40]}”")
    return number


def _as_integer(name: str, value: Any) -> int:
    return int(_as_number(name, value))


def _as_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"The parameter {name} must be true or false")
    return value


def _as_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"The parameter {name} must be a text")
    return value


def _as_word(name: str, value: Any) -> str:
    """An id or name of 256 characters at most, as OpenRouter takes them."""
    text = _as_text(name, value).strip()
    if not 0 < len(text) <= 256:
        raise InputError(f"The parameter {name} must have 1 to 256 characters")
    return text


def _decoded(value: Any) -> Any:
    """A value that a form may have left as JSON text."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return _json_loads(value)
    return value


def _without_nulls(name: str, value: Any, depth: int = 0) -> Any:
    """`value` without what is null in its objects and lists: the API refuses many of them.

    Raises:
        InputError: it is nested more deeply than any parameter is.
    """
    if depth > _DEEPEST:
        raise InputError(f"The parameter {name} is nested too deeply")
    if isinstance(value, Mapping):
        # What is null in a schema means something.
        return {
            str(key): part if key == "schema" else _without_nulls(name, part, depth + 1)
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, list):
        return [_without_nulls(name, part, depth + 1) for part in value if part is not None]
    return value


def _as_object(name: str, value: Any) -> JSONObject:
    value = _decoded(value)
    if not isinstance(value, Mapping):
        raise InputError(f"The parameter {name} must be an object")
    return _without_nulls(name, value)


def _as_list(name: str, value: Any) -> list[Any]:
    value = _decoded(value)
    if not isinstance(value, list):
        raise InputError(f"The parameter {name} must be a list")
    return _without_nulls(name, value)


def _as_texts(name: str, value: Any) -> list[str]:
    """A list of texts, or a comma list."""
    value = value.split(",") if isinstance(value, str) and value.strip()[:1] != "[" else _as_list(name, value)
    return [text for entry in value if (text := _as_text(name, entry).strip())]


def _each_with(field: str, words: str) -> Callable[[str, Any], list[JSONObject]]:
    """A reader of lists of objects that all have this text."""

    def read(name: str, value: Any) -> list[JSONObject]:
        entries = [_as_object(name, entry) for entry in _as_list(name, value)]
        if not all(isinstance(entry.get(field), str) for entry in entries):
            raise InputError(f"Each entry of the parameter {name} needs {words}")
        return entries

    return read


def _as_transforms(name: str, value: Any) -> list[JSONObject]:
    """`middle-out`, the only one there was, is a plugin now (reference §3)."""
    return [{"id": "context-compression"}] if "middle-out" in _as_texts(name, value) else []


def _as_models(name: str, value: Any) -> list[str]:
    """Fallbacks, each once; more than a few would only be a way to ask for very much."""
    models = list(dict.fromkeys(_as_texts(name, value)))
    if len(models) > _MOST_FALLBACKS:
        raise InputError(f"The parameter {name} may hold {_MOST_FALLBACKS} models at most")
    return models


def _typed(
    fields: Mapping[str, type], words: Sequence[str] = (), word_field: str = "type"
) -> Callable[[str, Any], JSONObject]:
    """A reader of objects whose `fields` are of these types; with `words` one field must be one of them."""

    def read(name: str, value: Any) -> JSONObject:
        wanted = _as_object(name, value)
        wrong = [field for field, kind in fields.items() if not isinstance(wanted.get(field, kind()), kind)]
        if wrong:
            raise InputError(f"In the parameter {name} {wrong[0]} is of the wrong kind")
        if words and wanted.get(word_field) not in words:
            raise InputError(f"In the parameter {name} {word_field} must be {' or '.join(words)}")
        return wanted

    return read


def _as_modalities(name: str, value: Any) -> list[str]:
    chosen = _as_texts(name, value)
    if not set(chosen) <= {"text", "image"}:
        raise InputError(f"The parameter {name} may hold text and image only")
    return chosen


def _as_metadata(name: str, value: Any) -> dict[str, str]:
    """At most 16 pairs of texts, keys of 64 and values of 512 characters (reference §3)."""
    pairs = _as_object(name, value)
    for key, text in pairs.items():
        if not isinstance(text, str) or len(text) > 512 or len(key) > 64 or not {"[", "]"}.isdisjoint(key):
            raise InputError(f"The parameter {name} may hold texts of up to 512 characters under short names")
    if len(pairs) > _MOST_PAIRS:
        raise InputError(f"The parameter {name} may hold {_MOST_PAIRS} entries at most")
    return pairs


def _as_provider(name: str, value: Any) -> JSONObject:
    """Provider preferences: a closed object, one unknown field and OpenRouter refuses all (reference §5)."""
    wanted = _as_object(name, value)
    for field, chosen in wanted.items():
        if field not in _PROVIDER_FIELDS:
            raise InputError(f"The parameter {name} has no field “{field[:40]}”")
        kind, part_kind, words = _PROVIDER_FIELDS[field]
        parts = chosen if isinstance(chosen, list) else chosen.values() if isinstance(chosen, dict) else ()
        if not isinstance(chosen, kind) or not all(isinstance(part, part_kind) for part in parts):
            raise InputError(f"In the parameter {name} {field} must be {words}")
    if "max_price" in wanted:
        wanted["max_price"] = {unit: str(price) for unit, price in wanted["max_price"].items()}
    return wanted


def _stricter(admins: Mapping[str, Any], wanted: Mapping[str, Any], opened: str = "") -> JSONObject:
    """Provider preferences of a person, as far as they narrow those of the administrators.

    With `provider` opened a person may also choose what costs more.

    Raises:
        InputError: nothing would be left to choose from, or a dearer tier is asked for by a provider's name.
    """
    merged = dict(_without_nulls("provider", admins))
    is_open = _matches_any("provider", opened)
    for field, value in wanted.items():
        names = value if isinstance(value, list) else []
        if not is_open and any(str(name).lower().endswith(_DEARER_TIERS) for name in names):
            raise InputError("A dearer tier of a provider can only be chosen by an administrator")
        narrow = _NARROWINGS.get(field)
        if narrow is None:
            if is_open or field not in _ORDERINGS or _ORDERINGS.isdisjoint(admins):
                merged.setdefault(field, value)
        elif (narrower := narrow(merged.get(field), value)) is not None:
            merged[field] = narrower
        if field in ("only", "quantizations") and not merged.get(field):
            raise InputError(
                f"None of the {field} you chose for provider is one that an administrator allows"
            )
    return merged


def _both(admins: Any, wanted: Any) -> Any:
    return wanted if admins is None else [name for name in wanted if name in admins]


def _cheaper(admins: Any, wanted: Mapping[str, str]) -> JSONObject:
    prices = dict(_mapping(admins))
    for unit, price in wanted.items():
        prices[unit] = min(str(prices.get(unit, price)), price, key=_price_order)
    return prices


def _price_order(price: str) -> float:
    try:
        return float(price)
    except ValueError:
        return math.inf


_DEEPEST: Final = 32
_MOST_FALLBACKS: Final = 10
_MOST_PAIRS: Final = 16
_SWITCH: Final = (bool, object, "true or false")
_NAMES: Final = (list, str, "a list of texts")
_CUTOFF: Final = ((int, float, dict), (int, float), "a number, or numbers for percentiles")
# field -> (what it may be, what its parts may be, in words)
_PROVIDER_FIELDS: Final[dict[str, tuple[Any, Any, str]]] = {
    **dict.fromkeys(("allow_fallbacks", "require_parameters", "zdr", "enforce_distillable_text"), _SWITCH),
    **dict.fromkeys(("order", "only", "ignore", "quantizations"), _NAMES),
    "data_collection": (str, object, "allow or deny"),
    "sort": ((str, dict), str, "price, throughput, latency, or an object of texts"),
    "max_price": (dict, (int, float, str), "an object of prices"),
    **dict.fromkeys(("preferred_max_latency", "preferred_min_throughput"), _CUTOFF),
}
_DEARER_TIERS: Final = ("/priority", "/fast", "/scale")
_ORDERINGS: Final = frozenset({"order", "sort"})  # with one of them the other does not count
# field of `provider` -> (the administrators' value or None, the person's) -> the one that counts, or None
_NARROWINGS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    **dict.fromkeys(
        ("zdr", "require_parameters", "enforce_distillable_text"), lambda admins, wanted: wanted or admins
    ),
    "allow_fallbacks": lambda admins, wanted: wanted and admins is not False,
    "data_collection": lambda admins, wanted: "deny" if wanted == "deny" else admins,
    "only": _both,
    "quantizations": _both,
    "ignore": lambda admins, wanted: [*(had := admins or ()), *(name for name in wanted if name not in had)],
    "max_price": _cheaper,
}


def _as_reasoning(name: str, value: Any) -> JSONObject:
    wanted = _typed(_REASONING_CHOICES)(name, value)
    wanted.pop("exclude", None)  # chat's; here nothing is shown that nobody wants to see
    if unknown := wanted.keys() - _REASONING_CHOICES:
        raise InputError(f"The parameter {name} has no field “{min(unknown)[:40]}”")
    return wanted


def _as_tool_choice(name: str, value: Any) -> Any:
    """`{type, function: {name}}` of chat becomes `{type, name}`; words stay."""
    value = _decoded(value)
    choice = _mapping(value)
    function, kind = _mapping(choice.get("function")), choice.get("type")
    if function.get("name"):
        return {"type": "function", "name": _as_text(name, function["name"])}
    is_named = kind == "function" and isinstance(choice.get("name"), str)
    if is_named or value in ("auto", "none", "required") or kind in _OTHER_CHOICES:
        return value
    raise InputError(f"The parameter {name} must be auto, none, required, or name a function")


def _as_text_format(name: str, value: Any) -> JSONObject:
    """`response_format` of chat becomes the flat `text.format`."""
    wanted = _typed({}, ("text", "json_object", "json_schema"))(name, value)
    if wanted["type"] != "json_schema":
        return wanted
    schema = wanted.get("json_schema") or wanted
    known = {key: schema[key] for key in ("name", "schema", "strict", "description") if key in schema}
    if not isinstance(known.get("name"), str) or not isinstance(known.get("schema"), Mapping):
        raise InputError(f"In the parameter {name} json_schema needs a name and a schema")
    return {"type": "json_schema", **known}


_REASONING_CHOICES: Final[dict[str, type]] = {
    **dict.fromkeys(("effort", "summary", "mode", "context"), str),
    "max_tokens": int,
    "enabled": bool,
}
_OTHER_CHOICES: Final = ("web_search_preview", "web_search_preview_2025_03_11", "apply_patch", "shell")
_TRACE_NAMES: Final = ("trace_id", "trace_name", "span_name", "generation_name", "parent_span_id")
# chat parameter -> (where it goes, how its value is read); what has no row is not sent.
# What goes to the same place is joined; of two single values the later row wins.
_PARAMETERS: Final[dict[str, tuple[tuple[str, ...], Callable[[str, Any], Any]]]] = {
    "temperature": (("temperature",), _as_number),
    "top_p": (("top_p",), _as_number),
    "top_k": (("top_k",), _as_integer),
    "frequency_penalty": (("frequency_penalty",), _as_number),
    "presence_penalty": (("presence_penalty",), _as_number),
    "top_logprobs": (("top_logprobs",), _as_integer),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "num_predict", "max_output_tokens"),
        (("max_output_tokens",), _as_integer),
    ),
    "reasoning": (("reasoning",), _as_reasoning),
    "reasoning_effort": (("reasoning", "effort"), _as_text),
    "verbosity": (("text", "verbosity"), _as_text),
    "response_format": (("text", "format"), _as_text_format),
    "tool_choice": (("tool_choice",), _as_tool_choice),
    "parallel_tool_calls": (("parallel_tool_calls",), _as_switch),
    "max_tool_calls": (("max_tool_calls",), _as_integer),
    "stop_server_tools_when": (("stop_server_tools_when",), _each_with("type", "a type")),
    "models": (("models",), _as_models),
    "provider": (("provider",), _as_provider),
    "plugins": (("plugins",), _each_with("id", "an id")),
    "transforms": (("plugins",), _as_transforms),
    "modalities": (("modalities",), _as_modalities),
    "image_config": (("image_config",), _as_object),
    "service_tier": (("service_tier",), _as_word),
    "truncation": (("truncation",), _as_word),
    "cache_control": (("cache_control",), _typed({"ttl": str}, ("ephemeral",))),
    "prompt_cache_key": (("prompt_cache_key",), _as_word),
    "prompt_cache_options": (("prompt_cache_options",), _typed({"ttl": str}, ("explicit",), "mode")),
    "session_id": (("session_id",), _as_word),
    "user": (("user",), _as_word),
    "safety_identifier": (("safety_identifier",), _as_word),
    "metadata": (("metadata",), _as_metadata),
    "trace": (("trace",), _typed(dict.fromkeys(_TRACE_NAMES, str))),
}
# What costs, says who somebody is, or leads to other models: set by administrators, or opened by them.
_GUARDED_PARAMETERS: Final = frozenset(
    {
        *("models", "provider", "plugins", "service_tier", "session_id", "user"),
        *("safety_identifier", "metadata", "trace", "stop_server_tools_when"),
    }
)


def _set_parameters(payload: JSONObject, parameters: Mapping[str, Any]) -> None:
    """Put the chat's parameters where `/responses` wants them (reference §3); None is not sent."""
    for name, (path, convert) in _PARAMETERS.items():
        if parameters.get(name) is None:
            continue
        value = convert(name, parameters[name])
        target = payload
        for step in path[:-1]:
            target = target.setdefault(step, {})
        old = target.get(path[-1])
        if isinstance(old, list) and isinstance(value, list):
            value = [*old, *value]
        if value not in ([], {}):
            target[path[-1]] = value


def _set_tool_choice(payload: JSONObject, names: Mapping[str, str]) -> None:
    """Name the chosen function as the model knows it; what is not offered cannot be chosen."""
    choice = _mapping(payload.get("tool_choice"))
    if choice.get("type") != "function":
        return
    name = names.get(choice["name"])
    if name is None:
        del payload["tool_choice"]
    else:
        payload["tool_choice"] = {**choice, "name": name}


def _set_reasoning(payload: JSONObject, spec: ModelSpec, settings: RequestSettings) -> None:
    """What is asked for of a model that thinks; a task has nobody who would read it."""
    asked = payload.pop("reasoning", {})
    if not spec.reasons:
        return
    if settings.is_task:
        if spec.is_known:  # else nobody knows what it would make of it
            payload["reasoning"] = {"effort": "none"}
        return
    if asked.pop("enabled", None) is False:  # the same by another name
        asked = {"effort": "none"}
    has_budget = "max_tokens" in asked and (spec.reasoning is None or spec.reasoning.takes_budget)
    if settings.effort and "effort" not in asked and not has_budget:
        asked["effort"] = settings.effort
    summary = {} if settings.summary == "off" else {"summary": settings.summary}
    payload["reasoning"] = summary | asked
    payload["include"] = ["reasoning.encrypted_content"]


def _set_pdf_engine(payload: JSONObject, settings: RequestSettings) -> None:
    """Who reads the files of the chat, unless the chat itself says so (reference §5)."""
    parts = [
        part for item in payload["input"] if isinstance(item.get("content"), list) for part in item["content"]
    ]
    plugins = payload.get("plugins", [])
    is_said = any(plugin.get("id") == "file-parser" for plugin in plugins)
    if settings.pdf_engine and not is_said and any(part.get("type") == "input_file" for part in parts):
        payload["plugins"] = [*plugins, {"id": "file-parser", "pdf": {"engine": settings.pdf_engine}}]


def _set_identity(payload: JSONObject, settings: RequestSettings) -> None:
    """Who and what this is, for caches and against abuse (reference §3); what a chat sets itself wins."""
    named = {"session_id": settings.session_id, "user": settings.user, "safety_identifier": settings.user}
    for name, text in named.items():
        if text:
            payload.setdefault(name, text)
    pairs = {**settings.metadata, **payload.get("metadata", {})}
    if 0 < len(pairs) <= _MOST_PAIRS:
        payload["metadata"] = pairs
    if settings.cache_ttl:
        longer = {} if settings.cache_ttl == "5m" else {"ttl": settings.cache_ttl}
        payload.setdefault("cache_control", {"type": "ephemeral", **longer})


def _to_response_tools(
    tools: Sequence[Mapping[str, Any]], settings: RequestSettings
) -> dict[OfferedTool, JSONObject]:
    """Chat's nested function tools that may be offered, each as a flat one of `/responses` (reference §5).

    Of two with one name the first is offered, because only one of them can be called by it.
    """
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = _mapping(tool.get("function"))
        name = _text(function.get("name"))
        if tool.get("type") == "function" and name and _may_offer(name, settings):
            functions.setdefault(name, function)
    names = _tool_names(functions)
    return {
        OfferedTool(names[name], name): _to_response_tool(names[name], functions[name], settings)
        for name in functions
    }


def _to_response_tool(name: str, function: Mapping[str, Any], settings: RequestSettings) -> JSONObject:
    schema = _mapping(function.get("parameters")) or _NO_PARAMETERS
    entry: JSONObject = {"type": "function", "name": name, "parameters": schema}
    if function.get("description"):
        entry["description"] = function["description"]
    strict = _strictify_schema(schema) if settings.strict_tools else None
    return entry if strict is None else {**entry, "parameters": strict, "strict": True}


_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}


def _may_offer(host_name: str, settings: RequestSettings) -> bool:
    chosen = settings.available_tools
    is_chosen = chosen.strip() in ("all", "") or _matches_any(host_name, chosen)
    return is_chosen and (settings.only_tools is None or host_name in settings.only_tools)


def _tool_names(host_names: Iterable[str]) -> dict[str, str]:
    """A name that every provider takes for each tool; who has one already keeps it."""
    names = {name: name for name in host_names if _safe_tool_name(name) == name}
    used = set(names)
    counts: dict[str, int] = {}  # where the search for the next free end of a name begins
    for host_name in host_names:
        if host_name in names:
            continue
        wanted = name = _safe_tool_name(host_name)
        while name in used:
            counts[wanted] = counts.get(wanted, 1) + 1
            end = f"_{counts[wanted]}"
            name = wanted[: _MAX_TOOL_NAME - len(end)] + end
        used.add(name)
        names[host_name] = name
    return names


# Schemas that a model must keep to


def _strictify_schema(schema: Mapping[str, Any]) -> JSONObject | None:
    """The same for a strict tool: every property required, nothing besides; None where that cannot be said.

    What was optional may be null; `_without_nulls_of` takes such nulls away again. What is valid for the
    result is then valid for `schema`. Source: OpenAI's guide to structured outputs.
    """
    plain = _plain_schema(schema, exact=True)
    if plain is None:
        return None
    plain.setdefault("properties", {})
    try:
        strict = _strict(plain)
    except _NotPlainError:
        return None
    return strict if strict.get("type") == "object" else None


def _strict(part: JSONObject) -> JSONObject:
    strict = {key: value for key, value in part.items() if key in _SAID_STRICTLY}
    if "anyOf" in part:
        if part.keys() - {"anyOf", "description"}:
            raise _NotPlainError
        return {**strict, "anyOf": [_strict(option) for option in part["anyOf"]]}
    if not strict.keys() & {"type", "enum", "const"}:
        raise _NotPlainError  # it may be anything
    kinds = _kinds_of(part)
    if "object" in kinds:
        properties = part.get("properties")
        if properties is None or part.get("additionalProperties") not in (None, False):
            raise _NotPlainError  # any names may stand in it
        required = part.get("required", [])
        if not all(name in properties for name in required):
            raise _NotPlainError
        inner = {name: _strict(value) for name, value in properties.items()}
        inner = {name: value if name in required else _nullable(value) for name, value in inner.items()}
        strict |= {"properties": inner, "required": list(properties), "additionalProperties": False}
    if "array" in kinds:
        if "items" not in part:
            raise _NotPlainError
        strict["items"] = _strict(part["items"])
    return strict


# The same request for /chat/completions (reference §13)

# what only chat knows; sent as the person or the administrator set it
_CHAT_ONLY_PARAMETERS: Final = (
    *("stop", "seed", "min_p", "top_a"),
    *("repetition_penalty", "logit_bias", "logprobs"),
)
_SHARED_PARAMETERS: Final = (
    *("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "top_logprobs"),
    *("parallel_tool_calls", "modalities", "models", "provider", "plugins", "image_config", "service_tier"),
    *("session_id", "user", "metadata", "trace", "stop_server_tools_when"),
    *("cache_control", "prompt_cache_key", "prompt_cache_options"),
)
_CHAT_REASONING: Final = ("effort", "enabled", "max_tokens")


def _to_chat_body(payload: JSONObject, parameters: Mapping[str, Any]) -> JSONObject:
    """The body for `POST /chat/completions` that says what `payload` says to `/responses`.

    `parameters` are those of the chat: some of them only this endpoint knows.
    """
    messages: list[JSONObject] = []
    if payload.get("instructions"):
        messages.append({"role": "system", "content": payload["instructions"]})
    for item in payload["input"]:
        if add := _TO_CHAT.get(item["type"]):
            add(messages, item)
    body: JSONObject = {"model": payload["model"], "messages": messages, "stream": True}
    body["stream_options"] = {"include_usage": True}  # OpenRouter needs no asking, proxies do
    body |= {name: payload[name] for name in _SHARED_PARAMETERS if name in payload}
    body |= {name: parameters[name] for name in _CHAT_ONLY_PARAMETERS if parameters.get(name) is not None}
    if "max_output_tokens" in payload:
        body["max_completion_tokens"] = payload["max_output_tokens"]
    if reasoning := {k: v for k, v in payload.get("reasoning", {}).items() if k in _CHAT_REASONING}:
        body["reasoning"] = reasoning
    if "tools" in payload:
        told = ("name", "description", "parameters")
        functions = [{key: tool[key] for key in told if key in tool} for tool in payload["tools"]]
        body["tools"] = [{"type": "function", "function": function} for function in functions]
    if "tool_choice" in payload:
        name = _mapping(payload["tool_choice"]).get("name")
        named = {"type": "function", "function": {"name": name}}
        body["tool_choice"] = named if name else payload["tool_choice"]
    return body | _to_chat_text_options(payload.get("text", {}))


def _add_chat_message(messages: list[JSONObject], item: JSONObject) -> None:
    content = item["content"]
    if not isinstance(content, str):
        parts = [_CHAT_PARTS[part["type"]](part) for part in content]
        text_only = all(part["type"] == "text" for part in parts)
        content = "\n".join(part["text"] for part in parts) if text_only else parts
    last = messages[-1] if messages else {}
    continues = item["role"] == last.get("role") == "assistant"
    if continues and last["content"] is None:
        last["content"] = content  # the reasoning before it belongs to it
    elif continues and "tool_calls" in last:
        last["content"] = f"{last['content']}\n{content}"  # nothing may stand between a call and its output
    else:
        messages.append({"role": item["role"], "content": content})


def _to_chat_file(part: JSONObject) -> JSONObject:
    """Chat has one place for content and addresses (reference §13)."""
    file = {name: part[name] for name in ("filename", "file_id", "file_data") if name in part}
    return {"type": "file", "file": {**file, "file_data": part["file_url"]} if "file_url" in part else file}


_CHAT_PARTS: Final[dict[str, Callable[[JSONObject], JSONObject]]] = {
    "input_text": lambda part: {"type": "text", "text": part["text"]},
    "input_image": lambda part: {
        "type": "image_url",
        "image_url": {"url": part["image_url"], "detail": part["detail"]},
    },
    "input_file": _to_chat_file,
    "input_audio": lambda part: part,
    "input_video": lambda part: {"type": "video_url", "video_url": {"url": part["video_url"]}},
}


def _add_chat_call(messages: list[JSONObject], item: JSONObject) -> None:
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _add_chat_reasoning(messages: list[JSONObject], item: JSONObject) -> None:
    details = _to_chat_details(item)
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (last["content"] is not None and "tool_calls" not in last):
        messages.append({"role": "assistant", "content": None})
    known = messages[-1].setdefault("reasoning_details", [])
    known += [{**detail, "index": len(known) + number} for number, detail in enumerate(details)]


_TO_CHAT: Final[dict[str, Callable[[list[JSONObject], JSONObject], None]]] = {
    "message": _add_chat_message,
    "reasoning": _add_chat_reasoning,
    "function_call": _add_chat_call,
    "function_call_output": lambda messages, item: messages.append(
        {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
    ),
}


def _to_chat_text_options(text: JSONObject) -> JSONObject:
    options = {"verbosity": text["verbosity"]} if "verbosity" in text else {}
    form = text.get("format")
    if form and form.get("type") == "json_schema":
        schema = {key: value for key, value in form.items() if key != "type"}
        form = {"type": "json_schema", "json_schema": schema}
    return options if form is None else {**options, "response_format": form}


def _without_reasoning(payload: JSONObject) -> JSONObject | None:
    """`payload` without its reasoning items; None when it has none."""
    kept = [item for item in payload["input"] if item["type"] != "reasoning"]
    return None if len(kept) == len(payload["input"]) else {**payload, "input": kept}


def _without_tools(payload: JSONObject) -> JSONObject | None:
    """`payload` without the tools that it offers; None when it offers none."""
    kept = {key: value for key, value in payload.items() if key != "tools" and key not in _TOOL_PARAMETERS}
    return kept if payload.get("tools") else None


# ── 10. SSE decoder ──────────────────────────────────────────────────────────
# Bytes in, frames out (https://html.spec.whatwg.org/multipage/server-sent-events.html).
# Promise: pure; the same frames however the bytes were cut; work grows linearly.
# Doc: docs/streaming_pipeline_and_emitters.md   Tests: tests/test_sse_decoder.py


class SSEDecoder:
    """Collects the `data` lines of an event stream; every other field and comment is passed over.

    Unlike the specification it keeps a last frame whose blank line never came (reference §6).
    """

    def __init__(self, max_frame_bytes: int = _MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._pieces: list[bytes] = []  # a line whose end has not come
        self.open_lines: list[bytes] = []  # the data lines of the open frame
        self._size = 0
        self._skip_lf = False  # the last byte was a CR, which an LF may still belong to
        self._first_line = True

    def feed(self, chunk: bytes) -> list[SSEFrame]:
        """Take one read of any size; return the frames that it completes.

        Raises:
            StreamError: a frame is larger than `max_frame_bytes`.
        """
        if self._is_one_frame(chunk):
            return [chunk[6:-2]]
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if b"\r" in chunk:
            self._skip_lf = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._keep(chunk)
            return []
        frames: list[SSEFrame] = []
        start = 0
        if self._pieces:
            start = chunk.find(b"\n") + 1
            self._end_line(chunk[: start - 1], frames)
        if self.open_lines and chunk.startswith(b"\n", start):
            self._take_lines((b"",), frames)
            start += 1
        if start < end:
            self._take(chunk[start:end], frames)
        if (
            self._size + end > self._max_frame_bytes
            and max(map(len, frames), default=0) > self._max_frame_bytes
        ):
            raise self._too_large()
        self._size = sum(map(len, self.open_lines))
        self._keep(chunk[end:])
        return frames

    def _is_one_frame(self, chunk: bytes) -> bool:
        """Whether the read is one whole frame of one line, as nearly every read of a slow stream is."""
        size = len(chunk)
        return (
            not (self._size or self.open_lines or self._first_line or self._skip_lf)
            and chunk.find(b"\n") == size - 2
            and chunk.endswith(b"\n\n")
            and chunk.startswith(b"data: ")
            and b"\r" not in chunk
            and size <= self._max_frame_bytes
        )

    def close(self) -> list[SSEFrame]:
        """The stream has ended: return the frame that was still open, if there is one."""
        frames: list[SSEFrame] = []
        self._end_line(b"", frames)
        self._take_lines((b"",), frames)
        return frames

    def _keep(self, piece: bytes) -> None:
        if piece:
            self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._max_frame_bytes:
            raise self._too_large()

    def _too_large(self) -> StreamError:
        return StreamError(f"An event of more than {self._max_frame_bytes} bytes arrived")

    def _end_line(self, tail: bytes, frames: list[SSEFrame]) -> None:
        """The line whose beginning came in earlier reads ends with `tail`; a long one is copied once."""
        pieces = [*self._pieces, tail]
        self._pieces.clear()
        if pieces[0].startswith(b"data: "):
            self._first_line = False
            pieces[0] = pieces[0][6:]
            self.open_lines.append(b"".join(pieces))
        else:
            self._take_lines((self._without_mark(b"".join(pieces)),), frames)

    def _without_mark(self, text: bytes) -> bytes:
        """`text` without the byte-order mark that only the very first line may have."""
        if not self._first_line:
            return text
        self._first_line = False
        return text.removeprefix(b"\xef\xbb\xbf")

    def _take(self, text: bytes, frames: list[SSEFrame]) -> None:
        """Add the frames that `text`, whole lines each with its end, completes."""
        blocks = self._without_mark(text).split(b"\n\n")
        last = blocks.pop()
        if not self.open_lines and text.count(b"\n") == 2 * len(blocks):
            quick = [block[6:] for block in blocks if block.startswith(b"data: ")]
            if len(quick) == len(blocks):  # one line each, as nearly all reads of a fast stream are
                frames += quick
                return
        for block in blocks:
            self._take_lines((*block.split(b"\n"), b""), frames)
        self._take_lines(last.split(b"\n")[:-1], frames)

    def _take_lines(self, lines: Iterable[bytes], frames: list[SSEFrame]) -> None:
        for line in lines:
            if line.startswith(b"data:"):
                self.open_lines.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self.open_lines.append(b"")
            elif not line and self.open_lines:
                frames.append(b"\n".join(self.open_lines))
                self.open_lines.clear()


def parse_frames(frames: Iterable[SSEFrame]) -> Iterator[StreamEvent]:
    """The events of some frames, in order, each decoded when it is asked for.

    `[DONE]`, empty frames and data that is no JSON object are left out.
    """
    for frame in frames:
        try:
            event = _fast_loads(frame)
        except ValueError:
            try:
                event = _slow_loads(frame)
            except ValueError:
                continue
        if isinstance(event, dict):
            yield event


# ── 11. Event reducer ────────────────────────────────────────────────────────
# One stream event in, what it means out (reference §7).
# Promise: pure; unknown events are counted, never an error; no text is given out twice.
# Doc: docs/streaming_pipeline_and_emitters.md   Tests: tests/test_event_reducer.py


class _Item:
    """One output item while it streams; `number` is its place in order of arrival."""

    __slots__ = ("closed", "details", "form", "id", "index", "number", "parts", "payload", "type")

    def __init__(self, number: int, payload: JSONObject, index: int | None) -> None:
        self.number = number
        self.type = str(payload.get("type") or "")
        self.id = str(payload.get("id") or "")
        self.index = index
        self.payload = payload
        self.parts: dict[tuple[str, int], list[str]] = {}
        self.form = ""  # the name of the newest text
        self.details: dict[str, int] = {}  # chat only: where a reasoning detail is kept
        self.closed = False

    def text(self, name: str, part: int = 0) -> str:
        """What has been given out of one part."""
        return "".join(self.parts.get((name, part), ()))

    def whole_text(self) -> str:
        """What has been given out of all parts."""
        return "".join(piece for pieces in self.parts.values() for piece in pieces)


class StreamState:
    """What one upstream call has said so far."""

    __slots__ = ("by_id", "by_index", "cited", "ended", "finish", "items", "pictures", "unknown", "usage")

    def __init__(self) -> None:
        self.items: list[_Item] = []
        self.by_index: dict[int, _Item] = {}
        self.by_id: dict[str, _Item] = {}
        self.cited: set[str] = set()
        self.usage: UsageStats | None = None
        self.unknown: dict[str, int] = {}
        self.finish = ""  # chat only: the finish_reason
        self.pictures: set[int] = set()  # chat only: hashes of those that came
        self.ended = False


Reducer = Callable[[StreamState, JSONObject], list[Emission]]


def reduce_event(state: StreamState, event: StreamEvent) -> list[Emission]:
    """What one event means. Changes `state` only; nothing counts after the first terminal event."""
    if state.ended:
        return []
    kind = event.get("type")
    if not isinstance(kind, str):
        kind = ""
    reducer = _REDUCERS.get(kind)
    if reducer is not None:
        return reducer(state, event)
    if not kind and "error" in event:
        return _on_error(state, event)
    if kind.startswith("response.fusion_call."):
        return _on_fusion(state, event)
    state.unknown[kind] = state.unknown.get(kind, 0) + 1
    return []


def reduce_events(state: StreamState, events: Iterable[StreamEvent]) -> list[Emission]:
    """`reduce_event` over what arrived together; deltas of one part that follow each other are one."""
    arrived = iter(events)
    first = next(arrived, None)
    if first is None:
        return []
    second = next(arrived, None)
    if second is None:
        return reduce_event(state, first)
    emissions: list[Emission] = []
    for event in _join_runs(itertools.chain((first, second), arrived)):
        emissions += reduce_event(state, event)
    return emissions


def close_stream(state: StreamState) -> list[Emission]:
    """The connection ended: a failure, unless the stream had said that it was complete."""
    if state.ended:
        return []
    state.ended = True
    return [Failed(StreamError("The connection ended too early", template="broken", retryable=True))]


def _join_runs(events: Iterable[StreamEvent]) -> list[StreamEvent]:
    """Make one event of deltas that continue each other; this is the hot loop of a fast stream."""
    joined: list[StreamEvent] = []
    part: tuple[Any, ...] = ()  # what the newest text belongs to
    texts: list[str] = []
    for event in events:
        get = event.get
        delta = get("delta")
        if not isinstance(delta, str):
            _end_run(joined, texts)
            texts = []
            joined.append(event)
            continue
        place = get("type"), get("output_index"), get("item_id"), get("content_index"), get("summary_index")
        if texts and place == part:
            texts.append(delta)
            continue
        _end_run(joined, texts)
        joined.append(event)
        part, texts = place, [delta]
    _end_run(joined, texts)
    return joined


def _end_run(joined: list[StreamEvent], texts: list[str]) -> None:
    """The last event of `joined` gets all its text."""
    if len(texts) > 1:
        joined[-1] = {**joined[-1], "delta": "".join(texts)}


# Items


def _find_item(state: StreamState, payload: JSONObject, kind: str) -> _Item:
    """The item an event speaks of, made as `kind` if its beginning was never announced.

    Some providers give every item the same id, others change the id between events: the place
    in the output is what can be trusted, the id only where there is no place.
    """
    index = payload.get("output_index")
    if isinstance(index, int) and index in state.by_index:
        return state.by_index[index]
    item_id = payload.get("item_id")
    return _named_item(state, index, item_id, kind) or _add_item(state, {"type": kind, "id": item_id}, index)


def _named_item(state: StreamState, index: Any, item_id: Any, kind: Any) -> _Item | None:
    """The item with this place, else with this id, else the newest open one of its type."""
    if isinstance(index, int):
        return state.by_index.get(index)
    if item_id:
        return state.by_id.get(str(item_id))
    return next((item for item in reversed(state.items) if item.type == kind and not item.closed), None)


def _add_item(state: StreamState, payload: JSONObject, index: Any) -> _Item:
    item = _Item(len(state.items), payload, index if isinstance(index, int) else None)
    state.items.append(item)
    if item.index is not None:
        state.by_index[item.index] = item
    if item.id:
        state.by_id[item.id] = item
    return item


def _grow(item: _Item, name: str, part: Any, text: Any) -> list[Emission]:
    """Give out more text of a part. Of reasoning that comes in two forms the first is shown."""
    if item.closed or not isinstance(text, str) or not text:
        return []
    if item.form != name:
        if item.form in _REASONING_FORMS and name in _REASONING_FORMS:
            return []
        item.form = name
    part = part if isinstance(part, int) else 0
    place = name, part
    if place in item.parts:
        item.parts[place].append(text)
    else:
        item.parts[place] = [text]
    return [_DELTAS[name](item.number, text, part)]


def _fill(item: _Item, name: str, part: Any, full: Any) -> list[Emission]:
    """Give out what is missing of a part whose full text is known now."""
    if not isinstance(full, str) or item.closed:
        return []
    part = part if isinstance(part, int) else 0
    shown = item.text(name, part)
    return _grow(item, name, part, full[len(shown) :]) if full.startswith(shown) else []


_REASONING_FORMS: Final = ("summary", "reasoning")
_DELTAS: Final[dict[str, Callable[[int, str, int], Emission]]] = {
    "text": lambda number, text, part: TextDelta(number, text),
    "refusal": lambda number, text, part: RefusalDelta(number, text),
    "summary": lambda number, text, part: ReasoningDelta(number, text, part, "summary"),
    "reasoning": lambda number, text, part: ReasoningDelta(number, text, part, "text"),
}

# Deltas: event type -> (type of its item, part's name, key of the part's number, key of the text)
_DELTA_EVENTS: Final[dict[str, tuple[str, str, str, str]]] = {
    "response.output_text.delta": ("message", "text", "content_index", "delta"),
    "response.content_part.delta": ("message", "text", "content_index", "delta"),
    "response.refusal.delta": ("message", "refusal", "content_index", "delta"),
    "response.reasoning_text.delta": ("reasoning", "reasoning", "content_index", "delta"),
    "response.reasoning.delta": ("reasoning", "reasoning", "content_index", "delta"),
    "response.reasoning_summary_text.delta": ("reasoning", "summary", "summary_index", "delta"),
}
_DONE_EVENTS: Final[dict[str, tuple[str, str, str, str]]] = {
    "response.output_text.done": ("message", "text", "content_index", "text"),
    "response.refusal.done": ("message", "refusal", "content_index", "refusal"),
    "response.reasoning_text.done": ("reasoning", "reasoning", "content_index", "text"),
    "response.reasoning_summary_text.done": ("reasoning", "summary", "summary_index", "text"),
}


def _text_reducers(
    rows: Mapping[str, tuple[str, str, str, str]], add: Callable[[_Item, str, Any, Any], list[Emission]]
) -> dict[str, Reducer]:
    """A reducer for each row: text counts only if its item is of the row's type (reference §7.5)."""

    def reducer(kind: str, name: str, number_key: str, text_key: str) -> Reducer:
        def reduce(state: StreamState, payload: JSONObject) -> list[Emission]:
            item = _find_item(state, payload, kind)
            if item.type != kind:
                return []
            return add(item, name, payload.get(number_key), payload.get(text_key))

        return reduce

    return {event: reducer(*row) for event, row in rows.items()}


def _on_call_delta(kind: str, part: str, state: StreamState, payload: JSONObject) -> list[Emission]:
    item = _find_item(state, payload, kind)
    item.parts.setdefault((part, 0), []).append(str(payload.get("delta") or ""))
    return []


def _on_call_done(kind: str, keys: Sequence[str], state: StreamState, payload: JSONObject) -> list[Emission]:
    item = _find_item(state, payload, kind)
    item.payload = item.payload | {key: payload[key] for key in keys if isinstance(payload.get(key), str)}
    return []


def _on_tool_progress(state: StreamState, payload: JSONObject) -> list[Emission]:
    """`response.<kind>.<state>`: says something only if the item was never announced."""
    kind = str(payload["type"]).split(".")[1]
    if _named_item(state, payload.get("output_index"), payload.get("item_id"), kind) is not None:
        return []
    _find_item(state, payload, kind)
    return [ServerToolProgress(kind, "in_progress")]


def _on_fusion(state: StreamState, payload: JSONObject) -> list[Emission]:
    """Panels of models that answer side by side; only their beginning is worth a line."""
    if payload["type"] == "response.fusion_call.panel.added" and isinstance(payload.get("model"), str):
        return [ServerToolProgress("openrouter:fusion", "in_progress", payload["model"])]
    return []


def _on_item_added(state: StreamState, payload: JSONObject) -> list[Emission]:
    added = payload.get("item")
    index = payload.get("output_index")
    if not isinstance(added, dict) or (isinstance(index, int) and index in state.by_index):
        return []
    item = _add_item(state, added, index)
    if item.type == "reasoning":
        return [ReasoningDelta(item.number, "")]
    if item.type in _SERVER_TOOLS or item.type.startswith("openrouter:"):
        return [ServerToolProgress(item.type, "in_progress", _query(item))]
    return []


def _on_part_done(state: StreamState, payload: JSONObject) -> list[Emission]:
    part = _mapping(payload.get("part"))
    number = payload.get("content_index", payload.get("summary_index"))
    kind = "reasoning" if part.get("type") in ("reasoning_text", "summary_text") else "message"
    item = _find_item(state, payload, kind)
    return _fill_part(state, item, number, part) if item.type == kind else []


def _fill_part(state: StreamState, item: _Item, number: Any, part: Mapping[str, Any]) -> list[Emission]:
    name, key = _PARTS.get(str(part.get("type")), ("", ""))
    missing = _fill(item, name, number, part.get(key)) if name else []
    return missing + _cite_all(state, [part])


def _cite(state: StreamState, annotation: Mapping[str, Any]) -> list[Emission]:
    url = _text(annotation.get("url"))
    is_web = url[:8].lower().startswith(("http://", "https://"))  # a page makes a link of it
    if annotation.get("type") != "url_citation" or not is_web or url in state.cited:
        return []
    state.cited.add(url)
    title = str(annotation.get("title") or "") or _host_of(url)
    snippet = str(annotation.get("content") or "")
    return [CitationFound(*map(_whole_text, (url, title, snippet)))]


def _host_of(url: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(url).hostname or url
    return url


def _on_item_done(state: StreamState, payload: JSONObject) -> list[Emission]:
    done = payload.get("item")
    if not isinstance(done, dict):
        return []
    index = payload.get("output_index")
    item = _named_item(state, index, done.get("id"), done.get("type")) or _add_item(state, done, index)
    if str(done.get("type")) in _ENDED_LATER and not item.closed:
        _learn(item, done)
        return []
    if done.get("type") == "message" and not done.get("content"):
        return []  # the final object may know more
    return _finish_item(state, item, done)


def _learn(item: _Item, done: Mapping[str, Any]) -> None:
    """Take over what `done` says; what it leaves empty stays as it was."""
    item.type = str(done.get("type") or item.type)
    known = item.payload
    item.payload = {**known, **{key: value for key, value in done.items() if value or key not in known}}


def _finish_item(state: StreamState, item: _Item, done: JSONObject) -> list[Emission]:
    if item.closed:
        return _finish_late(state, item, done)
    _learn(item, done)
    emissions = _ITEM_FINISHERS.get(item.type, _finish_server_tool)(state, item)
    item.closed = True
    return emissions


def _finish_late(state: StreamState, item: _Item, final: JSONObject) -> list[Emission]:
    """What the final object adds to an item that had ended: sources, more text, a picture."""
    if item.type in _IMAGE_TYPES and not item.parts and _picture(final):
        return [_picture_made(state, _picture(final))]
    if item.type != "message":
        return []
    emissions = _cite_all(state, _objects(final.get("content")))
    full, shown = _message_text(final), item.whole_text()
    if full != shown and full.startswith(shown):
        rest = [{"type": "output_text", "text": full[len(shown) :]}]
        emissions += _finish_item(state, _add_item(state, {"type": "message", "content": rest}, None), {})
    return emissions


def _cite_all(state: StreamState, parts: Iterable[Mapping[str, Any]]) -> list[Emission]:
    annotations = [annotation for part in parts for annotation in _objects(part.get("annotations"))]
    return [emission for annotation in annotations for emission in _cite(state, annotation)]


def _message_text(message: Mapping[str, Any]) -> str:
    """All text of a message, refusals too."""
    parts = _objects(message.get("content"))
    texts = (part.get(_PARTS.get(str(part.get("type")), ("", ""))[1]) for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _finish_message(state: StreamState, item: _Item) -> list[Emission]:
    emissions = _cite_all(state, _objects(item.payload.get("content")))
    if item.whole_text() != _message_text(item.payload):  # some providers number parts as they like
        for number, part in enumerate(_objects(item.payload.get("content"))):
            emissions += _fill_part(state, item, number, part)
    if (shown := item.whole_text()) != _message_text(item.payload):  # of some streams the deltas alone say it
        item.payload = {**item.payload, "content": [{"type": "output_text", "text": shown}]}
    return [*emissions, ItemClosed(item.number, "message", item.payload)]


def _finish_reasoning(state: StreamState, item: _Item) -> list[Emission]:
    _join_details(item)
    emissions: list[Emission] = []
    for key in ("summary", "content"):
        parts = item.payload.get(key)
        for number, part in enumerate(parts if isinstance(parts, list) else []):
            whole = {"type": "summary_text", "text": part} if isinstance(part, str) else _mapping(part)
            emissions += _fill_part(state, item, number, whole)
    return [*emissions, ItemClosed(item.number, "reasoning", item.payload)]


def _finish_call(state: StreamState, item: _Item) -> list[Emission]:
    arguments = item.payload.get("arguments") or item.text("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = _json_dumps(arguments).decode()
    name = str(item.payload.get("name") or "")
    call_id = str(item.payload.get("call_id") or item.id or f"call_{item.number}")
    return [ToolRequested(ToolCall(call_id, name, _whole_text(arguments)), item.number)] if name else []


def _finish_custom_call(state: StreamState, item: _Item) -> list[Emission]:
    """A call with free text instead of arguments: the text goes under the name `input`."""
    text = str(item.payload.get("input") or item.text("input"))
    item.payload = {**item.payload, "arguments": _json_dumps({"input": text}).decode()}
    return _finish_call(state, item)


def _finish_image(state: StreamState, item: _Item) -> list[Emission]:
    source = _picture(item.payload)
    if not source:
        return _finish_server_tool(state, item)
    item.parts["picture", 0] = []
    return [_picture_made(state, source), *_finish_server_tool(state, item)]


def _picture_made(state: StreamState, source: str) -> MediaProduced:
    """A picture, as an item of its own: it is shown where it comes, not where it was announced."""
    shown = _add_item(state, {"type": "picture"}, None)
    shown.closed = True
    return MediaProduced(shown.number, source)


def _picture(payload: Mapping[str, Any]) -> str:
    return next((v for key in _IMAGE_KEYS if isinstance(v := payload.get(key), str) and v), "")


def _finish_server_tool(state: StreamState, item: _Item) -> list[Emission]:
    status = str(item.payload.get("status") or "completed")
    ended = ServerToolProgress(item.type, "completed" if status == "in_progress" else status, _query(item))
    replayed = item.type in _REPLAYED_TOOLS and status == "completed"
    return [*([ItemClosed(item.number, "server_tool", item.payload)] if replayed else []), ended]


def _query(item: _Item) -> str:
    return _whole_text(str(_mapping(item.payload.get("action")).get("query") or ""))


# type of a part -> (its name here, key of its text)
_PARTS: Final[dict[str, tuple[str, str]]] = {
    "output_text": ("text", "text"),
    "refusal": ("refusal", "refusal"),
    "reasoning_text": ("reasoning", "text"),
    "summary_text": ("summary", "text"),
}
# Calls are asked for when the stream has ended well: nobody may run one earlier, and their arguments
# may be complete in the final object only.
_ENDED_LATER: Final = frozenset({"function_call", "custom_tool_call"})
_IMAGE_KEYS: Final = ("result", "imageB64", "imageUrl")
_SERVER_TOOLS: Final = frozenset(
    {"web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "computer_call"}
)
_IMAGE_TYPES: Final = ("image_generation_call", "openrouter:image_generation")
_ITEM_FINISHERS: Final[dict[str, Callable[[StreamState, _Item], list[Emission]]]] = {
    "message": _finish_message,
    "reasoning": _finish_reasoning,
    "function_call": _finish_call,
    "custom_tool_call": _finish_custom_call,
    **dict.fromkeys(_IMAGE_TYPES, _finish_image),
}


# Lifecycle


def _on_nothing(state: StreamState, payload: JSONObject) -> list[Emission]:
    return []


def _end(state: StreamState, payload: JSONObject, outcome: str) -> list[Emission]:
    """The end, as the event says and, more exactly, the status inside."""
    response = _mapping(payload.get("response"))
    status = str(response.get("status") or "")
    if status == "failed":
        return _on_failed(state, payload)
    reason = str(_mapping(response.get("incomplete_details")).get("reason") or "")
    if status == "cancelled":
        return [*_finish_all(state, response), TurnEnded("incomplete", reason or status)]
    if "incomplete" in (outcome, status):
        return [*_finish_all(state, response), TurnEnded("incomplete", reason)]
    return [*_finish_all(state, response), TurnEnded("completed")]


def _on_failed(state: StreamState, payload: JSONObject) -> list[Emission]:
    response = _mapping(payload.get("response"))
    emissions = _report_usage(state, response)
    state.ended = True
    error = _event_error(_error_object(response.get("error")), str(response.get("error_type") or ""))
    return [*emissions, Failed(error)]


def _on_error(state: StreamState, payload: JSONObject) -> list[Emission]:
    """The flat, the nested and the untyped shape of reference §7.1."""
    state.ended = True
    return [Failed(_event_error(_error_object(payload.get("error")) or payload))]


def _finish_all(state: StreamState, response: Mapping[str, Any]) -> list[Emission]:
    """Close every item with what the final object knows, and report the usage."""
    emissions: list[Emission] = []
    output = response.get("output")
    finals = [final for final in output if isinstance(final, dict)] if isinstance(output, list) else []
    known = _match_items(state.items, finals)
    rest = [item for item in state.items if item not in known]
    for item, final in zip(known, finals, strict=True):
        emissions += _finish_item(state, item or _add_item(state, final, None), final)
    for item in rest:
        if not item.closed and item.type in _ITEM_FINISHERS:
            emissions += _finish_item(state, item, {})
    state.ended = True
    return [*emissions, *_report_usage(state, response)]


def _match_items(items: Sequence[_Item], finals: Sequence[JSONObject]) -> list[_Item | None]:
    """For each final item the streamed one it repeats: by id, else by place, else the next of its type."""
    free = list(items)
    found: list[_Item | None] = [None] * len(finals)
    sames: tuple[Callable[[_Item, JSONObject, int], bool], ...] = (
        lambda item, final, place: bool(item.id) and item.id == final.get("id"),
        lambda item, final, place: item.index == place,
        lambda item, final, place: True,
    )
    for same in sames:
        for place, final in enumerate(finals):
            if found[place] is None:
                alike = (item for item in free if _same_kind(item, final) and same(item, final, place))
                item = next(alike, None)
                if item is not None:
                    free.remove(item)
                    found[place] = item
    return found


def _same_kind(item: _Item, final: JSONObject) -> bool:
    """The same type; calls also need the same `call_id`, where both have one."""
    ours, theirs = item.payload.get("call_id"), final.get("call_id")
    return item.type == final.get("type") and (not ours or not theirs or ours == theirs)


def _report_usage(state: StreamState, response: Mapping[str, Any]) -> list[Emission]:
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return []
    state.usage = cast(UsageStats, usage)
    return [UsageReported(state.usage)]


def _merge_usage_stats(first: Mapping[str, Any], second: Mapping[str, Any]) -> JSONObject:
    """The sum of two usages: numbers are added at every depth, other values of `second` win."""
    merged: JSONObject = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = _merge_usage_stats(old, value)
        elif _is_number(value) and _is_number(old):
            merged[key] = old + value
        elif value is not None or key not in merged:
            merged[key] = value
    return merged


_REDUCERS: Final[dict[str, Reducer]] = {
    **_text_reducers(_DELTA_EVENTS, _grow),
    **_text_reducers(_DONE_EVENTS, _fill),
    "response.output_item.added": _on_item_added,
    "response.output_item.done": _on_item_done,
    **dict.fromkeys(("response.content_part.done", "response.reasoning_summary_part.done"), _on_part_done),
    "response.output_text.annotation.added": lambda state, payload: _cite(
        state, _mapping(payload.get("annotation"))
    ),
    "response.function_call_arguments.delta": functools.partial(_on_call_delta, "function_call", "arguments"),
    "response.function_call_arguments.done": functools.partial(
        _on_call_done, "function_call", ("name", "arguments")
    ),
    "response.custom_tool_call_input.delta": functools.partial(_on_call_delta, "custom_tool_call", "input"),
    "response.custom_tool_call_input.done": functools.partial(_on_call_done, "custom_tool_call", ("input",)),
    **dict.fromkeys(
        (
            *("response.web_search_call.in_progress", "response.web_search_call.searching"),
            *("response.file_search_call.in_progress", "response.file_search_call.searching"),
            *("response.image_generation_call.in_progress", "response.image_generation_call.generating"),
            *("response.code_interpreter_call.in_progress", "response.code_interpreter_call.interpreting"),
        ),
        _on_tool_progress,
    ),
    **dict.fromkeys(
        (
            *("response.created", "response.queued", "response.in_progress", "response.debug"),
            *("response.content_part.added", "response.reasoning_summary_part.added"),
            *("response.web_search_call.completed", "response.file_search_call.completed"),
            *("response.image_generation_call.completed", "response.code_interpreter_call.completed"),
            *("response.code_interpreter_call_code.delta", "response.code_interpreter_call_code.done"),
            "response.image_generation_call.partial_image",
            "response.apply_patch_call_operation_diff.delta",
            "response.apply_patch_call_operation_diff.done",
        ),
        _on_nothing,
    ),
    **dict.fromkeys(("response.completed", "response.done"), functools.partial(_end, outcome="completed")),
    "response.incomplete": functools.partial(_end, outcome="incomplete"),
    "response.failed": _on_failed,
    **dict.fromkeys(("response.error", "error"), _on_error),
}


# Chunks of /chat/completions (reference §13), with the same emissions

# our names of usage, which are those of /responses, and chat's
_CHAT_USAGE: Final = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "input_tokens_details": "prompt_tokens_details",
    "output_tokens_details": "completion_tokens_details",
}
_USAGE_FROM_CHAT: Final = {chat: ours for ours, chat in _CHAT_USAGE.items()}


def reduce_chat_chunks(state: StreamState, events: Iterable[StreamEvent]) -> list[Emission]:
    """What some chunks mean. Changes `state` only; the end is the usage after a `finish_reason`."""
    emissions: list[Emission] = []
    for event in events:
        if not state.ended:
            emissions += _reduce_chat_chunk(state, event)
    return emissions


def close_chat_stream(state: StreamState) -> list[Emission]:
    """The connection ended: well, if a `finish_reason` had come."""
    return close_stream(state) if state.ended or not state.finish else _end_chat(state)


def _reduce_chat_chunk(state: StreamState, chunk: JSONObject) -> list[Emission]:
    emissions: list[Emission] = []
    choices = chunk.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    delta = _mapping(choice.get("delta")) or _rest_of(state, _mapping(choice.get("message")))
    for key, reduce in _CHAT_REDUCERS.items():
        if delta.get(key):
            emissions += reduce(state, delta)
    state.finish = str(choice.get("finish_reason") or state.finish)
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        state.usage = cast(UsageStats, {_USAGE_FROM_CHAT.get(name, name): n for name, n in usage.items()})
    if chunk.get("error"):
        spent: list[Emission] = [UsageReported(state.usage)] if state.usage is not None else []
        return [*emissions, *spent, *_on_error(state, chunk)]
    return [*emissions, *_end_chat(state)] if state.finish and isinstance(usage, dict) else emissions


def _rest_of(state: StreamState, message: Mapping[str, Any]) -> JSONObject:
    """What a whole message adds to the deltas before it."""
    rest = dict(message)
    for key, (item_name, name) in _CHAT_TEXTS.items():
        item, full = state.by_id.get(item_name), rest.get(key)
        shown = item.text(name) if item is not None else ""
        if shown:
            rest[key] = full[len(shown) :] if isinstance(full, str) and full.startswith(shown) else None
    if state.items:
        for key in ("tool_calls", "reasoning_details"):
            rest.pop(key, None)
    return rest


def _end_chat(state: StreamState) -> list[Emission]:
    emissions: list[Emission] = []
    for item in state.items:
        if not item.closed:
            emissions += _finish_item(state, item, {})
    state.ended = True
    if state.usage is not None:
        emissions.append(UsageReported(state.usage))
    if state.finish == "error":
        return [*emissions, Failed(_event_error({}))]
    reason = _CHAT_INCOMPLETE.get(state.finish, "")
    return [*emissions, TurnEnded("incomplete" if reason else "completed", reason)]


def _chat_item(state: StreamState, name: str, kind: str) -> _Item:
    """The item that this part of the delta belongs to; text ends the reasoning before it."""
    item = state.by_id.get(name)
    return (
        item if item is not None and not item.closed else _add_item(state, {"type": kind, "id": name}, None)
    )


def _close_reasoning(state: StreamState) -> list[Emission]:
    item = state.by_id.get("reasoning")
    return _finish_item(state, item, {}) if item is not None and not item.closed else []


def _on_chat_content(state: StreamState, delta: Mapping[str, Any]) -> list[Emission]:
    emissions = _close_reasoning(state)
    content = delta["content"]
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in _objects(content))
    return emissions + _grow(_chat_item(state, "message", "message"), "text", 0, content)


def _on_chat_refusal(state: StreamState, delta: Mapping[str, Any]) -> list[Emission]:
    emissions = _close_reasoning(state)
    return emissions + _grow(_chat_item(state, "message", "message"), "refusal", 0, delta["refusal"])


def _on_chat_reasoning_details(state: StreamState, delta: Mapping[str, Any]) -> list[Emission]:
    """Keep the fragments for the next turn; show them only where `reasoning` does not repeat them."""
    emissions: list[Emission] = []
    for fragment in _objects(delta["reasoning_details"]):
        text = fragment.get("text") or fragment.get("summary")
        # A signature may come alone, and after the text began: it belongs to what was said before.
        known = None if text else state.by_id.get("reasoning")
        item = known or _chat_item(state, "reasoning", "reasoning")
        _keep_detail(item, fragment)
        if not delta.get("reasoning"):
            emissions += _grow(item, "reasoning", 0, text)
    return emissions


def _keep_detail(item: _Item, fragment: Mapping[str, Any]) -> None:
    """Add a fragment to the detail of its index and type; its texts are joined when the item closes."""
    details: list[JSONObject] = item.payload.setdefault("reasoning_details", [])
    kind = f"{fragment.get('index')!r} {fragment.get('type')!r}"
    number = item.details.setdefault(kind, len(details))
    if number == len(details):
        details.append({})
    detail = details[number]
    for key, value in fragment.items():
        if key in _DETAIL_TEXTS and isinstance(value, str):
            detail.setdefault(key, "")
            item.parts.setdefault((f"detail {key}", number), []).append(value)
        elif value is not None:
            detail[key] = value


def _join_details(item: _Item) -> None:
    for number, detail in enumerate(item.payload.get("reasoning_details", ())):
        for key in _DETAIL_TEXTS:
            if pieces := item.parts.get((f"detail {key}", number)):
                detail[key] = "".join(pieces)


def _on_chat_calls(state: StreamState, delta: Mapping[str, Any]) -> list[Emission]:
    emissions = _close_reasoning(state)
    for call in _objects(delta["tool_calls"]):
        function = _mapping(call.get("function"))
        item = _chat_call(state, call)
        for key, value in (("call_id", call.get("id")), ("name", function.get("name"))):
            if isinstance(value, str) and value:
                item.payload[key] = value
        if isinstance(function.get("arguments"), str):
            item.parts.setdefault(("arguments", 0), []).append(function["arguments"])
    return emissions


def _chat_call(state: StreamState, call: Mapping[str, Any]) -> _Item:
    """The call that a fragment continues, by index or else the last one, or a new one.

    Some providers give every call the index 0, or none: a name under another id begins a new call.
    """
    index, call_id = call.get("index"), call.get("id")
    calls = [item for item in state.items if item.type == "function_call"]
    if isinstance(index, int):
        calls = [item for item in calls if item.index == index]
    known = calls[-1] if calls else None
    named = bool(_mapping(call.get("function")).get("name"))
    if known is not None and named and known.payload.get("name"):
        other_id = bool(call_id) and call_id != known.payload.get("call_id")
        if other_id or (not call_id and not isinstance(index, int)):
            known = None
    return known or _add_item(state, {"type": "function_call", "id": f"call_{len(state.items)}"}, index)


def _on_chat_images(state: StreamState, delta: Mapping[str, Any]) -> list[Emission]:
    emissions: list[Emission] = []
    for image in _objects(delta["images"]):
        url = _text(_mapping(image.get("image_url")).get("url"))
        if url and hash(url) not in state.pictures:
            state.pictures.add(hash(url))
            emissions.append(_picture_made(state, url))
    return emissions


def _on_chat_annotations(state: StreamState, delta: Mapping[str, Any]) -> list[Emission]:
    notes = _objects(delta["annotations"])
    flat = [{**_mapping(note.get("url_citation")), "type": note.get("type")} for note in notes]
    return _cite_all(state, [{"annotations": flat}])


_CHAT_TEXTS: Final = {
    "content": ("message", "text"),
    "refusal": ("message", "refusal"),
    "reasoning": ("reasoning", "reasoning"),
}
_CHAT_INCOMPLETE: Final[dict[str, str]] = {"length": "max_output_tokens", "content_filter": "content_filter"}
_DETAIL_TEXTS: Final = ("text", "summary", "data")
# key of a delta -> what it means; the order is that of reading
_CHAT_REDUCERS: Final[dict[str, Callable[[StreamState, Mapping[str, Any]], list[Emission]]]] = {
    "reasoning_details": _on_chat_reasoning_details,
    "reasoning": lambda state, delta: _grow(
        _chat_item(state, "reasoning", "reasoning"), "reasoning", 0, delta["reasoning"]
    ),
    "content": _on_chat_content,
    "refusal": _on_chat_refusal,
    "tool_calls": _on_chat_calls,
    "images": _on_chat_images,
    "annotations": _on_chat_annotations,
}


# ── 12. HTTP client ──────────────────────────────────────────────────────────
# Authorised HTTP to OpenRouter, and how long to wait before another try.
# Promise: a stream is opened once and never retried here; every failure is a PipeError.
# Doc: docs/openrouter_http_client.md   Tests: tests/test_http_client.py


def _request_data(payload: JSONObject) -> bytes | io.BytesIO:
    """A body as aiohttp wants it: large ones as a file, which it sends in pieces."""
    data = _json_dumps(payload)
    return data if len(data) < _LARGE_BODY_BYTES else io.BytesIO(data)


class _Reads:
    """The body of a response, read by read; not a generator, because those outlive a `break`.

    With `idle_s` a read that gives nothing for so many seconds fails. aiohttp's own `sock_read` makes
    and cancels a timer for every read, a tenth of what a delta costs; this one timer only looks, now
    and then, how long somebody has been waiting. While nobody reads, nothing is late.
    """

    __slots__ = ("_begun", "_content", "_idle_s", "_loop", "_timer", "_waiting_since")

    def __init__(self, response: aiohttp.ClientResponse, idle_s: float | None = None) -> None:
        self._content = response.content
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        self._begun = False
        self._idle_s = idle_s or 0.0
        self._timer = self._loop.call_later(idle_s, self._look) if idle_s else None
        if idle_s and response.connection is not None and response.connection.protocol is not None:
            response.connection.protocol.read_timeout = None

    def __aiter__(self) -> _Reads:
        return self

    async def __anext__(self) -> bytes:
        self._waiting_since = self._loop.time()
        try:
            chunk = await self._content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            chunk = self._left_over()
            if not chunk:
                raise _network_error(exc, begun=self._begun) from exc
        self._begun = True
        self._waiting_since = None
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def _left_over(self) -> bytes:
        """What had arrived before the connection broke: aiohttp itself gives out nothing after that."""
        pieces = getattr(self._content, "_buffer", None)
        if not pieces:
            return b""
        chunk = b"".join(pieces)
        pieces.clear()
        return chunk

    def _look(self) -> None:
        since = self._waiting_since
        left_s = self._idle_s if since is None else since + self._idle_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._content.set_exception(TimeoutError())

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()


class OpenRouterClient:
    """One aiohttp session, made at the first request and bound to the loop it was made on.

    `now` gives seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def get_json(self, connection: Connection, path: str, etag: str = "") -> Fetched:
        """The decoded answer of `GET path`, without content if it is still what `etag` stands for.

        Raises:
            PipeError: it could not be reached, refused, or sent no JSON.
        """
        known = {"If-None-Match": etag} if etag else {}
        async with self._request("GET", connection, path, None, known) as response:
            if response.status == _NOT_MODIFIED:
                return Fetched(None, etag)
            content = await self._read(response, _MAX_JSON_BYTES)
            fresh = response.headers.get("ETag", "")
        try:
            return Fetched(_json_loads(content), fresh)
        except ValueError:
            raise OpenRouterAPIError("The answer is not JSON", retryable=True) from None

    @contextlib.asynccontextmanager
    async def open_stream(
        self, connection: Connection, path: str, payload: JSONObject
    ) -> AsyncGenerator[_Reads, None]:
        """Send `payload` and give its answer as reads of any size; leaving closes the socket at once.

        Raises:
            PipeError: it could not be reached or refused, or the connection broke.
        """
        async with self._request("POST", connection, path, payload) as response:
            if "json" in response.content_type:  # a late failure, or a proxy that does not stream
                content = await self._read(response, _MAX_JSON_BYTES)
                error = _unstreamed(response.status, response.headers, content, self._now())
                raise _without_key(error, connection.key)
            if response.content_type == "text/html":
                words = "The address in BASE_URL answers with a web page; an administrator has to correct it"
                raise OpenRouterAPIError(words, template="configuration")
            with contextlib.closing(_Reads(response, connection.idle_timeout_s)) as reads:
                yield reads

    async def aclose(self) -> None:
        """Close the session and its sockets, for good."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @contextlib.asynccontextmanager
    async def _request(
        self,
        method: str,
        connection: Connection,
        path: str,
        payload: JSONObject | None,
        more_headers: Mapping[str, str] = types.MappingProxyType({}),
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connection.connect_timeout_s, sock_read=connection.idle_timeout_s
        )
        headers = {**dict(connection.headers), **more_headers}
        if connection.key:  # the catalog needs none
            headers["Authorization"] = f"Bearer {connection.key}"
        if payload is not None:
            headers |= {"Content-Type": "application/json", "Accept": "text/event-stream"}
            # A compressing proxy would hold events back.
            headers["Accept-Encoding"] = "identity"
        data = None if payload is None else _request_data(payload)
        try:
            how: JSONObject = {
                "headers": headers,
                "timeout": timeout,
                "proxy": _proxy_for(connection.base_url),
            }
            how["allow_redirects"] = False  # the chat, and who asks, would go with it
            url = connection.base_url + path
            response = await self._open_session().request(method, url, data=data, **how)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
            raise _network_error(exc) from exc
        try:
            if response.status >= 400:
                content = await self._read(response, _MAX_ERROR_BYTES)
                error = _api_error(response.status, response.headers, content, self._now())
                raise _without_key(error, connection.key)
            if response.status >= 300 and response.status != _NOT_MODIFIED:
                words = "The address in BASE_URL leads to another one; an administrator has to correct it"
                raise OpenRouterAPIError(words, template="configuration")
            yield response
        finally:
            # Not `release`: after a cancellation nothing more may be awaited, and an unread rest
            # must not keep the model writing. A body that was read to its end is back in the pool.
            response.close()

    async def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        content = bytearray()
        async for chunk in _Reads(response):
            content += chunk
            if len(content) > limit:
                break
        return bytes(content)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise AdmissionError(_UPDATED)
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300)
            # One session serves all users: no cookie of one may travel with another. `trust_env`
            # would read proxies, but also ~/.netrc, whose passwords have no business here.
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            # The host drops a function without a word; its sockets must not wait for ever.
            weakref.finalize(self, _dispose, self._session, asyncio.get_running_loop())
        return self._session


def _without_key(error: PipeErrorT, key: str) -> PipeErrorT:
    """`error` with nothing in its words that would give the key away, however the answer had written it."""
    if key:
        error.detail = error.detail.replace(key, "[the key]")
        error.code = error.code.replace(key, "[the key]")
        error.args = (error.detail,)  # what `repr` and a traceback show
    return error


PipeErrorT = TypeVar("PipeErrorT", bound=PipeError)


def _unstreamed(status: int, headers: Mapping[str, str], content: bytes, now: float) -> OpenRouterAPIError:
    """The error in an answer that is JSON instead of a stream; a whole answer there is one as well."""
    with contextlib.suppress(ValueError):
        if _mapping(_json_loads(content)).get("error"):
            return _api_error(status, headers, content, now)
    words = "The address in BASE_URL answers without streaming; an administrator has to correct it"
    return OpenRouterAPIError(words, template="configuration")


def _dispose(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> None:
    """Close the sockets of a session that was left behind, whichever thread finds it."""
    connector = session.connector
    session.detach()
    if connector is None:
        return
    closing = _close_connector(connector)
    here: asyncio.AbstractEventLoop | None = None
    with contextlib.suppress(RuntimeError):
        here = asyncio.get_running_loop()
    if loop.is_running() and here is not loop:
        asyncio.run_coroutine_threadsafe(closing, loop)
    else:  # up to its first wait it closes; nobody is left to wait, or the loop may end before it would
        with contextlib.suppress(StopIteration):
            closing.send(None)
        closing.close()


async def _close_connector(connector: aiohttp.BaseConnector) -> None:
    await connector.close()


@functools.lru_cache(maxsize=64)
def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`, as `HTTPS_PROXY` and `NO_PROXY` say."""
    parts = urlsplit(url)
    is_direct = not parts.hostname or proxy_bypass(parts.hostname)
    return None if is_direct else getproxies().get(parts.scheme)


def _network_error(exc: BaseException, *, begun: bool = False) -> StreamError:
    """A failure below HTTP, in words that hold no address and no key. `begun`: some of the body had come."""
    if isinstance(exc, TimeoutError):
        words = "Nothing more came for too long" if begun else ""
        return StreamError(words, template="broken" if begun else "timeout", retryable=True)
    if begun:
        return StreamError("The connection was cut", template="broken", retryable=True)
    words = {
        aiohttp.ClientConnectorCertificateError: "Its certificate could not be verified",
        aiohttp.ClientConnectorDNSError: "Its name could not be resolved",
        aiohttp.ClientConnectorError: "The connection was refused or failed",
        aiohttp.ClientPayloadError: "The connection was cut before the answer",
        aiohttp.ServerDisconnectedError: "The server closed the connection",
        ValueError: "The valve BASE_URL is not a valid address",
    }
    detail = next((text for kind, text in words.items() if isinstance(exc, kind)), "The connection failed")
    return StreamError(detail, template="network", retryable=not isinstance(exc, ValueError))


class _RetryWait:
    """Seconds before the next try: what the error names, else exponential with jitter.

    `chance` gives numbers from 0 to 1.
    """

    def __init__(self, longest_s: float, chance: Callable[[], float] = random.random) -> None:
        self._longest_s = longest_s
        self._chance = chance

    def __call__(self, retry_state: RetryCallState) -> float:
        """The wait after a try that failed, for tenacity."""
        error = retry_state.outcome.exception() if retry_state.outcome else None
        named = error.retry_after if isinstance(error, PipeError) else None
        if named is None:
            named = 2.0 ** (retry_state.attempt_number - 1) * (0.5 + self._chance())
        return min(named, self._longest_s)

    def allows(self, error: BaseException) -> bool:
        """Whether another try may help: the error passes by, and within the longest wait."""
        return (
            isinstance(error, PipeError) and error.retryable and (error.retry_after or 0) <= self._longest_s
        )


# ── 13. Emitters & outlet ────────────────────────────────────────────────────
# What has happened, written the way this kind of client reads it.
# Promise: well-formed events only; deltas are joined, never dropped; an emitter that fails is survived.
# Doc: docs/streaming_pipeline_and_emitters.md   Tests: tests/test_emitters.py


class Piece(NamedTuple):
    """A delta on its way out; pieces with the same `build` may leave as one."""

    build: Callable[[str], JSONObject]
    text: str


Entry = JSONObject | Piece


class DeltaBuffer:
    """Text that waits for its reader, joined.

    `char_limit` characters leave at once, fewer after `idle_s` seconds; `now` is in seconds.
    """

    def __init__(self, char_limit: int = 0, idle_s: float = 0.0) -> None:
        self._char_limit = char_limit
        self._idle_s = idle_s
        self._pieces: list[str] = []
        self._since = 0.0
        self.size = 0  # characters that wait

    def push(self, text: str, now: float) -> None:
        """Add text that has arrived."""
        if not self._pieces:
            self._since = now
        self._pieces.append(text)
        self.size += len(text)

    def due(self, now: float) -> float | None:
        """Seconds until the text should leave; None while there is none."""
        if not self._pieces:
            return None
        return 0.0 if self.size >= self._char_limit else max(0.0, self._since + self._idle_s - now)

    def flush(self) -> str:
        """Take all of it."""
        text = "".join(self._pieces)
        self._pieces.clear()
        self.size = 0
        return text


class Outlet:
    """What leaves `pipe()`, at the pace of its reader.

    `limits` is (characters, seconds) of the streaming profile; `clock` gives seconds that only grow.
    """

    def __init__(self, limits: tuple[int, float], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holds_back = limits[1] > 0
        self._entries: deque[tuple[JSONObject, int]] = deque()  # what is ready, with its characters
        self._build: Callable[[str], JSONObject] | None = None  # whose text still grows, behind all entries
        self._buffer = DeltaBuffer(*limits)
        self._waiting_chars = 0
        self._shown = False  # whether a first delta has left, which never waits
        self._result: JSONObject | None = None
        self._finished = False
        self.full = False  # more waits than should
        self._waiter: asyncio.Future[None] | None = None  # the reader, while there is nothing for it
        self._room = asyncio.Event()

    def put(self, entry: Entry) -> None:
        """Queue an entry behind all others."""
        if isinstance(entry, Piece):
            if not entry.text:
                return
            if entry.build is not self._build:
                self._flush_pending()
                self._build = entry.build
            self._buffer.push(entry.text, self._clock() if self._holds_back else 0.0)
            self._waiting_chars += len(entry.text)
        else:
            self._flush_pending()
            self._entries.append((entry, 0))
        if self._waiter is not None:
            self._wake()
        if self._waiting_chars > _OUTLET_MAX_CHARS or len(self._entries) > _OUTLET_MAX_ENTRIES:
            self.full = True
            self._room.clear()

    def _flush_pending(self) -> None:
        """Something else follows the text that was growing: it is ready as it is."""
        build, self._build = self._build, None
        if build is not None and (chars := self._buffer.size):
            self._entries.append((build(self._buffer.flush()), chars))

    async def room(self) -> None:
        """Wait while too much waits for the reader."""
        while self.full:
            await self._room.wait()

    def finish(self, result: JSONObject | None = None) -> None:
        """Nothing more will come. `result` is the answer of a client that does not stream."""
        if self._finished:
            return
        self._finished = True
        self._result = result
        self._flush_pending()
        self._wake()
        self._open_room()

    async def chunks(
        self, run: Callable[[], asyncio.Task[None] | None] | None = None
    ) -> AsyncGenerator[JSONObject, None]:
        """Give everything that was put, in order, until `finish`; `run` starts what puts it.

        Whoever stops reading ends it at once: nothing is awaited on the way out, because for an API
        client that went away every await raises again.
        """
        task = run() if run is not None else None
        try:
            while True:
                chunk, wait_s = self._take()
                if chunk is not None:
                    yield chunk
                elif self._finished and not self._entries:
                    return
                elif wait_s != 0.0:
                    await self._arrival(wait_s)
        finally:
            if task is not None:
                task.cancel()

    async def result(self) -> JSONObject:
        """The whole answer, once it is there."""
        while not self._finished:
            await self._arrival(None)
        return self._result or {}

    def _arrival(self, seconds: float | None) -> asyncio.Future[None]:
        """Done when something was put, or after `seconds`; a bare future, because it is made per delta."""
        waiter = self._waiter = asyncio.Future()
        if seconds is not None:
            timer = waiter.get_loop().call_later(seconds, self._wake)
            waiter.add_done_callback(lambda _: timer.cancel())
        return waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _take(self) -> tuple[JSONObject | None, float | None]:
        """(the next chunk or None, seconds to wait for one: 0 = look again, None = for a signal)."""
        if self._entries:
            chunk, chars = self._entries.popleft()
        elif self._build is None or not self._buffer.size:
            return None, None
        else:
            if self._holds_back and self._shown and (due := self._buffer.due(self._clock())):
                return None, due
            chars = self._buffer.size
            chunk = self._build(self._buffer.flush())
        self._shown = self._shown or chars > 0
        self._waiting_chars -= chars
        if self.full:
            self._make_room()
        return chunk, 0.0

    def _make_room(self) -> None:
        if self._waiting_chars <= _OUTLET_MAX_CHARS // 2 and len(self._entries) <= _OUTLET_MAX_ENTRIES // 2:
            self._open_room()

    def _open_room(self) -> None:
        self.full = False
        self._room.set()


# Writers: one for each kind of client


class _OpenItem:
    """An item that the host shows and has not seen the end of; `opened_at` by the writer's clock."""

    __slots__ = ("build", "half", "id", "index", "opened_at", "part", "pieces", "type")

    def __init__(
        self, index: int, kind: str, build: Callable[[str], JSONObject], opened_at: float = 0.0
    ) -> None:
        self.index = index
        self.type = kind
        self.build = build
        self.opened_at = opened_at
        self.id = ""
        self.pieces: list[str] = []
        self.part: tuple[str, int] | None = None
        self.half = ""  # the first half of a UTF-16 pair; the other half is on the way

    def say(self, text: str) -> list[Entry]:
        """`text` as it may leave: pairs joined; half of one at its end waits for the next text."""
        if self.half or not text.isascii():
            text, self.half = self.half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, self.half = text[:-1], text[-1]
            text = _whole_text(text)
        return [_new_tuple(Piece, (self.build, text))] if text else []

    def say_rest(self) -> list[Entry]:
        """A half whose other half never came."""
        half, self.half = self.half, ""
        return [Piece(self.build, "\ufffd")] if half else []


class _Writer:
    """Emissions in, entries for the outlet out; `WRITES` maps a kind of emission to its function."""

    WRITES: ClassVar[Mapping[type, Callable[[Any, Any], Iterable[Entry]]]] = {}
    TAKES_CALLS: ClassVar[bool] = True  # somebody runs the calls that are written
    SHOWS_CALLS: ClassVar[bool] = True  # while they run

    def write(self, emission: Emission) -> Iterable[Entry]:
        """The entries that one emission becomes; none for what this client has no place for."""
        write = self.WRITES.get(type(emission))
        return write(self, emission) if write is not None else ()

    def result(self) -> JSONObject | None:
        """The whole answer, for clients that do not stream."""
        return None


class _BrowserWriter(_Writer):
    """Responses events, as Open WebUI reduces, shows and saves them.

    Items are numbered densely over all upstream calls of one answer, each with an id of ours,
    because the host and the page match by id and providers use one id twice.
    """

    def __init__(self, clock: Callable[[], float], show_thinking: bool) -> None:
        self._clock = clock
        self._show_thinking = show_thinking
        self._open: dict[int, _OpenItem] = {}  # by the number the reducer gave
        self._closed: dict[int, JSONObject] = {}  # the ends of reasoning items, by the same
        self._next_index = 0
        self._calls: list[ToolRequested] = []
        self._unanswered: dict[str, tuple[int, JSONObject, ToolCall]] = {}  # by call id: (index, item, call)
        self._usage: JSONObject | None = None

    def _start(self, number: int, kind: str, entries: list[Entry]) -> _OpenItem:
        stale = self._open.pop(number, None)
        if stale is not None:  # of a try that failed before it wrote anything
            entries += self._close(stale, "completed")
        prefix, event, place = _HOST_ITEMS[kind]
        item_id, index = _new_item_id(prefix), self._next_index
        self._next_index += 1
        template = {"type": event, "item_id": item_id, "output_index": index, place: 0}
        item = _OpenItem(index, kind, lambda text: {**template, "delta": text}, self._clock())
        item.id = item_id
        self._open[number] = item
        entries.append(self._event("added", item, "in_progress"))
        return item

    def _event(self, what: str, item: _OpenItem, status: str) -> JSONObject:
        text = _whole_text("".join(item.pieces))
        body: JSONObject = {"type": item.type, "id": item.id, "status": status}
        if item.type == "message":
            content = [{"type": "output_text", "text": text, "annotations": []}]
            body |= {"role": "assistant", "content": content}
        else:
            body["summary"] = [{"type": "summary_text", "text": text}] if text else []
        if item.type == "reasoning" and what == "done":
            body["duration"] = max(0, round(self._clock() - item.opened_at))
        return {"type": f"response.output_item.{what}", "output_index": item.index, "item": body}

    def _write_text(self, delta: TextDelta | RefusalDelta) -> list[Entry]:
        entries: list[Entry] = []
        item = self._open.get(delta.item)
        if item is None or item.type != "message":
            item = self._start(delta.item, "message", entries)
        item.pieces.append(delta.text)
        return entries + item.say(delta.text)

    def _write_reasoning(self, delta: ReasoningDelta) -> list[Entry]:
        entries: list[Entry] = []
        item = self._open.get(delta.item)
        if item is None or item.type != "reasoning":
            item = self._start(delta.item, "reasoning", entries)
        text = _with_paragraph(item, delta)
        if text and self._show_thinking:
            item.pieces.append(text)
            entries += item.say(text)
        return entries

    def _write_closed(self, closed: ItemClosed) -> list[Entry]:
        entries: list[Entry] = []
        item = self._open.get(closed.item)
        if item is None and closed.kind != "message":  # nothing of it was shown, but it may be kept
            item = self._start(closed.item, "reasoning", entries)
        if item is None:
            return []
        del self._open[closed.item]
        entries += self._close(item, "completed")
        if closed.kind != "message":
            self._closed[closed.item] = cast(JSONObject, entries[-1])
        return entries

    def _write_carrier(self, carrier: CarrierReady) -> list[Entry]:
        """The end of a reasoning item once more: host and page replace it where it stands."""
        done = self._closed.get(carrier.item)
        return [{**done, "item": {**done["item"], "reasoning_details": carrier.details}}] if done else []

    def _close(self, item: _OpenItem, status: str) -> list[Entry]:
        return [*item.say_rest(), self._event("done", item, status)]

    def _keep_call(self, requested: ToolRequested) -> list[Entry]:
        # Held back until the upstream call has ended well: the host runs whatever it has seen.
        self._calls.append(requested)
        return []

    def _keep_usage(self, reported: UsageReported) -> list[Entry]:
        # A try that failed after it had cost something adds to the one that was repeated for it.
        self._usage = _merge_usage_stats(self._usage or {}, reported.usage)
        return []

    def _write_end(self, ended: TurnEnded) -> list[Entry]:
        entries = self._close_all("completed")
        for call in _in_order(self._calls) if ended.outcome == "completed" else ():
            entries += self._call_events(call)
        self._calls.clear()
        self._closed.clear()
        return [*entries, *self._usage_event(always=True)]

    def _output_events(self, result: ToolResult) -> list[Entry]:
        """The end of a call's card, then its output: only `done`, because older hosts mix the two up."""
        index, item, _ = self._unanswered.pop(result.call.call_id)
        done = {"type": "response.output_item.done", "output_index": index}
        ended = [{**done, "item": {**item, "status": "failed"}}] if result.failed else []
        pictures = [{"type": "input_image", "image_url": url} for url in result.images]
        output: JSONObject = {
            "type": "function_call_output",
            "id": _new_item_id("fco"),
            "call_id": result.call.call_id,
            "output": [{"type": "input_text", "text": _whole_text(result.text)}, *pictures],
            "status": result.status,
        }
        output |= {"files": list(result.files)} if result.files else {}
        output |= {"embeds": list(result.embeds)} if result.embeds else {}
        entries: list[Entry] = [*ended, {**done, "output_index": self._next_index, "item": output}]
        self._next_index += 1
        return entries

    def _write_failure(self, failed: Failed) -> list[Entry]:
        self._calls.clear()
        entries = self._close_all("incomplete")
        for *_, call in list(self._unanswered.values()):  # the host would run them all the same
            entries += self._output_events(ToolResult(call, _NOT_FINISHED, failed=True))
        return [*entries, *self._usage_event(always=False), {"error": {"message": failed.error.user_message}}]

    def _close_all(self, status: str) -> list[Entry]:
        entries = [entry for item in self._open.values() for entry in self._close(item, status)]
        self._open.clear()
        return entries

    def _call_events(self, call: ToolCall) -> list[Entry]:
        item = {"type": "function_call", "id": _new_item_id("fc"), "call_id": call.call_id, **call.function()}
        index = self._next_index
        self._next_index += 1
        self._unanswered[call.call_id] = (index, item, call)
        return [
            {
                "type": f"response.output_item.{what}",
                "output_index": index,
                "item": {**item, "status": status},
            }
            for what, status in (("added", "in_progress"), ("done", "completed"))
        ]

    def _usage_event(self, *, always: bool) -> list[Entry]:
        usage, self._usage = self._usage, None
        if usage is None and not always:
            return []
        # Neither `id` nor `output`: with them the host would cut or replace its own history.
        return [{"type": "response.completed", "response": {"usage": usage} if usage else {}}]

    WRITES: ClassVar[Mapping[type, Callable[[Any, Any], Iterable[Entry]]]] = {
        TextDelta: _write_text,
        RefusalDelta: _write_text,
        ReasoningDelta: _write_reasoning,
        ItemClosed: _write_closed,
        ToolRequested: _keep_call,
        ToolFinished: lambda writer, finished: writer._output_events(finished.result),
        UsageReported: _keep_usage,
        TurnEnded: _write_end,
        CarrierReady: _write_carrier,
        Failed: _write_failure,
    }


_NOT_FINISHED: Final = "Error: the answer ended before this call had finished."
# type of an item -> (prefix of its id, its delta event, key of the part's number)
_HOST_ITEMS: Final[dict[str, tuple[str, str, str]]] = {
    "message": ("msg", "response.output_text.delta", "content_index"),
    "reasoning": ("rs", "response.reasoning_summary_text.delta", "summary_index"),
}


def _with_paragraph(item: _OpenItem, delta: ReasoningDelta) -> str:
    """The text of a reasoning delta, after a blank line where a new part begins."""
    if not delta.text:
        return ""
    part, item.part = item.part, (delta.kind, delta.part)
    return "\n\n" + delta.text if part is not None and part != item.part else delta.text


def _in_order(requested: Iterable[ToolRequested]) -> list[ToolCall]:
    """Calls as the model wrote them, whichever was finished first."""
    return [request.call for request in sorted(requested, key=lambda request: request.item)]


class _BrowserJSONWriter(_BrowserWriter):
    """The same items at once, for a chat whose streaming is switched off. The host runs no calls there."""

    TAKES_CALLS: ClassVar[bool] = False
    SHOWS_CALLS: ClassVar[bool] = False

    def __init__(self, clock: Callable[[], float], show_thinking: bool) -> None:
        super().__init__(clock, show_thinking)
        self._items: dict[int, JSONObject] = {}  # by the index that they got when they began
        self._totals: JSONObject = {}
        self._error: JSONObject | None = None
        self._goes_on = False  # calls are being run

    def write(self, emission: Emission) -> Iterable[Entry]:
        """Keep what the browser dialect would have sent."""
        if isinstance(emission, TurnEnded):
            self._goes_on = emission.goes_on
        self._keep(super().write(emission))
        return ()

    def _keep(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if isinstance(entry, Piece):
                continue
            if "error" in entry:
                self._error = entry["error"]
            elif entry["type"] == "response.output_item.done":
                self._items[entry["output_index"]] = entry["item"]
            elif entry["type"] == "response.completed":
                self._totals = _merge_usage_stats(self._totals, entry["response"].get("usage") or {})

    def result(self) -> JSONObject:
        """`{choices, output, usage}`, and `error` beside them if the answer broke off."""
        self._keep(self._close_all("incomplete"))  # somebody pressed Stop
        for index, item, _ in self._unanswered.values() if self._goes_on else ():
            self._items[index] = {**item, "status": "incomplete"}
        items = [self._items[index] for index in sorted(self._items)]
        if not items and self._error is None:  # of nothing at all the host would keep no usage
            content = [{"type": "output_text", "text": "", "annotations": []}]
            item = {"type": "message", "id": _new_item_id("msg"), "status": "completed", "role": "assistant"}
            items = [{**item, "content": content}]
        parts = [part for item in items if item["type"] == "message" for part in item["content"]]
        message = {"role": "assistant", "content": "\n".join(part["text"] for part in parts)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        result: JSONObject = {"choices": [choice], "output": items}
        if self._totals:
            result["usage"] = self._totals
        if self._error is not None:
            result["error"] = self._error
        return result


class _ChunkWriter(_Writer):
    """`chat.completion.chunk` objects, as OpenAI's clients read them."""

    def __init__(self, model: str, completion_id: str, created: int, show_thinking: bool) -> None:
        self._head: JSONObject = {"id": completion_id, "object": "chat.completion.chunk"}
        self._head |= {"created": created, "model": model}
        self._show_thinking = show_thinking
        self._open: dict[int, _OpenItem] = {}
        self._said_role = False
        self._calls: list[ToolRequested] = []
        self._totals: JSONObject = {}
        self._texts = 0

    def _chunk(self, delta: JSONObject, finish_reason: str | None = None) -> JSONObject:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

    def write(self, emission: Emission) -> Iterable[Entry]:
        """The chunks of one emission; the very first one names the role."""
        entries = list(super().write(emission))
        if entries and not self._said_role and not isinstance(emission, Failed):
            self._said_role = True
            entries.insert(0, self._chunk({"role": "assistant", "content": ""}))
        return entries

    def _start(self, number: int, kind: str) -> _OpenItem:
        item = self._open.get(number)
        if item is None or item.type != kind:
            key = "content" if kind == "message" else "reasoning_content"
            item = self._open[number] = _OpenItem(number, kind, lambda text: self._chunk({key: text}))
        return item

    def _write_text(self, delta: TextDelta | RefusalDelta) -> list[Entry]:
        known = self._open.get(delta.item)
        item = self._start(delta.item, "message")
        fresh = item is not known
        self._texts += fresh
        return item.say("\n" + delta.text if fresh and self._texts > 1 else delta.text)

    def _write_reasoning(self, delta: ReasoningDelta) -> list[Entry]:
        item = self._start(delta.item, "reasoning")
        text = _with_paragraph(item, delta)
        return item.say(text) if text and self._show_thinking else []

    def _write_citation(self, citation: CitationFound) -> list[Entry]:
        source = {"url": citation.url, "title": citation.title, "content": citation.snippet}
        annotation = {"type": "url_citation", "url_citation": {**source, "start_index": 0, "end_index": 0}}
        return [self._chunk({"annotations": [annotation]})]

    def _write_carrier(self, carrier: CarrierReady) -> list[Entry]:
        """For clients that hand the details of an answer back with it."""
        return [self._chunk({"reasoning_details": carrier.details})]

    def _keep_call(self, requested: ToolRequested) -> list[Entry]:
        self._calls.append(requested)
        return []

    def _keep_usage(self, reported: UsageReported) -> list[Entry]:
        self._totals = _merge_usage_stats(self._totals, reported.usage)
        return []

    def _write_end(self, ended: TurnEnded) -> list[Entry]:
        calls = _in_order(self._calls) if ended.outcome == "completed" else []
        entries = [entry for item in self._open.values() for entry in item.say_rest()]
        self._open.clear()
        self._calls = []
        if ended.goes_on:  # the pipe runs the calls; the client sees one answer
            return entries
        if calls:
            tool_calls = [
                {"index": index, "id": call.call_id, "type": "function", "function": call.function()}
                for index, call in enumerate(calls)
            ]
            entries.append(self._chunk({"tool_calls": tool_calls}))
        entries.append(self._chunk({}, _finish_reason(ended, bool(calls))))
        if self._totals:
            entries.append({**self._head, "choices": [], "usage": _chat_usage(self._totals)})
        return entries

    def _write_failure(self, failed: Failed) -> list[Entry]:
        """An error as OpenAI's clients read it."""
        rest = [entry for item in self._open.values() for entry in item.say_rest()]
        error = failed.error
        code = error.status or error.template
        return [*rest, {"error": {"message": error.user_message, "type": error.template, "code": code}}]

    WRITES: ClassVar[Mapping[type, Callable[[Any, Any], Iterable[Entry]]]] = {
        TextDelta: _write_text,
        RefusalDelta: _write_text,
        ReasoningDelta: _write_reasoning,
        CitationFound: _write_citation,
        ToolRequested: _keep_call,
        UsageReported: _keep_usage,
        TurnEnded: _write_end,
        CarrierReady: _write_carrier,
        Failed: _write_failure,
    }


class _CompletionWriter(_ChunkWriter):
    """One `chat.completion` object, made of the chunks a streaming client would have had."""

    def __init__(self, model: str, completion_id: str, created: int, show_thinking: bool) -> None:
        super().__init__(model, completion_id, created, show_thinking)
        self._message: JSONObject = {"role": "assistant", "content": ""}
        self._said: dict[str, list[str]] = {}  # the texts of the message, in pieces
        self._finish: str | None = None
        self._error: JSONObject | None = None

    def write(self, emission: Emission) -> Iterable[Entry]:
        """Add what the chunks of `emission` hold."""
        for entry in super().write(emission):
            chunk = entry.build(entry.text) if isinstance(entry, Piece) else entry
            if "error" in chunk:
                self._error = chunk["error"]
            for choice in chunk.get("choices", ()):
                self._finish = choice["finish_reason"] or self._finish
                self._add(choice["delta"])
        return ()

    def _add(self, delta: JSONObject) -> None:
        for key, value in delta.items():
            if key == "role":
                continue
            if isinstance(value, str):
                self._said.setdefault(key, []).append(value)
                continue
            if key == "tool_calls":
                value = [{k: v for k, v in call.items() if k != "index"} for call in value]
            self._message.setdefault(key, []).extend(value)

    def result(self) -> JSONObject:
        """`{id, object, created, model, choices, usage}`, or `{error}` if the answer broke off."""
        if self._error is not None:
            return {"error": self._error}
        texts = {key: "".join(pieces) for key, pieces in self._said.items()}
        choice = {"index": 0, "message": {**self._message, **texts}, "finish_reason": self._finish or "stop"}
        result = {**self._head, "object": "chat.completion", "choices": [choice]}
        if self._totals:
            result["usage"] = _chat_usage(self._totals)
        return result


class _TaskWriter(_CompletionWriter):
    """One `chat.completion` with nothing but text: a title, tags, a query."""

    TAKES_CALLS: ClassVar[bool] = False

    WRITES: ClassVar[Mapping[type, Callable[[Any, Any], Iterable[Entry]]]] = {
        kind: write
        for kind, write in _ChunkWriter.WRITES.items()
        if kind not in (ReasoningDelta, CitationFound, ToolRequested)
    }


def _finish_reason(ended: TurnEnded, has_calls: bool) -> str:
    if ended.outcome == "incomplete":
        return "content_filter" if ended.reason == "content_filter" else "length"
    return "tool_calls" if has_calls else "stop"


def _chat_usage(usage: Mapping[str, Any]) -> JSONObject:
    """Usage under the names of `/chat/completions` (reference §8)."""
    return {_CHAT_USAGE.get(name, name): value for name, value in usage.items()}


def _make_writer(request: ChatRequest, valves: Valves, clock: Callable[[], float]) -> _Writer:
    """The writer of a request's dialect."""
    show = valves.SHOW_THINKING
    if request.dialect in ("browser", "browser_json"):
        return (_BrowserWriter if request.dialect == "browser" else _BrowserJSONWriter)(clock, show)
    kinds = {"api_stream": _ChunkWriter, "api_json": _CompletionWriter, "task": _TaskWriter}
    model = str(request.body.get("model") or request.model)
    return kinds[request.dialect](model, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), show)


class _SafeEmitter:
    """An event emitter that never raises: once broken it stays silent, after one warning."""

    __slots__ = ("_emit",)

    def __init__(self, emit: HostEventEmitter | None) -> None:
        self._emit = emit

    async def __call__(self, event: JSONObject) -> None:
        if self._emit is None:
            return
        try:
            async with asyncio.timeout(_EMIT_S):
                await self._emit(event)
        except Exception as exc:
            self._emit = None
            LOGGER.warning("Open WebUI takes no more events for this answer: %s", type(exc).__name__)


def _wrap_event_emitter(
    emit: HostEventEmitter | None, *, suppress_chat_messages: bool = False
) -> HostEventEmitter:
    """The host's emitter made safe; a no-op where there is none or nobody looks."""
    return _SafeEmitter(None if suppress_chat_messages else emit)


class Emitter:
    """Hands emissions to the outlet and, as statuses and sources, to the host's event emitter."""

    def __init__(
        self,
        writer: _Writer,
        outlet: Outlet,
        emit: HostEventEmitter,
        clock: Callable[[], float],
        page: ErrorPage = _PLAIN_PAGE,
    ) -> None:
        self._writer, self._outlet, self._emit, self._clock = writer, outlet, emit, clock
        self.began_at: float | None = None  # when the model began to write
        self._first_at: float | None = None  # the same in this upstream call
        self._writing_s = 0.0  # for how long it wrote in those that have ended
        self._page = page
        self._cited: set[str] = set()
        self._running: set[str] = set()  # the ids of calls
        self._warnings: list[str] = []
        self._status_open = False
        self._empty = True
        self._usage: JSONObject = {}

    def send(self, emissions: Sequence[Emission]) -> Awaitable[None]:
        """Pass emissions on, in order; the result is to be awaited before more is sent.

        Text leaves at once, without a coroutine: nearly every call is a delta with nothing to wait for.
        """
        for number, emission in enumerate(emissions):
            if type(emission) in self.SIDE_EFFECTS:
                return self._send_waiting(emissions[number:])
            self._emit_update(emission)
        return self._outlet.room() if self._outlet.full else _NOTHING_TO_AWAIT

    async def _send_waiting(self, emissions: Sequence[Emission]) -> None:
        for emission in emissions:
            side = self.SIDE_EFFECTS.get(type(emission))
            if side is not None:
                await side(self, emission)
            self._emit_update(emission)
        await self._outlet.room()

    def _emit_update(self, emission: Emission) -> None:
        """Whatever this kind of client reads in the answer itself."""
        if self._empty or self._first_at is None:
            self._note_first(emission)
        for entry in self._writer.write(emission):
            self._outlet.put(entry)

    def _note_first(self, emission: Emission) -> None:
        if isinstance(emission, _ANSWERS if self._writer.TAKES_CALLS else _TEXT_ANSWERS):
            self._empty = False
        if self._first_at is None and isinstance(emission, _WRITTEN):
            self._first_at = self._clock()
            self.began_at = self.began_at or self._first_at

    def refuse(self, error: PipeError) -> None:
        """Say why nothing will be sent, and end; nothing is waited for."""
        error.shown = render_error(error, self._page)
        self._emit_update(Failed(error))
        self.aclose()

    def aclose(self) -> None:
        """Nothing more will be sent."""
        self._outlet.finish(self._writer.result())

    async def _emit_status(self, update: StatusUpdate) -> None:
        self._status_open = not update.done
        data = {"description": update.description, "done": update.done, "hidden": update.hidden}
        await self._emit({"type": "status", "data": data})

    async def _emit_citation(self, citation: CitationFound) -> None:
        if citation.url in self._cited:
            return
        self._cited.add(citation.url)
        data = {
            "source": {"name": citation.title, "url": citation.url},
            "document": [citation.snippet or citation.title],
            "metadata": [{"source": citation.url, "name": citation.title}],
        }
        await self._emit({"type": "source", "data": data})

    async def _emit_notification(self, notice: Notice) -> None:
        self._warnings.append(notice.text.rstrip("."))
        await self._emit({"type": "notification", "data": {"type": "warning", "content": notice.text}})

    async def _emit_progress(self, progress: ServerToolProgress) -> None:
        words = _SERVER_TOOL_WORDS.get(progress.type.removeprefix("openrouter:").removesuffix("_call"))
        if words is None:
            return
        begun = progress.status == "in_progress"
        text = words[0] if begun else words[2 if progress.status in _FAILED_STATUSES else 1]
        update = StatusUpdate(f"{text}: {progress.query}" if progress.query else text, not begun)
        await self._emit_status(update if text else StatusUpdate(words[0], done=True, hidden=True))

    async def _emit_tool_prompt(self, started: ToolStarted) -> None:
        """What is being run, where no card shows it."""
        self._running.add(started.call.call_id)
        if not self._writer.SHOWS_CALLS:
            await self._emit_status(StatusUpdate(f"Running {started.call.name}"))

    async def _emit_tool_sources(self, finished: ToolFinished) -> None:
        self._running.discard(finished.result.call.call_id)
        if not self._writer.SHOWS_CALLS and not self._running:
            await self._emit_status(StatusUpdate(f"Ran {finished.result.call.name}", done=True))
        for source in finished.result.sources:
            await self._emit({"type": "source", "data": source})

    async def _count_usage(self, reported: UsageReported) -> None:
        self._usage = _merge_usage_stats(self._usage, reported.usage)

    async def _note_end(self, ended: TurnEnded) -> None:
        if self._first_at is not None:
            self._writing_s += self._clock() - self._first_at
            self._first_at = None
        if ended.outcome == "incomplete":
            self._warnings.append(_INCOMPLETE_WORDS.get(ended.reason, "The answer is not complete"))
        elif self._empty and not ended.goes_on:
            self._warnings.append("The model sent an empty answer")
        if ended.goes_on:  # what was written so far led to calls; an answer comes only now
            self._empty = True

    async def _emit_templated_error(self, failed: Failed) -> None:
        """Say it in the administrator's words where there are some; the answer gets it after this."""
        failed.error.shown = render_error(failed.error, self._page)
        await self._emit_error(failed, show_error_log_citation=bool(failed.log))

    async def _emit_error(self, failed: Failed, *, show_error_log_citation: bool) -> None:
        await self.close_status("Failed")
        if show_error_log_citation:
            name = f"Log of request {self._page.error_id}".strip()
            data = {"source": {"name": name}, "document": [failed.log], "metadata": [{"source": name}]}
            await self._emit({"type": "source", "data": data})

    async def close_status(self, description: str = "Stopped") -> None:
        """End a line of progress that would otherwise shimmer for ever in the saved chat."""
        if self._status_open:
            await self._emit_status(StatusUpdate(description, done=True))

    async def _emit_completion(self, elapsed_s: float, show_usage: bool, spent_before: float) -> None:
        """The last status: what the person must know, and what the answer took."""
        writing_s = self._writing_s + (0.0 if self._first_at is None else self._clock() - self._first_at)
        parts = list(self._warnings)
        if show_usage:
            parts += _usage_words(self._usage, elapsed_s, writing_s, spent_before)
        if parts:
            await self._emit_status(StatusUpdate(" · ".join(parts), done=True))
        elif self._status_open:
            await self._emit_status(StatusUpdate("Done", done=True, hidden=True))

    async def complete(self, elapsed_s: float, show_usage: bool, spent_before: float = 0.0) -> JSONObject:
        """The answer has ended well: say the totals. Returns the usage of all upstream calls.

        `spent_before`: US dollars that the chat's earlier answers have cost, 0 if nobody knows.
        """
        await self._emit_completion(elapsed_s, show_usage, spent_before)
        return self._usage

    def usage(self) -> JSONObject:
        """What has been used so far."""
        return self._usage

    SIDE_EFFECTS: ClassVar[Mapping[type, Callable[[Any, Any], Awaitable[None]]]] = {
        StatusUpdate: _emit_status,
        CitationFound: _emit_citation,
        Notice: _emit_notification,
        ServerToolProgress: _emit_progress,
        ToolStarted: _emit_tool_prompt,
        ToolFinished: _emit_tool_sources,
        UsageReported: _count_usage,
        TurnEnded: _note_end,
        Failed: _emit_templated_error,
    }


_TEXT_ANSWERS: Final = (TextDelta, RefusalDelta)
_ANSWERS: Final = (*_TEXT_ANSWERS, ToolRequested)
_WRITTEN: Final = (TextDelta, RefusalDelta, ReasoningDelta)
# server tool -> what is said while it works, when it has, and when it could not (if anything)
_SERVER_TOOL_WORDS: Final[dict[str, tuple[str, str, str]]] = {
    "web_search": ("Searching the web", "Searched the web", "The web search failed"),
    "web_fetch": ("Reading a page", "Read a page", "The page could not be read"),
    "file_search": ("Searching files", "Searched files", "The file search failed"),
    "image_generation": ("Making a picture", "Made a picture", "The picture could not be made"),
    "code_interpreter": ("Running code", "Ran code", "The code could not be run"),
    "fusion": ("Asking several models", "Asked several models", ""),
    "advisor": ("Asking an advisor", "Asked an advisor", ""),
    "subagent": ("A helper works on it", "A helper has worked on it", ""),
    "tool_search": ("Looking for tools", "Looked for tools", ""),
}
_FAILED_STATUSES: Final = ("failed", "incomplete", "cancelled")
_INCOMPLETE_WORDS: Final[dict[str, str]] = {
    "max_output_tokens": "Cut short: the output limit was reached",
    "content_filter": "Cut short by the provider's content filter",
    "cancelled": "Cut short: the provider cancelled the answer",
}


def _usage_words(
    usage: Mapping[str, Any], elapsed_s: float, writing_s: float, spent_before: float
) -> list[str]:
    """`3.2 s`, `25 tokens in (8 cached)`, `148 out (128 reasoning)`, `46 tokens/s`, `$0.0015 (chat $0.02)`.

    The rate is that of the time in which the model wrote, and left out where that was too short.
    """
    words = [f"{max(0.1, elapsed_s):.1f} s"]
    tokens_in, tokens_out = usage.get("input_tokens"), usage.get("output_tokens")
    cached = _mapping(usage.get("input_tokens_details")).get("cached_tokens")
    thought = _mapping(usage.get("output_tokens_details")).get("reasoning_tokens")
    if _is_number(tokens_in):
        words.append(f"{tokens_in:,} tokens in" + _in_brackets(cached, "cached"))
    if _is_number(tokens_out):
        words.append(f"{tokens_out:,} out" + _in_brackets(thought, "reasoning"))
        if tokens_out and writing_s >= 0.5:
            words.append(f"{tokens_out / writing_s:.0f} tokens/s")
    cost = usage.get("cost")
    if _is_number(cost):
        words.append(_dollars(cost) + (f" (chat {_dollars(cost + spent_before)})" if spent_before else ""))
    return words


def _in_brackets(count: Any, what: str) -> str:
    return f" ({count:,} {what})" if _is_number(count) and count else ""


# ── 14. Media intake ─────────────────────────────────────────────────────────
# Downloads of the files that a chat names.
# Promise: a connection goes to an address that was judged for it, one redirect at a time; what comes back
# is bounded in size and time, is never decompressed, and is named after its own first bytes.
# Doc: docs/multimodal_ingestion_pipeline.md   Tests: tests/test_safe_fetcher.py

_DOWNLOAD_HEADERS: Final[dict[str, str]] = {
    "User-Agent": "openrouter-responses-pipe",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}
_REDIRECT_STATUS: Final = frozenset({301, 302, 303, 307, 308})
# What aiohttp raises -> what it means; the first that fits counts
_DOWNLOAD_FAILURES: Final[dict[type[BaseException], str]] = {
    TimeoutError: "it took too long",
    socket.gaierror: "its server's name is not known",
    aiohttp.ClientConnectorCertificateError: "its server's certificate could not be verified",
    aiohttp.ClientConnectorError: "its server could not be reached",
    **dict.fromkeys((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError), "the connection was cut"),
    **dict.fromkeys((aiohttp.ClientResponseError, HttpProcessingError), "the answer is not valid"),
    ValueError: "its address is not valid",
}

Resolve = Callable[[str, int], Awaitable[list[str]]]  # (host, port) -> its IP addresses


class Download(NamedTuple):
    """A file that was downloaded: its bytes, what they are by themselves, the address that gave them."""

    content: bytes
    mime: str
    url: str


class SafeFetcher:
    """Downloads what a chat names: over https, and from the open internet only.

    `allowed_hosts` are exceptions, names or `name:port`; `resolve` gives the addresses of a name. Each
    request has a session and a connector of its own: nothing that one was granted, no cookie, no open
    connection, no answer of the name service, is there for the next.
    """

    def __init__(self, allowed_hosts: frozenset[str] = frozenset(), resolve: Resolve | None = None) -> None:
        self._allowed_hosts = allowed_hosts
        self._resolve = resolve or _look_up
        self._running: set[asyncio.Timeout] = set()
        self._closed = False

    async def fetch(self, url: str, max_bytes: int, timeout_s: float = _DOWNLOAD_S) -> Download:
        """The file at `url`, of at most `max_bytes`, had within `timeout_s` from the first step to the last.

        Raises:
            UnsafeURLError: the address, or one that it redirects to, is refused.
            PayloadTooLargeError: it is larger.
            InputError: it could not be had.
            AdmissionError: the fetcher was closed.
        """
        if self._closed:
            raise AdmissionError(_UPDATED)
        timer = asyncio.timeout(timeout_s)
        self._running.add(timer)
        try:
            async with timer:
                for _ in range(_MAX_REDIRECTS + 1):
                    found = await self._request(url, max_bytes)
                    if isinstance(found, bytes):
                        return Download(found, _sniffed(found), url)
                    url = found
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as exc:
            if self._closed:
                raise AdmissionError(_UPDATED) from exc
            words = (text for kind, text in _DOWNLOAD_FAILURES.items() if isinstance(exc, kind))
            raise _not_downloaded(next(words, "the connection failed")) from exc
        finally:
            self._running.discard(timer)
        raise _not_downloaded("it redirects too often")

    async def aclose(self) -> None:
        """Take no more; what still runs ends at once, in an AdmissionError."""
        self._closed = True
        for timer in self._running:
            if not timer.expired():
                timer.reschedule(0)  # closing its session would leave a reader waiting

    async def _request(self, url: str, max_bytes: int) -> bytes | str:
        """The content of `url`, or the address that it redirects to."""
        addresses = await self._judged_addresses(url)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_Judged(addresses), use_dns_cache=False),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_DOWNLOAD_HEADERS,
            timeout=aiohttp.ClientTimeout(total=None),  # `fetch` counts the time
            auto_decompress=False,
            trust_env=False,  # no proxy of the environment: it would look names up itself
        ) as session:
            response = await session.get(url, allow_redirects=False)
            try:
                if response.status in _REDIRECT_STATUS:
                    return _redirect_target(url, response.headers.get("Location", ""))
                return await _read_body(response, max_bytes)
            finally:
                if response.connection is not None and response.connection.transport is not None:
                    response.connection.transport.abort()  # not even a TLS farewell is waited for
                response.close()

    async def _judged_addresses(self, url: str) -> list[str]:
        """The addresses that a connection to `url` may go to; a name is looked up once, here."""
        where = _web_address(url, self._allowed_hosts)
        is_given = where.problem or where.literal
        addresses = [where.literal] if is_given else await self._resolve(where.host, where.port)
        if reason := _is_safe_url(url, addresses, self._allowed_hosts):
            raise UnsafeURLError(f"The file was not downloaded: {reason}")
        return addresses


class _Judged(AbstractResolver):
    """Answers whatever is asked with the judged addresses."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Every address, with the family that it is of."""
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)
            for address in self._addresses
            for kind in [socket.AF_INET6 if ":" in address else socket.AF_INET]
        ]

    async def close(self) -> None:
        """There is nothing to close."""


async def _look_up(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _redirect_target(url: str, location: str) -> str:
    if not location:
        raise _not_downloaded("it redirects to nowhere")
    target = urljoin(url, location)
    if url.lower().startswith("https:") and target.lower().startswith("http:"):
        raise UnsafeURLError("The file was not downloaded: it redirects from https to http")
    return target


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body as it was sent, if it is a whole file that was not packed."""
    if response.status != 200:
        raise _not_downloaded(f"its server answered {response.status}")
    packings = {packing.strip().lower() for packing in response.headers.getall("Content-Encoding", ())}
    if packings - {"", "identity"}:
        raise _not_downloaded("its server sent it compressed, which was not asked for")
    content = bytearray()
    size = response.content_length or 0
    while size <= max_bytes and (chunk := await response.content.readany()):
        content += chunk
        size = max(size, len(content))
    if size > max_bytes:
        raise PayloadTooLargeError(f"The file is larger than {_megabytes(max_bytes)}, which is the limit")
    if not content:
        raise _not_downloaded("it is empty")
    return bytes(content)


def _not_downloaded(words: str) -> InputError:
    return InputError(f"The file could not be downloaded: {words}")


class MediaIntake:
    """Has the media that a history names, several at once, within the limits of a request.

    `clock` gives seconds that only grow; `resolve_name` the addresses of a server, for tests.
    """

    def __init__(
        self, host: OpenWebUIHost, clock: Callable[[], float], resolve_name: Resolve | None = None
    ) -> None:
        self._host = host
        self._clock = clock
        self._resolve_name = resolve_name
        self._closed = False
        self._downloads = asyncio.Semaphore(_MEDIA_AT_ONCE)
        # What one person may have of them: slow servers in one chat must not hold up all others.
        self._shares: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._reads = asyncio.Semaphore(_MEDIA_AT_ONCE)  # of the host's files, which no far server holds up
        self._fetchers: dict[frozenset[str], SafeFetcher] = {}
        self._keeping: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._gone: dict[str, float] = {}  # what answers show and nobody has: until when it is not asked for

    async def resolve(
        self, refs: Sequence[MediaRef], request: ChatRequest, settings: RequestSettings
    ) -> dict[MediaRef, MediaBlob]:
        """What could be had, and of the rest why not; the first of `refs` are the most important."""
        errand = _Errand(request, settings)
        pictures = [ref for ref in refs if ref.kind == "image"]
        found = dict.fromkeys(pictures[settings.most_images :], MediaBlob(reason="many pictures"))
        ahead: deque[tuple[MediaRef, asyncio.Task[MediaBlob]]] = deque()
        async with asyncio.TaskGroup() as group:
            for ref in [ref for ref in refs if ref not in found]:
                if len(ahead) == _MEDIA_AT_ONCE_PER_REQUEST:
                    first, task = ahead.popleft()
                    found[first] = errand.admitted(await task)
                if errand.is_full:
                    found[ref] = errand.admitted(MediaBlob(size=1))
                else:
                    ahead.append((ref, group.create_task(self._have(ref, errand))))
            for ref, task in ahead:
                found[ref] = errand.admitted(await task)
        return found

    async def aclose(self) -> None:
        """Take no more."""
        self._closed = True
        for fetcher in self._fetchers.values():
            await fetcher.aclose()

    async def _have(self, ref: MediaRef, errand: _Errand) -> MediaBlob:
        """One medium, or why it is not sent."""
        try:
            blob = await self._fetch(ref, errand)
            _check_kind(ref, blob)
        except PipeError as exc:
            LOGGER.info("a file of a chat was not sent: %s", exc)
            return MediaBlob(name=_name_of(ref.address), reason=str(exc))
        return blob

    async def _fetch(self, ref: MediaRef, errand: _Errand) -> MediaBlob:
        request, settings = errand.request, errand.settings
        most = settings.most_video_bytes if ref.kind == "video" else settings.most_bytes
        if file_id := _host_file_id(ref.address, settings.webui_url):
            return await self._read(file_id, request, most)
        if not settings.keeps_media:
            return (await self._download(ref, errand))[0]
        kept_id = _kept_id(request.user_id, ref.address)
        async with self._keeping.setdefault(kept_id, asyncio.Lock()):  # who comes second finds the copy
            with contextlib.suppress(InputError):
                return await self._read(kept_id, request, most)
            blob, content = await self._download(ref, errand)
            await self._host.save_file(kept_id, blob, content, request)
        return blob

    async def _read(self, file_id: str, request: ChatRequest, most_bytes: int) -> MediaBlob:
        async with self._reads:
            return await self._host.inline_file(file_id, request.user_id, most_bytes)

    async def _download(self, ref: MediaRef, errand: _Errand) -> tuple[MediaBlob, bytes]:
        """The file at an address; what an answer shows is not waited for long, nor asked for again soon."""
        if self._closed:
            raise AdmissionError(_UPDATED)
        if ref.in_answer and self._gone.get(ref.address, -math.inf) > self._clock():
            raise InputError("It could not be had a short while ago")
        settings = errand.settings
        most = min(settings.most_bytes, settings.most_remote_bytes)
        most = settings.most_video_bytes if ref.kind == "video" else most
        fresh = SafeFetcher(settings.trusted_hosts, self._resolve_name)
        fetcher = self._fetchers.setdefault(settings.trusted_hosts, fresh)
        try:
            timeout_s = _SHOWN_DOWNLOAD_S if ref.in_answer else _DOWNLOAD_S
            share = asyncio.Semaphore(_MEDIA_AT_ONCE_PER_PERSON)
            share = self._shares.setdefault(errand.request.user_id, share)
            async with share, self._downloads:
                content = (await fetcher.fetch(ref.address, most, timeout_s)).content
        except InputError:
            if ref.in_answer:
                _drop_oldest(self._gone, _MOST_GONE)
                self._gone[ref.address] = self._clock() + _GONE_S
            raise
        blob = await asyncio.to_thread(_blob_of, content, _name_of(ref.address))
        _check_kind(ref, blob)
        return blob, content


class _Errand:
    """What is fetched for one request, and how much there is room for; `is_full`: for nothing more."""

    __slots__ = ("_most", "_size", "is_full", "request", "settings")

    def __init__(self, request: ChatRequest, settings: RequestSettings) -> None:
        self.request, self.settings = request, settings
        self.is_full = False
        self._size = 0  # in bytes
        self._most = settings.most_bytes + settings.most_video_bytes

    def admitted(self, blob: MediaBlob) -> MediaBlob:
        """`blob`, or why there is no room for it; to be asked in the order of importance."""
        self.is_full = self.is_full or self._size + blob.size > self._most
        if self.is_full and not blob.reason:
            return MediaBlob(
                name=blob.name, reason=f"All files together are larger than {_megabytes(self._most)}"
            )
        self._size += blob.size
        return blob


def _kept_id(user_id: str, address: str) -> str:
    """The id of the copy that is kept of a file of the web: the same each time, of each person their own."""
    digest = hashlib.sha256(f"{user_id} {address}".encode("utf-8", "replace")).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def _check_kind(ref: MediaRef, blob: MediaBlob) -> None:
    """Raise InputError if a file is not what it stands for; what it is, its first bytes say."""
    what, mimes = _KINDS_BY_MIME[ref.kind]
    if not mimes.fullmatch(blob.mime):
        raise InputError(f"It is not {what}")
    if ref.kind == "file" and blob.name.lower().endswith(".pdf") and blob.mime != "application/pdf":
        raise InputError("It is not a PDF, although its name says so")


_KINDS_BY_MIME: Final[dict[str, tuple[str, re.Pattern[str]]]] = {
    "image": ("a picture", re.compile(r"image/(?!svg).+")),
    "audio": ("a recording in WAV or MP3", re.compile(r"audio/(?:wav|mpeg)")),
    "video": ("a film", re.compile(r"video/.+")),
    "file": ("a file", re.compile(r".*")),
}
_MEDIA_AT_ONCE: Final = 16
_MEDIA_AT_ONCE_PER_REQUEST: Final = 4
_MEDIA_AT_ONCE_PER_PERSON: Final = 6
_SHOWN_DOWNLOAD_S: Final = 5.0
_MOST_GONE: Final = 1_000
_GONE_S: Final = 600.0


# ── 15. Artifact store ───────────────────────────────────────────────────────
# What models need back and the host does not keep: sealed rows in the host's database.
# Promise: what `save` has acknowledged is stored; whatever fails here, the chat goes on.
# Doc: docs/persistence_encryption_and_storage.md   Tests: tests/test_artifact_store.py


def _packed(
    payload: ArtifactPayload, raw: bytes, ulid: str, settings: ArtifactSettings, now: float
) -> ArtifactRow:
    """The row of a payload; `raw` is its data as JSON."""
    codec = "json"
    packed = raw
    if len(raw) >= settings.least_compressed:
        codec = "lz4" if settings.uses_lz4 and "lz4" in _COMPRESS else "zlib"
        packed = _COMPRESS[codec](raw)
        if len(packed) >= len(raw):
            codec, packed = "json", raw
    key_id = ""
    if payload.kind in settings.sealed_kinds and settings.cipher.can_seal:
        # Bound to the row: put under another id or with another person it cannot be opened.
        key_id, packed = settings.cipher.encrypt(packed, f"{ulid} {payload.user_id}")
    return ArtifactRow(
        ulid,
        payload.chat_id,
        payload.message_id,
        payload.user_id,
        payload.model,
        payload.kind,
        codec,
        key_id,
        len(raw),
        packed,
        created_at=now,
        last_used_at=now,
    )


def _unpacked(row: ArtifactRow, cipher: ArtifactCipher) -> tuple[bytes, Any]:
    """(the JSON that a row was made of, what it says).

    Raises:
        StorageError: it was sealed with a key that is gone, or damaged.
    """
    packed, size = row.payload, row.raw_bytes
    if row.key_id:
        packed = cipher.decrypt(row.key_id, packed, f"{row.ulid} {row.user_id}")
    try:
        if not 0 < size <= _MAX_ARTIFACT_BYTES:
            raise ValueError
        raw = packed if row.codec == "json" else _DECOMPRESS[row.codec](packed, size)
        if len(raw) != size:
            raise ValueError
        return raw, _json_loads(raw)
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError, zlib.error):
        raise StorageError("What was kept is damaged") from None


def _readable(rows: Iterable[ArtifactRow], cipher: ArtifactCipher) -> dict[str, tuple[bytes, Any]]:
    """Of the rows that can be read their JSON and what it says, by ULID."""
    found: dict[str, tuple[bytes, Any]] = {}
    for row in rows:
        with contextlib.suppress(StorageError):
            found[row.ulid] = _unpacked(row, cipher)
    return found


def _row_of(values: Sequence[Any]) -> ArtifactRow | None:
    """A row of values that come from outside; None for what cannot be one."""
    if len(values) != len(ArtifactRow._fields):
        return None
    row = ArtifactRow._make(values)
    sound = (
        all(isinstance(text, str) for text in row[:8])
        and type(row.raw_bytes) is int
        and 0 <= row.raw_bytes <= _MAX_ARTIFACT_BYTES
        and isinstance(row.payload, bytes)
        and _is_number(row.created_at)
        and _is_number(row.last_used_at)
    )
    return row if sound else None


def _zlib_decompressed(packed: bytes, size: int) -> bytes:
    return zlib.decompressobj().decompress(packed, size)


def _lz4_decompressed(packed: bytes, size: int) -> bytes:
    if lz4_frame is None:
        raise ValueError("lz4 is not installed any more")
    return lz4_frame.LZ4FrameDecompressor().decompress(packed, size)


_COMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "zlib": functools.partial(zlib.compress, level=1),
    **({} if lz4_frame is None else {"lz4": lz4_frame.compress}),
}
# how a payload was made -> its JSON, of so many bytes and no more
_DECOMPRESS: Final[dict[str, Callable[[bytes, int], bytes]]] = {
    "zlib": _zlib_decompressed,
    "lz4": _lz4_decompressed,
}


# SQL


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Whatever a database says, as a StorageError with its kind; never with what was in the statement."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError, ValueError, OverflowError) as exc:
        origin = getattr(exc, "orig", None) or exc
        words = str(origin).partition("\n")[0]  # the lines below may say what is in a row
        raise StorageError(f"{type(origin).__name__}: {_cut_text(words, 200)}") from None


def _table_prefix(pipe_id: str) -> str:
    """`pipe_<id>` with nothing in it that a name of a table may not have; different for different ids."""
    plain = re.sub(r"[^a-z0-9_]", "_", pipe_id)[:40]
    if plain == pipe_id:
        return f"pipe_{plain}"
    return f"pipe_{plain[:31]}${hashlib.sha256(pipe_id.encode()).hexdigest()[:8]}"


def _column(name: str) -> sa.Column[Any]:
    kind, default = _COLUMN_TYPES.get(name, (sa.String, "''"))
    is_key = name in ("ulid", "chat_id")
    return sa.Column(name, kind, primary_key=is_key, nullable=False, server_default=sa.text(default))


class ArtifactTable:
    """SQL for the artifacts of one pipe. Every method raises a StorageError where the database fails.

    `later` is given what nobody has to wait for: giving connections back.
    """

    def __init__(
        self,
        database: Database,
        pipe_id: str,
        later: Callable[[Coroutine[Any, Any, None]], Any] | None = None,
    ) -> None:
        self._engine = database.engine
        self._later = later
        metadata = sa.MetaData(schema=database.schema)
        prefix = _table_prefix(pipe_id)
        columns = [_column(name) for name in ArtifactRow._fields]
        self.table = sa.Table(f"{prefix}_artifacts", metadata, *columns)
        for name in ("chat_id", "last_used_at"):  # ulid and chat_id together are the primary key
            sa.Index(f"ix_{prefix}_{name}", self.table.c[name])
        self._versions = sa.Table(
            f"{prefix}_versions",
            metadata,
            sa.Column("name", sa.String(64), primary_key=True),
            sa.Column("version", sa.Integer, nullable=False),
        )
        self._insert = _insert_new(self._engine.dialect.name, self.table)
        self._name = self._engine.dialect.identifier_preparer.format_table(self.table)

    async def create(self, now: float) -> None:
        """Make what is not there and bring an older table forward; safe in several workers at once."""
        with _storage_errors():
            async with self._engine.begin() as connection:
                for table in (self._versions, self.table):
                    await connection.execute(CreateTable(table, if_not_exists=True))
                await connection.run_sync(self._migrate, now)
                for index in self.table.indexes:
                    await connection.execute(CreateIndex(index, if_not_exists=True))

    def _migrate(self, connection: sa.Connection, now: float) -> None:
        """Add the columns that are missing, as in an older version. What a newer one has is left as it is."""
        there = sa.inspect(connection).get_columns(self.table.name, schema=self.table.schema)
        known = {column["name"] for column in there}
        for column in self.table.columns:
            if column.name not in known:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(sa.DDL(f"ALTER TABLE {self._name} ADD COLUMN {definition}"))
                if column.name in ("created_at", "last_used_at"):  # nobody knows; not long ago, then
                    connection.execute(sa.update(self.table).values({column.name: now}))
        # Written each time: whether that can be done has to be known, too.
        version = self._versions.c.version
        of_ours = {"name": "artifacts", "version": _ARTIFACTS_VERSION}
        connection.execute(_insert_new(connection.dialect.name, self._versions), of_ours)
        older = sa.update(self._versions).where(self._versions.c.name == "artifacts")
        newest = sa.case((version > _ARTIFACTS_VERSION, version), else_=_ARTIFACTS_VERSION)
        connection.execute(older.values(version=newest))

    async def insert(self, rows: Sequence[ArtifactRow]) -> None:
        """Add rows, all or none; what is there already stays as it is."""
        with _storage_errors():
            async with self._connected() as connection:
                driver = await _sqlite_driver(connection)
                if driver is None:
                    await connection.execute(self._insert, [row._asdict() for row in rows])
                    await connection.commit()
                else:
                    # What begins with WITH is a transaction by itself: no way to the thread to commit it.
                    values = ", ".join([f"({_COLUMN_MARKS})"] * len(rows))
                    await driver.execute_fetchall(
                        f"WITH added ({_COLUMN_NAMES}) AS (VALUES {values}) INSERT INTO {self._name} "
                        f"({_COLUMN_NAMES}) SELECT * FROM added WHERE true ON CONFLICT DO NOTHING",
                        [*itertools.chain.from_iterable(rows)],
                    )
                    if driver.in_transaction:  # one that the host has begun
                        await driver.commit()

    async def select(self, ulids: Sequence[str], user_id: str, chat_id: str) -> list[ArtifactRow]:
        """Of each of these ULIDs one row of this person: that of the chat, else that of another."""
        found: dict[str, Sequence[Any]] = {}
        with _storage_errors():
            async with self._connected() as connection:
                for chat in (chat_id, None):
                    if missing := [ulid for ulid in ulids if ulid not in found]:
                        rows = await self._rows_of(connection, missing, user_id, chat)
                        found |= {row[0]: row for row in rows}
        whole = len(ArtifactRow._fields)
        return [_row_of(row[:whole]) or _damaged(str(row[0])) for row in found.values()]

    async def _rows_of(
        self, connection: AsyncConnection, ulids: Sequence[str], user_id: str, chat_id: str | None
    ) -> Iterable[Sequence[Any]]:
        """Those of a chat; if it is None, one of each ULID, whatever chat it is of."""
        driver, table = await _sqlite_driver(connection), self.table
        if driver is not None:  # with `max` the other columns are of the same row
            marks = ", ".join("?" * len(ulids))
            where = f"FROM {self._name} WHERE user_id = ? AND ulid IN ({marks})"
            if chat_id is None:
                grouped = f"SELECT {_COLUMN_NAMES}, max(chat_id) {where} GROUP BY ulid"
                return await driver.execute_fetchall(grouped, (user_id, *ulids))
            own = f"SELECT {_COLUMN_NAMES} {where} AND chat_id = ?"
            return await driver.execute_fetchall(own, (user_id, *ulids, chat_id))
        place = sa.func.row_number().over(partition_by=table.c.ulid, order_by=table.c.chat_id)
        theirs = sa.select(table, place.label("place")).where(
            table.c.ulid.in_(ulids),
            table.c.user_id == user_id,
            sa.true() if chat_id is None else table.c.chat_id == chat_id,
        )
        ranked = theirs.subquery()
        return (await connection.execute(sa.select(ranked).where(ranked.c.place == 1))).all()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncGenerator[AsyncConnection, None]:
        connection = await self._engine.connect()
        try:
            yield connection
        finally:
            giving_back = _given_back(connection)
            if self._later is None:
                await giving_back
            else:
                self._later(giving_back)

    async def touch(self, ulids: Sequence[str], chat_id: str, now: float) -> None:
        """Note that these rows of a chat have been used."""
        table = self.table
        statement = sa.update(table).where(table.c.ulid.in_(ulids), table.c.chat_id == chat_id)
        await self._change(statement.values(last_used_at=now))

    async def delete_unused(self, since: float, most: int) -> int:
        """Delete some of the rows that nobody has used since then; returns how many."""
        return await self._delete(self.table.c.last_used_at < since, most)

    async def delete_chats(self, chat_ids: Sequence[str], before: float, most: int) -> int:
        """Delete some of the rows of these chats that were made before then; returns how many."""
        table = self.table
        return await self._delete(sa.and_(table.c.chat_id.in_(chat_ids), table.c.created_at < before), most)

    async def chats(self, after: str, most: int) -> list[str]:
        """The ids of chats that rows are of, in order, from behind `after` on."""
        column = self.table.c.chat_id
        statement = sa.select(column).where(column > after).distinct().order_by(column).limit(most)
        return [row[0] for row in await self._read(statement)]

    async def rows(self, after: tuple[str, str], most: int) -> list[ArtifactRow]:
        """Rows in the order of (ULID, chat), from behind `after` on."""
        table = self.table
        key = sa.tuple_(table.c.ulid, table.c.chat_id)
        statement = sa.select(table).where(key > sa.tuple_(*map(sa.literal, after))).limit(most)
        found = await self._read(statement.order_by(table.c.ulid, table.c.chat_id))
        return [ArtifactRow(*row) for row in found]

    async def _delete(self, condition: sa.ColumnElement[bool], most: int) -> int:
        some = sa.select(self.table.c.ulid).where(condition).limit(most)
        return await self._change(sa.delete(self.table).where(self.table.c.ulid.in_(some), condition))

    async def _change(self, statement: sa.Executable) -> int:
        with _storage_errors():
            async with self._engine.begin() as connection:
                return cast("sa.CursorResult[Any]", await connection.execute(statement)).rowcount

    async def _read(self, statement: sa.Executable) -> Sequence[Any]:
        with _storage_errors():
            async with self._engine.connect() as connection:
                return (await connection.execute(statement)).all()


async def _given_back(connection: AsyncConnection) -> None:
    with _storage_errors():
        await connection.__aexit__(None, None, None)  # to its end, also when this is cancelled


def _insert_new(dialect: str, table: sa.Table) -> Any:
    """What is there already stays as it is."""
    make = _INSERTS.get(dialect)
    return make(table).on_conflict_do_nothing() if make else sa.insert(table)


def _damaged(ulid: str) -> ArtifactRow:
    """In place of a row that somebody has put something else into."""
    return ArtifactRow(ulid, *[""] * 7, raw_bytes=0, payload=b"", created_at=0.0, last_used_at=0.0)


async def _sqlite_driver(connection: AsyncConnection) -> Any:
    """What sends one statement to SQLite's thread at once; SQLAlchemy goes there and back for each step."""
    if connection.dialect.driver != "aiosqlite":
        return None
    return (await connection.get_raw_connection()).driver_connection


_ARTIFACTS_VERSION: Final = 1
_COLUMN_NAMES: Final = ", ".join(ArtifactRow._fields)
_COLUMN_MARKS: Final = ", ".join("?" * len(ArtifactRow._fields))
# column -> (its type, what it holds in rows that were made before it was there); the others hold text
_COLUMN_TYPES: Final[dict[str, tuple[type[sa.types.TypeEngine[Any]], str]]] = {
    "payload": (sa.LargeBinary, "''"),
    "raw_bytes": (sa.Integer, "0"),
    "created_at": (sa.Double, "0"),
    "last_used_at": (sa.Double, "0"),
}
_INSERTS: Final[dict[str, Callable[[sa.Table], Any]]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}


# Redis


class RedisWriteBehind:
    """Rows on their way to the database: in a list and, for readers, in a cache of Redis.

    One worker at a time moves them to `sink`. A row leaves the list only after it is in the database, and
    whoever wrote it keeps it until then, so that it is lost only if Redis and that process both die before.
    """

    def __init__(
        self,
        client: Any,
        prefix: str,  # of the keys; of a cluster all of them must have one server: {…}
        sink: Callable[[Sequence[ArtifactRow]], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._sink = sink
        self._clock = clock
        self._unconfirmed: dict[tuple[str, str], tuple[ArtifactRow, float]] = {}
        self._is_up = True
        self._has_warned = False
        self._ttl_s, self._batch, self._warn_at = 600, 10, 100

    def configure(self, settings: ArtifactSettings) -> None:
        """Take other limits."""
        self._ttl_s, self._batch = settings.redis_ttl_s, settings.batch
        self._warn_at = settings.redis_warn_at

    async def enqueue(self, rows: Sequence[ArtifactRow]) -> bool:
        """Whether Redis has the rows now; if not, they belong into the database."""
        if not self._is_up or len(self._unconfirmed) > _MOST_PENDING:
            return False
        try:
            await self._redis_enqueue_rows(rows)
        except _REDIS_ERRORS as exc:
            await self._go_down(exc)
            return False
        for row in rows:
            self._unconfirmed[row.ulid, row.chat_id] = (row, self._clock())
        return True

    async def _redis_enqueue_rows(self, rows: Sequence[ArtifactRow]) -> None:
        async with asyncio.timeout(_REDIS_S), self._client.pipeline(transaction=True) as commands:
            for row in rows:
                content = _row_bytes(row)
                commands.rpush(self._key("pending"), content)
                commands.set(self._cache_key(row.user_id, row.ulid), content, ex=self._ttl_s)
            commands.publish(self._key("news"), b"")
            await commands.execute()

    async def get(self, ulids: Sequence[str], user_id: str) -> list[ArtifactRow]:
        """The rows of this person that the cache has."""
        if not self._is_up:
            return []
        try:
            async with asyncio.timeout(_REDIS_S):
                found = await self._client.mget([self._cache_key(user_id, ulid) for ulid in ulids])
        except _REDIS_ERRORS as exc:
            await self._go_down(exc)
            return []
        rows = [row for content in found if content and (row := _row_of_bytes(content))]
        return [row for row in rows if row.user_id == user_id and row.ulid in ulids]

    async def pending(self, ulids: Container[str], user_id: str) -> list[ArtifactRow]:
        """The rows of this person that are not in the database yet."""
        if not self._is_up:
            return []
        try:
            async with asyncio.timeout(_REDIS_S):
                waiting = await self._client.lrange(self._key("pending"), 0, _MOST_PENDING)
        except _REDIS_ERRORS as exc:
            await self._go_down(exc)
            return []
        rows = filter(None, map(_row_of_bytes, waiting))
        return [row for row in rows if row.user_id == user_id and row.ulid in ulids]

    async def run(self) -> None:
        """Move rows as they come; for ever, through every outage of Redis."""
        while not _is_cancelled():
            try:
                await self._follow()
            except _REDIS_ERRORS as exc:
                await self._go_down(exc)
            await asyncio.sleep(_REDIS_RETRY_S)

    async def _follow(self) -> None:
        async with self._client.pubsub() as channel:
            async with asyncio.timeout(_REDIS_S):
                await channel.subscribe(self._key("news"))
            while not _is_cancelled():
                await self.flush()
                if not self._is_up:
                    async with asyncio.timeout(_REDIS_S):  # one that takes nothing is not back
                        await self._client.set(self._key("alive"), b"", ex=self._ttl_s)
                    LOGGER.info("Redis is back")
                    self._is_up = True
                await self._rescue(older_than_s=_UNCONFIRMED_S)
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=_FLUSH_S)
                if message is not None:
                    self._confirm(bytes(message["data"]))

    async def flush(self) -> int:
        """Move what waits to the database, unless another worker does; returns the number of rows."""
        lock = self._client.lock(self._key("lock"), timeout=_FLUSH_LOCK_S)
        async with asyncio.timeout(_REDIS_S):
            waiting = await self._client.llen(self._key("pending"))
            self._warn_of(waiting)
            if not waiting or not await lock.acquire(blocking=False):
                return 0
        moved = 0
        try:
            while not _is_cancelled() and (count := await self._move_batch()):
                moved += count
        except StorageError as exc:
            LOGGER.info("rows wait in Redis: %s", exc)
        finally:
            with contextlib.suppress(*_REDIS_ERRORS):  # it has run out: somebody else may have it
                async with asyncio.timeout(_REDIS_S):
                    await lock.release()
        return moved

    async def _move_batch(self) -> int:
        async with asyncio.timeout(_REDIS_S):
            contents = await self._client.lrange(self._key("pending"), 0, self._batch - 1)
        rows = list(filter(None, map(_row_of_bytes, contents)))
        try:
            unusable = len(contents) - len(rows) + (await self._move(rows) if rows else 0)
        except StorageError:
            await self._put_last(contents)
            raise
        if unusable:
            LOGGER.warning("%d entries in Redis are no rows; they are removed", unusable)
        async with asyncio.timeout(_REDIS_S), self._client.pipeline(transaction=True) as commands:
            for content in contents:
                # By value, not by number: had the lock run out, another worker's rows would be at its place.
                commands.lrem(self._key("pending"), 1, content)
            if rows:
                news = _json_dumps([[row.ulid, row.chat_id] for row in rows])
                commands.publish(self._key("news"), news)
                self._confirm(news)
            await commands.execute()
        return len(contents)

    async def _put_last(self, contents: Sequence[bytes]) -> None:
        """Let others come first: these may be themselves what cannot be written."""
        async with asyncio.timeout(_REDIS_S), self._client.pipeline(transaction=True) as commands:
            for content in contents:
                commands.lrem(self._key("pending"), 1, content)
                commands.rpush(self._key("pending"), content)
            await commands.execute()

    async def _move(self, rows: Sequence[ArtifactRow]) -> int:
        """Have rows written, one by one if together they fail; returns how many are themselves at fault."""
        started = self._clock()
        try:
            await self._sink(rows)
        except StorageError:
            if len(rows) == 1 or self._clock() - started > _AT_ONCE_S:
                raise
        else:
            return 0
        failures: list[StorageError] = []
        for row in rows:
            try:
                await self._sink([row])
            except StorageError as exc:
                failures.append(exc)
        if len(failures) == len(rows):
            raise failures[0]
        return len(failures)

    def _confirm(self, news: bytes) -> None:
        """These rows are in the database."""
        with contextlib.suppress(ValueError, TypeError):
            for ulid, chat_id in _json_loads(news) if news else ():
                self._unconfirmed.pop((ulid, chat_id), None)

    async def _rescue(self, older_than_s: float = -math.inf) -> None:
        """Write rows to the database that nobody has said are there; twice does no harm."""
        before = self._clock() - older_than_s
        rows = [row for row, since in self._unconfirmed.values() if since < before]
        if rows:
            with contextlib.suppress(StorageError):
                await self._move(rows)
                for row in rows:
                    self._unconfirmed.pop((row.ulid, row.chat_id), None)

    async def _go_down(self, exc: BaseException) -> None:
        if self._is_up:
            LOGGER.warning("Redis does not answer (%s); rows go to the database at once", type(exc).__name__)
        self._is_up = False
        await self._rescue()

    def _warn_of(self, waiting: int) -> None:
        if waiting > self._warn_at and not self._has_warned:
            LOGGER.warning("%d rows wait in Redis for the database", waiting)
        self._has_warned = waiting > self._warn_at

    async def aclose(self) -> None:
        """Write what this worker has put into Redis; what others have, they will move."""
        await self._rescue()

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _cache_key(self, user_id: str, ulid: str) -> str:
        return self._key(f"{user_id}:{ulid}")


def _is_cancelled() -> bool:
    """Whether this task is to end: the client of Redis may take a cancellation for an answer that is late."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _row_bytes(row: ArtifactRow) -> bytes:
    """A row as Redis keeps it: a line of JSON, then the payload."""
    return _json_dumps([*row[:9], *row[10:]]) + b"\n" + row.payload


def _row_of_bytes(content: bytes) -> ArtifactRow | None:
    """What `_row_bytes` was given; None for anything else."""
    head, _, payload = content.partition(b"\n")
    try:
        values = _json_loads(head)
    except ValueError:
        return None
    return _row_of([*values[:9], payload, *values[9:]]) if isinstance(values, list) else None


_REDIS_ERRORS: Final = (RedisError, OSError, TimeoutError)
_REDIS_S: Final = 1.0  # what Redis may take for an answer
_REDIS_RETRY_S: Final = 1.0
_FLUSH_S: Final = 1.0  # the longest that a row waits when nobody is told of it
_FLUSH_LOCK_S: Final = 10.0
_UNCONFIRMED_S: Final = 20.0
_MOST_PENDING: Final = 10_000
_CANCEL_TRIES: Final = 20
_AT_ONCE_S: Final = 1.0  # a failure that takes longer is that of a database that does not answer


# The store


class _RecentArtifacts:
    """The JSON of artifacts that were used a short while ago, bounded in bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._size = 0
        self._kept: OrderedDict[tuple[str, str, str], tuple[bytes, float]] = OrderedDict()

    def put(self, key: tuple[str, str, str], raw: bytes, now: float) -> None:
        """Keep something; what was not used for longest goes for it."""
        old, _ = self._kept.pop(key, (b"", 0.0))
        self._size += len(raw) - len(old)
        self._kept[key] = (raw, now)
        while self._size > self._most_bytes:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._size -= len(dropped)

    def get(self, key: tuple[str, str, str], now: float) -> bytes | None:
        """What was kept; None too after so long that the row should be marked as used again."""
        raw, since = self._kept.get(key, (None, 0.0))
        if raw is None or now - since > _RECENT_S:
            return None
        self._kept.move_to_end(key)
        return raw


class ArtifactStore:
    """Keeps artifacts and gives them back to the person whose they are.

    `clock` gives seconds that only grow, `now` the time of day in seconds.
    """

    def __init__(
        self,
        host: OpenWebUIHost,
        pipe_id: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._pipe_id = pipe_id
        self._clock = clock
        self._now = now
        self._settings: ArtifactSettings | None = None
        self._table: ArtifactTable | None = None
        self._is_open = False  # it is there, and can be written
        self._buffer: RedisWriteBehind | None = None
        self._recent = _RecentArtifacts(_RECENT_BYTES)
        self._opening: asyncio.Task[None] | None = None
        self._rests_until: dict[str, float] = {}  # "read", "write": it took too long, nobody else shall wait
        self._is_down = False  # and the log has it
        self._tried = asyncio.Event()  # to open it, whatever came of it
        self._has_unreadable = False  # and the log has it
        self._waiting: deque[tuple[Sequence[ArtifactRow], asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._services: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        # Of its own: the host's may all be waiting for a storage that hangs.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix=f"artifacts of {pipe_id}")
        self._closed = False

    def open(self, settings: ArtifactSettings) -> None:
        """Keep things as `settings` say from now on; the table is opened in the background."""
        self._settings = settings
        if not self._is_open:
            self._open_soon()
        if self._buffer is not None:
            self._buffer.configure(settings)
        self._start_services()

    def _open_soon(self) -> None:
        if self._opening is None and not self._closed:
            self._opening = self._in_background(self._ensure_db_initialized())

    async def _ensure_db_initialized(self) -> None:
        """Open the table, however long that takes: rows may wait for it."""
        try:
            database = self._host.database()
            if database is None:
                return
            table = self._table = ArtifactTable(database, self._pipe_id, self._in_background)
            for number in itertools.count():
                if self._closed:
                    return
                try:
                    await table.create(self._now())
                    break
                except StorageError as exc:
                    if number > 1:  # before, it may have been other workers, at the same moment
                        self._note_outage(exc)
                # Soon while it is locked, ever less often where it may never come.
                longest_s = min(_RETRY_S, 0.1 * 2 ** min(number, 10)) if number < 120 else _RARE_RETRY_S
                await asyncio.sleep(random.uniform(0.5, 1.0) * longest_s)
            self._is_open = True
            self._rests_until.clear()
            self._start_services()
        except ImportError as exc:
            self._note_outage(exc)
        finally:
            self._opening = None
            self._tried.set()

    def _start_services(self) -> None:
        settings = self._settings
        if not self._is_open or settings is None or self._closed:
            return
        if "cleanup" not in self._services:
            self._services["cleanup"] = self._in_background(self._artifact_cleanup_worker())
        if settings.uses_redis and "redis" not in self._services:
            self._services["redis"] = self._in_background(self._run_redis(settings))

    async def _run_redis(self, settings: ArtifactSettings) -> None:
        found = self._host.redis()
        if found is not None:
            client, prefix = found
            prefix = f"{prefix}:{{{_table_prefix(self._pipe_id)}}}"
            self._buffer = RedisWriteBehind(client, prefix, self._write, self._clock)
            self._buffer.configure(settings)
            await self._buffer.run()

    async def save(self, payloads: Sequence[ArtifactPayload]) -> list[str]:
        """Keep payloads; returns their ULIDs when a store has them.

        Raises:
            StorageError: none has, within a few seconds; the caller has to keep them in another way.
        """
        settings = self._settings
        if settings is None or self._closed:
            raise StorageError("The store is not open")
        try:
            raws = [_json_dumps(payload.data) for payload in payloads]
        except (TypeError, ValueError, RecursionError):
            raise StorageError("This is no JSON") from None
        if max(map(len, raws), default=0) > _MAX_ARTIFACT_BYTES:
            raise StorageError(f"This is larger than {_megabytes(_MAX_ARTIFACT_BYTES)}")
        now = self._now()
        ulids = [_new_ulid(now) for _ in payloads]

        def pack() -> list[ArtifactRow]:
            given = zip(payloads, raws, ulids, strict=True)
            return [_packed(payload, raw, ulid, settings, now) for payload, raw, ulid in given]

        rows = await _in_thread(pack, sum(map(len, raws)), self._threads)
        await self._within(_SAVE_S, "write", self._persist_artifacts(rows))
        for payload, raw, ulid in zip(payloads, raws, ulids, strict=True):
            self._recent.put((payload.user_id, payload.chat_id, ulid), raw, self._clock())
        return ulids

    async def _persist_artifacts(self, rows: Sequence[ArtifactRow]) -> None:
        buffer, settings = self._buffer, self._settings
        if not (buffer and settings and settings.uses_redis and await buffer.enqueue(rows)):
            await self._write(rows)

    async def _write(self, rows: Sequence[ArtifactRow]) -> None:
        """Have rows written, with those of other chats that wait at the same time."""
        await self._opened()
        most = self._settings.batch if self._settings else 1
        parts = [rows[start : start + most] for start in range(0, len(rows), most)]
        written = [asyncio.get_running_loop().create_future() for _ in parts]
        self._waiting.extend(zip(parts, written, strict=True))
        self._write_soon()
        for outcome in await asyncio.gather(*written, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def _write_soon(self) -> None:
        if self._writing is None and self._waiting:
            self._writing = self._in_background(self._write_waiting())

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft()]
                size = len(batch[0][0])
                most = self._settings.batch if self._settings else 1
                while self._waiting and size + len(self._waiting[0][0]) <= most:
                    batch.append(self._waiting.popleft())
                    size += len(batch[-1][0])
                await self._write_batch(batch)
        finally:
            self._writing = None
            self._write_soon()

    async def _write_batch(self, batch: Sequence[tuple[Sequence[ArtifactRow], asyncio.Future[None]]]) -> None:
        """One statement for all; if that fails, one for each: a bad row must not take others with it."""
        started = self._clock()
        error = await self._insert([row for rows, _ in batch for row in rows])
        errors = [error] * len(batch)
        if error is not None and len(batch) > 1 and self._clock() - started < _AT_ONCE_S:
            errors = [await self._insert(rows) for rows, _ in batch]
        if None in errors:
            self._note_success()
        elif error is not None:
            self._fail(error)
        for (_, written), failure in zip(batch, errors, strict=True):
            if not written.done() and failure is None:
                written.set_result(None)
            elif not written.done():
                written.set_exception(cast(StorageError, failure))

    async def _insert(self, rows: Sequence[ArtifactRow]) -> StorageError | None:
        try:
            await cast(ArtifactTable, self._table).insert(rows)
        except StorageError as exc:
            return exc
        return None

    async def load(self, ulids: Sequence[str], user_id: str, chat_id: str) -> LoadedArtifacts:
        """What there is of these artifacts of this person; whatever fails, the rest is given back."""
        now = self._clock()
        wanted = dict.fromkeys(ulids[:_MOST_LOADED])
        raws = {ulid: self._recent.get((user_id, chat_id, ulid), now) for ulid in wanted}
        found: JSONObject = {ulid: _json_loads(raw) for ulid, raw in raws.items() if raw is not None}
        settings = self._settings
        lost: set[str] = set()
        used: list[ArtifactRow] = []
        sources = (self._from_cache, self._from_table, self._from_pending)
        for ask in sources if settings and not self._closed else ():
            missing = [ulid for ulid in wanted if ulid not in found]
            if not missing:
                break
            try:
                rows = await ask(missing, user_id, chat_id)
            except StorageError as exc:
                self._fail(exc)
                lost.update(missing)
                continue
            work = functools.partial(_readable, rows, cast(ArtifactSettings, settings).cipher)
            read = await _in_thread(
                work, sum(max(row.raw_bytes, len(row.payload)) for row in rows), self._threads
            )
            lost.update(row.ulid for row in rows)
            self._note_unreadable([row for row in rows if row.ulid not in read])
            for row in rows:
                if row.ulid in read:
                    raw, found[row.ulid] = read[row.ulid]
                    used.append(row)
                    if row.chat_id == chat_id:  # else it is not this chat's before it has a copy
                        self._recent.put((user_id, chat_id, row.ulid), raw, now)
        if _is_kept_chat(chat_id):
            self._note_use(used, chat_id)
        return LoadedArtifacts(found, len(lost - found.keys()))

    async def _from_cache(self, ulids: Sequence[str], user_id: str, chat_id: str) -> list[ArtifactRow]:
        return [] if self._buffer is None else await self._buffer.get(ulids, user_id)

    async def _from_table(self, ulids: Sequence[str], user_id: str, chat_id: str) -> list[ArtifactRow]:
        self._check_rest("read")
        return await self._within(_LOAD_S, "read", self._selected(ulids, user_id, chat_id))

    async def _selected(self, ulids: Sequence[str], user_id: str, chat_id: str) -> list[ArtifactRow]:
        await self._first_try()
        if self._table is None:
            raise StorageError("There is no database")
        return await self._table.select(ulids, user_id, chat_id)

    async def _from_pending(self, ulids: Sequence[str], user_id: str, chat_id: str) -> list[ArtifactRow]:
        return [] if self._buffer is None else await self._buffer.pending(ulids, user_id)

    def _note_use(self, rows: Iterable[ArtifactRow], chat_id: str) -> None:
        """Rows of other chats get a copy for this one; those of this one are marked, once a day at most."""
        now = self._now()
        copies = [
            row._replace(chat_id=chat_id, created_at=now, last_used_at=now)
            for row in rows
            if row.chat_id != chat_id
        ]
        if copies:
            self._in_background(_quietly(self._write(copies)))
        old = [row.ulid for row in rows if row.chat_id == chat_id and row.last_used_at < now - _TOUCH_S]
        if old and self._table is not None:
            self._in_background(_quietly(self._table.touch(old, chat_id, now)))

    async def prune(self) -> int:
        """Delete what nobody has used for long and what is of deleted chats; returns the number of rows.

        In small batches with pauses, so that no chat waits for it.

        Raises:
            StorageError: the database fails.
        """
        settings, table = self._settings, self._table
        if settings is None or table is None:
            return 0
        deleted = 0
        if settings.keep_s:
            since = self._now() - settings.keep_s - _UNNOTED_S
            deleted += await _in_batches(lambda: table.delete_unused(since, _PRUNE_BATCH))
        last = ""
        while chats := await table.chats(last, _MOST_CHATS):
            last = chats[-1]
            gone = await self._host.deleted_chats(chats)
            before = self._now() - _FRESH_S  # the row of a chat may come after its first answer
            if gone:
                deleted += await _in_batches(
                    functools.partial(table.delete_chats, gone, before, _PRUNE_BATCH)
                )
        return deleted

    async def _artifact_cleanup_worker(self) -> None:
        """`prune` from time to time, in one worker of this machine."""
        while True:
            every_s = self._settings.cleanup_s if self._settings else 3600.0
            await asyncio.sleep(every_s * random.uniform(0.5, 1.0))
            if await self._host.function_digest(self._pipe_id) == "":
                continue
            what = f"artifacts-{_table_prefix(self._pipe_id)}"
            with self._host.only_one(what) as mine, contextlib.suppress(StorageError):
                if mine and (deleted := await self.prune()):
                    LOGGER.info("%d artifacts that nobody needs any more were deleted", deleted)

    async def aclose(self) -> None:
        """Write what waits, then end everything. Idempotent."""
        self._closed = True
        for task in self._services.values():
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLEANUP_S):
                if self._buffer is not None:
                    await self._buffer.aclose()
                if self._writing is not None:
                    await asyncio.wait((self._writing,))
        me = {asyncio.current_task()}
        if left := self._tasks - me - {*self._services.values()}:
            await asyncio.wait(left, timeout=_AT_ONCE_S)
        for _ in range(_CANCEL_TRIES):  # what an answer of Redis swallows has to be said again
            left = [task for task in self._tasks - me if not task.done()]
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=0.1)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _opened(self) -> ArtifactTable:
        """The table, as soon as it can be written.

        Raises:
            StorageError: it cannot, or has just kept somebody else waiting.
        """
        await self._first_try()
        self._check_rest("write")
        if self._table is None or not self._is_open:
            raise StorageError("The database is not open")
        return self._table

    async def _first_try(self) -> None:
        """Wait until the table is there, or could not be opened once."""
        if self._opening is not None and not self._tried.is_set():
            try:
                async with asyncio.timeout(_OPEN_S):
                    await self._tried.wait()
            except TimeoutError:
                self._note_outage(StorageError(f"opening it takes longer than {_OPEN_S:g} s"))

    def _check_rest(self, what: Literal["read", "write"]) -> None:
        if self._clock() < self._rests_until.get(what, -math.inf):
            raise StorageError("The database has just kept somebody waiting for too long")

    def _fail(self, exc: StorageError) -> None:
        """See that the table is there and can be written; until then others may still try."""
        self._open_soon()
        self._note_outage(exc)

    def _note_outage(self, exc: Exception) -> None:
        if not self._is_down:
            LOGGER.warning("Artifacts cannot be kept in the database for now: %s", exc)
        self._is_down = True
        self._tried.set()

    def _note_success(self) -> None:
        if self._is_down:
            LOGGER.info("Artifacts are kept in the database again")
        self._is_down = False

    def _note_unreadable(self, rows: Sequence[ArtifactRow]) -> None:
        if rows and not self._has_unreadable:
            self._has_unreadable = True
            LOGGER.warning(
                "Some artifacts cannot be read: another key has sealed them, or they are damaged "
                "(ids of keys: %s). Chats go on without them; this is said only once.",
                ", ".join(sorted({row.key_id for row in rows if row.key_id})) or "none",
            )

    async def _within(
        self, seconds: float, what: Literal["read", "write"], work: Coroutine[Any, Any, T]
    ) -> T:
        """The result of `work`, which goes on by itself where it takes longer: half a statement helps nobody.

        Raises:
            StorageError: it has failed, or takes longer; then nobody else waits for the same for a while.
        """
        task = self._in_background(work)
        await asyncio.wait((task,), timeout=seconds)
        if not task.done():
            error = StorageError(f"it takes longer than {seconds:g} s")
            self._rests_until[what] = self._clock() + _OPEN_AGAIN_S
            self._fail(error)
            raise error
        if task.cancelled():
            raise StorageError("The store is being closed")
        return task.result()

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(
            work, name=f"artifacts of {self._pipe_id}", context=_nobodys_context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, StorageError):  # those are said where they matter
            LOGGER.error("%s: unexpected error", task.get_name(), exc_info=error)


async def _in_thread(work: Callable[[], T], size: int, threads: Executor | None = None) -> T:
    """Do more than a little work, of so many bytes, elsewhere: the tokens of other chats wait for it."""
    if size <= _THREAD_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(threads, work)


async def _quietly(work: Awaitable[Any]) -> None:
    with contextlib.suppress(StorageError):
        await work


async def _in_batches(delete: Callable[[], Awaitable[int]]) -> int:
    """Delete until nothing is left, resting four times as long as each batch took."""
    deleted = 0
    while True:
        started = time.monotonic()
        count = await delete()
        if count <= 0:
            return deleted
        deleted += count
        await asyncio.sleep((time.monotonic() - started) * 4)


_RECENT_BYTES: Final = 16 * 1024 * 1024
_RECENT_S: Final = 6 * 3600.0
_TOUCH_S: Final = 86_400.0
_UNNOTED_S: Final = _TOUCH_S + _RECENT_S  # a row may have been used so long after that was noted
_THREAD_BYTES: Final = 64 * 1024  # of JSON: half a millisecond, about what a thread itself costs
_SAVE_S: Final = 3.0  # what the end of an answer may wait for the database
_LOAD_S: Final = 3.0
_OPEN_S: Final = 2.0  # what the first may wait for the table
_RETRY_S: Final = 0.5  # the longest from one try to open it to the next
_RARE_RETRY_S: Final = 15.0
_OPEN_AGAIN_S: Final = 10.0
_MOST_LOADED: Final = 5_000  # of one history, the latest of it first
_PRUNE_BATCH: Final = 100
_MOST_CHATS: Final = 200
_FRESH_S: Final = 3600.0


# ── 16. Ledger & metrics ─────────────────────────────────────────────────────
# What was done and used, counted in memory and written once a minute.
# Promise: counting waits for nothing; what cannot be written yet is written later, in one row.
# Doc: docs/cost_and_metrics.md   Tests: tests/test_ledger_and_metrics.py


class MetricsRow(NamedTuple):
    """What one worker has counted in the `seconds` before `at` (since 1970).

    `counts` are sums by name; `spreads` numbers by name and bucket, whose upper bounds `METRIC_BOUNDS` are.
    """

    worker: str
    at: float
    seconds: float
    counts: Mapping[str, float]
    spreads: Mapping[str, Sequence[int]]


class MetricsTable:
    """SQL for the metrics of one pipe. Every method raises a StorageError where the database fails."""

    def __init__(self, database: Database, pipe_id: str) -> None:
        self._engine = database.engine
        prefix = _table_prefix(pipe_id)
        self.table = sa.Table(
            f"{prefix}_metrics",
            sa.MetaData(schema=database.schema),
            sa.Column("worker", sa.String, primary_key=True),
            sa.Column("at", sa.Double, primary_key=True),
            sa.Column("seconds", sa.Double, nullable=False),
            sa.Column("data", sa.Text, nullable=False),
            sa.Index(f"ix_{prefix}_metrics_at", "at"),
        )

    async def add(self, row: MetricsRow, keep_s: float) -> None:
        """Add a row, in a table that is made if it is not there; rows older than `keep_s` seconds go."""
        data = _json_dumps({"counts": row.counts, "spreads": row.spreads}).decode()
        values = {"worker": row.worker, "at": row.at, "seconds": row.seconds, "data": data}
        with _storage_errors():
            async with self._engine.begin() as connection:
                await connection.execute(CreateTable(self.table, if_not_exists=True))
                for index in self.table.indexes:
                    await connection.execute(CreateIndex(index, if_not_exists=True))
            # Of its own: the lock for an index and those for rows of other workers would wait for each other.
            async with self._engine.begin() as connection:
                await connection.execute(sa.insert(self.table).values(values))
                await connection.execute(sa.delete(self.table).where(self.table.c.at < row.at - keep_s))

    async def rows(self, since: float) -> list[MetricsRow]:
        """The rows from `since` on, the oldest first; one that cannot be read is passed over."""
        statement = sa.select(self.table).where(self.table.c.at >= since).order_by(self.table.c.at)
        with _storage_errors():
            async with self._engine.connect() as connection:
                found = (await connection.execute(statement)).all()
        rows: list[MetricsRow] = []
        for worker, at, seconds, data in found:
            with contextlib.suppress(ValueError):
                said = _mapping(_json_loads(data))
                counts, spreads = _mapping(said.get("counts")), _mapping(said.get("spreads"))
                rows.append(MetricsRow(worker, at, seconds, counts, spreads))
        return rows


class Metrics:
    """What this worker has done, since its last row in the database.

    `clock` gives seconds that only grow, `now` the time of day. Where the server runs OpenTelemetry, its
    meter gets all of it as well.
    """

    def __init__(
        self,
        host: OpenWebUIHost,
        pipe_id: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._pipe_id = pipe_id
        self._clock = clock
        self._now = now
        self._worker = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._counts: dict[str, float] = {}
        self._spreads: dict[str, list[int]] = {}
        self._since = clock()
        self._meter = host.meter()
        self._instruments: dict[str, Any] = {}

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a sum."""
        self._counts[name] = self._counts.get(name, 0.0) + amount
        if self._meter is not None:
            self._instrument(name, self._meter.create_counter).add(amount)

    def observe(self, name: str, value: float) -> None:
        """Note one value of many: a time in seconds, or a length."""
        spread = self._spreads.setdefault(name, [0] * (len(METRIC_BOUNDS) + 1))
        spread[bisect.bisect_left(METRIC_BOUNDS, value)] += 1
        if self._meter is not None:
            self._instrument(name, self._meter.create_histogram).record(value)

    def _instrument(self, name: str, create: Callable[[str], Any]) -> Any:
        if name not in self._instruments:
            self._instruments[name] = create(f"openrouter.{name}")
        return self._instruments[name]

    async def write(self) -> None:
        """Write a row, if there is something to say and a database; what fails is in the next row."""
        counts, spreads = self._counts, self._spreads
        if not counts and not spreads:
            return
        self._counts, self._spreads, is_written = {}, {}, False
        now = self._clock()
        row = MetricsRow(self._worker, self._now(), now - self._since, counts, spreads)
        try:
            database = self._host.database()
            if database is not None:
                async with asyncio.timeout(_CLEANUP_S):
                    await MetricsTable(database, self._pipe_id).add(row, _KEEP_METRICS_S)
                self._since, is_written = now, True
        except (StorageError, TimeoutError, ImportError) as exc:
            LOGGER.debug("the metrics could not be written: %s", exc)
        finally:  # also when the housekeeping is ended meanwhile
            if not is_written:
                self._take_back(counts, spreads)

    def _take_back(self, counts: Mapping[str, float], spreads: Mapping[str, Sequence[int]]) -> None:
        for name, amount in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + amount
        for name, spread in spreads.items():
            more = self._spreads.get(name) or [0] * len(spread)
            self._spreads[name] = [one + other for one, other in zip(spread, more, strict=True)]


METRIC_BOUNDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # and one without end
_KEEP_METRICS_S: Final = 30 * 86_400.0


# ── 17. Tool orchestrator ────────────────────────────────────────────────────
# Runs what a model calls: in parallel, within bounds, each call once.
# Promise: every call gets a result, whatever happens to it; no tool outlives its request by more than a
# second, but for threads, which nobody can stop.
# Doc: docs/tooling_and_integrations.md   Tests: tests/test_tool_orchestrator.py

# Open WebUI has to run these itself: it waits for a person, or takes them apart.
_HOST_ONLY_TOOLS: Final = frozenset({"builtin:ask_user", "builtin:delegate_task", "builtin:call_tool"})


def _runs_here(tool: Any, mode: str) -> bool:
    """Whether the pipe can run one of the host's tools, by the valve `TOOL_EXECUTION_MODE`."""
    entry = _mapping(tool)
    if mode == "open_webui" or entry.get("tool_id") in _HOST_ONLY_TOOLS:
        return False
    return callable(entry.get("callable")) or (mode == "pipe" and entry.get("direct") is True)


class CircuitBreaker:
    """Leaves a tool of a person alone for a while when it has failed again and again.

    `clock` gives seconds that only grow. After the while one call may try; its end decides.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[tuple[str, str], deque[float]] = {}
        self._open_until: dict[tuple[str, str], float] = {}

    def allow(self, user_id: str, tool: str, limits: ToolLimits) -> bool:
        """Whether the tool may be called now; if it is open, this is the one call that tries."""
        key, now = (user_id, tool), self._clock()
        until = self._open_until.get(key)
        if until is not None and now >= until:
            self._open_until[key] = now + limits.window_s  # others wait for the end of this one
        return until is None or now >= until

    def record(self, user_id: str, tool: str, limits: ToolLimits, *, failed: bool) -> bool:
        """Note the end of a call. Returns whether the tool is left alone from now on."""
        key, now = (user_id, tool), self._clock()
        if not failed:
            self._failures.pop(key, None)
            self._open_until.pop(key, None)
            return False
        if key not in self._failures:
            _drop_oldest(self._failures, _MOST_WATCHED)
        times = self._failures.setdefault(key, deque())
        times.append(now)
        while times and times[0] <= now - limits.window_s:
            times.popleft()
        was_open = key in self._open_until
        opens = was_open or len(times) >= limits.failures
        if opens:
            _drop_oldest(self._open_until, _MOST_WATCHED)
            self._open_until[key] = now + limits.window_s
        return opens and not was_open


_MOST_WATCHED: Final = 10_000


class _Turnstile:
    """Lets so many in at a time, first come first served; each says how many it may be."""

    def __init__(self) -> None:
        self.inside = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, most: int) -> None:
        """Wait for room for one more among `most`; who has come in has to `leave`."""
        if not self._waiting and self.inside < most:
            self.inside += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((most, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._let_in()  # whoever stood behind this one
            else:
                self.leave()
            raise

    def leave(self) -> None:
        """Make room for the next."""
        self.inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self.inside < self._waiting[0][0]):
            turn = self._waiting.popleft()[1]
            if not turn.done():
                self.inside += 1
                turn.set_result(None)


class ToolOrchestrator:
    """Runs the calls of a round at once; what one of them does, does not touch the others."""

    def __init__(self, host: OpenWebUIHost, clock: Callable[[], float]) -> None:
        self._host = host
        self._breaker = CircuitBreaker(clock)
        self._gate = _Turnstile()
        self._left_behind: set[asyncio.Task[Any]] = set()  # tools that do not end although they were told to
        # Threads of their own: tools that hang must not take those of the host.
        self._threads = ThreadPoolExecutor(_TOOL_THREADS, thread_name_prefix="tool")

    @contextlib.asynccontextmanager
    async def open_context(
        self, request: ChatRequest, offered: Container[str], limits: ToolLimits
    ) -> AsyncGenerator[_ToolExecutionContext, None]:
        """The tools of one request, `offered` by the host's names; leaving it ends what still runs."""
        context = self._get_tool_context(request, offered, limits)
        try:
            yield context
        finally:
            await self._shutdown_tool_context(context)

    async def run(
        self, context: _ToolExecutionContext, calls: Sequence[ToolCall], sink: Sink
    ) -> list[ToolResult]:
        """Run calls, each result given to the sink when it is there. Returns the results in call order."""
        await sink([ToolStarted(call) for call in calls])
        found = await self._execute_tool_batch(context, calls, sink)
        return [found[call.call_id] for call in calls]

    def aclose(self) -> None:
        """Run nothing more; threads end when what they run does."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _get_tool_context(
        self, request: ChatRequest, offered: Container[str], limits: ToolLimits
    ) -> _ToolExecutionContext:
        return _ToolExecutionContext(request, offered, limits)

    async def _execute_tool_batch(
        self, context: _ToolExecutionContext, calls: Sequence[ToolCall], sink: Sink
    ) -> dict[str, ToolResult]:
        """The results by call id. Calls that have not begun when the time of a round is over do not begin."""
        loop = asyncio.get_running_loop()
        context.note_round(calls)
        while len(context.workers) < min(context.limits.at_once, len(calls)):
            context.workers.append(loop.create_task(self._tool_worker_loop(context), name="tool worker"))
        results: asyncio.Queue[ToolResult] = asyncio.Queue()
        deadline = loop.time() + context.limits.batch_timeout_s
        found: dict[str, ToolResult] = {}
        waiting = deque(calls)
        while len(found) < len(calls):
            while waiting and not context.queue.full():
                context.queue.put_nowait(_QueuedToolCall(waiting.popleft(), deadline, results))
            result = await results.get()
            found[result.call.call_id] = result
            await sink([ToolFinished(result)])
            if result.remark:
                await sink([StatusUpdate(result.remark, done=True)])
        return found

    async def _tool_worker_loop(self, context: _ToolExecutionContext) -> None:
        while True:
            queued = await context.queue.get()
            queued.results.put_nowait(await self._call(queued, context))

    async def _shutdown_tool_context(self, context: _ToolExecutionContext) -> None:
        """End what runs. Idempotent."""
        for worker in context.workers:
            worker.cancel()
        if context.workers:
            await asyncio.wait(context.workers, timeout=2 * _CANCEL_S)
        context.workers.clear()

    async def _call(self, queued: _QueuedToolCall, context: _ToolExecutionContext) -> ToolResult:
        """Run one call; whatever goes wrong becomes its result."""
        call, limits = queued.call, context.limits
        watched = (context.request.user_id, call.name, limits)
        by_tool = True
        try:
            tool = _mapping(context.request.host.tools.get(call.name))
            is_ours = callable(tool.get("callable")) or tool.get("direct")
            if not is_ours or call.name not in context.offered:
                raise ToolInputError(f"There is no tool called “{call.name[:80]}”")
            arguments = _arguments_of(call, tool)
            if not self._breaker.allow(*watched):
                remark = f"The tool {call.name} has failed repeatedly and is temporarily disabled"
                return ToolResult(call, f"Error: {remark}. Do without it.", failed=True, remark=remark)
            result = await self._run_tool(call, tool, arguments, queued.deadline, context)
        except ToolError as exc:
            by_tool = exc.by_tool
            result = ToolResult(call, f"Error: {exc.detail}.", failed=True)
        except Exception as exc:
            LOGGER.info("the tool %s failed: %s", call.name, type(exc).__name__)
            words = "".join(traceback.format_exception_only(exc)).strip()
            result = ToolResult(call, f"Error: {words[:_MOST_ERROR_CHARS]}", failed=True)
        if by_tool and self._breaker.record(*watched, failed=result.failed):
            LOGGER.warning("the tool %s is left alone for %.0f s", call.name, limits.window_s)
        LOGGER.debug("the tool %s %s", call.name, result.status)
        remark = context.remark_on(call)
        return result._replace(text=_cut_text(result.text, limits.most_chars - len(remark)) + remark)

    async def _run_tool(
        self,
        call: ToolCall,
        tool: Mapping[str, Any],
        arguments: JSONObject,
        deadline: float,
        context: _ToolExecutionContext,
    ) -> ToolResult:
        """Call a tool and read its result, within its own time and that of the round.

        Raises:
            ToolError: it took too long.
            Exception: whatever the tool raises.
        """
        host = context.request.host

        async def call_and_read() -> ToolResult:
            try:
                raw = await self._host.call_tool(tool, call.name, arguments, host, self._threads)
                return await self._host.tool_result(call, tool, arguments, raw, host)
            except SystemExit:  # it would end the server
                raise ToolError("The tool ended itself") from None

        try:
            async with asyncio.timeout_at(deadline):
                await self._gate.enter(context.limits.at_once_everywhere)
        except TimeoutError:
            raise ToolInputError("There was no time left for this call in its round") from None
        left, own = deadline - asyncio.get_running_loop().time(), context.limits.timeout_s
        if left <= 0:
            self._gate.leave()
            raise ToolInputError("There was no time left for this call in its round")
        round_s = _in_words(context.limits.batch_timeout_s)
        of_round = f"The calls of this round took longer than {round_s} together"
        words = of_round if left < own else f"The tool did not finish within {_in_words(own)}"
        return await self._within(call_and_read(), min(left, own), words)

    async def _within(self, work: Coroutine[Any, Any, ToolResult], seconds: float, words: str) -> ToolResult:
        """The result of `work`, which is left behind if it neither ends in time nor when it is told to.

        It holds its place at the gate until it has ended.
        """
        task = asyncio.get_running_loop().create_task(work, name="tool")
        task.add_done_callback(lambda _: self._gate.leave())
        try:
            await asyncio.wait((task,), timeout=seconds)
            if not task.done():
                raise ToolError(words)
            if task.cancelled():  # by itself: it must not look as if somebody had pressed Stop
                raise ToolError("The tool was cancelled")
            error = task.exception()
            if error is not None and not isinstance(error, Exception):
                raise ToolError(f"The tool was ended by {type(error).__name__}")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._left_behind.discard)
                await asyncio.wait((task,), timeout=_CANCEL_S)


def _arguments_of(call: ToolCall, tool: Mapping[str, Any]) -> JSONObject:
    """The arguments of a call as its tool takes them.

    Raises:
        ToolInputError: they are no JSON object, or not what the schema of the tool says.
    """
    try:
        arguments = _json_loads(call.arguments) if call.arguments.strip() else {}
    except ValueError:
        raise ToolInputError("The arguments are not valid JSON. Please call the tool again") from None
    if not isinstance(arguments, dict):
        raise ToolInputError("The arguments must be a JSON object. Please call the tool again")
    if _is_deep(arguments):
        raise ToolInputError("The arguments are nested too deeply. Please call the tool again")
    given = _mapping(_mapping(tool.get("spec")).get("parameters"))
    plain = _plain_schema(given)
    if plain is not None and _parts_in(plain) * _parts_in(arguments) > _MOST_CHECKS:
        plain = None  # the tool looks at them itself; here it would hold up everybody
    schema = given if plain is None else plain
    arguments = arguments if plain is None else _without_nulls_of(arguments, plain)
    properties = _mapping(schema.get("properties"))
    if tool.get("type") != "mcp":  # MCP servers look at theirs themselves
        arguments = {name: value for name, value in arguments.items() if name in properties}
    missing = [name for name in _strings(schema.get("required")) if name not in arguments]
    problem = f"{', '.join(missing)} is missing" if missing else ""
    if plain is not None and not problem:  # what has no end cannot be checked
        problem = _problem_with(arguments, plain)
    if problem:
        raise ToolInputError(f"The arguments do not fit: {problem}. Please call the tool again")
    return arguments


_MOST_ERROR_CHARS: Final = 2_000
_TOOL_THREADS: Final = 256
_MOST_CHECKS: Final = 50_000  # parts of a schema times parts of arguments; about half a second


def _parts_in(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_parts_in, inner))


def _is_deep(value: Any, left: int = 100) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_is_deep(part, left - 1) for part in inner)


# ── 18. Streaming engine ─────────────────────────────────────────────────────
# One upstream call: opened, decoded, reduced, and tried again while nothing was shown.
# Promise: what the sink was given is never given again; the socket is closed on every way out.
# Doc: docs/streaming_pipeline_and_emitters.md   Tests: tests/test_streaming_engine.py


class RetryPolicy(NamedTuple):
    """How often and how long (seconds) to try again."""

    attempts: int = 3
    longest_wait_s: float = 30.0


class UpstreamAPI(NamedTuple):
    """One of OpenRouter's streaming endpoints: where it is, and what its events mean."""

    path: str
    reduce: Callable[[StreamState, Iterable[StreamEvent]], list[Emission]]
    close: Callable[[StreamState], list[Emission]]


RESPONSES: Final = UpstreamAPI("/responses", reduce_events, close_stream)
CHAT: Final = UpstreamAPI("/chat/completions", reduce_chat_chunks, close_chat_stream)


class UpstreamRequest(NamedTuple):
    """A body and the endpoint it is for; `chat_body` makes the same request for chat."""

    body: JSONObject
    api: UpstreamAPI = RESPONSES
    chat_body: Callable[[], JSONObject] | None = None


class QueueLimits(NamedTuple):
    """Bounds of the two queues of a stream, in network reads, and how many decoders work on them."""

    chunks: int = 100
    events: int = 100
    workers: int = 2


_DEFAULT_LIMITS: Final = QueueLimits()


class _StreamEndedError(Exception):
    """The terminal event came out of the queues: nobody need read on."""


class _ChunkQueues:
    """Network reads on their way from the socket to the reducer, once a large frame has come.

    What crosses both queues is the batch of frames of one read. A slot (a future) takes its place in
    `events` before the batch enters `chunks`: decoders fill slots in any order, the reducer awaits
    them in this one. Both are bounded: who fills them waits, and with it the sender.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.chunks: asyncio.Queue[tuple[list[SSEFrame], asyncio.Future[list[StreamEvent]]]]
        self.chunks = asyncio.Queue(limits.chunks)
        self.events: asyncio.Queue[asyncio.Future[list[StreamEvent]]] = asyncio.Queue(limits.events)

    async def put(self, frames: list[SSEFrame]) -> None:
        """Queue a batch behind all others."""
        slot: asyncio.Future[list[StreamEvent]] = asyncio.get_running_loop().create_future()
        await self.events.put(slot)
        await self.chunks.put((frames, slot))


class StreamingEngine:
    """Streams calls of OpenRouter into a sink.

    `sleep` waits between tries. The engine pushes and never yields, so that no generator of ours
    can be left open in the middle of a call (PEP 789).
    """

    def __init__(
        self, client: OpenRouterClient, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._client = client
        self._sleep = sleep
        self._unknown: set[str] = set()  # event types that the log has named

    async def stream(
        self,
        connection: Connection,
        request: UpstreamRequest,
        sink: Sink,
        policy: RetryPolicy,
        limits: QueueLimits = _DEFAULT_LIMITS,
    ) -> None:
        """Send `request` and give the sink what comes, up to `TurnEnded`.

        Raises:
            PipeError: the call failed for good; what the sink has been given stays valid.
        """
        call = _UpstreamCall(sink, limits)
        try:
            await self._try_repaired(connection, request, call, policy)
        except PipeError as error:
            _without_key(error, connection.key)
            raise

    async def _try_repaired(
        self, connection: Connection, request: UpstreamRequest, call: _UpstreamCall, policy: RetryPolicy
    ) -> None:
        try:
            await self._try(connection, request, call, policy)
        except OpenRouterAPIError as error:
            repaired, notice = _repair(request, error)  # it comes before the stream: nothing was shown
            if repaired is None:
                raise
            if notice:
                await call.hand_over([Notice(notice)])
            LOGGER.info("%s: once more, changed, because %s", repaired.api.path, error.code or error.template)
            await self._try(connection, repaired, call, policy)

    async def _try(
        self, connection: Connection, request: UpstreamRequest, call: _UpstreamCall, policy: RetryPolicy
    ) -> None:
        """One call, and more of them while nothing was shown and another try may help.

        The first is made without tenacity, whose preparations cost a third of a whole short request.
        """
        wait = _RetryWait(policy.longest_wait_s)
        try:
            await self._stream_responses(connection, request, call)
            return
        except PipeError as error:
            failures = [error]

        async def attempt() -> None:
            if failures:
                raise failures.pop()
            await self._stream_responses(connection, request, call)

        async def announce(retry_state: Any) -> None:
            error = retry_state.outcome.exception()
            seconds = max(1, round(retry_state.next_action.sleep))
            call.said_wait = True
            words = _log_words(_without_key(error, connection.key))
            LOGGER.info("a try has failed, the next one comes in %d s: %s", seconds, words)
            await call.hand_over([StatusUpdate(f"{_retry_words(error)} Trying again in {seconds} s")])

        tries = AsyncRetrying(
            stop=stop_after_attempt(policy.attempts + 1),
            wait=wait,
            retry=retry_if_exception(lambda error: not call.shown and wait.allows(error)),
            sleep=self._sleep,
            before_sleep=announce,
            reraise=True,
        )
        await tries(attempt)

    async def _stream_responses(
        self, connection: Connection, request: UpstreamRequest, call: _UpstreamCall
    ) -> None:
        path, body = request.api.path, request.body
        items, tools = len(body.get("input") or body.get("messages") or ()), len(body.get("tools") or ())
        LOGGER.debug("asking %s for %s: items %d, tools %d", path, body["model"], items, tools)
        async with self._client.open_stream(connection, path, body) as reads:
            LOGGER.debug("the answer begins")
            call.begin(request.api)
            await self._consume_sse(reads, call)
        kinds = itertools.islice(call.state.unknown, _MOST_NAMED)
        fresh = {kind[:60] for kind in kinds} - self._unknown
        if fresh and len(self._unknown) < 1_000:
            self._unknown |= fresh
            LOGGER.info("event types that this version does not know: %s", ", ".join(sorted(fresh)))

    async def _consume_sse(self, reads: _Reads, call: _UpstreamCall) -> None:
        """Decode and reduce what comes, without a queue until there is a reason for one."""
        decoder = SSEDecoder()
        async for chunk in reads:
            frames = decoder.feed(chunk)
            # Only the first frame of a read can be longer than the read itself.
            if len(chunk) > _HEAVY_FRAME_BYTES or (frames and len(frames[0]) > _HEAVY_FRAME_BYTES):
                await self._consume_queued(frames, decoder, reads, call)
                break
            await call.take(parse_frames(frames))
            if call.state.ended or _says_done(frames, decoder):
                break
        await call.take(parse_frames(decoder.close()))
        await call.close()
        if call.state.ended:
            await _drain(reads)

    async def _consume_queued(
        self, frames: list[SSEFrame], decoder: SSEDecoder, reads: _Reads, call: _UpstreamCall
    ) -> None:
        """The same from `frames` on, decoded beside the event loop where that takes long."""
        queues = _ChunkQueues(call.limits)
        broken: PipeError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                work = [self._decode_chunks(queues) for _ in range(call.limits.workers)]
                tasks = [group.create_task(one) for one in (*work, self._drain_event_queue(queues, call))]
                await queues.put(frames)
                broken = await self._fill_queues(queues, decoder, reads)
                await queues.events.join()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failures:
            error = _first_failure(failures)
            if not isinstance(error, _StreamEndedError):
                raise error from None
        if broken is not None and not call.state.ended:
            raise broken

    async def _fill_queues(
        self, queues: _ChunkQueues, decoder: SSEDecoder, reads: _Reads
    ) -> PipeError | None:
        """Queue what comes. A failure is returned, because what came before it is still in the queues."""
        try:
            async for chunk in reads:
                frames = decoder.feed(chunk)
                await queues.put(frames)
                if _says_done(frames, decoder):
                    break
        except PipeError as error:
            return error
        return None

    async def _decode_chunks(self, queues: _ChunkQueues) -> None:
        while True:
            frames, slot = await queues.chunks.get()
            events = parse_frames(frames)
            is_heavy = max(map(len, frames), default=0) > _HEAVY_FRAME_BYTES
            slot.set_result(await asyncio.to_thread(list, events) if is_heavy else list(events))

    async def _drain_event_queue(self, queues: _ChunkQueues, call: _UpstreamCall) -> None:
        while True:
            slot = await queues.events.get()
            await call.take(await slot)
            queues.events.task_done()
            if call.state.ended:
                raise _StreamEndedError


def _says_done(frames: list[SSEFrame], decoder: SSEDecoder) -> bool:
    """Whether `[DONE]` has come; some proxies keep the connection open after it, or forget its blank line."""
    return (bool(frames) and frames[-1].strip() == _DONE) or decoder.open_lines == [_DONE]


def _first_failure(failures: BaseExceptionGroup) -> BaseException:
    """What the group failed of: a PipeError if there is one, else whatever came first."""
    flat: list[BaseException] = []
    for failure in failures.exceptions:
        flat.append(_first_failure(failure) if isinstance(failure, BaseExceptionGroup) else failure)
    return next((failure for failure in flat if isinstance(failure, PipeError)), flat[0])


def _repair(request: UpstreamRequest, error: OpenRouterAPIError) -> tuple[UpstreamRequest | None, str]:
    """The request changed so that this refusal does not come again, or None; what the person is told."""
    body, notice = None, ""
    if error.code == _WRONG_ENDPOINT:
        return request.chat_body and UpstreamRequest(request.chat_body(), CHAT), ""
    if error.status == 400 and any(word in error.detail.lower() for word in _REASONING_WORDS):
        # The provider that serves now cannot read the reasoning of the one that served before.
        body = _without_reasoning(request.body) if request.api is RESPONSES else None
    elif error.status == 404 and "support tool use" in error.detail:
        # The catalog said that the model takes tools; no provider that is left does.
        body, notice = _without_tools(request.body), _TOOLLESS
    return None if body is None else request._replace(body=body), notice


class _UpstreamCall:
    """Stands between one call and its sink: reduces, remembers what was shown, raises failures."""

    __slots__ = ("_api", "_sink", "limits", "said_wait", "shown", "state")

    def __init__(self, sink: Sink, limits: QueueLimits) -> None:
        self._sink = sink
        self._api = RESPONSES
        self.limits = limits
        self.state = StreamState()
        self.shown = False
        self.said_wait = False  # a status says that another try comes

    def begin(self, api: UpstreamAPI) -> None:
        """A connection is open: what comes is of a new stream."""
        self._api = api
        self.state = StreamState()

    def take(self, events: Iterable[StreamEvent]) -> Awaitable[None]:
        """Reduce events at once; awaited, hand over what they mean."""
        return self.hand_over(self._api.reduce(self.state, events))

    async def close(self) -> None:
        """The connection has ended."""
        await self.hand_over(self._api.close(self.state))

    def hand_over(self, emissions: list[Emission]) -> Awaitable[None]:
        """Give the sink everything before a failure, then raise the failure."""
        if not emissions:
            return _NOTHING_TO_AWAIT
        if isinstance(emissions[-1], Failed):
            return self._fail(emissions[:-1], emissions[-1].error)
        if not self.shown and any(map(_is_visible, emissions)):
            self.shown = True
            if self.said_wait:
                emissions = [StatusUpdate("Answering", done=True, hidden=True), *emissions]
        return self._sink(emissions)

    async def _fail(self, emissions: list[Emission], error: PipeError) -> None:
        await self.hand_over(emissions)
        raise error


def _is_visible(emission: Emission) -> bool:
    """Whether a second try would show it twice; a reasoning card without text is used again."""
    return bool(emission.text) if isinstance(emission, ReasoningDelta) else isinstance(emission, _VISIBLE)


_DONE: Final = b"[DONE]"
_REASONING_WORDS: Final = ("signature", "encrypted content", "encrypted_content")
_TOOLLESS: Final = "No provider of this model can use tools now; the answer was written without them."
_VISIBLE: Final = (TextDelta, RefusalDelta, ToolRequested, CitationFound, MediaProduced, TurnEnded)


async def _drain(reads: _Reads) -> None:
    """Read what follows the terminal event, so that the connection can be used again."""
    with contextlib.suppress(TimeoutError, PipeError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in reads:
                pass


_DRAIN_S: Final = 0.25


def _log_words(error: BaseException | None) -> str:
    """A failure as the log has it."""
    if not isinstance(error, PipeError):
        return type(error).__name__
    return f"{error.template}, HTTP {error.status or '-'}: {error.detail}"


def _retry_words(error: BaseException | None) -> str:
    template = error.template if isinstance(error, PipeError) else "provider"
    return _ADVICE.get(template, _ADVICE["provider"])[0] or "OpenRouter could not answer."


# ── 19. Context keeper ───────────────────────────────────────────────────────
# (empty)
# Will hold: when a long chat is summarised, and the summary that stands for it.


# ── 20. Media makers ─────────────────────────────────────────────────────────
# Generated pictures, kept as files of the host.
# Promise: no picture in base64 comes into a saved chat; one that cannot be kept is said.
# Doc: docs/multimodal_ingestion_pipeline.md   Tests: tests/test_media_makers.py


class ImageResults:
    """Pictures of models, kept with the person who asked and linked to the chat."""

    def __init__(self, host: OpenWebUIHost, media: MediaIntake) -> None:
        self._host = host
        self._media = media

    async def keep(
        self, made: MediaProduced, request: ChatRequest, settings: RequestSettings
    ) -> list[Emission]:
        """The picture as a text of the answer that shows it, or a sentence.

        Where nothing is saved (temporary chats, programs) it is in the text itself.
        """
        if request.is_task:
            return []
        try:
            data, content = await self._content(made.source, request, settings)
            blob = await _in_thread(lambda: _blob_of(content, "picture"), len(content))
            _check_kind(MediaRef("image", ""), blob)
            url = f"data:{blob.mime};base64,{data}"
            is_saved = bool(request.chat_id) and not request.chat_id.startswith(("temporary:", "local:"))
            if request.user_id and is_saved:
                file_id = str(uuid.uuid4())
                suffix = blob.mime.rpartition("/")[2].replace("jpeg", "jpg")
                named = blob._replace(name=f"picture.{suffix}")
                if not await self._host.save_file(file_id, named, content, request):
                    raise InputError("Open WebUI could not save it")
                url = _host_file_address(file_id)
        except InputError as exc:
            return [Notice(f"The model made a picture that cannot be shown. {exc}.")]
        text = f"![Picture]({url})"
        said = {"type": "message", "content": [{"type": "output_text", "text": text}]}
        return [TextDelta(made.item, text), ItemClosed(made.item, "message", said)]

    async def _content(
        self, source: str, request: ChatRequest, settings: RequestSettings
    ) -> tuple[str, bytes]:
        """(base64, the bytes) of what a provider has sent: a data URL, bare base64, or an address."""
        if source.startswith(("http://", "https://")):
            ref = MediaRef("image", source)
            # What it has at its address is not ours for long: a file of its own is made of it.
            alone = settings._replace(keeps_media=False, most_images=1)
            blob = (await self._media.resolve([ref], request, alone))[ref]
            if blob.reason:
                raise InputError(blob.reason)
            source = blob.url
        data = source.rpartition(",")[2]
        data += "=" * (-len(data) % 4)

        def decoded() -> bytes:
            _validate_base64_size(data, settings.most_bytes)
            return base64.b64decode(data, validate=True)

        try:
            return data, await _in_thread(decoded, len(data))
        except ValueError:
            raise InputError("It is not in base64") from None


# ── 21. Turn loop ────────────────────────────────────────────────────────────
# One chat request from start to end.
# Promise: it ends in an answer or in one error said in words; nothing else is raised but a cancellation.
# Doc: docs/concurrency_and_lifecycle.md   Tests: tests/test_turn_loop.py


class TurnMemory:
    """What a model gets back of its own in later turns: stored, or else sealed with the chat's messages."""

    def __init__(self, store: ArtifactStore, env: HostEnvironment, pipe_id: str) -> None:
        self._store = store
        self._env = env
        self._pipe_id = pipe_id
        self._told: OrderedDict[str, None] = OrderedDict()  # chats whose people know of what is lost

    def open(self, valves: Valves) -> ArtifactSettings:
        """How things are kept with these valves; the store is opened, which nobody has to wait for."""
        settings = _artifact_settings(valves, self._env, self._pipe_id)
        if settings.is_on:
            self._store.open(settings)
        return settings

    async def recall(
        self, plan: IntakePlan, request: ChatRequest, valves: Valves
    ) -> tuple[Intake, list[Notice]]:
        """The records of a history, and what the person has to know of those that are lost."""
        settings = self.open(valves)
        cipher = settings.cipher

        def opened() -> dict[str, TurnEntries]:
            found: dict[str, TurnEntries] = {}
            for sealed in plan.sealed if cipher.can_seal else ():
                with contextlib.suppress(StorageError, ValueError):
                    found[sealed] = _objects(_json_loads(cipher.open(sealed, request.user_id)))
            return found

        records = await _in_thread(opened, sum(map(len, plan.sealed)))
        if plan.turns and settings.is_on:
            loaded = await self._store.load(plan.turns, request.user_id, request.chat_id)
            records |= {ulid: _objects(entries) for ulid, entries in loaded.found.items()}
        notices: list[Notice] = []
        if lost := len(plan.turns) + len(plan.sealed) - len(records):
            LOGGER.info("%d pieces of reasoning of a chat can not be read", lost)
            if request.chat_id not in self._told:
                _drop_oldest(self._told, _MOST_TOLD)
                self._told[request.chat_id] = None
                notices.append(Notice(_NOT_RECALLED))
        return Intake(records, not cipher.can_seal), notices

    async def carrier(self, record: TurnRecord, job: _PipeJob) -> list[Emission]:
        """What finds the record again, to ride with an item of it; a sentence where it cannot be kept."""
        item = record.carrier_item
        if item is None:
            return []
        settings, request = self.open(job.valves), job.request
        entries = [entry for entry in record.dump() if settings.keeps_tool_results or "tool" not in entry]
        if not any(map(_hidden_items, entries)):
            return []
        detail: JSONObject = {"type": _CARRIER, "v": 1}
        if settings.is_on and _is_kept_chat(request.chat_id) and request.user_id:
            ids = request.user_id, request.chat_id, request.message_id
            payload = ArtifactPayload(entries, "turn", *ids, request.model)
            with contextlib.suppress(StorageError):
                ulids = await self._store.save([payload])
                return [CarrierReady(item, [{**detail, "turn": ulids[0]}])]
        data = _json_dumps(entries)
        if len(data) > _MAX_RECORD_BYTES:
            return [Notice(_NOT_REMEMBERED)]
        if settings.cipher.can_seal:
            seal = functools.partial(settings.cipher.seal, data, request.user_id)
            detail["sealed"] = await _in_thread(seal, len(data))
            size = len(detail["sealed"])
        else:
            detail["record"], size = entries, len(data)
        if size > _MAX_CARRIER_CHARS:
            return [Notice(_NOT_REMEMBERED)]
        return [CarrierReady(item, [detail])]


class Neighbours(NamedTuple):
    """What the turn loop works with."""

    registry: OpenRouterModelRegistry
    account: AccountReader
    engine: StreamingEngine
    host: OpenWebUIHost
    media: MediaIntake
    pictures: ImageResults
    tools: ToolOrchestrator
    memory: TurnMemory
    logs: SessionLogger


class TurnLoop:
    """Runs jobs: what the chat says, out to OpenRouter and back. Holds nothing between them."""

    def __init__(
        self,
        around: Neighbours,
        env: HostEnvironment,
        clock: Callable[[], float],
    ) -> None:
        self._registry, self._account, self._engine = around.registry, around.account, around.engine
        self._host, self._media, self._tools = around.host, around.media, around.tools
        self._memory, self._pictures, self._logs = around.memory, around.pictures, around.logs
        self._env = env
        self._clock = clock
        self._told: set[str] = set()  # names of parameters that the log has

    async def run(self, job: _PipeJob) -> PipeError | None:
        """Answer `job`. A failure is written into its outlet, and returned."""
        started = self._clock()
        deadline = job.valves.REQUEST_DEADLINE_SECONDS
        error: PipeError | None = None
        try:
            async with asyncio.timeout(deadline or None):
                await self._answer(job)
                elapsed_s, show_usage = self._clock() - started, job.valves.SHOW_FINAL_USAGE_STATUS
                spent_before = await self._spent_before(job.request) if show_usage else 0.0
                await job.emitter.complete(elapsed_s, show_usage, spent_before)
        except TimeoutError:
            words = f"The answer took longer than the {_in_words(deadline)} that are allowed"
            error = StreamError(words, template="admission")
        except PipeError as exc:
            error = exc
        if error is not None:
            LOGGER.info("failed: %s", _log_words(error))
            await self._add_hint(error, job)
            await job.emitter.send((_failed(error, job, self._logs),))
        return error

    async def _add_hint(self, error: PipeError, job: _PipeJob) -> None:
        """How much is left, where that is what is missing, for those who may know it."""
        own_key = job.valves.ALLOW_USER_API_KEYS and getattr(job.request.user_valves, "API_KEY", "")
        own_key = "" if own_key == "inherit" else own_key  # then it is the administrators' that was used
        if error.template == "credits" and (own_key or job.request.is_admin):
            error.hint = (await self._account.balance(_connection(job.valves, self._env))).words()

    async def _spent_before(self, request: ChatRequest) -> float:
        """US dollars of the chat's earlier answers; the first of a chat need not ask."""
        roles = {message.get("role") for message in _objects(request.body.get("messages"))}
        if request.dialect not in _DIALECTS_WITH_EVENTS or "assistant" not in roles:
            return 0.0
        return await self._host.chat_cost(request.chat_id)

    async def _answer(self, job: _PipeJob) -> None:
        self._host.check_version()
        connection = _connection(job.valves, self._env)
        request = job.request
        if request.model == _SETUP_MODEL_ID:
            raise ConfigurationError(
                "This entry only says what is missing. Please choose a model, or reload the page."
            )
        body = await self._within_rights(CompletionsBody.parse(request.body), job)
        spec = await self._registry.get(connection, request.model, CatalogChoice.of(job.valves))
        settings = _request_settings(
            job.valves, request, spec, self._env, offer_tools=request.dialect in _DIALECTS_WITH_TOOLS
        )
        settings = settings._replace(only_tools=_runnable_tools(request, job.valves.TOOL_EXECUTION_MODE))
        translated = await self._translated(body, spec, settings, job)
        payload = self._registry.fit(translated.payload, spec)
        connection = _with_beta_headers(connection, payload, spec)
        who = await self._host.identity_headers(request)
        connection = connection._replace(headers=(*connection.headers, *who.items()))
        talk = _Talk(job, body, spec, settings, connection, translated.tools)
        async with self._tools.open_context(
            request, talk.callable_names, _tool_limits(job.valves)
        ) as context:
            await self._converse(talk, payload, context)

    async def _converse(self, talk: _Talk, payload: JSONObject, context: _ToolExecutionContext) -> None:
        """Upstream calls, and between them the tools that are run here, until the model has answered."""
        valves, send = talk.job.valves, talk.job.emitter.send
        policy = RetryPolicy(valves.RETRY_ATTEMPTS, float(valves.RETRY_MAX_WAIT_SECONDS))
        limits = QueueLimits(
            valves.STREAMING_CHUNK_QUEUE_MAXSIZE,
            valves.STREAMING_EVENT_QUEUE_MAXSIZE,
            valves.SSE_WORKERS_PER_REQUEST,
        )
        rounds = valves.MAX_FUNCTION_CALL_LOOPS
        # Where the host runs the calls, each round is a request of its own. What a program runs is its own.
        in_page = talk.job.request.dialect in _DIALECTS_WITH_EVENTS
        first = _rounds_since_question(talk.body.messages) if in_page else 0
        payload = _unforced(payload) if first else payload
        for number in itertools.count(first):
            if number > rounds and "tools" in payload:
                payload["tool_choice"] = "none"
            turn = _Turn(talk, payload, self._memory, self._pictures, rounds_left=rounds - number)
            upstream = _upstream_request(payload, talk.body, valves)
            await self._engine.stream(talk.connection, upstream, turn.sink, policy, limits)
            if not turn.mine:
                return
            if number < rounds:
                results = await self._tools.run(context, turn.mine, turn.note_results)
            else:
                results = [ToolResult(call, _ONE_ROUND_TOO_MANY, failed=True) for call in turn.mine]
                told = Notice(f"Stopped after {rounds} round{'s' * (rounds != 1)} of tools")
                await send([*map(ToolStarted, turn.mine), *map(ToolFinished, results), told])
            if turn.theirs:
                return  # the host runs these, and asks again with all results
            pictures = await self._pictures_of(turn.finished or results, talk)
            pictures = pictures[: max(0, talk.settings.most_images - _pictures_sent(payload))]
            is_kept = talk.keeps and turn.record.carrier_item is not None
            said = turn.record.input_items(talk.names, is_kept=is_kept)
            payload = _next_payload(payload, said, results, pictures)

    async def _pictures_of(self, results: Iterable[ToolResult], talk: _Talk) -> list[str]:
        """What the tools have drawn, as data URLs, for a model that sees."""
        most = talk.settings.most_bytes
        addresses = [
            url
            for result in results
            for url in result.images
            if not url.startswith("data:") or _is_picture_data(url, most)
        ]
        if not addresses or not talk.spec.takes_images:
            return []
        refs = [MediaRef("image", url) for url in addresses if not url.startswith("data:")]
        found = await self._media.resolve(refs, talk.job.request, talk.settings)
        urls = [found.get(MediaRef("image", url), MediaBlob(url)).url for url in addresses]
        return list(filter(None, urls))

    async def _translated(
        self, body: CompletionsBody, spec: ModelSpec, settings: RequestSettings, job: _PipeJob
    ) -> ResponsesBody:
        """The request, with what the chat names by an address in it; the person is told what is missing.

        Raises:
            InputError: nothing is left to send, or a parameter has a value of the wrong kind.
        """
        request, files = job.request, job.request.files
        if settings.native_files != "off":
            files = await self._host.described(files, request.user_id)
        blocks = _whole_files(files, spec, settings)
        if blocks:
            questions = await self._host.questions(request.chat_id, files.question_id)
            body = body._replace(messages=tuple(_with_files(body.messages, blocks, questions)))
        plan = plan_intake(body.messages, spec, settings)
        intake, notices = Intake(), list[Notice]()
        if _keeps_reasoning(settings, spec):
            intake, notices = await self._memory.recall(plan, request, job.valves)
        intake = intake._replace(shown=plan.shown)
        if plan.media:
            intake = intake._replace(media=await self._fetched(plan.media, settings, job))
        if blocks:
            whole = _sent_whole(blocks, intake)
            body = body._replace(messages=tuple(_without_passages(body.messages, files, whole)))
        translated = ResponsesBody.from_completions(body, spec, settings, intake)
        self._log_unsent(job, body, translated)
        texts = [*translated.notices]
        if settings.native_files != "off":
            texts += _missed_files(files, blocks, "tools" in translated.payload)
        if request.chose_tools and "tool" in translated.left_out:
            texts.append(_TOOLS_LEFT_OUT)
        await job.emitter.send([*notices, *map(Notice, texts)])
        return translated

    async def _fetched(
        self, refs: Sequence[MediaRef], settings: RequestSettings, job: _PipeJob
    ) -> Mapping[MediaRef, MediaBlob]:
        """The media of a chat; when it takes long, the person is told what is waited for."""
        async with asyncio.TaskGroup() as group:
            fetching = group.create_task(self._media.resolve(refs, job.request, settings))
            await asyncio.wait((fetching,), timeout=_SILENT_S)
            if not fetching.done():
                await job.emitter.send((StatusUpdate(_FETCHING),))
                await asyncio.wait((fetching,))
                await job.emitter.send((StatusUpdate(_FETCHED, done=True),))
        return fetching.result()

    async def _within_rights(self, body: CompletionsBody, job: _PipeJob) -> CompletionsBody:
        """The body with nothing in it that this person may not set.

        Raises:
            InputError: there is something, said in words.
        """
        request = job.request
        # The parameters of a task come from the server itself.
        if not body.is_guarded or request.is_admin or request.is_task:
            return body
        named = str(request.body.get("model") or "")
        approved = await self._host.admin_params((request.picked_model, named))
        allowed = body.within(RequestRights(False, job.valves.USER_REQUEST_FIELDS, approved))
        models = _decoded(allowed.parameters.get("models"))
        if models is not None and models not in map(_decoded, approved.get("models", ())):
            prefix = named.removesuffix(request.model)
            for model in _as_models("models", models):
                if not await self._host.may_use(request.user_id, prefix + model):
                    raise InputError(f"The model {model[:80]} of the parameter models is not one of yours")
        return allowed

    def _log_unsent(self, job: _PipeJob, body: CompletionsBody, translated: ResponsesBody) -> None:
        """Say what of a chat does not reach the model; the same parameter only once."""
        if translated.left_out:
            LOGGER.info("request %s: not sent: %s", job.request_id, dict(translated.left_out))
        sent = _CHAT_ONLY_PARAMETERS if _asks_chat(body, job.valves) else ()
        news = [name for name in body.unsent if name not in self._told and name not in sent]
        if news and len(self._told) < _MOST_TOLD:
            self._told.update(news)
            LOGGER.info("Not sent, because /responses does not have it: %s", ", ".join(news))


def _failed(error: PipeError, job: _PipeJob, logs: SessionLogger) -> Failed:
    """The end of a job, with the log of it for those who may read that."""
    readers = job.valves.SHOW_ERROR_LOG_CITATION
    is_shown = readers == "everyone" or (readers == "admins" and job.request.is_admin)
    return Failed(error, logs.flush_for_citation(job.context) if is_shown else "")


def _keeps_reasoning(settings: RequestSettings, spec: ModelSpec) -> bool:
    """Whether a model gets its reasoning back in later turns."""
    return settings.replay != "off" and spec.reasons and not settings.is_task


class _Talk(NamedTuple):
    """What stays the same over all upstream calls of one request."""

    job: _PipeJob
    body: CompletionsBody
    spec: ModelSpec
    settings: RequestSettings
    connection: Connection
    tools: tuple[OfferedTool, ...]

    @property
    def keeps(self) -> bool:
        """Whether reasoning is to be kept for later turns."""
        return _keeps_reasoning(self.settings, self.spec)

    @property
    def names(self) -> dict[str, str]:
        """What the model knows the tools by."""
        return {tool.host_name: tool.name for tool in self.tools}

    @property
    def callable_names(self) -> frozenset[str]:
        """The host's names of what may be called: what was offered, and what can be searched for."""
        names = self.names
        searched = self.job.request.host.metadata.get("deferred_tools") if _CALL_TOOL in names else ()
        return frozenset([*names, *(name for name in _strings(searched) if _may_offer(name, self.settings))])


class _Turn:
    """One upstream call seen from the loop: its record, and whose its calls are.

    `rounds_left`: with none left calls are answered instead of run; below, the model was told to call
    nothing more, and what it calls all the same is dropped. `finished` are results as they came.
    """

    def __init__(
        self,
        talk: _Talk,
        payload: JSONObject,
        memory: TurnMemory,
        pictures: ImageResults,
        *,
        rounds_left: int,
    ) -> None:
        self.record = TurnRecord()
        self.finished: list[ToolResult] = []
        self.mine: list[ToolCall] = []
        self.theirs: list[ToolCall] = []
        self._talk = talk
        self._memory = memory
        self._pictures = pictures
        self._rounds_left = rounds_left
        self._send = talk.job.emitter.send
        self._host_names = {tool.name: tool.host_name for tool in talk.tools}
        self._known_ids = {item["call_id"] for item in payload["input"] if "call_id" in item}
        self._used_ids = dict.fromkeys(self._known_ids, 1)

    def sink(self, emissions: Sequence[Emission]) -> Awaitable[None]:
        """Pass emissions on, with what they need to be understood outside of this call."""
        if len(emissions) == 1 and type(emissions[0]) is TextDelta:  # nearly all there is
            return self._send(emissions)
        if _RECORDED.isdisjoint(map(type, emissions)):
            return self._send(emissions)
        return self._send_noted(emissions)

    async def _send_noted(self, emissions: Sequence[Emission]) -> None:
        ready: list[Emission] = []
        for emission in emissions:
            kept: list[Emission] = [emission]
            if isinstance(emission, (MediaProduced, TurnEnded)):
                await self._send(ready)  # what is written need not wait until something is kept
                ready = []
            if isinstance(emission, MediaProduced):
                kept = await self._pictures.keep(emission, self._talk.job.request, self._talk.settings)
            elif isinstance(emission, TurnEnded):
                kept = await self._end(emission)
            ready += [known for one in kept if (known := self._noted(one)) is not None]
        await self._send(ready)

    def note_results(self, emissions: Sequence[Emission]) -> Awaitable[None]:
        """Pass on what comes of the calls, in the order in which the host will have it."""
        results = [emission.result for emission in emissions if isinstance(emission, ToolFinished)]
        self.finished += results
        self._talk.job.tally["tools"] += len(results)
        self._talk.job.tally["tools_failed"] += sum(result.failed for result in results)
        return self._send(emissions)

    def _noted(self, emission: Emission) -> Emission | None:
        if isinstance(emission, ToolRequested):
            if self._rounds_left < 0:
                return None
            call = emission.call
            call_id = _unique_id(call.call_id, self._used_ids)
            name = self._host_names.get(call.name, call.name)
            emission = emission._replace(call=call._replace(call_id=call_id, name=name))
        elif isinstance(emission, StatusUpdate) and not emission.done:
            self._used_ids = dict.fromkeys(self._known_ids, 1)  # the try has failed, another one comes
            self._talk.job.tally["retries"] += 1
        self.record.note(emission)
        return emission

    async def _end(self, ended: TurnEnded) -> list[Emission]:
        request = self._talk.job.request
        calls = self.record.calls if ended.outcome == "completed" else []
        self.mine, self.theirs = _split_calls(calls, self._talk)
        if self._rounds_left == 0 and request.dialect in _DIALECTS_WITH_EVENTS and request.host.tools:
            self.mine, self.theirs = calls, []  # nobody runs them any more
        goes_on = bool(self.mine) and not self.theirs
        carrier = await self._memory.carrier(self.record, self._talk.job) if self._talk.keeps else []
        return [*carrier, ended._replace(goes_on=goes_on)]


def _asks_first(request: ChatRequest) -> bool:
    """Whether a person has to approve each call; only the host can ask."""
    params = _mapping(request.host.metadata.get("params"))
    return params.get("tool_approval_mode") == "ask"


def _runnable_tools(request: ChatRequest, mode: str) -> frozenset[str] | None:
    """The tools that may be offered; None: all, because the host or the client runs the others."""
    if request.dialect != "browser_json":
        return None
    tools = {} if _asks_first(request) else request.host.tools
    return frozenset(name for name, tool in tools.items() if _runs_here(tool, mode))


def _target_of(call: ToolCall) -> str:
    """The tool that is meant, where the model had to search for it."""
    if call.name != _CALL_TOOL:
        return call.name
    with contextlib.suppress(ValueError):
        return _text(_mapping(_json_loads(call.arguments)).get("tool_name")) or call.name
    return call.name


def _split_calls(calls: Sequence[ToolCall], talk: _Talk) -> tuple[list[ToolCall], list[ToolCall]]:
    """(the calls that are run or answered here, those that are left to the host or the client)."""
    request, mode = talk.job.request, talk.job.valves.TOOL_EXECUTION_MODE
    tools, in_page = request.host.tools, request.dialect in _DIALECTS_WITH_EVENTS
    if request.is_task or not calls or not tools:
        return [], list(calls)
    is_theirs = _asks_first(request) or (in_page and mode == "open_webui")
    may_call = talk.callable_names
    # What was not offered is answered here: the host would run it, nobody else would.
    unknown = {call.call_id for call in calls if not {call.name, _target_of(call)} <= may_call}
    if not in_page:
        mode = "auto"  # Open WebUI runs nothing for programs
    known = [call for call in calls if call.call_id not in unknown]
    run = {call.call_id for call in known if not is_theirs and _runs_here(tools.get(call.name), mode)}
    if not in_page and len(run) < len(known):
        return [], list(calls)  # a client that gets some of a round cannot know of the others
    mine = [call for call in calls if call.call_id in run | unknown]
    return mine, [call for call in known if call.call_id not in run]


def _rounds_since_question(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many rounds of tools stand behind the last question."""
    asked = _questions_in(messages)
    behind = messages[asked[-1] :] if asked else ()
    return sum(bool(message.get("tool_calls")) for message in behind)


def _next_payload(
    payload: JSONObject, said: Sequence[JSONObject], results: Sequence[ToolResult], pictures: Sequence[str]
) -> JSONObject:
    """The request after a round of tools, as a later turn of the chat will have it."""
    outputs = [_output_item(result.call.call_id, result.text) for result in results]
    items = [*payload["input"], *said, *outputs]
    if pictures:
        text = {"type": "input_text", "text": _TOOL_PICTURES}
        items.append({"type": "message", "role": "user", "content": [text, *map(_image_part, pictures)]})
    return _unforced({**payload, "input": items})


def _unforced(payload: JSONObject) -> JSONObject:
    """Without a choice of a tool that was for the first call: forced again and again there is no end."""
    is_forced = payload.get("tool_choice") not in (None, "auto", "none")
    return {key: value for key, value in payload.items() if key != "tool_choice" or not is_forced}


def _pictures_sent(payload: JSONObject) -> int:
    contents = [item.get("content") for item in payload["input"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part.get("type") == "input_image" for part in parts)


def _asks_chat(body: CompletionsBody, valves: Valves) -> bool:
    """Whether the request goes to `/chat/completions` at once."""
    wanted = valves.UNSUPPORTED_PARAMETERS == "use_chat_completions" and body.wants_chat
    return wanted or _matches_any(body.model, valves.FORCE_CHAT_COMPLETIONS_MODELS)


def _upstream_request(payload: JSONObject, body: CompletionsBody, valves: Valves) -> UpstreamRequest:
    """The request for `/responses`, or for chat where the valve names the model."""

    def chat_body() -> JSONObject:
        return _to_chat_body(payload, body.parameters)

    if _asks_chat(body, valves):
        return UpstreamRequest(chat_body(), CHAT)
    return UpstreamRequest(payload, RESPONSES, chat_body)


def _with_beta_headers(connection: Connection, payload: JSONObject, spec: ModelSpec) -> Connection:
    """Claude thinks between its calls only if it is asked to (reference §2)."""
    if spec.vendor != "anthropic" or not payload.get("tools") or "reasoning" not in payload:
        return connection
    return connection._replace(headers=(*connection.headers, ("x-anthropic-beta", _INTERLEAVED)))


_CALL_TOOL: Final = "call_tool"
_ONE_ROUND_TOO_MANY: Final = (
    "Error: this call was not run, because there have been too many rounds of tools. "
    "Answer now with what you know, and say what is missing."
)
_RECORDED: Final = frozenset({ItemClosed, ToolRequested, StatusUpdate, MediaProduced, TurnEnded})
_NOT_RECALLED: Final = "Some earlier thinking of this chat could not be read: the model goes on without it."
_NOT_REMEMBERED: Final = (
    "This thinking is too long to be kept: the model will not remember it, only its answer."
)
_INTERLEAVED: Final = "interleaved-thinking-2025-05-14"
_MOST_TOLD: Final = 1000
_SILENT_S: Final = 1.0
_FETCHING: Final = "Fetching the files of this chat"
_FETCHED: Final = "Fetched the files of this chat"
# Those that the host offers with every chat are not missed; those that a person has chosen are.
_TOOLS_LEFT_OUT: Final = "This model cannot use tools; it answers without those that are chosen."
# Where somebody looks at statuses and sources.
_DIALECTS_WITH_EVENTS: Final = frozenset({"browser", "browser_json"})
# Where somebody runs the calls: the pipe, the host after a streamed answer, or the API client itself.
_DIALECTS_WITH_TOOLS: Final = frozenset({"browser", "browser_json", "api_stream", "api_json"})


# ── 22. Runtime ──────────────────────────────────────────────────────────────
# Everything with a lifetime: who may run now, what runs behind the answers, and the hand-over from one
# load of this file to the next.
# Promise: no task outlives its request; closing is idempotent and needs no event loop of its own.
# Doc: docs/concurrency_and_lifecycle.md   Tests: tests/test_runtime.py, tests/test_admission.py


class Ticket:
    """A request's place: its `turn` says, once it is known, whether the request may run or is refused."""

    __slots__ = ("is_running", "turn", "user_id")

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.is_running = False
        self.turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def is_refused(self) -> bool:
        """Whether the request may never run."""
        return self.turn.done() and not self.turn.cancelled() and not self.turn.result()


class AdmissionScheduler:
    """Who runs and who waits: a queue for each person, served in turns. It waits for nothing itself."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self._limits = (1, 0)
        self._running_of: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[Ticket]] = OrderedDict()  # the next to be served first

    def resize(self, most: int, per_user: int = 0) -> None:
        """How many may run from now on, and of one person (0: no limit); who runs goes on."""
        if (most, per_user) != self._limits:
            self._limits = (most, per_user)
            self._let_in()

    def enter(self, user_id: str) -> Ticket:
        """A place for a request; `leave` has to follow, whatever becomes of it.

        Where too many wait, the latest of the person with the most is refused: one who asks for very
        much does not keep others out.
        """
        ticket = Ticket(user_id)
        self._queues.setdefault(user_id, deque()).append(ticket)
        self.waiting += 1
        self._let_in()
        if self.waiting > _QUEUE_MAXSIZE:
            most = max(map(len, self._queues.values()))
            if len(self._queues[user_id]) < most:
                user_id = next(user for user, theirs in self._queues.items() if len(theirs) == most)
            refused = self._queues[user_id][-1]
            self._withdraw(refused)
            refused.turn.set_result(False)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """A request has ended, or is not wanted any more. Idempotent."""
        if ticket.is_running:
            ticket.is_running = False
            self.running -= 1
            self._running_of[ticket.user_id] -= 1
            if not self._running_of[ticket.user_id]:
                del self._running_of[ticket.user_id]
            self._let_in()
        elif ticket in self._queues.get(ticket.user_id, ()):
            self._withdraw(ticket)

    def place(self, ticket: Ticket) -> int:
        """How many will be served before this one that waits."""
        own = self._queues[ticket.user_id].index(ticket)
        count, is_before = own, True
        for user_id, theirs in self._queues.items():
            if user_id == ticket.user_id:
                is_before = False
            else:
                count += min(len(theirs), own + is_before)
        return count

    def _withdraw(self, ticket: Ticket) -> None:
        own = self._queues[ticket.user_id]
        own.remove(ticket)
        if not own:
            del self._queues[ticket.user_id]
        self.waiting -= 1

    def _let_in(self) -> None:
        most, per_user = self._limits
        while self.running < most and self._queues:
            served = (
                user for user in self._queues if not per_user or self._running_of.get(user, 0) < per_user
            )
            user_id = next(served, None)
            if user_id is None:
                return
            ticket = self._queues[user_id][0]
            self._withdraw(ticket)
            if user_id in self._queues:
                self._queues.move_to_end(user_id)
            self.running += 1
            self._running_of[user_id] = self._running_of.get(user_id, 0) + 1
            ticket.is_running = True
            ticket.turn.set_result(True)


class StartupChecks:
    """Whether OpenRouter can be reached and takes the key: asked at the start, and again only while it fails.

    Failures are kept for each address and key: with a key of their own nobody is refused for another's.
    """

    def __init__(self, fetch: CatalogFetcher, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self.failed: dict[str, _Outage] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    def begin(self, connection: Connection, after_s: float = 0.0) -> asyncio.Task[None]:
        """Ask in the background; all who ask at the same time share one answer."""
        digest = _connection_digest(connection)
        if digest not in self._probes:
            task = asyncio.get_running_loop().create_task(
                self._probe(connection, digest, after_s), name="startup check", context=_nobodys_context()
            )
            self._probes[digest] = task
            task.add_done_callback(lambda _: self._probes.pop(digest, None))
        return self._probes[digest]

    async def check(self, connection: Connection) -> None:
        """Ask once more where it has failed, every 10 seconds at most.

        Raises:
            AdmissionError: it still fails.
        """
        digest = _connection_digest(connection)
        outage = self.failed.get(digest)
        if outage is not None and self._clock() - outage.failed_at >= _PROBE_AGAIN_S:
            await asyncio.wait((self.begin(connection),))
            outage = self.failed.get(digest)
        if outage is not None:
            raise AdmissionError(f"Service unavailable due to startup issues: {render_error(outage.error)}")

    def note_success(self, connection: Connection) -> None:
        """An answer has come: whatever failed is over."""
        if self.failed.pop(_connection_digest(connection), None) is not None:
            LOGGER.info("OpenRouter can be reached again")

    async def aclose(self) -> None:
        """Ask no more."""
        await _end_tasks(self._probes.values())

    async def _probe(self, connection: Connection, digest: str, after_s: float) -> None:
        error: PipeError | None = None
        await asyncio.sleep(after_s)
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._fetch(connection._replace(key=""), "/models?limit=1", "")
                await self._fetch(connection, "/key", "")
        except TimeoutError:
            error = StreamError(template="timeout")
        except PipeError as exc:
            # What a provider, a limit or a proxy without `/key` says is no reason to lock anybody out.
            error = exc if exc.template in _LOCKING_TEMPLATES else None
        if error is None:
            self.note_success(connection)
            return
        if digest not in self.failed:
            LOGGER.warning("The check at the start failed: %s", render_error(error))
        self.failed[digest] = _Outage(error, self._clock())
        _drop_oldest(self.failed, _MAX_CATALOGS)


_FIRST_PLACE_S: Final = 1.0  # after so long somebody who waits is told the place
_LAST_PLACE_S: Final = 30.0
_BUSY: Final = "The server is busy: too many requests are waiting already. Please try again in a moment"
_PROBE_S: Final = 5.0
_FIRST_PROBE_S: Final = 0.3  # whoever has come first goes first
_PROBE_AGAIN_S: Final = 10.0
_LOCKING_TEMPLATES: Final = frozenset({"network", "timeout", "broken", "authentication"})


def _connection_digest(connection: Connection) -> str:
    return hashlib.sha256(f"{connection.base_url} {connection.key}".encode()).hexdigest()


class Runtime:
    """The machinery behind one `Pipe`, bound to the event loop it was started on.

    `clock` gives seconds that only grow; `sleep` waits between retries.
    """

    def __init__(
        self,
        pipe_id: str,
        env: HostEnvironment,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.pipe_id = pipe_id
        self.loop: asyncio.AbstractEventLoop | None = None
        self.retired = False
        self.last_menu: list[dict[str, str]] = []
        self._shown: list[ModelSpec] = []
        self._menu_source = CatalogChoice()
        self._menu_catalog: Mapping[str, ModelSpec] | None = None  # what the last menu was made of
        self._menu_choice: tuple[Any, ...] = ()
        self._named_unmatched = ""
        self._env = env
        self._clock = clock
        self._client = OpenRouterClient()
        self.host = OpenWebUIHost()
        copies = CatalogCopies(self.host.data_folder())
        self._registry = OpenRouterModelRegistry(self._client.get_json, clock, copies)
        self._publisher = ModelPublisher(self.host, pipe_id, clock)
        self._media = MediaIntake(self.host, clock)
        self._tools = ToolOrchestrator(self.host, clock)
        self._store = ArtifactStore(self.host, pipe_id, clock)
        self._memory = TurnMemory(self._store, env, pipe_id)
        self._metrics = Metrics(self.host, pipe_id, clock)
        self.logs = SessionLogger(clock)
        account = AccountReader(self._client.get_json, clock)
        engine, pictures = StreamingEngine(self._client, sleep), ImageResults(self.host, self._media)
        hands = (self._media, pictures, self._tools, self._memory, self.logs)
        around = Neighbours(self._registry, account, engine, self.host, *hands)
        self._turns = TurnLoop(around, env, clock)
        self._checks = StartupChecks(self._client.get_json, clock)
        self._chats, self._tasks = AdmissionScheduler(), AdmissionScheduler()
        self._is_busy = False  # and the log has it
        self._jobs: set[_PipeJob] = set()
        self._begun: set[str] = set()  # what is begun once
        self._housekeeping: asyncio.Task[None] | None = None
        self._code: str | None = None  # the digest of what the host has for this function
        self._background: set[asyncio.Task[Any]] = set()
        self._stack = contextlib.AsyncExitStack()  # what is entered here is closed in the reverse order

    def start(self) -> None:
        """Bind to the running loop and take over from an earlier load of this file. Idempotent."""
        if self.loop is not None:
            return
        self.loop = asyncio.get_running_loop()
        self._maybe_start_log_worker()
        ends = (
            *(self._client.aclose, self._registry.aclose, self._publisher.aclose, self._media.aclose),
            *(self._store.aclose, self._metrics.write, self._checks.aclose, self._end_services),
        )
        for end in ends:
            self._stack.push_async_callback(self._close, end)
        self._stack.callback(self._tools.aclose)
        if not self._env.secret:
            LOGGER.warning("No WEBUI_SECRET_KEY is set: API keys in the valves are stored as plain text.")
        runtimes = _live_runtimes()
        predecessor = runtimes.get(self.pipe_id)
        runtimes[self.pipe_id] = self
        if predecessor is not None and predecessor is not self:
            predecessor.retire_soon()

    @property
    def is_current(self) -> bool:
        """Whether no later load or runtime has taken its place."""
        return _live_runtimes().get(self.pipe_id) is self

    @property
    def _warmup_failed(self) -> bool:
        """Whether a check of the start has failed and nothing has come since."""
        return bool(self._checks.failed)

    def serve(self, valves: Valves) -> None:
        """See to it that what runs behind the answers runs as these valves say. Idempotent."""
        self.logs.least = logging.getLevelNamesMapping()[valves.LOG_LEVEL]
        self._ensure_concurrency_controls(valves)
        self._maybe_start_startup_checks(valves)
        self._maybe_start_redis(valves)
        self._maybe_start_cleanup()

    def _ensure_concurrency_controls(self, valves: Valves) -> None:
        self._chats.resize(valves.MAX_CONCURRENT_REQUESTS, valves.MAX_CONCURRENT_REQUESTS_PER_USER)
        self._tasks.resize(valves.MAX_CONCURRENT_TASKS)

    def _maybe_start_log_worker(self) -> None:
        self.logs.start()
        self._stack.callback(self._stop_log_worker)
        # The host forgets functions without a word; at the end of the process `logging` itself flushes.
        weakref.finalize(self, self.logs.stop).atexit = False

    def _stop_log_worker(self) -> None:
        self.logs.stop()

    def _maybe_start_startup_checks(self, valves: Valves) -> None:
        if "checks" in self._begun or not valves.ENABLE_STARTUP_CHECKS:
            return
        with contextlib.suppress(ConfigurationError):  # the menu says so; tried again with the next valves
            self._checks.begin(_connection(valves, self._env), _FIRST_PROBE_S)
            self._begun.add("checks")

    def _maybe_start_redis(self, valves: Valves) -> None:
        """What a worker that was killed has left in Redis is moved although nobody asks for it."""
        if "redis" in self._begun or not self._env.has_redis:
            return
        self._begun.add("redis")
        if _artifact_settings(valves, self._env, self.pipe_id).uses_redis:
            self._memory.open(valves)

    def _maybe_start_cleanup(self) -> None:
        if self._housekeeping is None and not self.retired:
            loop = asyncio.get_running_loop()
            task = loop.create_task(
                _keep_house(weakref.ref(self)), name="housekeeping", context=_nobodys_context()
            )
            self._housekeeping = task
            _end_unheard(task)
            weakref.finalize(self, _cancel_in_loop, task, loop).atexit = False

    async def _end_services(self) -> None:
        if self._housekeeping is not None:
            await _end_tasks([self._housekeeping])

    async def keep_house(self) -> None:
        """What is due each minute: old logs, metrics, and the end if the function is gone or another one."""
        self.logs.cleanup()
        await self._metrics.write()
        code = await self.host.function_digest(self.pipe_id)
        if self._code is None or code is None:
            self._code = code if self._code is None else self._code
        elif code != self._code and not self.retired:
            LOGGER.info("The function %s was changed or switched off: this instance of it ends", self.pipe_id)
            self.retire_soon()

    async def models(self, valves: Valves) -> list[dict[str, str]]:
        """The entries of the model menu.

        Raises:
            PipeError: there is no key or no catalog.
        """
        choice = CatalogChoice.of(valves)
        if choice.path != self._menu_source.path or choice.zdr != self._menu_source.zdr:
            # What fewer may be shown of must not stay shown because the new list cannot be had.
            self.last_menu, self._menu_catalog, self._menu_source = [], None, choice
        models = await self._registry.ensure_loaded(_connection(valves, self._env), choice)
        today = time.strftime("%Y-%m-%d")
        made_of = (today, *(getattr(valves, name) for name in _ModelValves.__annotations__))
        # Open WebUI takes the names from its rows: who has just changed a valve looks at the result.
        has_new_valves = bool(self._menu_choice) and made_of[1:] != self._menu_choice[1:]
        if models is not self._menu_catalog or made_of != self._menu_choice:
            self._warn_unmatched(models, valves)
            self.last_menu = []  # filters that leave nothing must not leave what was there before
            self._shown = _menu(models, valves, today)
            self.last_menu = [{"id": spec.id, "name": spec.title} for spec in self._shown]
            self._menu_catalog, self._menu_choice = models, made_of
        published = PublishChoice(valves.SYNC_MODEL_METADATA, valves.NEW_MODEL_ACCESS, valves.NATIVE_FILES)
        self._publisher.publish(self._shown, published)
        if has_new_valves:
            await self._publisher.wait(_PUBLISH_WAIT_S)
        return self.last_menu

    def _warn_unmatched(self, models: Mapping[str, ModelSpec], valves: Valves) -> None:
        """Name the models that the valves ask for and the catalog does not have; the same ones only once."""
        names = ", ".join(_unmatched(models, valves))
        if names and names != self._named_unmatched:
            LOGGER.warning("The valves name models that OpenRouter does not have: %s", names)
        self._named_unmatched = names

    def job(self, request: ChatRequest, valves: Valves) -> _PipeJob:
        """A request made ready to run."""
        outlet = Outlet(_update_limits(valves), self._clock)
        emit = _wrap_event_emitter(
            request.host.event_emitter, suppress_chat_messages=request.dialect not in _DIALECTS_WITH_EVENTS
        )
        writer = _make_writer(request, valves, self._clock)
        request_id = secrets.token_hex(4)
        page = ErrorPage(_error_templates(valves), valves.SUPPORT_CONTACT, request_id)
        emitter = Emitter(writer, outlet, emit, self._clock, page)
        session = request.session_id or request.chat_id or request.user_id
        level = logging.getLevelNamesMapping()[valves.LOG_LEVEL]
        context = LogContext(session, request.user_id, request_id, level)
        return _PipeJob(request, valves, emitter, outlet, context)

    def in_background(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Do something that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work, name=f"{name} {self.pipe_id}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def stream(self, job: _PipeJob) -> AsyncGenerator[JSONObject, None]:
        """The chunks of a job, which starts when the first is asked for."""
        return job.outlet.chunks(functools.partial(self._submit, job))

    async def collect(self, job: _PipeJob) -> JSONObject:
        """The whole answer of a job, or what there is of it when somebody presses Stop."""
        task = self._submit(job)
        try:
            return await job.outlet.result()
        except asyncio.CancelledError:
            # Of an answer that is not streamed Open WebUI keeps what is returned, and nothing else.
            stopping = asyncio.current_task()
            if stopping is None or task is None or job.request.dialect != "browser_json":
                raise
            task.cancel()
            await asyncio.wait((task,), timeout=_CLEANUP_S)
            job.emitter.aclose()
            stopping.uncancel()
            return await job.outlet.result()
        finally:
            if task is not None:
                task.cancel()

    def _submit(self, job: _PipeJob) -> asyncio.Task[None] | None:
        """Give a request its place; None if it was refused, which is said at once."""
        job.started_at = self._clock()
        gate = self._tasks if job.request.is_task else self._chats
        if self.retired:
            return self._refuse(job, AdmissionError(_UPDATED))
        ticket = gate.enter(job.request.user_id)
        if ticket.is_refused:
            return self._refuse(job, AdmissionError(_BUSY, status=503))
        task = job.task = asyncio.get_running_loop().create_task(
            self._request_worker_loop(job, gate, ticket), name=f"answer {job.request_id}"
        )
        _end_unheard(task)
        self._jobs.add(job)

        def release(_: asyncio.Task[None]) -> None:  # also if it was stopped before it began
            self._jobs.discard(job)
            gate.leave(ticket)
            job.emitter.aclose()

        task.add_done_callback(release)
        return task

    def _refuse(self, job: _PipeJob, error: AdmissionError) -> None:
        if not self._is_busy and error.status:
            self._is_busy = True
            LOGGER.warning("Requests are refused: %d run, %d wait", self._chats.running, self._chats.waiting)
        job.emitter.refuse(error)
        self._note_end(job, "refused")

    async def _request_worker_loop(self, job: _PipeJob, gate: AdmissionScheduler, ticket: Ticket) -> None:
        """Carry one request from its place among those that wait to its end."""
        with self.logs.bind(job.context, job.valves.SESSION_LOG_MAX_LINES):
            try:
                await self._wait_for_turn(ticket, gate, job)
                outcome = await self._answer(job)
            except AdmissionError as exc:
                outcome = "refused"
                await self._say_last(job, exc)
            except asyncio.CancelledError:
                await self._say_last(job, job.ended_by)
                job.emitter.aclose()
                self._note_end(job, "stopped")
                raise
            except Exception:
                outcome = "failed"
                LOGGER.exception("request %s: unexpected error", job.request_id)
                self._metrics.count(f"errors.{PipeError.template}")
                await self._say_last(job, PipeError())
            job.emitter.aclose()
            self._note_end(job, outcome)

    async def _wait_for_turn(self, ticket: Ticket, gate: AdmissionScheduler, job: _PipeJob) -> None:
        """Wait until the request may run; the person is told its place, ever less often.

        Raises:
            AdmissionError: too many wait.
        """
        told: int | None = None
        wait_s = _FIRST_PLACE_S
        while not ticket.turn.done():
            await asyncio.wait((ticket.turn,), timeout=wait_s)
            if ticket.turn.done():
                break
            place = gate.place(ticket)
            if place != told:
                told, wait_s = place, min(2 * wait_s, _LAST_PLACE_S)
                before = "this request is the next" if not place else f"{place} requests are before this one"
                before = before.replace("1 requests are", "1 request is") if place == 1 else before
                await job.emitter.send((StatusUpdate(f"Waiting for a free place: {before}"),))
        if ticket.is_refused:
            raise AdmissionError(_BUSY, status=503)
        self._is_busy = self._is_busy and gate.waiting > _QUEUE_MAXSIZE // 2
        if told is not None:
            await job.emitter.send((StatusUpdate("Answering", done=True, hidden=True),))

    async def _answer(self, job: _PipeJob) -> str:
        """Run a job whose turn it is; "answered" or "failed"."""
        await job.emitter.send(job.remarks)
        if self._warmup_failed:
            with contextlib.suppress(ConfigurationError):
                await self._checks.check(_connection(job.valves, self._env))
        error = await self._turns.run(job)
        if error is not None:
            self._metrics.count(f"errors.{error.template}")
        elif self._warmup_failed:
            self._checks.note_success(_connection(job.valves, self._env))
        return "answered" if error is None else "failed"

    def _note_end(self, job: _PipeJob, outcome: str) -> None:
        """One line of what a request took, and the same for the metrics."""
        usage, request, started = job.emitter.usage(), job.request, job.started_at
        told = map(usage.get, ("input_tokens_details", "output_tokens_details"))
        details = dict(itertools.chain.from_iterable(_mapping(part).items() for part in told))
        used = {name: usage.get(name) or 0 for name in ("input_tokens", "output_tokens", "cost")}
        used |= {name: details.get(name) or 0 for name in ("cached_tokens", "reasoning_tokens")}
        used = {name: value for name, value in {**used, **job.tally}.items() if _is_number(value) and value}
        times = {"seconds": self._clock() - started}
        if job.emitter.began_at is not None:
            times["first_token_seconds"] = job.emitter.began_at - started
        facts = {"outcome": outcome, "model": request.model, "dialect": request.dialect, **used}
        facts |= {name: round(seconds, 3) for name, seconds in times.items()}
        LOGGER.log(
            logging.DEBUG if outcome == "refused" else logging.INFO, "usage %s", _json_dumps(facts).decode()
        )
        self._metrics.count(f"requests.{outcome}")
        for name, amount in used.items():
            self._metrics.count(name, amount)
        for name, seconds in times.items() if outcome == "answered" else ():
            self._metrics.observe(name, seconds)
        self._metrics.observe("waiting_requests", self._chats.waiting)
        if job.at_end is not None:
            job.at_end()

    async def _say_last(self, job: _PipeJob, error: PipeError | None) -> None:
        """The last words of a job that did not end by itself: an error, or only the end of its status."""
        send, emitter = job.emitter.send, job.emitter
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLEANUP_S):
                await (emitter.close_status() if error is None else send((_failed(error, job, self.logs),)))

    def retire_soon(self) -> None:
        """`retire` on the loop this runtime lives on, wherever that is; nothing if it is gone."""
        self.retired = True
        loop = self.loop
        if loop is None or loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):  # closed between the two lines
            loop.call_soon_threadsafe(lambda: self.in_background(self.retire(), "retire"))

    async def retire(self, deadline_s: float = _RETIRE_DEADLINE_S) -> None:
        """Take no new job, let running ones finish within `deadline_s` seconds, then close. Idempotent."""
        self.retired = True
        tasks = [job.task for job in self._jobs if job.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=deadline_s)
        reason = AdmissionError(
            "This function has been updated and had to end this answer. Please send the message again"
        )
        left = [self._stop_request_worker(job, reason) for job in self._jobs if job.task is not None]
        if left:
            await asyncio.wait(left, timeout=_CLEANUP_S)
        await self._stack.aclose()

    def _stop_request_worker(self, job: _PipeJob, reason: PipeError) -> asyncio.Task[None]:
        task = cast("asyncio.Task[None]", job.task)
        if not task.done():
            job.ended_by = reason
            task.cancel()
        return task

    async def _close(self, end: Callable[[], Awaitable[None]]) -> None:
        """One part, whatever becomes of the others."""
        try:
            await end()
        except Exception:
            LOGGER.exception("something could not be closed")


async def _keep_house(ref: weakref.ref[Runtime]) -> None:
    """What a runtime has to do each minute, as long as somebody else holds it."""
    while (runtime := ref()) is not None:
        try:
            await runtime.keep_house()
        except Exception:
            LOGGER.exception("the housekeeping failed")
        del runtime
        await asyncio.sleep(_HOUSEKEEPING_S * random.uniform(0.9, 1.1))


def _cancel_in_loop(task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop) -> None:
    """End a task from wherever this is; nothing if its loop is gone."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(task.cancel)


_HOUSEKEEPING_S: Final = 60.0


def _live_runtimes() -> weakref.WeakValueDictionary[str, Any]:
    """The live runtime of each pipe id, shared by every load of this file in the process."""
    holder = sys.modules.get(_RUNTIMES_KEY)
    if holder is None:
        holder = sys.modules.setdefault(_RUNTIMES_KEY, types.ModuleType(_RUNTIMES_KEY))
        holder.__dict__.setdefault("runtimes", weakref.WeakValueDictionary())
    return holder.__dict__["runtimes"]


# ── 23. Service functions ────────────────────────────────────────────────────
# (empty)
# Will hold: chat completions over httpx for other code on the server.


# ── 24. Pipe ─────────────────────────────────────────────────────────────────
# What Open WebUI finds: `pipes()`, `pipe()` and the valves. A thin controller.
# Promise: constructing it does no I/O and needs no event loop; `pipes()` never raises.
# Doc: docs/developer_guide_and_architecture.md   Tests: tests/test_pipe.py


class Pipe:
    """Open WebUI's handle on OpenRouter."""

    Valves = Valves
    UserValves = UserValves

    def __init__(self) -> None:
        self.valves = Valves()
        self._env = HostEnvironment.read()
        self._runtime: Runtime | None = None
        self._reported: list[str] = []  # the valves that the log has named as unusable
        self._untold: list[str] = []  # those of which an administrator has to hear in a chat

    async def pipes(self) -> list[dict[str, str]]:
        """The models for the menu; one entry that says what is missing where there are none."""
        runtime = self._started()
        try:
            return await runtime.models(_resolve_valves(self.valves))
        except PipeError as exc:
            error = exc
        except Exception:
            LOGGER.exception("The model list failed")
            error = PipeError("No models")
        # With the menu as it was, a chat still says in words what is wrong.
        return runtime.last_menu or _setup_entry(error)

    async def pipe(
        self,
        body: JSONObject,
        __user__: Mapping[str, Any] | None = None,
        __metadata__: Mapping[str, Any] | None = None,
        __event_emitter__: HostEventEmitter | None = None,
        __task__: str | None = None,
        __request__: Any = None,
        __tools__: Mapping[str, Any] | None = None,
        __event_call__: Callable[[JSONObject], Awaitable[Any]] | None = None,
    ) -> AsyncGenerator[JSONObject, None] | JSONObject:
        """Answer one chat request: a stream of chunks, or one dict where none was asked for."""
        host = HostCall(__tools__ or {}, __metadata__ or {}, __request__, __event_call__, __event_emitter__)
        request = _capture(body, __user__, host, __task__)
        runtime = self._started(str(body.get("model") or ""))
        valves = _resolve_valves(self.valves, request.user_valves, request.is_admin)
        job = runtime.job(request, valves)
        if request.is_admin and request.dialect in _DIALECTS_WITH_EVENTS and self._untold:
            names, self._untold = ", ".join(self._untold), []
            job.remarks = (Notice(f"Valves of this function with a value that cannot be used: {names}."),)
        if valves.DEBUG and host.event_call is not None and request.dialect in _DIALECTS_WITH_EVENTS:
            job.at_end = functools.partial(self._emit_debug_log, job, runtime)
        if request.dialect == "browser":
            return runtime.stream(job)
        if request.dialect == "api_stream":
            return runtime.host.sse_response(runtime.stream(job))
        return await runtime.collect(job)

    async def __call__(
        self, body: JSONObject, **arguments: Any
    ) -> AsyncGenerator[JSONObject, None] | JSONObject:
        """The same as `pipe`."""
        return await self.pipe(body, **arguments)

    async def aclose(self, deadline_s: float = _RETIRE_DEADLINE_S) -> None:
        """End what runs within `deadline_s` seconds and close every socket. The host never calls this."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await runtime.retire(deadline_s)

    def _emit_debug_log(self, job: _PipeJob, runtime: Runtime) -> None:
        """Print the log of a request to the console of the page that asked; nobody waits for it."""
        lines = runtime.logs.flush_for_citation(job.context)
        # As JSON it is a string, whatever is in it: nothing of it runs.
        code = f"console.debug({json.dumps(f'OpenRouter, request {job.request_id}')}, {json.dumps(lines)})"
        if (ask := job.request.host.event_call) is not None:
            asking = ask({"type": "execute", "data": {"code": code}})
            told = _host_answer(asking, None, "the page takes no log", _DEBUG_LOG_S)
            runtime.in_background(told, "debug log")

    def _started(self, model: str = "") -> Runtime:
        loop = asyncio.get_running_loop()
        problems = self.valves.problems()
        if problems != self._reported:
            LOGGER.warning(
                "Valves whose stored value is not used, the default is: %s", ", ".join(problems) or "none"
            )
            self._reported = self._untold = problems
        runtime = self._runtime
        # One that ended by itself, because the function was switched off, is followed by a new one.
        has_ended = runtime is not None and runtime.retired and runtime.is_current
        if runtime is None or runtime.loop is not loop or has_ended:
            runtime = self._runtime = Runtime(_pipe_id(__name__, model), self._env)
            runtime.start()
        runtime.serve(self.valves)
        return runtime


_DEBUG_LOG_S: Final = 2.0


def _capture(
    body: JSONObject,
    user: Mapping[str, Any] | None,
    host: HostCall,
    task: str | None,
) -> ChatRequest:
    """The arguments of `pipe()`, normalised once."""
    user, metadata = user or {}, host.metadata
    context = _get_chat_context(metadata, body)
    return ChatRequest(
        body=body,
        is_task=bool(task),
        dialect=_dialect(
            task, bool(body.get("stream")), bool(metadata.get("chat_id") and metadata.get("message_id"))
        ),
        model=_upstream_model_id(str(body.get("model") or "")),
        chat_id=context.chat_id,
        message_id=context.message_id,
        session_id=_text(metadata.get("session_id")),
        user_id=str(user.get("id") or ""),
        is_admin=user.get("role") == "admin",
        picked_model=str(_mapping(metadata.get("model")).get("id") or ""),
        chose_tools=bool(metadata.get("tool_ids") or metadata.get("tool_servers")),
        files=_chat_files(metadata),
        user=user,
        host=host,
        user_valves=user.get("valves"),
    )


def _chat_files(metadata: Mapping[str, Any]) -> ChatFiles:
    """What is attached to a chat, without the knowledge that belongs to its model or folder."""
    files = _objects(metadata.get("files"))
    if not files:
        return ChatFiles()
    meta = _model_meta(metadata)
    known = [*_objects(meta.get("knowledge")), *_objects(metadata.get("folder_knowledge"))]
    known_keys = set(map(_file_key, known))
    sources = [_mapping(source.get("source")) for source in _objects(metadata.get("sources"))]
    return ChatFiles(
        files=tuple(file for file in files if _file_key(file) not in known_keys),
        sources=tuple(map(_file_key, sources)),
        user_prompt=_text(metadata.get("base_user_prompt")),
        system_prompt=_text(metadata.get("base_system_prompt")),
        is_retrieved=_mapping(meta.get("capabilities")).get("file_context") is not False,
        question_id=_text(metadata.get("user_message_id")),
    )


def _dialect(task: str | None, stream: bool, in_chat: bool) -> Dialect:
    """How this client reads an answer; nothing else asks what kind of client it is."""
    if task:
        return "api_stream" if stream else "task"
    if in_chat:
        return "browser" if stream else "browser_json"
    return "api_stream" if stream else "api_json"
