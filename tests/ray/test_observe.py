"""A stage's numbers on the metrics port of the cluster, as Prometheus would read them."""

from __future__ import annotations

import re
import time
import urllib.request
import warnings

import pytest

DEADLINE_S = 60.0
METRICS = {
    "train/loss": 2.5, "train/mfu": float("nan"), "val/bpb": 1.25, "core/hellaswag_zeroshot": 0.5, "dtype": "float32",
    "train/tok_per_sec": 1000, "resumed": True, "samples": ["a"], "train/grad_norm": None,
}


def exported() -> dict[tuple[str, str, str], float]:
    """(name, stage, run) -> value of this project's gauges on the first node."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^(ray_nanochat_\w+)\{(.*)\} (\S+)$", text, re.M):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        found[name, labels["stage"], labels["run"]] = float(value)
    return found


@pytest.mark.slow
def test_what_a_rank_logs_is_exported_with_its_stage_and_run(ray_cluster):
    import ray

    class Rank:
        def train(self) -> None:
            from nanochat_ray.observe.metrics import RayGauges

            self.gauges = RayGauges("pretrain", "d1-test")
            self.gauges.log(0, {"train/loss": 9.0})
            self.gauges.log(3, METRICS)  # at once behind the first: held back
            self.gauges.flush()

    rank = ray.remote(Rank).options(num_cpus=0).remote()
    ray.get(rank.train.remote())
    wanted = {
        "step": 3, "train_loss": 2.5, "val_bpb": 1.25, "core_hellaswag_zeroshot": 0.5, "train_tok_per_sec": 1000,
    }
    deadline = time.monotonic() + DEADLINE_S
    found: dict[str, float] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
        found = {name.removeprefix("ray_nanochat_"): value
                 for (name, stage, run), value in exported().items() if (stage, run) == ("pretrain", "d1-test")}
    ray.kill(rank)
    assert found == wanted


def test_names_are_valid_and_values_wait_for_their_turn(monkeypatch):
    from nanochat_ray.observe import metrics

    seen: list[tuple[str, float, dict]] = []

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert re.fullmatch(r"[a-z_][a-z0-9_]*", name) and tag_keys == ("stage", "run")
            self.name = name

        def set(self, value, tags):
            seen.append((self.name, value, tags))

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    now = [0.0]
    gauges = metrics.RayGauges("sft", "d1", clock=lambda: now[0])
    for step in range(25):  # ten a second
        gauges.log(step, {"train/loss": step, "core/BIG bench: (QA)": 0.5} | ({"val/bpb": 1.0} if step == 1 else {}))
        now[0] += 0.125
    values = [value for name, value, _ in seen if name == "nanochat_train_loss"]
    assert values == [0, 8, 16, 24]
    assert ("nanochat_val_bpb", 1.0, {"stage": "sft", "run": "d1"}) in seen  # though it came between two turns
    assert "nanochat_core_big_bench_qa" in {name for name, _, _ in seen}


def test_a_failure_warns_once_and_training_goes_on(monkeypatch):
    from nanochat_ray.observe import metrics

    def broken(*args, **kwargs):
        raise RuntimeError("no agent")

    monkeypatch.setattr(metrics, "Gauge", broken)
    gauges = metrics.RayGauges("sft", "d1")
    with pytest.warns(RuntimeWarning, match="no agent"):
        gauges.log(0, {"train/loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauges.log(1, {"train/loss": 1.0})
        gauges.flush()
