"""Train the tokenizer on the run's data (stage `tokenizer`)."""

from __future__ import annotations

import time

from _runtime import Job, main, open_job

from nanochat_ray.config import PretrainSettings, RunSettings, TokenizerSettings
from nanochat_ray.corpus.reader import DataManifest, iter_documents
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import DONE_FILE
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer, training_texts


def run(job: Job, settings: TokenizerSettings, manifest: DataManifest) -> Tokenizer:
    folder = job.run_dir.stage("tokenizer")
    with job.stage("tokenizer", {"settings": settings.identity(), "data": manifest.hash}) as notes:
        if notes is None:
            return Tokenizer.load(folder)
        begun = time.monotonic()
        texts = training_texts(iter_documents(manifest, "train"), settings.max_chars, settings.doc_cap)
        tokenizer = Tokenizer.train(texts, settings.vocab_size)
        tokenizer.save(folder)
        sizes = tokenizer.token_bytes()
        sizes = sizes[sizes > 0]
        notes.metrics |= {
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": len(SPECIAL_TOKENS),
            "training_seconds": time.monotonic() - begun,
            "token_bytes_min": int(sizes.min()),
            "token_bytes_max": int(sizes.max()),
            "token_bytes_mean": float(sizes.mean()),
            "token_bytes_std": float(sizes.std(ddof=1)),
        }
        notes.hashes |= {"data": manifest.hash, "tokenizer": tokenizer.hash}
    assert (folder / DONE_FILE).exists()
    return tokenizer


def cli() -> None:
    from _data import RunData

    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("tokenizer", TokenizerSettings())])
    settings = flags.settings(RunSettings)
    with open_job(settings, settings.model_tag or f"d{PretrainSettings().depth}") as job:
        tokenizer_settings = flags.settings(TokenizerSettings)
        run(job, tokenizer_settings, RunData(job).for_tokenizer(tokenizer_settings.max_chars))


if __name__ == "__main__":
    main(cli)
