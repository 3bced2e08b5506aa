"""Which failures are tried again, how long a store is waited for, and what nobody may read."""

from __future__ import annotations

import errno

import pytest
import torch

from nanochat_ray.messages import ClusterError, PassedOn
from nanochat_ray.run_dir import StaleWriterError
from nanochat_ray.train import launch
from nanochat_ray.train.room import Workers


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a wrong setting"), FileNotFoundError("a shard"), OSError(errno.ENOSPC, "no space left"),
        StaleWriterError("another job writes"), FloatingPointError("diverged"), torch.OutOfMemoryError("too large"),
    ],
)
def test_what_would_fail_again_is_not_tried_again(error):
    assert launch.no_use_to_retry(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("peer closed"), ConnectionError("store away"), TimeoutError("slow"), ClusterError("dealer died")],
)
def test_what_may_pass_is_tried_again(error):
    assert not launch.no_use_to_retry(error)


def test_a_store_that_is_away_is_waited_for_and_said(monkeypatch, caplog):
    monkeypatch.setattr(launch, "STORE_LOOK_S", 0.01)
    answers = [ConnectionError("no route"), ConnectionError("no route"), 7]

    def call() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert launch.patiently(call, "pretrain", 5.0) == 7
    assert caplog.text.count("pretrain: waiting for the run's store: no route") == 2

    def never() -> int:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        launch.patiently(never, "pretrain", 0.05)


def test_keys_travel_unseen(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("HOME_PAGE", "not passed on")
    passed_on = PassedOn.here()
    assert passed_on.values["WANDB_API_KEY"] == passed_on.values["AWS_SECRET_ACCESS_KEY"] == "very-secret"
    assert "HOME_PAGE" not in passed_on.values and "very-secret" not in repr(passed_on)
    assert "very-secret" not in str(launch.worker_environment(Workers(threads_each=2)))
    monkeypatch.delenv("WANDB_API_KEY")
    passed_on.take()
    assert launch.os.environ["WANDB_API_KEY"] == "very-secret"
