"""diffusers itself opens a LoRA, a folder or a file, of an adapted UNet."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from peft_samples import flax_value, torch_value

import loha_jax
from loha_jax import LoHaConfig, interop
from tests.parity.unet import small_unet

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def save_folder(folder, params):
    interop.save_lora(folder, params)
    return {"weight_name": "adapter_model.safetensors", "prefix": "base_model.model"}


def save_file(folder, params):
    lora = interop.save_lora(folder / "a.safetensors", params, form="diffusers", prefix="unet.")
    assert lora.config["rank_pattern"] == {}  # it would scale the others by a wrong rank
    return {"weight_name": "a.safetensors", "prefix": "unet"}


@pytest.mark.parametrize(
    ("save", "cores"),
    [(save_folder, False), (save_folder, True), (save_file, False)],
    ids=["folder-flat", "folder-cores", "file-flat"],
)
def test_a_unet_with_the_lora_computes_what_the_merged_weights_do(save, cores, tmp_path):
    torch.manual_seed(0)
    unet = small_unet().eval()
    kernels = {
        k: v.numpy() for k, v in unet.state_dict().items() if k.endswith(".weight") and v.ndim > 1
    }
    flat = {
        (*key.split(".")[:-1], "kernel"): jnp.asarray(
            flax_value(key.split(".")[:-1], "weight", value)
        )
        for key, value in kernels.items()
    }
    config = LoHaConfig(
        r=2,
        alpha=20,
        target_modules=["to_q", "to_v", "conv1"],
        init_weights=False,
        use_effective_conv2d=cores,
        rank_pattern={"to_v": 3} if save is save_file else {},
    )
    params = loha_jax.inject(
        unflatten_dict(flat), config, key=jax.random.key(0), layouts={r".*\.conv1": "kkio"}
    )
    names = save(tmp_path, params)

    merged = copy.deepcopy(unet)
    weights = flatten_dict(loha_jax.merge(params))
    state = {
        ".".join(path[:-1]) + ".weight": torch.tensor(torch_value(value))
        for path, value in weights.items()
    }
    merged.load_state_dict({**unet.state_dict(), **state})
    unet_with_lora = copy.deepcopy(unet)
    unet_with_lora.load_lora_adapter(tmp_path, local_files_only=True, **names)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with torch.no_grad():
        base, want, got = (
            model(*inputs).sample.numpy() for model in (unet, merged, unet_with_lora)
        )
    assert np.abs(want - base).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
