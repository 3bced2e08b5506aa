"""`jobs/status.py` as a person uses it: what may be named, exit codes, JSON, the page, in a browser too."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_ray.config import RunSettings
from nanochat_ray.report.status_failures import note_failure
from nanochat_ray.run_dir import Lease, RunDir
from tests.jobs.running import JOBS, environment
from tests.report.test_status import HOSTILE, begin, finish, save, train


@pytest.fixture
def status(monkeypatch, capsys):
    """Runs the job in this process: flags -> (exit code, what it printed)."""
    import _runtime
    import status

    def run(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["status.py", *flags])
        try:
            _runtime.main(status.cli)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Path:
    """Two runs: `whole` is done, `half` trains."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for tag in ("whole", "half"):
        run = RunDir(tmp_path / tag)
        Lease.acquire(run.root).release()
        finish(run, "tokenizer")
        if tag == "half":
            train(begin(run, "pretrain"), range(60))
            save(run.stage("pretrain"), 50, num_iterations=100)
    return tmp_path


def test_what_a_run_may_be_called(status, storage, tmp_path, monkeypatch):
    monkeypatch.chdir(storage)
    for named in (["whole"], ["--model-tag", "whole"], ["whole", "--storage", str(storage)],
                  [str(storage / "whole")], ["./whole/"], [f"../{storage.name}/whole"],
                  [f"file://{storage}/whole"], [f"file://{storage}/whole/"]):  # fmt: skip
        code, said = status(*named)
        assert code == 0 and "whole: done" in said, (named, said)
    monkeypatch.chdir(storage / "whole")
    assert "whole: done" in status(".")[1]
    code, said = status()  # the latest run
    assert code == 3 and "half: stopped" in said


@pytest.mark.parametrize("flags, words", [
    (["nothing"], "no run 'nothing'"), (["/nowhere/at/all"], "there are none"), (["s3://bucket"], "STORAGE/MODEL_TAG"),
    (["/a/b", "--storage", "/c"], "leave one of them out"), (["whole", "--storage", "/nowhere"], "there are none"),
])  # fmt: skip
def test_no_such_run(status, storage, flags, words):
    code, said = status(*flags)
    assert code == 1 and words in said and "Traceback" not in said


def test_wrong_flags(status, storage):
    for flags in (["whole", "--watch", "0"], ["whole", "--watch", "x"], ["whole", "--htlm", "x"],
                  ["whole", "--model-tag", "half"]):  # fmt: skip
        assert status(*flags)[0] == 2


def test_json_and_exit_codes(status, storage):
    code, said = status("half", "--json")
    found = json.loads(said)
    assert code == 3 and found["state"] == "stopped" and found["restarts"] == 0
    (stage,) = [stage for stage in found["stages"] if stage["name"] == found["stage"]]
    assert (stage["step"], stage["steps"], stage["checkpoint"]["step"]) == (60, 100, 50)
    with Lease.acquire(storage / "half"):
        code, said = status("half", "--json")
    assert code == 0 and json.loads(said)["holder"]["pid"] == os.getpid()


def test_a_page_that_cannot_be_written(status, storage):
    (storage / "file").touch()
    code, said = status("half", "--html", str(storage / "file" / "page.html"))
    assert code == 1 and "error:" in said


def test_only_ordinary_files_become_pages(status, storage):
    fifo, folder, link, target = (storage / name for name in ("fifo", "folder", "link", "target"))
    os.mkfifo(fifo)
    folder.mkdir()
    link.symlink_to(target)
    for path in (fifo, folder):
        code, said = status("whole", "--html", str(path))
        assert code == 1 and f"{path} is there and is no ordinary file" in said
    assert fifo.is_fifo() and folder.is_dir()
    assert status("whole", "--html", str(link))[0] == 0
    assert link.is_symlink() and target.read_text().endswith("</html>\n")


def test_a_page_that_cannot_be_written_ends_no_watch(status, storage, monkeypatch):
    """The disk is full at the first look, and the job is gone at the second."""
    lease, page = Lease.acquire(storage / "half"), storage / "page.html"

    def write(path: Path, data: str) -> None:
        lease.release()
        monkeypatch.undo()
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(storage))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nanochat_ray.report.status_page.write_atomic", write)
    code, said = status("half", "--watch", "0.1", "--html", str(page))
    assert code == 3 and f"cannot write the page {page}: No space left" in said and page.exists()


@pytest.mark.parametrize("where", ["between", "in a stage", "stopped"])
def test_what_ends_a_job_outside_of_its_stages_is_noted_once(status, storage, where):
    from _runtime import Stopped, open_job

    error = Stopped("asked for") if where == "stopped" else ConnectionError("the hub is away")
    with pytest.raises(type(error)), open_job(RunSettings(storage=str(storage), device_type="cpu"), "whole") as job:
        with job.stage("pretrain", {}) if where == "in a stage" else contextlib.nullcontext():
            raise error
    code, said = status("whole")
    if where == "stopped":
        assert code == 0 and "last error" not in said
        return
    of = "pretrain" if where == "in a stage" else "whole"
    assert code == 3 and "whole: failed" in said and f"last error: {of}, " in said and "the hub is away" in said
    assert len(list((storage / "whole").rglob("failures.jsonl"))) == 1
    with open_job(RunSettings(storage=str(storage), device_type="cpu"), "whole"):
        pass
    assert "whole: failed" not in status("whole")[1]


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null"])
def test_a_damaged_lease_is_named(status, storage, damaged, monkeypatch):
    monkeypatch.setattr("nanochat_ray.run_dir.READ_AGAIN_S", ())
    (storage / "half" / "lease.json").write_text(damaged)
    code, said = status("half")
    assert code == 3 and "step 60 of 100" in said and ("cannot be read: lease.json" in said) == (damaged != "null")


def test_a_store_that_is_away_is_looked_at_again(status, storage, monkeypatch):
    from nanochat_ray.run_dir import RunDir

    away = [ConnectionError("cannot read it")]

    def fetch(run: RunDir) -> RunDir:
        if away:
            raise away.pop()
        return run

    monkeypatch.setattr(RunDir, "fetch", fetch)
    code, said = status("half", "--watch", "0.1")
    assert code == 3 and "cannot read it; looking again in 0.1 s" in said and "step 60 of 100" in said
    away.append(ConnectionError("cannot read it"))
    assert status("half") == (1, "error: cannot read it\n")


def test_a_run_in_object_storage(status, storage, tmp_path):
    """Named by its URI, the files come from the store, and what is written there later is seen."""
    uri = f"file://{storage}/half"
    assert "step 60 of 100" in status(uri)[1]
    train(storage / "half" / "pretrain", range(60, 80))
    note_failure(storage / "half" / "pretrain", RuntimeError("lost node"), 1, final=True)
    code, said = status(uri)
    assert code == 3 and "step 80 of 100" in said and "half: failed" in said and "lost node" in said
    assert "last checkpoint: step 50" in said


def test_it_watches_to_the_end_and_needs_neither_ray_nor_torch(storage, tmp_path):
    """A process of its own in another folder, its page written anew until the run's job is gone."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(JOBS)!r}); sys.argv = ['status.py', 'half', '--watch', '0.1', '--html', "
        "'page.html']\nimport _runtime, status, atexit\n"
        "atexit.register(lambda: open('loaded.txt', 'w').write(' '.join({'ray', 'torch', 'wandb'} & {*sys.modules})))\n"
        "_runtime.main(status.cli)"
    )
    page = elsewhere / "page.html"
    lease = Lease.acquire(storage / "half")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment(storage), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not page.exists() or "60 / 100" not in page.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert '<meta http-equiv="refresh"' in page.read_text()
    train(storage / "half" / "pretrain", range(60, 70))
    while "70 / 100" not in page.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    lease.release()
    assert process.wait(timeout=120) == 3
    assert "stopped" in page.read_text() and "refresh" not in page.read_text()
    assert (elsewhere / "loaded.txt").read_text() == ""
    assert [path.name for path in elsewhere.iterdir()] and not list(elsewhere.glob(".*tmp"))


def test_the_page_in_a_browser(status, storage, tmp_path):
    """Nothing is fetched, no text of the run becomes markup, curves are drawn, and it fits a phone."""
    if not os.environ.get("NANOCHAT_RAY_NEED_BROWSER"):
        pytest.importorskip("selenium", reason="no selenium, which drives the browser")
    from tests.serve.page_server import chromium

    note_failure(storage / "half" / "pretrain", RuntimeError(HOSTILE + " " + "long" * 100), 1)
    with Lease.acquire(storage / "half"):
        status("half", "--html", str(tmp_path / "page.html"))
    with chromium() as browser:
        browser.get(f"file://{tmp_path}/page.html")
        assert browser.title == "half: running"
        body = browser.find_element("tag name", "body").text
        assert "60 / 100" in body and "<script>alert(1)</script>" in body and "Last error" in body
        assert browser.execute_script("return document.scripts.length + document.images.length") == 0
        lines = browser.find_elements("css selector", "svg polyline")
        assert len(lines) >= 2 and all(line.size["width"] > 100 for line in lines)
        for width in (1280, 500):  # the least width of a window here
            browser.set_window_size(width, 900)
            wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0
        assert browser.get_log("browser") == []
