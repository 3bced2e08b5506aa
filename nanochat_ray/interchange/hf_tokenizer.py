"""Our tokenizer and chat format for Transformers: files for its `tokenizers` library, and a Jinja template.

The merges are those of tiktoken's rule: of all neighbours whose joint bytes are a token, the pair with the lowest id
goes first. A text keeps its ids, with two exceptions: the name of a special token in plain text is that token, as
Transformers' users expect, and half a surrogate pair is an error.

The template keeps our guarantee all the same: text of a message never becomes a special token. It puts the
noncharacter U+FDD0 behind each "<" that stands before "|" (or before U+FDD0), and the normaliser takes one such away,
so the text comes out as it was, but no name in it is one. In plain text "<" followed by U+FDD0 loses the latter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_ray.interchange.hf_extra import needed
from nanochat_ray.text.tokenizer import SPLIT_PATTERN, Tokenizer

MARK = "\ufdd0"
# Both spellings of the apostrophe's rule that ignore case must know the long s, as tiktoken's does.
_IGNORING_CASE, _SPELT_OUT = "(?i:[sdmt]|ll|ve|re)", "(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# What text/conversation.py does, as a template. `generation` marks what is trained on; text waits in `state.text` to be
# in one block with the marker behind it, for of a block's last character Transformers marks the first token only.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
{{- text | replace('<MARK', '<MARKMARK') | replace('<|', '<MARK|') -}}
{%- endmacro -%}
{%- set state = namespace(system=none, first=0, text='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is not string -%}
        {{- raise_exception("the system message's content must be a string") -}}
    {%- endif -%}
    {%- set state.system = messages[0]['content'] -%}
    {%- set state.first = 1 -%}
{%- endif -%}
{%- if messages | length <= state.first -%}
    {{- raise_exception('a conversation needs at least one user message') -}}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages[state.first:] -%}
    {%- set content = message['content'] -%}
    {%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
    {%- if message['role'] != expected -%}
        {{- raise_exception('message ' ~ (loop.index0 + state.first) ~ ' is from ' ~ message['role'] ~ ', expected '
            ~ expected) -}}
    {%- endif -%}
    {%- if expected == 'user' -%}
        {%- if content is not string -%}
            {{- raise_exception("a user's content must be a string") -}}
        {%- endif -%}
        {%- if loop.first and state.system is not none -%}
            {%- set content = state.system ~ '\\n\\n' ~ content -%}
        {%- endif -%}
        {{- '<|user_start|>' -}}{{- plain(content) -}}{{- '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- if content is string -%}
            {%- set state.text = plain(content) -%}
        {%- elif content is mapping or content is not iterable -%}
            {{- raise_exception("an assistant's content must be a string or a list of parts") -}}
        {%- else -%}
            {%- set state.text = '' -%}
            {%- for part in content -%}
                {%- if part['text'] is not string -%}
                    {{- raise_exception('a part needs a text') -}}
                {%- elif part['type'] == 'text' -%}
                    {%- if state.text and part['text'] -%}
                        {{- raise_exception('two text parts in a row would be encoded as one: join them first') -}}
                    {%- endif -%}
                    {%- set state.text = state.text ~ plain(part['text']) -%}
                {%- elif part['type'] == 'python' -%}
                    {%- generation -%}
                        {{- state.text -}}{{- '<|python_start|>' -}}{{- plain(part['text']) -}}{{- '<|python_end|>' -}}
                    {%- endgeneration -%}
                    {%- set state.text = '' -%}
                {%- elif part['type'] == 'python_output' -%}
                    {%- generation -%}{{- state.text -}}{%- endgeneration -%}
                    {{- '<|output_start|>' -}}{{- plain(part['text']) -}}{{- '<|output_end|>' -}}
                    {%- set state.text = '' -%}
                {%- else -%}
                    {{- raise_exception('a part needs a type of text, python, python_output, not ' ~ part['type']) -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {%- generation -%}{{- state.text -}}{{- '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages[-1]['role'] != 'user' -%}
        {{- raise_exception("the last message is the assistant's: there is no question to answer") -}}
    {%- endif -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
""".replace("MARK", MARK)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int, end: str = "<|assistant_end|>") -> None:
    """Write `TOKENIZER_FILES`, which `AutoTokenizer` loads.

    `max_len` is the context of training, `end` the token that ends a text. Encoding puts BOS in front
    (`add_special_tokens=False` does not), padding is BOS on the left. ValueError without the extra.
    """
    fast = fast_tokenizer(tokenizer)
    for text in ("Hello, world's 1234 tests…", "naïve ★ 你好 🌍\r\n\t  x", "<|bos|> <\u007c  "):
        ids = fast.encode(text.replace("<|", f"<{MARK}|"), add_special_tokens=False).ids
        assert ids == tokenizer.encode(text), text
    fast.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": end,
        "pad_token": "<|bos|>",
        "padding_side": "left",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer` with the same tokens and ids. ValueError that names the extra without it."""
    needed("tokenizers")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Fast

    tokens = [tokenizer.decode_bytes([k]) for k in range(len(tokenizer.token_bytes()) - len(tokenizer.special))]
    name = byte_names()
    names = ["".join(name[byte] for byte in token) for token in tokens]
    merges = [(names[left], names[right]) for left, right in merges_of(tokens)]
    # A chunk that is a token is taken as it is, even where no merges lead to it.
    fast = Fast(models.BPE(vocab=dict(zip(names, range(len(names)), strict=True)), merges=merges, ignore_merges=True))
    fast.normalizer = normalizers.Replace(f"<{MARK}", "<")
    assert _IGNORING_CASE in SPLIT_PATTERN
    pattern = Regex(SPLIT_PATTERN.replace(_IGNORING_CASE, _SPELT_OUT))
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    fast.decoder = decoders.ByteLevel()
    in_order = sorted(tokenizer.special, key=tokenizer.special.__getitem__)
    fast.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in in_order])
    fast.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    assert {special: fast.token_to_id(special) for special in in_order} == tokenizer.special
    return fast


def merges_of(tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """All pairs of ids whose joint bytes are a token, in the order of that token, then of the pair itself."""
    id_of = {token: k for k, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        halves = ((id_of.get(token[:k]), id_of.get(token[k:])) for k in range(1, len(token)))
        merges += sorted((left, right) for left, right in halves if left is not None and right is not None)
    return merges


def byte_names() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table).

    Printable Latin-1 bytes are themselves, the 68 others the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
