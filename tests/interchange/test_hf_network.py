"""Exported folders as Transformers loads them: logits, caches, padding, generation, weights that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interchange.hf_made import exported
from tests.parity.goldens import load_json, model_from_golden

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hf")]
TOLERANCE = 1e-4
GAP = 1e-3  # below it rounding may decide between the two likeliest tokens
KEYS = "abcd"


def load(folder: Path, **more):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours, theirs and the folder, by golden network; each is made once."""
    made: dict = {}

    def get(key: str):
        if key not in made:
            ours, folder = exported(tmp_path_factory.mktemp(key), key)
            made[key] = ours, load(folder), folder
        return made[key]

    return get


def some_ids(vocab: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("key", KEYS)
@torch.inference_mode()
def test_logits(models, key):
    """As ours, beyond the training context too: windows, grouped heads, padded vocabulary, all that there is."""
    ours, theirs, _ = models(key)
    ids = some_ids(ours.config.vocab_size, 3, 2 * ours.config.sequence_len)
    logits = theirs(ids).logits
    assert logits.dtype == torch.float32 and logits.shape == (*ids.shape, ours.config.vocab_size)
    assert (logits - ours(ids)).abs().max() < TOLERANCE


@torch.inference_mode()
def test_logits_of_the_golden_file(models):
    golden = load_json("forward")["cases"]["b"]
    assert golden["config"].items() <= models("b")[1].config.to_dict().items()


@pytest.mark.parametrize("key", KEYS)
@torch.inference_mode()
def test_a_cache_in_chunks_is_the_whole(models, key):
    ours, theirs, _ = models(key)
    length = min(300, 2 * ours.config.sequence_len)
    ids = some_ids(ours.config.vocab_size, 2, length)
    cache, parts, begin = None, [], 0
    for size in (1, 2, 40, 1, 1, length - 45):
        out = theirs(ids[:, begin : begin + size], past_key_values=cache, use_cache=True)
        cache, begin = out.past_key_values, begin + size
        parts.append(out.logits)
    assert (torch.cat(parts, 1) - ours(ids)).abs().max() < TOLERANCE


@torch.inference_mode()
def test_a_cache_cut_and_reordered_goes_on_rightly(models):
    ours, theirs, _ = models("c")
    ids = some_ids(ours.config.vocab_size, 2, 40)
    cache = theirs(ids, use_cache=True).past_key_values
    cache.crop(-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    out = theirs(ids.flip(0)[:, 30:], past_key_values=cache)
    assert (out.logits - ours(ids.flip(0))[:, 30:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_changes_nothing(models, side):
    ours, theirs, _ = models("b")
    ids, pads = some_ids(ours.config.vocab_size, 2, 60), torch.full((2, 9), 5)
    whole = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
    mask = torch.cat([pads * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pads * 0], 1)
    mask[1] = 1  # the second row is as long as the batch
    at = slice(9, None) if side == "left" else slice(0, 60)
    logits = theirs(whole, attention_mask=mask).logits
    assert (logits[0, at] - ours(ids[:1])[0]).abs().max() < TOLERANCE
    assert (logits[1] - ours(whole[1:])[0]).abs().max() < TOLERANCE
    assert logits.isfinite().all()


def test_padding_between_tokens_is_refused(models):
    _, theirs, _ = models("a")
    ids = some_ids(500, 2, 6)
    with pytest.raises(ValueError, match="padding between tokens"):
        theirs(ids, attention_mask=torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="padding between tokens"):  # the second token behind the prompt's padding
        theirs.generate(ids, attention_mask=torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"\(rows, 6\) is wanted"):
        theirs(ids, attention_mask=torch.ones(2, 5))


def test_positions_end_with_the_rotary_table(models):
    ours, theirs, _ = models("a")
    limit = ours.config.rope_table_factor * ours.config.sequence_len
    with torch.inference_mode(), pytest.raises(ValueError, match=f"position {limit} is beyond the {limit}"):
        theirs(torch.zeros(1, limit + 1, dtype=torch.long))


@torch.inference_mode()
def check_greedy(ours, prompt: torch.Tensor, answer: torch.Tensor) -> tuple[int, int]:
    """Tokens compared and tokens there are; each is our likeliest one until the two likeliest are as good as equal."""
    logits = ours(torch.cat([prompt, answer])[None])[0, len(prompt) - 1 : -1]  # for each token of the answer
    for n, (row, token) in enumerate(zip(logits, answer, strict=True)):
        top = row.topk(2)
        if top.values[0] - top.values[1] < GAP:
            return n, len(answer)
        assert top.indices[0] == token
    return len(answer), len(answer)


@pytest.mark.parametrize("key", "bd")
def test_greedy_generation(models, key):
    """50 prompts, 64 tokens, in batches of different lengths padded on the left, with the cache."""
    ours, theirs, _ = models(key)
    compared = total = 0
    for batch in range(5):
        lengths = [1 + 7 * k + batch for k in range(10)]
        prompts = [some_ids(ours.config.vocab_size, 1, n)[0] for n in lengths]
        longest = max(lengths)
        ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False,
                              eos_token_id=None)  # fmt: skip
        for prompt, answer in zip(prompts, out[:, longest:], strict=True):
            n, of = check_greedy(ours, prompt, answer)
            compared, total = compared + n, total + of
    assert total == 50 * 64 and compared >= 0.9 * total


def test_other_ways_to_generate(models):
    """Without a cache the same; beams and samples run, and the likelier of the beams is what scoring it says."""
    _, theirs, _ = models("b")
    ids = some_ids(500, 2, 12)
    how = {"max_new_tokens": 12, "eos_token_id": None}
    greedy = theirs.generate(ids, do_sample=False, **how)
    assert torch.equal(greedy, theirs.generate(ids, do_sample=False, use_cache=False, **how))
    beams = theirs.generate(ids, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True, **how)
    with torch.inference_mode():
        logprobs = theirs(beams.sequences).logits[:, 11:-1].log_softmax(-1)
    scored = logprobs.gather(-1, beams.sequences[:, 12:, None]).mean((1, 2))
    assert torch.allclose(scored, beams.sequences_scores, atol=1e-4)
    torch.manual_seed(1)
    first = theirs.generate(ids, do_sample=True, num_return_sequences=2, **how)
    torch.manual_seed(1)
    assert torch.equal(first, theirs.generate(ids, do_sample=True, num_return_sequences=2, **how))
    assert first.shape == (4, 24)
    with pytest.raises(ValueError, match="DynamicCache"):
        theirs.generate(ids, cache_implementation="static", **how)


def test_it_stops_where_the_chat_format_says(models):
    _, theirs, folder = models("b")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert theirs.generation_config.eos_token_id == ends and len(ends) == 2


def test_saved_and_loaded_again_it_is_the_same(models, tmp_path):
    _, theirs, _ = models("c")
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = some_ids(500, 1, 50)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in theirs.state_dict().items()
    }


@torch.inference_mode()
def test_bf16(tmp_path):
    """As ours in bf16 up to its rounding: near in every logit, and nearly always the same likeliest token."""
    _, folder = exported(tmp_path, "c", dtype="bfloat16")
    theirs, ours = load(folder), model_from_golden("c", torch.bfloat16).eval()
    assert theirs.transformer.wte.weight.dtype == torch.bfloat16 and theirs.resid_lambdas.dtype == torch.float32
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert theirs.dtype == again.dtype == torch.bfloat16 and again.resid_lambdas.dtype == torch.float32
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    ids = some_ids(ours.config.vocab_size, 2, 200)
    a, b = theirs(ids).logits, ours(ids)
    assert (a - b).abs().max() < 0.5 and (a - b).abs().mean() < 0.03
    assert (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.97


def test_it_trains(models):
    """The loss is that of ours; its gradient reaches every tensor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ours, theirs, folder = models("b")
    ids = some_ids(ours.config.vocab_size, 2, 40)
    with torch.inference_mode():
        assert abs(theirs(ids, labels=ids).loss - ours(ids[:, :-1], ids[:, 1:])) < TOLERANCE
    fresh = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    fresh.smear_lambda.data.fill_(0.01)  # which begins as 0 and stops the gate's gradient
    fresh(ids, labels=ids).loss.backward()
    assert [name for name, tensor in fresh.named_parameters() if tensor.grad is None or not tensor.grad.any()] == []


def test_tensors_that_do_not_fit_are_named(models, tmp_path):
    _, _, folder = models("a")
    good = load_file(folder / "model.safetensors")
    for change, what in (
        ({"transformer.h.0.new.weight": torch.zeros(2)}, r"unexpected .*transformer.h.0.new.weight"),
        ({"backout_lambda": None}, r"missing .*backout_lambda"),
        ({"smear_gate.weight": torch.zeros(1, 3)}, r"another shape .*smear_gate.weight"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=what):
            load(broken)
        shutil.rmtree(broken)


def test_what_the_network_cannot_do_it_says(models):
    _, theirs, _ = models("a")
    with pytest.raises(ValueError, match="cannot be resized"):
        theirs.resize_token_embeddings(600)
    with pytest.raises(ValueError, match="logits only"):
        theirs(some_ids(500, 1, 4), output_hidden_states=True)
    with pytest.raises(ValueError, match="'sdpa' only"):
        load(models("a")[2], attn_implementation="eager")
