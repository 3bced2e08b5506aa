"""`base_eval.py --hf-path`: CORE and bits per byte of any causal language model of Transformers.

The results are a folder of their own for each model and settings, `<storage>/hf/<model>-<mark>/base_eval`, where no
other job looks for a run. The text for bits per byte is that of the run that --model-tag names, else what --data says,
pinned beside the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _data import pin_data
from _evaluate import base_units, core_bundle, note_scores, run_units, write_core_csv
from _runtime import Job, open_job

from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.evals.hf import HFSpec
from nanochat_ray.interchange.hf_model import find_source, read_lengths
from nanochat_ray.metrics.core_bundle import load_bundle
from nanochat_ray.run_dir import DATA_FILE, RunDir, existing_run, read_json, shown, storage_path

FOLDER = "hf"
DTYPE = "float32"  # whatever the hardware: numbers of models of others are compared with published ones


@dataclass(frozen=True)
class Asked:
    """What the command line says of the model."""

    path: str
    trust_remote_code: bool = False
    sequence_len: int | None = None  # of rows for bits per byte; None: by the model


def evaluate(run_settings: RunSettings, settings: BaseEvalSettings, asked: Asked) -> Path:
    """Evaluate the model and write the stage's folder; returns it. One line for what cannot be had or loaded."""
    parts = [part for part in settings.eval.split(",") if part != "sample"]
    if not parts:
        raise ValueError("--eval sample: a model of Transformers gets no samples here; choose from core, bpb")
    settings = settings.model_copy(update={"eval": ",".join(parts)})
    source = find_source(asked.path, asked.trust_remote_code)
    lengths = read_lengths(source)
    sequence_len = asked.sequence_len or lengths.sequence_len
    if not 1 <= sequence_len <= (lengths.max_len or sequence_len):
        raise ValueError(f"--hf-sequence-len {sequence_len}: {source.name} has {lengths.max_len} positions")
    bundle, no_bundle = core_bundle(run_settings, settings)
    config: dict[str, Any] = {
        "settings": settings.identity(),
        "model": source.identity(),
        "sequence_len": sequence_len,
        "dtype": run_settings.dtype or DTYPE,
        "bundle": load_bundle(bundle).sha256 if bundle and run_settings.eval_bundle else None,
    }
    text = text_of_run(run_settings) if "bpb" in parts and run_settings.model_tag is not None else None
    slug = source.slug({**config, "data": text.hash if text else run_settings.data})
    with open_job(run_settings.model_copy(update={"storage": beside_runs(run_settings.storage)}), slug) as job:
        if text is None and "bpb" in parts:
            text = pin_data(run_settings, job.run_dir, job.device)
        spec = HFSpec(
            source, job.device, config["dtype"], bundle, text, sequence_len, settings.device_batch_size
        )
        return run(job, settings, spec, config | {"data": text.hash if text else None}, no_bundle)


def run(job: Job, settings: BaseEvalSettings, spec: HFSpec, config: dict[str, Any], no_bundle: str) -> Path:
    folder, bundle, source = job.run_dir.stage("base_eval"), spec.bundle, spec.source
    with job.stage("base_eval", config) as notes:
        if notes is None:
            return folder
        if no_bundle:
            notes.skip("CORE", no_bundle)
        notes.metrics |= {"model": source.name, "revision": source.revision}
        units = base_units(settings, spec.sequence_len, bundle)
        note_scores(notes, units, run_units(job, spec, units), spec.sequence_len, bundle)
        if "train/note" in notes.metrics:
            notes.metrics["train/note"] = "the first training documents of the run or data named"
        if bundle:
            write_core_csv(folder, notes)
    return folder


def text_of_run(settings: RunSettings) -> DataManifest:
    """The data of the run that is named."""
    run_dir = RunDir.of(settings.storage, existing_run(settings.storage, settings.model_tag)).fetch()
    path = run_dir.root / DATA_FILE
    if not path.exists():
        raise FileNotFoundError(f"run {settings.model_tag} has no data yet ({path}); name some with --data instead")
    return DataManifest.from_json(read_json(path))


def beside_runs(storage: str | None) -> str:
    """The storage of these results: a folder in that of the runs, none of whose own folders is taken for a run."""
    base, question, options = shown(storage_path(storage)).partition("?")
    return f"{base.rstrip('/')}/{FOLDER}{question}{options}"
