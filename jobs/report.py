"""Write the run's report from the records of its stages (stage `report`)."""

from __future__ import annotations

from pathlib import Path

from _runtime import Job, main

from nanochat_ray.config import RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import RunDir, existing_run, push_records


def run(job: Job) -> Path:
    """Write `report/report.md` with its plots; always anew, for it is made of what is there."""
    return write(job.run_dir, job.settings)


def write(run_dir: RunDir, settings: RunSettings) -> Path:
    from nanochat_ray.report.markdown import write_report

    path = write_report(run_dir.root, price_per_hour=settings.price_per_hour)
    push_records(path.parent)
    return path


def cli() -> None:
    """Takes no lease, so that a run can be looked at while it trains; the files are replaced whole."""
    settings = read_flags(__doc__ or "", [Section("run", RunSettings())]).settings(RunSettings)
    run_dir = RunDir.of(settings.storage, existing_run(settings.storage, settings.model_tag))
    print(write(run_dir.fetch(), settings))


if __name__ == "__main__":
    main(cli)
