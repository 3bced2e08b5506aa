"""From `ray up` to `ray down` on three hosts: jobs submitted, killed, stopped, taken up from another node, finished."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nanochat_ray.run_dir import STAGES, read_json
from tests.cluster.clusters import NODES, by_hand, launched
from tests.cluster.hosts import hosts, needed, why_not
from tests.cluster.laptop import DEADLINE_S, PROJECT, Cluster, Laptop, wait_until
from tests.jobs.running import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
JOB = ("python", "jobs/speedrun.py", "--preset", "smoke", "--workers", "2", "--chat-eval.max-problems", "10",
       "--rl.num-iterations", "2")  # fmt: skip
ASK = """import sys, urllib.request as web
request = web.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(web.urlopen(request).read().decode())"""


@pytest.fixture
def cluster(tmp_path, capsys) -> Iterator[Cluster]:
    """Runs lie in the folder `runs`."""
    runs, laptop = tmp_path / "runs", Laptop(tmp_path / "home")
    runs.mkdir()
    reason = why_not()
    if reason is None:
        with hosts(NODES, runs) as made, launched(made, laptop, tmp_path) as cluster:
            yield cluster
        return
    assert not needed(), reason
    with capsys.disabled():
        print(f"\nno hosts: {reason}; a cluster by `ray start` on this host instead")
    with by_hand(laptop, runs) as cluster:
        yield cluster


def step_of(stage: Path) -> int:
    """The last step that a stage has logged, -1 before the first."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line).get("step", -1) for line in lines if line.endswith("}")), default=-1)


def nodes_of_workers(cluster: Cluster, run: str) -> set[str]:
    """Addresses of the nodes on which a run of Ray Train has its workers."""
    answer = cluster.ask("/api/train/v2/runs/v1")
    runs = [found for found in answer["train_runs"] if found["name"] == run] if isinstance(answer, dict) else []
    return {worker["node_ip"] for found in runs for attempt in found["attempts"] for worker in attempt["workers"]}


def test_the_whole_road(cluster, tmp_path):
    run = tmp_path / "runs" / "smoke"
    assert cluster.ask("/api/jobs/", token="ab" * 32) in (401, 403)  # not the cluster's token

    code, said = cluster.submit("first", *JOB)
    assert code == 0, said[-3000:]
    assert cluster.submit("wrong", "python", "jobs/speedrun.py", "--preset", "smoak")[0] == 0
    wait_until(lambda: step_of(run / "pretrain") >= 5, "the training of the first job")
    wait_until(lambda: len(nodes_of_workers(cluster, "smoke-pretrain-1")) == 2, "a sight of its workers")
    pid = cluster.job("first")["driver_info"]["pid"]
    subprocess.run(cluster.on_head(f"kill -9 {pid}"), check=True)
    assert cluster.ended("first")["status"] == "FAILED"
    wrong = cluster.ended("wrong")
    assert (wrong["status"], wrong["driver_exit_code"]) == ("FAILED", 2)
    assert "smoak" in cluster.logs("wrong")

    code, said = cluster.submit("second", *JOB, folder=PROJECT)
    assert code == 0, said[-3000:]
    wait_until(lambda: step_of(run / "sft") >= 5, "the finetuning of the second job")
    code, said = cluster.laptop.run("ray", "job", "stop", "--address", cluster.address, "second")
    assert code == 0 and cluster.ended("second")["status"] == "STOPPED", said[-3000:]
    log = cluster.logs("second")
    assert "tokenizer: done before, skipped" in log and "pretrain: goes on" in log and "\r" not in log
    assert read_json(run / "lease.json")["released"]  # it had the time to save
    (stage, *_) = (name for name in STAGES if not (run / name / "_SUCCESS").exists())

    line = f"cd {cluster.project} && RAY_ADDRESS={cluster.gcs_address} {' '.join(JOB)}"
    done = subprocess.run(cluster.on_other_node(line), capture_output=True, text=True, timeout=2 * DEADLINE_S)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "pretrain: done before, skipped" in done.stdout and "Ray: joined" in done.stdout
    assert f"{stage}: goes on" in done.stdout or f"{stage}: starts" in done.stdout
    assert "chat with it: " in done.stdout and (run / "chat_eval_rl" / "_SUCCESS").exists()

    (run / "report" / "report.md").unlink()
    code, said = cluster.laptop.run("ray", "job", "submit", "--", *JOB, RAY_API_SERVER_ADDRESS=cluster.address)
    assert code == 0 and "chat_eval_rl: done before, skipped" in said, said[-3000:]
    assert (run / "report" / "report.md").exists()
    the_chat_answers(cluster, tmp_path)


def the_chat_answers(cluster: Cluster, folder: Path) -> None:
    """`serve deploy` of the file as it is, a question on the head, where it listens, and `serve shutdown`."""
    config = yaml.safe_load((PROJECT / "serve_configs" / "chat.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    (folder / "chat.yaml").write_text(yaml.safe_dump(config))
    code, said = cluster.laptop.run("serve", "deploy", str(folder / "chat.yaml"), RAY_DASHBOARD_ADDRESS=cluster.address)
    assert code == 0, said[-3000:]
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})
    line = f"python -c '{ASK}' http://127.0.0.1:{port}/v1/chat/completions '{body}'"

    def answer() -> str:
        return subprocess.run(cluster.on_head(line), capture_output=True, text=True, timeout=DEADLINE_S).stdout

    wait_until(lambda: '"choices"' in answer(), "the chat's answer", every_s=1)
    assert cluster.laptop.run("serve", "shutdown", "-y", RAY_DASHBOARD_ADDRESS=cluster.address)[0] == 0
