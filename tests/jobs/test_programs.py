"""Chat evaluation of HumanEval: programs in the sandbox, no isolation, a machine that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nanochat_ray import sandbox
from nanochat_ray.config import ChatEvalSettings, RunSettings
from nanochat_ray.report.records import read_result
from nanochat_ray.run_dir import DONE_FILE
from nanochat_ray.sandbox import SandboxFailed, SandboxUnavailable
from tests.sandbox.isolated import require
from tests.stages.tiny import Recorder, make_run, run_pretrain
from tests.tasks.conftest import write_jsonl


@pytest.fixture(scope="module")
def storage(tmp_path_factory, shards) -> Path:
    """A run with a tiny pretrained model, and three problems of HumanEval's kind in `tasks/`."""
    root = tmp_path_factory.mktemp("storage")
    job, rows = make_run(root / "d1", shards)
    run_pretrain(job, rows, Recorder(job.stage_folder))
    for stage in ("tokenizer", "pretrain"):
        (root / "d1" / stage / DONE_FILE).write_text("{}")
    rows = [
        {"prompt": f"def f{k}():\n", "canonical_solution": f"    return {k}\n", "entry_point": f"f{k}",
         "test": f"def check(f):\n    assert f() == {k}\n"} for k in range(3)
    ]  # fmt: skip
    write_jsonl(root / "tasks/human_eval/HumanEval.jsonl", rows)
    return root


@pytest.fixture
def evaluate(storage, tmp_path, monkeypatch):
    """Run the job in this process; gives its record and its problems' records."""
    import chat_eval
    from _runtime import open_job

    shutil.copytree(storage / "d1", tmp_path / "d1")

    def run(**more):
        settings = RunSettings(
            storage=str(tmp_path), model_tag="d1", ray=False, device_type="cpu", dtype="float32",
            task_data=str(storage / "tasks"), **more,
        )  # fmt: skip
        with open_job(settings, "d1") as job:
            chat_eval.run(job, ChatEvalSettings(source="base", task_name="HumanEval", max_new_tokens=4), None)
        folder = tmp_path / "d1" / "chat_eval_base"
        return read_result(folder), [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]

    return run


def test_each_problem_says_how_its_program_ended(evaluate):
    require(sandbox.usable() or "bwrap")
    record, problems = evaluate()
    assert record.metrics["chatcore/HumanEval"] == 0.0 and not record.skipped
    assert sum(row[3] for row in record.tables["Programs"].rows) == len(problems) == 3
    for problem in problems:
        (answer,) = problem["answers"]
        assert answer["program"] is None and answer["run"]["isolation"] == record.tables["Programs"].rows[0][1]
        assert answer["run"]["outcome"] == "failed"
        assert answer["run"]["error"].split(":")[0] in ("NameError", "SyntaxError")


def test_without_isolation_the_task_is_left_out_by_name_unless_told(evaluate, monkeypatch):
    def none():
        raise SandboxUnavailable("programs cannot be isolated here; install bubblewrap")

    monkeypatch.setattr("nanochat_ray.sandbox.require_isolation", none)
    monkeypatch.setattr("nanochat_ray.sandbox.program.usable", lambda: None)
    monkeypatch.setattr("nanochat_ray.sandbox.program.require_isolation", none)
    record, problems = evaluate()
    assert [skipped.name for skipped in record.skipped] == ["HumanEval"] and problems == []
    assert "install bubblewrap" in record.skipped[0].reason and "chatcore/HumanEval" not in record.metrics


def test_told_so_programs_run_without_isolation_and_the_record_says_it(evaluate, monkeypatch):
    monkeypatch.setattr("nanochat_ray.sandbox.program.usable", lambda: None)
    record, problems = evaluate(unsafe_sandbox=True)
    assert {row[1] for row in record.tables["Programs"].rows} == {"none"} and not record.skipped
    assert {problem["answers"][0]["run"]["isolation"] for problem in problems} == {"none"}


def test_what_the_machine_fails_at_is_left_out_by_name(evaluate, monkeypatch):
    require(sandbox.usable() or "bwrap")
    real = sandbox.run_programs

    def first_fails(codes, **more):
        return [SandboxFailed("full"), *real(codes[1:], **more)]

    monkeypatch.setattr(sandbox, "run_programs", first_fails)
    record, problems = evaluate()
    assert [(skipped.name, skipped.reason) for skipped in record.skipped] == [("HumanEval problem 0", "full")]
    assert len(problems) == 2


def test_a_process_with_a_gpu_runs_no_programs():
    from _evaluate import check_sandbox

    class OnGpu:
        settings = RunSettings(ray=False, unsafe_sandbox=True)
        device = "cuda"

        def use_ray(self) -> bool:
            return False

    with pytest.raises(SandboxUnavailable, match="this process holds the GPU"):
        check_sandbox(OnGpu())
