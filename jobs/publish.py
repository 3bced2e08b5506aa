"""Publish a run: python jobs/publish.py RUN URI

Weights, tokenizer, configs, report and lineage; never optimizer state, logs or rollouts. URI is a folder, object
storage (s3://bucket/models, gs://...) or the hub (hf://owner/name, with the extra hf and HF_TOKEN). What is published
is a run again: give its place as --storage to chat_cli, serve, sft or rl. Given twice the command does nothing more;
broken off, it is finished by giving it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _runtime import main

from nanochat_ray.config import RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import STAGE_OF_SOURCE, RunDir, existing_run


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("from_run", metavar="RUN", help="the run's name below the storage, or its folder")
    parser.add_argument("to", metavar="URI", help="a folder, s3://..., gs://..., or hf://owner/name")
    parser.add_argument("--sources", nargs="+", choices=tuple(STAGE_OF_SOURCE), help="unset: all that are finished")
    parser.add_argument("--step", type=int, metavar="INT", help="of the one source; unset: of each the last")
    parser.add_argument("--replace", action="store_true", help="take away another publication of this run first")
    parser.add_argument("--public", action="store_true", help="a new repository on the hub is for everybody to see; "
                        "needed too for one that is")


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings())], extra=add_options)
    settings, args = flags.settings(RunSettings), flags.args
    if settings.model_tag not in (None, args.from_run):
        flags.fail(f"RUN {args.from_run} and --model-tag {settings.model_tag}: one run can be published")
    from nanochat_ray.interchange.publish import collect
    from nanochat_ray.interchange.publish_write import publish

    if "://" in args.from_run:
        raise ValueError(f"RUN {args.from_run}: give the run's name, and where it lies as --storage")
    if "/" in args.from_run:
        folder = Path(args.from_run).expanduser().absolute()
        run_dir = RunDir.of(str(folder.parent), existing_run(str(folder.parent), folder.name))
    else:
        run_dir = RunDir.of(settings.storage, existing_run(settings.storage, args.from_run)).fetch()
    package = collect(run_dir, tuple(args.sources) if args.sources else None, args.step)
    for note in package.notes:
        print(note)
    print(publish(package, run_dir, args.to, args.replace, private=not args.public))


if __name__ == "__main__":
    main(cli)
