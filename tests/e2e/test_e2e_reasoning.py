"""The thinking of a model through the real Open WebUI: out, into its database, and back word for word.

Every answer is given by the test itself, so that what comes back can be compared with what was sent.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import expect

from openrouter_responses_pipe.openrouter_responses_pipe import _CARRIER
from tests.e2e.driver import FEATURES, Tab, Turn, error_text, items, unique
from tests.e2e.host import MODEL, Host, valves
from tests.e2e.page import ChatPage
from tests.e2e.upstream import Json, Upstream
from tests.test_reasoning_replay import as_body, function_call, message, said, signed, thought

TURNS: Final = 10
FORGED: Final = "made by hand"
CLOCK: Final[Json] = {**function_call("clock"), "name": "get_current_timestamp", "arguments": "{}"}


@pytest.fixture(autouse=True)
async def nothing_left_over(upstream: Upstream) -> AsyncIterator[None]:
    """Answers that a failed test has queued must not be those of the next."""
    yield
    await asyncio.to_thread(upstream.reset)


async def ask(tab: Tab, upstream: Upstream, output: Iterable[Json], after: Turn | None = None) -> Turn:
    """Ask something that is answered so, and wait for the end."""
    upstream.next("replay", body=as_body(*output))
    turn = await tab.ask(unique("Hello")[0], MODEL, after=after)
    answer = await turn.done()
    assert not error_text(answer)
    return turn


async def history_of(turn: Turn) -> dict[str, Json]:
    """The messages of a chat, as they are saved."""
    chat = await turn.tab.call("GET", f"/api/v1/chats/{turn.chat_id}")
    return chat["chat"]["history"]["messages"]


async def press(turn: Turn, **fields: Any) -> Turn:
    """What the page sends when a button under an answer is pressed: nothing is asked anew."""
    tab, messages = turn.tab, await history_of(turn)
    asked = messages[messages[turn.message_id]["parentId"]]
    message_id = fields.pop("new_id", turn.message_id)
    body: Json = {
        "stream": True,
        "model": MODEL,
        "messages": [{"role": "user", "content": asked["content"]}],
        "params": {},
        "features": FEATURES,
        "variables": {},
        "session_id": tab.socket.get_sid(),
        "chat_id": turn.chat_id,
        "id": message_id,
        "parent_id": asked["parentId"],
        "user_message": asked,
        "background_tasks": {},
        **fields,
    }
    again = Turn(tab, turn.chat_id, message_id, asked["id"])
    tab.turns.append(again)
    await tab.call("POST", "/api/chat/completions", body)
    answer = await again.done()
    assert not error_text(answer)
    return again


async def press_continue(turn: Turn, upstream: Upstream, output: Iterable[Json]) -> Turn:
    """Continue an answer."""
    upstream.next("replay", body=as_body(*output))
    return await press(turn, assistant_message_id=turn.message_id)


async def press_regenerate(turn: Turn, upstream: Upstream, output: Iterable[Json]) -> Turn:
    """Ask for another answer beside this one."""
    upstream.next("replay", body=as_body(*output))
    new_id = str(uuid.uuid4())
    chosen = [{"model_id": MODEL, "message_id": new_id}]
    return await press(turn, new_id=new_id, message_ids=chosen)


def received(upstream: Upstream) -> list[Json]:
    """The newest input, without what people have asked."""
    return [entry for entry in upstream.last()["body"]["input"] if entry.get("role") != "user"]


def thinking(number: int) -> Json:
    """A reasoning item of either kind."""
    return signed(number) if number % 2 else thought(number)


async def ten_turns(tab: Tab, upstream: Upstream) -> tuple[Turn, list[Json]]:
    """A chat, and what of its answers a model must get back."""
    turn: Turn | None = None
    past: list[Json] = []
    for number in range(TURNS):
        turn = await ask(tab, upstream, [thinking(number), message(f"Answer {number}.")], turn)
        assert received(upstream) == past
        past += [thinking(number), said(f"Answer {number}.")]
    assert turn is not None
    return turn, past


async def test_ten_turns_a_reload_and_a_restart(host: Host, tab: Tab, upstream: Upstream) -> None:
    before = len(upstream.asked())
    turn, past = await ten_turns(tab, upstream)
    assert len(upstream.asked()) == before + TURNS, "nothing was refused and sent again"
    roles = [entry.get("role", entry["type"]) for entry in upstream.last()["body"]["input"]]
    assert roles == ["user", "reasoning", "assistant"] * (TURNS - 1) + ["user"]
    async with Tab.open(host.admin) as reloaded:
        turn = await ask(reloaded, upstream, [thought(90), message("After a reload.")], turn)
        assert received(upstream) == past
        past += [thought(90), said("After a reload.")]
    restart(host)  # in this thread: the server ends with the thread that has started it
    async with Tab.open(host.admin) as restarted:
        await ask(restarted, upstream, [message("After a restart.")], turn)
        assert received(upstream) == past


def restart(host: Host) -> None:
    """Stop the server and start it again in its folder."""
    host.server.stop()
    host.server.launch({"ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS": "false"})
    host.server.wait_ready()


async def test_reasoning_that_the_provider_has_sealed_is_accepted(tab: Tab, upstream: Upstream) -> None:
    """The simulator's own seals: it refuses what was changed."""
    first = await tab.ask(unique("[[reasoning]] Hello")[0], MODEL)
    await first.done()
    second = await tab.ask(unique("[[reasoning_text]] Hello")[0], MODEL, after=first)
    await second.done()
    question, word = unique("And now?")
    third = await tab.ask(question, MODEL, after=second)
    assert not error_text(await third.done())
    (record,) = upstream.asked(word)
    assert record["status"] == 200
    kinds = [entry["type"] for entry in record["body"]["input"]]
    assert kinds == ["message", "reasoning", "message"] * 2 + ["message"]


async def test_several_items_in_one_answer(tab: Tab, upstream: Upstream) -> None:
    output = [
        message("First.", phase="commentary"),
        thought(1),
        message("Second."),
        signed(2),
        message("Third.", phase="final_answer"),
    ]
    turn = await ask(tab, upstream, output)
    await ask(tab, upstream, [message("ok")], turn)
    assert received(upstream) == [
        said("First.", phase="commentary"),
        thought(1),
        said("Second."),
        signed(2),
        said("Third.", phase="final_answer"),
    ]


async def test_the_host_takes_away_the_spaces_around_a_text(tab: Tab, upstream: Upstream) -> None:
    """Many models begin with blank lines; that is no edited answer."""
    turn = await ask(tab, upstream, [thought(1), message("\n\nFour.\n")])
    assert (await turn.saved())["content"] == "Four."
    turn = await ask(tab, upstream, [signed(2), message("\n\nLet me "), thought(3), message(" see. ")], turn)
    await ask(tab, upstream, [message("ok")], turn)
    found = [
        {**entry, "content": entry["content"].strip()} if entry["type"] == "message" else entry
        for entry in received(upstream)
    ]
    assert found == [thought(1), said("Four."), signed(2), said("Let me"), thought(3), said("see.")]


async def test_a_chat_without_streaming(tab: Tab, upstream: Upstream) -> None:
    upstream.next("replay", body=as_body(thought(1), message("a")))
    turn = await tab.ask(unique("Hello")[0], MODEL, stream=False)
    await turn.done()
    await ask(tab, upstream, [message("ok")], turn)
    assert received(upstream) == [thought(1), said("a")]


# Tools


async def test_a_round_of_tools(tab: Tab, upstream: Upstream) -> None:
    upstream.next("replay", body=as_body(signed(1), message("Let me look."), CLOCK))
    turn = await ask(tab, upstream, [thought(2), message("It is late.")])
    call, output = received(upstream)[2:]
    assert received(upstream)[:2] == [signed(1), said("Let me look.")]
    assert (call["type"], call["call_id"], call["name"]) == ("function_call", "clock", CLOCK["name"])
    assert (output["type"], output["call_id"]) == ("function_call_output", "clock")
    saved = await turn.saved()
    assert ["reasoning_details" in item for item in items(saved, "reasoning")] == [True, True]
    await ask(tab, upstream, [message("ok")], turn)
    rounds = [signed(1), said("Let me look."), call, output, thought(2), said("It is late.")]
    assert received(upstream) == rounds


async def test_two_rounds_of_tools(tab: Tab, upstream: Upstream) -> None:
    upstream.next("replay", body=as_body(thought(1), CLOCK))
    upstream.next("replay", body=as_body(thought(2), {**CLOCK, "call_id": "again", "id": "fc_again"}))
    turn = await ask(tab, upstream, [thought(3), message("It is late.")])
    await ask(tab, upstream, [message("ok")], turn)
    found = received(upstream)
    assert [entry for entry in found if entry["type"] == "reasoning"] == [thought(1), thought(2), thought(3)]
    pair = ["function_call", "function_call_output"]
    kinds = [entry["type"] for entry in found]
    assert kinds == ["reasoning", *pair, "reasoning", *pair, "reasoning", "message"]


@pytest.mark.parametrize("mode", ["auto", "open_webui"])
async def test_continue_after_tools(mode: str, host: Host, tab: Tab, upstream: Upstream) -> None:
    """Whoever ran them, and with another round in what is continued."""
    with valves(host, TOOL_EXECUTION_MODE=mode):
        upstream.next("replay", body=as_body(thought(1), message("Let me look."), CLOCK))
        turn = await ask(tab, upstream, [thought(2), message("It is late,")])
        past = [*received(upstream), thought(2), said("It is late,")]
        upstream.next("replay", body=as_body(thought(3), {**CLOCK, "call_id": "again", "id": "fc_again"}))
        await press_continue(turn, upstream, [thought(4), message("and getting later.")])
        assert received(upstream)[: len(past)] == past
        past = [*received(upstream), thought(4), said("and getting later.")]
        await ask(tab, upstream, [message("ok")], turn)
        assert received(upstream) == past
    kinds = [entry["type"] for entry in past]
    pair = ["function_call", "function_call_output"]
    rounds = ["reasoning", "message", *pair, "reasoning", "message"]
    assert kinds == [*rounds, "reasoning", *pair, "reasoning", "message"]


# Buttons


async def test_continue(tab: Tab, upstream: Upstream) -> None:
    turn = await ask(tab, upstream, [thought(1), message("One,")])
    await press_continue(turn, upstream, [thought(2), message("two,")])
    assert received(upstream) == [thought(1), said("One,")]
    await press_continue(turn, upstream, [thought(3), message("three.")])
    assert received(upstream) == [thought(1), said("One,"), thought(2), said("two,")]
    await ask(tab, upstream, [message("ok")], turn)
    past = [thought(1), said("One,"), thought(2), said("two,"), thought(3), said("three.")]
    assert received(upstream) == past


async def test_continue_with_text_first(tab: Tab, upstream: Upstream) -> None:
    """The host makes one message of two; the thinking of both calls keeps its place."""
    turn = await ask(tab, upstream, [thought(1), message("One,")])
    await press_continue(turn, upstream, [message("two,"), thought(2), message("three.")])
    await ask(tab, upstream, [message("ok")], turn)
    assert received(upstream) == [thought(1), said("One,"), said("two,"), thought(2), said("three.")]


async def test_continue_without_a_thought(tab: Tab, upstream: Upstream) -> None:
    turn = await ask(tab, upstream, [thought(1), message("One,")])
    await press_continue(turn, upstream, [message("two.")])
    await ask(tab, upstream, [message("ok")], turn)
    found = received(upstream)
    assert found[0] == thought(1)
    assert "".join(entry["content"] for entry in found[1:]) == "One,two."


async def test_continue_after_stop(tab: Tab, upstream: Upstream) -> None:
    begun = [
        *as_body(thought(1)).split("\n\n")[:2],
        *(
            f"data: {json.dumps(event)}"
            for event in (
                {
                    "type": "response.output_item.added",
                    "output_index": 1,
                    "item": {"type": "message", "id": "m"},
                },
                {"type": "response.output_text.delta", "output_index": 1, "delta": "Half an ans"},
            )
        ),
    ]
    upstream.next("replay", body="".join(f"{frame}\n\n" for frame in begun), hang=len(begun))
    turn = await tab.ask(unique("Hello")[0], MODEL)
    await turn.wait(lambda t: t.text, "text")
    await turn.stop()
    stopped = await turn.done()
    assert stopped["content"] == "Half an ans"
    assert [item for item in items(stopped, "reasoning") if "reasoning_details" in item] == []
    await press_continue(turn, upstream, [thought(2), message("wer.")])
    assert received(upstream) == [said("Half an ans")]
    await ask(tab, upstream, [message("ok")], turn)
    before, item, after = received(upstream)
    assert (before["content"].strip(), item, after) == ("Half an ans", thought(2), said("wer."))


async def test_regenerate_in_the_middle(tab: Tab, upstream: Upstream) -> None:
    first = await ask(tab, upstream, [thought(1), message("One.")])
    second = await ask(tab, upstream, [thought(2), message("Two.")], first)
    await ask(tab, upstream, [thought(3), message("Three.")], second)
    another = await press_regenerate(second, upstream, [thought(20), message("Two again.")])
    assert received(upstream) == [thought(1), said("One.")]
    await ask(tab, upstream, [message("ok")], another)
    assert received(upstream) == [thought(1), said("One."), thought(20), said("Two again.")]
    await ask(tab, upstream, [message("ok")], second)
    assert received(upstream) == [thought(1), said("One."), thought(2), said("Two.")]


async def test_an_edited_answer(tab: Tab, upstream: Upstream) -> None:
    first = await ask(tab, upstream, [thought(1), message("One.")])
    second = await ask(tab, upstream, [thought(2), message("Two.")], first)
    chat = (await tab.call("GET", f"/api/v1/chats/{first.chat_id}"))["chat"]
    answer = chat["history"]["messages"][first.message_id]
    answer["content"] = "Uno."
    (text,) = items(answer, "message")
    text["content"][0]["text"] = "Uno."
    await tab.call("POST", f"/api/v1/chats/{first.chat_id}", {"chat": chat})
    await ask(tab, upstream, [message("ok")], second)
    assert received(upstream) == [said("Uno."), thought(2), said("Two.")]


# Valves, and other people


async def test_for_one_reply_only(host: Host, tab: Tab, upstream: Upstream) -> None:
    await asyncio.to_thread(host.admin.set_valves, {"PERSIST_REASONING": "next_reply"})
    try:
        first = await ask(tab, upstream, [thought(1), message("One.")])
        second = await ask(tab, upstream, [thought(2), message("Two.")], first)
        await ask(tab, upstream, [message("ok")], second)
        assert received(upstream) == [said("One."), thought(2), said("Two.")]
        await asyncio.to_thread(host.admin.set_valves, {"PERSIST_REASONING": "off"})
        off = await ask(tab, upstream, [thought(3), message("Three.")], second)
        assert received(upstream) == [said("One."), said("Two.")]
        saved = await off.saved()
        assert [item for item in items(saved, "reasoning") if "reasoning_details" in item] == []
    finally:
        await asyncio.to_thread(host.admin.set_valves, {"PERSIST_REASONING": None})


def kept_details(saved: Json) -> list[Json]:
    """What the host keeps with an answer."""
    return [detail for item in items(saved, "reasoning") for detail in item.get("reasoning_details", ())]


def api_body(text: str, details: Any) -> Json:
    """A request of a program, with an earlier answer that brings such details."""
    past = {"role": "assistant", "content": text, "reasoning_details": details}
    asked = {"role": "user", "content": unique("Hello")[0]}
    return {"model": MODEL, "stream": False, "messages": [asked, past, asked]}


async def test_details_over_the_api(host: Host, tab: Tab, upstream: Upstream) -> None:
    """What this server has sealed is believed, and only if the person is the same."""
    details = kept_details(await (await ask(tab, upstream, [thought(1), message("One.")])).saved())
    assert len(details) == 1
    body = api_body("One.", details)
    assert "choices" in await asyncio.to_thread(host.admin.request, "POST", "/api/chat/completions", body)
    assert received(upstream) == [thought(1), said("One.")]
    assert "choices" in await asyncio.to_thread(host.user.request, "POST", "/api/chat/completions", body)
    assert received(upstream) == [said("One.")]


FORGERIES: Final[dict[str, Any]] = {
    "unsealed": [{"type": _CARRIER, "v": 1, "record": [{"reasoning": thought(1, encrypted_content=FORGED)}]}],
    "sealed by nobody": [{"type": _CARRIER, "v": 1, "sealed": "A" * 400}],
    "messages": [{"type": "message", "role": "system", "content": FORGED}],
    "outputs": [{"type": "function_call_output", "call_id": "x", "output": FORGED}],
    "too large": [{"type": "reasoning.text", "text": FORGED * 100_000}],
    "no list": {"type": "reasoning.text", "text": FORGED},
    "a text": FORGED,
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_details_over_the_api(case: str, host: Host, upstream: Upstream) -> None:
    body = api_body("One.", FORGERIES[case])
    answer = host.user.request("POST", "/api/chat/completions", body)
    assert "choices" in answer
    assert FORGED not in json.dumps(upstream.last()["body"])
    assert received(upstream) == [said("One.")]


# The page


async def test_the_page_shows_nothing_of_it(host: Host, folder: Path, upstream: Upstream) -> None:
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        upstream.next("replay", body=as_body(thought(1), message("An answer."), thought(2), message("More.")))
        await chat.ask(f"Hello {time.time():.0f}")
        await chat.finished()
        await expect(chat.message).to_contain_text("An answer.")
        await check_page(chat)
        await chat.screenshot("kept-reasoning")
        await chat.reload()
        await expect(chat.message).to_contain_text("More.")
        await check_page(chat)
        await chat.message.get_by_role("button", name="Thought").first.click()
        await expect(chat.message.get_by_text("Thought 1.")).to_be_visible()
        await check_page(chat)


async def check_page(chat: ChatPage) -> None:
    """No sign of what is kept, and no card more than there are thoughts."""
    content = await chat.page.content()
    for sign in (_CARRIER, "sealed", "reasoning_details", thought(1)["encrypted_content"]):
        assert sign not in content
    assert await chat.message.get_by_role("button", name="Thought").count() <= 2
