"""Fixtures for tests that need a network but no training, and the document of `compatibility.py`."""

import pytest
from compatibility import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_sessionfinish,
)
from tiny import build_network

from nnunet_nmsw.network import NMSWNetwork


@pytest.fixture
def tiny_network() -> NMSWNetwork:
    """The network of the default tiny plans, in evaluation mode."""
    return build_network().eval()
