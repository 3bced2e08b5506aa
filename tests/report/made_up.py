"""A made-up run folder: five known stages, one of them interrupted, and one unknown; NaN and awkward texts included.
And one of reinforcement learning, to put beside them."""

from __future__ import annotations

import math
from pathlib import Path

from nanochat_ray.report.environment import Environment
from nanochat_ray.report.metrics_log import WATCH_FILE, MetricsLog
from nanochat_ray.report.records import Sample, Skipped, StageRecord, Table, plain, write_result
from nanochat_ray.report.rl import AFTER, BEFORE, SAMPLES_FILES, RLSample
from nanochat_ray.run_dir import DONE_FILE, METRICS_FILE, write_json

ENVIRONMENT = Environment(
    git_branch="main", git_commit="abc1234", git_dirty=True, platform="Linux-6.1", cpu="A CPU", cpus_physical=8,
    cpus_logical=16, ram_bytes=64 * 2**30, gpus={"NVIDIA H100 80GB HBM3": 8}, vram_bytes=640 * 2**30, cuda="12.8",
    python="3.11.7", torch="2.13.0", ray="2.60.0",
)


def write_training(folder: Path, steps: int, eval_every: int) -> None:
    folder.mkdir(parents=True)
    log = MetricsLog(folder / METRICS_FILE)
    bpb = None
    for step in range(steps + 1):
        if step % eval_every == 0 or step == steps:
            bpb = 0.8 + 1.5 * math.exp(-step / steps * 4)
            log.append({"step": step, "val/bpb": bpb})
        if step == steps:
            break
        loss = 3 + 5 * math.exp(-step / steps * 5)
        log.append({
            "step": step, "val/bpb": bpb, "train/loss": loss, "train/loss_step": loss + 0.2 * math.sin(step * 1.7),
            "train/lrm": min(1.0, step / 40, (steps - step) / steps / 0.65), "train/dt": 0.12,
            "train/tok_per_sec": 68_000 + 3_000 * math.sin(step), "train/mfu": 0.0 / 1.0 if step else math.nan,
            "train/grad_norm": 1 + loss, "train/data_wait_s": 0.0006, "train/checkpoint_stall_s": 0.12 * (step == 20),
            "data/waste_frac": 0.031,
        })
    log.close()


def make_run(root: Path) -> Path:
    run = root / "d4"
    config = {"run": {"data": None, "model_tag": "d4"}, "pretrain": {"depth": 4, "matrix_lr": 0.02, "seed": 42}}
    write_training(run / "pretrain", 400, 50)
    write_training(run / "sft", 120, 60)
    watch = MetricsLog(run / "pretrain" / WATCH_FILE)
    for step, core in ((100, 0.05), (200, 0.125)):
        watch.append({"step": step, "val/bpb": 1 / step, "core_metric": core, "core_metric_name": "CORE20"})
    watch.close()
    records = [
        StageRecord(
            "tokenizer", "2026-11-20T10:00:00+0000", 4.25,
            {"vocab_size": 2048, "bytes_per_token": 4.71, "std": math.nan},
            tables={
                "Compression": Table(
                    ["text", "gpt-2", "ours", "ratio"], [["news | web", 404, 375, 1.0773], ["code", 576, 492, None]]
                )
            },
            config={"tokenizer": {"vocab_size": 2048}},
        ),
        StageRecord(
            "pretrain", "2026-11-20T10:00:05+0000", 63.5,
            {"val/bpb": 0.8275, "val/min_bpb": 0.8275, "parameters": 11_796_480, "training_tokens": 3_276_800,
             "total_training_flops": 2.4e18, "total_training_time": 48.2, "dtype": "bfloat16", "resumed_at": None,
             "peak_memory_bytes": 1_800_000_000, "val/convention": "best-fit crop; 256 rows of T=256; bfloat16"},
            config=config, hashes={"data": "8c1f" * 16, "tokenizer": "77aa" * 16},
        ),
        StageRecord(
            "base_eval", "2026-11-20T10:01:10+0000", 12.0,
            {"train/bpb": 0.81, "val/bpb": 0.8274, "core_metric": math.nan},
            samples=[Sample("The capital of Toria is", " Bell.\n```python\nprint(1)\n```"), Sample("", "<b>bold|</b>")],
            skipped=[Skipped("CORE", "no bundle in ~/.cache/nanochat_ray/eval_bundle")],
        ),
        StageRecord("sft", "2026-11-20T10:01:25+0000", 151.0, {"val/bpb": 0.3121, "peak_memory_bytes": 1_900_000_000}),
        StageRecord(
            "chat_eval", "2026-11-20T10:04:00+0000", 4000.0,
            {"source": "sft", "chatcore/GSM8K": 0.0312, "heldout/overall": 0.93, "heldout/capitals": 0.98,
             "heldout/word problems": 0.61, "chatcore_metric": None},
            skipped=[Skipped("HumanEval", "needs a sandbox"), Skipped("ARC-Easy", "no data | <none>")],
        ),
        StageRecord("distil", "2026-11-20T11:20:00+0000", 1.0, {"kl": 0.00012}),
    ]
    for record in records:
        write_result(run / record.stage, record)
        if record.stage != "sft":
            (run / record.stage / DONE_FILE).write_text("{}")
    (run / "notes").mkdir()
    return run


RL_STEPS, RL_EVAL_EVERY, RESTART = 60, 20, -1
QUESTION = "What is 6 times 7?"
AWKWARD = "a|b <b>x</b> ![p](http://x/y.png) *z*\n#### 7"


def make_rl(run: Path) -> Path:
    """A finished stage of RL that was started twice, and the evaluation of its model."""
    folder = run / "rl"
    folder.mkdir(parents=True)
    log = MetricsLog(folder / METRICS_FILE)
    for step in [*range(30), RESTART, *range(25, RL_STEPS)]:
        if step == RESTART:
            log.append({"event": "start", "time": 1.0})
            continue
        if step % RL_EVAL_EVERY == 0:
            log.append({"step": step, **rl_evaluation(step)})
        log.append({
            "step": step, "rollout/reward_mean": 0.3 + 0.005 * step, "rollout/length_mean": 60 - 0.2 * step,
            "rollout/policy_lag": 1, "rollout/zero_advantage_frac": 0.25, "rollout/masked": 2 * (step == 7),
            "rollout/set_aside": int(step == 40), "rollout/generate_s": 1.0, "rollout/score_s": 0.1,
            "rollout/wait_s": 0.5, "train/update_s": 0.4, "train/publish_s": 0.1, "train/dt": 2.0,
            "train/loss": math.sin(step) / 10, "train/grad_norm": 0.5, "train/lrm": 1 - step / RL_STEPS,
            "train/tok_per_sec": 4000,
            **({"rollout/left_out": {"world/train/17": "failed 3 times: <killed>"}} if step == 40 else {}),
        })
    log.append({"step": RL_STEPS, **rl_evaluation(RL_STEPS)})
    log.close()
    metrics = {
        f"{when}/{name.removeprefix('eval/')}": value
        for when, step in ((BEFORE, 0), (AFTER, RL_STEPS)) for name, value in rl_evaluation(step).items()
    }
    write_result(folder, StageRecord("rl", "2026-11-20T12:00:00+0000", 140.0, {"num_iterations": RL_STEPS, **metrics}))
    before = [
        RLSample("q1", QUESTION, "Is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.", 0.0),
        RLSample("q1", QUESTION, "another sample of it", 1.0),
        RLSample("q2", AWKWARD, AWKWARD, None),
    ]
    after = [
        RLSample("q2", AWKWARD, "<|python_start|>6*<|python_end|>" + "y" * 900, 1.0),
        RLSample("q1", QUESTION, "", 1.0),
    ]
    write_json(folder / SAMPLES_FILES[BEFORE], plain(before))
    write_json(folder / SAMPLES_FILES[AFTER], plain(after))
    metrics = {"source": "rl", "heldout/overall": 0.96, "chatcore/GSM8K": 0.05}
    write_result(run / "chat_eval_rl", StageRecord("chat_eval_rl", "2026-11-20T12:03:00+0000", 10.0, metrics))
    return run


def rl_evaluation(step: int) -> dict[str, float]:
    p = 0.4 + 0.005 * step
    return {
        "eval/pass@1": p + 0.01, "eval/pass@2": p + 0.1, "eval/unbiased_pass@1": p, "eval/unbiased_pass@2": p + 0.12,
        "eval/greedy": p + 0.2, "eval/reward_mean": p, "eval/length_mean": 60.5 - 0.2 * step,
    }
