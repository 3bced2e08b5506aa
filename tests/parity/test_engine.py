"""Generation against recorded streams: greedy, sampled, windows, chunks, tools and raw draws."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kv_cache import Step
from nanochat_ray.engine.naive import naive_generate
from nanochat_ray.engine.sampler import RowSampler, check_sampling, sample_rows
from nanochat_ray.messages import SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer
from tests.engine.incremental import Incremental
from tests.parity.goldens import load_json, model_from_golden, probe_error

GOLDEN = load_json("engine")
REAL = GOLDEN["real"]
GREEDY = [case for case in REAL if case["mode"] == "greedy"]
SAMPLED = [case for case in REAL if case["mode"] == "sampled"]
SLIDING, SCRIPTED, SAMPLER = GOLDEN["sliding"], GOLDEN["scripted"], GOLDEN["sampler"]
same_build = pytest.mark.skipif(torch.__version__ != GOLDEN["torch"], reason=f"draws of torch {GOLDEN['torch']}")
Tensor = torch.Tensor


def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_tokens([base64.b64decode(token) for token in load_json(name)["tokens_b64"]])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(model_from_golden("d"), tokenizer(GOLDEN["tokenizer"]))


@pytest.fixture(scope="module")
def windowed() -> GPT:
    return model_from_golden("c")


def name(case: dict[str, Any]) -> str:
    return f"{case['name']}-{case['mode']}-k{case.get('top_k')}-n{case.get('num_samples')}"


@pytest.mark.parametrize("case", GREEDY, ids=name)
def test_greedy(engine: Engine, case: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=case["max_tokens"])
    events = list(engine.generate([case["prompt"]], params))
    assert [event.token for event in events] == case["stream"]
    assert [int(not event.forced) for event in events] == case["stream_masks"]
    [[rollout]] = engine.rollouts([case["prompt"]], params)
    assert [[*rollout.prompt_ids, *rollout.token_ids]] == case["batch"]
    assert [[0] * len(case["prompt"]) + list(rollout.mask)] == case["batch_masks"]
    naive = list(naive_generate(engine.model, case["prompt"], case["max_tokens"], temperature=0.0))
    assert naive == (case["naive"] or case["stream"])  # the reference refused a prompt of one token


def probabilities(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """What the reference draws from: the k largest of logits (..., V) and their ids, or all and None."""
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    return torch.softmax(logits / temperature, dim=-1), ids


def chosen_probabilities(engine: Engine, case: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of every recorded step: probabilities and their ids (row, step, k), and the recorded tokens (row, step)."""
    columns = torch.tensor(case["stream"])  # (steps, R)
    prompt = torch.tensor(case["prompt"]).expand(columns.size(1), -1)  # (R, P)
    with torch.inference_mode():
        logits = engine.model(torch.cat([prompt, columns.T[:, :-1]], dim=1))[:, prompt.size(1) - 1 :]  # (R, steps, V)
    probs, ids = probabilities(logits, case["temperature"], case.get("top_k"))
    return probs, ids, columns.T


@pytest.mark.parametrize("case", SAMPLED, ids=name)
def test_probability_of_the_recorded_tokens(engine: Engine, case: dict[str, Any]) -> None:
    probs, ids, tokens = chosen_probabilities(engine, case)
    ids = torch.arange(probs.size(-1)).expand(probs.shape) if ids is None else ids
    found = (probs * (ids == tokens[..., None])).sum(dim=-1)  # (R, steps)
    assert (found - torch.tensor(case["prob_of_chosen"])).abs().max() < 1e-4
    for row, whole in enumerate(case["batch"]):
        kept = len(whole) - len(case["prompt"])
        assert whole == case["prompt"] + tokens[row, :kept].tolist()
        assert case["batch_masks"][row] == [0] * len(case["prompt"]) + [1] * kept


@same_build
@pytest.mark.parametrize("case", SAMPLED, ids=name)
def test_one_shared_generator_gives_the_recorded_tokens(engine: Engine, case: dict[str, Any]) -> None:
    probs, ids, tokens = chosen_probabilities(engine, case)
    generator = torch.Generator().manual_seed(case["seed"])
    for step in range(probs.size(1)):
        drawn = torch.multinomial(probs[:, step], 1, generator=generator)
        drawn = drawn if ids is None else ids[:, step].gather(-1, drawn)
        assert drawn[:, 0].tolist() == tokens[:, step].tolist()
    if "naive" in case:
        naive = naive_generate(
            engine.model, case["prompt"], case["max_tokens"], case["temperature"], case.get("top_k"), case["seed"]
        )
        assert list(naive) == case["naive"]


@pytest.mark.parametrize("case", SAMPLED, ids=name)
def test_sampled_with_a_generator_per_row(engine: Engine, case: dict[str, Any]) -> None:
    params = SamplingParams(
        temperature=case["temperature"],
        top_k=case.get("top_k"),
        max_tokens=case["max_tokens"],
        seed=case["seed"],
        num_samples=case["num_samples"],
    )
    [rollouts] = engine.rollouts([case["prompt"]], params)
    assert len(rollouts) == case["num_samples"]
    if case.get("top_k") == 1:  # then nothing is left to chance
        assert [[*case["prompt"], *rollout.token_ids] for rollout in rollouts] == case["batch"]
    for rollout in rollouts:  # every token could be drawn where it was drawn
        full = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
        with torch.inference_mode():
            logits = engine.model(full)[0, len(case["prompt"]) - 1 : -1]
        probs, ids = probabilities(logits, case["temperature"], case.get("top_k"))
        ids = torch.arange(probs.size(-1)).expand(probs.shape) if ids is None else ids
        assert ((ids == torch.tensor(rollout.token_ids)[:, None]) & (probs > 0)).any(dim=-1).all()


@pytest.mark.parametrize("case", SLIDING["cases"], ids=lambda case: f"prompt{len(case['prompt'])}-{case['max_tokens']}")
def test_sliding_windows(windowed: GPT, case: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=case["max_tokens"])
    stop = tokenizer(SLIDING["tokenizer"])
    [[rollout]] = Engine(windowed, stop).rollouts([case["prompt"]], params)
    assert rollout.token_ids == case["engine"] == case["naive"] and case["equal"]
    assert list(naive_generate(windowed, case["prompt"], case["max_tokens"], temperature=0.0)) == case["naive"]

    blind = GPT.build(windowed.config.model_copy(update={"window_pattern": "L"}))
    blind.load_state_dict(windowed.state_dict())
    [[ignored]] = Engine(blind, stop).rollouts([case["prompt"]], params)
    wanted = case["if_window_ignored"]
    assert list(ignored.token_ids) == wanted[: len(ignored.token_ids)]  # the recorded run went on after an end
    assert ignored.finish_reason == "stop" or len(ignored.token_ids) == len(wanted)
    at = case["differs_from_ignored_at"]
    if at is not None:
        assert rollout.token_ids[:at] == wanted[:at] and rollout.token_ids[at] != wanted[at]


@pytest.mark.parametrize("case", SLIDING["chunked"], ids=lambda case: str(case["chunks"]).replace(" ", ""))
@torch.inference_mode()
def test_chunks_equal_the_whole(windowed: GPT, case: dict[str, Any]) -> None:
    chunks = [150] + [1] * 50 if case["chunks"] == "150, then 50 times 1" else case["chunks"]
    idx = torch.tensor([SLIDING["chunk_ids"][: case["total"]]])
    assert sum(chunks) == case["total"]
    whole = windowed(idx)  # (1, total, V)
    rows = Incremental(windowed, 1, case["total"])
    pieces = torch.cat([rows(piece) for piece in idx.split(chunks, dim=1)], dim=1)
    assert (pieces - whole).abs().max() < 1e-4
    if not case["positions_off"]:  # elsewhere the reference lost a smear, and its last logits with it
        assert probe_error(pieces[0, -1], case["last_logits_probe"]) < 1e-4
    else:
        assert probe_error(pieces[0, -1], case["last_logits_probe"]) > 1e-3


class Scripted:
    """Stands in for a network: at generated step s of row r all weight is on `scripts[r][s]`.

    A new engine gives its streams the places 0, 1, 2, ... in the cache, in order.
    """

    device = torch.device("cpu")
    compute_dtype = torch.float32

    def __init__(self, scripts: list[list[int]], n_prompt: int) -> None:
        sizes = dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=24)
        self.config = ModelConfig(sequence_len=128, vocab_size=SCRIPTED["vocab"], **sizes)
        self.scripts, self.n_prompt = scripts, n_prompt

    def __call__(self, idx: Tensor, cache: Step, at: Tensor) -> Tensor:
        assert len(at) == len(cache.parts), "every stream is read to its end in one step"
        logits = torch.zeros(len(at), self.config.vocab_size)
        for r, (row, tokens) in enumerate(cache.parts):
            step, script = row.n + len(tokens) - self.n_prompt, self.scripts[row.slot]
            logits[r, script[step] if step < len(script) else SCRIPTED["filler_after_script"]] = 100.0
        return logits


@pytest.mark.parametrize("case", SCRIPTED["cases"], ids=lambda case: case["name"])
def test_scripted(case: dict[str, Any]) -> None:
    tok = tokenizer(GOLDEN["tokenizer"])
    network = Scripted(case["scripts"], len(SCRIPTED["prompt"]))
    first, second = (Engine(network, tok, prefix_cache=False) for _ in range(2))  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=case["max_tokens"], num_samples=len(case["scripts"]))
    events = list(first.generate([SCRIPTED["prompt"]], params))
    [rollouts] = second.rollouts([SCRIPTED["prompt"]], params)
    for row, rollout in enumerate(rollouts):
        mine = [event for event in events if event.sample == row]
        until_end = slice(len(mine))  # the recorded rows went on after their end
        assert [event.token for event in mine] == [column[row] for column in case["stream"][until_end]]
        assert [int(not event.forced) for event in mine] == [column[row] for column in case["stream_masks"][until_end]]
        assert mine[-1].finish_reason == rollout.finish_reason
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        whole = [*rollout.prompt_ids, *rollout.token_ids]
        assert whole == case["batch"][row]
        assert [0] * len(rollout.prompt_ids) + list(rollout.mask) == case["batch_masks"][row]
        assert tok.decode(whole) == case["text"][row]
        if rollout.finish_reason == "length":
            assert len(mine) == case["max_tokens"] and rollout.terminal_token is None
        else:
            assert rollout.terminal_token == mine[-1].token and rollout.terminal_token in first.terminals


@pytest.mark.parametrize("case", SAMPLER["cases"], ids=lambda case: f"T{case['temperature']}-k{case['top_k']}")
def test_raw_draws(case: dict[str, Any]) -> None:
    logits, temperature, top_k = torch.tensor(SAMPLER["logits"]), case["temperature"], case["top_k"]
    params = SamplingParams(temperature=temperature, top_k=top_k, seed=SAMPLER["seed"])
    rows = [RowSampler(params, row) for row in range(len(logits))]
    mine = [[sampled.token for sampled in sample_rows(logits, rows)] for _ in case["draws"]]
    if temperature == 0 or top_k == 1:
        assert mine == case["draws"]
        return
    probs, ids = probabilities(logits, temperature, top_k)
    if torch.__version__ == GOLDEN["torch"]:
        shared = torch.Generator().manual_seed(SAMPLER["seed"])
        for draws in case["draws"]:
            picked = torch.multinomial(probs, 1, generator=shared)
            assert (picked if ids is None else ids.gather(-1, picked))[:, 0].tolist() == draws
    ids = torch.arange(probs.size(-1)).expand(probs.shape) if ids is None else ids
    for draws in [*mine, *case["draws"]]:
        assert all(token in row for token, row in zip(draws, ids.tolist(), strict=True))


def test_negative_temperature_is_refused() -> None:
    assert SAMPLER["negative_temperature"]
    with pytest.raises(ValueError, match="negative"):
        check_sampling(SamplingParams(temperature=-1.0))
