"""The chat page: one HTML text made of the files in ui/, which needs no build step and loads nothing but the logo."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

_INCLUDE = re.compile(r"<!-- include ([a-z]+\.(?:css|js)) -->")
_INLINE = re.compile(r"<(?:script|style)[^>]*>(.*?)</(?:script|style)>", re.DOTALL)


@cache
def page_html() -> str:
    """The whole page. What it asks for has relative addresses, so it may be served below a prefix that ends in `/`."""
    return _INCLUDE.sub(lambda match: _read(match[1]), _read("page.html"))


@cache
def logo_svg() -> str:
    """The project's mark, `logo.svg` of the page."""
    return _read("logo.svg")


@cache
def page_policy() -> str:
    """The value of `Content-Security-Policy` for the page: its own script and style by hash, its own server, no more.

    With hashes instead of 'unsafe-inline' a script that got into the page would not run.
    """
    style, script = (f"'sha256-{_sha256(text)}'" for text in _INLINE.findall(page_html()))
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _read(name: str) -> str:
    return (resources.files("nanochat_ray.serve") / "ui" / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
