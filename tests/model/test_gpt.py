"""Laws of the network that hold for any weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.precision import pick_device, pick_dtype, prepare_device
from tests.engine.incremental import Incremental

SHORT = 128  # the shortest window there is


def config(**changes) -> ModelConfig:
    values = dict(sequence_len=256, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SSL")
    return ModelConfig(**{**values, **changes})


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> GPT:
    """Weights without a zero among them, so that every path of the network carries something."""
    model = GPT.build(config, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.5)
    return model.double() if dtype == torch.float64 else model


def ids(rows: int, length: int, vocab: int = 100) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(4))


def decode(rows: Incremental, idx: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    return torch.cat([rows(part) for part in idx.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize(
    "chunks", [[150], [1] * 150, [149, 1], [1, 149], [1, 2, 3, 4, 140], [50, 50, 50], [128, 1, 1, 20], [130, 1, 19]]
)
@torch.inference_mode()
def test_every_chunking_equals_the_full_forward(chunks):
    model, idx = random_model(config()), ids(2, 150)
    for block_size in (1, 7, 16):
        torch.testing.assert_close(decode(Incremental(model, 2, 150, block_size), idx, chunks), model(idx))


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_layer=1),
        dict(n_layer=2, n_kv_head=1),
        dict(n_layer=4, n_kv_head=4, window_pattern="SSSL"),
        dict(n_layer=5, n_head=1, n_kv_head=1, vocab_size=64),
    ],
)
@torch.inference_mode()
def test_odd_shapes_decode_like_the_full_forward(changes):
    model, idx = random_model(config(**changes)), ids(1, 140, 64)
    logits = model(idx)
    assert logits.shape == (1, 140, model.config.vocab_size)
    torch.testing.assert_close(decode(Incremental(model, 1, 140), idx, [20, 1, 100, 1, 18]), logits)


@torch.inference_mode()
def test_rows_of_different_lengths_decode_like_single_rows():
    model, lengths = random_model(config()), [1, 7, 131, 140]
    idx = ids(4, 160)
    rows = Incremental(model, 4, 160)
    rows.feed([idx[row, :n].tolist() for row, n in enumerate(lengths)])
    for step, T in ((0, 1), (1, 1), (2, 3), (5, 1)):
        logits = rows.feed([idx[row, n + step : n + step + T].tolist() for row, n in enumerate(lengths)])
        for row, n in enumerate(lengths):
            alone = model(idx[row : row + 1, : n + step + T])[0, -T:]
            torch.testing.assert_close(logits[row], alone)
    assert [row.n for row in rows.rows] == [n + 6 for n in lengths]


@torch.inference_mode()
def test_a_fresh_row_beside_an_old_one_is_not_smeared():
    model, idx = random_model(config()), ids(2, 20)
    rows = Incremental(model, 2, 20)
    rows.feed([idx[0, :12].tolist(), []])
    old, fresh = rows.feed([idx[0, 12:14].tolist(), idx[1, :2].tolist()])
    torch.testing.assert_close(old, model(idx[:1, :14])[0, -2:])
    torch.testing.assert_close(fresh, model(idx[1:, :2])[0])


@torch.inference_mode()
def test_forked_rows_go_on_alone():
    model, idx = random_model(config()), ids(3, 40)
    idx[:, :32] = idx[0, :32]
    one = Incremental(model, 3, 40)
    for spare in one.rows[1:]:
        one.cache.close(spare)
    one.rows = one.rows[:1]
    one(idx[:1, :32])
    held = one.cache.pool.held
    one.rows += [one.cache.fork(one.rows[0]) for _ in range(2)]
    assert one.cache.pool.held == held, "a fork shares its blocks"
    torch.testing.assert_close(decode(one, idx[:, 32:], [1, 1, 3, 3]), model(idx)[:, 32:])


def test_a_row_longer_than_the_rotary_table_is_refused():
    with pytest.raises(ValueError, match="2561 positions are more than the 2560 of the rotary table"):
        random_model(config())(ids(1, 2561))


def test_window_boundary_in_training():
    """The key at distance `left` is seen, the next one is not: the gradient at the input says which."""
    model = random_model(config(n_layer=2, window_pattern="S"))
    short, _ = model.windows()
    assert short == SHORT
    inputs = []
    block = next(iter(model.blocks))
    block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    outputs = []
    block.attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(ids(1, 200))
    (grad,) = torch.autograd.grad(outputs[0][0, 180].sum(), inputs[0])  # (1, T, C)
    seen = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert seen == list(range(180 - SHORT, 181))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("other_start", [180, 150])  # of a second row in the batch
@torch.inference_mode()
def test_window_boundary_in_decoding(T, other_start):
    """Changing a stored value at distance `left` changes what attention gives, at one more it does not."""
    model, idx = random_model(config(n_layer=2, window_pattern="S")), ids(2, 200)
    outputs = []
    next(iter(model.blocks)).attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    starts = [180, other_start]
    for distance, visible in ((SHORT, True), (SHORT + 1, False)):
        seen = []
        for change in (0.0, 1.0):
            rows = Incremental(model, 2, 200)
            rows.feed([idx[row, :start].tolist() for row, start in enumerate(starts)])
            at = 180 + T - 1 - distance
            kind, place = rows.cache.place[0]
            page = rows.cache.pages(kind, np.array(rows.rows[0].slot), np.array(at // 16))[place]
            rows.cache.store[page, 1, :, at % 16] += change
            rows.feed([idx[row, start : start + T].tolist() for row, start in enumerate(starts)])
            seen.append(outputs[-1][0, T - 1])
        assert torch.equal(*seen) is not visible


def test_init_sets_every_tensor():
    model = GPT(config())
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan)
    model.init_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes(dtype):
    model = GPT.build(config(), compute_dtype=dtype)
    tables = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for name, parameter in model.named_parameters():
        table = name.startswith(("transformer.wte", "value_embeds"))
        assert parameter.dtype == (tables if table else torch.float32), name
        assert parameter.requires_grad
    assert model.cos.dtype == model.sin.dtype == dtype
    assert not {"cos", "sin"} & model.state_dict().keys()


def test_initial_loss_is_that_of_guessing():
    model = GPT.build(config(vocab_size=4096))
    idx = ids(2, 65, 4096)
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(4096), abs=0.01)


def test_reductions():
    model, idx = random_model(config()), ids(2, 33)
    targets = idx[:, 1:].clone()
    targets[0, 5:9] = -1
    x = idx[:, :-1]
    losses = model(x, targets, reduction="none")
    assert losses.shape == targets.shape and not losses[targets < 0].any() and (losses[targets >= 0] > 0).all()
    torch.testing.assert_close(model(x, targets, reduction="sum"), losses.sum())
    torch.testing.assert_close(model(x, targets), losses.sum() / (targets >= 0).sum())
    log_probs = model(x).log_softmax(-1)
    torch.testing.assert_close(losses[1], -log_probs[1].gather(1, targets[1, :, None])[:, 0])
    with pytest.raises(ValueError, match="median"):
        model(x, targets, reduction="median")


def test_a_batch_without_targets_has_loss_zero_and_no_gradient():
    model, idx = random_model(config()), ids(1, 8)
    loss = model(idx, torch.full_like(idx, -1))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.inference_mode()
def test_chosen_places_and_a_single_token():
    model, idx = random_model(config()), ids(2, 9)
    torch.testing.assert_close(model(idx, at=torch.tensor([17, 3])), model(idx)[[1, 0], [8, 3]])
    torch.testing.assert_close(model(idx[:, :1]), model(idx)[:, :1])


def test_padded_rows_of_the_vocabulary_never_matter():
    model, idx = random_model(config(vocab_size=70)), ids(1, 20, 70)
    assert model.lm_head.weight.shape[0] == 128
    before = model(idx)
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    grad = model.lm_head.weight.grad
    assert grad is not None and grad[:70].any() and not grad[70:].any()
    with torch.no_grad():
        model.lm_head.weight[70:] = 1e3
    assert torch.equal(model(idx), before)


def test_low_precision_follows_full_precision():
    exact, low = random_model(config(), torch.float32), random_model(config(), torch.bfloat16)
    idx = ids(2, 150)
    wanted = exact(idx)
    assert (low(idx) - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    decoded = decode(Incremental(low, 2, 150), idx, [100] + [1] * 50)
    assert (decoded - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_weights_that_change_change_the_next_answer():
    """The casts that inference keeps must not outlive the weights they were made of."""
    model, idx = random_model(config(), torch.bfloat16), ids(1, 10)
    with torch.inference_mode():
        before = model(idx)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    with torch.inference_mode():
        after = model(idx)
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        loaded = model(idx)
    assert not torch.equal(before, after) and not torch.equal(after, loaded)
    training = model(idx)
    torch.testing.assert_close(training, loaded)
    model(idx, idx).backward()


def test_an_optimizer_step_changes_the_next_answer():
    """Inference before, in the middle of and after a step: it must always see the weights as they are."""
    model, idx = random_model(config(), torch.bfloat16), ids(1, 10)
    optimizer = build_optimizer(
        model, unembedding_lr=0.1, embedding_lr=0.1, matrix_lr=0.1, scalar_lr=0.1, weight_decay=0.0
    )

    @torch.inference_mode()
    def answer(model: GPT) -> torch.Tensor:
        return model(idx)

    answers = [answer(model)]
    for _ in range(2):
        model(idx, idx).backward()
        answer(model)
        optimizer.step()
        optimizer.zero_grad()
        answers.append(answer(model))
        fresh = GPT.build(model.config, compute_dtype=torch.bfloat16)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(answers[-1], answer(fresh))
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])


def test_a_network_built_in_inference_mode_answers():
    with torch.inference_mode():
        model = GPT.build(config(), compute_dtype=torch.bfloat16)
        assert torch.equal(model(ids(1, 4)), GPT.build(config(), compute_dtype=torch.bfloat16)(ids(1, 4)))


def test_training_after_inference_on_the_same_shapes():
    model, idx = random_model(config(), torch.float32), ids(1, 200)
    with torch.inference_mode():
        model(idx)
    model(idx, idx).backward()


def test_capture_as_one_graph():
    """torch.compile sees the whole training pass without a break (captured only; nothing is compiled here)."""
    model, idx = random_model(config(n_layer=1), torch.float32), ids(2, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = model(idx, idx)
    wanted.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()  # drops them from the model, so they stay as they are
    loss = compiled(idx, idx)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], msg=name)


def test_device_and_dtype_rules(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    assert pick_device("cpu") == "cpu"
    assert pick_device(None) in ("cuda", "mps", "cpu")
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")
    assert pick_dtype("cpu", "float16")[0] == torch.float16
    dtype, reason = pick_dtype("cpu", None)
    assert dtype in (torch.bfloat16, torch.float32) and "CPU" in reason
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert pick_dtype("cpu", None) == (torch.float16, "float16: NANOCHAT_DTYPE")
    assert pick_dtype("cpu", "float32")[0] == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(ValueError, match="int8"):
        pick_dtype("cpu", None)


def test_prepare_device_changes_no_number():
    model, idx = random_model(config(), torch.float32), ids(1, 20)
    before = model(idx)
    prepare_device("cpu")
    assert torch.equal(model(idx), before)


@torch.inference_mode()
def test_a_padded_step_equals_a_plain_one():
    """What CUDA graphs run, with the shapes filled up: here without the graphs."""
    model, idx = random_model(config()), ids(3, 150)
    rows = Incremental(model, 3, 150)
    rows.feed([idx[row, :n].tolist() for row, n in enumerate((5, 149, 60))])
    for row in rows.rows:
        rows.cache.extend(row, row.n + 1)
    parts = [(row, idx[k, row.n : row.n + 1].tolist()) for k, row in enumerate(rows.rows)]
    plain, padded = rows.cache.step(parts), rows.cache.step(parts, padded=True)
    assert plain.idx.shape == (1, 3) and padded.idx.shape == (1, 4)
    assert padded.groups[0].masks[0].size(-1) == 256
    wanted = model(plain.idx, cache=plain)
    torch.testing.assert_close(model(padded.idx, cache=padded)[:, :3], wanted)
    for k, row in enumerate(rows.rows):
        torch.testing.assert_close(wanted[0, k], model(idx[k : k + 1, : row.n + 1])[0, -1])
