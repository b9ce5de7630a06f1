"""Warnings of qwix itself."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _deprecated_in_qwix():
    """qwix 0.1.8 uses names of Flax that are deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"qwix\.")
        yield
