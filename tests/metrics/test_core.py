"""CORE: the scores of a batch are those of whole rows, one at a time, and shards add up."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.corpus.download import OFFLINE_VARIABLE
from nanochat_ray.metrics import core_bundle
from nanochat_ray.metrics.core import (
    CORE_LABELS,
    CoreResult,
    Scored,
    core_metric,
    crop,
    evaluate_task,
    merge,
    prepare,
    score,
    share_beginnings,
    span,
)
from nanochat_ray.metrics.core_bundle import CoreTask, few_shots, find_bundle, load_bundle, load_items
from nanochat_ray.tasks.rows import TaskDataMissing
from tests.engine.tiny import byte_tokenizer, tiny_model
from tests.metrics.bundle import entry, items_of, three_kinds, write_bundle
from tests.tasks.conftest import Hub, serve

LABELS = ["mc", "schema", "lm"]


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    bundle = load_bundle(three_kinds(tmp_path_factory.mktemp("core") / "bundle"))
    return {task.label: task for task in bundle.tasks}


def alone(model, scored: Scored) -> list[tuple[float, list[int]]]:
    """Mean loss and likeliest tokens of each row's span, by one forward pass over the whole row."""
    found = []
    for row, start, end in zip(scored.rows, scored.starts, scored.ends, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([row]))[0, start - 1 : end - 1]  # (span, V)
        found.append((F.cross_entropy(logits, torch.tensor(row[start:end])).item(), logits.argmax(-1).tolist()))
    return found


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("max_rows", "max_tokens"), [(64, 64 * 512), (1, 10**6), (5, 900), (64, 1)])
def test_batches_score_like_whole_rows_alone(model, tokenizer, tasks, label, max_rows, max_tokens):
    items = load_items(tasks[label])
    prepared = [prepare(tokenizer, tasks[label], items, index, 10**6) for index in range(len(items))]
    for scored, found in zip(prepared, score(model, prepared, max_rows, max_tokens), strict=True):
        wanted = alone(model, scored)
        assert [row.loss for row in found] == pytest.approx([loss for loss, _ in wanted], abs=1e-9)
        assert [list(row.predicted) for row in found] == [tokens for _, tokens in wanted]


@pytest.mark.parametrize("label", LABELS)
def test_shards_add_up(model, tokenizer, tasks, label):
    task = tasks[label]
    whole = evaluate_task(model, tokenizer, task, 7)
    assert [record.index for record in whole] == list(range(7))
    parts = [record for rank in (2, 0, 1) for record in evaluate_task(model, tokenizer, task, 7, range(rank, 7, 3))]
    by_index = {record.index: record for record in parts}
    for record in whole:
        other = by_index[record.index]
        assert (record.correct, record.chosen, record.predicted) == (other.correct, other.chosen, other.predicted)
        assert record.losses == pytest.approx(other.losses, abs=1e-9)
    merged, single = merge(task, parts), merge(task, whole)
    assert (merged.accuracy, merged.n_items, merged.n_items_of_task) == (single.accuracy, 7, 9)
    assert single.accuracy == fmean(record.correct for record in whole)
    assert single.centred == pytest.approx((single.accuracy - 0.2) / 0.8)


def test_merging_wants_each_item_once(model, tokenizer, tasks):
    records = evaluate_task(model, tokenizer, tasks["lm"], 3)
    for wrong in ([], records[1:], [*records, records[0]]):
        with pytest.raises(ValueError, match="each once"):
            merge(tasks["lm"], wrong)


def test_options_share_their_beginning():
    scored = span("multiple_choice", [[0, 1, 2, 3, 7], [0, 1, 2, 4], [0, 1, 2, 5], [0, 1, 2, 3, 7]])
    groups, places = share_beginnings([scored])
    (group,) = groups
    assert group.stem == [0, 1]
    assert group.tails == [[2, 3], [2]]  # the last token of a row is only a target
    assert [place.tail for place in places] == [0, 1, 1, 0]
    assert [place.targets for place in places] == [[3, 7], [4], [5], [3, 7]]


def test_equal_choices_tie_and_the_first_is_chosen(model, tokenizer, tmp_path):
    items = [{"query": f"q{k}", "choices": ["same", "same", "same"], "gold": 0} for k in range(8)]
    bundle = load_bundle(write_bundle(tmp_path / "b", {"t": (entry("t", "multiple_choice", 3), items, 0)}))
    records = evaluate_task(model, tokenizer, bundle.tasks[0])
    assert all(record.correct and record.losses[0] == record.losses[1] == record.losses[2] for record in records)
    assert merge(bundle.tasks[0], records).notes == {"empty": 8}


def test_spans():
    assert span("multiple_choice", [[0, 1, 2], [0, 1, 3, 4]]) == Scored([[0, 1, 2], [0, 1, 3, 4]], [2, 2], [3, 4])
    assert span("schema", [[0, 5, 2, 3], [0, 2, 3]]) == Scored([[0, 5, 2, 3], [0, 2, 3]], [2, 1], [4, 3])
    assert span("language_modeling", [[0, 1], [0, 1, 2, 3]]) == Scored([[0, 1, 2, 3]], [2], [4])


def test_odd_spans():
    # One choice begins the other: all spans begin one token earlier.
    assert span("multiple_choice", [[0, 1, 2], [0, 1, 2, 3]]) == Scored(
        [[0, 1, 2], [0, 1, 2, 3]], [2, 2], [3, 4], ("empty",)
    )
    # The answer changes how the question is tokenised: what is common is the beginning.
    assert span("language_modeling", [[0, 1, 2], [0, 1, 7, 8]]) == Scored([[0, 1, 7, 8]], [2], [4], ("prefix",))
    assert span("language_modeling", [[0, 1], [0, 1]]) == Scored([[0, 1]], [1], [2], ("empty",))
    # What is common at the end is the whole row; its first token cannot be predicted.
    assert span("schema", [[0, 1], [0, 1]]).starts == [1, 1]


def test_crop():
    scored = Scored([[0, 1, 2, 3, 4], [0, 1]], [3, 1], [5, 2])
    assert crop(scored, 5) is scored
    assert crop(scored, 3) == Scored([[2, 3, 4], [0, 1]], [1, 1], [3, 2], ("cropped",))
    assert crop(scored, 2) == Scored([[3, 4], [0, 1]], [1, 1], [2, 2], ("cropped", "span_cropped"))


def test_long_prompts_are_cropped_to_what_the_model_can_place(model, tokenizer, tmp_path):
    limit = model.config.rope_table_factor * model.config.sequence_len
    items = [{"query": query, "choices": ["a", "b"], "gold": 0} for query in ("x" * (limit + 50), "y")]
    bundle = load_bundle(write_bundle(tmp_path / "b", {"t": (entry("t", "multiple_choice", 0), items, 0)}))
    result = merge(bundle.tasks[0], evaluate_task(model, tokenizer, bundle.tasks[0]))
    assert result.notes == {"cropped": 1}


# --- items and shots


def test_item_order(tmp_path):
    items = [{"context": str(k), "continuation": "x"} for k in range(10)]
    bundle = load_bundle(write_bundle(tmp_path / "b", {"t": (entry("t", "language_modeling"), items, 0)}))
    assert [item["context"] for item in load_items(bundle.tasks[0])] == list("0372164589")


def test_shots():
    assert few_shots(20, 0, 3) == [15, 4, 1]
    assert few_shots(20, 7, 3) == [16, 6, 10]
    for n in (2, 5, 40):
        for index in range(n):
            others = [k for k in range(n) if k != index]
            wanted = random.Random(1234 + index).sample(others, min(3, n - 1))
            assert few_shots(n, index, 3) == wanted
    assert few_shots(1, 0, 3) == []


def test_fewer_shots_than_asked_are_noted(model, tokenizer, tasks):
    assert merge(tasks["mc"], evaluate_task(model, tokenizer, tasks["mc"], 2)).notes == {"few_shots": 2}


# --- the bundle


def test_a_task_without_its_file_is_skipped_by_name(tmp_path):
    kinds = {"here": items_of("schema", 3), "gone": None}
    entries = {label: (entry(label, "schema"), items, 50) for label, items in kinds.items()}
    folder = write_bundle(tmp_path / "b", entries)
    bundle = load_bundle(folder)
    assert [task.label for task in bundle.tasks] == ["here"]
    assert list(bundle.skipped) == ["gone"] and "gone.jsonl" in bundle.skipped["gone"]
    assert bundle.tasks[0].baseline_frac == 0.5
    assert (bundle.tasks[0].delimiter, bundle.tasks[0].num_fewshot) == (" ", 2)
    (folder / "eval_data/made/here.jsonl").write_text("")
    assert load_bundle(folder).sha256 != bundle.sha256


def test_bad_bundles(tmp_path):
    with pytest.raises(TaskDataMissing, match="no CORE bundle"):
        load_bundle(tmp_path)
    with pytest.raises(ValueError, match="unknown type 'poem'"):
        load_bundle(write_bundle(tmp_path / "a", {"t": (entry("t", "poem"), [], 0)}))
    folder = write_bundle(tmp_path / "b", {"t": (entry("t", "schema"), [{"continuation": "x"}], 0)})
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1.*context_options"):
        load_items(load_bundle(folder).tasks[0])
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nother,1\n")
    with pytest.raises(ValueError, match="no random baseline for task t"):
        load_bundle(folder)


def test_finding_the_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    with pytest.raises(TaskDataMissing, match=r"OFFLINE=1.*--eval-bundle"):
        find_bundle(None, tmp_path)
    with pytest.raises(TaskDataMissing, match=r"none.*no core\.yaml"):
        find_bundle(tmp_path / "none", tmp_path)
    named = three_kinds(tmp_path / "named")
    assert find_bundle(named, tmp_path) == named
    hub = Hub()
    server = serve(hub)
    hub.files["/eval_bundle.zip"] = zipped(three_kinds(tmp_path / "made" / "eval_bundle"))
    monkeypatch.setattr(core_bundle, "BUNDLE_URL", f"{hub.url}/eval_bundle.zip")
    monkeypatch.delenv(OFFLINE_VARIABLE)
    for _ in range(2):
        assert load_bundle(find_bundle(None, tmp_path)).sha256 == load_bundle(named).sha256
    server.shutdown()
    server.server_close()
    assert len(hub.asked) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"named", "made", "eval_bundle", ".eval_bundle.lock"}


def zipped(folder: Path) -> bytes:
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name)).read_bytes()


# --- the score's name


def results(labels, n=10, of=10) -> list[CoreResult]:
    return [CoreResult(label, n, of, 0.5, 0.01 * k, 0.25) for k, label in enumerate(labels)]


def test_the_name_core_needs_everything():
    complete = core_metric(results(CORE_LABELS))
    assert complete.name == "CORE"
    assert complete.value == pytest.approx(fmean(0.01 * k for k in range(22)))
    assert core_metric(results(CORE_LABELS, n=5)).name == "CORE over 22 of 22 tasks, at most 5 items each"
    assert core_metric(results(CORE_LABELS[:12])).name == "CORE over 12 of 22 tasks"
    assert core_metric(results(("other", *CORE_LABELS[1:]))).name == "CORE over 22 of 22 tasks"
    with pytest.raises(ValueError):
        core_metric([])


def test_labels():
    assert len(set(CORE_LABELS)) == 22
    assert isinstance(hash(CoreTask("a", "schema", 0, " ", Path("x"), 0.0)), int)  # a key of the items' cache
