import json
import re

import pytest

from nanochat_ray.report.markdown import write_report
from nanochat_ray.report.plots import draw_plots
from nanochat_ray.report.records import StageRecord, read_result, write_result
from nanochat_ray.run_dir import CONFIG_FILE, RESULT_FILE
from tests.report.made_up import ENVIRONMENT, make_run

MADE_AT = "2026-11-20 12:00:00"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def report(run):
    return write_report(run, ENVIRONMENT, 24.0, MADE_AT).read_text()


def section(report: str, title: str) -> str:
    return report.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a section's tables by their first column."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_every_stage_appears_in_order_and_an_unknown_one_last(report):
    titles = re.findall(r"^## (.*)$", report, re.M)
    stages = ["tokenizer", "pretrain", "base_eval", "sft", "chat_eval", "distil"]
    assert titles == ["Summary", "Time", "Training", "Left out", "Machine", *stages]
    assert "notes" not in report


def test_the_summary_has_a_column_per_model_and_a_dash_where_nothing_is(report):
    summary = rows(section(report, "Summary"))
    assert summary[""] == ["BASE", "SFT"]
    assert summary == {
        "": ["BASE", "SFT"], "---": ["---:", "---:"],
        "val bpb, text": ["0.8274", "-"], "val bpb, answers": ["-", "0.3121"], "CORE": ["-", "-"],
        "GSM8K": ["-", "3.1 %"], "HumanEval": ["-", "-"], "ARC-Easy": ["-", "-"], "ChatCORE": ["-", "-"],
        "held-out questions": ["-", "93.0 %"], "held-out: capitals": ["-", "98.0 %"],
        "held-out: word problems": ["-", "61.0 %"],
    }
    assert list(summary)[2:5] == ["val bpb, text", "val bpb, answers", "CORE"]


def test_times_add_up_and_cost_what_they_should(report):
    times = rows(section(report, "Time"))
    assert times["pretrain"] == ["done", "2026-11-20 10:00:05", "1 min 04 s", "1.68 GiB", "$0.42"]
    assert times["sft"][0] == "unfinished"
    seconds = 4.25 + 63.5 + 12 + 151 + 4000 + 1
    assert times["**total**"][-1] == f"**${24 * seconds / 3600:.2f}**" and times["**total**"][2] == "**1 h 10 min**"


def test_the_training_stages_say_how_they_went(report):
    training = rows(section(report, "Training"))
    assert training[""] == ["pretrain", "sft"]
    assert training["steps"] == ["400", "120"] and training["starts"] == ["1", "1"]
    assert training["waiting for data"] == ["0.50%", "0.50%"]
    assert training["waiting for checkpoints"] == [f"{1 / 390:.2%}", f"{1 / 110:.2%}"]
    assert training["tokens read but not trained on"] == ["3.10%", "3.10%"]
    assert float(training["gradient norm, largest"][0]) == pytest.approx(9, abs=0.01)


def test_what_a_watching_job_found_stands_with_its_stage(report):
    text = section(report, "pretrain")
    assert rows(text)["200"] == ["0.0050", "0.1250"] and "| step | val/bpb | CORE20 |" in text
    assert "evaluated beside" not in section(report, "sft")


def test_what_was_left_out_has_its_reason(report):
    assert "- chat_eval: **HumanEval**: needs a sandbox" in section(report, "Left out")


def test_plots_lie_beside_the_report_where_there_was_something_to_draw(run, report):
    for stage in ("pretrain", "sft"):
        names = re.findall(r'<img src="([^"]+)"', section(report, stage))
        core = ["core"] if stage == "pretrain" else []  # only the watching job has evaluated it
        drawn = ["loss", "bpb", *core, "lr", "grad_norm", "throughput", "waits"]
        assert names == [f"{stage}_{name}.png" for name in drawn]
        assert all((run / "report" / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    assert "<img" not in section(report, "base_eval")


def test_texts_of_the_model_cannot_break_the_page(report):
    samples = section(report, "base_eval")
    assert samples.count("````") == 2 and "> (no prompt)\n<b>bold|</b>\n````" in samples
    assert "no data \\| &lt;none>" in section(report, "Left out")
    assert rows(section(report, "tokenizer"))["news \\| web"] == ["404", "375", "1.0773"]


def test_settings_are_folded_and_can_be_read_back(report):
    import yaml

    block = re.search(r"<summary>Settings</summary>\n\n```yaml\n(.*?)```", section(report, "pretrain"), re.S)
    assert block and yaml.safe_load(block[1])["pretrain"] == {"depth": 4, "matrix_lr": 0.02, "seed": 42}


def test_the_machine_is_described(report):
    machine = rows(section(report, "Machine"))
    assert machine["code"] == ["commit abc1234, branch main, with uncommitted changes"]
    assert machine["GPU"] == ["8x NVIDIA H100 80GB HBM3, 640.00 GiB together, CUDA 12.8"]


def test_a_second_report_replaces_the_first_and_is_the_same(tmp_path):
    run = make_run(tmp_path)
    for log in run.glob("*/*.jsonl"):
        log.unlink()  # drawing takes long and is tested above
    first = write_report(run, ENVIRONMENT, None, MADE_AT).read_text()
    assert write_report(run, ENVIRONMENT, None, MADE_AT).read_text() == first
    assert "cost" not in first
    write_result(run / "rl", StageRecord("rl", "2026-11-20T11:00:00+0000", 1, {"chatcore/GSM8K": 0.5}))
    second = write_report(run, ENVIRONMENT, None, MADE_AT).read_text()
    assert rows(section(second, "Summary"))["GSM8K"] == ["-", "3.1 %", "50.0 %"]
    assert not [path for path in (run / "report").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("stage", "source"), [("chat_eval", {"source": "base"}), ("chat_eval_base", {})])
def test_a_chat_evaluation_of_the_base_model_stands_under_base(tmp_path, stage, source):
    write_result(tmp_path / "r" / stage, StageRecord(stage, "2026", 1, {**source, "heldout/overall": 0.125}))
    report = write_report(tmp_path / "r", ENVIRONMENT).read_text()
    assert rows(section(report, "Summary"))["held-out questions"] == ["12.5 %", "-"]


def test_a_mean_over_fewer_tasks_is_called_so(tmp_path):
    metrics = {"core_metric": 0.25, "core_metric_name": "CORE20"}
    write_result(tmp_path / "r" / "base_eval", StageRecord("base_eval", "2026", 1, metrics))
    summary = rows(section(write_report(tmp_path / "r", ENVIRONMENT).read_text(), "Summary"))
    assert summary["CORE20"] == ["0.2500", "-"] and "CORE" not in summary


def test_the_order_of_stages(tmp_path):
    wanted = ["tokenizer", "tokenizer_eval", "pretrain", "chat_eval", "chat_eval_base", "rl", "b_first", "a_second"]
    for stage in sorted(wanted):
        started_at = {"b_first": "2026-01-01", "a_second": "2026-01-02"}.get(stage, "2027")
        write_result(tmp_path / "r" / stage, StageRecord(stage, started_at, 1))
    report = write_report(tmp_path / "r", ENVIRONMENT).read_text()
    assert re.findall(r"^## (.*)$", report, re.M)[3:] == wanted


def test_stages_without_a_readable_record_still_appear(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / CONFIG_FILE).write_text("{}")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / RESULT_FILE).write_text("{")
    report = write_report(tmp_path).read_text()  # of this machine
    assert "Python" in section(report, "Machine")
    assert "No record yet" in section(report, "pretrain") and "cannot be read" in section(report, "sft")


def test_a_folder_without_a_run_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="holds no stage"):
            write_report(folder)


def test_nothing_finite_is_nothing_to_draw(tmp_path):
    records = [{"step": 0, "train/loss": None}, {"train/loss": 1.0}, {"step": 1, "val/bpb": None}, {"step": 2, "x": 1}]
    assert draw_plots(records, tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert [path.name for path in draw_plots([{"step": 0, "val/bpb": 2.0}], tmp_path, "a_")] == ["a_bpb.png"]


def test_the_made_up_records_are_strict_json(run):
    for path in run.glob("*/*.json*"):
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_result(run / "tokenizer").metrics["std"] is None
