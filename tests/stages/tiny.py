"""A run small enough to train in seconds, without Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_ray.config import PretrainSettings, ResolvedSFTSettings
from nanochat_ray.corpus.reader import iter_documents, scan_data
from nanochat_ray.messages import World
from nanochat_ray.run_dir import CHECKPOINTS, Lease
from nanochat_ray.stages.hooks import FolderHooks
from nanochat_ray.stages.pretrain import PretrainJob, pretrain
from nanochat_ray.stages.rows import CorpusRows, MixtureRows, plain_row_blocks
from nanochat_ray.stages.sft import SFTJob, finetune
from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.text.packing import step_batches
from nanochat_ray.text.tokenizer import Tokenizer

T = 32
ROWS_PER_STEP = 6
STEPS = 12
PRETRAIN = PretrainSettings(
    depth=2, head_dim=16, aspect_ratio=16, max_seq_len=T, num_iterations=STEPS, total_batch_size=ROWS_PER_STEP * T,
    device_batch_size=4, warmup_steps=2, eval_every=None, eval_tokens=8 * T, core_metric_every=None, sample_every=None,
)


@dataclass
class Recorder(FolderHooks):
    """The folder's hooks, with what they were told kept, and able to ask for a stop or break at a step."""

    stage_folder: Path
    epoch: int = 1
    stop_at: int | None = None
    break_at: int | None = None
    records: list[dict] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(self.stage_folder, self.epoch, World(), None, keep_last=2)

    def report(self, step, metrics):
        if "train/loss_step" not in metrics:
            return
        self.records.append({"step": step, **metrics})
        if step + 1 == self.break_at:
            raise RuntimeError("broken on purpose")

    def stop_requested(self):
        return super().stop_requested() or (self.stop_at is not None and len(self.records) + 1 >= self.stop_at)

    @property
    def losses(self) -> list[float]:
        return [record["train/loss_step"] for record in self.records]


def make_run(root: Path, shards: Path, settings: PretrainSettings = PRETRAIN) -> tuple[PretrainJob, CorpusRows]:
    """A run's folder with a tokenizer, and the job and rows of its pretraining."""
    manifest = scan_data(str(shards))
    folder = root / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.train(iter_documents(manifest, "train"), 300).save(folder)
    if not (root / "lease.json").exists():
        Lease.acquire(root).release()
    job = PretrainJob(settings, root / "pretrain", folder, manifest, dtype="float32")
    return job, CorpusRows(manifest, folder, settings.max_seq_len, settings.seed)


def run_pretrain(job: PretrainJob, rows: CorpusRows, hooks: Recorder) -> dict:
    n = job.settings.total_batch_size // job.settings.max_seq_len
    return pretrain(job, World(), lambda c, s: step_batches(plain_row_blocks(rows, c), n, start_step=s), hooks)


def conversations(path: Path, n: int = 60) -> Path:
    lines = [
        json.dumps([{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": f"{k} " * (1 + k % 5)}])
        for k in range(n)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_sft(root: Path, base: PretrainJob, file: Path, **changes) -> tuple[SFTJob, MixtureRows]:
    values = {
        "max_seq_len": T, "device_batch_size": 4, "total_batch_size": 4 * T, "embedding_lr": 0.3,
        "unembedding_lr": 0.008, "matrix_lr": 0.02, "eval_every": None, "eval_tokens": 4 * T, "chatcore_every": None,
    }
    settings = ResolvedSFTSettings(**(values | changes))
    epochs = None if settings.num_iterations else settings.num_epochs
    specs, sources = (f"json={file}",), TaskSources()
    rows = MixtureRows(specs, "train", sources, base.tokenizer_folder, T, settings.seed, epochs)
    val_rows = MixtureRows(specs, "val", sources, base.tokenizer_folder, T, settings.seed)
    job = SFTJob(
        settings, root / "sft", base.tokenizer_folder, base.stage_folder / CHECKPOINTS, val_rows, dtype="float32"
    )
    return job, rows


def run_sft(job: SFTJob, rows: MixtureRows, hooks: Recorder) -> dict:
    n = job.settings.total_batch_size // job.settings.max_seq_len
    return finetune(job, World(), lambda c, s: step_batches(plain_row_blocks(rows, c), n, start_step=s), hooks)
