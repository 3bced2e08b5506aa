"""base_eval on models of Transformers: a small GPT-2 against plain torch, and an exported run against itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.corpus.reader import scan_data
from nanochat_ray.metrics.core import prepare
from nanochat_ray.metrics.core_bundle import load_bundle, load_items
from nanochat_ray.report.records import StageRecord, read_result
from nanochat_ray.run_dir import DATA_FILE, DONE_FILE, Lease, RunDir, write_json
from nanochat_ray.stages.evaluation import BpbUnit, CoreUnit
from nanochat_ray.text.packing import reference_rows
from tests.conftest import sentences
from tests.jobs.running import run as run_job
from tests.metrics.bundle import three_kinds
from tests.stages.tiny import Recorder, make_run, run_pretrain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hf")]
T = 48


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Shards of documents with characters that become several tokens."""
    folder = tmp_path_factory.mktemp("texts")
    documents = [f"{text} 你好, naïve 🌍{k} <|endoftext|>" for k, text in enumerate(sentences(192))]
    for k in range(2):
        rows = pa.table({"text": documents[k * 96 : (k + 1) * 96]})
        pq.write_table(rows, folder / f"shard_{k:05d}.parquet", row_group_size=32)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 of two layers with a byte-level vocabulary of English, so that other characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator(sentences(200), trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=fast.get_vocab_size(), n_positions=T, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return three_kinds(tmp_path_factory.mktemp("core") / "bundle", 5)


def evaluate(storage: Path, model: Path, parts: str = "bpb,core", trust: bool = False, **more: Any) -> StageRecord:
    from _hf_eval import Asked
    from _hf_eval import evaluate as run

    settings = RunSettings(storage=str(storage), ray=False, device_type="cpu", dtype="float32", **more)
    return read_result(run(settings, BaseEvalSettings(eval=parts, split_tokens=20 * T), Asked(str(model), trust)))


def plain_losses(network: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Nats of each token but the first, one row at a time."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = network(torch.tensor([row[:-1]])).logits[0]
            found.append(F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
    return found


def test_bits_per_byte_of_gpt2_are_what_plain_torch_gives(tmp_path, gpt2, texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    record = evaluate(tmp_path, gpt2, "bpb", data=str(texts))
    network, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2), AutoTokenizer.from_pretrained(gpt2)
    bos, byte_of = tokenizer.eos_token_id, {c: byte for byte, c in bytes_to_unicode().items()}
    spelt = {k: bytes(byte_of[c] for c in token) for token, k in tokenizer.get_vocab().items() if k != bos}
    assert any(piece.decode(errors="replace") == "\ufffd" for piece in spelt.values())
    for split, shard in (("train", "shard_00000"), ("val", "shard_00001")):
        documents = pq.read_table(texts / f"{shard}.parquet")["text"].to_pylist()
        ids = [[bos, *tokenizer(text, split_special_tokens=True)["input_ids"]] for text in documents]
        assert [b"".join(spelt[k] for k in row[1:]).decode() for row in ids] == documents
        arrays = [[np.array(row, dtype=np.uint16) for row in ids[k : k + 32]] for k in range(0, 96, 32)]
        rows = [row.tolist() for row, _ in zip(reference_rows(arrays, T + 1, 1000), range(20), strict=False)]
        nats = n_bytes = 0.0
        for row, losses in zip(rows, plain_losses(network, rows), strict=True):
            for token, loss in zip(row[1:], losses.tolist(), strict=True):
                nats, n_bytes = nats + loss * (token != bos), n_bytes + len(spelt.get(token, b""))
        assert record.metrics[f"{split}/bpb"] == pytest.approx(nats / n_bytes / np.log(2), rel=1e-5)
    assert f"T={T}" in str(record.metrics["val/convention"])


def test_core_of_gpt2_is_what_plain_torch_gives(tmp_path, gpt2, bundle):
    """Every loss of every row, cropped to the positions that there are; and no text is needed for it."""
    from nanochat_ray.evals.hf import HFEvaluator, HFSpec
    from nanochat_ray.interchange.hf_model import find_source

    evaluator = HFEvaluator(HFSpec(find_source(str(gpt2)), "cpu", "float32", bundle))
    tokenizer: Any = evaluator.tokenizer
    cropped = 0
    for task in load_bundle(bundle).tasks:
        for record in evaluator.run(CoreUnit(task.label, tuple(range(5)), None)):
            scored = prepare(tokenizer, task, load_items(task), record.index, T)
            cropped += "cropped" in scored.notes
            for row, start, end, loss in zip(scored.rows, scored.starts, scored.ends, record.losses, strict=True):
                (losses,) = plain_losses(evaluator.model.network, [row])
                assert loss == pytest.approx(losses[start - 1 : end - 1].mean().item(), rel=1e-4)
    assert cropped
    record = evaluate(tmp_path, gpt2, "core", eval_bundle=str(bundle))
    assert "core_metric" in record.metrics and "val/bpb" not in record.metrics
    assert len(list((tmp_path / "hf").glob("tiny-gpt2-*/base_eval/core.csv"))) == 1


@pytest.fixture(scope="module")
def own_run(tmp_path_factory, shards) -> tuple[Path, Path]:
    """A storage with a pretrained run, and the folder that it was exported to."""
    from export_hf import export

    storage = tmp_path_factory.mktemp("storage")
    job, rows = make_run(storage / "d2", shards)
    run_pretrain(job, rows, Recorder(job.stage_folder))
    for stage in ("tokenizer", "pretrain"):
        (storage / "d2" / stage / DONE_FILE).write_text("{}")
    write_json(storage / "d2" / DATA_FILE, scan_data(str(shards)).to_json())
    with Lease.acquire(storage / "d2"):
        pass
    return storage, export(RunDir(storage / "d2"), "base", None, storage / "exported", None)


def test_an_exported_run_has_the_runs_own_numbers(own_run, bundle, tmp_path):
    import base_eval
    from _data import pin_data
    from _runtime import open_job

    storage, folder = own_run
    settings = RunSettings(storage=str(storage), model_tag="d2", ray=False, device_type="cpu", dtype="float32",
                           eval_bundle=str(bundle))  # fmt: skip
    with open_job(settings, "d2") as job:
        asked = BaseEvalSettings(eval="bpb,core", split_tokens=20 * T)
        base_eval.run(job, asked, pin_data(settings, job.run_dir, "cpu"))
    ours = read_result(storage / "d2" / "base_eval")
    theirs = evaluate(storage, folder, trust=True, model_tag="d2", eval_bundle=str(bundle))
    for split in ("train", "val"):
        assert theirs.metrics[f"{split}/bpb"] == pytest.approx(ours.metrics[f"{split}/bpb"], rel=1e-5)
        assert theirs.metrics[f"{split}/convention"] == ours.metrics[f"{split}/convention"]
    assert theirs.metrics["core_metric"] == ours.metrics["core_metric"]
    assert theirs.tables == ours.tables
    again = evaluate(storage, folder, trust=True, model_tag="d2", eval_bundle=str(bundle))
    assert again.started_at == theirs.started_at  # done before, skipped


def test_the_jobs_as_commands(own_run, tmp_path):
    """From another folder: an export, a second one over it, its evaluation; stages and steps that are not there."""
    from export_hf import export

    storage, _ = own_run
    (tmp_path / "run").mkdir()
    shutil.copytree(storage / "d2", tmp_path / "run" / "d2")
    code, out = run_job(tmp_path / "run", "export_hf.py", "--source", "base", "--to", "x/out", "--dtype", "bfloat16")
    folder = tmp_path / "run" / "x" / "out"
    assert code == 0 and str(folder) in out and (folder / "model.safetensors").exists(), out
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    code, out = run_job(tmp_path / "run", "export_hf.py", "--source", "base", "--to", str(folder))
    assert code == 1 and "is there already" in out and len(out.splitlines()) == 1, out
    for source, step, what in (("sft", None, "stage sft of"), ("base", 99, "no checkpoint of step 99")):
        with pytest.raises(FileNotFoundError, match=what):
            export(RunDir(tmp_path / "run" / "d2"), source, step, tmp_path / "y", None)
    code, out = run_job(tmp_path / "run", "base_eval.py", "--no-ray", "--eval", "bpb", "--hf-path", "x/out",
                        "--trust-remote-code", "-g", "d2", "--split-tokens", "64")  # fmt: skip
    assert code == 0 and len(list((tmp_path / "run" / "hf").glob(f"out-*/base_eval/{DONE_FILE}"))) == 1, out
    link, empty = tmp_path / "link", tmp_path / "empty"
    empty.mkdir()
    link.symlink_to(empty)
    code, out = run_job(tmp_path / "run", "export_hf.py", "--source", "base", "--to", str(link))
    assert code == 0 and (empty / "model.safetensors").exists() and link.is_symlink(), out


def test_on_actors_the_same(own_run, bundle, ray_cluster):
    from nanochat_ray.evals.hf import HFEvaluator, HFSpec
    from nanochat_ray.evals.pool import run_units
    from nanochat_ray.interchange.hf_model import find_source

    storage, folder = own_run
    manifest = scan_data(json.loads((storage / "d2" / DATA_FILE).read_text())["source"])
    spec = HFSpec(find_source(str(folder), True), "cpu", "float32", bundle, manifest, 32)
    units = [BpbUnit("val", 8, 0, 4), CoreUnit("mc", (0, 1), None), BpbUnit("val", 8, 4, 8)]
    evaluator = HFEvaluator(spec)
    assert run_units(spec, units, actors=2) == [evaluator.run(unit) for unit in units]


def test_what_cannot_be_loaded_is_one_line(own_run, gpt2, tmp_path):
    storage, folder = own_run
    cut, odd = tmp_path / "cut", tmp_path / "odd"
    for copy in (cut, odd):
        shutil.copytree(gpt2, copy)
    (cut / "model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes()[:1000])
    config = json.loads((gpt2 / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"n_head": 0}))
    broken = tmp_path / "no-weights"
    shutil.copytree(gpt2, broken)
    (broken / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    for model, more, what in (
        (folder, {}, "cannot be loaded: .*--trust-remote-code"),
        (broken, {}, "no-weights cannot be loaded: "),
        (cut, {"model_tag": "d2"}, "cut cannot be loaded: "),
        (odd, {"model_tag": "d2"}, "odd cannot be loaded: "),
        (tmp_path / "empty", {}, "no config.json"),
        ("some-one/model-not-here", {}, "not a local folder, and not had from the hub"),
        (tmp_path / "nowhere", {}, "not a local folder, and not had from the hub"),
        (gpt2, {"model_tag": "d9"}, "no run 'd9'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=what) as caught:
            evaluate(storage, model, "bpb", **more)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no samples here"):
        evaluate(storage, gpt2, "sample")


def test_models_of_one_name_and_other_settings_lie_apart(gpt2, bundle, texts, tmp_path):
    other = tmp_path / "other" / gpt2.name
    shutil.copytree(gpt2, other)
    (other / "generation_config.json").write_text("{}")
    evaluate(tmp_path, gpt2, "core", eval_bundle=str(bundle))
    evaluate(tmp_path, gpt2, "bpb", data=str(texts))
    evaluate(tmp_path, other, "bpb", data=str(texts))
    assert len(list((tmp_path / "hf").iterdir())) == 3


def test_a_tensor_without_a_place_is_an_error(gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    from nanochat_ray.interchange.hf_model import find_source, load

    odd = tmp_path / "odd"
    shutil.copytree(gpt2, odd)
    tensors = load_file(odd / "model.safetensors")
    save_file({**tensors, "transformer.extra": torch.zeros(1)}, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without a place: transformer\.extra"):
        load(find_source(str(odd)), "cpu", torch.float32)


def test_bytes_that_are_not_the_texts_are_refused(gpt2, tmp_path):
    """A tokenizer that changes the text has no bytes to count."""
    from transformers import AutoTokenizer

    from nanochat_ray.interchange.hf_text import HFTokenizer

    folder = tmp_path / "lower"
    shutil.copytree(gpt2, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="bits per byte would be wrong"):
        HFTokenizer(AutoTokenizer.from_pretrained(folder), "lower").token_bytes()
