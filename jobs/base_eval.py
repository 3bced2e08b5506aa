"""Evaluate the pretrained model: bits per byte on train and val, CORE, samples (stage `base_eval`).

With `--watch RUN` a second job beside a run that trains: it evaluates each new checkpoint of its pretraining.

With `--hf-path` any causal language model of Transformers (extra hf), a local folder or a hub id: CORE and bits per
byte. `--hf-path openai-community/gpt2-xl --eval core` measures GPT-2's CORE anew, nanochat's target, where the hub can
be reached. It computes in fp32 unless --dtype says otherwise. Where the results lie is printed: in a folder below
<storage>/hf, one for each model and settings.
"""

from __future__ import annotations

import argparse

from _runtime import Job, main, open_job

from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import existing_run

WATCH_TIMEOUT_S = 3600.0


def run(job: Job, settings: BaseEvalSettings, manifest: DataManifest) -> None:
    from _evaluate import base_units, checkpoint_of, core_bundle, note_scores, run_units, write_core_csv

    from nanochat_ray.metrics.core_bundle import load_bundle
    from nanochat_ray.stages.evaluation import EvalSpec

    checkpoint = checkpoint_of(job, "base", settings.step)
    bundle, no_bundle = core_bundle(job.settings, settings)
    config = {
        "settings": settings.identity(),
        "model": checkpoint.model_hash,
        "data": manifest.hash,
        "bundle": load_bundle(bundle).sha256 if bundle and job.settings.eval_bundle else None,
    }
    with job.stage("base_eval", config) as notes:
        if notes is None:
            return
        spec = EvalSpec(
            job.run_dir.checkpoints("pretrain"), checkpoint.step, job.run_dir.stage("tokenizer"), job.device,
            job.settings.dtype, job.task_sources(), bundle, manifest, device_batch_size=settings.device_batch_size,
        )
        if no_bundle:
            notes.skip("CORE", no_bundle)
        sequence_len = checkpoint.model_config.sequence_len
        units = base_units(settings, sequence_len, bundle)
        notes.metrics |= {"step": checkpoint.step}
        note_scores(notes, units, run_units(job, spec, units), sequence_len, bundle)
        if bundle:
            write_core_csv(job.run_dir.stage("base_eval"), notes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", metavar="RUN", help="follow the run with this model tag: evaluate each checkpoint "
                        "of its pretraining as it appears, until it is done")
    parser.add_argument("--hf-path", metavar="FOLDER|ID", help="evaluate this model of Transformers instead of a "
                        "run's; the text for bits per byte is that of the run in --model-tag, else --data")
    parser.add_argument("--hf-sequence-len", metavar="INT", type=int, help="tokens per row for its bits per byte; "
                        "unset: 1024, or all its positions if fewer, or an exported run's own")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that such a model "
                        "brings along; needed for runs exported by export_hf.py")
    parser.add_argument("--watch-timeout", metavar="SECONDS", type=float, default=WATCH_TIMEOUT_S,
                        help=f"end when the watched run shows no sign of life that long (default: {WATCH_TIMEOUT_S:g})")


def cli() -> None:
    sections = [Section("run", RunSettings()), Section("base_eval", BaseEvalSettings())]
    flags = read_flags(__doc__ or "", sections, extra=add_options)
    run_settings, settings = flags.settings(RunSettings), flags.settings(BaseEvalSettings)
    if flags.args.hf_path is not None:
        if flags.args.watch is not None or settings.step is not None:
            flags.fail("--hf-path is a model of its own: leave --watch and --step out")
        from _hf_eval import Asked, evaluate

        print(evaluate(run_settings, settings, Asked(
            flags.args.hf_path, flags.args.trust_remote_code, flags.args.hf_sequence_len
        )))
        return
    if flags.args.trust_remote_code or flags.args.hf_sequence_len is not None:
        flags.fail("--trust-remote-code and --hf-sequence-len go with --hf-path")
    if flags.args.watch is not None:
        if run_settings.model_tag not in (None, flags.args.watch):
            flags.fail(f"--watch {flags.args.watch} and --model-tag {run_settings.model_tag}: one run can be watched")
        if settings.step is not None:
            flags.fail("--step: a watched run is evaluated at all its checkpoints; leave it out")
        if float(flags.args.watch_timeout) <= 0:
            flags.fail(f"--watch-timeout {flags.args.watch_timeout}: must be > 0")
        from _watch import watch

        watch(run_settings, settings, flags.args.watch, float(flags.args.watch_timeout))
        return
    from _data import pin_data

    with open_job(run_settings, existing_run(run_settings.storage, run_settings.model_tag)) as job:
        run(job, settings, pin_data(run_settings, job.run_dir, job.device))


if __name__ == "__main__":
    main(cli)
