"""A cluster with a token, two runs that train and an application that answers: what Ray's dashboard shows of them, and
what a real Prometheus has of their metrics for the panels of cluster/grafana."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanochat_ray.report.status import read_status
from nanochat_ray.run_dir import RunDir
from tests.conftest import write_shards
from tests.jobs.running import JOBS, end
from tests.observe.test_grafana import PANELS
from tests.ray.watched_run import PRETRAIN_RUN, RL_RUN
from tests.serve.runs import make_run
from tests.serve.server import ASK, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEADLINE_S = 300.0
PROJECT = JOBS.parent
BIN = Path(sys.executable).parent
TOKEN = "a-token-for-this-test-alone-0123456789"
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIexample",
           "NANOCHAT_RAY_API_KEYS": "a-key-for-the-chat-page"}  # fmt: skip
SUBMISSION = "watched"
# Without a GPU there is no MFU and no GPU, and these stages evaluate neither CORE nor in the sandbox.
NO_DATA_HERE = {"MFU", "MFU over time", "CORE and ChatCORE", "GPU"}


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return found


@dataclasses.dataclass
class Cluster:
    """One node with its dashboard, a submitted job, an application, and Prometheus if it is installed."""

    folder: Path
    session: Path  # Ray's latest
    dashboard: str
    chat: str
    env: dict[str, str]
    prometheus: str | None = None

    def ask(self, path: str, token: str | None = TOKEN) -> Any:
        """The dashboard's answer as JSON; None while there is none."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as got:
                text = got.read().decode()
        except (OSError, ValueError):
            return None
        for secret in [TOKEN, *SECRETS.values()]:
            assert secret not in text, f"{path} shows a secret"
        return json.loads(text)

    def query(self, path: str, **params: str) -> Any:
        """Prometheus' answer; raises AssertionError with what it says of a query that it does not take."""
        try:
            url = f"{self.prometheus}{path}?{urllib.parse.urlencode(params)}"
            with urllib.request.urlopen(url, timeout=20) as got:
                return json.load(got)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{params}: {error.read().decode()}") from error

    def chat_a_little(self) -> bool:
        body = json.dumps(ASK | {"max_tokens": 12}).encode()
        key = SECRETS["NANOCHAT_RAY_API_KEYS"]
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        try:
            request = urllib.request.Request(f"{self.chat}/v1/chat/completions", body, headers)
            return "choices" in json.load(urllib.request.urlopen(request, timeout=60))
        except (OSError, ValueError):
            return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("watched")
    write_shards(folder / "data")
    make_run(folder / "served")
    short = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's sockets lie below it, and their paths may have 107 bytes
    port, dashboard, chat = free_port(), free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | SECRETS | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(PROJECT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }  # fmt: skip
    command = [str(BIN / "ray"), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=8",
               "--dashboard-agent-listen-port=0", f"--metrics-export-port={free_port()}", f"--temp-dir={short}",
               "--system-config", '{"metrics_report_interval_ms": 1000}', "--object-store-memory=200000000",
               "--block"]  # fmt: skip
    started = [subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    found = Cluster(folder, short / "session_latest", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{chat}", env)
    try:
        until(lambda: found.ask("/api/version"), "no dashboard")
        submit(found)
        deploy(found, chat)
        found.prometheus = start_prometheus(found, started)
        until(found.chat_a_little, "no answer of the chat")
        yield found
    finally:
        for process in reversed(started):
            try:
                of_it = psutil.Process(process.pid)
                end([*of_it.children(recursive=True), of_it])
            except psutil.NoSuchProcess:
                pass
            process.wait()
        shutil.rmtree(short, ignore_errors=True)


def submit(cluster: Cluster) -> None:
    """As a person does it; the node takes jobs some seconds after the dashboard is up."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--no-wait", "--submission-id"]
    job = ["--", sys.executable, str(PROJECT / "tests" / "ray" / "watched_run.py"), str(cluster.folder)]

    def try_once() -> bool:
        whole = [*command, f"{SUBMISSION}-{time.monotonic_ns()}", *job]
        return subprocess.run(whole, env=cluster.env, cwd=cluster.folder, capture_output=True).returncode == 0

    until(try_once, "the job is not taken")


def deploy(cluster: Cluster, port: int) -> None:
    application = {
        "name": "chat", "route_prefix": "/", "import_path": "nanochat_ray.serve.app:build",
        "args": {"storage": str(cluster.folder / "served"), "source": "sft", "device": "cpu", "replicas": 1, "cpus": 1,
                 "kv_memory_gb": 0.05},
    }  # fmt: skip
    file = cluster.folder / "serve.yaml"
    options = {"http_options": {"host": "127.0.0.1", "port": port}, "proxy_location": "HeadOnly"}
    file.write_text(json.dumps(options | {"applications": [application]}))  # which is YAML too
    command = [str(BIN / "serve"), "deploy", str(file), "--address", cluster.dashboard]
    said = subprocess.run(command, env=cluster.env, cwd=cluster.folder, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def start_prometheus(cluster: Cluster, started: list[subprocess.Popen]) -> str | None:
    """With the configuration that Ray writes, but for how often it looks."""
    binary = shutil.which("prometheus")
    if binary is None:
        return None
    written = cluster.session / "metrics" / "prometheus" / "prometheus.yml"
    until(written.exists, f"Ray wrote no {written}")
    config = cluster.folder / "prometheus.yml"
    config.write_text(re.sub(r"\b10s( #|$)", r"2s\1", written.read_text(), flags=re.M))
    address = f"127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={cluster.folder / 'tsdb'}",
               f"--web.listen-address={address}"]  # fmt: skip
    started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return f"http://{address}"


@pytest.fixture
def prometheus(cluster) -> Cluster:
    if cluster.prometheus is None:
        if os.environ.get("NANOCHAT_RAY_NEED_PROMETHEUS"):
            pytest.fail("no prometheus in the path (Debian's package is called prometheus)")
        pytest.skip("no prometheus in the path (Debian's package is called prometheus)")
    return cluster


VIEWS = ("train", "jobs", "data", "actors", "serve")


def look(cluster: Cluster, seen: dict[str, set[str]]) -> dict[str, set[str]]:
    """Collect the names that the dashboard shows now in its five views."""
    runs = cluster.ask("/api/train/v2/runs/v1") or {"train_runs": []}
    seen["train"] |= {f"{run['name']} {run['status']}" for run in runs["train_runs"]}
    jobs = cluster.ask("/api/jobs/") or []
    seen["jobs"] |= {f"{str(job['submission_id']).partition('-')[0]} {job['status']}" for job in jobs}
    for job in jobs:
        data = cluster.ask(f"/api/data/datasets/{job['job_id']}") if job["job_id"] else None
        seen["data"] |= {one["dataset"].partition(" rows_")[0] for one in (data or {"datasets": []})["datasets"]}
    actors = cluster.ask("/api/v0/actors?detail=1&limit=1000")
    if actors is not None:
        for actor in actors["data"]["result"]["result"]:
            seen["actors"] |= {actor["class_name"], actor["name"] or "", actor["repr_name"] or ""}
    serve = cluster.ask("/api/serve/applications/") or {"applications": {}}
    for name, application in serve["applications"].items():
        seen["serve"] |= {f"{name} {application['status']}", *application["deployments"]}
    return seen


def test_the_dashboard_shows_stages_by_their_names(cluster):
    wanted = {
        "train": {f"{PRETRAIN_RUN}-pretrain-", f"{RL_RUN}-rl-"},
        "jobs": {f"{SUBMISSION} RUNNING"},
        "data": {f"{PRETRAIN_RUN} pretrain"},
        "actors": {f"RowDealer({PRETRAIN_RUN} pretrain)", f"rollout {RL_RUN} rl #0", f"scorer {RL_RUN} rl #0",
                   "RayTrainWorker", "SandboxActor"},
        "serve": {"chat RUNNING", "ChatServer"},
    }  # fmt: skip
    seen: dict[str, set[str]] = {view: set() for view in VIEWS}

    def missing() -> dict[str, set[str]]:
        look(cluster, seen)
        names = {view: " ".join(found) if view == "train" else found for view, found in seen.items()}
        return {view: {name for name in wanted[view] if name not in names[view]} for view in VIEWS}

    def done() -> bool:
        assert not (cluster.folder / "ended.txt").exists(), (cluster.folder / "ended.txt").read_text()
        return not any(missing().values())

    try:
        until(done, "not all names were seen")
    except AssertionError as error:
        raise AssertionError(f"{error}; missing: {missing()}") from error


@pytest.mark.parametrize("path", [
    "/api/train/v2/runs/v1", "/api/jobs/", "/api/v0/actors", "/api/serve/applications/", "/api/version",
])  # fmt: skip
@pytest.mark.parametrize("token", [None, "another-token-of-the-same-length-012345"])
def test_nobody_is_answered_without_the_token(cluster, path, token):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(cluster.dashboard + path, headers=headers), timeout=20)
    assert refused.value.code in (401, 403)


def substituted(expression: str) -> str:
    """A panel's query as Grafana sends it with all of each variable chosen."""
    for name in ("run", "stage", "model"):
        expression = expression.replace(f"${name}", ".*")
    return expression.replace("$__rate_interval", "30s")


def test_every_panel_has_data_in_a_real_prometheus(prometheus):
    waiting = {(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]
               if panel["title"] not in NO_DATA_HERE}  # fmt: skip
    optional = {expr for _, expr in waiting if any(
        name in expr for name in ("cached_tokens", "cancellations", "rejected", "preemptions", "val_bpb"))}  # fmt: skip
    waiting = {(title, expr) for title, expr in waiting if expr not in optional}
    for panel in PANELS:
        for target in panel["targets"]:
            prometheus.query("/api/v1/query", query=substituted(target["expr"]))  # none is refused

    def without_data() -> set[tuple[str, str]]:
        prometheus.chat_a_little()
        for title, expression in [*waiting]:
            found = prometheus.query("/api/v1/query", query=substituted(expression))["result"]
            if any(value["value"][1] != "NaN" for value in found):
                waiting.remove((title, expression))
        return waiting

    try:
        until(lambda: not without_data(), "panels without data")
    except AssertionError as error:
        raise AssertionError(f"{error}: {sorted(waiting)}") from error
    loss = prometheus.query("/api/v1/query", query="ray_nanochat_train_loss")["result"]
    assert {(one["metric"]["run"], one["metric"]["stage"]) for one in loss} == {
        (PRETRAIN_RUN, "pretrain"), (RL_RUN, "rl")
    }  # fmt: skip
    runs = prometheus.query("/api/v1/label/run/values", **{"match[]": "ray_nanochat_step"})
    assert {PRETRAIN_RUN, RL_RUN} <= set(runs)
    counted = "sum by (outcome) (ray_nanochat_sandbox_programs_total)"
    outcomes = prometheus.query("/api/v1/query", query=counted)["result"]
    assert {one["metric"]["outcome"]: float(one["value"][1]) for one in outcomes} == {"passed": 1, "failed": 1}


def test_a_training_worker_that_is_killed_counts_as_a_restart(cluster):
    """In the run's files at once; in Prometheus when the next launch has reported.

    Both runs train in one job here, where the end of one launch may take the other's workers along.
    """
    actors = cluster.ask("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    workers = [actor for actor in actors if actor["class_name"] == "RayTrainWorker" and actor["state"] == "ALIVE"]
    assert len(workers) == 2
    psutil.Process(workers[0]["pid"]).kill()
    runs = [RunDir(cluster.folder / tag) for tag in (PRETRAIN_RUN, RL_RUN)]
    until(lambda: any(read_status(run).restarts for run in runs), "no restart in the files")
    failures = [failure for run in runs if (failure := read_status(run).last_failure)]
    assert failures and not any(failure.final for failure in failures)
    if cluster.prometheus:

        def restarts() -> bool:
            found = cluster.query("/api/v1/query", query="max(ray_nanochat_train_restarts)")["result"]
            return bool(found) and float(found[0]["value"][1]) >= 1

        until(restarts, "no restart in Prometheus")


def test_the_documented_command_puts_the_dashboard_where_grafana_looks(cluster):
    readme = (PROJECT / "cluster" / "grafana" / "README.md").read_text()
    command = re.search(r"^cp cluster/grafana/nanochat\.json \S+$", readme, re.M)
    assert command is not None
    line = command[0].replace("/tmp/ray/session_latest", str(cluster.session))
    subprocess.run(["bash", "-c", line], cwd=PROJECT, check=True)
    import yaml

    provisioned = cluster.session / "metrics" / "grafana" / "provisioning" / "dashboards" / "default.yml"
    (provider,) = yaml.safe_load(provisioned.read_text())["providers"]
    assert json.loads((Path(provider["options"]["path"]) / "nanochat.json").read_text())["uid"] == "nanochat-ray"


def test_the_job_ends_well(cluster):
    (cluster.folder / "stop").touch()
    ended = cluster.folder / "ended.txt"
    until(ended.exists, "the job does not end")
    assert ended.read_text() == "well"
