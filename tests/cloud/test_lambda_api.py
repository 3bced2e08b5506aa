"""The client against a cloud with limits and bad days."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from nanochat_ray.cloud import pace as pace_module
from nanochat_ray.cloud.lambda_api import TOKEN, LambdaApi, read_key, retry_after_s
from nanochat_ray.cloud.lambda_errors import HELP, LambdaError, NoCapacity, NotThere, Unreachable
from nanochat_ray.cloud.pace import Pace, Times
from tests.cloud import api_facts
from tests.cloud.fake_lambda import KEY, LAUNCH, LIST, TERMINATE, Fault

MACHINE = {"instance_type_name": "gpu_1x_a10", "region_name": "us-east-1", "ssh_key_names": ["my-key"]}


@pytest.fixture
def api(cloud, times, tmp_path):
    client = LambdaApi(KEY, cloud.url, tmp_path / "state", times)
    yield client
    client.close()


def test_the_facts_are_those_of_the_description():
    data = os.environ.get("NANOCHAT_RAY_TEST_DATA")
    if not data:
        pytest.skip("NANOCHAT_RAY_TEST_DATA does not say where the API's description lies")
    description = json.loads((Path(data) / "cluster/lambda_openapi_1.8.3.json").read_text())
    assert api_facts.of(description) == api_facts.load()


def test_a_machine_comes_and_goes(api, cloud):
    node = api.launch(MACHINE, "t1")
    assert node in api.instances() and api.instances()[node].tags == {TOKEN: "t1"}
    assert api.terminate([node]) == [node]
    assert not api.instances()[node].alive


def test_a_list_is_kept_for_a_while_and_not_behind_our_own_changes(api, cloud, times):
    began = time.monotonic()
    for _ in range(5):
        api.instances()
    threads = [threading.Thread(target=api.instances) for _ in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert cloud.count(LIST) <= 1 + int((time.monotonic() - began) / times.listing_s)
    before = cloud.count(LIST)
    node = api.launch(MACHINE, "t")
    assert node in api.instances() and cloud.count(LIST) == before + 1


@pytest.mark.parametrize("how", [429, 500, "lost before", "lost after", "garbage"])
@pytest.mark.parametrize("request_name", [LIST, TERMINATE])
def test_reading_and_ending_are_tried_again(api, cloud, how, request_name):
    node = api.launch(MACHINE, "t")
    cloud.faults = [Fault(request_name, how, times=2)]
    try:
        api.terminate([node])
    except NotThere:
        assert how == "lost after"
    assert not api.instances(fresh=True)[node].alive and cloud.faults[0].times == 0


@pytest.mark.parametrize("hidden_s", [0.0, 0.03])
@pytest.mark.parametrize("how", [429, 500, "lost before", "lost after", "garbage"])
def test_a_launch_whose_answer_is_lost_gives_one_machine(api, cloud, how, hidden_s):
    cloud.hidden_s = hidden_s
    cloud.faults = [Fault(LAUNCH, how)]
    node = api.launch(MACHINE, "wish")
    assert cloud.alive() == [node] and cloud.tags(node)[TOKEN] == "wish"


def test_a_cloud_that_is_down_is_given_up(cloud, tmp_path):
    times = Times().scaled(0.001)
    api = LambdaApi(KEY, "http://127.0.0.1:9", tmp_path, times)
    with pytest.raises(Unreachable, match="no connection"):
        api.instances()
    with pytest.raises(Unreachable) as caught:
        api.launch(MACHINE, "t")
    assert caught.value.nothing_done
    api = LambdaApi(KEY, cloud.url, tmp_path, times)
    cloud.faults = [Fault(LAUNCH, 500, times=1000)]
    with pytest.raises(Unreachable, match=f"{TOKEN}=t2") as caught:
        api.launch(MACHINE, "t2")
    assert not caught.value.nothing_done


def test_no_capacity_says_where_there_is(api, cloud):
    cloud.capacity["gpu_1x_a10"] = ["us-west-1", "us-south-1"]
    with pytest.raises(NoCapacity) as caught:
        api.launch(MACHINE, "t")
    said = str(caught.value)
    assert "no gpu_1x_a10 free in us-east-1" in said and "us-west-1, us-south-1" in said and "gpu_8x_h100_sxm5" in said
    assert cloud.count(LAUNCH) == 1


@pytest.mark.parametrize("change, kind, said", [
    ({"ssh_key_names": ["other"]}, NotThere, "object-does-not-exist"),
    ({"file_system_names": ["elsewhere"]}, LambdaError, "mounted in its own region only"),
])  # fmt: skip
def test_refusals_name_what_and_why(api, change, kind, said):
    with pytest.raises(kind, match=said):
        api.launch({**MACHINE, **change}, "t")


def test_quota_and_key(api, cloud, times, tmp_path):
    cloud.quota = 0
    with pytest.raises(LambdaError, match="ask Lambda for more"):
        api.launch(MACHINE, "t")
    with pytest.raises(LambdaError, match="api-keys") as caught:
        LambdaApi("wrong", cloud.url, tmp_path, times).instances()
    assert caught.value.code == "global/invalid-api-key"


def test_helps_are_for_codes_that_exist():
    assert HELP.keys() <= set(api_facts.FACTS.read_text().split('"'))


def test_the_key_is_found_and_never_shown(cloud, times, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    with pytest.raises(FileNotFoundError, match=r"LAMBDA_API_KEY is not set and .*\.lambda_cloud/api_key"):
        read_key()
    path = tmp_path / "key"
    path.write_text("two words")
    with pytest.raises(ValueError, match="one word") as bad:
        read_key(path)
    assert "two words" not in str(bad.value)
    path.write_text(f"{KEY}\n")
    assert read_key(path) == KEY
    monkeypatch.setenv("LAMBDA_API_KEY", " from-env ")
    assert read_key(path) == "from-env"
    caplog.set_level(logging.DEBUG)
    api = LambdaApi(KEY, cloud.url, tmp_path, times)
    cloud.faults = [Fault(LIST, 500)]
    api.instances()
    with pytest.raises(LambdaError) as caught:
        api.launch({**MACHINE, "ssh_key_names": ["no"]}, "t")
    assert KEY not in caplog.text + str(caught.value) + repr(api) + repr(vars(api))


@pytest.mark.parametrize("text, wait_s", [("", None), ("3", 3.0), ("-1", 0.0), ("1e9", 120.0), ("soon", None)])
def test_retry_after(text, wait_s):
    assert retry_after_s({"retry-after": text}) == wait_s


def test_retry_after_as_a_date():
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2115 07:28:00 GMT"}) == 120.0


# --- pace -------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.monotonic: Callable[[], float] = self.time

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("shared", [True, False])
def test_requests_keep_their_distance(monkeypatch, tmp_path, shared):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    sent: dict[bool, list[float]] = {True: [], False: []}
    paces = [Pace(tmp_path if shared else None, Times()) for _ in range(3)]  # as of three processes
    for n in range(30):
        pace, launch = paces[n % 3 if shared else 0], n % 5 == 0
        pace.wait(launch)
        sent[launch].append(clock.now)
    every = sorted(sent[True] + sent[False])
    assert min(b - a for a, b in pairwise(every)) >= 1.0
    assert min(b - a for a, b in pairwise(sent[True])) >= 12.0


def test_a_launch_that_waits_lets_others_pass(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    pace = Pace(tmp_path, Times())
    pace.wait(launch=True)
    at, taken = pace._take(launch=True)
    assert not taken and at - clock.now > 11
    pace.wait()
    assert clock.now - 1_000_000.0 < 2


def test_a_clock_set_back_a_torn_file_and_a_full_disk_stop_nobody(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    pace = Pace(tmp_path, Times())
    pace.wait(launch=True)
    clock.now -= 5000
    pace.wait(launch=True)
    assert clock.now < 1_000_000.0 - 4000
    (tmp_path / "pace.json").write_text("{")
    pace.wait()
    monkeypatch.setattr(pace_module, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    before = clock.now
    pace.wait()
    pace.wait()
    assert clock.now - before >= 2.0


def hurry(folder: Path, times: Times, n: int) -> None:
    pace = Pace(folder, times)
    for _ in range(n):
        pace.wait()


def test_processes_share_the_pace(tmp_path):
    times = Times().scaled(0.01)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=hurry, args=(tmp_path, times, 10)) for _ in range(3)]
    began = pace_module.time.time()
    for each in others:
        each.start()
    for each in others:
        each.join()
        assert each.exitcode == 0
    assert pace_module.time.time() - began >= 29 * times.request_gap_s * 0.99
