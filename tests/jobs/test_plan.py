"""jobs/plan.py and the short form of the main job, as commands."""

from __future__ import annotations

import json
import subprocess
import sys

import _plan as plan_job
import pytest
from _runtime import main

from nanochat_ray.config import RunSettings
from nanochat_ray.plan.whole import Planner
from nanochat_ray.presets import Machine, preset
from tests.conftest import JOBS
from tests.jobs.running import run

D24 = ("--depth", "24", "--gpus", "8", "--gpu-type", "H100")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The job in this process, in another folder: exit code and output."""
    import plan

    def run_here(*flags: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
        code = 0
        try:
            main(plan.cli)
        except SystemExit as end:
            code = int(end.code or 0)
        return code, "".join(capsys.readouterr())

    return run_here


def document(call, *args) -> dict:
    code, out = call(*args, "--json")
    assert code == 0, out
    return json.loads(out)


def test_the_command_of_the_readme(call, tmp_path):
    code, out = call(*D24)
    assert code == 0
    for words in ("1,384,122,122", "8 x H100", "8,757,706,752", "MEMORY OF ONE GPU", "--device-batch-size 16 does",
                  "COMMUNICATION", "TIME AND COST", "SERVING", "NOT MODELLED"):
        assert words in out, words
    assert list(tmp_path.iterdir()) == []  # it writes nothing


def test_json_says_the_same(call):
    found = document(call, *D24)
    assert found["size"]["parameters"]["total"] == 1_384_122_122
    assert found["size"]["num_iterations"] == 8352 and found["machines"]["ranks"] == 8
    assert set(found["memory"]) == {"sharded", "ddp", "zero1", "zero2", "zero3"}
    assert found["problems"] and "--device-batch-size 16" in found["problems"][0]


def test_presets_flags_and_config_files(call, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("gpus: 16\ngpu_type: H200\nnodes: 2\ninterconnect: 3200\nprice_per_hour: 50\n")
    found = document(call, "--config", str(config), "--preset", "d24", "--device-batch-size", "32")
    assert found["size"]["num_iterations"] == 5568 and found["fp8"] == "tensorwise"  # the preset's ratio and fp8
    assert found["machines"]["nodes"] == 2 and found["memory"]["sharded"]["rows"] == 32
    assert found["price_per_hour"]["value"] == 50
    assert document(call, "--gpus", "8", "--gpu-type", "H100")["size"]["num_iterations"] == 5568  # as the main job's


def test_this_machine_is_planned_for_without_gpus(call):
    found = document(call)
    if found["machines"]["device"]["on_cpu"]:
        assert found["size"]["num_iterations"] == 500 and found["machines"]["where"] == "here"
        assert found["speed"]["tok_per_s"] > 0 and found["memory"]["sharded"]["peak"] < 2**31


@pytest.mark.parametrize(("flags", "words"), [
    (("--gpus", "8"), "--gpu-type"),
    (("--gpu-type", "H100"), "--gpus"),
    (("--gpus", "0", "--gpu-type", "H100"), "at least 1"),
    (("--gpus", "2", "--gpu-type", "H100", "--nodes", "3"), "--nodes 3"),
    (("--mfu", "nan"), "finite"),
    (("--mfu", "150"), "at most 100"),
    ((*D24, "--device-type", "cpu"), "contradict"),
    ((*D24, "--workers", "9:12"), "--workers 9:12 is more than --gpus 8"),
    (("--preset", "d25"), "nearest"),
    (("--depth", "0"), "--depth 0"),
    ((*D24, "--fp8", "--dtype", "float32"), "bfloat16"),
    ((*D24, "--total-batch-size", "1000"), "1000"),
])
def test_what_a_person_gets_wrong(call, flags, words):
    code, out = call(*flags)
    assert code != 0 and words in out and "Traceback" not in out


def test_the_short_form_until_pretraining_is_done(tmp_path, capsys):
    settings = preset("cpu", Machine(0))
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"storage": str(tmp_path)})})
    plan_job.announce(settings, Machine(0, cpus=2, where="here"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("plan: 2,556,010 parameters")
    assert "measured on 2 CPUs" in lines[3]
    done = tmp_path / "cpu" / "pretrain" / "_SUCCESS"
    done.parent.mkdir(parents=True)
    done.touch()
    plan_job.announce(settings, Machine(0, cpus=2, where="here"))
    assert capsys.readouterr().out == ""  # finished: nothing to say


@pytest.mark.parametrize(("changes", "gpus"), [
    ({"sft": {"num_iterations": 7000}}, 0), ({"run": {"workers": "2"}}, 0), ({"run": {"data": "climbmix"}}, 0), ({}, 1),
])
def test_what_is_not_the_measured_run_is_not_called_so(tmp_path, capsys, changes, gpus):
    settings = preset("cpu", Machine(0))
    changes.setdefault("run", {})["storage"] = str(tmp_path)
    parts = {name: getattr(settings, name).model_copy(update=change) for name, change in changes.items()}
    plan_job.announce(settings.model_copy(update=parts), Machine(gpus, "H100", cpus=2, where="here"))
    assert "measured on" not in capsys.readouterr().out


def test_a_run_whose_pretraining_is_done_in_the_store_is_not_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "new home"))
    done = tmp_path / "store" / "cpu" / "pretrain" / "_SUCCESS"
    done.parent.mkdir(parents=True)
    done.touch()
    settings = preset("cpu", Machine(0))
    storage = settings.run.model_copy(update={"storage": f"file://{tmp_path}/store"})
    plan_job.announce(settings.model_copy(update={"run": storage}), Machine(0, cpus=2, where="here"))
    assert capsys.readouterr().out == ""


def test_as_many_ranks_as_there_will_be():
    def ranks(workers: str, machine: Machine, **changes: object) -> int:
        return plan_job.planner_for(machine, RunSettings(workers=workers, **changes)).machines.ranks

    one, cluster = Machine(1, "H100", where="as asked for"), Machine(0, cpus=6, where="in the cluster")
    assert [ranks(workers, one) for workers in ("1:8", "1", "2:8")] == [1, 1, 2]
    assert [ranks(workers, cluster) for workers in ("1:40", "1:4")] == [6, 4]
    assert [ranks("1:40", Machine(0, cpus=2)), ranks("1:40", Machine(0, cpus=2), ray=False)] == [40, 1]


def test_a_refusal_is_of_the_least_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanochat_ray.plan.hardware.host_memory_bytes", lambda: 4 * 2**30)
    settings = preset("cpu", Machine(0))

    def announce(workers: str) -> None:
        run_settings = settings.run.model_copy(update={"storage": str(tmp_path), "workers": workers})
        plan_job.announce(settings.model_copy(update={"run": run_settings}), Machine(0, cpus=2, where="here"))

    announce("1:16")
    assert "16 x CPU worker" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--workers \d fits"):
        announce("16")


def test_a_gpu_that_is_here_says_itself_whether_it_has_bf16(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    planner = plan_job.planner_for(Machine(1, "NVIDIA GeForce RTX 2080 Ti"), RunSettings(), memory_bytes=11 * 2**30)
    assert planner.dtype == "float32"


def test_on_a_cluster_of_unknown_cpus_nothing_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    settings = preset("d24", Machine(0))
    run_settings = settings.run.model_copy(update={"storage": f"file://{tmp_path}/store", "workers": "4"})
    plan_job.announce(settings.model_copy(update={"run": run_settings, "pretrain": settings.pretrain.model_copy(
        update={"fp8": False})}), Machine(0, cpus=64, where="in the cluster"))
    out = capsys.readouterr().out
    assert "object storage" in out and "not known" in out


def test_gpus_that_come_when_they_are_asked_for_are_planned_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    cluster = Machine(0, cpus=4, where="in the cluster")
    run = RunSettings(workers="16", storage=f"file://{tmp_path}/store", device_type="cuda")
    plan_job.announce(preset("d24", cluster).model_copy(update={"run": run}), cluster)
    assert "16 x unknown GPU" in capsys.readouterr().out


def test_the_main_job_refuses_what_cannot_fit(tmp_path):
    flags = ("--preset", "smoke", "--no-ray", "--pretrain.total-batch-size", str(2**30),
             "--pretrain.device-batch-size", str(2**22))
    code, out = run(tmp_path, "speedrun.py", *flags)
    assert code == 1 and "cannot fit" in out and "--pretrain.device-batch-size" in out and "Traceback" not in out
    assert not list(tmp_path.glob("*/tokenizer"))  # before anything is done


def test_planning_needs_no_ray(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(JOBS)!r}); sys.argv = ['plan.py', '--gpus', '8', '--gpu-type', 'H100']\n"
        "import plan; plan.cli(); print('ray' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.strip().endswith("False")


def test_a_planner_of_the_jobs_knows_its_ranks():
    settings = preset("d24", Machine(24, "H100"))
    planner: Planner = plan_job.planner_for(Machine(24, "H100", where="as asked for"), settings.run)
    assert (planner.machines.ranks, planner.machines.nodes, planner.machines.per_node) == (24, 3, 8)
    assert planner.between_gbit == 400 and planner.dtype == "bfloat16"
    assert plan_job.planner_for(Machine(2, "V100", where="as asked for"), settings.run).dtype == "float32"
