"""Publishing: what gets out and what never does, whole or not there, twice, broken off, and used again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import publish as publish_job
import pytest
import torch

from nanochat_ray.interchange import publish_write
from nanochat_ray.interchange.publish import allowed, collect, refuse_secrets
from nanochat_ray.interchange.publish_write import PUBLISHED_FILE, publish
from nanochat_ray.model.checkpoint import file_hash, latest_checkpoint, model_tensors, save_checkpoint
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import RunDir, existing_run, read_json, write_json
from nanochat_ray.text.tokenizer import Tokenizer
from tests.interchange.nanochat_made import call
from tests.serve.runs import make_run, random_model

PLANTED = "planted-0123456789"  # stands for everything that must not get out
TAG = "d1-test"


def plant(run_dir: RunDir) -> None:
    """Put what must not get out wherever a run may have it."""
    write_json(run_dir.root / "data.json", {
        "source": f"/home/{PLANTED}/shards", "text_column": "text", "skip_corrupt": False, "skipped": [],
        "train": [{"name": "a.parquet", "path": f"/home/{PLANTED}/shards/a.parquet", "bytes": 1, "row_groups": 1,
                   "rows": 5}],
        "val": {"name": "b.parquet", "path": f"/home/{PLANTED}/b.parquet", "bytes": 1, "row_groups": 1, "rows": 1},
    })  # fmt: skip
    for stage in ("pretrain", "sft"):
        folder = run_dir.stage(stage)
        config = {"depth": 2, "matrix_lr": 0.5, "window_pattern": "SL", "mixture": [PLANTED], "run": PLANTED}
        write_json(folder / "config.json", {
            "settings": config, "tokenizer": "a" * 64, "base_model": PLANTED, "task": {"name": PLANTED}, PLANTED: 1,
        })  # fmt: skip
        model = random_model(5)
        meta = {
            "source": "base", "model_config": model.config.model_dump(mode="json"), "settings": config, "val_bpb": 1.0,
            "optimizer": "MuonAdamW", "loop": {"note": PLANTED}, "imported": {"tag": "d2", "meta": {"key": PLANTED}},
        }
        moments = {f"{PLANTED}.moments": torch.ones(3)}
        save_checkpoint(run_dir.checkpoints(stage), 20, model_tensors(model), moments, meta)
        for name in ("metrics.jsonl", "wandb.json", "wandb.log", "samples_before.json", "result.json.bak", ".env"):
            (folder / name).write_text(f'{{"step": 1, "note": "{PLANTED}"}}\n')
        (folder / "rollouts").mkdir()
        (folder / "rollouts" / "train_000000.jsonl").write_text(PLANTED)
    report = run_dir.stage("report")
    report.mkdir()
    (report / "report.md").write_text(
        f"# {TAG}\nfrom `{run_dir.root}`, data in /home/{PLANTED}/shards, bundle not in /srv/{PLANTED}/"
        "bundle/core.yaml; see https://example.org/a/b/c; home /home/alice\n"
    )
    (report / "loss.png").write_bytes(b"png")
    (report / "notes.txt").write_text(PLANTED)
    for name in (".env", "notes.md", "wandb.json"):
        (run_dir.root / name).write_text(PLANTED)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> RunDir:
    run_dir = make_run(tmp_path_factory.mktemp("runs"), TAG)
    plant(run_dir)
    return run_dir


@pytest.fixture(params=["folder", "file", pytest.param("s3", marks=pytest.mark.slow)])
def place(request, tmp_path, monkeypatch) -> str:
    """Where to publish: a folder, or a store as another machine sees it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "cache"))
    if request.param == "folder":
        return str(tmp_path / "public")
    if request.param == "file":
        return f"file://{tmp_path}/public"
    return request.getfixturevalue("s3_server")(f"published-{tmp_path.name}")


def contents(place: str) -> dict[str, bytes]:
    """Every file below the published run, read from where it really lies."""
    root = RunDir.of(place, TAG).root
    remote = Remote.of(root)
    if remote is None:
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    def below(folder: Path) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name, entry in remote.listing(folder).items():
            if entry.size_bytes is None:
                found |= below(folder / name)
            else:
                found[str((folder / name).relative_to(root))] = remote.read(folder / name) or b""
        return found

    return below(root)


def is_listed(place: str) -> bool:
    try:
        return existing_run(place, None) == TAG
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("place", ["folder", "file", "s3"], indirect=True)
def test_what_gets_out(made, place):
    package = collect(made)
    assert "published 13 files" in publish(package, made, place)
    found = contents(place)
    assert not [path for path, data in found.items() if PLANTED.encode() in data]
    assert not [path for path in found if "optim" in path or "metrics" in path or "result" in path]
    manifest = json.loads(found[PUBLISHED_FILE])
    assert manifest["lineage"]["data"]["name"] == "shards" and manifest["lineage"]["data"]["train"][0]["rows"] == 5
    assert manifest["lineage"]["models"]["sft"]["step"] == 20 and manifest["published_with"]["commit"]
    config = json.loads(found["sft/config.json"])
    assert config["settings"] == {"depth": 2, "matrix_lr": 0.5, "window_pattern": "SL"}
    assert config["tokenizer"] == "a" * 64 and "base_model" not in config
    report = found["report/report.md"].decode()
    assert "<run>" in report and "<data>/shards" in report and "<...>/core.yaml" in report
    assert "alice" not in report
    assert "https://example.org/a/b/c" in report and "-i sft" in found["README.md"].decode()


def test_the_manifest_says_what_is_there(made, tmp_path):
    publish(collect(made), made, str(tmp_path))
    manifest = read_json(tmp_path / TAG / PUBLISHED_FILE)
    listed = set(manifest["files"])
    here = {str(path.relative_to(tmp_path / TAG)) for path in (tmp_path / TAG).rglob("*") if path.is_file()}
    assert listed <= here
    assert {Path(path).name for path in here - listed} == {PUBLISHED_FILE, "lease.json", "manifest.json"}
    for path, entry in manifest["files"].items():
        file = tmp_path / TAG / path
        assert entry == {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def test_what_is_published_is_a_run(made, place, tmp_path, monkeypatch):
    publish(collect(made), made, place)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))  # another machine: nothing is cached
    run_dir = RunDir.of(place, existing_run(place, None)).fetch()
    tokenizer = Tokenizer.load(run_dir.require_stage("tokenizer", "tok_train.py"))
    for stage in ("pretrain", "sft"):
        run_dir.require_stage(stage, "x")
        original, found = latest_checkpoint(made.checkpoints(stage)), latest_checkpoint(run_dir.checkpoints(stage))
        assert original and found and found.model_hash == original.model_hash and found.optimizer_tensors() is None
        model = found.build_model("cpu", torch.float32, tokenizer.vocab_size)
        assert torch.equal(model.lm_head.weight, original.model_tensors()["lm_head.weight"])
    with run_dir.open() as lease:  # and a job may train on in it
        assert lease.epoch >= 1
    with pytest.raises(ValueError, match="jobs write to"):
        publish(collect(made), made, place)


def test_twice_is_once(made, place):
    publish(collect(made), made, place)
    before = contents(place)
    assert "published before" in publish(collect(made), made, place)
    assert contents(place) == before


def wipe(root: Path) -> None:
    if (remote := Remote.of(root)) is not None:
        remote.delete(root)
    shutil.rmtree(root, ignore_errors=True)


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("place", "every"),
    [("folder", 4), *(pytest.param(kind, n, marks=pytest.mark.slow) for kind, n in (("folder", 1), ("s3", 4)))],
    indirect=["place"],
)
def test_broken_off_anywhere_it_is_not_there_and_can_be_finished(made, place, every, monkeypatch):
    """At every single write (or every fourth), then the same command again."""
    package = collect(made, ("sft",))
    write, left = publish_write._write, [10**9]

    def sometimes(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Broken
        write(path, data)

    monkeypatch.setattr(publish_write, "_write", sometimes)
    publish(package, made, place)
    whole = without_marks(contents(place))
    n_writes = 10**9 - left[0]
    assert n_writes > 8
    for allowed_writes in range(0, n_writes, every):
        wipe(RunDir.of(place, TAG).root)
        left[0] = allowed_writes
        with pytest.raises(Broken):
            publish(package, made, place)
        assert not is_listed(place)
        left[0] = 10**9
        publish(package, made, place)
        assert is_listed(place) and without_marks(contents(place)) == whole


def without_marks(found: dict[str, bytes]) -> dict[str, bytes]:
    """In a store a checkpoint's files have a name of their own for every save, which only their manifest knows."""
    return {path.rpartition("-")[2] if "-" in Path(path).name else path: data for path, data in found.items()
            if Path(path).name != "manifest.json"}


def test_damage_is_mended(made, tmp_path):
    publish(collect(made), made, str(tmp_path))
    before = contents(str(tmp_path))
    weights = next((tmp_path / TAG).rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-5])
    (tmp_path / TAG / "README.md").unlink()
    assert "published 13 files" in publish(collect(made), made, str(tmp_path))
    assert contents(str(tmp_path)) == before


def test_another_publication_is_taken_away_only_when_asked(made, place):
    publish(collect(made, ("sft",), 10), made, place)
    newer = collect(made, ("sft",))
    with pytest.raises(ValueError, match="--replace"):
        publish(newer, made, place)
    publish(newer, made, place, replace=True)
    steps = {path.split("/")[2] for path in contents(place) if "/checkpoints/" in path}
    assert steps == {"step_000020"} and is_listed(place)
    assert json.loads(contents(place)[PUBLISHED_FILE])["lineage"]["models"]["sft"]["step"] == 20


def test_nobody_elses_files_are_deleted(made, place):
    """A publishing.json of something else, and a file that came in beside a publication, with and without --replace."""
    package, other, root = collect(made), collect(made, ("sft",)), RunDir.of(place, TAG).root
    for name, data, words in (("publishing.json", b'{"files": {"thesis.tex": 1}}', "of nothing"),
                              ("thesis.tex", b"mine", "not empty")):  # fmt: skip
        publish_write._write(root / "thesis.tex", b"mine")
        publish_write._write(root / name, data)
        with pytest.raises(ValueError, match=words):
            publish(package, made, place, replace=True)
        assert contents(place).keys() == {"thesis.tex", name}
        wipe(root)
    publish(package, made, place)
    odd = "sft/checkpoints/step_000020/optim.pt"
    publish_write._write(root / odd, b"moments")
    before = contents(place)
    for wanted in (package, other):
        with pytest.raises(ValueError, match=f"not published: {odd}"):
            publish(wanted, made, place, replace=True)
    assert contents(place) == before
    publish_write._delete(root / odd)
    publish_write._delete(root / PUBLISHED_FILE)  # as of one that was broken off, of something else
    publish_write._write(root / "publishing.json", before[PUBLISHED_FILE])
    publish(other, made, place)
    assert not [path for path in contents(place) if "pretrain/checkpoints" in path]


def test_places_that_are_not_taken(made, tmp_path):
    package = collect(made)
    with pytest.raises(ValueError, match="the run itself"):
        publish(package, made, str(made.root.parent))
    (tmp_path / "a" / TAG).mkdir(parents=True)
    (tmp_path / "a" / TAG / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        publish(package, made, str(tmp_path / "a"), replace=True)
    make_run(tmp_path / "b", TAG)
    with pytest.raises(ValueError, match="jobs write to"):
        publish(package, made, str(tmp_path / "b"), replace=True)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(OSError, match="c"):
        publish(package, made, str(tmp_path / "c"))
    with pytest.raises(ValueError, match="keys"):
        publish(package, made, "s3://me:password@bucket/x")
    for repo in ("hf://name", "hf://a/b/c", "hf://"):
        with pytest.raises(ValueError, match="owner and name"):
            publish(package, made, repo)


def test_keys_are_refused(made, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-key-of-this-machine")
    with pytest.raises(ValueError, match=r"report/report\.md holds the value of MY_API_KEY"):
        refuse_secrets("report/report.md", b"text a-key-of-this-machine text")
    for shape in ("AKIA" + "A" * 16, "hf_" + "a" * 34, "ghp_" + "b" * 36, "sk-" + "c" * 40,
                  "-----BEGIN RSA PRIVATE KEY-----", "AIza" + "d" * 35, "WANDB_API_KEY: " + "0" * 40,
                  "s3://name:secretsecret@bucket/x", "https://h/x?X-Amz-Signature=abcdef"):
        with pytest.raises(ValueError, match="looks like a key") as caught:
            refuse_secrets("x.md", f"text {shape} text".encode())
        assert shape not in str(caught.value) or len(shape) < 8
    refuse_secrets("x.md", b"a short-key, a-key-of-another-machine, hf_short, commit: " + b"0" * 40
                   + b", http://host:80/a and name@host, abfs://container@account")
    monkeypatch.setenv("MY_API_KEY", "https://example.org/a/b/c")  # which the report holds
    with pytest.raises(ValueError, match="MY_API_KEY"):
        collect(made)
    for value, path in (('"optimizer": "MuonAdamW"', r"meta\.json"), ('"val": "b.parquet"', PUBLISHED_FILE)):
        monkeypatch.setenv("MY_API_KEY", value)  # which nothing else holds
        with pytest.raises(ValueError, match=f"{path} holds the value of MY_API_KEY"):
            collect(made)


def test_the_list_of_what_is_allowed():
    value = {
        "a": 1, "b": 0.5, "c": True, "d": None, "e": "text", "f": "0" * 64, "g": ["x"], "h": {"i": "x", "j": 2},
        "window_pattern": "SSSL", "packing": "x/y", "meta": {"k": 1},
    }  # fmt: skip
    assert allowed(value, "settings") == {
        "a": 1, "b": 0.5, "c": True, "d": None, "f": "0" * 64, "h": {"j": 2}, "window_pattern": "SSSL",
    }  # fmt: skip


def test_what_is_not_there_is_named(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="stage rl"):
        collect(made, ("rl",))
    with pytest.raises(FileNotFoundError, match="step 7"):
        collect(made, ("sft",), 7)
    with pytest.raises(ValueError, match="Name one source"):
        collect(made, None, 10)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        collect(RunDir(tmp_path / "empty"))


def test_as_a_command(made, tmp_path, monkeypatch, capsys):
    storage, to = str(made.root.parent), str(tmp_path / "public")
    call(publish_job, monkeypatch, TAG, to, "--storage", storage)
    assert f"{to}/{TAG}: published 13 files" in capsys.readouterr().out
    call(publish_job, monkeypatch, str(made.root), to)  # the run by its folder, from anywhere
    assert "published before" in capsys.readouterr().out
    call(publish_job, monkeypatch, TAG, to, "--storage", storage, "--sources", "base", "--replace")
    assert not (tmp_path / "public" / TAG / "sft").exists()
    assert (tmp_path / "public" / TAG / "pretrain" / "_SUCCESS").exists()
    with pytest.raises(ValueError, match="--storage"):
        call(publish_job, monkeypatch, "s3://a/b", to)
    with pytest.raises(FileNotFoundError, match="no run 'other'"):
        call(publish_job, monkeypatch, "other", to, "--storage", storage)
    with pytest.raises(SystemExit):
        call(publish_job, monkeypatch, TAG, to, "--storage", storage, "--model-tag", "other")
