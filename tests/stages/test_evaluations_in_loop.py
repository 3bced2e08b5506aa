"""Evaluation at intervals inside the loops: when it happens, what it reports, and that training does not notice it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from nanochat_ray.corpus import download
from nanochat_ray.sandbox import usable
from nanochat_ray.stages.evaluation import ChatTasks
from nanochat_ray.tasks.rows import TaskSources
from tests.metrics.bundle import three_kinds
from tests.stages.tiny import PRETRAIN, STEPS, Recorder, conversations, make_run, make_sft, run_pretrain, run_sft
from tests.tasks.conftest import write_jsonl, write_parquet

ARC_ROW = {"question": "Hot?", "choices": {"text": ["ice", "sun"], "label": ["1", "2"]}, "answerKey": "2"}
CODE_ROW = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
            "test": "def check(f):\n    assert f() == 1\n"}  # fmt: skip


@dataclass
class Everything(Recorder):
    """Keeps what is reported besides training steps too."""

    evaluations: list[tuple[int, dict]] = field(default_factory=list)

    def report(self, step, metrics):
        if "train/loss_step" not in metrics:
            self.evaluations.append((step, metrics))
        super().report(step, metrics)

    def steps_of(self, name: str) -> list[int]:
        return [step for step, metrics in self.evaluations if name in metrics]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, shards):
    """Pretraining and finetuning without any evaluation in the loop."""
    root = tmp_path_factory.mktemp("calm")
    job, rows = make_run(root, shards)
    hooks = Everything(job.stage_folder)
    run_pretrain(job, rows, hooks)
    assert hooks.evaluations == []
    sft_job, sft_rows = make_sft(root, job, conversations(root / "talk.jsonl"))
    sft_hooks = Everything(sft_job.stage_folder)
    run_sft(sft_job, sft_rows, sft_hooks)
    return root, job, hooks.losses, sft_hooks.losses


def test_pretraining_evaluates_at_its_intervals_and_at_the_end(calm, tmp_path, shards):
    settings = PRETRAIN.model_copy(
        update={"eval_every": 5, "core_metric_every": 4, "core_metric_max_per_task": 3, "sample_every": 6}
    )
    job, rows = make_run(tmp_path, shards, settings)
    hooks = Everything(job.stage_folder)
    result = run_pretrain(replace(job, eval_bundle=three_kinds(tmp_path / "bundle")), rows, hooks)
    assert hooks.steps_of("val/bpb") == [0, 5, 10, STEPS]
    assert hooks.steps_of("core_metric") == [4, 8, STEPS]
    assert hooks.steps_of("samples") == [6, STEPS]
    core = next(metrics for _, metrics in hooks.evaluations if "core_metric" in metrics)
    assert {"core/mc", "core/schema", "core/lm"} <= core.keys()
    assert result["metrics"]["val/bpb"] == hooks.evaluations[-3][1]["val/bpb"]
    assert hooks.losses == calm[2]


def test_finetuning_evaluates_at_its_intervals(calm, tmp_path, monkeypatch):
    monkeypatch.setenv(download.OFFLINE_VARIABLE, "1")
    root, base, _, losses = calm
    write_parquet(tmp_path / "arc/ARC-Easy/test.parquet", [ARC_ROW] * 3)
    write_jsonl(tmp_path / "human_eval/HumanEval.jsonl", [CODE_ROW])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lease.json").write_bytes((root / "lease.json").read_bytes())
    job, rows = make_sft(tmp_path / "run", base, root / "talk.jsonl", eval_every=4, chatcore_every=3)
    hooks = Everything(job.stage_folder)
    tasks = ChatTasks(TaskSources(tmp_path), max_categorical=2, max_generative=2, max_new_tokens=4)
    n = run_sft(replace(job, chat_tasks=tasks), rows, hooks)["step"]
    assert hooks.steps_of("val/bpb") == [*range(0, n, 4), n]
    assert hooks.steps_of("chatcore/ARC-Easy") == list(range(3, n, 3))
    assert hooks.steps_of("chatcore/HumanEval") == (list(range(3, n, 3)) if usable() else [])
    assert hooks.losses == losses
