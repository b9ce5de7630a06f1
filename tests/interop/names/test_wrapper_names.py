"""Names that wrappers put into files are read without them.

The wrappers are torch.compile, FSDP, checkpointed activations and DataParallel.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.merge.files import merge_checkpoint

BASE = {"layers": {"0": {"q": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}}}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(3, 4)})])

    def forward(self, x):
        return self.layers[0]["q"](x)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder of the real PEFT, and its tensors."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["layers.0.q"], init_weights=False)
    peft.get_peft_model(Net(), config).save_pretrained(folder)
    return folder, load_file(folder / "adapter_model.safetensors")


FORMS = {
    "compiled inside": "base_model.model._orig_mod.layers.0.q",
    "compiled outside": "_orig_mod.base_model.model.layers.0.q",
    "compiled layer": "base_model.model.layers.0._orig_mod.q",
    "checkpointed and sharded": (
        "base_model.model.layers._fsdp_wrapped_module.0._checkpoint_wrapped_module.q"
    ),
    "DataParallel outside": "module.base_model.model.layers.0.q",
    "DataParallel inside": "base_model.model.module.layers.0.q",
}


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_with_wrapped_names_is_that_without(form, adapter, tmp_path):
    folder, tensors = adapter
    plain = "base_model.model.layers.0.q"
    save_file(
        {key.replace(plain, FORMS[form]): t for key, t in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    text = (folder / "adapter_config.json").read_text()
    if "inside" in form:
        text = text.replace("layers.0.q", FORMS[form].removeprefix("base_model.model."))
    (tmp_path / "adapter_config.json").write_text(text)
    loaded = interop.load_peft(tmp_path, BASE)
    again = interop.to_peft_state_dict(loaded)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_with_wrapped_names_is_that_without(form, tmp_path):
    """Also where its alpha follows from a pattern for its whole name."""
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    lora = interop.save_lora(tmp_path, loha_jax.inject(BASE, config, key=jax.random.key(0)))
    plain, path = "base_model.model.layers.0.q", tmp_path / "adapter_model.safetensors"
    found = []
    for key in (plain, FORMS[form]):
        name = key.removeprefix("base_model.model.") if "inside" in form else "layers.0.q"
        save_file({old.replace(plain, key): t for old, t in lora.tensors.items()}, path)
        settings = {"alpha_pattern": {}, "use_rslora": True}
        if "DataParallel" in form:  # whose names the config's patterns have too
            settings |= {"r": 2, "rank_pattern": {name: 3}}
        text = json.dumps({**lora.config, **settings, "target_modules": [name]})
        (tmp_path / "adapter_config.json").write_text(text)
        leaf = interop.load_lora(tmp_path, BASE)["layers"]["0"]["q"]["kernel"]
        found.append(
            (leaf.adapters["default"].alphas, np.asarray(loha_jax.merge({"q": leaf})["q"]))
        )
    assert found[0][0] == found[1][0] == (3 * 3**0.5,)
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
def test_a_base_checkpoint_with_wrapped_names(prefix, tmp_path):
    """A base checkpoint with wrapped names is read and stays a base."""
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    bias = np.arange(4, dtype=np.float32)
    save_file(
        {f"{prefix}layers.0.q.weight": weight, f"{prefix}layers.0.q.bias": bias},
        tmp_path / "model.safetensors",
    )
    loaded = interop.load_base(tmp_path / "model.safetensors", BASE)
    np.testing.assert_array_equal(loaded["layers"]["0"]["q"]["kernel"], weight.T)
    np.testing.assert_array_equal(loaded["layers"]["0"]["q"]["bias"], bias)
    interop.save_merged(tmp_path / "out", loaded, base=tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        load_file(tmp_path / "out/model.safetensors")["layers.0.q.weight"], weight
    )


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_merge_keeps_the_names_of_its_base(dtype, adapter, tmp_path):
    folder, tensors = adapter
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    save_file({"_orig_mod.layers.0.q.weight": weight}, tmp_path / "model.safetensors")
    merge_checkpoint(tmp_path / "model.safetensors", [(folder, 1.0)], tmp_path / "out", dtype=dtype)
    factors = {key.rpartition(".")[2]: t.astype(np.float64) for key, t in tensors.items()}
    delta = (
        factors["hada_w1_a"]
        @ factors["hada_w1_b"]
        * (factors["hada_w2_a"] @ factors["hada_w2_b"])
        * 2
    )
    (file,) = (tmp_path / "out").glob("*.safetensors")
    (found,) = load_file(file).items()
    assert found[0] == "_orig_mod.layers.0.q.weight"
    np.testing.assert_allclose(
        found[1], weight + delta, rtol=2e-3 if dtype else 1e-6, atol=1e-3 if dtype else 1e-6
    )


def test_a_tree_with_a_module_called_module_keeps_it(tmp_path):
    base = {"module": copy.copy(BASE)}
    config = LoHaConfig(r=2, target_modules=["module.layers.0.q"], init_weights=False)
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    interop.save_peft(tmp_path, params)
    again = interop.to_peft_state_dict(interop.load_peft(tmp_path, base))
    assert all(key.startswith("base_model.model.module.layers") for key in again)


def test_keys_that_differ_by_wrappers_alone_are_refused(adapter, tmp_path):
    folder, tensors = adapter
    key = next(iter(tensors))
    save_file({**tensors, f"_orig_mod.{key}": tensors[key]}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(interop.FileError, match="without the names of torch's wrappers"):
        interop.load_peft(tmp_path, BASE)
