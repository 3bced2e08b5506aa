"""What tests with Transformers run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interchange.hf_made import need_hf


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers without a hub, and with folders of its own."""
    need_hf()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
