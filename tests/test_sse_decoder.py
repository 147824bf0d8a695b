"""The SSE decoder: the same frames however the network cuts the bytes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    SSEDecoder,
    StreamError,
    StreamEvent,
    StreamState,
    parse_frames,
    reduce_event,
)

GOLDEN: Final = Path(__file__).parent / "data" / "golden"
RECORDED: Final = sorted(GOLDEN.glob("*.sse"))
MANIFEST: Final[dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_bytes())["transcripts"]
CUTS: Final[dict[str, Any]] = json.loads((GOLDEN / "17_unicode_torture.chunks.json").read_bytes())
LIMIT: Final = 1 << 20

recorded = pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)


def cut(data: bytes, offsets: Iterable[int]) -> list[bytes]:
    """The bytes in pieces, cut at these offsets."""
    return [data[start:end] for start, end in pairwise([0, *sorted(offsets), len(data)])]


def decode(pieces: Iterable[bytes], limit: int = LIMIT) -> list[bytes]:
    """The data of every frame that says something."""
    decoder = SSEDecoder(max_frame_bytes=limit)
    frames = [frame for piece in pieces for frame in decoder.feed(piece)]
    return [frame for frame in frames + decoder.close() if frame]


def read_whole(data: bytes) -> list[bytes]:
    """The plainest reading of the format that can be written down; the decoder must agree with it."""
    frames: list[bytes] = []
    waiting: list[bytes] = []
    for line in [*re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf")), b""]:
        field, _, value = line.partition(b":")
        if field == b"data":
            waiting.append(value.removeprefix(b" "))
        elif not line and waiting:
            frames.append(b"\n".join(waiting))
            waiting = []
    return [frame for frame in frames if frame]


# Recorded streams


def test_every_recorded_stream_is_in_the_manifest() -> None:
    assert {path.stem for path in RECORDED} == set(MANIFEST)


@recorded
def test_whole(path: Path) -> None:
    data = path.read_bytes()
    assert decode([data]) == read_whole(data)


@recorded
def test_byte_by_byte(path: Path) -> None:
    data = path.read_bytes()
    assert decode(cut(data, range(1, len(data)))) == read_whole(data)


@recorded
@settings(max_examples=30, deadline=None)
@given(offsets=st.lists(st.floats(0, 1), max_size=60))
def test_random_cuts(path: Path, offsets: list[float]) -> None:
    data = path.read_bytes()
    assert decode(cut(data, (int(share * len(data)) for share in offsets))) == read_whole(data)


@pytest.mark.parametrize("plan", sorted(CUTS["plans"]))
def test_recorded_cuts(plan: str) -> None:
    data = (GOLDEN / CUTS["file"]).read_bytes()
    assert len(data) == CUTS["size"]
    offsets = range(1, len(data)) if isinstance(CUTS["plans"][plan], str) else CUTS["plans"][plan]
    assert decode(cut(data, offsets)) == read_whole(data)


@recorded
def test_every_two_pieces(path: Path) -> None:
    """One cut, at every place in turn (in strides, so that a long stream does not take long)."""
    data = path.read_bytes()
    expected = read_whole(data)
    for offset in range(1, len(data), 1 + len(data) // 1500):
        assert decode([data[:offset], data[offset:]]) == expected, f"cut at {offset}"


@recorded
def test_events_of_a_recorded_stream(path: Path) -> None:
    frames = read_whole(path.read_bytes())
    assert list(parse_frames(frames)) == [json.loads(data) for data in frames if data != b"[DONE]"]
    assert (b"[DONE]" in frames) == MANIFEST[path.stem]["done"]


@recorded
def test_any_line_ends(path: Path) -> None:
    """Rewritten with other line ends, whole or in single bytes, a stream says the same."""
    data = path.read_bytes().replace(b"\r\n", b"\n")
    for end in (b"\r", b"\r\n"):
        other = data.replace(b"\n", end)
        assert decode([other]) == read_whole(data)
        assert decode(cut(other, range(1, len(other)))) == read_whole(data)


# The format


@pytest.mark.parametrize(
    ("stream", "frames"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b": comment\n\ndata: a\n: comment\ndata: b\n\n:\n\n", [b"a\nb"]),
        (b"data: a\ndata:b\ndata:\ndata:  c\n\n", [b"a\nb\n\n c"]),
        (b"event: x\nid: 7\nretry: 3\ndata: a\n\n", [b"a"]),
        (b"event: x\n\nid: 7\n\nretry: 3\n\n", []),
        (b"datax: a\n data: b\nDATA: c\nxdata: d\n\n", []),
        (b"data: a", [b"a"]),
        (b"data: a\n", [b"a"]),
        (b"data: a\r", [b"a"]),
        (b"data: a\n\n: end", [b"a"]),
        (b"\n\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"data: a\x00b\x0bc\x0cd\x1ce\n\n", [b"a\x00b\x0bc\x0cd\x1ce"]),
        ("data: a\u2028b\u2029c\u0085d\n\n".encode(), ["a\u2028b\u2029c\u0085d".encode()]),
        ("data: \ufeffa\n\n".encode(), ["\ufeffa".encode()]),
        (b"data: a\n\ndata: [DONE]\n\n", [b"a", b"[DONE]"]),
        (b"data: \ndata: X\n\n", [b"\nX"]),
        (b"data:\r\ndata\r\ndata: X\r\n\r\n", [b"\n\nX"]),
        (b"data: \ndata: \n\ndata: X\n\n", [b"\n", b"X"]),
        (b"data: \n\ndata: X\n\n", [b"X"]),
    ],
)
def test_format(stream: bytes, frames: list[bytes]) -> None:
    assert decode([stream]) == frames
    assert decode(cut(stream, range(1, len(stream)))) == frames
    assert decode([b"", *cut(stream, [len(stream) // 2]), b""]) == frames


def test_a_frame_is_given_as_soon_as_it_is_complete() -> None:
    decoder = SSEDecoder(max_frame_bytes=LIMIT)
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\ndata: b\n\nda") == [b"a", b"b"]
    assert decoder.feed(b"ta: c") == []
    assert decoder.close() == [b"c"]


@pytest.mark.parametrize("offset", range(1, 16))
def test_an_empty_line_of_data_counts_wherever_the_read_ends(offset: int) -> None:
    stream = b"data: \ndata: X\n\n"
    assert decode(cut(stream, [offset])) == [b"\nX"]


def test_bytes_after_done_do_no_harm() -> None:
    stream = b'data: {"type": "a"}\n\ndata: [DONE]\n\n: bye\n\n\x00\xff junk\n\n\r\r'
    assert decode([stream]) == decode(cut(stream, range(1, len(stream)))) == [b'{"type": "a"}', b"[DONE]"]


def test_close_twice() -> None:
    decoder = SSEDecoder(max_frame_bytes=LIMIT)
    decoder.feed(b"data: a")
    assert decoder.close() == [b"a"]
    assert decoder.close() == []


LINE_ENDS: Final = (b"\n", b"\r\n", b"\r")
DATA_LINE: Final = st.binary(max_size=30).map(lambda text: re.sub(rb"[\r\n]", b"", text))
NOISE: Final = st.sampled_from([b": comment", b":", b"event: e", b"id: 1", b"retry: 5", b"other", b"d: 1"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream of any frames, noise lines and line ends, and the frames it holds."""
    end = draw(st.sampled_from(LINE_ENDS))
    written: list[bytes] = []
    frames: list[bytes] = []
    for lines in draw(st.lists(st.lists(DATA_LINE, min_size=1, max_size=4), max_size=8)):
        for line in lines:
            written += draw(st.lists(NOISE, max_size=2))
            written.append(b"data: " + line)
        written += [b""] * draw(st.integers(1, 3))
        frames += [b"\n".join(lines)] if lines != [b""] else []
    return end.join([*written, b""]), frames


@settings(deadline=None)
@given(stream=streams(), offsets=st.lists(st.floats(0, 1), max_size=20))
def test_any_stream_at_any_cuts(stream: tuple[bytes, list[bytes]], offsets: list[float]) -> None:
    data, frames = stream
    assert decode(cut(data, (int(share * len(data)) for share in offsets))) == frames


@settings(deadline=None)
@given(data=st.binary(max_size=300), offsets=st.lists(st.floats(0, 1), max_size=20))
def test_any_bytes_at_any_cuts(data: bytes, offsets: list[float]) -> None:
    """Bytes that are no SSE at all raise nothing and still do not depend on the cuts."""
    assert decode(cut(data, (int(share * len(data)) for share in offsets))) == read_whole(data)


# Limits


def _endless(line: bytes) -> Iterator[bytes]:
    for _ in range(200):
        yield line


@pytest.mark.parametrize(
    "pieces",
    [
        [b"data: " + b"x" * 1001 + b"\n\n"],
        [b"data: " + b"x" * 5000],
        [b"data: ", *_endless(b"x" * 10)],
        [*_endless(b"data: 12345678\n")],
        [*_endless(b"data: 12345678\r\n")],
    ],
    ids=["one frame", "no end", "no end in pieces", "many lines", "many lines, CRLF"],
)
def test_a_frame_over_the_limit(pieces: list[bytes]) -> None:
    with pytest.raises(StreamError):
        decode(pieces, limit=1000)


def test_a_frame_within_the_limit() -> None:
    data = b"x" * 990
    stream = b"data: " + data + b"\n\n"
    assert decode([stream * 5], limit=1000) == [data] * 5
    assert decode(cut(stream, range(1, len(stream))), limit=1000) == [data]


def test_the_limit_is_on_a_frame_not_on_the_stream() -> None:
    stream = b"data: 1234567890\n\n: comment\n\n" * 500
    assert len(decode([stream], limit=100)) == 500
    assert len(decode(cut(stream, range(0, len(stream), 7)), limit=100)) == 500


def _seconds_for(pieces: int) -> float:
    decoder = SSEDecoder(max_frame_bytes=1 << 25)
    piece = b"x" * 256
    started = time.process_time()
    decoder.feed(b"data: ")
    for _ in range(pieces):
        assert decoder.feed(piece) == []
    frames = decoder.feed(b"\n\n")
    assert [len(frame) for frame in frames] == [len(piece) * pieces]
    return time.process_time() - started


def test_time_grows_with_the_bytes_not_with_their_square() -> None:
    """A long line in small pieces is not searched or copied anew for each piece."""
    short, long = (min(_seconds_for(pieces) for _ in range(3)) for pieces in (2_000, 16_000))
    assert long < 24 * short, f"8 times the bytes took {long / short:.0f} times as long"


# Frames to events


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"[DONE]",
        b" [DONE] ",
        b"null",
        b"1",
        b'"text"',
        b"[]",
        b'[{"type": "x"}]',
        b"{",
        b'{"type": "response.created"',
        b'{"type": "a"} {"type": "b"}',
        b"not json",
        b'{"a": "\xff"}',
        b"\xef\xbb",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_not_an_event(data: bytes) -> None:
    assert list(parse_frames([data])) == []


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (b'{"type": "a"}', {"type": "a"}),
        (b' {"type":\n"a"}\n', {"type": "a"}),
        (b"{}", {}),
        (b'{"choices": []}', {"choices": []}),
        (b'{"d": "\\ud83d"}', {"d": "\ud83d"}),
        ('{"d": "\u2028\U0001f600"}'.encode(), {"d": "\u2028\U0001f600"}),
    ],
)
def test_an_event(data: bytes, event: StreamEvent) -> None:
    assert list(parse_frames([data])) == [event]


@pytest.mark.parametrize("kind", [None, 5, ["a"], {"a": 1}])
def test_a_type_that_is_no_text(kind: object) -> None:
    payload = {"type": kind, "a": 1}
    assert list(parse_frames([json.dumps(payload).encode()])) == [payload]
    state = StreamState()
    assert reduce_event(state, payload) == []
    assert state.unknown == {"": 1}
