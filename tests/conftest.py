"""Fixtures for tests that need a network but no training."""

import pytest
from tiny import build_network

from nnunet_nmsw.network import NMSWNetwork


@pytest.fixture
def tiny_network() -> NMSWNetwork:
    """The network of the default tiny plans, in evaluation mode."""
    return build_network().eval()
