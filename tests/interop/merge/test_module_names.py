"""Modules of an adapter and the weights of a base that they are merged into."""

import re

import numpy as np
import pytest
from merge_inputs import read_all
from quantised_bases import SHAPE, adapter, normal, write

from loha_jax.interop.commands.convert import convert_adapter
from loha_jax.interop.disk.tensor_files import safetensors_bytes
from loha_jax.interop.merge.files import merge_checkpoint


def kohya(folder, prefixes, shape=(8, 8)):
    state = {}
    for prefix in prefixes:
        for n in "12":
            state |= {
                f"{prefix}q.hada_w{n}_a": normal(shape[0], 2),
                f"{prefix}q.hada_w{n}_b": normal(2, shape[1]),
            }
        state[f"{prefix}q.alpha"] = np.float32(2)
    folder.write_bytes(safetensors_bytes(state, {}))
    return folder


def test_two_text_encoders_are_not_added_up(tmp_path):
    base = write(tmp_path / "base", {"q.weight": normal(8, 8)})
    path = kohya(tmp_path / "a.safetensors", ["lora_te1_", "lora_te2_"])
    with pytest.raises(ValueError, match=r"lora_te1_q and lora_te2_q are both q\.weight"):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    with pytest.raises(ValueError, match="lora_te1_q and lora_te2_q are both q"):
        convert_adapter(path, tmp_path / "out.safetensors", "kohya", base=base)
    assert merge_checkpoint(base, [(path, 1.0)], tmp_path / "out", only="lora_te1_.*").merged == 1


def test_names_that_give_two_modules_one_name_are_refused(tmp_path):
    base = write(tmp_path / "base", {"q.weight": normal(*SHAPE)})
    path, _ = adapter(tmp_path / "adapter", names=("a.q", "b.q"))
    names = {r"[ab]\.q": "q"}
    with pytest.raises(ValueError, match=r"a\.q and b\.q are both q\.weight"):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out", names=names)
    with pytest.raises(ValueError, match=r"a\.q and b\.q"):
        convert_adapter(path, tmp_path / "out", "peft", names=names)


def test_modules_that_were_renamed(tmp_path):
    """transformers 4.52 moved a vision-language model's parts into `model`."""
    weight = normal(*SHAPE)
    new = "model.language_model.layers.0.q_proj"
    base = write(
        tmp_path / "base",
        {f"{new}.weight": weight, "model.visual.blocks.0.q_proj.weight": normal(*SHAPE)},
    )
    old = ("language_model.model.layers.0.q_proj", "visual.blocks.0.q_proj")
    path, delta = adapter(tmp_path / "adapter", names=old)
    advice = {r"language_model\.model\.(.*)": r"model.language_model.\1"}
    with pytest.raises(ValueError, match=re.escape(f"`names={advice}` renames modules")):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    names = {
        r"language_model\.model\.(.*)": r"model.language_model.\1",
        r"visual\.(.*)": r"model.visual.\1",
    }
    assert merge_checkpoint(base, [(path, 1.0)], tmp_path / "out", names=names).merged == 2
    np.testing.assert_allclose(
        read_all(tmp_path / "out")[f"{new}.weight"], weight + delta, rtol=1e-5, atol=1e-5
    )
    for base_path in (None, base):
        target = tmp_path / f"converted{base_path is None}"
        done = convert_adapter(path, target, "peft", names=names, base=base_path)
        assert list(done.modules) == [new, "model.visual.blocks.0.q_proj"]
        merge_checkpoint(base, [(target, 1.0)], tmp_path / f"out{base_path is None}")
        again = read_all(tmp_path / f"out{base_path is None}")
        np.testing.assert_array_equal(
            again[f"{new}.weight"], read_all(tmp_path / "out")[f"{new}.weight"]
        )
