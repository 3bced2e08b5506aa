"""The calculator against recorded results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_ray.engine.calculator import calculate

CASES = json.loads((Path(__file__).parent / "data" / "calculator.json").read_text())["cases"]

# What the default format writes where the recorded text is Python's.
CLEAN = {
    "10/5": "2",
    ".5+.5": "1",
    "5.": "5",
    "0.1+0.2": "0.3",
    "1/3": "0.333333333333",
    "0.0": "0",
    "99999999/7": "14285714.1429",
    "5 * 12 * 7 / 2": "210",
}
# Where the recorded answer is a defect or an accident.
RIGHT = {
    "( )": None,
    "()": None,
    "'a,b,c'.count(',')": "2",
    "'profile'.count('i')": "1",
    "'important'.count('t')": "2",
    "'executive'.count('e')": "3",
    "'medieval'.count('e')": "2",
    "'directory'.count('r')": "2",
    "'opening'.count('n')": "2",
    "'compiler'.count('i')": "1",
    "'inputs'.count('s')": "1",
    "'canvars'.count('a')": "2",
    "'banana'.count('a')+1": "4",
    "'banana'.count('a').real": None,
    "'ab'.upper().count('A')": "1",
    "'naïve'.count('n')": "1",
    "'x-y'.count('-')": "1",
    "'snake__case'.count('_')": "2",
    "'aaa'.count('a') if 1 else 0": None,
    "(1,2,1).count(1)": None,
    "'a'.count('a') and 'b'.count('c')": None,
    "'a'.count('A'.lower())": "1",
    "'résumé'.count('r')": "1",
}


def test_every_exception_is_recorded() -> None:
    assert set(RIGHT) == {case["expr"] for case in CASES if "known_wrong" in case}
    assert set(CLEAN) <= {case["expr"] for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["expr"])
def test_result(case: dict) -> None:
    expr = case["expr"]
    wanted = RIGHT[expr] if "known_wrong" in case else case["result"]
    assert calculate(expr, "python") == wanted
    assert calculate(expr) == CLEAN.get(expr, wanted)
