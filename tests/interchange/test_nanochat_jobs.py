"""import_nanochat and export_nanochat as commands: nanochat's folder to a run and back; what a person gets wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import export_nanochat
import import_nanochat
import pytest
import torch

from nanochat_ray.interchange import nanochat_run
from nanochat_ray.model import checkpoint as checkpoint_module
from nanochat_ray.model.checkpoint import latest_checkpoint
from nanochat_ray.report.markdown import write_report
from nanochat_ray.run_dir import RunDir, existing_run, read_json
from nanochat_ray.text.tokenizer import Tokenizer
from tests.interchange.nanochat_made import (
    call,
    encoding,
    golden_config,
    golden_state,
    write_golden,
    write_model,
    write_tokenizer,
)
from tests.jobs.running import run
from tests.parity.goldens import load_json, load_tensors

STAGES = ("pretrain", "sft", "rl")
QUESTION = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_golden(tmp_path / "nanochat", "c", ("base", "sft", "rl"))


@pytest.fixture
def importing(tmp_path, monkeypatch):
    def do(folder: Path, *flags: str) -> None:
        call(import_nanochat, monkeypatch, str(folder), "--storage", str(tmp_path / "runs"), *flags)

    return do


@pytest.fixture
def exporting(tmp_path, monkeypatch):
    def do(to: Path | str, *flags: str) -> None:
        call(export_nanochat, monkeypatch, "--to", str(to), "--storage", str(tmp_path / "runs"), *flags)

    return do


def weights(run_dir: RunDir, stage: str = "pretrain"):
    checkpoint = latest_checkpoint(run_dir.checkpoints(stage))
    assert checkpoint is not None
    return checkpoint


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_a_folder_of_nanochats_becomes_a_run(base, importing, tmp_path, capsys):
    importing(base)
    assert existing_run(str(tmp_path / "runs"), None) == "d4"
    run_dir = RunDir(tmp_path / "runs" / "d4")
    assert all(run_dir.is_done(stage) for stage in ("tokenizer", *STAGES))
    tokenizer = Tokenizer.load(run_dir.stage("tokenizer"))
    assert tokenizer.encode("the river") == encoding(512).encode_ordinary("the river")
    expected = load_tensors("forward_c")
    for stage in STAGES:
        checkpoint = weights(run_dir, stage)
        assert checkpoint.step == 20 and same_tensors(checkpoint.model_tensors(), golden_state("c"))
        with torch.no_grad():
            logits = checkpoint.build_model("cpu", torch.float32, 512)(expected["input_ids"].long())
        at = expected["logit_positions"].long()
        torch.testing.assert_close(logits[:, at], expected["logits"], atol=1e-4, rtol=0)
    lineage = read_json(run_dir.stage("sft") / "config.json")["imported"]
    assert lineage["tag"] == "d4" and len(lineage["model_sha256"]) == len(lineage["meta_sha256"]) == 64
    assert "nanochat" in write_report(run_dir.root).read_text()
    capsys.readouterr()
    importing(base)
    assert "base step 20, sft step 20, rl step 20" in capsys.readouterr().out


def test_back_and_forth_is_the_same_bit_for_bit(base, importing, exporting, tmp_path):
    importing(base)
    exporting(tmp_path / "out")
    importing(tmp_path / "out", "--model-tag", "again")
    first, again = RunDir(tmp_path / "runs" / "d4"), RunDir(tmp_path / "runs" / "again")
    for stage in STAGES:
        one, two = weights(first, stage), weights(again, stage)
        assert (one.model_hash, one.step, one.model_config) == (two.model_hash, two.step, two.model_config)
    assert Tokenizer.load(first.stage("tokenizer")).hash == Tokenizer.load(again.stage("tokenizer")).hash
    for name in ("base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints"):
        before, after = base / name / "d4", tmp_path / "out" / name / "d4"
        assert sorted(p.name for p in before.iterdir()) == sorted(p.name for p in after.iterdir())
        read = [torch.load(folder / "model_000020.pt", weights_only=True) for folder in (before, after)]
        assert same_tensors(*read)
        metas = [json.loads((folder / "meta_000020.json").read_text()) for folder in (before, after)]
        assert metas[1].pop(nanochat_run.OURS) and metas[0] == metas[1]
    for name in ("tokenizer.pkl", "token_bytes.pt"):
        assert (tmp_path / "out" / "tokenizer" / name).stat().st_size > 1000
    assert torch.equal(*[torch.load(b / "tokenizer" / "token_bytes.pt", weights_only=True)
                         for b in (base, tmp_path / "out")])


def test_constants_come_back_too(tmp_path, importing, exporting, caplog):
    """An older network has other constants than nanochat's code of today, so that one cannot run it; we can."""
    base = write_golden(tmp_path / "nanochat", "c")
    importing(base, "--constants", "rope_base=10000", "qk_scale=1")
    exporting(tmp_path / "out")
    assert "rope_base 10000.0, nanochat has 100000.0" in caplog.text
    importing(tmp_path / "out", "--model-tag", "again")
    config = weights(RunDir(tmp_path / "runs" / "again")).model_config
    assert (config.rope_base, config.qk_scale) == (10_000, 1)
    for wrong in ("rope=1", "rope_base", "rope_base=x", "vocab_pad_multiple=64", "arch_version=1"):
        with pytest.raises(ValueError, match="--constants"):
            importing(base, "--constants", wrong)


def test_broken_off_and_given_again(base, importing, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            importing(base)
    run_dir = RunDir(tmp_path / "runs" / "d4")
    assert run_dir.is_done("tokenizer") and not run_dir.is_done("pretrain")
    importing(base)
    assert all(run_dir.is_done(stage) for stage in STAGES)


def test_other_files_under_the_same_name_are_an_error(base, importing, tmp_path):
    importing(base)
    changed = golden_state("c") | {"backout_lambda": torch.ones(1)}
    write_model(base, "sft", "d4", 20, changed, golden_config("c"))
    with pytest.raises(ValueError, match="model_sha256"):
        importing(base)
    assert same_tensors(weights(RunDir(tmp_path / "runs" / "d4"), "sft").model_tensors(), golden_state("c"))


def test_nothing_is_begun_with_a_bad_file(base, importing, tmp_path):
    write_model(base, "base", "d4", 20, golden_state("c") | {"extra": torch.zeros(1)}, golden_config("c"))
    with pytest.raises(ValueError, match=r"model_000020\.pt.*extra"):
        importing(base)
    shutil.copyfile(base / "base_checkpoints/d4/model_000020.pt", base / "tokenizer/tokenizer.pkl")
    with pytest.raises(ValueError, match=r"tokenizer\.pkl: not a pickled"):
        importing(base, "--model-tag", "other")
    write_tokenizer(base, 600)
    with pytest.raises(ValueError, match="512 tokens, the tokenizer 600"):
        importing(base, "--model-tag", "third", "--sources", "sft")
    assert not (tmp_path / "runs").exists()
    importing(base, "--model-tag", "third", "--sources", "sft", "--tokenizer", str(write_tokenizer(tmp_path, 512)))
    assert RunDir(tmp_path / "runs" / "third").is_done("sft")  # as the message said


def test_which_model_is_taken(tmp_path, importing, monkeypatch):
    base = tmp_path / "nanochat"
    config, state = golden_config("c"), golden_state("c")
    for tag, step in (("d4", 9), ("d12", 7), ("d12", 999_999), ("d12", 1_000_000), ("zebra", 5)):
        write_model(base, "base", tag, step, state, config)
    write_model(base, "sft", "d4", 3, state, config)
    write_tokenizer(base, 512)
    importing(base)  # the largest depth, the largest step as a number
    run_dir = RunDir(tmp_path / "runs" / "d12")
    assert weights(run_dir).step == 1_000_000 and not run_dir.stage("sft").exists()
    importing(base, "--from-tag", "d4", "--model-tag", "mine")
    assert weights(RunDir(tmp_path / "runs" / "mine"), "sft").step == 3
    importing(base, "--from-tag", "d12", "--step", "7", "--model-tag", "seven")
    assert weights(RunDir(tmp_path / "runs" / "seven")).step == 7
    for flags, words in [
        (("--from-tag", "d99"), "d99"), (("--step", "8"), "of step 8"), (("--sources", "rl"), "chatrl_checkpoints"),
    ]:
        with pytest.raises(FileNotFoundError, match=words):
            importing(base, *flags)
    with pytest.raises(FileNotFoundError, match="no folder"):
        importing(tmp_path / "nowhere")
    (base / "base_checkpoints" / "d4" / "model_000010.pt").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match="of step 10"):
        importing(base, "--from-tag", "d4", "--step", "10", "--model-tag", "zero")
    write_model(base, "base", "d4", 9, state, config).rename(base / "base_checkpoints" / "d4" / "model_9.pt")
    write_model(base, "base", "d4", 9, state, config)
    with pytest.raises(ValueError, match="both of step 9"):
        importing(base, "--from-tag", "d4", "--model-tag", "nine")


def test_the_files_of_one_model_in_a_folder(tmp_path, importing):
    """As models are passed around: everything flat. Then somebody has to say which model it is."""
    base = write_golden(tmp_path / "nanochat", "c", ("sft",), step=650)
    importing(base / "chatsft_checkpoints" / "d4", "--model-tag", "a")  # its parents say the rest
    assert weights(RunDir(tmp_path / "runs" / "a"), "sft").step == 650
    flat = tmp_path / "model"
    shutil.copytree(base / "chatsft_checkpoints" / "d4", flat)
    with pytest.raises(ValueError, match="--sources base, sft or rl"):
        importing(flat)
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        importing(flat, "--sources", "sft")
    importing(flat, "--sources", "sft", "--tokenizer", str(base / "tokenizer"))
    run_dir = RunDir(tmp_path / "runs" / "model")
    assert run_dir.is_done("sft") and not run_dir.is_done("pretrain")
    settings = read_json(run_dir.stage("pretrain") / "config.json")
    assert settings["known_from"] == "sft" and settings["settings"]["depth"] == 4  # for RL
    (flat / "meta_000650.json").unlink()
    with pytest.raises(FileNotFoundError, match="meta_000650"):
        importing(flat, "--sources", "sft", "--tokenizer", str(base / "tokenizer"), "--model-tag", "b")


def test_what_metas_say(tmp_path, importing):
    """Settings that finetuning inherits are taken, what cannot be is left out, Infinity becomes nothing."""
    base = tmp_path / "nanochat"
    user = {
        "run": "dummy", "depth": 4, "matrix_lr": 0.07, "target_flops": -1, "eval_every": -1, "warmup_ratio": 0.0,
        "embedding_lr": "much", "weight_decay": -3.0, "num_iterations": 10**4000,
    }
    write_model(
        base, "base", "d4", 20, golden_state("c"), golden_config("c"), user_config=user, device_batch_size=4,
        max_seq_len=256, total_batch_size=1024, loop_state={"min_val_bpb": float("inf")}, val_bpb={"a": 1},
    )
    write_tokenizer(base, 512)
    importing(base)
    meta = weights(RunDir(tmp_path / "runs" / "d4")).meta
    assert meta["settings"]["matrix_lr"] == 0.07 and meta["settings"]["device_batch_size"] == 4
    assert meta["settings"]["embedding_lr"] == 0.3 and meta["settings"]["weight_decay"] == 0.28
    assert meta["total_batch_size"] == 1024 and meta["val_bpb"] is None
    assert meta["imported"]["meta"]["loop_state"] == {"min_val_bpb": None}
    for text, words in (("{", "not JSON"), ("[]", "no model_config"), ("[" * 100_000, "not JSON"),
                        ('{"model_config": ' + '{"a": ' * 450 + "1" + "}" * 451, "nested deeper than 50")):
        (base / "base_checkpoints/d4/meta_000020.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            importing(base, "--model-tag", "b")


def test_a_run_in_a_store(base, tmp_path, monkeypatch):
    """Imported into a URI and exported from there by another machine; the weights are the same."""
    store = ("--storage", f"file://{tmp_path}/store")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "here"))
    (base / "mid_checkpoints").mkdir()
    call(import_nanochat, monkeypatch, str(base), *store, "--sources", "sft")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "there"))
    call(export_nanochat, monkeypatch, "--to", str(tmp_path / "out"), *store)
    found = torch.load(tmp_path / "out/chatsft_checkpoints/d4/model_000020.pt", weights_only=True)
    assert same_tensors(found, golden_state("c"))
    assert read_json(RunDir.of(store[1], "d4").stage("pretrain") / "config.json")["known_from"] == "sft"


def test_exporting_what_is_not_there(base, importing, exporting, tmp_path):
    importing(base, "--sources", "base")
    exporting(tmp_path / "out")
    assert not (tmp_path / "out" / "chatsft_checkpoints").exists()
    with pytest.raises(FileNotFoundError, match="stage sft"):
        exporting(tmp_path / "out", "--sources", "sft")
    with pytest.raises(FileNotFoundError, match="step 3"):
        exporting(tmp_path / "out", "--step", "3")
    with pytest.raises(ValueError, match="local folders"):
        exporting("s3://bucket/x")


@pytest.mark.slow
def test_everything_begins_with_an_imported_run(tmp_path):
    """chat, base_eval, sft and rl as a person runs them, on the golden network that was trained a little."""
    base = tmp_path / "nanochat"
    state, config = golden_state("d"), golden_config("d")
    user = {"depth": 3, "max_seq_len": 512, "total_batch_size": 1024}
    write_model(base, "base", "d3", 260, state, config, user_config=user, device_batch_size=2, total_batch_size=1024)
    write_tokenizer(base, 2048)
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(QUESTION['messages'])}\n" * 40)
    assert load_json("bpb")["config"]["vocab_size"] == 2048

    def job(name: str, *flags: str) -> str:
        code, out = run(tmp_path, name, *flags)
        assert code == 0, out
        return out

    assert "base step 260" in job("import_nanochat.py", str(base))
    job("base_eval.py", "--no-ray", "--eval", "bpb,sample", "--split-tokens", "1024", "--model-tag", "d3")
    job("sft.py", "--no-ray", "--mixture", f"json={tmp_path}/chats.jsonl", "--num-iterations", "2", "--max-seq-len",
        "128", "--total-batch-size", "256", "--eval-tokens", "256", "--chatcore-every", "-1")
    (tmp_path / "task.py").write_text(
        "def prompts(split):\n    return [{'prompt': f'{split} {k}'} for k in range(4)]\n"
        "def reward(conversation, completion):\n    return float(len(completion) % 3)\n"
    )
    job("rl.py", "--no-ray", "--task", "task.py", "--num-iterations", "1", "--examples-per-step", "2", "--num-samples",
        "2", "--max-new-tokens", "4", "--eval-every", "-1", "--eval-examples", "2", "--eval-samples", "2")
    assert job("chat_cli.py", "-i", "rl", "-p", "hello", "--max-new-tokens", "4").endswith("\n")
    assert "pretrain" in Path(job("report.py").splitlines()[-1]).read_text()
