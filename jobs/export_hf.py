"""Write a run's model as a folder that Transformers loads: python jobs/export_hf.py --source sft --to DIR

AutoModelForCausalLM and AutoTokenizer load DIR with trust_remote_code=True: weights, network, tokenizer, chat template,
model card. --dtype is that of the weights written (unset: as they are stored). Needs the extra hf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _runtime import main

from nanochat_ray.config import RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import STAGE_OF_SOURCE, RunDir, existing_run


def export(run_dir: RunDir, source: str, step: int | None, out: Path, dtype: str | None) -> Path:
    """Write the folder. FileNotFoundError for a stage that is not finished or a step that is not there."""
    from nanochat_ray.interchange.hf_card import model_card
    from nanochat_ray.interchange.hf_export import export as write
    from nanochat_ray.model.checkpoint import resolve_checkpoint
    from nanochat_ray.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run_dir.require_stage("tokenizer", "tok_train.py"))
    stage = STAGE_OF_SOURCE[source]
    run_dir.require_stage(stage, f"{stage}.py")
    checkpoint = resolve_checkpoint(run_dir.checkpoints(stage), step)
    report = run_dir.stage("report") / "report.md"
    card = model_card(run_dir.root.name, source, checkpoint, tokenizer.hash, report)
    return write(checkpoint, tokenizer, out, source, card, dtype)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to write; it must not be there yet")
    parser.add_argument("--source", "-i", choices=tuple(STAGE_OF_SOURCE), default="sft",
                        help="which model (default: sft)")
    parser.add_argument("--step", type=int, metavar="INT", help="checkpoint to take; unset: the last")


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings())], extra=add_options)
    settings, args = flags.settings(RunSettings), flags.args
    if "://" in args.to:
        raise ValueError(f"--to {args.to}: a local folder is written (jobs/publish.py sends a run elsewhere)")
    run_dir = RunDir.of(settings.storage, existing_run(settings.storage, settings.model_tag)).fetch()
    print(export(run_dir, args.source, args.step, Path(args.to).expanduser().resolve(), settings.dtype))


if __name__ == "__main__":
    main(cli)
