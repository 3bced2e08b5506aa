"""The main job: raw text in, a model that chats out. The same command again goes on where it stopped.

Presets: cpu, smoke, d12, d20, d24, d26, d32; without --preset one is chosen by the hardware. Stage settings are
--pretrain.depth, --sft.num-epochs and so on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from _runtime import find_machine, main, open_job

from nanochat_ray.config import (
    BaseEvalSettings,
    ChatEvalSettings,
    PretrainSettings,
    RLSettings,
    RunSettings,
    SFTSettings,
    SpeedrunSettings,
    TokenizerSettings,
)
from nanochat_ray.flags import Flags, Section, read_flags
from nanochat_ray.presets import Machine, choose_preset, preset
from nanochat_ray.run_dir import shown

SECTIONS = [
    Section("run", RunSettings()),
    Section("tokenizer", TokenizerSettings(), "tokenizer"),
    Section("pretrain", PretrainSettings(), "pretrain"),
    Section("base_eval", BaseEvalSettings(), "base_eval"),
    Section("sft", SFTSettings(), "sft"),
    Section("chat_eval", ChatEvalSettings(), "chat_eval"),
    Section("rl", RLSettings(), "rl"),
]


def settings_from(flags: Flags, machine: Machine) -> tuple[SpeedrunSettings, str]:
    """The preset with what the person changed, and one line that says which preset and why."""
    name, why = flags.args.preset, "asked for"
    if name is None:
        name, why = choose_preset(machine)
    try:
        chosen = preset(name, machine)
    except ValueError as error:
        flags.fail(f"--preset: {error}")
    parts = {
        section.key: flags.settings(type(section.defaults), getattr(chosen, section.key)) for section in SECTIONS
    }
    return SpeedrunSettings(preset=name, **parts), f"preset {name}: {why}"


def speedrun(settings: SpeedrunSettings, machine: Machine) -> None:
    import base_eval
    import chat_eval
    import pretrain
    import report
    import rl
    import sft
    import tok_eval
    import tok_train
    from _data import RunData, pinned_world
    from _plan import announce

    from nanochat_ray.corpus.shards import shards_needed
    from nanochat_ray.model.scaling import plan_training

    pretrain.refuse_early(settings.run, settings.pretrain)
    rl.check_engine(settings.run, settings.rl, machine)
    announce(settings, machine)
    plan = plan_training(settings.pretrain, settings.tokenizer.vocab_size)
    tag = settings.run.model_tag or f"d{settings.pretrain.depth}"
    with open_job(settings.run, tag, rl.actors_beside(settings.rl)) as job:
        data = RunData(job, shards_needed(plan.total_tokens))
        first_shards = data.for_tokenizer(settings.tokenizer.max_chars)
        tok_train.run(job, settings.tokenizer, first_shards)
        tok_eval.run(job, first_shards)
        manifest = data.whole()
        world = pinned_world(job.run_dir, settings.run.storage)
        pretrain.run(job, settings.pretrain, manifest)
        base_eval.run(job, settings.base_eval, manifest)
        sft.run(job, settings.sft, world)
        chat_eval.run(job, settings.chat_eval, world)
        if rl.run(job, settings.rl, world, optional=True):
            chat_eval.run(job, settings.chat_eval.model_copy(update={"source": "rl"}), world)
        path = report.run(job)
        print(f"report: {path}")
        print(f"chat with it: {chat_command(settings.run, job.run_dir.root)}")
        print(f"in a browser: {serve_command(settings.run, job.run_dir.root)}")


def chat_command(settings: RunSettings, run_folder: Path) -> str:
    """The command line that opens a chat with this run's model, from any folder."""
    script = Path(__file__).resolve().parent / "chat_cli.py"
    command = [sys.executable, str(script)]
    if "_ray_pkg_" in str(script):  # Ray's copy of a submitted folder, which does not last
        command = ["python", "jobs/chat_cli.py"]
    elsewhere = settings.storage or os.environ.get("NANOCHAT_BASE_DIR")  # which the next shell may not have
    storage = ["--storage", shown(run_folder.parent)] if elsewhere else []
    return shlex.join([*command, *storage, "--model-tag", run_folder.name])


def serve_command(settings: RunSettings, run_folder: Path) -> str:
    """The command line that serves the chat page; it takes the storage's largest run unless the file names another."""
    jobs, serve = Path(__file__).resolve().parent, Path(sys.executable).with_name("serve")
    command = [str(serve), "run", str(jobs.parent / "serve_configs" / "chat.yaml")]
    if "_ray_pkg_" in str(jobs):
        command = ["serve", "run", "serve_configs/chat.yaml"]
    if settings.storage or os.environ.get("NANOCHAT_BASE_DIR"):
        command = ["env", f"NANOCHAT_BASE_DIR={shown(run_folder.parent)}", *command]
    return shlex.join(command)


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="cpu, smoke, d12, d20, d24, d26 or d32; unset: by hardware")


def cli() -> None:
    flags = read_flags(__doc__ or "", SECTIONS, extra=add_preset)
    machine = find_machine(flags.settings(RunSettings).ray)
    settings, line = settings_from(flags, machine)
    print(line, flush=True)
    speedrun(settings, machine)


if __name__ == "__main__":
    main(cli)
