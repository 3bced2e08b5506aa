"""Nanochat's own endpoint, health and stats."""

from __future__ import annotations

import json

import httpx
import pytest
from fastapi.testclient import TestClient

from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.backend import Overloaded
from tests.serve.scripted import TOKENIZER, Scripted, call_tokens, served

PATH = "/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def client_of(backend: Scripted) -> TestClient:
    return TestClient(
        create_app(backend), base_url="http://localhost", client=("127.0.0.1", 1), raise_server_exceptions=False
    )


def events_of(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == "" and all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream_of_tokens():
    backend = Scripted("Hi \N{FISH}!")
    *tokens, done = events_of(client_of(backend).post(PATH, json={"messages": HI}))
    assert done == {"done": True} and all(token.keys() == {"token", "gpu"} for token in tokens)
    assert [token["token"] for token in tokens] == ["H", "i", " ", "\N{FISH}", "!"] and tokens[0]["gpu"] == 0


def test_a_character_that_stays_incomplete_is_dropped():
    backend = Scripted([*b"ok", *"\N{FISH}".encode()[:2]])
    events = events_of(client_of(backend).post(PATH, json={"messages": HI}))
    assert [event.get("token") for event in events] == ["o", "k", None]


def test_tool_calls_are_text_in_brackets():
    backend = Scripted(TOKENIZER.encode("so ") + call_tokens("12*7", "84") + TOKENIZER.encode("."))
    *tokens, _ = events_of(client_of(backend).post(PATH, json={"messages": HI}))
    assert "".join(token["token"] for token in tokens) == "so [12*7 = 84]."
    backend.reply = call_tokens("1/0", "")[: len("1/0") + 2]
    *tokens, _ = events_of(client_of(backend).post(PATH, json={"messages": HI}))
    assert "".join(token["token"] for token in tokens) == "[1/0]", "a call without a result"


def test_values_and_defaults():
    backend = Scripted(models=[served("base", chat=False), served(temperature=0.7, top_k=33, max_tokens=21)])
    client = client_of(backend)
    system = [{"role": "system", "content": "be brief"}]
    client.post(PATH, json={"messages": system + HI, "temperature": None})
    client.post(PATH, json={"messages": HI, "temperature": 0, "top_k": 0, "max_tokens": 5})
    client.post(PATH, json={"messages": HI})
    models, _, params = zip(*backend.asked, strict=True)
    assert {model.name for model in models} == {"tiny-sft"}, "the first model that can chat"
    assert [(p.temperature, p.top_k, p.max_tokens) for p in params] == [(0.7, 33, 21), (0, 0, 5), (0.7, 33, 21)]
    assert len({p.seed for p in params}) == 3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": HI * 501},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "x" * 8001}]},
        {"messages": [{"role": role, "content": "x" * 7000} for role in ("user", "assistant") * 2] + [
            {"role": "user", "content": "x" * 7000}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [*HI, *HI]},
        {"messages": HI, "temperature": 2.5},
        {"messages": HI, "top_k": 201},
        {"messages": HI, "top_k": -1},
        {"messages": HI, "max_tokens": 0},
        {"messages": HI, "max_tokens": 4097},
        {"messages": HI, "max_tokens": 4096},
        {"messages": [{"role": "user", "content": "x" * 300}]},
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused_not_clamped(body):
    backend = Scripted()
    response = client_of(backend).post(PATH, json=body)
    assert response.status_code == 400 and response.json()["detail"] == response.json()["error"]["message"]
    assert backend.opened == 0


def test_errors_have_a_detail_too():
    response = client_of(Scripted(failure=Overloaded("busy", 2))).post(PATH, json={"messages": HI})
    assert response.status_code == 429 and response.json()["detail"] == "busy"
    events = events_of(client_of(Scripted(failure=RuntimeError(), fail_at=2)).post(PATH, json={"messages": HI}))
    assert events[-1]["error"]["type"] == "server_error" and {"done": True} not in events
    response = client_of(Scripted()).post(PATH, content="{", headers={"content-type": "application/json"})
    assert response.status_code == 400 and "JSON" in response.json()["detail"]


def test_health_and_stats():
    backend = Scripted()
    backend.extra_stats = {"healthy": True, "models": {"tiny-sft": {"running": 0}}}
    client = client_of(backend)
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["ready"] is True
    assert (health["num_gpus"], health["available_workers"], health["running"]) == (0, 1, 0)
    stats = client.get("/stats").json()
    assert stats["total_workers"] == stats["available_workers"] == 1 and stats["busy_workers"] == 0
    assert stats["workers"] == [{"gpu_id": 0, "device": "cpu"}] and stats["models"] == {"tiny-sft": {"running": 0}}
    assert client.get("/readyz").status_code == client.get("/healthz").status_code == 200
    backend.extra_stats["healthy"] = False
    assert client.get("/health").json()["ready"] is False
    assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
