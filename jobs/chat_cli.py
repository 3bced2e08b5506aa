"""Chat with a finetuned model on the command line. `quit` leaves, `clear` forgets, Ctrl-C stops a reply."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from _runtime import main

from nanochat_ray.config import ChatSettings, RunSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import STAGE_OF_SOURCE, RunDir, existing_run

if TYPE_CHECKING:
    from nanochat_ray.engine.chat import ChatSession


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("chat", ChatSettings())])
    settings, chat = flags.settings(RunSettings), flags.settings(ChatSettings)

    from nanochat_ray.engine.chat import ChatSession, chat_loop
    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.model.checkpoint import resolve_checkpoint
    from nanochat_ray.model.precision import pick_device, pick_dtype
    from nanochat_ray.text.tokenizer import Tokenizer

    run_dir = RunDir.of(settings.storage, existing_run(settings.storage, settings.model_tag)).fetch()
    tokenizer = Tokenizer.load(run_dir.require_stage("tokenizer", "tok_train.py"))
    checkpoint = resolve_checkpoint(run_dir.checkpoints(STAGE_OF_SOURCE[chat.source]), chat.step)
    device = pick_device(settings.device_type)
    dtype, _ = pick_dtype(device, settings.dtype)
    engine = Engine(checkpoint.build_model(device, dtype, tokenizer.vocab_size), tokenizer, max_rows=1)
    session = ChatSession(engine, tokenizer, chat)
    if chat.prompt is not None:
        answer(session, chat.prompt)
        return
    print(f"{run_dir.root.name} ({chat.source}, step {checkpoint.step})")
    print("quit leaves, clear starts anew, Ctrl-C stops a reply.")
    chat_loop(session, read_line, write)


def answer(session: ChatSession, prompt: str) -> None:
    """One reply to stdout; what had to be left out of the prompt is said on stderr."""
    pieces = session.reply(prompt)
    if session.notice:
        print(session.notice, file=sys.stderr)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        pass
    write("\n")


def read_line() -> str:
    return input("\nyou: ")


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main(cli)
