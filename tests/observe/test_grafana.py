"""The Grafana dashboard's file: its form, and that it names the metrics that the code exports and no others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.stages.hooks import FolderHooks
from tests.metrics.bundle import three_kinds
from tests.stages.rl_tiny import VersionedRollouts, make_rl, run_rl
from tests.stages.tiny import PRETRAIN, conversations, make_run, make_sft, run_pretrain, run_sft

FILE = Path(__file__).parent.parent.parent / "cluster" / "grafana" / "nanochat.json"
BOARD = json.loads(FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"datasource", "run", "stage", "model"}
BUILT_IN = {"__rate_interval"}
METRIC = re.compile(r"\bray_\w+")
# What is exported and on no panel: places in the data, sums, and what another panel's number says already.
NOT_SHOWN = {
    "train_epoch", "train_item", "train_row", "train_progress", "train_supervised_tokens", "train_loss_step",
    "total_training_time", "total_training_flops", "core_skipped", "chatcore_cat", "rollout_trained_tokens",
    "rollout_busy_s", "train_ratio_mean", "eval_length_mean",
}  # fmt: skip
NOT_SHOWN_FAMILIES = ("core_", "chatcore_", "eval_pass_", "eval_unbiased_pass_")  # by task, by k


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def metrics_of(text: str) -> set[str]:
    return set(METRIC.findall(text))


# --- the form


def test_the_file_is_a_dashboard():
    assert BOARD["schemaVersion"] >= 36 and BOARD["uid"] and BOARD["title"] == "nanochat-ray"
    assert "__inputs" not in BOARD and BOARD.get("id") is None  # of an export for people, and of somebody's Grafana
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in BOARD["panels"]]
    assert len(set(titles)) == len(titles)


def test_variables():
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables.keys() == VARIABLES
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for name in VARIABLES - {"datasource"}:
        variable = variables[name]
        assert variable["type"] == "query" and variable["multi"] and variable["includeAll"]
        assert variable["allValue"] == ".*" and variable["datasource"]["uid"] == "${datasource}"
        assert re.fullmatch(rf"label_values\(.+, {name}\)", variable["query"]["query"])
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"])))
    assert used - BUILT_IN == VARIABLES


def test_panels():
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat") and panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] and target["legendFormat"]
            assert metrics_of(target["expr"]), target
    for one, other in itertools.combinations(BOARD["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart and a["x"] >= 0 and a["x"] + a["w"] <= 24, (one["title"], other["title"])


@pytest.mark.parametrize("words", [
    "Loss", "bits per byte", "Tokens per second", "MFU", "wait for", "Restarts", "Rollout reward", "Policy lag",
    "Weight sync", "sandbox", "first token", "Inter-token", "Queue", "Cache hits",
])  # fmt: skip
def test_what_a_person_wants_to_see_is_there(words):
    assert any(words in panel["title"] for panel in PANELS)


# --- the names


@pytest.fixture(scope="module")
def registered() -> Iterator[set[str]]:
    """Names that the exporters register with Ray while this is open, as Prometheus gets them."""
    found: set[str] = set()

    def fake(*endings: str) -> Any:
        class Metric:
            def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
                found.update(f"ray_{name}{ending}" for ending in endings)

            def set(self, *args: Any, **kwargs: Any) -> None: ...

        return Metric

    gauge, counter, histogram = fake(""), fake("_total"), fake("_bucket", "_sum", "_count")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat_ray.observe.metrics.Gauge", gauge)
        patch.setattr("nanochat_ray.observe.metrics.MIN_INTERVAL_S", 0.0)
        patch.setattr("nanochat_ray.evals.sandbox_pool.Counter", counter)
        for name, made in (("Gauge", gauge), ("Counter", counter), ("Histogram", histogram)):
            patch.setattr(f"nanochat_ray.serve.metrics.{name}", made)
        for module in ("pretrain", "sft"):  # a device whose peak is known, so that there is an MFU
            patch.setattr(f"nanochat_ray.stages.{module}.peak_flops", lambda name: 1e12)
        yield found


@pytest.fixture(scope="module")
def exported(registered, tmp_path_factory, shards) -> set[str]:
    """The names after each stage has run for some steps with the hooks that it has on Ray."""
    from nanochat_ray.evals.sandbox_pool import _Pool
    from nanochat_ray.messages import World
    from nanochat_ray.rollout.pool import COUNTS
    from nanochat_ray.serve.metrics import ServeMetrics
    from nanochat_ray.stages.evaluation import chat_metrics
    from nanochat_ray.train.launch import RayHooks

    class Hooks(RayHooks):
        save = FolderHooks.save  # Ray Train is not told

        def __init__(self, stage_folder: Path) -> None:
            super().__init__(stage_folder, 1, World(), None, 2, beat=lambda: None)

    class Pool(VersionedRollouts):
        def counts(self) -> dict[str, float]:
            return dict.fromkeys(COUNTS, 1.0)

    root = tmp_path_factory.mktemp("exported")
    settings = PRETRAIN.model_copy(update={"num_iterations": 3, "core_metric_every": 2, "eval_every": 2})
    job, rows = make_run(root, shards, settings)
    hooks: Any = Hooks(job.stage_folder)
    run_pretrain(dataclasses.replace(job, eval_bundle=three_kinds(root / "bundle")), rows, hooks)
    hooks.close()
    sft, sft_rows = make_sft(root, job, conversations(root / "talk.jsonl"), num_iterations=3)
    hooks = Hooks(sft.stage_folder)
    run_sft(sft, sft_rows, hooks)
    hooks.report(3, chat_metrics({"ARC-Easy": SimpleNamespace(accuracy=0.5)}))  # as its evaluation would
    hooks.close()
    rl = make_rl(root / "rl-run", num_iterations=2)
    hooks = Hooks(rl.stage_folder)
    run_rl(rl, hooks, Pool(rl.rollout_spec("cpu")))
    hooks.close()
    ServeMetrics(None)  # type: ignore[arg-type]
    _Pool([], unsafe=True)
    return registered


def of_ray() -> set[str]:
    """The names in Ray's own dashboards, which are made for this version."""
    from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_default_grafana_dashboard

    return metrics_of(generate_default_grafana_dashboard()[0])


def test_every_metric_on_it_is_exported(exported):
    assert metrics_of("\n".join(expressions())) - exported - of_ray() == set()


def test_every_metric_that_is_exported_is_on_it_or_left_out_on_purpose(exported):
    shown = metrics_of("\n".join(expressions()))
    rest = {re.sub("_(bucket|sum|count)$", "_bucket", name) for name in exported} - shown
    names = {name.removeprefix("ray_nanochat_") for name in rest}
    assert {name for name in names - NOT_SHOWN if not name.startswith(NOT_SHOWN_FAMILIES)} == set()


def test_variables_ask_for_metrics_that_are_exported(exported):
    asked = {name for variable in BOARD["templating"]["list"] for name in metrics_of(json.dumps(variable))}
    assert len(asked) == 2 and asked <= exported
