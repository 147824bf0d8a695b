"""Pictures, files, recordings and films of a chat: what is sent of them, and what is said of the rest."""

from __future__ import annotations

import base64
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    CompletionsBody,
    InputError,
    ModelSpec,
    Pipe,
    RequestSettings,
    ResponsesBody,
    _to_chat_body,
)
from openrouter_responses_pipe.simulator import Simulator
from tests.support import ask, inferences, set_valves
from tests.test_request_models import validator

Json = dict[str, Any]
ALL: Final = frozenset({"text", "image", "file", "audio", "video"})
EVERYTHING: Final = ModelSpec("a/all", "All", input_modalities=ALL)
TEXT_ONLY: Final = ModelSpec("a/text", "Text")
BYTES: Final = base64.b64encode(b"a file of some bytes").decode()
PDF: Final = f"data:application/pdf;base64,{BYTES}"
PNG: Final = f"data:image/png;base64,{BYTES}"
MP4: Final = f"data:video/mp4;base64,{BYTES}"


def translate(*blocks: Json, spec: ModelSpec = EVERYTHING, **settings: Any) -> ResponsesBody:
    """A chat of one message, which also says something."""
    content = [{"type": "text", "text": "look"}, *blocks]
    body = CompletionsBody.parse({"model": spec.id, "messages": [{"role": "user", "content": content}]})
    return ResponsesBody.from_completions(body, spec, RequestSettings(**settings))


def parts(result: ResponsesBody) -> list[Json]:
    """What is sent behind the text; the request is valid."""
    validator().validate(result.payload)
    (message,) = result.payload["input"]
    return message["content"][1:]


def file(**fields: str) -> Json:
    return {"type": "file", "file": fields}


def sound(data: str, kind: str) -> Json:
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


SENT: Final[list[tuple[Json, Json]]] = [
    (
        file(filename="a.pdf", file_data=PDF),
        {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
    ),
    (file(file_data=PDF), {"type": "input_file", "filename": "file.pdf", "file_data": PDF}),
    (
        file(filename="a.pdf", file_data=BYTES),
        {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
    ),
    (
        file(filename="a.csv", file_data=BYTES),
        {"type": "input_file", "filename": "a.csv", "file_data": f"data:text/csv;base64,{BYTES}"},
    ),
    (
        file(file_data="https://example.org/papers/b.pdf?x=1"),
        {
            "type": "input_file",
            "filename": "b.pdf",
            "file_url": "https://example.org/papers/b.pdf?x=1",
        },
    ),
    (file(file_id="f-1"), {"type": "input_file", "filename": "file.pdf", "file_id": "f-1"}),
    (
        {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
        {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
    ),
    (sound(BYTES, "wav"), sound(BYTES, "wav")),
    (sound(f"data:audio/mp3;base64,{BYTES}", "mp3"), sound(BYTES, "mp3")),
    (sound(BYTES, "mpeg"), sound(BYTES, "mp3")),
    ({"type": "video_url", "video_url": {"url": MP4}}, {"type": "input_video", "video_url": MP4}),
    (
        {"type": "input_video", "video_url": "https://example.org/a.mp4"},
        {"type": "input_video", "video_url": "https://example.org/a.mp4"},
    ),
    (
        {"type": "input_image", "image_url": PNG, "detail": "low"},
        {"type": "input_image", "image_url": PNG, "detail": "low"},
    ),
]


@pytest.mark.parametrize(("block", "part"), SENT)
def test_what_is_sent(block: Json, part: Json) -> None:
    result = translate(block)
    assert parts(result) == [part]
    assert result.notices == ()


LARGE: Final = "A" * 4 * 1000  # 3,000 bytes
LEFT_OUT: Final[list[tuple[Json, ModelSpec, str]]] = [
    (file(filename="a.pdf", file_data=f"data:application/pdf;base64,{LARGE}"), EVERYTHING, "too large"),
    ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{LARGE}"}}, EVERYTHING, "too large"),
    (sound(LARGE, "wav"), EVERYTHING, "too large"),
    ({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{LARGE}"}}, EVERYTHING, "too large"),
    (file(filename="a.pdf", file_data="data:application/pdf;base64,%%%"), EVERYTHING, "could not be read"),
    (file(filename="a.pdf", file_data="data:application/pdf,plain"), EVERYTHING, "could not be read"),
    (file(filename="a.pdf"), EVERYTHING, "could not be read"),
    ({"type": "file"}, EVERYTHING, "could not be read"),
    (sound(BYTES, "ogg"), EVERYTHING, "neither WAV nor MP3"),
    (sound("", "wav"), EVERYTHING, "could not be read"),
    (sound("%%%", "wav"), EVERYTHING, "could not be read"),
    (sound(BYTES, "wav"), TEXT_ONLY, "cannot hear"),
    ({"type": "video_url", "video_url": {"url": MP4}}, TEXT_ONLY, "cannot watch films"),
    ({"type": "video_url", "video_url": {"url": "ftp://example.org/a"}}, EVERYTHING, "could not be read"),
    ({"type": "video_url", "video_url": 5}, EVERYTHING, "could not be read"),
    ({"type": "image_url", "image_url": {"url": PNG}}, TEXT_ONLY, "cannot see"),
    (
        {"type": "image_url", "image_url": {"url": f"data:image/svg+xml;base64,{BYTES}"}},
        EVERYTHING,
        "could not be read",
    ),
]


@pytest.mark.parametrize(("block", "spec", "reason"), LEFT_OUT)
def test_what_is_left_out_and_why(block: Json, spec: ModelSpec, reason: str) -> None:
    result = translate(block, spec=spec, most_bytes=2_000, most_video_bytes=2_000)
    assert parts(result) == []
    (notice,) = result.notices
    assert reason in notice


@pytest.mark.parametrize(
    "address", ["https://[bad", "https://[", "https://a]b/c.pdf", "https://[::1", "https://"]
)
def test_an_address_that_nobody_can_read(address: str) -> None:
    """Sent or named, never an error."""
    result = translate(file(file_url=address), file(file_data=address, filename=""))
    assert len(parts(result)) + sum(result.left_out.values()) == 2


def test_a_text_model_gets_files_for_the_parser() -> None:
    assert [part["type"] for part in parts(translate(file(file_data=PDF), spec=TEXT_ONLY))] == ["input_file"]


@pytest.mark.parametrize(
    ("most", "numbers"), [(0, []), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (20, [0, 1, 2])]
)
def test_the_latest_pictures_are_sent(most: int, numbers: list[int]) -> None:
    pictures = [f"data:image/png;base64,{base64.b64encode(bytes([n])).decode()}" for n in range(3)]
    blocks = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    messages = [{"role": "user", "content": [*blocks[:2]]}, {"role": "user", "content": ["x", blocks[2]]}]
    body = CompletionsBody.parse(
        {"model": "a/all", "messages": [*messages, {"role": "user", "content": "go"}]}
    )
    result = ResponsesBody.from_completions(body, EVERYTHING, RequestSettings(most_images=most))
    validator().validate(result.payload)
    sent = [
        part["image_url"]
        for item in result.payload["input"]
        for part in item["content"]
        if "image_url" in part
    ]
    assert sent == [pictures[number] for number in numbers]
    assert any("too many" in notice for notice in result.notices) == (len(numbers) < 3)


def test_only_pictures_and_none_of_them_sent() -> None:
    block = {"type": "image_url", "image_url": {"url": PNG}}
    body = CompletionsBody.parse({"model": "a/all", "messages": [{"role": "user", "content": [block]}]})
    with pytest.raises(InputError, match="too many"):
        ResponsesBody.from_completions(body, EVERYTHING, RequestSettings(most_images=0))


@pytest.mark.parametrize(
    ("blocks", "engine", "plugins"),
    [
        ([file(file_data=PDF)], "mistral-ocr", [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]),
        ([file(file_data=PDF)], "", None),
        ([], "native", None),
    ],
)
def test_who_reads_the_files(blocks: list[Json], engine: str, plugins: list[Json] | None) -> None:
    payload = translate(*blocks, pdf_engine=engine).payload
    validator().validate(payload)
    assert payload.get("plugins") == plugins


def test_the_same_over_chat() -> None:
    blocks = [
        file(filename="a.pdf", file_data=PDF),
        file(file_data="https://example.org/b.pdf"),
        sound(BYTES, "wav"),
    ]
    payload = translate(*blocks, {"type": "video_url", "video_url": {"url": MP4}}).payload
    (message,) = _to_chat_body(payload, {})["messages"]
    assert message["content"][1:] == [
        {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
        {"type": "file", "file": {"filename": "b.pdf", "file_data": "https://example.org/b.pdf"}},
        sound(BYTES, "wav"),
        {"type": "video_url", "video_url": {"url": MP4}},
    ]


async def test_a_file_of_an_api_client_reaches_openrouter(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, PDF_ENGINE="native")
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}, file(file_data=PDF)]}]
    answer = await ask(pipe, "hello", "api_json", messages=messages)
    assert not answer.error
    body = inferences(simulator)[-1].body
    assert body["input"][-1]["content"][-1] == {
        "type": "input_file",
        "filename": "file.pdf",
        "file_data": PDF,
    }
    assert body["plugins"] == [{"id": "file-parser", "pdf": {"engine": "native"}}]
