import pytest

from nanochat_ray.report.training import WARM_UP_STEPS, summarise


def train(step: int, **more: float) -> dict:
    slow = 100.0 if more.pop("cold", False) else 1.0
    return {"step": step, "train/loss": 1.0, "train/dt": 0.5 * slow, "train/data_wait_s": 0.005 * slow**2,
            "train/tok_per_sec": 1000 / slow, **more}  # fmt: skip


def steps(first: int, stop: int) -> list[dict]:
    return [train(step, cold=step < first + WARM_UP_STEPS) for step in range(first, stop)]


def test_two_restarts_are_counted_and_their_warm_up_is_left_out():
    start = {"event": "start", "time": 1.0}
    written = [*steps(0, 30), start, *steps(20, 50), {"step": 40, "val/bpb": 1.0}, start, *steps(50, 70)]
    found = summarise(written)
    assert (found.steps, found.starts, found.steps_again) == (70, 3, 10)
    assert found.tok_per_sec == 1000 and found.data_wait_frac == pytest.approx(0.01)
    assert found.checkpoint_stall_frac is None and found.waste_frac is None and found.mfu is None


def test_a_run_shorter_than_its_warm_up_counts_whole():
    found = summarise([train(0), train(1, **{"train/mfu": 40.0, "data/waste_frac": 0.25})])
    assert (found.steps, found.mfu, found.waste_frac) == (2, 40.0, 0.25)


def test_no_training_is_no_summary():
    assert summarise([]) is None and summarise([{"step": 3, "val/bpb": 1.0}]) is None
