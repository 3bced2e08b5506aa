"""Evaluate a chat model on the ChatCORE tasks and the embedded world's held-out questions (stage `chat_eval`)."""

from __future__ import annotations

import logging
from pathlib import Path

from _runtime import Job, Notes, main, open_job

from nanochat_ray.config import ChatEvalSettings, RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import existing_run, write_atomic

logger = logging.getLogger("nanochat_ray")

PROBLEMS_PER_UNIT = 50


def run(job: Job, settings: ChatEvalSettings, world_folder: Path | None) -> None:
    from _evaluate import check_sandbox, checkpoint_of, run_programs, run_units

    from nanochat_ray.messages import SamplingParams
    from nanochat_ray.metrics.chat_eval import graded
    from nanochat_ray.sandbox import SandboxUnavailable
    from nanochat_ray.stages.evaluation import EVAL_SEED, HELD_OUT, ChatUnit, EvalSpec, chat_task, cut
    from nanochat_ray.tasks.catalog import chat_task_names
    from nanochat_ray.tasks.humaneval import HumanEval
    from nanochat_ray.tasks.rows import TaskDataMissing

    checkpoint = checkpoint_of(job, settings.source, settings.step)
    stage = "chat_eval" if settings.source == "sft" else f"chat_eval_{settings.source}"
    config = {"settings": settings.identity(), "model": checkpoint.model_hash, "world": world_folder is not None}
    with job.stage(stage, config) as notes:
        if notes is None:
            return
        sources = job.task_sources()
        spec = EvalSpec(
            checkpoint.folder.parent, checkpoint.step, job.run_dir.stage("tokenizer"), job.device,
            job.settings.dtype, sources, world_folder=world_folder,
        )
        params = SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_tokens=settings.max_new_tokens,
            seed=EVAL_SEED,
            num_samples=settings.num_samples,
        )
        names = [HELD_OUT] if world_folder and settings.task_name is None else []
        tasks, units = {}, []
        for name in names + chat_task_names(settings.task_name):
            try:
                task = chat_task(name, sources, world_folder)
                if isinstance(task, HumanEval):
                    check_sandbox(job)
            except (TaskDataMissing, SandboxUnavailable) as error:
                notes.skip(name, str(error))
                continue
            tasks[name] = task
            n = min(len(tasks[name]), settings.max_problems or len(tasks[name]))
            units += [
                ChatUnit(name, indices, params, settings.batch_size) for indices in cut(range(n), PROBLEMS_PER_UNIT)
            ]
        found = run_units(job, spec, units)
        records: dict[str, list] = {name: [] for name in tasks}
        for unit, part in zip(units, found, strict=True):
            records[unit.task] += part
        for name in tasks:
            try:
                records[name], left_out = graded(records[name], lambda codes: run_programs(job, codes))
            except SandboxUnavailable as error:  # on another machine than the one that was asked
                notes.skip(name, str(error))
                del records[name]
                continue
            for index, reason in left_out.items():
                notes.skip(f"{name} problem {index}", reason)
        write_scores(job, stage, records, notes)


def write_scores(job: Job, stage: str, records: dict[str, list], notes: Notes) -> None:
    """Scores and tables for the report; every problem's record as a line of `problems.jsonl`."""
    import json

    from nanochat_ray.corpus.world.questions import HARD_FAMILY
    from nanochat_ray.metrics.chat_eval import program_outcomes, summarise
    from nanochat_ray.report.records import Table, plain
    from nanochat_ray.stages.evaluation import HELD_OUT, chat_metrics

    lines = [json.dumps(plain(record), ensure_ascii=False) for part in records.values() for record in part]
    write_atomic(job.run_dir.stage(stage) / "problems.jsonl", "".join(line + "\n" for line in lines))
    held_out = records.pop(HELD_OUT, None)
    results = {name: summarise(found) for name, found in records.items() if found}
    notes.metrics |= chat_metrics(results)
    if results:
        notes.tables["Tasks"] = Table(
            ["task", "problems", "accuracy", "from", "to", "pass@1"],
            [[name, r.n_problems, r.accuracy, *r.interval, r.pass_at_1] for name, r in results.items()],
        )
    programs: list[list[str | int]] = [
        [name, isolation, outcome, n]
        for name, found in records.items()
        for isolation, outcomes in program_outcomes(found).items()
        for outcome, n in sorted(outcomes.items())
    ]
    if programs:
        notes.tables["Programs"] = Table(["task", "isolation", "outcome", "programs"], programs)
    for name, result in results.items():
        logger.info("chat_eval: %s %.1f %% of %d", name, 100 * result.accuracy, result.n_problems)
    if held_out:
        families: dict[str, list[bool]] = {}
        for record in held_out:
            families.setdefault(record.group, []).append(record.correct)
        usual = [right for family, rights in families.items() if family != HARD_FAMILY for right in rights]
        notes.metrics["heldout/all but the hard family"] = sum(usual) / max(1, len(usual))
        families = dict(sorted(families.items()))
        notes.metrics |= {f"heldout/{family}": sum(rights) / len(rights) for family, rights in families.items()}
        notes.tables["Held-out questions by family"] = Table(
            ["family", "right", "asked"],
            [[name, sum(rights), len(rights)] for name, rights in families.items()],
        )
        for family, rights in families.items():
            logger.info("chat_eval: %s %d of %d", family, sum(rights), len(rights))
        logger.info("chat_eval: %d of %d held-out questions, the hard family apart", sum(usual), len(usual))


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("chat_eval", ChatEvalSettings())])
    settings = flags.settings(RunSettings)
    from _data import pinned_world

    with open_job(settings, existing_run(settings.storage, settings.model_tag)) as job:
        run(job, flags.settings(ChatEvalSettings), pinned_world(job.run_dir, settings.storage))


if __name__ == "__main__":
    main(cli)
