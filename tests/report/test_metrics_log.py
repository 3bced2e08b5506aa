import json
import math

import pytest

from nanochat_ray.report import metrics_log
from nanochat_ray.report.metrics_log import LineReader, MetricsLog, read_metrics, read_watch


def train(step: int, **more: float) -> dict:
    return {"step": step, "train/loss": 1.0, **more}


def write(path, *records):
    log = MetricsLog(path)
    for record in records:
        log.append(record)
    log.close()


def test_lines_are_strict_json_and_there_at_once(tmp_path):
    path = tmp_path / "stage" / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 0, "train/loss": math.nan, "x": math.inf})
    line = path.read_text()
    assert line.endswith("\n")
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values == {"step": 0, "train/loss": None, "x": None}
    log.close()


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_costs_only_itself(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, train(0), train(1))
    path.write_bytes(path.read_bytes()[:-cut])
    survivors = [train(0)] + ([train(1)] if cut == 1 else [])  # without its newline a line is still whole
    assert read_metrics(path) == survivors
    write(path, train(2))
    assert read_metrics(path) == [*survivors, train(2)]


def test_a_resume_takes_back_what_came_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bpb, core = {"step": 0, "val/bpb": 3}, {"step": 2, "core_metric": 0.1}
    write(path, bpb, train(0), train(1), train(2), core, train(3, old=1))
    write(path, train(2, new=1))
    assert read_metrics(path) == [bpb, train(0), train(1), train(2, new=1)]
    write(path, train(3, new=1), {"step": 3, "core_metric": 0.2})
    assert [r["step"] for r in read_metrics(path)] == [0, 0, 1, 2, 3, 3]


def test_the_evaluation_at_the_resume_step_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 0, "val/bpb": 3}, train(0), {"step": 4, "val/bpb": 2}, train(4), train(5))
    write(path, {"step": 4, "val/bpb": 1}, train(4, new=1))
    assert read_metrics(path) == [{"step": 0, "val/bpb": 3}, train(0), {"step": 4, "val/bpb": 1}, train(4, new=1)]


def test_a_series_that_arrives_late_takes_nothing_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [train(step) for step in range(5)] + [{"step": 2, "core_metric": 0.1}, train(5)]
    write(path, *records)
    assert read_metrics(path) == records


def test_two_restarts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first in (0, 4, 2):
        write(path, *[train(step, start=first) for step in range(first, first + 6)])
    assert [(r["step"], r["start"]) for r in read_metrics(path)] == [(0, 0), (1, 0)] + [(s, 2) for s in range(2, 8)]


def test_other_json_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n\n3\n{"no": "step"}\n')
    assert read_metrics(path) == [{"no": "step"}]


@pytest.mark.parametrize("chunk_bytes", [1, 50, 2**20])
def test_a_reader_has_each_whole_line_once_whatever_its_chunks(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(metrics_log, "CHUNK_BYTES", chunk_bytes)
    path, found = tmp_path / "metrics.jsonl", []
    assert LineReader(path).read() == []
    write(path, *[train(step) for step in range(20)])
    whole = path.read_bytes()
    reader = LineReader(path)
    for cut in (30, 31, 200, len(whole) - 1, len(whole)):  # as a writer that is slow
        path.write_bytes(whole[:cut])
        while news := reader.read():
            found += news
    assert found == [train(step) for step in range(20)]
    assert LineReader(path, reader.position).read() == []  # which can be stored
    write(path, train(20))
    assert LineReader(path, reader.position).read() == [train(20)]
    path.write_text("")
    write(path, train(3))
    assert reader.read() == [train(3)]  # the file was made anew


def test_of_two_evaluations_of_a_step_the_later_counts(tmp_path):
    path = tmp_path / "watch.jsonl"
    assert read_watch(path) == []
    write(path, {"step": 4, "a": 1}, {"step": 2, "a": 1}, {"step": 4, "a": 2}, {"no": "step"})
    assert read_watch(path) == [{"step": 2, "a": 1}, {"step": 4, "a": 2}]
