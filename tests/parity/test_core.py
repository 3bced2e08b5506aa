"""CORE: prompts, tokens, spans, losses and choices of single items and of whole tasks."""

from __future__ import annotations

import base64
import dataclasses

import pytest

from nanochat_ray.metrics.core import (
    CoreRecord,
    common_length,
    core_metric,
    crop,
    evaluate_task,
    merge,
    prepare,
    record_of,
    score,
)
from nanochat_ray.metrics.core_bundle import ITEM_SEED, CoreTask, few_shots, load_bundle, load_items, render_prompts
from nanochat_ray.text.tokenizer import Tokenizer
from tests.parity.goldens import config_of, load_json, model_from_golden
from tests.real_data import needs_real_data, real_data

GOLDEN = load_json("core")
KINDS = {"mc": "multiple_choice", "schema": "schema", "lm": "language_modeling"}
NO_LIMIT = 10**9


@pytest.fixture(scope="module")
def model():
    assert GOLDEN["config"].items() <= config_of("d").model_dump().items()
    return model_from_golden("d").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_tokens([base64.b64decode(token) for token in load_json("tokenizer_2048")["tokens_b64"]])


@pytest.fixture(scope="module")
def tasks():
    return {task.label: task for task in load_bundle(real_data() / "eval_bundle").tasks}


def task_of(tasks: dict[str, CoreTask], case: dict) -> CoreTask:
    task = tasks[case["task"]]
    return dataclasses.replace(task, num_fewshot=case["num_fewshot"]) if "num_fewshot" in case else task


def check_scores(record, case):
    assert record.correct == case["correct"]
    if "mean_losses" in case:
        assert record.chosen == case["chosen"]
        assert record.losses == pytest.approx(case["mean_losses"], abs=1e-4)
    else:
        assert list(record.predicted) == case["predicted"]


@pytest.mark.parametrize("case", GOLDEN["rendering"], ids=lambda case: case["prompts"][0][:30])
def test_rendering(case):
    prompts = render_prompts(KINDS[case["kind"]], case["item"], case["fewshot"] or [], case["delimiter"])
    assert prompts == case["prompts"]


@pytest.mark.parametrize("case", GOLDEN["common_length"], ids=lambda case: str(case["sequences"]))
def test_common_length(case):
    assert common_length(case["sequences"]) == case["left"]
    assert common_length(case["sequences"], from_end=True) == case["right"]


@needs_real_data
@pytest.mark.parametrize("case", GOLDEN["examples"], ids=lambda case: f"{case['task']}-{case['index']}")
def test_examples(model, tokenizer, tasks, case):
    task = task_of(tasks, case)
    assert (task.type, task.delimiter) == (case["type"], case["delimiter"])
    items = load_items(task)[: case["first_n"]]
    item, shots = items[case["index"]], few_shots(len(items), case["index"], task.num_fewshot)
    assert case["item"].items() <= item.items()
    assert render_prompts(task.type, item, [items[k] for k in shots], task.delimiter) == case["prompts"]
    scored = prepare(tokenizer, task, items, case["index"], NO_LIMIT)
    assert (scored.rows, scored.starts, scored.ends) == (case["tokens"], case["start"], case["end"])
    assert scored.notes == ()
    if "wanted" in case:
        assert scored.rows[0][scored.starts[0] : scored.ends[0]] == case["wanted"]
    check_scores(record_of(task, case["index"], item, scored, score(model, [scored])[0]), case)


@needs_real_data
@pytest.mark.parametrize("case", GOLDEN["cropped"], ids=lambda case: f"{case['task']}-{case['index']}")
def test_cropped(model, tokenizer, tasks, case):
    task = task_of(tasks, case)
    items = load_items(task)[: case["first_n"]]
    whole = prepare(tokenizer, task, items, case["index"], NO_LIMIT)
    assert [len(row) for row in whole.rows] == case["full_lengths"]
    scored = crop(whole, case["max_seq_len"])
    assert scored.rows == case["model_input"]
    assert scored.notes == ("cropped",)
    check_scores(record_of(task, case["index"], items[case["index"]], scored, score(model, [scored])[0]), case)


@needs_real_data
@pytest.mark.parametrize("label", GOLDEN["per_item"])
def test_whole_tasks(model, tokenizer, tasks, label):
    case, n = GOLDEN["per_item"][label], GOLDEN["max_per_task"]
    task = tasks[label]
    items = load_items(task)[:n]
    prepared = [prepare(tokenizer, task, items, index, NO_LIMIT) for index in range(n)]
    assert [[len(row) for row in scored.rows] for scored in prepared] == case["lengths"]
    assert [scored.starts for scored in prepared] == case["start"]
    records = evaluate_task(model, tokenizer, task, n)
    assert [int(record.correct) for record in records] == case["correct"]
    assert [record.chosen for record in records] == case["chosen"]
    result = merge(task, records)
    assert task.baseline_frac == pytest.approx(GOLDEN["random_baselines_percent"][label] / 100)
    assert result.accuracy == pytest.approx(GOLDEN["results"]["results"][label], abs=1e-6)
    assert result.centred == pytest.approx(GOLDEN["results"]["centered_results"][label], abs=1e-6)


@needs_real_data
def test_core_metric(tasks):
    assert GOLDEN["shuffle_seed"] == ITEM_SEED
    results = []
    for label, per_item in GOLDEN["per_item"].items():
        correct = enumerate(per_item["correct"])
        records = [CoreRecord(label, index, bool(right), chosen=None, losses=()) for index, right in correct]
        results.append(merge(tasks[label], records))
    assert core_metric(results).value == pytest.approx(GOLDEN["results"]["core_metric"], abs=1e-6)
