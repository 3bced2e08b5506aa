"""Write the run's report from the records of its stages (stage `report`)."""

from __future__ import annotations

from pathlib import Path

from _runtime import Job, main, open_job

from nanochat_ray.config import RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import existing_run


def run(job: Job) -> Path:
    """Write `report/report.md` with its plots; always anew, for it is made of what is there."""
    from nanochat_ray.report.markdown import write_report

    return write_report(job.run_dir.root, price_per_hour=job.settings.price_per_hour)


def cli() -> None:
    settings = read_flags(__doc__ or "", [Section("run", RunSettings())]).settings(RunSettings)
    with open_job(settings, existing_run(settings.storage, settings.model_tag)) as job:
        print(run(job))


if __name__ == "__main__":
    main(cli)
