"""A reinforcement learning stage small enough to run in a second: a byte tokenizer, a random network, a task that can
be learned by rounding lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_ray.config import ModelConfig, PretrainSettings, RLSettings
from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import model_tensors, save_checkpoint
from nanochat_ray.model.flat_weights import FlatWeights, flatten
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import Lease, RunDir
from nanochat_ray.stages.hooks import FolderHooks
from nanochat_ray.stages.rl import RLJob, reinforce
from nanochat_ray.stages.rollouts import OwnRollouts, RolloutSource
from nanochat_ray.tasks.rl_task import RLTask, RLTaskSpec
from tests.engine.tiny import byte_tokenizer

N_PROMPTS = 10
SETTINGS = RLSettings(
    examples_per_step=4, num_samples=4, prompts_per_unit=2, max_new_tokens=6, num_epochs=2, device_batch_size=5,
    eval_every=None, eval_examples=3, eval_samples=2, save_every=2, matrix_lr=0.05, embedding_lr=0.5,
    unembedding_lr=0.05, init_lr_frac=1.0,
)


@dataclass(frozen=True)
class LowLetters(RLTaskSpec):
    """The reward is the share of small bytes in what was written."""

    kind: Any = "file"

    def open(self) -> RLTask:
        def prompts(split):
            return [
                {"id": f"{split}-{k}", "messages": [
                    {"role": "user", "content": f"{split} {k}"}, {"role": "assistant", "content": "aaa"}]}
                for k in range(N_PROMPTS)
            ]  # fmt: skip

        async def reward(conversation, completion):
            return sum(letter < "P" for letter in completion) / max(1, len(completion))

        return RLTask("low", prompts, reward)

    def identity(self):
        return {"name": "low"}


def make_rl(root: Path, task: RLTaskSpec = LowLetters(), **changes: Any) -> RLJob:
    """A run's folder with a tokenizer and an SFT checkpoint, unless it is there, and the job of its RL stage."""
    run = RunDir(root)
    if not (root / "lease.json").exists():
        Lease.acquire(root).release()
        byte_tokenizer().save(run.stage("tokenizer"))
        config = ModelConfig(sequence_len=64, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
        model = GPT.build(config)
        meta = {"model_config": config.model_dump(mode="json")}
        save_checkpoint(run.checkpoints("sft"), 3, model_tensors(model), None, meta)
    settings = RLSettings.model_validate(SETTINGS.model_dump() | changes)
    return RLJob(
        settings, run.stage("rl"), run.stage("tokenizer"), run.checkpoints("sft"), PretrainSettings(), task, "float32"
    )


@dataclass
class Recorder(FolderHooks):
    """The folder's hooks, with what they were told kept, and able to ask for a stop or break at a step."""

    stage_folder: Path
    stop_at: int | None = None
    break_at: int | None = None
    records: list[dict] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(self.stage_folder, 1, World(), None, keep_last=9)

    def report(self, step, metrics):
        self.records.append({"step": step, **metrics})
        if "train/loss" in metrics and step + 1 == self.break_at:
            raise RuntimeError("broken on purpose")

    def stop_requested(self):
        return self.stop_at is not None and len(self.of("train/loss")) + 1 >= self.stop_at

    def of(self, name: str) -> list[float]:
        return [record[name] for record in self.records if name in record]


class VersionedRollouts(OwnRollouts):
    """Samples with whatever version a unit asks for, as a pool of actors does, and counts what it did."""

    def __init__(self, spec, world=World()):
        super().__init__(spec, world)
        self.versions: dict[int, FlatWeights] = {}
        self.done: list[str] = []

    def publish(self, version, model):
        self.versions[version] = flatten(model, version)

    def _do(self, unit):
        self.sampler.load(self.versions[unit.version])
        self.done.append(unit.name)
        return super()._do(unit)


def run_rl(job: RLJob, hooks: Recorder | None = None, source: RolloutSource | None = None) -> dict:
    source = source or VersionedRollouts(job.rollout_spec("cpu"))
    return reinforce(job, World(), source, hooks or Recorder(job.stage_folder))
