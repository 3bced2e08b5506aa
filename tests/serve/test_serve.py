"""The server on a real cluster: chat over HTTP, cancellation, weights in place, metrics, queue, errors."""

from __future__ import annotations

import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.serve.runs import make_run, save_step
from tests.serve.server import ASK, Server, until

ROWS, QUEUE = 4, 4
LONG: Any = ASK | {"max_tokens": 3000, "stream": True}


@pytest.fixture(scope="module")
def server(ray_cluster, tmp_path_factory) -> Iterator[Server]:
    from ray import serve

    storage = tmp_path_factory.mktemp("storage")
    make_run(storage)
    models = [{"source": "sft"}, {"name": "base", "source": "base"}]
    yield Server(storage, {"models": models, "max_rows": ROWS, "max_queue": QUEUE, "replicas": 1})
    serve.shutdown()


def test_a_chat_through_http(server):
    answer = server.client.chat.completions.create(**ASK, max_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage and 1 <= answer.usage.completion_tokens <= 12
    again = server.client.chat.completions.create(**ASK, max_tokens=12, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content
    chunks = list(server.client.chat.completions.create(**ASK, max_tokens=12, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
    assert {model.id for model in server.client.models.list()} == {"d1-test-sft", "base"}
    assert server.client.completions.create(model="base", prompt="The river", max_tokens=3).choices[0].text is not None
    assert "<html" in httpx.get(server.url).text


def test_the_lineage_of_a_model(server):
    lineage = server.lineage()
    assert lineage | {"run": "d1-test", "source": "sft", "step": 10} == lineage
    assert all(re.fullmatch(r"[0-9a-f]{64}", lineage[f"{kind}_sha256"]) for kind in ("weights", "config"))
    assert lineage["tokenizer_sha256"]


def test_a_reader_that_leaves_frees_rows_and_blocks(server):
    before = server.until_idle()
    streams = [server.client.chat.completions.create(**LONG) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
    assert server.stats()["running"] >= 1
    for stream in streams:
        stream.close()
    after = server.until_idle()
    assert after["cancelled"] - before["cancelled"] == 3
    used = [stats["models"][ASK["model"]]["blocks_used"] for stats in (before, after)]
    assert used[1] <= used[0] + 3 * 3  # what stays are blocks of the prompts, for the next who says the same


def test_a_full_queue_is_429_and_says_when_to_come_again(server):
    server.until_idle()

    def ask(_: int) -> tuple[int, str | None]:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=LONG | {"max_tokens": 200}, timeout=60)
        return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(ask, range(16)))
    statuses = [status for status, _ in results]
    assert set(statuses) == {200, 429} and statuses.count(200) >= ROWS + QUEUE
    assert all(retry and int(retry) >= 1 for status, retry in results if status == 429)
    server.until_idle()


def test_other_requests_are_answered_while_all_rows_are_busy(server):
    streams = [server.client.chat.completions.create(**LONG) for _ in range(ROWS)]
    until(lambda: server.stats()["running"] == ROWS)
    assert httpx.get(f"{server.url}/health", timeout=10).json()["ready"] is True
    assert httpx.get(server.url, timeout=10).status_code == 200
    for stream in streams:
        stream.close()
    server.until_idle()


def test_errors_have_openais_shape(server):
    with pytest.raises(openai.NotFoundError, match="no-such"):
        server.client.chat.completions.create(**ASK | {"model": "no-such"})
    with pytest.raises(openai.BadRequestError):
        server.client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": "word " * 2000}]})


def test_who_asks_is_seen_in_the_replica(server):
    refused = httpx.get(f"{server.url}/stats", headers={"x-forwarded-for": "203.0.113.9"})
    assert refused.status_code == 403
    assert httpx.get(f"{server.url}/stats").status_code == 200


def test_weights_change_under_a_running_stream(server):
    save_step(server.storage, "d1-test", "sft", 20, seed=7)
    old = server.lineage()
    seeded: Any = ASK | {"max_tokens": 2000, "temperature": 1.0, "seed": 5}
    expected = server.client.chat.completions.create(**seeded).choices[0].message.content
    pid = server.stats()["pid"]
    stream = server.client.chat.completions.create(**seeded, stream=True)
    parts = [next(stream)]
    reader = threading.Thread(target=lambda: parts.extend(stream))
    reader.start()
    server.deploy({"weights": {ASK["model"]: "latest"}})
    new = until(lambda: (lineage := server.lineage())["step"] == 20 and lineage)
    assert server.stats()["running"] == 1, "the stream is still on its way"
    reader.join()
    assert "".join(c.choices[0].delta.content or "" for c in parts if c.choices) == expected
    assert new["weights_sha256"] != old["weights_sha256"] and new["tokenizer_sha256"] == old["tokenizer_sha256"]
    short = server.client.chat.completions.create(**seeded | {"max_tokens": 20}).choices[0].message.content
    assert short and not expected.startswith(short[:10])
    assert server.stats()["pid"] == pid, "in place, not in a new process"


@pytest.mark.parametrize(
    ("user_config", "said"),
    [({"weights": 77}, "no checkpoint of step 77"), ({"weights": {"gpt": 1}}, "gpt"), ({"wights": 1}, "wights")],
)
def test_weights_that_cannot_be_loaded_are_refused_and_the_old_ones_stay(server, user_config, said):
    before = server.lineage()
    server.deploy(user_config)
    refused = until(lambda: server.stats().get("refused_updates"))
    assert any(said in reason for reason in refused)
    assert server.lineage() == before
    assert server.client.chat.completions.create(**ASK, max_tokens=2).choices
    server.deploy({"revision": said})
    until(lambda: "refused_updates" not in server.stats())


def exported() -> dict[str, float]:
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    lines = re.findall(r'^ray_nanochat_serve_(\w+)\{.*model="d1-test-sft".*\} (\S+)$', text, re.M)
    return {name: float(value) for name, value in lines}


def test_the_numbers_are_rays_metrics(server):
    wanted = {
        "queue", "running", "kv_used_frac", "tokens_per_s", "ttft_s_count", "ttft_s_bucket", "inter_token_s_count",
        "prompt_tokens_total", "sampled_tokens_total", "finished_total", "cancellations_total", "rejected_total",
    }  # fmt: skip
    found = until(lambda: (found := exported()).keys() >= wanted and found)
    assert found["ttft_s_count"] >= 1 and found["cancellations_total"] >= 3 and found["rejected_total"] >= 1


def test_a_run_that_is_not_there_is_named_with_the_command(ray_cluster, tmp_path):
    from nanochat_ray.serve.app import build
    from nanochat_ray.serve.app_settings import ServeSettings

    with pytest.raises(FileNotFoundError, match=r"python jobs/speedrun\.py"):
        build(ServeSettings(storage=str(tmp_path)))
    make_run(tmp_path, "d1-a", stages=("pretrain",))
    with pytest.raises(FileNotFoundError, match="sft"):
        build(ServeSettings(storage=str(tmp_path)))
    with pytest.raises(ValueError, match="more than once"):
        build(ServeSettings.model_validate({"storage": str(tmp_path), "models": [{"source": "base"}] * 2}))
    with pytest.raises(ValueError, match="no GPU"):
        build(ServeSettings(storage=str(tmp_path), source="base", device="cuda"))
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
