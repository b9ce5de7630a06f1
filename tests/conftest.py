"""Settings of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser):
    group = parser.getgroup("parity", "generated cases beside the real PEFT (tests/parity/test_harness.py)")
    group.addoption("--parity-seed", type=int, default=0, help="seed of the cases")
    group.addoption("--parity-cases", type=int, default=300, help="how many in all")


def pytest_report_header(config):
    return f"parity cases: --parity-seed {config.option.parity_seed} --parity-cases {config.option.parity_cases}"


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
