"""Plans of whole runs: what fits, how fast, what it costs, and what is said of devices that nobody knows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nanochat_ray.config import PretrainSettings, RunSettings, SpeedrunSettings
from nanochat_ray.engine.kv_cache import KVCache
from nanochat_ray.messages import Cursor, PackedBatch, World
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.scaling import flops_per_token, model_config_for, plan_training
from nanochat_ray.plan.compute import expected_speed, masked_flops, optimizer_flops
from nanochat_ray.plan.hardware import GPUS, Machines, cpu, free_disk_bytes, gpu
from nanochat_ray.plan.memory import GIB, USABLE_FRAC
from nanochat_ray.plan.serving import BLOCK_SIZE, CHUNK_TOKENS, MAX_ROWS, serving
from nanochat_ray.plan.short import LogRun, least_bytes, refusal, short_lines
from nanochat_ray.plan.stages import total_s
from nanochat_ray.plan.state import Shapes
from nanochat_ray.plan.text import as_json, full_text, span
from nanochat_ray.plan.whole import DTYPES, Planner, RunPlan
from nanochat_ray.presets import Machine, preset
from nanochat_ray.report.text import size
from nanochat_ray.serve.app_settings import ServeSettings
from nanochat_ray.stages.parallel import STRATEGIES, Sharded
from tests.plan.watching import LiveBytes


def planned(
    name: str = "d24", kind: str = "H100", ranks: int = 8, nodes: int = 1, parallel: str = "sharded", **changes
) -> tuple[Planner, RunPlan]:
    """A preset's plan with changes to its pretraining."""
    settings = preset(name, Machine(ranks, kind))
    run, pretrain = settings.run.model_copy(update={"parallel": parallel}), settings.pretrain.model_copy(update=changes)
    settings = settings.model_copy(update={"pretrain": pretrain, "run": run})
    planner = Planner(Machines(gpu(kind), ranks, nodes), "bfloat16")
    return planner, planner.plan(settings)


# --- memory


@pytest.mark.parametrize("rows", [16, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_whole_steps_on_a_cpu(rows, dtype):
    """Networks and optimizers as training builds them, two steps of one or of four micro-steps."""
    settings = PretrainSettings(
        depth=4, head_dim=32, aspect_ratio=48, max_seq_len=128, total_batch_size=16 * 128, num_iterations=2,
        device_batch_size=rows,
    )
    vocab = 1024
    plan = plan_training(settings, vocab)
    memory = Planner(Machines(cpu(1), 1), dtype).memory(settings, vocab).at("sharded", rows)
    tokens = torch.randint(0, vocab, (16, 129)).to(torch.int32).numpy()
    with LiveBytes() as live:
        model = GPT.build(plan.config, compute_dtype=DTYPES[dtype])
        strategy = Sharded(model, World(device="cpu"), Rates(1e-3, 1e-3, 1e-3, 1e-3, 0.0), DTYPES[dtype], False)
        for _ in range(2):
            strategy.set_schedule(1.0, 0.9, 0.0)
            strategy.accumulate(PackedBatch(0, tokens, None, Cursor(), 0.0), 16 * 128, rows)
            strategy.update()
    assert memory.micro_steps == 16 // rows
    assert memory.peak - memory.reserve == pytest.approx(live.peak, rel=0.1)


def test_the_largest_batch_fits_and_the_next_does_not():
    planner, plan = planned("d32", "A100-80GB")
    memory = planner.memory(plan.settings.pretrain, 32768)
    room = planner.machines.device.memory_bytes
    for name in STRATEGIES:
        rows = memory.largest_rows(name, room)
        assert rows and rows & (rows - 1) == 0
        assert memory.at(name, rows).peak <= USABLE_FRAC * room < memory.at(name, 2 * rows).peak
    assert memory.largest_rows("sharded", 4 * GIB) == 0
    assert memory.largest_rows("sharded", 10**15) == memory.rows_per_rank


@pytest.mark.parametrize(("name", "kind", "ranks"), [
    ("d12", "NVIDIA H100 80GB HBM3", 1), ("d20", "H100", 1), ("d24", "H100", 8), ("d26", "H100", 8), ("d32", "H100", 8),
    ("d24", "NVIDIA A100-SXM4-80GB", 8),
])
def test_presets_fit_where_nanochat_runs_them(name, kind, ranks):
    planner, plan = planned(name, kind, ranks)
    assert plan.own_memory.fits(planner.machines.device.memory_bytes)
    assert refusal(planner, plan, None) is None


# --- speed


def test_the_anchors_are_the_published_runs():
    config = model_config_for(PretrainSettings(depth=24), 32768)
    fp8_tokens, fp8_s = 5568 * 1_048_576, 99 * 60
    assert expected_speed(config, gpu("H100"), 2, True).best_mfu == pytest.approx(
        fp8_tokens * flops_per_token(config) / fp8_s / (8 * 989e12), rel=0.02)
    assert expected_speed(config, gpu("H100"), 2, False).best_mfu == pytest.approx(
        4.33e19 / 10_949 / (8 * 989e12), rel=0.02)


def test_times_are_planned_with_less_than_the_anchor():
    _, plan = planned()
    assert 0.3 < plan.mfu < plan.speed.mfu < plan.speed.best_mfu == pytest.approx(0.59)
    assert plan.tok_per_s * plan.step_s == pytest.approx(plan.training.total_batch_size)
    full = model_config_for(PretrainSettings(depth=24, window_pattern="L"), 32768)
    assert masked_flops(full) == 0
    assert expected_speed(full, gpu("H100"), 2, False).flops == expected_speed(full, gpu("H100"), 2, False).best_flops


def test_the_persons_own_figure_wins():
    speed = expected_speed(model_config_for(PretrainSettings(depth=24), 32768), gpu("H100"), 2, True, 47.5)
    assert speed.mfu == pytest.approx(0.475) and speed.mark == "measured" and "--mfu" in speed.source


def test_muons_products_are_counted_as_they_are_run():
    """Against torch's own counter, on the real function."""
    from torch.utils.flop_counter import FlopCounterMode

    from nanochat_ray.model.muon import orthogonalize

    config = model_config_for(PretrainSettings(depth=2, head_dim=32, aspect_ratio=32), 512)
    named = Shapes(config, torch.bfloat16).model.named_parameters()
    shapes = [tuple(param.shape) for name, param in named if name.startswith("transformer.h.")]
    with FlopCounterMode(display=False) as counter:
        for m, n in shapes:
            orthogonalize(torch.ones(1, m, n, device="meta"), 5)
    assert optimizer_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.001)


# --- machines


@pytest.mark.parametrize(("name", "memory", "peak"), [
    ("NVIDIA H100 80GB HBM3", 79.1, 989e12), ("H100", 79.1, 989e12), ("gpu_8x_a100_80gb_sxm4", 79.1, 312e12),
    ("A100-40GB", 39.4, 312e12), ("NVIDIA A10", 22.0, 125e12), ("NVIDIA A10G", 22.0, 125e12),
    ("NVIDIA GH200 480GB", 94.5, 989e12), ("Tesla V100-SXM2-16GB", 15.8, 15.7e12), ("NVIDIA L40S", 44.4, 362e12),
    ("8xH100", 79.1, 989e12), ("8x NVIDIA H20", 95.1, 148e12), ("NVIDIA L40", 44.4, 181e12),
    ("NVIDIA RTX 6000 Ada Generation", 47.5, 364e12), ("NVIDIA B300 SXM6 AC", 268.0, 2.25e15),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 94.9, 503.8e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None), ("A100-40GB, H100", 39.4, 312e12), ("H100, New", None, None),
    ("NVIDIA B200", 178.4, 2.25e15), ("NVIDIA RTX A6000", 47.5, 154.8e12), ("NVIDIA RTX A4000", None, None),
    ("Something New", None, None), ("", None, None),
])
def test_devices_by_name(name, memory, peak):
    device = gpu(name)
    assert device.memory_bytes == (None if memory is None else int(memory * GIB))
    assert device.peak_flops == peak


def test_every_device_of_the_table_is_found_by_a_name():
    assert len({pattern for pattern, *_ in GPUS}) == len(GPUS)
    assert not gpu("Tesla V100-SXM2-16GB").bf16 and gpu("A100").bf16 and not gpu("V100, A100").bf16
    assert [gpu(f"{name} PCIe").link for name in ("A100-40GB", "A100 80GB", "H100")] == [32e9, 32e9, 63e9]


def test_an_unknown_gpu_is_planned_as_far_as_it_goes():
    planner, plan = planned("d12", "Something New", 2)
    assert plan.step_s is None and plan.stages == [] and plan.serving.streams is None
    assert plan.own_memory.peak > 0 and refusal(planner, plan, None) is None
    text = full_text(plan)
    assert "--mfu" not in text  # which could not help
    assert "not known" in text and "None" not in text and "nan" not in text
    json.dumps(as_json(plan), allow_nan=False)
    assert len(short_lines(plan, None)) == 5


# --- communication


def test_more_nodes_talk_more_and_faster_links_less():
    _, plan = planned(ranks=16, nodes=2)
    shares = [[row.share(gbit) for gbit in (100.0, 400.0, 3200.0)] for row in plan.by_nodes]
    assert [row.nodes for row in plan.by_nodes] == [1, 2, 4, 8, 16, 32, 64]
    for row in shares[1:]:
        assert row == sorted(row, reverse=True)
    for column in zip(*shares, strict=True):
        assert list(column) == sorted(column)
    assert all(0 < share < 1 for row in shares for share in row)


def test_ddp_hides_what_fits_behind_the_last_backward_pass():
    plan = planned(parallel="ddp")[1]
    one = plan.traffic["ddp"]
    assert one.exposed_s == 0 < one.seconds
    assert plan.traffic["sharded"].exposed_s == plan.traffic["sharded"].seconds
    alone = planned(ranks=1)[1]
    assert alone.traffic["sharded"].sent_bytes == 0 and "zero2     a rank sends" not in full_text(alone)


# --- serving


@pytest.mark.parametrize(("depth", "context"), [(4, 512), (5, 100), (2, 2048)])
def test_streams_as_the_engines_cache_counts_them(depth, context):
    config = model_config_for(PretrainSettings(depth=depth, max_seq_len=512), 1000)
    found = serving(config, Shapes(config, torch.bfloat16), gpu("H100"), 2, context)
    cache = KVCache(config, 100, 2, 512, BLOCK_SIZE, "cpu", torch.bfloat16)
    page = cache.store[0].nbytes
    assert found.context == min(context, 512)
    assert found.kv_bytes_per_stream == page * cache.most_pages(found.context, CHUNK_TOKENS)
    assert found.block_bytes == page * config.n_layer
    assert found.kv_bytes_per_token * BLOCK_SIZE == found.block_bytes
    assert found.streams * found.kv_bytes_per_stream < 79.1 * GIB
    assert found.tok_per_s_all > 1 / found.step_s_one
    assert found.streams > MAX_ROWS == ServeSettings().max_rows == found.max_rows
    assert found.tok_per_s_all < MAX_ROWS / found.step_s_one  # of what memory holds no more are decoded at a time


def test_what_streams_need_when_serving_changes_no_cost_of_training():
    planner, plan = planned()
    assert planner.plan(plan.settings, context=64).stages == plan.stages


def test_weights_as_inference_keeps_them():
    config = model_config_for(PretrainSettings(depth=2, head_dim=32, aspect_ratio=32, max_seq_len=32), 500)
    model = GPT.build(config, compute_dtype=torch.bfloat16)
    with torch.inference_mode():
        model(torch.zeros(1, 4, dtype=torch.int64))
    casts = sum(m._cast[1].nbytes for m in model.modules() if getattr(m, "_cast", None))
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    found = serving(config, Shapes(config, torch.bfloat16), gpu("H100"), 2, 32)
    assert casts and found.weight_bytes == own + casts


# --- time, cost, text


def test_the_persons_price_wins_and_costs_add_up():
    planner = Planner(Machines(gpu("H100"), 8), "bfloat16")
    base = preset("d24", Machine(8, "H100"))
    priced = base.model_copy(update={"run": base.run.model_copy(update={"price_per_hour": 10.0})})
    document = as_json(planner.plan(priced))
    assert document["price_per_hour"] == {"value": 10.0, "source": "--price-per-hour"}
    assert document["total_cost"] == pytest.approx(10 * document["total_s"] / 3600)
    names = [stage["name"] for stage in document["stages"]]
    assert names == ["download", "tokenizer", "pretrain", "evaluations in it", "base_eval", "sft", "chat_eval", "rl",
                     "chat_eval_rl"]
    assert as_json(planner.plan(base))["price_per_hour"]["value"] == 24.0


def test_everything_is_marked():
    _, plan = planned()
    document, text = as_json(plan), full_text(plan)
    for part in ("size", "disk", "memory", "speed", "traffic", "by_nodes", "stages", "serving"):
        assert document["marks"][part].split()[0].rstrip(":,") in ("exact", "modelled", "measured", "bytes", "weights",
                                                                 "sent_bytes")
    heads = [line for line in text.splitlines() if line[:1].isupper()]
    assert len(heads) == 7
    for word in ("exact", "modelled", "NOT MODELLED", "No GPU figure measured yet", "nanochat's d24 in fp8"):
        assert word in text
    assert len(text.splitlines()) < 80 and max(map(len, text.splitlines())) < 200


def test_units():
    assert [size(n) for n in (0, 5, 2048, 3 * 2**20, 123 * 2**30)] == ["0", "5 B", "2 KiB", "3 MiB", "123 GiB"]
    assert [span(s) for s in (None, 5.4, 300, 9000)] == ["?", "5 s", "5 min", "2 h 30 min"]


# --- refusals


def cpu_plan(memory_bytes: int, **changes) -> tuple[Planner, RunPlan]:
    base = preset("cpu", Machine(0))
    settings = base.model_copy(update={"pretrain": base.pretrain.model_copy(update=changes)})
    device = cpu(1, 1e11)
    planner = Planner(Machines(device.__class__(**{**vars(device), "memory_bytes": memory_bytes}), 1, 1), "float32")
    return planner, planner.plan(settings)


def follow(reason: str, flag: str) -> str:
    return reason.split(f"{flag} ")[1].split()[0]


def test_too_large_a_batch_is_refused_with_the_one_that_fits():
    planner, plan = cpu_plan(2 * GIB, total_batch_size=1024 * 256, device_batch_size=1024)
    reason = refusal(planner, plan, None)
    rows = int(follow(reason, "--pretrain.device-batch-size"))
    _, smaller = cpu_plan(2 * GIB, total_batch_size=1024 * 256, device_batch_size=rows)
    assert 1 <= rows < 1024 and refusal(planner, smaller, None) is None


def test_too_large_a_network_is_refused_with_a_depth_that_fits():
    planner, plan = cpu_plan(2 * GIB, depth=40)
    reason = refusal(planner, plan, None)
    depth, rows = (int(follow(reason, f"--pretrain.{flag}")) for flag in ("depth", "device-batch-size"))
    _, smaller = cpu_plan(2 * GIB, depth=depth, device_batch_size=rows)
    assert 4 < depth < 40 and refusal(planner, smaller, None) is None


def test_another_strategy_is_named_where_it_is_what_fits():
    planner, plan = planned("d32", "A10", 64, depth=40, device_batch_size=1, nodes=8)
    assert not plan.largest_rows["ddp"] and plan.largest_rows["zero3"]
    assert "--parallel zero3" in refusal(planner, plan, None)


def test_a_gpu_run_is_refused_only_where_compiling_could_not_help():
    planner, plan = planned(device_batch_size=32, fp8=False)
    room = planner.machines.device.memory_bytes
    assert not plan.own_memory.fits(room) and least_bytes(plan.own_memory, False) < room
    assert refusal(planner, plan, None) is None and "DOES NOT FIT" in full_text(plan)
    assert short_lines(plan, None)[1].endswith("fits: 16; may not fit")
    assert "may not fit" not in short_lines(planned()[1], None)[1]


def test_too_many_workers_are_refused_with_the_number_that_fits(monkeypatch):
    monkeypatch.setattr("nanochat_ray.plan.hardware.host_memory_bytes", lambda: 8 * GIB)
    settings = preset("cpu", Machine(0))

    def refused(workers: int) -> str | None:
        planner = Planner(Machines(cpu(workers, 1e11), workers), "float32")
        return refusal(planner, planner.plan(settings), None)

    fewer = int(follow(refused(40), "--workers"))
    assert 1 < fewer < 40 and refused(fewer) is None


def test_a_depth_that_fits_is_found_in_few_steps(monkeypatch):
    planner, plan = cpu_plan(2 * GIB, depth=100)
    tried: list[int] = []
    memory = Planner.memory
    monkeypatch.setattr(Planner, "memory", lambda self, pre, vocab: tried.append(pre.depth) or memory(self, pre, vocab))
    assert "--pretrain.depth" in refusal(planner, plan, None) and len(tried) < 12


def test_fp8_is_refused_where_there_is_none():
    planner, plan = planned("d24", "A100", fp8=True)
    assert "--pretrain.no-fp8" in refusal(planner, plan, None) and "NO FP8: 8 x A100" in full_text(plan)
    planner, plan = planned()
    assert plan.fp8 and refusal(planner, plan, None) is None and "NO FP8" not in full_text(plan)


def test_too_small_a_disk_is_refused():
    planner, plan = planned()
    assert "--storage" in refusal(planner, plan, 10 * GIB)
    assert refusal(planner, plan, 10 * GIB, there_bytes=200 * GIB) is None
    assert refusal(planner, plan, 10**13) is None
    assert refusal(planner, plan, 100 * GIB) is None  # 9 or 10 checkpoints are there at a time


def test_no_more_checkpoints_are_counted_than_are_saved():
    _, whole = planned()
    base = preset("cpu", Machine(0))
    small = Planner(Machines(cpu(1, 1e12), 1), "float32")
    plan = small.plan(base)
    assert plan.disk.checkpoints == 3 * plan.disk.checkpoint  # as the log's run left them: one of each stage
    often = small.plan(base.model_copy(update={"pretrain": base.pretrain.model_copy(update={"save_every": 100})}))
    assert often.disk.checkpoints == (4 + 1 + 1 + 1) * plan.disk.checkpoint
    assert 9 <= whole.disk.checkpoints / whole.disk.checkpoint <= 10
    unknown = planned("d24", "Something New", 8, fp8=False)[1].disk
    assert unknown.checkpoints == (4 + 4 + 3 + 1) * unknown.checkpoint


def test_a_file_system_that_does_not_say_what_is_free(tmp_path):
    assert free_disk_bytes(Path("/proc")) is None and (free_disk_bytes(tmp_path / "new" / "er") or 0) > 0
    _, plan = planned()
    assert "not known" in short_lines(plan, None)[4] and "1 GiB free" in short_lines(plan, GIB)[4]


def test_the_short_form_is_five_lines():
    _, plan = planned()
    lines = short_lines(plan, 10**12, LogRun(404.0, "2 CPUs"))
    assert len(lines) == 5 and "measured on 2 CPUs" in lines[3] and "7 min" in lines[3]
    assert "$2.69 at $24.00" in lines[3]  # of the time that stands beside it
    assert math.isfinite(total_s(plan.stages)) and "$24.00 an hour" in short_lines(plan, None)[3]


def test_jobs_defaults_can_be_planned():
    settings = SpeedrunSettings(run=RunSettings(), pretrain=PretrainSettings(depth=24))
    plan = Planner(Machines(gpu("H100"), 8), "bfloat16").plan(settings)
    assert plan.training.num_iterations == plan_training(settings.pretrain, 32768).num_iterations
    assert not plan.own_memory.fits(plan.machines.device.memory_bytes)  # 32 rows of depth 24 in bf16
