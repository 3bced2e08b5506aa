import io
import os
import pty
import select
import time

import pytest

from nanochat_ray.report.progress import Progress, evaluation_lines, step_line

METRICS = {
    "train/loss": 3.1234567, "train/loss_step": 3.0, "train/lrm": 0.5, "train/dt": 0.12345,
    "train/tok_per_sec": 1234567, "train/mfu": 45.678, "train/epoch": 1, "train/item": 12, "train/row": 34,
    "total_training_time": 74.0, "val/bpb": 0.9,
}


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_step_line_has_the_fields_of_the_reference_in_order():
    assert step_line(100, 5568, METRICS, eta_s=2736.0) == (
        "step 00100/05568 (1.80%) | loss: 3.123457 | lrm: 0.50 | dt: 123.45ms | tok/sec: 1,234,567 | bf16_mfu: 45.68"
        " | epoch: 1 item: 12 row: 34 | total time: 1.23m | eta: 45.6m"
    )


def test_the_line_says_what_training_waited_for_since_the_last_one():
    stream, clock = io.StringIO(), FakeClock()
    step = {"train/loss": 1.0, "train/dt": 0.5, "train/grad_norm": 0.25, "data/waste_frac": 0.031}
    with Progress(100, "x", stream=stream, clock=clock) as progress:
        for number in range(6):
            clock.now += 0.5
            stall = {"train/checkpoint_stall_s": 0.05 if number == 2 else 0.0}
            progress.update(number, step | {"train/data_wait_s": 0.01} | stall)
    first, *_, last = stream.getvalue().splitlines()
    assert first.endswith("| grad norm: 0.250 | waste: 3.10% | data wait: 2.0%")
    assert "data wait: 2.0%" in last
    assert "checkpoint stall: 2.5%" in stream.getvalue()  # over the four steps since the first line


def test_missing_numbers_are_left_out():
    assert step_line(7, None, {"train/loss": 1.0, "train/mfu": None}) == "step 00007 | loss: 1.000000"
    assert step_line(7, None, {"train/loss": 1.0}, done_frac=0.25) == "step 00007 (25.00%) | loss: 1.000000"


def test_evaluation_lines():
    assert evaluation_lines(250, {"val/bpb": 0.81234567, "core_metric": 0.2, "other": 1}) == [
        "step 00250 | Validation bpb: 0.812346", "step 00250 | CORE metric: 0.2000",
    ]
    samples = [{"prompt": "The sky is", "text": " blue"}, "plain"]
    lines = evaluation_lines(0, {"samples": samples})
    assert lines == ["step 00000 | sample: The sky is blue", "step 00000 | sample: plain"]


@pytest.mark.parametrize(
    ("step_s", "fewest", "most"), [(0.02, 20, 120), (0.2, 50, 250), (2.4, 200, 450), (90, 5000, 5000)]
)
def test_a_log_of_5000_steps_is_readable(step_s, fewest, most):
    stream, clock = io.StringIO(), FakeClock()
    with Progress(5000, "pretrain", stream=stream, clock=clock) as progress:
        for step in range(5000):
            clock.now += step_s
            progress.update(step, METRICS)
    lines = stream.getvalue().splitlines()
    assert fewest <= len(lines) <= most
    assert lines[0].startswith("step 00000/05000") and lines[-1].startswith("step 04999/05000")
    assert len(set(lines)) == len(lines)


def test_the_eta_is_of_the_clock():
    stream, clock = io.StringIO(), FakeClock()
    progress = Progress(100, "x", stream=stream, clock=clock)
    for step in range(50):
        clock.now += 60
        progress.update(step, METRICS)
    assert stream.getvalue().splitlines()[-1].endswith("eta: 50.0m")


def test_unknown_length_counts_epochs():
    stream, clock = io.StringIO(), FakeClock()
    progress = Progress(None, "sft", epochs=2, stream=stream, clock=clock)
    for step, consumed in enumerate((0.5, 1.0, 2.1)):
        clock.now += 60
        progress.update(step, {"train/loss": 1.0, "train/progress": consumed})
    shares = [line.split("|")[0] for line in stream.getvalue().splitlines()]
    assert shares == ["step 00000 (25.00%) ", "step 00001 (50.00%) ", "step 00002 (100.00%) "]


def test_evaluations_are_shown_at_once_and_once():
    stream, clock = io.StringIO(), FakeClock()
    progress = Progress(10, "x", stream=stream, clock=clock)
    progress.update(0, {"val/bpb": 2.0})
    progress.update(0, METRICS)  # repeats the last bpb, which is no news
    shown = [line.split(" | ")[1].split(":")[0] for line in stream.getvalue().splitlines()]
    assert shown == ["Validation bpb", "loss"]


def test_a_terminal_gets_one_bar():
    stream = Terminal()
    with Progress(20, "pretrain", stream=stream) as progress:
        for step in range(10, 20):
            progress.update(step, METRICS)
        progress.update(20, {"val/bpb": 0.5})
    text = stream.getvalue()
    assert "pretrain: 100%" in text and "20/20" in text and "Validation bpb: 0.500000" in text and "loss=3.1235" in text
    assert "step 00" not in text.replace("step 00020 | Validation", "")


def test_a_real_terminal_that_does_not_know_its_size_gets_the_bar_too():
    reader, writer = pty.openpty()
    with open(writer, "w") as stream, Progress(20, "sft", stream=stream) as progress:
        for step in range(20):
            progress.update(step, METRICS)
        progress.close()
        seen, deadline = b"", time.monotonic() + 10
        while b"20/20" not in seen and time.monotonic() < deadline:  # a terminal hands its bytes over in pieces
            if select.select([reader], [], [], 0.1)[0]:
                seen += os.read(reader, 100_000)
        assert b"20/20" in seen
    os.close(reader)
