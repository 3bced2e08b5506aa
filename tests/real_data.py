"""The folder of real data that some tests read, named by NANOCHAT_RAY_TEST_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "NANOCHAT_RAY_TEST_DATA"
needs_real_data = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder of real data")


def real_data() -> Path:
    return Path(os.environ[VARIABLE])
