"""PEFT's folders: names of files and keys, dtypes, configs and model cards."""

import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_samples import two_kernels
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.disk.tensor_files import safetensors_bytes


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"{key}.default",
        lambda key: f"{key.removeprefix('base_model.model.')}.style",
    ],
)
def test_keys_without_the_prefix_or_with_an_adapters_name_load(tmp_path, rename):
    base, params = two_kernels(tmp_path)
    state = {rename(key): value for key, value in interop.to_peft_state_dict(params).items()}
    loaded = interop.from_peft_state_dict(
        state, LoHaConfig(r=2, target_modules=["lin0", "lin1"]), base
    )
    jax.tree.map(np.testing.assert_array_equal, loha_jax.merge(loaded), loha_jax.merge(params))


@pytest.mark.parametrize("content", [b"", b"not a file", b"\x08\0\0\0\0\0\0\0{}"])
def test_broken_files_are_named(tmp_path, content):
    base, _ = two_kernels(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        interop.load_peft(tmp_path, base)


def test_missing_files_are_named(tmp_path):
    base, _ = two_kernels(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Can't find 'adapter_config\.json' at"):
        interop.load_peft(tmp_path / "nowhere", base)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"'adapter_model\.safetensors' or 'adapter_model\.bin'"
    ):
        interop.load_peft(tmp_path, base)


def test_saving_replaces_files_whole(tmp_path, monkeypatch):
    """Saving replaces files whole and leaves nothing beside them."""
    _, params = two_kernels(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    trainable, frozen = loha_jax.partition(params)
    more = loha_jax.combine(jax.tree.map(lambda x: x + 1, trainable), frozen)
    with pytest.raises(OSError, match="No space left"):
        interop.save_peft(tmp_path, more)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    interop.save_peft(tmp_path, more)
    assert {p.name for p in tmp_path.iterdir()} == set(before)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before[
        "adapter_model.safetensors"
    ]
    os.umask(umask := os.umask(0))
    mode = (tmp_path / "adapter_model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o666 & ~umask  # not that of a temporary file


def test_nothing_is_written_where_nothing_can_be(tmp_path):
    _, params = two_kernels(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        interop.save_peft(tmp_path / "adapter_config.json", params)
    with pytest.raises(ValueError, match="no adapter to save"):
        interop.save_peft(tmp_path / "new", loha_jax.unload(params))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_low_precision_files_load_into_float32_factors(tmp_path, dtype):
    base, _ = two_kernels(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    low = {k: np.asarray(jnp.asarray(v, dtype)) for k, v in load_file(path).items()}
    save_file(low, path)
    leaf = interop.load_peft(tmp_path, base)["lin0"]["kernel"]
    assert leaf.adapters["default"].hada_w1_a.dtype == jnp.float32
    np.testing.assert_array_equal(
        leaf.adapters["default"].hada_w1_a,
        low["base_model.model.lin0.hada_w1_a"].astype(np.float32),
    )


def test_transposed_arrays_are_written_in_c_order(tmp_path):
    turned = safetensors_bytes({"x": np.asfortranarray(np.arange(6.0).reshape(2, 3))}, {})
    (tmp_path / "x").write_bytes(turned)
    np.testing.assert_array_equal(load_file(tmp_path / "x")["x"], np.arange(6.0).reshape(2, 3))


def test_the_folder_of_another_adapter_type_is_refused(tmp_path):
    base, _ = two_kernels(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'LORA' adapter"):
        interop.load_peft(tmp_path, base)
    shutil.rmtree(tmp_path)


def test_a_model_card_is_written_once_and_an_authors_own_stays(tmp_path):
    _, params = two_kernels(
        tmp_path / "new", base_model_name_or_path="org/base", task_type="CAUSAL_LM"
    )
    card = (tmp_path / "new" / "README.md").read_text()
    assert card.startswith(
        '---\nbase_model: "org/base"\nlibrary_name: peft\npipeline_tag: text-generation\n'
    )
    assert card.endswith("### Framework versions\n\n- PEFT 0.21.2\n")
    (tmp_path / "new" / "README.md").write_text("mine")
    interop.save_peft(tmp_path / "new", params)
    assert (tmp_path / "new" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_diffusers_and_transformers_variants_load(tmp_path, prefix):
    """diffusers' `save_lora_adapter`: one file, keys without a prefix, the config in the header."""
    base, params = two_kernels(tmp_path / "peft")
    state = {
        prefix + k.removeprefix("base_model.model."): v
        for k, v in interop.to_peft_state_dict(params).items()
    }
    # transformers leaves the base's name empty and the adapter trainable
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config |= {"inference_mode": False, "base_model_name_or_path": ""}
    (tmp_path / "diffusers").mkdir()
    path = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    save_file(state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    loaded = interop.load_peft(tmp_path / "diffusers", base)
    jax.tree.map(np.testing.assert_array_equal, loha_jax.merge(loaded), loha_jax.merge(params))
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="no adapter configuration in its header"):
        interop.load_peft(tmp_path / "diffusers", base)
    save_file(state, path, {"lora_adapter_metadata": json.dumps(config | {"peft_type": "LORA"})})
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors: .*'LORA'"):
        interop.load_peft(tmp_path / "diffusers", base)


def test_unknown_keys_of_a_newer_config_are_reported(tmp_path):
    base, _ = two_kernels(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_khatri_rao": True}))
    with pytest.warns(UserWarning, match=r"Unexpected keys \['use_khatri_rao'\]"):
        interop.load_peft(tmp_path, base)
