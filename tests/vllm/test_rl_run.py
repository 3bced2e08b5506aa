"""A short RL run on Ray whose rollouts vLLM samples: each version of the weights reaches the actors."""

from __future__ import annotations

import contextlib
import json

import _runtime
import pytest
import torch

from nanochat_ray.interchange.vllm_plugin import installed
from nanochat_ray.messages import RolloutGroup
from nanochat_ray.model.checkpoint import open_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import CONFIG_FILE, DONE_FILE, RunDir
from tests.jobs.rl_run import prepare, trained
from tests.jobs.test_rl_job import flags, inside

pytestmark = pytest.mark.vllm

STEPS = 3
RUN = {
    "num_epochs": None, "num_iterations": STEPS, "save_every": 1, "keep_checkpoints": STEPS, "rollout_workers": 2,
    "rollout_engine": "vllm", "wait_s": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> RunDir:
    storage = tmp_path_factory.mktemp("storage")
    folder = prepare(storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runtime, "ray_cluster", lambda workers, beside: contextlib.nullcontext())
        code, said = inside(flags(storage, **RUN))
    assert code == 0, said
    assert (folder.stage("rl") / DONE_FILE).exists()
    return folder


def network(folder: RunDir, step: int) -> GPT:
    """The weights of a version, as checkpoints have them."""
    stage, at = ("sft", 3) if step == 0 else ("rl", step)
    return open_checkpoint(folder.checkpoints(stage), at).build_model("cpu", torch.float32, 265).eval()


def misfit(model: GPT, groups: list[RolloutGroup]) -> float:
    """The largest difference between what was said when a token was sampled and what the network says."""
    worst = 0.0
    for group in groups:
        for rollout in group.rollouts:
            prompt = list(group.prompt.token_ids)
            with torch.inference_mode():
                said = model(torch.tensor([prompt + list(rollout.token_ids)])).float().log_softmax(-1)[0]
            for place, (token, sampled, logprob) in enumerate(
                zip(rollout.token_ids, rollout.mask, rollout.logprobs, strict=True), len(prompt) - 1
            ):
                worst = max(worst, abs(said[place, token].item() - logprob) if sampled else 0.0)
    return worst


def test_each_step_is_sampled_with_the_weights_of_the_step_before(finished):
    for step, groups in enumerate(trained(finished, STEPS)):
        assert {group.version for group in groups} == {step} and len(groups) == 4
        assert misfit(network(finished, step), groups) < 1e-3
        other = step + 1 if step == 0 else step - 1
        assert misfit(network(finished, other), groups) > 1e-2


def test_the_engine_is_part_of_the_runs_identity(finished):
    config = json.loads((finished.stage("rl") / CONFIG_FILE).read_text())
    assert config["rollout_engine_version"] == installed()[1] != ""
    assert config["rollout_engine"] == "vllm" and "rollout_engine" not in config["settings"]
    storage = finished.root.parent
    code, said = inside(flags(storage, **(RUN | {"rollout_engine": "own", "rollout_workers": 1})))
    assert code == 1 and 'rollout_engine: "vllm" -> null' in said


def test_its_rollouts_can_be_replayed_without_vllm(finished, tmp_path):
    from nanochat_ray.stages.rollout_log import ROLLOUTS

    prepare(tmp_path / "again")
    changes = {name: value for name, value in RUN.items() if name not in ("rollout_workers", "wait_s")}
    more = ("--no-ray", "--replay", str(finished.stage("rl") / ROLLOUTS))
    code, said = inside(flags(tmp_path / "again", *more, **changes))
    assert code == 0, said
    weights = [
        open_checkpoint(folder.checkpoints("rl"), STEPS).model_hash
        for folder in (finished, RunDir.of(str(tmp_path / "again"), "m"))
    ]
    assert weights[0] == weights[1]
