"""A flat dictionary of torch's names beside the module that it comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from safetensors.flax import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(4, 4, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.layers = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4, bias=False)})]
        )

    def forward(self, x):
        return self.layers[0]["q_proj"](torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


def test_torchs_names_square_weights_and_the_real_peft(tmp_path):
    torch.manual_seed(0)
    module = Net().eval()
    save_file(
        {name: jnp.asarray(t.numpy()) for name, t in module.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    flat = load_file(tmp_path / "m.safetensors")
    config = LoHaConfig(r=2, target_modules=["q_proj", "conv1"], init_weights=False)
    adapted = loha_jax.inject(flat, config, key=jax.random.key(0))
    assert adapted["layers.0.q_proj.weight"].layout.word == "oi"
    assert adapted["conv1.weight"].layout.word == "oikk"
    interop.save_peft(tmp_path / "adapter", adapted)
    opened = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").merge_and_unload()
    merged = loha_jax.merge(adapted)
    for name, tensor in opened.state_dict().items():
        np.testing.assert_allclose(merged[name], tensor.numpy(), atol=1e-6, err_msg=name)
    interop.save_merged(tmp_path / "out", adapted, base=tmp_path / "m.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, load_file(tmp_path / "out/model.safetensors"), merged
    )
