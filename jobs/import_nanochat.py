"""Make a run of nanochat's own files: python jobs/import_nanochat.py DIR

DIR is nanochat's base folder (tokenizer/, base_checkpoints/, chatsft_checkpoints/, chatrl_checkpoints/), or a folder
with the files of one model. The run is then there for chat_cli, serve, base_eval, chat_eval, sft and rl. Optimizer
state stays behind. Nothing in the files is run: a tokenizer.pkl is read as data, a model_*.pt as tensors only.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _runtime import Job, main, open_job

from nanochat_ray.config import ModelConfig, RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import CONFIG_FILE, STAGE_OF_SOURCE, push_records, read_json, write_json

if TYPE_CHECKING:
    from nanochat_ray.interchange.nanochat_files import Found
    from nanochat_ray.interchange.nanochat_model import Imported
    from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger("nanochat_ray")


@dataclass(frozen=True)
class CheckedTokenizer:
    """A tokenizer that can be imported."""

    tokenizer: Tokenizer
    file_sha256: str
    differing: int  # tokens whose length in token_bytes.pt is not that of their bytes


@dataclass(frozen=True)
class CheckedModel:
    """One model's files, which can be imported."""

    found: Found
    meta: dict[str, Any]
    meta_sha256: str
    model_sha256: str


def check_tokenizer(path: Path) -> CheckedTokenizer:
    """Read a `tokenizer.pkl`. ValueError that names the file if it cannot be used."""
    from nanochat_ray.interchange.nanochat_files import token_bytes_beside
    from nanochat_ray.interchange.nanochat_tokenizer import differing_lengths, read_tokenizer
    from nanochat_ray.model.checkpoint import file_hash

    sha256 = file_hash(path)
    tokenizer, lengths = read_tokenizer(path, sha256), token_bytes_beside(path)
    return CheckedTokenizer(tokenizer, sha256, differing_lengths(lengths, tokenizer) if lengths else 0)


def check_model(found: Found, tokenizer: Tokenizer, constants: dict[str, Any]) -> CheckedModel:
    """Read all of a model and keep none of it, so that no run is begun that a bad file would end.

    ValueError that names the file if it cannot be imported with this tokenizer.
    """
    from nanochat_ray.interchange.nanochat_run import pretrain_settings
    from nanochat_ray.model.checkpoint import file_hash

    meta, meta_sha256 = found.read_meta(), file_hash(found.meta)
    n_tokens = meta["model_config"].get("vocab_size")
    if n_tokens != tokenizer.vocab_size:
        raise ValueError(
            f"{found.model} has a vocabulary of {str(n_tokens)[:50]} tokens, the tokenizer {tokenizer.vocab_size}; "
            "say with --tokenizer which one it was trained with"
        )
    checked = CheckedModel(found, meta, meta_sha256, file_hash(found.model))
    pretrain_settings(meta, read_model(checked, constants).config, found.source == "base")
    return checked


def read_model(checked: CheckedModel, constants: dict[str, Any]) -> Imported:
    """The model in our form. ValueError that names the file if it cannot be had."""
    from nanochat_ray.interchange.nanochat_model import to_ours
    from nanochat_ray.interchange.nanochat_run import constants_in
    from nanochat_ray.interchange.nanochat_tensors import read_tensors

    path, meta = checked.found.model, checked.meta
    tensors = read_tensors(path, checked.model_sha256)
    try:
        return to_ours(meta["model_config"], tensors, constants_in(meta) | constants)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def import_tokenizer(job: Job, checked: CheckedTokenizer) -> None:
    """The run's tokenizer stage."""
    tokenizer, differing = checked.tokenizer, checked.differing
    with job.stage("tokenizer", {"imported": {"format": "nanochat", "file_sha256": checked.file_sha256}}) as notes:
        if notes is None:
            return
        tokenizer.save(job.run_dir.stage("tokenizer"))
        notes.metrics |= {"vocab_size": tokenizer.vocab_size, "imported": "nanochat", "lengths_corrected": differing}
        notes.hashes["tokenizer"] = tokenizer.hash
        if differing:
            logger.info(
                "tokenizer: %d tokens have another length in token_bytes.pt than in bytes, over which bits per byte "
                "are taken", differing,
            )


def import_model(job: Job, checked: CheckedModel, tokenizer: Tokenizer, constants: dict[str, Any]) -> None:
    """One source's stage with its checkpoint."""
    from nanochat_ray.interchange.nanochat_run import IMPORTED, KNOWN_FROM, checkpoint_meta, pretrain_settings
    from nanochat_ray.model.checkpoint import save_checkpoint
    from nanochat_ray.run_dir import writing_as

    found, meta = checked.found, checked.meta
    stage = STAGE_OF_SOURCE[found.source]
    origin: dict[str, Any] = {
        "format": "nanochat", "tag": found.tag, "step": found.step, "constants": constants,
        "model_sha256": checked.model_sha256, "meta_sha256": checked.meta_sha256,
    }
    config: dict[str, Any] = {IMPORTED: origin, "tokenizer": tokenizer.hash}
    if job.run_dir.is_done(stage):
        before = read_json(job.run_dir.stage(stage) / CONFIG_FILE)
        with job.stage(stage, config | {"settings": before.get("settings")}):
            return
    model = read_model(checked, constants)
    settings, left_out = pretrain_settings(meta, model.config, found.source == "base")
    remember_pretraining(job, found.source, settings.identity(), KNOWN_FROM)
    with job.stage(stage, config | {"settings": settings.identity()}) as notes:
        assert notes is not None
        for note in (*model.notes, *left_out):
            logger.info("%s: %s", found.source, note)
        ours = checkpoint_meta(meta, model.config, found.source, settings, origin)
        save_checkpoint(
            job.run_dir.checkpoints(stage), found.step, model.tensors, None, ours,
            guard=lambda: writing_as(job.run_dir.root, job.lease.epoch),
        )
        notes.metrics |= {
            "imported": "nanochat", "step": found.step, "val/bpb": ours["val_bpb"],
            "parameters": sum(tensor.numel() for tensor in model.tensors.values()),
            "patched": "; ".join((*model.notes, *left_out)) or "nothing",
        }
        notes.hashes |= {"tokenizer": tokenizer.hash, "model_file": checked.model_sha256}


def remember_pretraining(job: Job, source: str, settings: dict[str, Any], known_from: str) -> None:
    """RL takes settings from pretraining's config; without a base model there they are what its files tell of them."""
    path = job.run_dir.stage("pretrain") / CONFIG_FILE
    if source == "base":
        if path.exists() and known_from in read_json(path):
            path.unlink()
    elif not path.exists():
        write_json(path, {"settings": settings, known_from: source})
        push_records(path.parent)


def parse_constants(texts: list[str]) -> dict[str, Any]:
    """`name=value` of the network's constants. ValueError for a name that is none, or no number."""
    from nanochat_ray.interchange.nanochat_model import GIVEN_CONSTANTS

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in GIVEN_CONSTANTS:
            raise ValueError(f"--constants {text}: give name=value, of {', '.join(GIVEN_CONSTANTS)}")
        kind = ModelConfig.model_fields[name].annotation
        try:
            found[name] = int(value) if kind is int else float(value)
        except ValueError:
            raise ValueError(f"--constants {text}: {value!r} is no number") from None
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="nanochat's base folder, or a folder with the files of one model")
    parser.add_argument("--sources", nargs="+", choices=tuple(STAGE_OF_SOURCE), help="unset: all that are there")
    parser.add_argument("--from-tag", metavar="TAG", help="nanochat's model tag; unset: the largest d<depth>, of all "
                        "sources the same; it is also the run's name if --model-tag is unset")
    parser.add_argument("--step", type=int, metavar="INT", help="unset: of each source the last")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.pkl or its folder; unset: looked for beside")
    parser.add_argument("--constants", nargs="+", default=[], metavar="NAME=VALUE", help="constants that the network "
                        "was trained with, such as rope_base=10000; unset: told from what the file has")


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings())], extra=add_options)
    settings, args = flags.settings(RunSettings), flags.args
    from nanochat_ray.interchange.nanochat_files import MID_FOLDER, find_models, find_tokenizer

    folder = Path(args.dir).expanduser().absolute()
    models = find_models(folder, tuple(args.sources) if args.sources else None, args.from_tag, args.step)
    if (folder / MID_FOLDER).is_dir():
        logger.info("%s is left out: there is no such stage here", MID_FOLDER)
    named = Path(args.tokenizer).expanduser().absolute() if args.tokenizer else None
    tokenizer_path, constants = find_tokenizer(folder, named), parse_constants(args.constants)
    read = check_tokenizer(tokenizer_path)
    checked = [check_model(found, read.tokenizer, constants) for found in models]
    with open_job(settings, settings.model_tag or models[0].tag) as job:
        import_tokenizer(job, read)
        for model in checked:
            import_model(job, model, read.tokenizer, constants)
    print(f"{job.run_dir.root}: {', '.join(f'{m.source} step {m.step}' for m in models)}")


if __name__ == "__main__":
    main(cli)
