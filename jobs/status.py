"""Where a run is, from its files alone: stage, step, speed, time to go, last checkpoint, last error, restarts.

RUN is a model tag (with --storage), or the run's folder or URI. Exit code: 0 a job is at work on the run, or all that
was begun is done; 1 there is no such run; 3 it is unfinished and nobody works on it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from _runtime import main

from nanochat_ray.run_dir import RunDir, existing_run

if TYPE_CHECKING:
    from nanochat_ray.report.status import RunStatus

EXIT_UNFINISHED = 3
WATCH_S = 5.0
CLEAR = "\x1b[H\x1b[2J"


def find_run(run: str | None, storage: str | None) -> RunDir:
    """The run that a person named. FileNotFoundError that says which runs there are."""
    if run is not None and ("/" in run or run in (".", "..")):
        if storage is not None:
            raise ValueError(f"{run} is a whole path, so --storage {storage} says nothing; leave one of them out")
        storage, run = parent_and_name(run)
    return RunDir.of(storage, existing_run(storage, run))


def parent_and_name(place: str) -> tuple[str, str]:
    """A run's folder or URI as storage and model tag; a URI's query belongs to the storage."""
    if "://" not in place:
        path = Path(place).expanduser().resolve()
        return str(path.parent), path.name
    base, mark, query = place.partition("?")
    storage, _, name = base.rstrip("/").rpartition("/")
    if storage.endswith((":/", ":")):
        raise ValueError(f"{place}: a run's URI is STORAGE/MODEL_TAG, and this names no storage before its last part")
    return storage + mark + query, name


def show(status: RunStatus, as_json: bool, clear: bool) -> None:
    from nanochat_ray.report.status_text import status_json, status_text

    text = status_json(status) if as_json else status_text(status)
    print((CLEAR if clear else "") + text, flush=True)


def look(run: RunDir) -> RunStatus:
    """The run's status now, with the records of a run in object storage brought here first."""
    from nanochat_ray.report.status import read_status

    with contextlib.suppress(ValueError, TypeError, KeyError):  # a damaged lease, which the status names
        run.fetch()
    return read_status(run)


def follow(run: RunDir, args: argparse.Namespace) -> RunStatus:
    """Show the run once, or again and again until nobody works on it; returns what was seen last."""
    from nanochat_ray.report.status_page import write_page

    clear = args.watch is not None and not args.json and sys.stdout.isatty()
    while True:
        try:
            status = look(run)
        except ConnectionError as error:
            if args.watch is None:
                raise
            print(f"{error}; looking again in {args.watch:g} s", file=sys.stderr, flush=True)
            time.sleep(args.watch)
            continue
        going_on = args.watch is not None and status.state == "running"
        show(status, args.json, clear)
        if args.html is not None:
            try:
                write_page(Path(args.html).expanduser(), status, run, args.watch if going_on else None)
            except OSError as error:
                if not going_on:
                    raise
                print(error, file=sys.stderr, flush=True)
        if not going_on:
            return status
        time.sleep(args.watch)


def read_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="status.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="unset: the largest run of the storage, or its latest")
    parser.add_argument("--model-tag", metavar="RUN", help="another way to say RUN, as other jobs have it")
    parser.add_argument("--storage", help="folder of all runs, or a URI; unset: $NANOCHAT_BASE_DIR")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    parser.add_argument("--html", metavar="FILE", help="also write one page with the curves, good without a network")
    parser.add_argument("--watch", metavar="SECONDS", nargs="?", type=float, const=WATCH_S,
                        help=f"look again every so many seconds ({WATCH_S:g}) while a job is at work, so begin the "
                             "job first; the page of --html is written anew and loads itself again")
    args = parser.parse_args()
    if args.run is not None and args.model_tag not in (None, args.run):
        parser.error(f"RUN {args.run} and --model-tag {args.model_tag}: one run can be looked at")
    args.run = args.run or args.model_tag
    if args.watch is not None and not 0.1 <= args.watch <= 3600:
        parser.error(f"--watch {args.watch:g}: from 0.1 to 3600 seconds")
    return args


def cli() -> None:
    args = read_args()
    run = find_run(args.run, args.storage)
    try:
        status = follow(run, args)
    except KeyboardInterrupt:
        sys.exit(130)
    if status.state not in ("running", "done"):
        sys.exit(EXIT_UNFINISHED)


if __name__ == "__main__":
    main(cli)
