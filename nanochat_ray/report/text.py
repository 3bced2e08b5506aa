"""Markdown of the report: numbers with their units, tables, and texts that cannot break the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_ray.report.records import Scalar

ABSENT = "-"
SHARE_PREFIXES = ("chatcore/", "heldout/")
ACTIVE = frozenset("&<>|`*_[\\~$")  # what Markdown, or HTML in it, makes something of within a table's cell


def value_text(name: str, value: Scalar) -> str:
    """A number as its name's unit asks."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if name.startswith(SHARE_PREFIXES) or "pass@" in name or name.endswith("greedy"):
        return f"{100 * value:.1f} %"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if name.endswith(("_s", "seconds", "_time")):
        return duration(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.3e}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e12 else f"{value:.3e}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float) -> str:
    """Bytes with a unit, three figures."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            value = n_bytes / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{n_bytes:.0f} B" if n_bytes else "0"


def money(amount: float | None) -> str:
    return ABSENT if amount is None else f"${amount:,.2f}"


def one_line(text: str) -> str:
    """One line in which no character opens a table cell or an HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = True, escaped: bool = False
) -> str:
    """A Markdown table; `numbers` sets all columns but the first flush right, `escaped` cells are Markdown already."""
    lines = [list(map(str, columns)), *[list(map(str, row)) for row in rows]]
    cells = lines if escaped else [[one_line(text) for text in line] for line in lines]
    rule = ["---", *["---:" if numbers else "---"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def yaml_text(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def cell(text: str, max_chars: int) -> str:
    """A text of several lines for a table's cell, as it was written; cut behind `max_chars`."""
    text = text.strip()
    text = text if len(text) <= max_chars else text[:max_chars] + "..."
    plain = "".join(f"&#{ord(char)};" if char in ACTIVE else char for char in text)
    return "<br>".join(plain.splitlines())
