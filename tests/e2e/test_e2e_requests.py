"""What people may set, what administrators have set, and what programs attach, through the real host."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from openrouter_responses_pipe.webui import WebUIClient
from tests.e2e.host import MODEL, Host, valves
from tests.e2e.upstream import Json, Upstream

PDF: Final = "data:application/pdf;base64," + base64.b64encode(b"%PDF-1.7 a small file").decode()
OTHER: Final = "openai/gpt-4o-mini"


@contextmanager
def parameters(host: Host, **custom: Any) -> Iterator[None]:
    """Give the model custom parameters of the administrator's for a while."""
    path = f"/api/v1/models/model?id={MODEL}"
    row = host.admin.request("GET", path)
    host.admin.update_model({**row, "params": {"custom_params": custom}})
    host.admin.models(refresh=True)
    try:
        yield
    finally:
        host.admin.update_model({**host.admin.request("GET", path), "params": {}})
        host.admin.models(refresh=True)


def ask(client: WebUIClient, upstream: Upstream, **fields: Any) -> Json:
    """Ask with these fields; return the body that OpenRouter got."""
    word = f"e2e{uuid.uuid4().hex[:10]}"
    client.complete(MODEL, f"Hello {word}", **fields)
    return upstream.last(word)["body"]


def refused(client: WebUIClient, upstream: Upstream, **fields: Any) -> str:
    """Ask with these fields; return why nothing was sent."""
    word = f"e2e{uuid.uuid4().hex[:10]}"
    answer = client.complete(MODEL, f"Hello {word}", **fields)
    assert not upstream.asked(word)
    return answer["error"]["message"]


def test_what_costs_is_the_administrators(host: Host, upstream: Upstream) -> None:
    web = [{"id": "web", "max_results": 3}]
    assert "plugins can only be set by an administrator" in refused(host.user, upstream, plugins=web)
    assert ask(host.admin, upstream, plugins=web)["plugins"] == web
    with valves(host, USER_REQUEST_FIELDS="plugins"):
        assert ask(host.user, upstream, plugins=web)["plugins"] == web


def test_what_an_administrator_has_set_holds(host: Host, upstream: Upstream) -> None:
    with parameters(host, provider='{"zdr": true, "sort": "price"}', service_tier="flex"):
        for fields in ({}, {"provider": None, "service_tier": None}, {"provider": {"zdr": False}}):
            body = ask(host.user, upstream, **fields)
            assert body["provider"] == {"zdr": True, "sort": "price"}
            assert body["service_tier"] == "flex"
        narrowed = ask(host.user, upstream, provider={"data_collection": "deny", "order": ["openai"]})
        assert narrowed["provider"] == {"zdr": True, "sort": "price", "data_collection": "deny"}
        words = refused(host.user, upstream, service_tier="priority")
        assert "service_tier can only be set by an administrator" in words


def test_fallbacks_are_models_that_a_person_may_use(host: Host, upstream: Upstream) -> None:
    with valves(host, USER_REQUEST_FIELDS="models"):
        assert "is not one of yours" in refused(host.user, upstream, models=[OTHER])
        visible = MODEL.partition(".")[2]
        assert ask(host.user, upstream, models=[visible])["models"] == [visible]


def test_a_file_of_a_program(host: Host, upstream: Upstream) -> None:
    word = f"e2e{uuid.uuid4().hex[:10]}"
    content = [
        {"type": "text", "text": f"Read this {word}"},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
    ]
    body = {"model": MODEL, "stream": False, "messages": [{"role": "user", "content": content}]}
    with valves(host, PDF_ENGINE="native"):
        host.user.request("POST", "/api/chat/completions", body)
    sent = upstream.last(word)["body"]
    part = {"type": "input_file", "filename": "a.pdf", "file_data": PDF}
    assert sent["input"][-1]["content"][-1] == part
    assert sent["plugins"] == [{"id": "file-parser", "pdf": {"engine": "native"}}]


def test_a_drawing_is_not_sent(host: Host, upstream: Upstream) -> None:
    """No model takes SVG: with it the whole request would be refused."""
    word = f"e2e{uuid.uuid4().hex[:10]}"
    drawing = "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()
    content = [
        {"type": "text", "text": f"Look at this {word}"},
        {"type": "image_url", "image_url": {"url": drawing}},
    ]
    body = {"model": MODEL, "stream": False, "messages": [{"role": "user", "content": content}]}
    answer = host.user.request("POST", "/api/chat/completions", body)
    assert answer["choices"][0]["message"]["content"]
    parts = upstream.last(word)["body"]["input"][-1]["content"]
    assert [part["type"] for part in parts] == ["input_text"]


def test_people_go_by_pseudonyms(host: Host, upstream: Upstream) -> None:
    user_id = host.user.whoami()["id"]
    body = ask(host.user, upstream)
    assert body["user"] == body["safety_identifier"] == ask(host.user, upstream)["user"]
    assert body["user"] != ask(host.admin, upstream)["user"]
    assert user_id not in str(body)
    with valves(host, SEND_IDENTIFIERS="none"):
        assert not {"user", "safety_identifier", "metadata"} & ask(host.user, upstream).keys()
