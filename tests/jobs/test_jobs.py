"""The jobs as commands: a whole run in one process, doing it again, and what a person may get wrong."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.run_dir import Lease
from tests.conftest import JOBS, write_shards
from tests.jobs.running import run, start

TINY = (
    "--no-ray", "--preset", "smoke", "--pretrain.depth", "1", "--pretrain.num-iterations", "4",
    "--pretrain.eval-tokens", "2048", "--base-eval.split-tokens", "2048", "--sft.num-iterations", "3",
    "--sft.eval-tokens", "2048", "--chat-eval.max-problems", "3", "--chat-eval.max-new-tokens", "8",
    "--tokenizer.vocab-size", "400",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The main job on the embedded world, as small as it gets."""
    storage = tmp_path_factory.mktemp("storage")
    code, out = run(storage, "speedrun.py", *TINY)
    assert code == 0, out
    return storage, out


@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.glob("[!_]*.py")))
def test_help(tmp_path, job):
    code, out = run(tmp_path, job, "--help")
    assert code == 0 and ("--model-tag" in out or job in ("download.py", "repackage.py"))


def test_the_main_job_ends_with_report_and_chat_command(tiny_run):
    storage, out = tiny_run
    assert out.startswith("preset smoke: asked for\n")
    report = storage / "smoke" / "report" / "report.md"
    assert f"report: {report}" in out
    assert "chat with it: " in out and f"chat_cli.py --storage {storage} --model-tag smoke" in out
    assert f"in a browser: env NANOCHAT_BASE_DIR={storage} " in out and "/serve_configs/chat.yaml" in out
    text = report.read_text()
    for words in ("BASE | SFT", "held-out", "HumanEval", "pretrain_loss.png"):
        assert words in text
    assert (report.parent / "pretrain_loss.png").stat().st_size > 1000


def test_again_skips_what_is_done(tiny_run):
    storage, _ = tiny_run
    code, out = run(storage, "speedrun.py", *TINY)
    assert code == 0 and out.count("done before, skipped") == 8 and "starts" not in out


def test_other_settings_are_an_error_with_the_difference(tiny_run):
    storage, _ = tiny_run
    code, out = run(storage, "speedrun.py", *TINY, "--pretrain.matrix-lr", "0.5")
    assert code == 1 and "settings.matrix_lr: 0.35 -> 0.5" in out and "--model-tag" in out and "Traceback" not in out


def test_other_data_is_an_error(tiny_run, shards):
    storage, _ = tiny_run
    code, out = run(storage, "speedrun.py", *TINY, "--data", str(shards))
    assert code == 1 and "begun with other data" in out
    assert "Traceback" not in out


def test_a_saved_config_is_a_config_file(tiny_run, tmp_path):
    storage, _ = tiny_run
    saved = json.loads((storage / "smoke" / "pretrain" / "config.json").read_text())["settings"]
    (tmp_path / "again.yaml").write_text(json.dumps({"pretrain": saved}))
    others = [flag for name, value in zip(TINY[3::2], TINY[4::2], strict=True) for flag in (name, value)
              if not name.startswith("--pretrain")]  # fmt: skip
    code, out = run(storage, "speedrun.py", *TINY[:3], *others, "--config", str(tmp_path / "again.yaml"))
    assert code == 0 and "pretrain: done before, skipped" in out, out


def test_one_shot_chat(tiny_run):
    storage, _ = tiny_run
    code, out = run(storage, "chat_cli.py", "-p", "Hello?", "--seed", "1", "-m", "8")
    assert code == 0 and "Traceback" not in out and "<|" not in out


def test_a_second_writer_is_refused_by_name(tiny_run):
    storage, _ = tiny_run
    with Lease.acquire(storage / "smoke"):
        code, out = run(storage, "tok_eval.py", "--model-tag", "smoke")
    assert code == 1 and "is being written by process" in out


@pytest.mark.slow
def test_one_stage_after_another_is_the_main_job_too(tmp_path, shards):
    flags = ("--no-ray", "--data", str(shards), "--model-tag", "d1")
    small = ("--depth=1", "--head-dim=16", "--aspect-ratio=32", "--max-seq-len=32", "--num-iterations=3",
             "--total-batch-size=128", "--device-batch-size=4", "--eval-tokens=128")  # fmt: skip
    assert run(tmp_path, "tok_train.py", *flags, "--vocab-size", "300")[0] == 0
    assert run(tmp_path, "tok_eval.py", *flags)[0] == 0
    code, out = run(tmp_path, "pretrain.py", *flags, *small)
    assert code == 0, out
    code, out = run(tmp_path, "base_eval.py", "--no-ray", "--eval", "bpb,sample", "--split-tokens", "256")
    assert code == 0 and "val bpb" in out, out


@pytest.fixture
def broken(tmp_path):
    """Data folders that are wrong, each in its own way."""
    (tmp_path / "empty").mkdir()
    write_shards(tmp_path / "corrupt")
    (tmp_path / "corrupt" / "shard_00001.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "columns").mkdir()
    for k in range(2):
        pq.write_table(pa.table({"content": ["a b"]}), tmp_path / "columns" / f"shard_{k}.parquet")
    shutil.copytree(tmp_path / "corrupt", tmp_path / "one")
    for k in (0, 1):
        (tmp_path / "one" / f"shard_0000{k}.parquet").unlink()
    return tmp_path


@pytest.mark.parametrize(
    "folder, words",
    [("nowhere", "does not exist"), ("empty", "no *.parquet"), ("corrupt", "shard_00001.parquet"),
     ("columns", "no column 'text'"), ("one", "one shard")],
)  # fmt: skip
def test_bad_data_is_one_clear_line(broken, folder, words):
    code, out = run(broken, "tok_train.py", "--no-ray", "--data", str(broken / folder), "--vocab-size", "300")
    assert code == 1 and words in out and "Traceback" not in out


def test_a_corrupt_shard_is_left_out_only_if_asked(broken):
    flags = ("--no-ray", "--data", str(broken / "corrupt"), "--vocab-size", "300", "--skip-corrupt")
    code, out = run(broken, "tok_train.py", *flags)
    assert code == 0 and "shard_00001.parquet" in out


@pytest.mark.parametrize(
    "job, flags, words",
    [
        ("pretrain.py", ["--total-batch-size", "5000"], "nearest that is: 4096"),
        ("pretrain.py", ["--fp8"], "fp8 needs an NVIDIA GPU"),
        ("pretrain.py", ["--dept", "4"], "--depth"),
        ("speedrun.py", ["--storage", "s3://key:secret@bucket/x"], "must not hold keys"),
        ("base_eval.py", ["--model-tag", "nothing"], "no run 'nothing'"),
        ("chat_cli.py", ["-p", "hello"], "no run in"),
        ("sft.py", ["--model-tag", "nothing"], "no run 'nothing'"),
    ],
)
def test_what_a_person_may_get_wrong(tmp_path, job, flags, words):
    code, out = run(tmp_path, job, *flags)
    assert code in (1, 2) and words in out and "Traceback" not in out
    assert not list(tmp_path.glob("*/lease.json"))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, shards):
    flags = ("--no-ray", "--data", str(shards), "--model-tag", "d1")
    assert run(tmp_path, "tok_train.py", *flags, "--vocab-size", "300")[0] == 0
    small = (*flags, "--depth=1", "--head-dim=16", "--aspect-ratio=32", "--max-seq-len=32", "--num-iterations=3000",
             "--total-batch-size=64", "--eval-every=-1", "--core-metric-every=-1", "--sample-every=-1")  # fmt: skip
    process = start(tmp_path, "pretrain.py", *small)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.terminate()
    out = process.stdout.read()
    assert process.wait() == 130 and "the same command goes on" in out
    saved = int(out.split("stopped at step ")[1].split(",")[0])
    assert 0 < saved < 3000
    process = start(tmp_path, "pretrain.py", *small)
    step = next(line for line in process.stdout if line.startswith("step"))
    process.kill()
    process.wait()
    assert step.startswith(f"step {saved:05d}")


def test_a_checkpoint_of_another_architecture_is_named_before_training(tiny_run, tmp_path):
    storage, _ = tiny_run
    shutil.copytree(storage, tmp_path / "copy")
    stage = tmp_path / "copy" / "smoke" / "pretrain"
    (stage / "_SUCCESS").unlink()
    (meta,) = stage.glob("checkpoints/*/meta.json")
    meta.write_text(meta.read_text().replace('"logit_softcap": 15.0', '"logit_softcap": 30.0'))
    code, out = run(tmp_path / "copy", "speedrun.py", *TINY)
    assert code == 1 and "is of another architecture" in out and "logit_softcap: 30.0 -> 15.0" in out, out


@pytest.mark.slow
def test_going_back_is_done_once(tmp_path, shards):
    flags = ("--no-ray", "--data", str(shards), "--model-tag", "d1")
    assert run(tmp_path, "tok_train.py", *flags, "--vocab-size", "300")[0] == 0
    small = (*flags, "--depth=1", "--head-dim=16", "--aspect-ratio=32", "--max-seq-len=32", "--num-iterations=6",
             "--total-batch-size=64", "--eval-every=-1", "--core-metric-every=-1", "--sample-every=-1",
             "--save-every=2", "--keep-checkpoints=9")  # fmt: skip
    assert run(tmp_path, "pretrain.py", *small)[0] == 0
    folder = tmp_path / "d1" / "pretrain"
    for words in ("resuming from step 2", "went back to step 2 before"):
        (folder / "_SUCCESS").unlink()
        code, out = run(tmp_path, "pretrain.py", *small, "--resume-from-step", "2")
        assert code == 0 and words in out, out
    assert "resuming from step 6" in out
