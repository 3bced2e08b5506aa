"""A plan as text for a person, and as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nanochat_ray.model.fp8 import TURN_OFF
from nanochat_ray.plan.hardware import PRICE_SOURCE, price_per_gpu_hour
from nanochat_ray.plan.memory import USABLE_FRAC, Memory
from nanochat_ray.plan.network import EFFICIENCY, INTERCONNECTS_GBIT, OVERLAP
from nanochat_ray.plan.stages import total_s
from nanochat_ray.plan.whole import RunPlan
from nanochat_ray.report.text import size

NOT_MODELLED = (
    "torch.compile, which may keep fewer activations; the engine's cache and SFT's own batch while those stages run",
    "waiting for data, checkpoints, failures and restarts, latency of small messages, slow nodes, shared networks",
    "the length of real conversations and completions: SFT, RL and evaluations of chat may take half or twice as long",
    "transfers out of a cloud, storage that costs money, machines that wait while a person looks at results",
)


NO_FP8 = "{} cannot train in fp8 (NVIDIA GPUs of compute capability 8.9 or later can): " + TURN_OFF


def price_per_hour(plan: RunPlan) -> tuple[float | None, str]:
    """Of all machines together, and where it comes from."""
    given = plan.settings.run.price_per_hour
    if given is not None:
        return given, "--price-per-hour"
    each = price_per_gpu_hour(plan.machines.device)
    if each is None:
        return None, "no price known: --price-per-hour sets yours, of all machines together"
    return each * plan.machines.ranks, PRICE_SOURCE


def full_text(plan: RunPlan) -> str:
    """The whole plan, on about two screens."""
    t, c = plan.training, plan.training.config
    counts = ", ".join(f"{name} {n:,}" for name, n in t.param_counts.items() if name != "total")
    own, device = plan.own_memory, plan.machines.device
    lines = [
        f"plan: depth {c.n_layer} on {plan.machines.name} ({plan.machines.where}), --parallel {plan.parallel}, "
        f"{plan.dtype}{f' with fp8 {plan.fp8}' if plan.fp8 else ''}",
        "",
        "SIZE AND DATA  [exact: model/scaling.py; shards and their size from published means]",
        f"  parameters    {t.param_counts['total']:,}: {counts}",
        f"  tokens        {t.total_tokens:,} = {t.num_iterations:,} steps x {t.total_batch_size:,}; "
        f"{t.total_tokens / t.scaling_params:.2f} per scaling parameter",
        f"  FLOPs         {t.total_flops:.3g} = {t.flops_per_token:.4g} a token",
        f"  micro-steps   {own.micro_steps} of {own.rows} rows x {c.sequence_len:,} tokens on each of "
        f"{plan.machines.ranks} ranks",
        f"  disk          {size(plan.disk.total)}: {plan.disk.shards} shards to get {size(plan.disk.data)}, "
        f"checkpoints {size(plan.disk.checkpoints)} (one is {size(plan.disk.checkpoint)}, exact), rollouts "
        f"{size(plan.disk.rollouts)} at most",
        "",
        *memory_lines(plan),
        "",
        *speed_lines(plan),
        "",
        *network_lines(plan),
        "",
        *cost_lines(plan),
        "",
        *serving_lines(plan),
        "",
        "NOT MODELLED",
        *(f"  {line}" for line in NOT_MODELLED),
    ]
    if device.peak_flops is None:
        lines.insert(1, f"  {device.name}: memory or peak not known here, so what depends on them is left out")
    return "\n".join(lines)


def memory_lines(plan: RunPlan) -> list[str]:
    on_cpu, device = plan.machines.device.on_cpu, plan.machines.device
    where = "CPU worker" if on_cpu else "GPU"
    names = ("weights", "gradients", "optimizer", "activ.", "casts", "logits", "buffers", "reserve", "update", "PEAK",
             "most rows")
    rows = [f"  {'':<8}" + "".join(f"{name:>10}" for name in names)]
    for name, memory in plan.memory.items():
        largest = plan.largest_rows[name]
        cells = [size(n) for n in parts(memory).values()]
        cells += [size(memory.peak), "?" if largest is None else str(largest) if largest else "none"]
        rows.append(f"  {name:<8}" + "".join(f"{cell:>10}" for cell in cells))
    head = f"MEMORY OF ONE {where.upper()} with {plan.own_memory.rows} rows a micro-step"
    known = f"; {size(device.memory_bytes)}, of which {USABLE_FRAC:.0%} are counted on" if device.memory_bytes else ""
    return [
        f"{head}{known}",
        "  [weights, gradients, optimizer of sharded and ddp: exact, counted on the network. zero1 to zero3: modelled",
        "  after DeepSpeed 0.19.8. activations, casts, logits, update: formulas tested against autograd, without",
        "  torch.compile. reserve: assumed. No GPU figure measured yet.]",
        *rows,
        "  `update` is what the optimizer's step takes when activations, casts and logits are gone; PEAK is the "
        "greater of the two times.",
        *(f"  {line}" for line in problems(plan)),
    ]


def parts(memory: Memory) -> dict[str, int]:
    s, step = memory.state, memory.step
    return {
        "weights": s.weights, "gradients": s.gradients, "optimizer": s.optimizer, "activations": step.activations,
        "weight_casts": step.weight_casts, "logits": max(step.logits, step.backward), "buffers": s.buffers,
        "reserve": memory.reserve, "update": s.update,
    }


def problems(plan: RunPlan) -> list[str]:
    """What cannot work by this plan, with the flag that helps."""
    no_fp8 = [f"NO FP8: {NO_FP8.format(plan.machines.name)}"] if plan.lacks_fp8 else []
    if plan.fits is not False:
        return no_fp8
    memory, largest = plan.own_memory, plan.largest_rows[plan.parallel]
    if largest:
        return [*no_fp8, f"DOES NOT FIT: {size(memory.peak)}; --device-batch-size {largest} does"]
    others = [name for name, rows in plan.largest_rows.items() if rows]
    helps = f"--parallel {others[-1]} --device-batch-size {plan.largest_rows[others[-1]]} does" if others else (
        "no strategy and no batch size does: take a smaller --depth"
    )
    return [*no_fp8, f"DOES NOT FIT: {size(memory.peak)}; {helps}"]


def speed_lines(plan: RunPlan) -> list[str]:
    speed = plan.speed
    if plan.step_s is None or plan.tok_per_s is None:
        return ["SPEED  [unknown]", f"  {speed.source}"]
    best = f", up to {speed.best_mfu:.1%} as the source" if speed.best_mfu and speed.best_flops != speed.flops else ""
    what = "of this CPU's products" if plan.machines.device.on_cpu else "MFU"
    return [
        f"SPEED  [{speed.mark}: {speed.source}]",
        f"  {plan.mfu or 0:.1%} {what}{best}; {plan.tok_per_s:,.0f} tokens/s, {plan.step_s:.3g} s a step, "
        f"{(plan.traffic[plan.parallel].exposed_s or 0) / plan.step_s:.1%} of it communication",
    ]


def network_lines(plan: RunPlan) -> list[str]:
    if plan.machines.ranks == 1 and not plan.by_nodes:
        return ["COMMUNICATION  none: one rank"]
    rate = f", {plan.between_gbit:g} Gb/s between nodes" if plan.machines.nodes > 1 and plan.between_gbit else ""
    lines = [
        f"COMMUNICATION OF ONE STEP{rate}  [bytes of sharded and ddp: exact; seconds modelled: rings at "
        f"{EFFICIENCY:.0%} of the slowest link]"
    ]
    for name, one in plan.traffic.items() if plan.machines.ranks > 1 else ():
        seconds = "link not known" if one.seconds is None else f"{one.seconds:.3g} s, exposed {one.exposed_s:.3g} s"
        lines.append(f"  {name:<9} a rank sends {size(one.sent_bytes):>10}: {seconds} ({OVERLAP[name]})")
    if plan.by_nodes:
        lines.append(
            f"  Share of a step, {plan.parallel}, {plan.machines.per_node} GPUs a node, same batch, by Gb/s of a node:"
        )
        lines.append(f"  {'nodes':>7}{'ranks':>7}{'sent':>11}{'compute':>10}"
                     + "".join(f"{gbit:>9g}" for gbit in INTERCONNECTS_GBIT))
    for row in plan.by_nodes:
        cells = ["-" if (share := row.share(gbit)) is None else f"{share:.1%}" for gbit in INTERCONNECTS_GBIT]
        seconds = "-" if row.compute_s is None else f"{row.compute_s:.3g} s"
        lines.append(f"  {row.nodes:>7}{row.ranks:>7}{size(row.sent_bytes):>11}{seconds:>10}"
                     + "".join(f"{cell:>9}" for cell in cells))
    return lines


def cost_lines(plan: RunPlan) -> list[str]:
    price, source = price_per_hour(plan)
    if not plan.stages:
        return ["TIME AND COST  [unknown, as the speed is]"]
    at = f"${price:,.2f} an hour, {source}" if price is not None else source
    lines = [f"TIME AND COST  [modelled; {at}]"]
    for stage in plan.stages:
        lines.append(f"  {stage.name:<18}{span(stage.seconds):>10}{money(price, stage.seconds):>10}  {stage.what}")
    whole = total_s(plan.stages)
    return [*lines, f"  {'all':<18}{span(whole):>10}{money(price, whole):>10}"]


def serving_lines(plan: RunPlan) -> list[str]:
    s, device = plan.serving, plan.machines.device
    streams = "memory not known" if s.streams is None else f"memory holds {s.streams:,} streams"
    rows = min(s.streams or 0, s.max_rows)
    if s.streams and s.streams > rows:
        streams += f", {rows} of them are decoded together (max_rows)"
    bound = ""
    if s.step_s_one and s.tok_per_s_all:
        bound = (
            f"; bound by memory's bandwidth or FLOPs: {1 / s.step_s_one:,.0f} tokens/s for one stream, "
            f"{s.tok_per_s_all:,.0f} for {rows}"
        )
    return [
        f"SERVING on one {'CPU worker' if device.on_cpu else 'GPU'}  [bytes: exact; streams and bounds: modelled]",
        f"  weights {size(s.weight_bytes)}; keys and values {s.kv_bytes_per_token:,} bytes a token, "
        f"{size(s.block_bytes)} a block of 16; a stream of {s.context:,} tokens holds {size(s.kv_bytes_per_stream)} "
        "(windows let go of the rest)",
        f"  at {s.context:,} tokens each: {streams}{bound}",
    ]


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON values. `marks` says of each part what kind of number it has."""
    t, price = plan.training, price_per_hour(plan)
    return {
        "machines": asdict(plan.machines),
        "settings": {"run": {"parallel": plan.parallel}, "pretrain": plan.settings.pretrain.model_dump(mode="json")},
        "dtype": plan.dtype,
        "fp8": plan.fp8,
        "size": {
            "parameters": t.param_counts, "scaling_parameters": t.scaling_params, "flops_per_token": t.flops_per_token,
            "total_flops": t.total_flops, "total_tokens": t.total_tokens, "total_batch_size": t.total_batch_size,
            "num_iterations": t.num_iterations, "micro_steps": plan.own_memory.micro_steps,
        },
        "disk": asdict(plan.disk) | {"total": plan.disk.total},
        "memory": {
            name: parts(one) | {"in_step": one.in_step, "in_update": one.in_update, "peak": one.peak,
                                "rows": one.rows, "largest_rows": plan.largest_rows[name], "exact": one.state.exact}
            for name, one in plan.memory.items()
        },
        "speed": asdict(plan.speed) | {"mfu": plan.mfu, "tok_per_s": plan.tok_per_s, "step_s": plan.step_s},
        "traffic": {name: asdict(one) for name, one in plan.traffic.items()},
        "by_nodes": [
            asdict(row) | {"share": {f"{gbit:g}": row.share(gbit) for gbit in INTERCONNECTS_GBIT},
                           "exposed_s": {f"{gbit:g}": s for gbit, s in row.exposed_s.items()}}
            for row in plan.by_nodes
        ],
        "stages": [asdict(stage) | {"cost": cost(price[0], stage.seconds)} for stage in plan.stages],
        "total_s": total_s(plan.stages),
        "total_cost": cost(price[0], total_s(plan.stages)),
        "price_per_hour": {"value": price[0], "source": price[1]},
        "serving": asdict(plan.serving),
        "problems": problems(plan),
        "marks": {
            "size": "exact", "disk": "modelled, but for checkpoint: exact",
            "memory": "weights, gradients, optimizer: exact where `exact` is; the rest modelled, no GPU figure yet",
            "speed": f"{plan.speed.mark}: {plan.speed.source}",
            "traffic": "sent_bytes of sharded and ddp: exact; the rest modelled", "by_nodes": "modelled",
            "stages": "modelled", "serving": "bytes: exact; streams and bounds: modelled",
        },
        "not_modelled": list(NOT_MODELLED),
    }


def span(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def cost(price: float | None, seconds: float | None) -> float | None:
    return None if price is None or seconds is None else price * seconds / 3600


def money(price: float | None, seconds: float | None) -> str:
    amount = cost(price, seconds)
    return "" if amount is None else f"${amount:,.2f}"
