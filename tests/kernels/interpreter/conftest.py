import pytest

from tests.kernels.interpreted import patch_once

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    patch_once(monkeypatch.setattr)
