"""The chat page as text: nothing from elsewhere, nothing that turns text into HTML or code."""

from __future__ import annotations

import re
from importlib.resources import files

from nanochat_ray.serve.page import page_html


def test_the_page_is_one_text_without_anything_from_elsewhere():
    page = page_html()
    assert not re.findall(r"<!-- include|@import|url\(|<link[^>]+stylesheet|<script[^>]+src", page)
    assert re.findall(r'(?:src|href)="(?!#|logo\.svg)[^"]*"', page) == []
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert dangerous not in page


def test_its_files_are_short():
    for file in (files("nanochat_ray.serve") / "ui").iterdir():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, file
