"""An adapter whose names differ from the tree's by one prefix: what the error says works."""

import re

import jax
import numpy as np
import pytest

import loha_jax
from loha_jax import LoHaConfig, interop

ONE = np.ones((4, 4), np.float32)
BARE = {"encoder": {"q": {"kernel": ONE}, "k": {"kernel": ONE}}}
WITH_HEAD = {"bert": BARE, "head": {"kernel": np.ones((4, 2), np.float32)}}
CONFIG = LoHaConfig(r=2, target_modules=["q", "k"], init_weights=False)


@pytest.mark.parametrize(("source", "target"), [(BARE, WITH_HEAD), (WITH_HEAD, BARE)])
@pytest.mark.parametrize("kind", ["loha", "lora"])
def test_the_error_says_the_names_to_pass(source, target, kind, tmp_path):
    params = loha_jax.inject(source, CONFIG, key=jax.random.key(0))
    save = interop.save_peft if kind == "loha" else interop.save_lora
    load = interop.load_peft if kind == "loha" else interop.load_lora
    save(tmp_path / "adapter", params)
    with pytest.raises(ValueError, match="All names in the") as error:
        load(tmp_path / "adapter", target)
    pattern, template = re.findall(r"names=\{r'(.*?)': r'(.*?)'\}", str(error.value))[0]
    loaded = load(tmp_path / "adapter", target, names={pattern: template})
    assert loha_jax.adapter_names(loaded) == ("default",)


def test_other_differences_get_no_such_advice(tmp_path):
    interop.save_peft(tmp_path / "a", loha_jax.inject(BARE, CONFIG, key=jax.random.key(0)))
    other = {"decoder": {"q": {"kernel": ONE}, "k": {"kernel": ONE}}}
    with pytest.raises(ValueError, match="missing keys") as error:
        interop.load_peft(tmp_path / "a", other)
    assert "begin with" not in str(error.value)
