"""What a stage's records say of a model that came from nanochat, and what nanochat's meta files say of one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nanochat_ray.config import ModelConfig, PretrainSettings
from nanochat_ray.interchange.nanochat_model import upstream_config
from nanochat_ray.model.checkpoint import Checkpoint
from nanochat_ray.report.records import plain

OURS = "nanochat_ray"  # key of a meta file for what nanochat has no place for and passes over
IMPORTED = "imported"  # key of our records for what came with the files
KNOWN_FROM = "known_from"  # in a config.json of pretraining: of which other source its settings were told
BASE_ONLY = ("device_batch_size", "max_seq_len", "total_batch_size")
MOST = 1 << 62  # of a whole number


def constants_in(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The network's constants, if we wrote the meta file; empty for nanochat's own."""
    ours = meta.get(OURS)
    config = ours.get("model_config") if isinstance(ours, dict) else None
    if not isinstance(config, dict):
        return {}
    known = ModelConfig.model_fields.keys() - meta["model_config"].keys()
    return {name: value for name, value in config.items() if name in known}


def pretrain_settings(
    meta: Mapping[str, Any], config: ModelConfig, is_base: bool
) -> tuple[PretrainSettings, list[str]]:
    """The settings of pretraining as far as the meta file has them, defaults elsewhere; and what could not be used.

    Finetuning inherits from them. Of a model that is not `is_base` only the network's shape is taken.
    """
    values: dict[str, Any] = {}
    given = meta.get("user_config") if is_base else None
    for source in (given if isinstance(given, dict) else {}, {key: meta.get(key) for key in BASE_ONLY if is_base}):
        values |= {key: value for key, value in source.items() if key in PretrainSettings.model_fields}
    values |= {
        "depth": config.n_layer,
        "head_dim": config.head_dim,
        "aspect_ratio": max(1, config.n_embd // config.n_layer),
        "max_seq_len": max(2, config.sequence_len),
        "window_pattern": config.window_pattern,
    }
    values = {key: None if value == -1 else value for key, value in plain(values).items()}
    notes = [f"{key} of the meta file is left out: more than {MOST:,}" for key, value in values.items() if _huge(value)]
    values = {key: value for key, value in values.items() if not _huge(value)}
    while True:
        try:
            return PretrainSettings.model_validate({k: v for k, v in values.items() if v is not None}), notes
        except ValidationError as error:
            problem = error.errors()[0]
            wrong = str(problem["loc"][0]) if problem["loc"] else "total_batch_size"  # a check over several fields
            if wrong not in values:
                raise ValueError(f"no settings of pretraining can be made of its meta file: {problem['msg']}") from None
            notes.append(f"{wrong} {str(values.pop(wrong))[:80]} of the meta file is left out: {problem['msg']}")


def _huge(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > MOST


def checkpoint_meta(
    meta: Mapping[str, Any], config: ModelConfig, source: str, settings: PretrainSettings, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """What `meta.json` of the checkpoint says, but for its step. The meta file itself stands under `imported`."""
    bpb = plain(meta.get("val_bpb"))
    return {
        "source": source,
        "model_config": config.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "total_batch_size": settings.total_batch_size or 524_288,
        "val_bpb": bpb if isinstance(bpb, int | float) else None,
        "optimizer": None,  # its state stays behind
        IMPORTED: {**origin, "meta": plain({key: value for key, value in meta.items() if key != OURS})},
    }


def meta_for_nanochat(checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """The meta file of one of our checkpoints. One that came from nanochat gets its own back."""
    config, meta = checkpoint.model_config, checkpoint.meta
    imported = meta.get(IMPORTED) or {}
    before = imported.get("meta") if isinstance(imported, dict) else None
    if isinstance(before, dict):
        found = {**before, "model_config": upstream_config(config)}
    else:
        settings = meta.get("settings") or {}
        found = {
            "step": checkpoint.step,
            "val_bpb": meta.get("val_bpb"),
            "model_config": upstream_config(config),
            "user_config": {key: -1 if value is None else value for key, value in settings.items()},
        }
        if source == "base":
            found |= {
                "device_batch_size": settings.get("device_batch_size"),
                "max_seq_len": config.sequence_len,
                "total_batch_size": meta.get("total_batch_size"),
            }
    found[OURS] = {
        "model_config": config.model_dump(mode="json"), "source": source, "weights_sha256": checkpoint.model_hash,
    }
    return found
