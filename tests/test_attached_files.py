"""Files that are attached to a chat: which go whole, before which question, and what then goes away.

What Open WebUI makes of a chat is made here in the same way: tags for what is attached, and passages of it
before the text of the last question or behind the system prompt.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
from collections.abc import Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatFiles,
    CompletionsBody,
    InputError,
    Intake,
    MediaBlob,
    MediaRef,
    ModelSpec,
    Pipe,
    RequestSettings,
    ResponsesBody,
    _chat_files,
    _missed_files,
    _whole_files,
    _with_files,
    _without_passages,
    plan_intake,
)
from openrouter_responses_pipe.simulator import RecordedRequest, Simulator
from pytest_bootstrap import HostFiles
from tests.media import (
    ALL,
    EVERYTHING,
    MP4,
    OWNER,
    PDF,
    PNG,
    TEXT_ONLY,
    WAV,
    ZIP,
    Site,
    add,
    answer,
    block,
    parts,
    texts,
    translate,
    user,
)
from tests.support import (
    PATIENCE_S,
    SOON_S,
    Events,
    all_ended,
    arguments,
    call,
    inferences,
    set_valves,
)
from tests.test_request_models import JSON, validator

Json = dict[str, Any]
ALWAYS: Final = RequestSettings(native_files="always")
SUPPORTED: Final = RequestSettings(native_files="supported")
FILING: Final = ModelSpec(
    "a/file", "File", input_modalities=frozenset({"text", "file"}), context_length=1_000
)


def entry(file_id: Any, name: Any = "a.pdf", mime: Any = "application/pdf", **changes: Any) -> Json:
    """An attached file as the page of Open WebUI names it."""
    return {
        "type": "file",
        "file": {"id": file_id, "filename": name, "meta": {"name": name, "content_type": mime, "size": 9}},
        "id": file_id,
        "url": file_id,
        "name": name,
        "collection_name": f"file-{file_id}",
        "status": "uploaded",
        "size": 9,
        "error": "",
        "itemId": "item",
        "content_type": mime,
    } | changes


def chat_files(*entries: Any, sources: Sequence[Any] = (), **metadata: Any) -> ChatFiles:
    """What is attached, from the metadata of a request."""
    return _chat_files({"files": list(entries), "sources": list(sources), **metadata})


def whole(*entries: Any, spec: ModelSpec = EVERYTHING, wanted: RequestSettings = ALWAYS) -> dict[str, Json]:
    return _whole_files(chat_files(*entries), spec, wanted)


def address_of(file_id: str) -> str:
    return f"/api/v1/files/{file_id}/content"


# Which


@pytest.mark.parametrize(
    ("attached", "expected"),
    [
        (entry("f"), {"type": "file", "file": {"file_url": address_of("f"), "filename": "a.pdf"}}),
        (entry("f", "a.txt", "text/plain"), "file"),
        (entry("f", "a.csv", "text/csv; charset=utf-8"), "file"),
        (entry("f", "a.json", "application/json"), "file"),
        (entry("f", "a.yml", "application/x-yaml"), "file"),
        (entry("f", "a.wav", "audio/wav"), {"type": "input_audio", "input_audio": {"url": address_of("f")}}),
        (entry("f", "a.mp3", "audio/mpeg"), "input_audio"),
        (entry("f", "a.mp4", "video/mp4"), {"type": "video_url", "video_url": {"url": address_of("f")}}),
        (entry("f", "a.pdf", None, file={"meta": {"content_type": "application/pdf"}}), "file"),
        (entry("f", "a.pdf", None, file=None), "file"),
        (entry("f", "a.pdf", "", file={}), "file"),
        ({"id": "f", "name": "a.pdf"}, "file"),
        (entry("v", url="https://youtu.be/a"), {"type": "video_url", "video_url": {"url": "https://youtu.be/a"}}),
        # Left to the host
        (entry("f", "a.doc", "application/msword"), None),
        (entry("f", "a.png", "image/png"), None),
        (entry("f", "a.ogg", "audio/ogg"), None),
        (entry("f", "a.bin", "application/octet-stream"), None),
        (entry("f", "a", ""), None),
        (entry("f", type="collection"), None),
        (entry("f", type="note"), None),
        (entry("f", type="chat"), None),
        (entry("f", type="folder"), None),
        (entry("f", type=["file"]), None),
        (entry("f", type=None), None),
        (entry(""), None),
        (entry(None), None),
        (entry(["f"]), None),
        (entry("../secret"), None),
        (entry("a b"), None),
        (entry("x" * 65), None),
        ({"type": "web_search", "urls": ["https://a.example"], "name": "q"}, None),
    ],
)  # fmt: skip
def test_what_goes_whole(attached: Json, expected: Any) -> None:
    found = whole(attached)
    if expected is None:
        assert found == {}
        return
    ((key, made),) = found.items()
    assert key == attached["id"]
    assert made == expected if isinstance(expected, dict) else made["type"] == expected


@pytest.mark.parametrize(
    ("input_modalities", "native_files", "kinds"),
    [
        (ALL, "off", ""),
        (ALL, "supported", "pdf text wav mp4 tube"),
        (ALL, "always", "pdf text wav mp4 tube"),
        ({"text"}, "supported", ""),
        ({"text"}, "always", "pdf text"),
        ({"text", "file"}, "supported", "pdf text"),
        ({"text", "audio"}, "supported", "wav"),
        ({"text", "video"}, "always", "pdf text mp4 tube"),
        ({"text", "image"}, "supported", ""),
    ],
)
def test_which_models_get_what(input_modalities: frozenset[str], native_files: Any, kinds: str) -> None:
    spec = EVERYTHING._replace(input_modalities=frozenset(input_modalities))
    found = whole(
        entry("pdf"),
        entry("text", "a.txt", "text/plain"),
        entry("wav", "a.wav", "audio/wav"),
        entry("mp4", "a.mp4", "video/mp4"),
        entry("tube", url="https://www.youtube.com/watch?v=a"),
        spec=spec,
        wanted=RequestSettings(native_files=native_files),
    )
    assert [*found] == kinds.split()


@pytest.mark.parametrize(
    ("size", "goes"), [(9, True), (2_000, True), (2_001, False), (10**300, False), ("x", True), (True, True)]
)
def test_a_long_text_is_left_to_the_host(size: Any, goes: bool) -> None:
    """Half of what the model can read at once, 1,000 tokens here, may be of one text."""
    assert bool(whole(entry("f", "a.txt", "text/plain", size=size), spec=FILING)) is goes
    assert whole(entry("f", size=size), spec=FILING)


def test_of_a_model_whose_length_nobody_knows() -> None:
    """A short text is no risk."""
    assert whole(entry("f", "a.txt", "text/plain"), spec=FILING._replace(context_length=None))


def test_the_knowledge_of_a_model_is_not_sent_whole() -> None:
    known: Json = {
        "model": {"info": {"meta": {"knowledge": [entry("known"), {"id": "c", "type": "collection"}]}}}
    }
    files = chat_files(
        entry("known"), entry("mine"), entry("of folder"), folder_knowledge=[entry("of folder")], **known
    )
    assert [file["id"] for file in files.files] == ["mine"]
    assert [*_whole_files(files, EVERYTHING, ALWAYS)] == ["mine"]


def test_the_same_file_attached_twice() -> None:
    assert [*whole(entry("f"), entry("g"), entry("f", itemId="again"))] == ["f", "g"]


# Before which question


PDF_BLOCKS: Final[dict[str, Json]] = whole(entry("f"), entry("g"), entry("h"))


def placed(messages: Sequence[Json], questions: Sequence[tuple[str, set[str]]]) -> list[str]:
    """The files before each question: "f g" and so on; nothing else has changed."""
    before = copy.deepcopy(messages)
    found = _with_files(messages, PDF_BLOCKS, questions)
    assert messages == before
    assert len(found) == len(messages)
    names: list[str] = []
    for old, new in zip(messages, found, strict=True):
        if old["role"] != "user":
            assert new == old
            continue
        content = new["content"] if isinstance(new["content"], list) else []
        keys = [key for part in content for key, made in PDF_BLOCKS.items() if made == part]
        if not keys:
            assert new == old
        else:
            assert content[: len(keys)] == [PDF_BLOCKS[key] for key in keys]
            rest = content[len(keys) :]
            texts = [{"type": "text", "text": old["content"]}] if old["content"] else []
            assert rest == (texts if isinstance(old["content"], str) else old["content"])
        names.append(" ".join(keys))
    return names


def asked(*questions: Any) -> list[Json]:
    """A chat of these questions, each but the last answered."""
    chat = [message for text in questions for message in ({"role": "user", "content": text}, answer("ok"))]
    return chat[:-1]


def test_each_file_stands_before_its_question() -> None:
    chat = asked("one", "two", "three")
    questions = [("one", {"f"}), ("two", set()), ("three", {"g", "other"})]
    assert placed(chat, questions) == ["f", "", "g h"]


def test_what_nobody_knows_the_place_of_goes_with_the_last_question() -> None:
    assert placed(asked("one", "two"), []) == ["", "f g h"]
    assert placed(asked("one", "two"), [("eins", {"f"}), ("zwei", {"g"})]) == ["", "f g h"]
    assert placed(asked("one"), [("x", {"f"}), ("one", {"g"})]) == ["g f h"]


def test_a_chat_without_questions() -> None:
    assert placed([answer("hello")], [("one", {"f"})]) == []
    assert _with_files(asked("one"), {}, [("one", {"f"})]) == asked("one")


def test_a_file_that_comes_twice_stays_where_it_was() -> None:
    assert placed(asked("one", "two"), [("one", {"f"}), ("two", {"f", "g", "h"})]) == ["f", "g h"]


def test_the_same_question_twice() -> None:
    questions: list[tuple[str, set[str]]] = [("go on", {"f"}), ("go on", set()), ("go on", {"g"})]
    assert placed(asked("go on", "go on", "go on"), questions) == ["f", "", "g h"]


def test_a_chat_whose_beginning_was_summed_up() -> None:
    questions = [("one", {"f"}), ("two", {"g"}), ("three", {"h"}), ("four", set())]
    assert placed(asked("three", "four"), questions) == ["h", "f g"]


def test_a_continued_answer() -> None:
    """The question is not the last message."""
    assert placed([*asked("one", "two"), answer("half")], [("one", {"f"}), ("two", {"g", "h"})]) == [
        "f",
        "g h",
    ]


@pytest.mark.parametrize("prompt", ["shorter", "Read it again, but shorter", "two"])
def test_a_regeneration_with_a_prompt(prompt: str) -> None:
    """The host puts that behind as one more question, which may hold another's words."""
    chat = [*asked("it"), answer("so"), {"role": "user", "content": prompt}]
    assert placed(chat, [("it", {"f", "g", "h"})]) == ["f g h", ""]
    chat = [*asked("it", "two"), answer("so"), {"role": "user", "content": prompt}]
    assert placed(chat, [("it", {"f", "g", "h"}), ("two", set())]) == ["f g h", "", ""]


def test_a_short_question_is_not_found_within_others() -> None:
    """A filter has rewritten the last one."""
    chat = asked("I", "I would like a banana split, please.")
    assert placed(chat, [("I", {"f", "g", "h"}), ("banana?", set())]) == ["f g h", ""]


def tags(*entries: Json) -> str:
    """What Open WebUI writes before a question when the model can look into files itself."""
    lines = [
        f'<file type="{file["type"]}" id="{file["id"]}" url="{file["url"]}"'
        f' content_type="{file["content_type"]}" name="{file["name"]}"/>'
        for file in entries
    ]
    return "<attached_files>\n" + "\n".join(lines) + "\n</attached_files>\n\n"


def test_a_question_behind_tags() -> None:
    chat = asked(
        tags(entry("f")) + "one", [{"type": "text", "text": tags(entry("g"))}, *user("two")["content"]]
    )
    assert placed(chat, [("one", {"f"}), ("two", {"g", "h"})]) == ["f", "g h"]


def test_a_question_of_files_alone() -> None:
    chat = asked(tags(entry("f")), tags(entry("g")), "three")
    assert placed(chat, [("", {"f"}), ("  ", {"g"}), ("three", {"h"})]) == ["f", "g", "h"]


def test_a_word_in_the_tags_of_another_question() -> None:
    """The second is a file of the kind that is left to the host, and no words."""
    chat = asked("report", tags(entry("w", "report.docx", "application/msword")), "three")
    assert placed(chat, [("report", {"f"}), ("", {"w"}), ("three", {"g", "h"})]) == ["f", "", "g h"]


@settings(max_examples=300, deadline=None)
@given(
    questions=st.lists(
        st.tuples(st.sampled_from(["a", "ab", "b", "a b", " a ", "f"]), st.sets(st.sampled_from("fghx"))),
        min_size=1,
        max_size=6,
    ),
    kept=st.integers(1, 6),
)
def test_what_was_sent_once_stays_where_it_was(questions: list[tuple[str, set[str]]], kept: int) -> None:
    """At every turn of any chat; of one that was summed up the last question has what is left over."""
    for end in range(1, len(questions) + 1):
        known = questions[:end]
        shown = known[-kept:]
        found = placed(asked(*(text for text, _ in shown)), known)
        seen: set[str] = set()
        expected: list[str] = []
        for _, keys in shown:
            expected.append(" ".join(key for key in PDF_BLOCKS if key in keys - seen))
            seen |= keys
        assert found[:-1] == expected[:-1]
        assert {*found[-1].split()} == {*expected[-1].split(), *(PDF_BLOCKS.keys() - seen)}


# Passages that the host has found


PASSAGES: Final = '<source id="1" name="a.pdf" resource-id="f">A passage.</source>'
TEMPLATE: Final = (
    '### Task:\nRespond to the user query (e.g., <source id="1">).\n\n<context>\n{}\n</context>\n'
)


def with_passages(message: Json, passages: str = PASSAGES, *, behind: bool = False) -> Json:
    """A message with passages before its texts, or behind them, as the host puts them."""

    def joined(text: str) -> str:
        said = TEMPLATE.format(passages)
        return f"{text}\n{said}" if behind else f"{said}\n{text}"

    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": joined(content)}
    blocks = [{**part, "text": joined(part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": blocks}


def source(file: Json | None) -> Json:
    return {
        "source": file or {"name": "search"},
        "document": ["A passage."],
        "metadata": [{"source": "a.pdf"}],
    }


def files_with(prompt: Any, *sources: Json, system: Any = None) -> ChatFiles:
    return chat_files(entry("f"), sources=sources, base_user_prompt=prompt, base_system_prompt=system)


SENT_WHOLE: Final = frozenset({"f", "g"})
SYSTEM: Final[Json] = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "question",
    [
        {"role": "user", "content": "why?"},
        {"role": "user", "content": tags(entry("f")) + "why?"},
        {"role": "user", "content": f"{PASSAGES} was in my own words"},
        {"role": "user", "content": "two\n\nlines\n"},
        user("why?"),
        user(block("image", "data:image/png;base64,AAAA"), "why?"),
        user(tags(entry("f")), "why?", block("image", "data:image/png;base64,AAAA"), "and?"),
    ],
)
@pytest.mark.parametrize("later", [[], [answer("half an answer")]])
def test_passages_of_what_is_sent_whole_go_away(question: Json, later: list[Json]) -> None:
    content = question["content"]
    prompt = content if isinstance(content, str) else next(part["text"] for part in content if "text" in part)
    chat = [SYSTEM, *asked("one", "two"), answer("ok"), with_passages(question), *later]
    before = copy.deepcopy(chat)
    found = _without_passages(chat, files_with(prompt, source(entry("f"))), SENT_WHOLE)
    assert chat == before
    want = question if isinstance(content, list) else user(content)
    assert [*found] == [*chat[: -1 - len(later)], want, *later]


@pytest.mark.parametrize("system", ["Be brief.", "", None])
def test_passages_behind_the_system_prompt(system: str | None) -> None:
    content = f"{system}\n{TEMPLATE.format(PASSAGES)}" if system else TEMPLATE.format(PASSAGES)
    chat = [{"role": "system", "content": content}, *asked("one", "why?")]
    found = _without_passages(chat, files_with("why?", source(entry("f")), system=system), SENT_WHOLE)
    assert [*found] == [{"role": "system", "content": system or ""}, *chat[1:]]


@pytest.mark.parametrize("system", ["Be brief.\n", ""])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_what_a_filter_adds_to_the_system_prompt_stays(system: str, place: str) -> None:
    """Filters run after the host has put its passages there."""
    passages = TEMPLATE.format(PASSAGES)
    content = (
        f"{system}{passages}\nToday is Monday."
        if place == "behind"
        else f"Today is Monday.\n{system}{passages}"
    )
    chat = [{"role": "system", "content": content}, *asked("why?")]
    files = files_with("why?", source(entry("f")), system=system.strip() or None)
    found = _without_passages(chat, files, SENT_WHOLE)
    assert "Today is Monday." in found[0]["content"]


@pytest.mark.parametrize(
    "sources",
    [
        [],
        [source(None)],
        [source(entry("f")), source(None)],
        [source(entry("f")), source(entry("refused"))],
        [source({"id": "c", "type": "collection", "name": "Knowledge"})],
        [source(entry("f")), {}],
        [source(entry("f")), {"source": "f"}],
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_passages_of_anything_else_stay(sources: list[Json], behind: bool) -> None:
    chat = [SYSTEM, *asked("one", "why?")]
    place = 0 if behind else -1
    chat[place] = with_passages(chat[place], behind=behind)
    assert _without_passages(chat, files_with("why?", *sources, system="Be brief."), SENT_WHOLE) == chat


@pytest.mark.parametrize(
    ("prompt", "system"),
    [("other words", "Other words."), ("", None), (None, None), ("why", "brief.")],
)
def test_prompts_that_do_not_match_are_left_alone(prompt: Any, system: Any) -> None:
    chat = [with_passages(SYSTEM, behind=True), *asked("one", "two"), with_passages(asked("why?")[0])]
    if system is None:
        chat[0] = SYSTEM
    assert [
        *_without_passages(chat, files_with(prompt, source(entry("f")), system=system), SENT_WHOLE)
    ] == chat


def test_a_continued_chat_whose_passages_are_a_question_of_their_own() -> None:
    """Behind an answer the host adds them as a message, which is no question of the person's."""
    chat = [*asked("why?"), answer("half"), {"role": "user", "content": TEMPLATE.format(PASSAGES)}]
    found = _without_passages(chat, files_with("why?", source(entry("f"))), SENT_WHOLE)
    assert PASSAGES not in str(found)


# What reaches the model in no way


def test_what_is_missed() -> None:
    capabilities: Json = {"model": {"info": {"meta": {"capabilities": {"file_context": False}}}}}
    files = chat_files(
        entry("f"), entry("w", "my\nreport.docx", "x/y"), entry("u", None, "x/y"), **capabilities
    )
    blocks = _whole_files(files, EVERYTHING, ALWAYS)
    assert _missed_files(files, blocks, False) == (
        "Not sent to the model: my report.docx. Open WebUI looks into no files for it.",
        "Not sent to the model: a file. Open WebUI looks into no files for it.",
    )
    assert _missed_files(files, blocks, True) == ()
    assert _missed_files(files._replace(is_retrieved=True), blocks, False) == ()
    assert _missed_files(chat_files(entry("f"), **capabilities), blocks, False) == ()


@pytest.mark.parametrize(
    "meta",
    [{}, {"capabilities": None}, {"capabilities": []}, {"capabilities": {"file_context": True}}, None, "x"],
)
def test_who_looks_into_files_unless_told_not_to(meta: Any) -> None:
    assert chat_files(entry("f"), model={"info": {"meta": meta}}).is_retrieved


# Over the pipe


MODEL: Final = "google/gemini-2.5-flash"  # takes everything
BLIND: Final = "meta-llama/llama-3.3-70b-instruct"  # takes text


def given_files(
    messages: list[Json], *entries: Any, of: str = MODEL, dialect: str = "browser", **metadata: Any
) -> Json:
    """The arguments of a request with these files attached."""
    given_arguments = arguments({"messages": messages, "model": f"openrouter.{of}"}, dialect)
    given_arguments["__metadata__"] |= {"files": list(entries), "user_message_id": "q", **metadata}
    return given_arguments


def sent(simulator: Simulator) -> RecordedRequest:
    """The last request; it is valid."""
    record = inferences(simulator)[-1]
    validator().validate(record.body)
    return record


def told(given_arguments: Json) -> list[str]:
    """The warnings that the person has got."""
    return [data["content"] for data in given_arguments["__event_emitter__"].of("notification")]


def questions_of(body: Json) -> list[list[Json]]:
    return [item["content"] for item in body["input"] if item.get("role") == "user"]


def encoded(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


async def test_files_of_a_chat_over_its_turns(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    """Each is sent again at its place, before the question that it came with."""
    set_valves(pipe, simulator.base_url, NATIVE_FILES="supported")
    first, _ = add(files, PDF, "a.pdf")
    second, _ = add(files, b"hello", "b.txt")
    entries = [entry(first), entry(second, "b.txt", "text/plain")]
    files.messages["chat"] = {
        "p": {"id": "p", "parentId": None, "role": "user", "content": "one", "files": [entries[0]]},
        "pa": {"id": "pa", "parentId": "p", "role": "assistant", "content": "ok"},
        "q": {"id": "q", "parentId": "pa", "role": "user", "content": "hello", "files": [entries[1]]},
    }
    chat = asked("one", "hello")
    given_arguments = given_files(chat, *entries)
    assert not (await call(pipe, given_arguments)).error
    pdf = {"type": "input_file", "filename": "a.pdf", "file_data": encoded(PDF, "application/pdf")}
    assert questions_of(sent(simulator).body) == [
        [pdf, {"type": "input_text", "text": "one"}],
        [
            {"type": "input_text", "text": '<file name="b.txt">\nhello\n</file>'},
            {"type": "input_text", "text": "hello"},
        ],
    ]
    assert told(given_arguments) == []


async def test_off_is_off(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    file_id, _ = add(files, PDF, "a.pdf")
    chat = [with_passages(asked("hello")[0])]
    given_arguments = given_files(
        chat, entry(file_id), sources=[source(entry(file_id))], base_user_prompt="hello"
    )
    await call(pipe, given_arguments)
    (question,) = questions_of(sent(simulator).body)
    assert question == [{"type": "input_text", "text": chat[0]["content"]}]


@pytest.mark.parametrize("is_there", [True, False])
async def test_passages_stay_where_the_file_could_not_be_had(
    is_there: bool, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    set_valves(pipe, simulator.base_url, NATIVE_FILES="always")
    file_id, _ = add(files, PDF, "a.pdf", owner=OWNER if is_there else "other")
    chat = [with_passages(asked("hello")[0])]
    given_arguments = given_files(
        chat, entry(file_id), of=BLIND, sources=[source(entry(file_id))], base_user_prompt="hello"
    )
    await call(pipe, given_arguments)
    ((*others, last),) = questions_of(sent(simulator).body)
    assert [part["type"] for part in others] == ["input_file"] * is_there
    assert last["text"] == ("hello" if is_there else chat[0]["content"])
    words = "Not sent to the model: a.pdf. There is no such file, or it is not yours."
    assert told(given_arguments) == ([] if is_there else [words])


async def test_a_task_gets_no_files(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    set_valves(pipe, simulator.base_url, NATIVE_FILES="always")
    file_id, _ = add(files, PDF, "a.pdf")
    await call(pipe, given_files(asked("hello"), entry(file_id), dialect="task"))
    assert questions_of(sent(simulator).body) == [[{"type": "input_text", "text": "hello"}]]


@pytest.mark.parametrize("chat_id", ["temporary:x", "chat"])
async def test_a_chat_that_is_not_saved(
    chat_id: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    set_valves(pipe, simulator.base_url, NATIVE_FILES="always")
    file_id, _ = add(files, PDF, "a.pdf")
    await call(pipe, given_files(asked("one", "hello"), entry(file_id), chat_id=chat_id))
    assert [len(question) for question in questions_of(sent(simulator).body)] == [1, 2]


async def test_where_a_chat_cannot_be_read(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    async def fail(what: str, row_id: str) -> None:
        if what == "messages":
            raise ConnectionError

    set_valves(pipe, simulator.base_url, NATIVE_FILES="always")
    file_id, _ = add(files, PDF, "a.pdf")
    files.hook = fail
    assert not (await call(pipe, given_files(asked("one", "hello"), entry(file_id)))).error
    assert [len(question) for question in questions_of(sent(simulator).body)] == [1, 2]


async def test_media_of_a_chat_reach_the_model(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    """All that can be named in one question, and what an answer shows."""
    shown = add(files, PNG, "b.png")[1]
    named = [
        block("image", add(files, PNG, "a.png")[1]),
        block("file", add(files, PDF, "a.pdf")[1]),
        block("audio", add(files, WAV, "a.wav")[1]),
        block("video", add(files, MP4, "a.mp4")[1]),
    ]
    chat = [user("draw"), answer(f"![x]({shown})"), user("hello", *named)]
    given_arguments = given_files(chat)
    assert not (await call(pipe, given_arguments)).error
    _, question = questions_of(sent(simulator).body)
    assert [part["type"] for part in question] == [
        *(
            "input_text",
            "input_image",
            "input_text",
            "input_image",
            "input_file",
            "input_audio",
            "input_video",
        ),
    ]
    assert told(given_arguments) == []


async def test_what_is_refused_is_told(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    _, address = add(files, ZIP, "secret.png", owner="other")
    given_arguments = given_files([user("hello", block("image", address), block("image", address))])
    assert not (await call(pipe, given_arguments)).error
    assert told(given_arguments) == [
        "Not sent to the model: a picture. There is no such file, or it is not yours."
    ]


async def test_remote_media_of_a_trusted_host(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    address = site.put(PNG)
    (trusted,) = site.trusted
    set_valves(pipe, simulator.base_url, ALLOW_HTTP_HOSTS=f"x.example, {trusted}")
    given_arguments = given_files([user("hello", block("image", address))])
    for _ in range(2):
        await call(pipe, given_arguments)
        ((_, part),) = questions_of(sent(simulator).body)
        assert part["image_url"] == encoded(PNG, "image/png")
    assert site.asked == ["/a.png"]
    assert files.links[0][:2] == ("chat", "message")


# Slow files


class Watcher(Events):
    """An event emitter that says when a status has come."""

    def __init__(self) -> None:
        super().__init__()
        self.told = asyncio.Event()

    async def __call__(self, event: Json) -> None:
        """Take one event."""
        await super().__call__(event)
        if event["type"] == "status" and "Fetching" in str(event["data"].get("description")):
            self.told.set()


@pytest.mark.parametrize("has_it", [True, False])
async def test_who_waits_is_told_what_for(
    has_it: bool, pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    """The site answers when the status has come; then the status goes away."""
    watcher = Watcher()

    async def wait_for_status(path: str) -> None:
        await asyncio.wait_for(watcher.told.wait(), PATIENCE_S)

    site.before = wait_for_status
    address = site.put(PNG) if has_it else f"{site.base}/gone.png"
    set_valves(pipe, simulator.base_url, ALLOW_HTTP_HOSTS=",".join(site.trusted))
    given_arguments = given_files([user("hello", block("image", address))])
    given_arguments["__event_emitter__"] = watcher
    assert not (await call(pipe, given_arguments)).error
    statuses = [data for data in watcher.of("status") if "the files of this chat" in data["description"]]
    assert [(data["description"].split()[0], data["done"]) for data in statuses] == [
        ("Fetching", False),
        ("Fetched", True),
    ]


async def test_a_deadline_ends_the_waiting(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    """No connection is left open, and no status either."""
    gone = asyncio.Event()

    async def hang(path: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()

    site.before = hang
    set_valves(pipe, simulator.base_url, ALLOW_HTTP_HOSTS=",".join(site.trusted), REQUEST_DEADLINE_SECONDS=2)
    given_arguments = given_files([user("hello", block("image", site.put(PNG)))])
    result = await call(pipe, given_arguments)
    assert "longer than" in result.error
    await asyncio.wait_for(gone.wait(), SOON_S)
    assert inferences(simulator) == []
    statuses = given_arguments["__event_emitter__"].of("status")
    assert "Fetching the files of this chat" in [data["description"] for data in statuses]
    assert statuses[-1]["done"]


async def test_stop_while_a_file_is_fetched(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    came, gone = asyncio.Event(), asyncio.Event()

    async def hang(path: str) -> None:
        came.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()

    site.before = hang
    set_valves(pipe, simulator.base_url, ALLOW_HTTP_HOSTS=",".join(site.trusted))
    before = asyncio.all_tasks()
    asking = asyncio.create_task(call(pipe, given_files([user("hello", block("image", site.put(PNG)))])))
    await asyncio.wait_for(came.wait(), PATIENCE_S)
    asking.cancel()
    async with asyncio.timeout(SOON_S):
        with pytest.raises(asyncio.CancelledError):
            await asking
    await all_ended(before)
    await asyncio.wait_for(gone.wait(), SOON_S)
    assert inferences(simulator) == []
    assert files.rows == {}


# Hostile metadata


HOSTILE: Final[list[Any]] = [
    None,
    5,
    "x",
    True,
    [],
    {},
    [[]],
    [None],
    ["x"],
    [5],
    {"id": "x"},
    [{}],
    [{"id": []}],
]


@pytest.mark.parametrize("junk", HOSTILE, ids=repr)
async def test_metadata_of_any_kind(junk: Any, pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    set_valves(pipe, simulator.base_url, NATIVE_FILES="always")
    file_id, _ = add(files, PDF, "a.pdf")
    names = [
        "files",
        "sources",
        "folder_knowledge",
        "base_user_prompt",
        "base_system_prompt",
        "user_message_id",
        "model",
    ]
    for name in names:
        given_arguments = given_files(asked("hello"), entry(file_id), **{name: junk})
        assert not (await call(pipe, given_arguments)).error, name
    for meta in ({"knowledge": junk}, {"capabilities": junk}, junk):
        given_arguments = given_files(
            asked("hello"), entry(file_id), model={"id": "m", "info": {"meta": meta}}
        )
        assert not (await call(pipe, given_arguments)).error, meta
    for name in entry("f"):
        given_arguments = given_files(asked("hello"), entry(file_id, **{name: junk}))
        assert not (await call(pipe, given_arguments)).error, name
    for message in (junk, {"role": "user", "parentId": junk, "content": junk, "files": junk}):
        files.messages["chat"] = {"q": message}
        assert not (await call(pipe, given_files(asked("hello"), entry(file_id)))).error


@pytest.mark.parametrize(
    "address",
    [
        "https://[bad", "https://[", "https://]", "https://a:b:c/", "https://a.example:99999999999/", "https:///x",
        "https://", "http://", "https://\N{SNOWMAN}.example/%zz", "HTTPS://A.EXAMPLE", "https://a b",
        "//[x", "data:", "data:,", "data:image/png;base64", "data:;base64,AAAA", "/api/v1/files//content",
        "/api/v1/files/", "\0", "\ud800", " ", "https://a.example/" + "a" * 10_000, "[", "https://a.example/\ud800",
    ],
)  # fmt: skip
@pytest.mark.parametrize("keeps", [True, False])
async def test_addresses_of_any_kind(
    address: str, keeps: bool, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """In every kind of block, in an answer, as an attached file, in its name."""
    set_valves(pipe, simulator.base_url, NATIVE_FILES="always", SAVE_REMOTE_MEDIA=keeps)
    for kind in ("image", "file", "audio", "video"):
        chat = [
            answer(f"![x]({address})"),
            answer([block("image", address)]),
            user("hello", block(kind, address)),
        ]
        result = await call(pipe, given_files(chat))
        assert "Something went wrong" not in result.error, kind
        assert result.text or result.error
    named = {"type": "file", "file": {"file_data": "QUJD", "filename": address}}
    result = await call(pipe, given_files([user("hello", named)], entry("f", address, None, url=address)))
    assert result.text or "Something went wrong" not in result.error


# Any chat and anything that could be had


ADDRESSES: Final = st.sampled_from(
    [
        address_of("f"),
        "https://a.example/a.pdf",
        "http://a.example/a",
        "https://[bad",
        "https://youtu.be/a",
        encoded(PNG, "image/png"),
        encoded(PDF, "application/pdf"),
        "AAAA",
        "f",
        "",
    ]
)
MEDIA_BLOCKS: Final = st.one_of(
    st.builds(block, st.sampled_from(["image", "file", "audio", "video"]), ADDRESSES | JSON),
    st.builds(
        lambda kind, field, value: {"type": kind, field: value},
        st.sampled_from(["file", "input_file", "input_image", "input_audio", "input_video", "text"]),
        st.sampled_from(["file", "image_url", "file_id", "file_data", "file_url", "video_url"]),
        ADDRESSES
        | JSON
        | st.dictionaries(
            st.sampled_from(["url", "file_id", "file_data", "filename", "data"]), ADDRESSES | JSON
        ),
    ),
    st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=5)),
    JSON,
)  # fmt: skip
MARKDOWN: Final = st.lists(
    st.builds(lambda address: f"![x]({address})", ADDRESSES) | st.sampled_from(["text", "![", "](", '"', "<"])
).map(" ".join)
CHAT: Final = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "user", "assistant", "assistant", "system", "tool"]),
            "content": st.lists(MEDIA_BLOCKS, max_size=4) | MARKDOWN | JSON,
        }
    ),
    min_size=1,
    max_size=6,
)
NAMES: Final = st.sampled_from(["", "a.pdf", 'a"\n<b>.txt', "//[x", "x" * 300]) | st.text(max_size=4)
BLOBS: Final = st.one_of(
    st.builds(MediaBlob, reason=st.sampled_from(["many pictures", "refused", "It is not there"]), name=NAMES),
    st.builds(MediaBlob, text=st.text(min_size=1, max_size=9), name=NAMES, mime=st.just("text/plain")),
    st.builds(
        MediaBlob,
        url=st.sampled_from(
            [encoded(PNG, "image/png"), encoded(PDF, "application/pdf"), encoded(WAV, "audio/wav")]
        ),
        name=NAMES,
        mime=st.sampled_from(["image/png", "application/pdf", "audio/wav", "audio/mpeg", "video/mp4"]),
    ),
)  # fmt: skip
ENTRIES: Final = st.dictionaries(
    st.sampled_from([*entry("f")]), st.sampled_from(["f", "file", "a.pdf", "text/plain"]) | ADDRESSES | JSON
)
SETTINGS: Final = st.builds(
    lambda **changes: RequestSettings(**changes),
    most_images=st.integers(0, 3),
    answer_images=st.booleans(),
    keeps_media=st.booleans(),
    native_files=st.sampled_from(["off", "supported", "always"]),
    trusted_hosts=st.sampled_from([frozenset(), frozenset({"a.example"})]),
)
SPECS: Final = st.sampled_from([EVERYTHING, TEXT_ONLY, FILING])


@settings(max_examples=400, deadline=None)
@given(
    chat=CHAT,
    data=st.data(),
    metadata=st.dictionaries(
        st.sampled_from(["files", "sources", "base_user_prompt", "base_system_prompt", "folder_knowledge"]),
        st.lists(ENTRIES | JSON, max_size=3) | JSON | st.text(max_size=3),
    ),
    wanted=SETTINGS,
    spec=SPECS,
)
def test_any_chat_with_anything_that_could_be_had(
    chat: list[Json], data: st.DataObject, metadata: Json, wanted: RequestSettings, spec: ModelSpec
) -> None:
    """A valid body, or a sentence; each picture's limit is kept; nothing raises anything else."""
    files = _chat_files(metadata)
    blocks = _whole_files(files, spec, wanted)
    questions = data.draw(
        st.lists(st.tuples(st.text(max_size=2), st.sets(st.sampled_from("fgh"))), max_size=3)
    )
    messages = _with_files(chat, blocks, questions)
    plan = plan_intake(messages, spec, wanted)
    media = {ref: data.draw(BLOBS) for ref in plan.media}
    messages = _without_passages(messages, files, frozenset(blocks))
    missed = _missed_files(files, blocks, data.draw(st.booleans()))
    body = CompletionsBody.parse({"model": spec.id, "messages": [*messages]})
    result = None
    with contextlib.suppress(InputError):
        result = ResponsesBody.from_completions(body, spec, wanted, Intake(media=media))
    if result is None:
        return
    validator().validate(result.payload)
    json.dumps(result.payload)
    kinds = [part["type"] for part in parts(result)]
    assert kinds.count("input_image") <= wanted.most_images
    for notice in (*result.notices, *missed):
        assert "\n" not in notice
        assert notice.endswith(".")
    again = ResponsesBody.from_completions(body, spec, wanted, Intake(media=media))
    assert again == result


@settings(max_examples=200, deadline=None)
@given(
    files=st.lists(ENTRIES | JSON, max_size=4) | JSON, native_files=st.sampled_from(["supported", "always"])
)
def test_any_attached_files(files: Any, native_files: Any) -> None:
    found = _chat_files({"files": files})
    made = _whole_files(found, EVERYTHING, RequestSettings(native_files=native_files))
    result = translate([*_with_files(asked("x"), made, [])], media=dict[MediaRef, MediaBlob]())
    assert texts(result) == ["x"]
