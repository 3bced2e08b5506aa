"""What a run will take before it begins: memory, time, communication and cost. Trains nothing, writes nothing.

    python jobs/plan.py --depth 24 --gpus 8 --gpu-type H100
    python jobs/plan.py --preset d24 --gpus 16 --nodes 2 --gpu-type H100 --interconnect 3200

Without --gpus it looks at the cluster that RAY_ADDRESS names, else at this machine. Every figure says whether it is
exact, measured or modelled. With --preset the other stages have the preset's settings.
"""

from __future__ import annotations

import argparse
import json
import math

from _runtime import find_machine, main

from nanochat_ray.config import PretrainSettings, RunSettings, SpeedrunSettings
from nanochat_ray.flags import Flags, Section, read_flags
from nanochat_ray.presets import Machine, choose_preset, preset

SECTIONS = [Section("run", RunSettings()), Section("pretrain", PretrainSettings())]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def percent(text: str) -> float:
    value = above_zero(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text}: at most 100, percent of the peak")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number above 0")
    return value


def add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("What to plan for")
    group.add_argument("--preset", help="settings of a preset of the main job instead of the defaults")
    group.add_argument("--gpus", type=positive, help="GPUs, of all nodes together; unset: what is there")
    group.add_argument("--gpu-type", help="such as H100, A100-40GB, 'NVIDIA L40S'")
    group.add_argument("--gpu-memory", type=above_zero, metavar="GIB", help="of one GPU; unset: by its type")
    group.add_argument("--nodes", type=positive, help="machines that the GPUs are on; unset: 8 GPUs each, or as found")
    group.add_argument("--interconnect", type=above_zero, metavar="GBIT", help="Gb/s of each node; unset: 400")
    group.add_argument("--mfu", type=percent, help="percent of the peak, if you have measured it")
    group.add_argument("--context", type=positive, help="tokens of a stream when serving; unset: --max-seq-len")
    group.add_argument("--json", action="store_true", help="the whole plan as one JSON document")


def settings_of(flags: Flags, machine: Machine) -> SpeedrunSettings:
    """The preset with the flags over it, or the jobs' defaults with them.

    Where nothing is said of pretraining, the preset that the main job would choose.
    """
    name = flags.args.preset or choose_preset(machine)[0]
    try:
        chosen = preset(name, machine)
    except ValueError as error:
        flags.fail(f"--preset: {error}")
    pretrain, over_preset = flags.settings(PretrainSettings), flags.settings(PretrainSettings, chosen.pretrain)
    silent = pretrain == PretrainSettings() and over_preset == chosen.pretrain
    if flags.args.preset is None and not silent:
        one_each = RunSettings(workers=str(max(1, machine.gpus)))
        return SpeedrunSettings(run=flags.settings(RunSettings, one_each), pretrain=pretrain)
    changes = {"run": flags.settings(RunSettings, chosen.run), "pretrain": over_preset}
    return chosen.model_copy(update=changes)


def cli() -> None:
    flags = read_flags(__doc__ or "", SECTIONS, extra=add_own)
    args, run = flags.args, flags.settings(RunSettings)
    if args.gpus is None and (args.gpu_type or args.nodes or args.gpu_memory):
        flags.fail("--gpu-type, --gpu-memory and --nodes say what --gpus N are: give it too")
    if args.gpus is not None and args.gpu_type is None:
        flags.fail("--gpus needs --gpu-type, such as H100")
    if args.gpus is not None and (args.nodes or 1) > args.gpus:
        flags.fail(f"--nodes {args.nodes} is more than --gpus {args.gpus}")
    if args.gpus is not None and run.device_type == "cpu":
        flags.fail("--gpus and --device-type cpu contradict each other: leave one of them out")
    if args.gpus is not None and run.worker_range[0] > args.gpus:
        flags.fail(f"--workers {run.workers} is more than --gpus {args.gpus}")
    machine = Machine(args.gpus, args.gpu_type, where="as asked for") if args.gpus else find_machine(run.ray)
    settings = settings_of(flags, machine)

    from _plan import planner_for

    from nanochat_ray.plan.text import as_json, full_text

    planner = planner_for(
        machine, settings.run, args.mfu, args.interconnect, args.nodes,
        int(args.gpu_memory * 2**30) if args.gpu_memory else None,
    )
    plan = planner.plan(settings, args.context)
    print(json.dumps(as_json(plan), indent=2, allow_nan=False) if args.json else full_text(plan))


if __name__ == "__main__":
    main(cli)
