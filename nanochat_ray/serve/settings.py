"""The HTTP side's knobs: who is answered, and how much one request may ask for."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from nanochat_ray.config import Settings

MIN_KEY_CHARS = 16
_ORIGIN = re.compile(r"https?://[^/\s*]+")


class HttpSettings(Settings):
    """Security and limits of the HTTP API."""

    api_keys: tuple[SecretStr, ...] = Field(
        (), description="bearer keys that are answered; with none, and no file, only peers on this machine are"
    )
    api_keys_file: str | None = Field(None, description="file with one more key per line, read when a replica starts")
    allow_origins: tuple[str, ...] = Field(
        (), description="web origins whose pages may call the API, such as https://example.org; none: CORS is closed"
    )
    log_conversations: bool = Field(False, description="log prompts and answers; otherwise only ids, counts and times")
    max_body_bytes: int = Field(1 << 20, ge=1, description="of a request")
    max_messages: int = Field(500, ge=1, description="of a conversation")
    max_prompt_tokens: int | None = Field(None, ge=1, description="unset: what the model's context holds")
    max_new_tokens: int | None = Field(None, ge=1, description="per sample; unset: what the model's context holds")
    max_samples: int = Field(16, ge=1, description="answers one request may ask for: its n times its prompts")
    request_timeout_s: float = Field(600.0, gt=0, description="from a request's arrival to the end of its answer")
    keep_alive_s: float = Field(15.0, gt=0, description="between the comment lines that keep a silent stream open")

    @field_validator("api_keys")
    @classmethod
    def _keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for n, key in enumerate(keys):
            check_key(key.get_secret_value(), f"number {n} of api_keys")
        return keys

    @field_validator("allow_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allow_origins {origin!r}: an origin is scheme, host and maybe port, such as https://example.org, "
                    "without a path; or *"
                )
        return origins

    def keys(self) -> list[str]:
        """All keys. FileNotFoundError or ValueError where that would leave a door open: the named file has none, ..."""
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_keys_file is not None:
            file = Path(self.api_keys_file).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"api_keys_file {file} does not exist: write one key per line into it")
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise ValueError(f"api_keys_file {file} has no key: write one per line, or leave the setting out")
            for n, key in enumerate(found):
                check_key(key, f"key {n} of {file}")
            keys += found
        if "*" in self.allow_origins and not keys:
            raise ValueError("allow_origins * without keys would let every web page that is open here use the models")
        return keys


def check_key(key: str, place: str) -> None:
    """ValueError for a key that a header cannot carry, or that is short enough to be guessed. It is not repeated."""
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{place}: a key needs at least {MIN_KEY_CHARS} visible ASCII characters, this one has {len(key)}; "
            "make one with: openssl rand -hex 24"
        )
