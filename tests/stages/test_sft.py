"""Laws of the finetuning loop, in one process without Ray."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.config import SFTSettings
from nanochat_ray.model.checkpoint import latest_checkpoint, open_checkpoint
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.sft import inherit, schedule_progress
from tests.stages.tiny import Recorder, T, conversations, make_run, make_sft, run_pretrain, run_sft


@pytest.fixture(scope="module")
def base(tmp_path_factory, shards):
    root = tmp_path_factory.mktemp("base")
    job, rows = make_run(root, shards)
    run_pretrain(job, rows, Recorder(job.stage_folder))
    return root, job, conversations(root / "talk.jsonl")


@pytest.fixture
def run(base, tmp_path):
    """Makes an SFT job in a folder of its own."""
    from nanochat_ray.run_dir import Lease

    Lease.acquire(tmp_path).release()
    return lambda **changes: make_sft(tmp_path, base[1], base[2], **changes)


@pytest.mark.parametrize("n", [1, 7])
def test_it_takes_exactly_the_steps_asked_for(run, n):
    job, rows = run(num_iterations=n)
    hooks = Recorder(job.stage_folder)
    assert run_sft(job, rows, hooks)["step"] == len(hooks.losses) == n


def test_an_epoch_trains_every_conversation_once(run):
    job, rows = run(num_epochs=2)
    hooks = Recorder(job.stage_folder)
    result = run_sft(job, rows, hooks)
    packed = rows.pack(0)
    assert sum(record["train/supervised_tokens"] for record in hooks.records) == 2 * packed.mask[:, 1:].sum()
    assert result["metrics"]["epochs"] == pytest.approx(2)
    rates = [record["train/lrm"] for record in hooks.records]
    assert all(0 <= rate <= 1 for rate in rates) and rates == sorted(rates, reverse=True) and rates[0] == 1


def test_stopped_and_continued_is_bit_identical(run, tmp_path, base):
    job, rows = run(num_epochs=2)
    whole = Recorder(job.stage_folder)
    steps = run_sft(job, rows, whole)["step"]
    wanted = open_checkpoint(job.stage_folder / CHECKPOINTS, steps).model_tensors()
    (tmp_path / "sft").rename(tmp_path / "kept")
    first = Recorder(job.stage_folder, stop_at=3)
    assert run_sft(job, rows, first)["status"] == "stopped"
    second = Recorder(job.stage_folder)
    run_sft(job, rows, second)
    assert first.losses + second.losses == whole.losses
    got = open_checkpoint(job.stage_folder / CHECKPOINTS, steps).model_tensors()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_checkpoint_keeps_the_context_of_pretraining(run, base):
    job, rows = run(num_iterations=1, max_seq_len=T // 2, total_batch_size=T)
    run_sft(job, rows, Recorder(job.stage_folder))
    tuned = latest_checkpoint(job.stage_folder / CHECKPOINTS)
    assert tuned.model_config == latest_checkpoint(base[1].stage_folder / CHECKPOINTS).model_config
    assert tuned.meta["settings"]["max_seq_len"] == T // 2


def test_no_gradient_from_what_the_user_says(run):
    from nanochat_ray.text.tokenizer import Tokenizer

    job, rows = run()
    packed, tokenizer = rows.pack(0), Tokenizer.load(job.tokenizer_folder)
    user = tokenizer.encode_special("<|user_start|>")
    assert (packed.tokens == user).any() and not packed.mask[packed.tokens == user].any()
    said = tokenizer.decode(packed.tokens[packed.mask])
    assert "say" not in said and "<|assistant_end|>" in said


def test_unset_values_come_from_pretraining(base):
    checkpoint = latest_checkpoint(base[1].stage_folder / CHECKPOINTS)
    resolved, notes = inherit(SFTSettings(matrix_lr=0.5), checkpoint)
    assert (resolved.max_seq_len, resolved.total_batch_size, resolved.embedding_lr) == (T, 6 * T, 0.3)
    assert "matrix_lr 0.5, pretraining had 0.02" in notes and "max_seq_len 32, inherited from pretraining" in notes
    with pytest.raises(ValueError, match="nearest that is: 96"):
        inherit(SFTSettings(total_batch_size=100), checkpoint)
    with pytest.raises(ValueError, match="longer than the model's context of 32"):
        inherit(SFTSettings(max_seq_len=64), checkpoint)


def test_the_schedule_follows_steps_or_conversations():
    assert schedule_progress(SFTSettings(num_iterations=8), 2, 0.9) == 0.25
    assert schedule_progress(SFTSettings(num_epochs=2), 2, 0.9) == 0.45
    assert schedule_progress(SFTSettings(), 2, 1.5) == 1.0
