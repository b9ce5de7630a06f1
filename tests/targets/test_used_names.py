"""Patterns of `names=` that match nothing."""

import jax
import numpy as np
import pytest

import loha_jax

BASE = {"attn": {"query": {"kernel": np.ones((4, 4), np.float32)}, "norm": {"scale": np.ones(4)}}}
CONFIG = loha_jax.LoHaConfig(r=1, target_modules=["query"])


def test_a_pattern_that_matches_nothing_is_a_warning_with_the_nearest_names():
    names = {r"attn\.querry": "q_proj", r"attn\.norm": "ln"}
    with pytest.warns(UserWarning, match=r"'attn.*querry', which match no module.*attn\.query"):
        params = loha_jax.inject(BASE, CONFIG, key=jax.random.key(0), names=names)
    assert params["attn"]["query"]["kernel"].names == ("attn.query",)


def test_patterns_that_match_are_quiet():
    """A warning is an error in these tests. Leaves that are no kernels count too."""
    names = {r"attn\.quer.": "attn.query", r".*norm": "ln"}
    loha_jax.inject(BASE, CONFIG, key=jax.random.key(0), names=names)
