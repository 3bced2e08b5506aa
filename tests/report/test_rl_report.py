"""What the report says of reinforcement learning."""

from __future__ import annotations

import io
import re

import pytest

from nanochat_ray.report.markdown import write_report
from nanochat_ray.report.plots import draw_plots
from nanochat_ray.report.progress import Progress
from nanochat_ray.report.records import StageRecord, read_result, write_result
from nanochat_ray.report.rl import SAMPLES_FILES, rl_parts
from nanochat_ray.run_dir import RESULT_FILE, RunDir
from tests.report.made_up import ENVIRONMENT, make_rl, make_run, rl_evaluation
from tests.report.test_markdown import rows, section


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_rl(make_run(tmp_path_factory.mktemp("storage")))
    for log in [*run.glob("pretrain/*.jsonl"), *run.glob("sft/*.jsonl")]:
        log.unlink()  # their plots are drawn elsewhere
    return run


@pytest.fixture(scope="module")
def report(run):
    return write_report(run, ENVIRONMENT, None, "now").read_text()


def part(report: str, title: str) -> str:
    return section(report, "rl").split(f"### {title}\n")[1].split("\n### ")[0]


def test_rl_comes_after_sft_and_its_chat_evaluation_after_it(report):
    titles = re.findall(r"^## (.*)$", report, re.M)
    assert titles[-6:] == ["base_eval", "sft", "chat_eval", "rl", "chat_eval_rl", "distil"]


def test_the_summary_compares_base_sft_and_rl(report):
    summary = rows(section(report, "Summary"))
    assert summary[""] == ["BASE", "SFT", "RL"]
    assert summary["pass@1, greedy"] == ["-", "60.0 %", "90.0 %"]
    assert summary["pass@1, sampled"] == ["-", "40.0 %", "70.0 %"]
    assert summary["mean reward"] == ["-", "0.4000", "0.7000"]
    assert summary["held-out questions"] == ["-", "93.0 %", "96.0 %"] and summary["GSM8K"] == ["-", "3.1 %", "5.0 %"]
    order = list(summary)
    assert order.index("ChatCORE") < order.index("pass@1, sampled") < order.index("held-out questions")
    assert "prompts that RL evaluates on and never trains on" in section(report, "Summary")


def test_before_and_after_stand_in_one_table(report):
    table = rows(part(report, "Before and after"))
    assert table[""] == ["before", "after", "change"]
    assert table["unbiased_pass@2"] == ["52.0 %", "82.0 %", "+30.0 %"]
    assert table["length_mean"] == ["60.5000", "48.5000", "-12.0000"]
    assert "before/" not in report and rows(section(report, "rl").split("###")[0])["num_iterations"] == ["60"]


def test_where_the_time_of_a_step_went(report):
    times = rows(part(report, "Time of a step"))
    assert times["generate"] == ["1.000 s", "50.0%"] and times["whole step"] == ["2.000 s", "100.0%"]
    assert times["publish the weights"] == ["0.100 s", "5.0%"] and len(times) == 8


def test_what_became_of_the_rollouts(report):
    assert {name: value for name, [value] in rows(part(report, "Rollouts")).items() if name not in ("", "---")} == {
        "steps": "60", "policy lag, largest": "1", "groups in which all rewards are equal": "25.0%",
        "rollouts without a reward, left out": "2", "prompts set aside": "1",
    }
    assert rows(part(report, "Not learned from"))["world/train/17"] == ["failed 3 times: &lt;killed>"]
    training = rows(section(report, "Training"))
    column = training[""].index("rl")
    assert training["starts"][column] == "2" and training["steps done again after a restart"][column] == "5"


def test_the_same_prompts_stand_side_by_side(report):
    text = part(report, "Samples before and after")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| prompt | before | reward | after | reward |" and len(lines) == 4
    cells = [[each.strip() for each in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == ["What is 6 times 7?", "Is &#91;6&#42;7 = 42]42.", "0.0000", "(nothing)", "1.0000"]
    assert [cells[3][2], cells[3][4]] == ["-", "1.0000"] and len(cells[3][3]) < 560 and cells[3][3].endswith("...")
    assert cells[3][1].endswith("&#42;z&#42;<br>#### 7") and cells[3][3].startswith("&#91;6&#42;]y")
    assert not re.search(r"<(?!br>)|!\[", text)


def test_the_curves_are_drawn(run, report):
    names = re.findall(r'<img src="rl_([^"]+).png"', section(report, "rl"))
    assert names == ["loss", "reward", "length", "pass", "lr", "grad_norm", "throughput", "waits"]
    assert (run / "report" / "rl_pass.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stage_of_another_kind_has_none_of_this(report, run):
    for stage in ("pretrain", "sft", "chat_eval"):
        assert "Rollouts" not in section(report, stage) and "before" not in section(report, stage)
        assert rl_parts(run / stage, read_result(run / stage), []) == []


def test_an_unfinished_stage_shows_what_there_is(tmp_path):
    run = make_rl(tmp_path / "r")
    for name in (RESULT_FILE, SAMPLES_FILES["after"]):
        (run / "rl" / name).unlink()
    report = write_report(run, ENVIRONMENT).read_text()
    assert "No record yet" in section(report, "rl") and "Time of a step" in report
    assert "Before and after" not in report and "| - | - |" in part(report, "Samples before and after")


NO_NUMBER = '[{"id": 1, "prompt": "", "completion": "", "reward": "?"}]'


@pytest.mark.parametrize("text", ["[", '{"a": 1}', "7", '[{"id": 1}]', '["x"]', NO_NUMBER])
def test_samples_that_cannot_be_read_do_not_cost_the_report(tmp_path, text):
    (tmp_path / SAMPLES_FILES["before"]).write_text(text)
    [part] = rl_parts(tmp_path, None, [])
    assert "The samples cannot be read" in part


def test_few_steps_are_all_warm_enough():
    records = [{"step": 0, "train/loss": 0.0, "train/dt": 2.0, "rollout/reward_mean": 0.5, "rollout/generate_s": 1.0}]
    write = rl_parts(RunDir.of("/nowhere", "r").root, None, records)
    assert "| generate | 1.000 s | 50.0% |" in write[1] and "| policy lag, largest | - |" in write[0]


def test_of_both_kinds_of_records_one_plot_is_made(tmp_path):
    records = [{"step": 0, "eval/reward_mean": 0.1}, {"step": 0, "train/loss": 0.0, "rollout/reward_mean": 0.2}]
    assert [path.stem for path in draw_plots(records, tmp_path)] == ["loss", "reward"]


def test_progress_names_the_reward_and_the_evaluations():
    stream = io.StringIO()
    with Progress(10, "rl", stream=stream) as progress:
        progress.update(0, rl_evaluation(0))
        rollouts = {"rollout/reward_mean": 0.25, "rollout/length_mean": 61.5, "rollout/policy_lag": 0}
        progress.update(0, {"train/loss": 0.1, "train/dt": 2.0, "rollout/wait_s": 1.0, **rollouts})
    lines = stream.getvalue().splitlines()
    assert "step 00000 | pass@1, sampled: 0.4000" in lines and "step 00000 | pass@1, greedy: 0.6000" in lines
    assert "reward: 0.2500 | length: 61.5 | lag: 0 | loss: 0.100000" in lines[-1] and "rollout wait: 50.0%" in lines[-1]


def test_nothing_before_and_numbers_that_are_none(tmp_path):
    record = StageRecord("rl", "2026", 1, {"after/greedy": 0.5, "before/reward_mean": None, "after/reward_mean": 1})
    write_result(tmp_path / "r" / "rl", record)
    table = rows(part(write_report(tmp_path / "r", ENVIRONMENT).read_text(), "Before and after"))
    assert table["greedy"] == ["-", "50.0 %", "-"] and table["reward_mean"] == ["-", "1", "-"]


def test_of_much_that_was_left_out_the_first_are_named(tmp_path):
    failed = [{f"p{k} sample {j}": "KeyError: 'x|y'" for j in (0, 1)} for k in range(15)]
    records = [{"step": k, "train/loss": 0.0, "rollout/left_out": each} for k, each in enumerate(failed)]
    [text] = rl_parts(tmp_path, None, records)
    assert rows(text)["p9 sample 1"] == ["KeyError: 'x\\|y'"]
    assert len(rows(text)) == 22 and text.endswith("And 10 more.")
