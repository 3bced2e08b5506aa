"""Compare the run's tokenizer with GPT-2's and GPT-4's (stage `tokenizer_eval`)."""

from __future__ import annotations

from _runtime import Job, main, open_job

from nanochat_ray.config import RunSettings
from nanochat_ray.corpus.reader import DataManifest, read_slices
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import existing_run
from nanochat_ray.text.tokenizer import Tokenizer

BASELINES = ("gpt2", "cl100k_base")


def run(job: Job, manifest: DataManifest) -> None:
    from nanochat_ray.report.records import Table
    from nanochat_ray.text.tokenizer_eval import evaluate

    tokenizer = Tokenizer.load(job.run_dir.require_stage("tokenizer", "tok_train.py"))
    with job.stage("tokenizer_eval", {"tokenizer": tokenizer.hash, "data": manifest.hash}) as notes:
        if notes is None:
            return
        baselines = {}
        for name in BASELINES:
            try:
                baselines[name] = Tokenizer.from_tiktoken(name)
            except OSError as error:
                notes.skip(f"baseline {name}", str(error))
        samples = {split: "\n".join(next(read_slices(manifest, split, 1024))) for split in ("train", "val")}
        notes.hashes |= {"data": manifest.hash, "tokenizer": tokenizer.hash}
        records = evaluate(tokenizer, baselines, samples)
        columns = list(records[0])
        notes.tables["Tokens per text"] = Table(columns, [[record[column] for column in columns] for record in records])


def cli() -> None:
    settings = read_flags(__doc__ or "", [Section("run", RunSettings())]).settings(RunSettings)
    from _data import pinned_for_tokenizer

    with open_job(settings, existing_run(settings.storage, settings.model_tag)) as job:
        run(job, pinned_for_tokenizer(job))


if __name__ == "__main__":
    main(cli)
