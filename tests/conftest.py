"""Shared fixtures. Helpers live in ``optical.testing``: files here cannot import one another."""

import os

import pytest
import torch

# TRITON_INTERPRET is read when kernels are decorated, so interpreted tests need their own process.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpreter"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill every uninitialised tensor with NaN, so that reading one cannot go unnoticed."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(-77)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
