"""Which settings the main job takes."""

from __future__ import annotations

import pytest
import speedrun

from nanochat_ray.config import PretrainSettings, RunSettings
from nanochat_ray.flags import read_flags
from nanochat_ray.model.scaling import plan_training
from nanochat_ray.presets import GPU_PRESETS, Machine, choose_preset, preset


def settings(*argv: str, machine: Machine = Machine(0, cpus=2)):
    flags = read_flags("", speedrun.SECTIONS, list(argv), extra=speedrun.add_preset)
    return speedrun.settings_from(flags, machine)


def test_the_speedrun_of_the_spec():
    found, line = settings(machine=Machine(8, "NVIDIA H100"))
    plan = plan_training(found.pretrain, found.tokenizer.vocab_size)
    assert line == "preset d24: 8 GPUs here (NVIDIA H100)"
    assert (found.pretrain.depth, found.run.worker_range, found.run.data) == (24, (8, 8), "climbmix")
    assert (plan.total_batch_size, plan.num_iterations) == (1_048_576, 5_568)
    assert plan.grad_accum_steps(found.pretrain.device_batch_size, 8) == 4
    assert found.run.dtype is None  # bfloat16, by hardware
    assert found.pretrain.fp8 and found.pretrain.fp8_recipe == "tensorwise"


def test_fp8_is_for_the_speedrun_on_gpus_that_have_it():
    assert [name for name in GPU_PRESETS if preset(name, Machine(8, "NVIDIA H100 80GB HBM3")).pretrain.fp8] == ["d24"]
    for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA A40", "Tesla V100-SXM2-16GB", "A10G", "AMD Instinct MI300X"):
        assert not preset("d24", Machine(8, gpu)).pretrain.fp8, gpu
    for gpu in ("NVIDIA H200", "NVIDIA B200", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA RTX 4000 Ada", "A"):
        assert preset("d24", Machine(8, gpu)).pretrain.fp8, gpu
    found, _ = settings("--pretrain.no-fp8", machine=Machine(8, "NVIDIA H100"))
    assert not found.pretrain.fp8


@pytest.mark.parametrize(
    "machine, name",
    [(Machine(0), "cpu"), (Machine(1, "A"), "d12"), (Machine(4, "A"), "d12"), (Machine(16, "A"), "d24")],
)
def test_the_hardware_chooses(machine, name):
    assert choose_preset(machine)[0] == name


def test_gpus_of_a_cluster_are_asked_for_before_they_are_there():
    cluster = Machine(0, cpus=4, where="in the cluster")
    assert settings("--preset", "d24", "--workers", "16", machine=cluster)[0].run.device_type == "cuda"
    assert settings("--preset", "d24", "--device-type", "cpu", machine=cluster)[0].run.device_type == "cpu"
    assert settings("--preset", "smoke", machine=cluster)[0].run.device_type is None
    assert settings("--preset", "d24")[0].run.device_type is None


@pytest.mark.parametrize("name", ["cpu", "smoke", *GPU_PRESETS])
def test_every_preset_has_a_plan(name):
    found = preset(name, Machine(8, "x"))
    assert plan_training(found.pretrain, found.tokenizer.vocab_size).num_iterations > 0
    assert found.run.model_tag == name


def test_what_a_person_says_wins_over_the_preset():
    found, line = settings("--preset", "smoke", "--pretrain.depth", "3", "--model-tag", "mine", "--sft.num-epochs=2")
    assert line == "preset smoke: asked for"
    assert (found.pretrain.depth, found.run.model_tag, found.sft.num_epochs) == (3, "mine", 2)
    assert found.pretrain.head_dim == preset("smoke", Machine(0)).pretrain.head_dim


@pytest.mark.parametrize(
    "argv, words",
    [(["--preset", "d42"], "nearest: d32, d26, d24"), (["--pretrain.deph", "4"], "--pretrain.depth")],
)
def test_the_nearest_name_is_offered(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        settings(*argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_defaults_are_nanochats():
    assert PretrainSettings().target_param_data_ratio == 12 and PretrainSettings().save_every is None
    assert RunSettings().run == "dummy"
