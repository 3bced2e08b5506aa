"""Publishing to the hub, against a server of our own that answers as the hub does."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from nanochat_ray.interchange import publish_write
from nanochat_ray.interchange.publish import collect
from nanochat_ray.interchange.publish_write import publish
from nanochat_ray.run_dir import RunDir, existing_run
from tests.interchange.hub_server import Hub, hub_server
from tests.serve.runs import make_run

TAG, REPO = "d1-test", "somebody/small"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("runs"), TAG, ("pretrain",))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    if os.environ.get("NANOCHAT_RAY_NEED_HF") == "1":
        constants = importlib.import_module("huggingface_hub.constants")
    else:
        constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hf")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with hub_server() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def test_a_run_on_the_hub(hub: Hub, made, tmp_path):
    """One commit has everything; downloaded it is a storage again. Given again it does nothing."""
    package = collect(made)
    assert "published" in publish(package, made, f"hf://{REPO}")
    files = hub.repos[REPO]
    assert hub.commits == 1 and hub.private[REPO]
    assert files["README.md"] == files[f"{TAG}/README.md"] and files["README.md"].startswith(b"---\nlibrary_name")
    assert {f"{TAG}/published.json", f"{TAG}/lease.json", f"{TAG}/tokenizer/tokenizer.json"} <= files.keys()
    assert not [path for path in files if "optim" in path or "/." in path]
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert existing_run(str(tmp_path), None) == TAG
    assert "published before" in publish(package, made, f"hf://{REPO}") and hub.commits == 1


def test_refused_then_again_then_another(hub: Hub, made):
    package = collect(made)
    hub.refuse_commits = True
    with pytest.raises(ConnectionError, match="did not take hf://somebody/small"):
        publish(package, made, f"hf://{REPO}", private=False)
    assert hub.repos[REPO] == {} and not hub.private[REPO]
    hub.refuse_commits = False
    with pytest.raises(ValueError, match="for everybody to see"):
        publish(package, made, f"hf://{REPO}")
    hub.private[REPO] = True
    publish(package, made, f"hf://{REPO}")
    del hub.repos[REPO][f"{TAG}/tokenizer/tokenizer.json"]
    assert "published 7 files" in publish(package, made, f"hf://{REPO}")
    assert f"{TAG}/tokenizer/tokenizer.json" in hub.repos[REPO]
    hub.repos[REPO][f"{TAG}/old.bin"] = b"of an earlier one"
    hub.repos[REPO]["LICENSE"] = b"stays"
    with pytest.raises(ValueError, match=r"not published: old\.bin"):
        publish(package, made, f"hf://{REPO}")
    package.lineage["note"] = "changed"
    with pytest.raises(ValueError, match="--replace"):
        publish(package, made, f"hf://{REPO}")
    publish(package, made, f"hf://{REPO}", replace=True)
    assert f"{TAG}/old.bin" not in hub.repos[REPO] and hub.repos[REPO]["LICENSE"] == b"stays"


def test_a_full_disk_is_not_the_hubs(hub: Hub, made, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish_write, "_write", full)
    with pytest.raises(OSError, match="No space") as caught:
        publish(collect(made), made, f"hf://{REPO}")
    assert not isinstance(caught.value, ConnectionError)


def test_without_the_extra_it_is_one_clear_line(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[hf\]'"):
        publish(collect(made), made, f"hf://{REPO}")
