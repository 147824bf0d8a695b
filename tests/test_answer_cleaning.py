"""What an earlier answer holds that no model has written is left out of what a model is sent."""

from __future__ import annotations

import time
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    CompletionsBody,
    ModelSpec,
    ResponsesBody,
    _clean_answer,
)

ULID: Final = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
MARK: Final = f"[{ULID}]: #"
REASONING: Final = '<details type="reasoning" done="true" duration="12">'
OLD_REASONING: Final = (
    f"{REASONING}\n<summary>Thought for 12 seconds</summary>\n&gt; Adding two.\n&gt; Done.\n</details>\n"
)
OLD_CALL: Final = (
    '<details type="tool_calls" done="true" id="call_1" name="get_time" arguments="&quot;{}&quot;" '
    'result="&quot;noon&quot;" files="">\n<summary>Tool Executed</summary>\n</details>\n'
)
OLD_CODE: Final = (
    '<details type="code_interpreter" done="true" output="1">\n<summary>Analyzed</summary>\n'
    "```python\n1\n```\n</details>\n"
)
THINK: Final = "<think>\nAdding two.\n</think>\n"

# an answer as it was saved -> as the model is sent it
CLEANED: Final[dict[str, tuple[str, str]]] = {
    "mark at the end": (f"Four.\n{MARK}", "Four.\n"),
    "mark at the beginning": (f"{MARK}\nFour.", "Four."),
    "mark between": (f"Four.\n{MARK}\nFive.", "Four.\nFive."),
    "marks in a row": (f"Four.\n{MARK}\n{MARK}\n{MARK}\n", "Four.\n"),
    "mark with words behind it": (f"Four.\n{MARK} (kept)\nFive.", "Four.\nFive."),
    "mark that is moved in": (f"Four.\n  \t{MARK}\nFive.", "Four.\nFive."),
    "nothing but a mark": (MARK, ""),
    "old reasoning": (f"{OLD_REASONING}Four.", "Four."),
    "old reasoning, then lines": (f"{OLD_REASONING}\n\nFour.", "Four."),
    "old reasoning between": (f"Four.\n{OLD_REASONING}Five.", "Four.\nFive."),
    "old call": (f"{OLD_CALL}It is noon.", "It is noon."),
    "old code": (f"{OLD_CODE}One.", "One."),
    "several blocks": (f"{OLD_REASONING}A\n{OLD_CALL}{OLD_REASONING}\nB", "A\nB"),
    "blocks at the end": (f"A\n{OLD_CALL}{OLD_REASONING}", "A\n"),
    "type is not the first": ('<details done="true" type="reasoning">\nx\n</details>\nA', "A"),
    "block without a line of its own": (f"A {OLD_REASONING}B", "A B"),
    "thoughts in tags": (f"{THINK}Four.", "Four."),
    "thoughts in tags between": (f"Three.\n{THINK}\nFour.", "Three.\nFour."),
    "thoughts that are moved in": (f"  {THINK}Four.", "Four."),
    "thoughts on one line": ("<think>hm</think>Four.", "Four."),
    "nothing but thoughts": (THINK, ""),
    "all at once": (f"{THINK}{OLD_REASONING}Four.\n{OLD_CALL}Five.\n{MARK}\n", "Four.\nFive.\n"),
    "code after thoughts keeps its form": (f"{THINK}\n    four()\n", "    four()\n"),
}
# what stays as it is
KEPT: Final[dict[str, str]] = {
    "nothing": "",
    "plain": "Four.",
    "spaces": "  Four.  \n\n",
    "links": "See [1].\n\n[1]: https://example.org\n[note]: #here\n",
    "mark within a line": f"The mark is {MARK} here.",
    "too short for a mark": f"[{ULID[:-1]}]: #\n",
    "too long for a mark": f"[{ULID}X]: #\n",
    "letters that no mark has": f"[{ULID[:-1]}U]: #\n",
    "small letters": f"[{ULID.lower()}]: #\n",
    "mark without its end": f"[{ULID}]:\n",
    "details of the author": "<details>\n<summary>More</summary>\nText\n</details>\n",
    "details with a name": '<details open name="reasoning">\nText\n</details>\n',
    "details of another type": '<details type="note">\nText\n</details>\n',
    "details without an end": f"{REASONING}\nText",
    "details that are only spoken of": 'Use a <details> element and type="reasoning".\n</details>',
    "details in another case": '<DETAILS TYPE="REASONING">x</DETAILS>',
    "thoughts without an end": "<think>\nFour.",
    "thoughts without a beginning": "Four.\n</think>\n",
    "tag within a line": "Models write `<think>` and `</think>` around thoughts.",
    "another tag": "<thinking>\nhm\n</thinking>\n",
}


@pytest.mark.parametrize("case", CLEANED)
def test_what_is_left_out(case: str) -> None:
    saved, expected = CLEANED[case]
    assert _clean_answer(saved) == expected
    assert _clean_answer(expected) == expected


@pytest.mark.parametrize("case", KEPT)
def test_what_stays(case: str) -> None:
    assert _clean_answer(KEPT[case]) == KEPT[case]


@pytest.mark.parametrize("case", CLEANED)
def test_what_the_model_is_sent(case: str) -> None:
    saved, expected = CLEANED[case]
    asked: dict[str, Any] = {"role": "user", "content": saved}
    messages = [asked, {"role": "assistant", "content": saved}, asked]
    body = CompletionsBody.parse({"model": "m", "messages": messages})
    items = ResponsesBody.from_completions(body, ModelSpec("a/b", "B")).payload["input"]
    answers = [item["content"] for item in items if item["role"] == "assistant"]
    assert answers == ([expected] if expected.strip() else [])
    questions = [item["content"][0]["text"] for item in items if item["role"] == "user"]
    assert questions == [saved, saved], "what a person writes is left alone"


# Any text

PIECES: Final = st.sampled_from(
    [
        *(MARK, REASONING, OLD_CALL, OLD_CODE, THINK, "<details", "</details>", "<think>", "</think>"),
        *("\n", " ", "A", "text", "]: #", 'type="reasoning"', ">", "<details>", f"[{ULID}]"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(text=st.text())
def test_text_without_such_marks_is_unchanged(text: str) -> None:
    if not any(sign in text for sign in ("]: #", "<details", "<think>")):
        assert _clean_answer(text) == text


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(PIECES | st.text(max_size=3), max_size=12))
def test_only_parts_of_the_text_remain(pieces: list[str]) -> None:
    text = "".join(pieces)
    cleaned = _clean_answer(text)
    assert len(cleaned) <= len(text)
    rest = iter(text)
    assert all(char in rest for char in cleaned), "what remains stands in the text, in its order"


@settings(max_examples=300, deadline=None)
@given(
    paragraphs=st.lists(
        st.sampled_from(["One.", "Two é.", "    code()", "- a\n- b"]), min_size=1, max_size=4
    ),
    blocks=st.lists(st.sampled_from([f"{MARK}\n", OLD_REASONING, OLD_CALL, OLD_CODE, THINK]), max_size=4),
)
def test_every_paragraph_stays(paragraphs: list[str], blocks: list[str]) -> None:
    parts = [
        part
        for number in range(max(len(paragraphs), len(blocks)))
        for part in (*blocks[number : number + 1], *(f"{text}\n" for text in paragraphs[number : number + 1]))
    ]
    assert _clean_answer("".join(parts)) == "".join(f"{text}\n" for text in paragraphs)


# Long texts

# what an answer may be full of; the time for eight times as much is about eight times as long
LONG: Final[dict[str, str]] = {
    "blocks that never end": '<details type="reasoning">',
    "blocks that never begin": "<details ",
    "blocks of many attributes": '<details a="b" ',
    "blocks on lines": '<details type="reasoning">\n',
    "whole blocks": OLD_REASONING,
    "thoughts that never end": "<think>\n",
    "whole thoughts": THINK,
    "marks": f"{MARK}\n",
    "halves of marks": f"[{ULID}]: ",
    "spaces": " \t",
    "lines of spaces": f"{' ' * 50}\n",
    "ends": "</details></think>",
}
SIZE: Final = 1_000_000
TIMES: Final = 8


def fastest(text: str) -> float:
    """Seconds to clean a text; the least of some tries, as other programs run too."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        _clean_answer(text)
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.mark.parametrize("case", LONG)
def test_time_grows_with_the_length(case: str) -> None:
    unit = LONG[case]
    # a sign of each kind, so that nothing is skipped
    signs = "]: # <details <think> "
    small, large = (signs + unit * (size // len(unit)) for size in (SIZE // 100 // TIMES, SIZE // 100))
    ratio = fastest(large) / fastest(small)
    assert ratio < TIMES * 3, (
        "eight times as long takes sixty-four times the time where it grows as the square"
    )
    assert len(_clean_answer(signs + unit * (SIZE // len(unit)))) <= SIZE + len(signs)
