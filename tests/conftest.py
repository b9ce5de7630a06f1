"""Settings of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
