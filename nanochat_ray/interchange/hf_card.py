"""The card of an exported model: what it is, how to load it, what the run's report says of it.

Of the report only the tables of results and of training are taken: the rest has paths and settings of the machine.
"""

from __future__ import annotations

from pathlib import Path

from nanochat_ray.model.checkpoint import Checkpoint
from nanochat_ray.report.text import markdown_table, one_line

REPORTED = ("Summary", "Training")  # sections of report.md
WHAT = {
    "base": "The pretrained model: it continues text.",
    "sft": "The model after supervised finetuning: it answers in a chat.",
    "rl": "The model after reinforcement learning: it answers in a chat.",
}

_FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat-ray, custom_code]
---
"""
_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""
_CHAT = """\
messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
_TEXT = """\
inputs = tokenizer("The capital of France is", return_tensors="pt")
"""
_REST = """\
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The network is in this folder (`modeling_nanochat_ray.py`), hence `trust_remote_code`. To generate, rows of different
length are padded on the left. Every text begins with `<|bos|>`, which the tokenizer adds.
"""
_TOOLS = """\
What the model writes between `<|python_start|>` and `<|python_end|>` is a call of a calculator. Transformers runs
nothing: whoever serves the model puts the result between `<|output_start|>` and `<|output_end|>`.
"""


def model_card(run_name: str, source: str, checkpoint: Checkpoint, tokenizer_hash: str, report: Path) -> str:
    """The card in Markdown. `report` is the run's report.md; its tables are left out if it is not there."""
    config = checkpoint.model_config
    rows = [
        ["run, step", f"{one_line(run_name)} ({source}), {checkpoint.step:,}"],
        ["layers, channels, heads", f"{config.n_layer}, {config.n_embd}, {config.n_head} ({config.n_kv_head} of keys)"],
        ["vocabulary", f"{config.vocab_size:,}"],
        ["context of training", f"{config.sequence_len:,} tokens, windows {config.window_pattern}"],
        ["SHA-256 of the checkpoint's weights", f"`{checkpoint.model_hash}`"],
        ["SHA-256 of the tokens", f"`{tokenizer_hash}`"],
    ]
    parts = [
        f"{_FRONT}# {one_line(run_name)}: {source}",
        f"{WHAT[source]} Trained with nanochat-ray, exported to Transformers.",
        markdown_table(["", "value"], rows, numbers=False),
        (_LOADING + (_TEXT if source == "base" else _CHAT) + _REST).strip(),
        *([] if source == "base" else [_TOOLS.strip()]),
        *sections(report.read_text(encoding="utf-8") if report.is_file() else "", REPORTED),
    ]
    return "\n\n".join(parts) + "\n"


def sections(markdown: str, titles: tuple[str, ...]) -> list[str]:
    """The sections of that level and those titles, in their order."""
    found = {part.split("\n", 1)[0].strip(): part for part in ("\n" + markdown).split("\n## ")[1:]}
    return [f"## {found[title].strip()}" for title in titles if title in found]
