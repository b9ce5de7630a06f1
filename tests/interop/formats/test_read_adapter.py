"""Every kind of adapter file, read without a model."""

import json

import numpy as np
import pytest
from leaves import loha_leaves
from lycoris_modules import factors, written
from lycoris_samples import DATA, FORMS, LAYERS, LAYOUTS, base_params, native
from peft_samples import NAMES, Sample
from safetensors.numpy import save_file

from loha_jax import LoHaConfig, interop
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.runtime.untrusted import FileError


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_without_a_model(form):
    path, state = native(form)
    file = read_adapter(path)
    assert (file.form, file.config, file.others) == ("lycoris", {}, {})
    assert file.metadata == {"note": f"lycoris 4.1.3 native {form}"}
    assert {m.name for m in file.modules.values()} == {name.replace(".", "_") for name in LAYERS}
    assert {m.name for m in read_adapter(path, modules=LAYERS).modules.values()} == set(LAYERS)
    for own, module in file.modules.items():
        linear = own.rpartition("_")[2] not in ("conv3", "gconv", "c1d", "c3d")
        assert (module.kind, module.prefix, module.r, module.alpha) == (
            "loha",
            "lycoris_",
            *((4, 2) if linear else (3, 1)),
        )
        assert (module.dora_scale is None) == (not form.startswith("dora"))
        for part, tensor in module.tensors.items():
            theirs = state[f"{own}.{part}"]
            assert tensor.shape == theirs.shape + (1,) * (
                own.endswith("c1d") and part.startswith("hada_t")
            )
            np.testing.assert_array_equal(tensor.reshape(theirs.shape), theirs)


def test_a_kohya_file_and_its_components_without_a_model():
    file = read_adapter(
        DATA / "kohya_tucker.safetensors", modules=["conv_in", "up_blocks.1.resnets.1.conv2"]
    )
    assert file.form == "kohya"
    assert {m.prefix for m in file.modules.values()} == {"lora_unet_", "lora_te_"}
    module = file.modules["lora_unet_up_blocks_1_resnets_1_conv2"]
    assert (module.name, module.r, module.alpha) == ("up_blocks.1.resnets.1.conv2", 2, 1)
    assert all(tensor.dtype == np.float16 for tensor in module.tensors.values())
    assert (
        file.modules["lora_te_text_model_encoder_layers_0_mlp_fc1"].name
        == "text_model_encoder_layers_0_mlp_fc1"
    )


def test_normalisation_layers_without_a_model(tmp_path):
    norm = {"w_norm": np.ones(3, np.float32), "b_norm": np.zeros(3, np.float32)}
    file = read_adapter(written(tmp_path, {"lycoris_q": factors(), "lycoris_norm": norm}))
    assert list(file.modules) == ["lycoris_q"]
    assert {key: list(value) for key, value in file.others.items()} == {
        "lycoris_norm.w_norm": [1, 1, 1],
        "lycoris_norm.b_norm": [0, 0, 0],
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_folder_is_read_without_a_model(name):
    sample = Sample(name)
    file = read_adapter(sample.adapter)
    assert (file.form, file.path) == ("peft", sample.adapter)
    config = LoHaConfig.from_pretrained(sample.adapter)
    assert file.config == config.to_dict()
    tensors = {
        f"{m}.{part}": t for m, module in file.modules.items() for part, t in module.tensors.items()
    }
    tensors |= file.others
    assert {f"base_model.model.{key}" for key in tensors} == sample.state.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, sample.state[f"base_model.model.{key}"])
    params = interop.load_peft(sample.adapter, sample.params(), layouts=sample.layouts)
    for leaf in loha_leaves(params):
        adapter = leaf.adapters["default"]
        found = [file.modules[n] for n in leaf.names]
        assert [(m.r, m.alpha) for m in found] == list(
            zip(adapter.ranks, adapter.alphas, strict=True)
        )


def test_a_folder_whose_config_and_tensors_disagree(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((DATA / "peft_plain" / name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(
        FileError, match=r"adapter_model\.safetensors: the factors of .* have rank 4, .* says 5"
    ):
        read_adapter(tmp_path)


def test_a_torch_pickle_is_read_too(tmp_path):
    torch = pytest.importorskip(
        "torch", reason="a .pt file is a torch pickle; the main test run has torch"
    )
    state = native("tucker")[1]
    torch.save(
        {key: torch.from_numpy(value.copy()) for key, value in state.items()},
        tmp_path / "adapter.pt",
    )
    params = interop.load_lycoris(tmp_path / "adapter.pt", base_params(), layouts=LAYOUTS)
    for key, tensor in interop.to_lycoris_state_dict(params).items():
        np.testing.assert_array_equal(tensor, state[key])


def test_nothing_and_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_adapter(tmp_path / "nowhere.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FileError, match=r"empty\.safetensors: the file holds no tensor"):
        read_adapter(tmp_path / "empty.safetensors")
