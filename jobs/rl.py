"""Let the finetuned model learn from rewards (stage `rl`)."""

from __future__ import annotations

import logging
from pathlib import Path

from _runtime import Job, available_cpus, find_machine, main, open_job

from nanochat_ray.config import PretrainSettings, RLSettings, RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.presets import Machine
from nanochat_ray.run_dir import CONFIG_FILE, existing_run, read_json

logger = logging.getLogger("nanochat_ray")

NO_GPU_BESIDE = (
    "rollout_engine vllm: it samples on rollout workers, and there is no GPU beside those of the training workers; "
    "give --workers fewer of them, or --rollout-engine own"
)


def run(job: Job, settings: RLSettings, world_folder: Path | None, optional: bool = False) -> bool:
    """Whether the stage is done. `world_folder` is the embedded corpus if the run's data is that, else None.

    An optional one is left out, with the reason, if there are no prompts and nobody named any.
    """
    from _train import Feed, other_optimizer, train

    from nanochat_ray.interchange.vllm_plugin import installed
    from nanochat_ray.stages.rl import RLJob
    from nanochat_ray.stages.rl_desk import steps_of
    from nanochat_ray.stages.rollout_log import log_sha256
    from nanochat_ray.tasks.rl_task import rl_task_of
    from nanochat_ray.tasks.rows import TaskDataMissing
    from nanochat_ray.text.tokenizer import Tokenizer

    check_engine(job.settings, settings)
    tokenizer_folder = job.run_dir.require_stage("tokenizer", "tok_train.py")
    job.run_dir.require_stage("sft", "sft.py")
    try:
        task = rl_task_of(
            settings.prompts, settings.eval_prompts, settings.task, world_folder is not None, job.task_sources()
        )
    except TaskDataMissing as error:
        if not optional or settings.task or settings.prompts:
            raise
        logger.info("rl: left out: %s", error)
        return False
    pretrained = read_json(job.run_dir.stage("pretrain") / CONFIG_FILE)["settings"]
    stage = RLJob(
        settings, job.run_dir.stage("rl"), tokenizer_folder, job.run_dir.checkpoints("sft"),
        PretrainSettings.model_validate(pretrained), task, job.settings.dtype, job.settings.parallel,
    )
    hashes = {"tokenizer": Tokenizer.load(tokenizer_folder).hash, "base_model": stage.base().model_hash}
    files = {"task": None, "prompts": None, "eval_prompts": None}  # with their contents in the next line
    config = {"settings": settings.identity() | files, "task": task.identity()} | hashes
    if settings.replay:
        config["replay"] = log_sha256(Path(settings.replay))
    elif settings.rollout_engine != "own":  # not in the settings' identity, which runs have that are older
        config["rollout_engine"] = settings.rollout_engine
        config["rollout_engine_version"] = installed()[1]
    # Before the stage, since what this refuses is no failure of it.
    workers = 0 if job.run_dir.is_done("rl") else rollout_workers(job, settings)
    with job.stage("rl", config | other_optimizer(job.settings.parallel)) as notes:
        if notes is None:
            return True
        n_steps = steps_of(settings, len(task.open().prompts("train")))
        result = train(job, stage, Feed(rollout_workers=workers), n_steps)
        notes.metrics |= result["metrics"]
        notes.hashes |= hashes
    return True


def check_engine(run: RunSettings, settings: RLSettings, machine: Machine | None = None) -> None:
    """ValueError, before anything is started, if vLLM should sample and cannot. `machine` is looked up if unset."""
    if settings.rollout_engine == "own" or settings.replay:
        return
    from nanochat_ray.interchange.vllm_plugin import check_vllm

    if not run.ray or settings.rollout_workers == 0:
        raise ValueError(
            "rollout_engine vllm: it samples on rollout workers, since it gives neither memory nor threads back to "
            "training; leave --no-ray out and give --rollout-workers 1 or more, or --rollout-engine own"
        )
    machine = machine or find_machine()
    # Where a cluster has no GPU, some may still come when they are asked for.
    unknown = machine.gpus == 0 and machine.where == "in the cluster"
    device = run.device_type or ("cuda" if machine.gpus else "cpu")
    beside = machine.gpus - run.worker_range[1]
    if device == "cuda" and settings.rollout_workers is None and beside < 1 and not unknown:
        raise ValueError(NO_GPU_BESIDE)
    check_vllm(None if unknown else device)


def actors_beside(settings: RLSettings) -> int:
    """Actors that a private cluster should have room for beside the training workers."""
    return (settings.rollout_workers or available_cpus()) + 1


def rollout_workers(job: Job, settings: RLSettings) -> int:
    """How many Ray actors sample: as asked for, else by hardware; 0 means that the training workers do."""
    count = settings.rollout_workers if job.settings.ray and not settings.replay else 0
    if count is None and job.use_ray() and not job.device.startswith("cuda"):
        count = max(1, available_cpus() // settings.rollout_threads)
    elif count is None:
        import ray

        count = max(0, int(ray.cluster_resources().get("GPU", 0)) - job.settings.worker_range[1])
    if settings.rollout_engine == "vllm" and not count and not settings.replay:
        raise ValueError(NO_GPU_BESIDE)
    if settings.async_steps and not count and not settings.replay:
        why = "there is no GPU beside theirs" if job.settings.ray else "without Ray there are no others"
        raise ValueError(
            f"async_steps {settings.async_steps}: the training workers sample themselves, since {why}, so nothing runs "
            "ahead; give --async-steps 0, or Ray and --rollout-workers"
        )
    return count


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("rl", RLSettings())])
    settings, rl = flags.settings(RunSettings), flags.settings(RLSettings)
    from _data import pinned_world

    check_engine(settings, rl)
    tag = existing_run(settings.storage, settings.model_tag)
    with open_job(settings, tag, actors_beside(rl)) as job:
        run(job, rl, pinned_world(job.run_dir, settings.storage))


if __name__ == "__main__":
    main(cli)
