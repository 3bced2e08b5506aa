"""The extra `hf`: one clear line where it is missing, and no network where it is not wanted."""

from __future__ import annotations

import importlib.util
import os

from nanochat_ray.corpus.download import OFFLINE_VARIABLE


def needed(*packages: str) -> None:
    """Raise ValueError that names the extra unless these packages are installed. Call it before importing them.

    With NANOCHAT_RAY_OFFLINE=1 the hub's library is told to stay offline too, which it reads when it is imported.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed here: pip install 'nanochat-ray[hf]'")
    if os.environ.get(OFFLINE_VARIABLE) == "1":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
