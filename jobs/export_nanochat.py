"""Write a run's tokenizer and models as nanochat's own files: python jobs/export_nanochat.py --to DIR

DIR gets nanochat's layout, so that NANOCHAT_BASE_DIR=DIR makes nanochat find them. Optimizer state stays behind (give
nanochat's chat_sft --load-optimizer 0). Importing DIR gives the same weights again, bit for bit.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from _runtime import main

from nanochat_ray.config import RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import STAGE_OF_SOURCE, RunDir, existing_run, write_atomic, write_json

logger = logging.getLogger("nanochat_ray")


def export(run_dir: RunDir, folder: Path, sources: list[str] | None, step: int | None) -> list[Path]:
    """Write the files; returns the model files. FileNotFoundError for a source that is named and not finished."""
    from nanochat_ray.interchange.nanochat_files import FOLDER_OF_SOURCE, TOKENIZER_FOLDER, meta_file, model_file
    from nanochat_ray.interchange.nanochat_model import not_upstream
    from nanochat_ray.interchange.nanochat_run import meta_for_nanochat
    from nanochat_ray.interchange.nanochat_tensors import write_pt
    from nanochat_ray.interchange.nanochat_tokenizer import (
        PICKLE_FILE,
        TOKEN_BYTES_FILE,
        pickled,
        token_bytes_tensor,
    )
    from nanochat_ray.model.checkpoint import resolve_checkpoint
    from nanochat_ray.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run_dir.require_stage("tokenizer", "tok_train.py"))
    done = [source for source, stage in STAGE_OF_SOURCE.items() if run_dir.is_done(stage)]
    chosen = sources or done
    for source in chosen or ["base"]:
        run_dir.require_stage(STAGE_OF_SOURCE[source], f"{STAGE_OF_SOURCE[source]}.py")
    written = []
    for source in chosen:
        checkpoint = resolve_checkpoint(run_dir.checkpoints(STAGE_OF_SOURCE[source]), step)
        for difference in not_upstream(checkpoint.model_config):
            logger.warning("%s: %s; nanochat of that time computes with it, today's does not", source, difference)
        place = folder / FOLDER_OF_SOURCE[source] / run_dir.root.name
        # nanochat takes the largest step that has a model file, so that one comes last
        write_json(place / meta_file(checkpoint.step), meta_for_nanochat(checkpoint, source))
        write_pt(place / model_file(checkpoint.step), checkpoint.model_tensors())
        written.append(place / model_file(checkpoint.step))
    write_pt(folder / TOKENIZER_FOLDER / TOKEN_BYTES_FILE, token_bytes_tensor(tokenizer))
    write_atomic(folder / TOKENIZER_FOLDER / PICKLE_FILE, pickled(tokenizer))
    return written


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--sources", nargs="+", choices=tuple(STAGE_OF_SOURCE), help="unset: all that are finished")
    parser.add_argument("--step", type=int, metavar="INT", help="unset: of each source the last")


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings())], extra=add_options)
    settings, args = flags.settings(RunSettings), flags.args
    if "://" in args.to:
        raise ValueError(f"--to {args.to}: nanochat reads local folders, so that is what is written")
    run_dir = RunDir.of(settings.storage, existing_run(settings.storage, settings.model_tag)).fetch()
    for path in export(run_dir, Path(args.to).expanduser().absolute(), args.sources, args.step):
        print(path)


if __name__ == "__main__":
    main(cli)
