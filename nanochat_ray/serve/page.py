"""The chat page: one HTML file put together from the ones in ui/, and its logo."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI, Response

_INCLUDE = re.compile(r"<!-- include ([\w.-]+) -->")
_SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL)
_HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def page_html() -> str:
    """The page with its style and scripts inside, so that one answer is all of it."""
    folder = files("nanochat_ray.serve") / "ui"
    page = (folder / "page.html").read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: (folder / found[1]).read_text(encoding="utf-8"), page)


def content_security_policy(page: str) -> str:
    """Nothing from elsewhere, and no script or style but the page's own, each known by its hash."""

    def hashes(blocks: re.Pattern[str]) -> str:
        digests = (hashlib.sha256(block.encode()).digest() for block in blocks.findall(page))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes(_SCRIPT)}; style-src {hashes(_STYLE)}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def add_page(app: FastAPI) -> None:
    """`/` and `/logo.svg`."""
    page = page_html()
    headers = {**_HEADERS, "content-security-policy": content_security_policy(page)}
    logo = (files("nanochat_ray.serve") / "ui" / "logo.svg").read_bytes()
    # Opened by itself an SVG is a document too.
    logo_headers = {**_HEADERS, "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, headers=headers, media_type="text/html")

    @app.get("/logo.svg", include_in_schema=False)
    async def logo_svg() -> Response:
        return Response(logo, headers=logo_headers, media_type="image/svg+xml")
