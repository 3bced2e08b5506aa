"""The server of serve_configs/chat_vllm.yaml on a real cluster, asked by OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml

from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import SamplingParams
from nanochat_ray.model.checkpoint import model_tensors, save_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import CONFIG_FILE, RunDir, write_json
from nanochat_ray.text.conversation import render_prompt
from tests.serve import server as deployed
from tests.serve.server import Server, until
from tests.vllm.test_rl_engine import CONFIG, END, FOLLOWS, START, TOKENIZER, calculating

pytestmark = pytest.mark.vllm

CONFIG_FILE_SERVED = Path(__file__).parents[2] / "serve_configs" / "chat_vllm.yaml"
CONTEXT = 6144
ROWS = 4
# An answer is a call of the calculator, then "!" and letters from a to i, again and again until it is cut off.
ROUND = b"abcdefghi"
NAME = "tiny-sft"
ASK: Any = {"model": NAME, "messages": [{"role": "user", "content": "Calculate."}], "temperature": 0}
LONG: Any = ASK | {"max_tokens": 6000, "stream": True}  # seconds of work


def answering(first: int) -> GPT:
    """A network without attention whose answers begin with a call, and go on with ROUND from its place `first`."""
    begins = TOKENIZER.encode_special("<|assistant_start|>")
    follows = {token: FOLLOWS[token] for token in (START, *b"3*4")} | {begins: START, END: ord(".")}
    follows |= {TOKENIZER.encode_special("<|output_end|>"): ord("!"), ord("!"): ROUND[first]}
    follows |= {letter: ROUND[(place + 1) % len(ROUND)] for place, letter in enumerate(ROUND)}
    return calculating(follows, CONTEXT)


def save(run: RunDir, step: int, model: GPT) -> None:
    meta = {"model_config": model.config.model_dump(mode="json"), "val_bpb": 1.0}
    save_checkpoint(run.checkpoints("sft"), step, model_tensors(model), None, meta)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("storage") / "tiny")
    with run.open():
        run.stage("tokenizer").mkdir(parents=True)
        TOKENIZER.save(run.stage("tokenizer"))
        run.stage("sft").mkdir()
        write_json(run.stage("sft") / CONFIG_FILE, {"settings": {}})
        save(run, 10, answering(0))
        run.finish_stage("tokenizer")
        run.finish_stage("sft")
    return run


@pytest.fixture(scope="module")
def server(ray_cluster, run) -> Iterator[Server]:
    from ray import serve

    [application] = yaml.safe_load(CONFIG_FILE_SERVED.read_text())["applications"]
    assert application["import_path"] == "nanochat_ray.serve.app:build"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployed, "DEADLINE_S", 240.0)
        more = {"max_rows": ROWS, "max_queue": 4, "dtype": "float32", "kv_memory_gb": 0.1}
        yield Server(run.root.parent, application["args"] | more)
        serve.shutdown()


def ours(model: GPT, max_tokens: int) -> list[int]:
    prompt = render_prompt(TOKENIZER, ASK["messages"], CONTEXT).ids
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return list(Engine(model, TOKENIZER, 1).rollouts([prompt], params)[0][0].token_ids)


def served_step(server: Server) -> int:
    return httpx.get(f"{server.url}/v1/models/{NAME}", timeout=10).json()["lineage"]["step"]


def test_a_chat_calls_the_calculator_as_ours_does(server):
    answer = server.client.chat.completions.create(**ASK, max_tokens=30)
    message: Any = answer.choices[0].message
    assert message.content == "!" + (ROUND * 3).decode()[:20]
    assert [part["text"] for part in message.parts] == ["3*4", "12", message.content]
    tokens = ours(answering(0), 30)
    assert answer.usage and answer.usage.completion_tokens == len(tokens) == 30
    assert answer.choices[0].finish_reason == "length"
    chunks = list(server.client.chat.completions.create(**ASK, max_tokens=30, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == message.content
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert "<html" in httpx.get(server.url).text


def test_stop_texts_samples_and_log_probabilities(server):
    answer = server.client.chat.completions.create(**ASK, max_tokens=60, stop="cde", n=2, logprobs=True, top_logprobs=2)
    assert [(choice.message.content, choice.finish_reason) for choice in answer.choices] == [("!ab", "stop")] * 2
    content = answer.choices[0].logprobs.content
    assert all(-0.1 < token.logprob <= 0 and len(token.top_logprobs) == 2 for token in content[-3:])
    plain = server.client.completions.create(model=NAME, prompt="a", max_tokens=4, temperature=0, logprobs=1)
    assert plain.choices[0].text == "bcde" and len(plain.choices[0].logprobs.token_logprobs) == 4


def test_a_prompt_longer_than_the_context_is_refused_and_the_server_lives(server):
    too_long = ASK | {"messages": [{"role": "user", "content": "x" * (CONTEXT + 1)}]}
    with pytest.raises(openai.BadRequestError, match="context"):
        server.client.chat.completions.create(**too_long)
    assert server.client.chat.completions.create(**ASK, max_tokens=3).choices


def test_a_reader_that_leaves_frees_rows_and_blocks(server):
    before = server.until_idle()
    streams = [server.client.chat.completions.create(**LONG) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    after = server.until_idle()
    assert after["cancelled"] - before["cancelled"] >= 1  # the others may have come to their end
    assert after["models"][NAME]["blocks_used"] == 0


def test_health_and_metrics(server):
    health = httpx.get(f"{server.url}/health", timeout=10).json()
    assert health["ready"] and health["engine"] == "vllm" and health["healthy"]
    before = server.until_idle()["models"][NAME]
    prompt = "y" * 200
    for _ in range(2):
        server.client.completions.create(model=NAME, prompt=prompt, max_tokens=5, temperature=0)
    after = server.until_idle()["models"][NAME]
    assert after["prompt_tokens"] - before["prompt_tokens"] == 2 * 201
    assert 0 < after["cached_tokens"] - before["cached_tokens"] <= 201
    assert after["sampled_tokens"] - before["sampled_tokens"] == 10
    assert after["blocks_total"] > 0


def test_new_weights_without_a_restart(server, run):
    pid = server.stats()["pid"]
    stream = server.client.chat.completions.create(**LONG)
    first = next(iter(stream))
    save(run, 20, answering(4))
    server.deploy({"weights": "latest", "revision": 1})
    until(lambda: served_step(server) == 20)
    assert server.stats()["running"] == 1  # the stream, on the weights that it began with
    answer = server.client.chat.completions.create(**ASK, max_tokens=12)
    assert answer.choices[0].message.content == "!ef"
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    said = (first.choices[0].delta.content or "") + rest
    assert said == "!" + (ROUND * CONTEXT).decode()[: len(said) - 1] and len(said) > 5900  # old weights to its end
    assert server.stats()["pid"] == pid


def test_weights_of_another_shape_are_refused_and_the_old_ones_stay(server, run):
    before = server.client.chat.completions.create(**ASK, max_tokens=12).choices[0].message.content
    wider = GPT.build(CONFIG.model_copy(update={"sequence_len": CONTEXT, "n_layer": 3}), compute_dtype=torch.float32)
    save(run, 30, wider)
    server.deploy({"weights": "latest", "revision": 2})
    until(lambda: "must fit" in str(server.stats().get("refused_updates")))
    assert server.client.chat.completions.create(**ASK, max_tokens=12).choices[0].message.content == before
