"""nanochat's weights: the golden logits come out, older files get neutral parts, and whatever does not fit is named."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.interchange import nanochat_tensors
from nanochat_ray.interchange.nanochat_model import not_upstream, to_ours, upstream_config
from nanochat_ray.interchange.nanochat_tensors import read_tensor, read_tensors, write_pt
from nanochat_ray.metrics.bits_per_byte import bits_per_byte, evaluate_bpb
from nanochat_ray.model.checkpoint import load_weights
from nanochat_ray.model.gpt import GPT
from tests.interchange.hostile_pickles import COMMAND, MARKER, _Calls
from tests.interchange.nanochat_made import golden_config, golden_state, write_model
from tests.parity.goldens import load_json, load_tensors, model_from_golden

FORWARD = load_json("forward")


def through_a_file(folder: Path, state: dict[str, Any], config: dict[str, Any], **constants: Any):
    """What an import makes of a file with this state."""
    return to_ours(config, read_tensors(write_model(folder, "base", "d4", 1, state, config)), constants)


def built(imported) -> GPT:
    model = GPT.build(imported.config)
    load_weights(model, imported.tensors)
    return model


@pytest.mark.parametrize("key", ["a", "b", "c"])
def test_golden_logits(tmp_path, key):
    tensors = load_tensors(f"forward_{key}")
    imported = through_a_file(tmp_path, golden_state(key), golden_config(key))
    assert imported.notes == () and not_upstream(imported.config) == []
    with torch.no_grad():
        logits = built(imported)(tensors["input_ids"].long())
    assert logits.argmax(-1).tolist() == FORWARD["cases"][key]["argmax"]
    torch.testing.assert_close(logits[:, tensors["logit_positions"].long()], tensors["logits"], atol=1e-4, rtol=0)
    assert all(torch.equal(tensor, golden_state(key)[name]) for name, tensor in imported.tensors.items())


def test_golden_bits_per_byte(tmp_path):
    case = load_json("bpb")["cases"][0]
    model = built(through_a_file(tmp_path, golden_state("d"), golden_config("d")))
    batches = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(case["inputs"], case["targets"], strict=True)]
    table = torch.tensor(load_json("tokenizer_2048")["token_bytes"])
    assert bits_per_byte(*evaluate_bpb(model, batches, table)) == pytest.approx(case["bpb"], abs=1e-5)


def neutral_model(key: str, *parts: str) -> GPT:
    """The golden network with parts of it at the values at which they do nothing."""
    model = model_from_golden(key)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part in parts:
                if part in name and "gate" not in name:
                    parameter.fill_(1.0 if part == "resid" else 0.0)
    return model


@pytest.mark.parametrize("parts", [("resid",), ("x0",), ("smear",), ("backout",), ("resid", "x0", "smear", "backout")])
def test_older_files_get_neutral_parts(tmp_path, parts):
    model = neutral_model("c", *parts)
    state = {name: t for name, t in model.state_dict().items() if not any(name.startswith(part) for part in parts)}
    imported = through_a_file(tmp_path, state, golden_config("c"))
    assert len(imported.notes) == len(parts)
    assert all(any(part in note for note in imported.notes) for part in parts)
    ids = load_tensors("forward_c")["input_ids"].long()
    with torch.no_grad():
        assert torch.equal(built(imported)(ids), model(ids))


def test_files_without_windows_see_everything(tmp_path):
    config = golden_config("c")
    del config["window_pattern"]
    imported = through_a_file(tmp_path, golden_state("c"), config)
    assert built(imported).windows() == [256] * 4 and imported.config.window_pattern == "L"
    assert any("window_pattern" in note for note in imported.notes)


def test_files_of_2025(tmp_path):
    """No value embeddings, lambdas, smear, backout or windows: their constants are told from that, or given."""
    parts = ("value_embeds", "resid", "x0", "smear", "backout")
    model = neutral_model("c", *parts)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(parts) and "ve_gate" not in n}
    config = {key: value for key, value in golden_config("c").items() if key != "window_pattern"}
    imported = through_a_file(tmp_path, dict(state), config)
    assert (imported.config.rope_base, imported.config.qk_scale, imported.config.logit_softcap) == (10_000, 1, 15)
    assert len(not_upstream(imported.config)) == 2 and len(imported.notes) == 7
    ids = load_tensors("forward_c")["input_ids"].long()
    given = through_a_file(tmp_path, dict(state), {**config, "window_pattern": "SSSL"}, rope_base=1e5, qk_scale=1.2)
    with torch.no_grad():
        assert torch.equal(built(given)(ids), model(ids))
        assert not torch.allclose(built(imported)(ids), model(ids), atol=1e-3)


def test_files_of_early_2026(tmp_path):
    """Wider value gates with another factor, and a short window of another length, which is said."""
    state = {name: t for name, t in golden_state("c").items() if not name.startswith(("smear", "backout"))}
    for name in [name for name in state if "ve_gate" in name]:
        state[name] = torch.randn(1, 32)
    imported = through_a_file(tmp_path, state, golden_config("c"))
    config = imported.config
    assert (config.value_gate_channels, config.value_gate_scale, config.logit_softcap) == (32, 2, 20)
    assert config.window_pattern == "L" and any("128 tokens" in note for note in imported.notes)


def test_compiled_names_tables_shared_storage_and_dtypes(tmp_path):
    state = {f"_orig_mod.{name}": tensor for name, tensor in golden_state("b").items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    both = torch.cat([state["_orig_mod.resid_lambdas"], state["_orig_mod.x0_lambdas"]])
    state["_orig_mod.resid_lambdas"], state["_orig_mod.x0_lambdas"] = both[:3], both[3:]
    state["cos"], state["sin"] = torch.zeros(1, 10, 1, 8), torch.zeros(1, 10, 1, 8)
    imported = through_a_file(tmp_path, state, golden_config("b"))
    assert list(imported.notes) == ["left out cos and sin: rotary tables are computed from the config"]
    assert imported.tensors["transformer.wte.weight"].dtype == torch.bfloat16
    assert torch.equal(imported.tensors["x0_lambdas"], golden_state("b")["x0_lambdas"])
    assert imported.tensors["x0_lambdas"].untyped_storage().nbytes() == 3 * 4
    state["resid_lambdas"] = both[:3]
    with pytest.raises(ValueError, match="resid_lambdas is there twice"):
        through_a_file(tmp_path, state, golden_config("b"))


def test_the_padding_of_the_vocabulary(tmp_path):
    """500 tokens are padded to 512; an older file has 500 rows."""
    state = golden_state("b")
    assert through_a_file(tmp_path, dict(state), golden_config("b")).config.vocab_pad_multiple == 64
    for name in [name for name, tensor in state.items() if len(tensor) == 512]:
        state[name] = state[name][:500].clone()
    imported = through_a_file(tmp_path, dict(state), golden_config("b"))
    assert imported.config.padded_vocab_size == 500
    ids = load_tensors("forward_b")["input_ids"].long()
    with torch.no_grad():
        assert torch.equal(built(imported)(ids), model_from_golden("b")(ids))
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:499]
    with pytest.raises(ValueError, match="has 499 rows"):
        through_a_file(tmp_path, state, golden_config("b"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda s: s.pop("transformer.wte.weight"), "missing transformer.wte.weight"),
        (lambda s: s.pop("smear_gate.weight"), "missing smear_gate.weight"),
        (lambda s: s.pop("value_embeds.1.weight"), "missing value_embeds.1.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "without a place extra"),
        (lambda s: s.update({"transformer.h.4.attn.c_q.weight": torch.zeros(1)}), r"transformer\.h\.4"),
        (lambda s: s.update(resid_lambdas=torch.zeros(5)), r"resid_lambdas: \(5,\) stored, \(4,\) wanted"),
        (lambda s: s.update(resid_lambdas=torch.zeros(4, dtype=torch.int32)), r"resid_lambdas is of torch\.int32"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    state = golden_state("c")
    change(state)
    with pytest.raises(ValueError, match=words):
        through_a_file(tmp_path, state, golden_config("c"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_experts": 8}, "n_experts"),
        ({"n_layer": 10**9}, "from 1 to 1,024"),
        ({"n_layer": "4"}, "n_layer 4"),
        ({"n_layer": True}, "n_layer True"),
        ({"n_head": 3}, "not a multiple of n_head"),
        ({"window_pattern": "XL"}, "only the letters"),
        ({"vocab_size": 5000}, "no padding of vocab_size 5000"),
    ],
)
def test_configs_that_cannot_be(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        through_a_file(tmp_path, golden_state("c"), golden_config("c") | change)
    with pytest.raises(ValueError, match="lacks n_embd"):
        to_ours({k: v for k, v in golden_config("c").items() if k != "n_embd"}, golden_state("c"))


@pytest.mark.parametrize(
    "constant", [{"rope_table_factor": 10**9}, {"qk_scale": float("nan")}, {"rope_base": 0}, {"norm_eps": "x"},
                 {"arch_version": 2}, {"smear_channels": 10**6}, {"logit_softcap": True}],
)
def test_constants_that_cannot_be(constant):
    with pytest.raises(ValueError, match=next(iter(constant))):
        to_ours(golden_config("c"), golden_state("c"), constant)


def test_the_config_for_nanochat(tmp_path):
    imported = to_ours(golden_config("b"), golden_state("b"))
    assert upstream_config(imported.config) == golden_config("b")


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 500 and "weights_only" not in message


@pytest.mark.filterwarnings("ignore")
def test_files_that_are_no_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_000001.pt"
    for thing, words in [
        (_Calls(os.system, COMMAND), r"posix\.system"),
        ({"a": _Calls(eval, "1")}, "eval"),
        ({"a": torch.zeros(3), "b": _Calls(open, MARKER, "w")}, "open"),
        ([torch.zeros(3)], "a list"),
        ({1: torch.zeros(3)}, "'1' is no dense tensor"),
        ({"a": 3}, "'a' is no dense tensor but a int"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "sparse"),
        ({"a": torch.zeros(3, device="meta")}, "on meta"),
        ({"a": torch.zeros(1).expand(10**12)}, "1000000000000"),
        (dict.fromkeys("abcd", torch.zeros(3000)), "more than the file"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "complex"),
    ]:
        torch.save(thing, path)
        refused(path, words)
    assert not (tmp_path / MARKER).exists()
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not one dense tensor"):
        read_tensor(path)


def test_files_that_are_cut_packed_or_swollen(tmp_path, monkeypatch):
    path, other = tmp_path / "model_000001.pt", tmp_path / "other.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "no whole torch archive")
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refused(path, "before 1.6")
    with zipfile.ZipFile(path, "a") as archive:  # a small zip behind it, which zipfile would see and torch would not
        archive.writestr("archive/data.pkl", b"")
    refused(path, "does not begin as one")
    path.write_bytes(whole + whole)
    refused(path, "before or behind")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="changed while"):
        read_tensors(path, "0" * 64)
    path.write_bytes(whole)

    def rewritten(change, compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w", compression) as out:
            for entry in archive.infolist():
                out.writestr(entry.filename, change(entry.filename, archive.read(entry)))

    rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(other, "compressed")
    rewritten(lambda name, data: data.replace(b"M\xe8\x03", b"J\x00\x00\x00\x40") if name.endswith("pkl") else data)
    refused(other, "damaged")  # a tensor that says it is larger than what is stored
    rewritten(lambda name, data: data[:400] if name.endswith("data/0") else data)
    refused(other, "damaged")
    shutil.copyfile(path, other)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("more/data.pkl", b".")
    refused(other, "one list of tensors")
    monkeypatch.setattr(nanochat_tensors, "MAX_PICKLE_BYTES", 10)
    refused(path, "at most 10 bytes")


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "model.pt"
    write_pt(path, {"a": torch.ones(3)})
    assert read_tensors(path)["a"].tolist() == [1, 1, 1]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_pt(path, {"a": torch.zeros(3)})
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"] and read_tensors(path)["a"].sum() == 3
