"""A process of `test_torchax`: trains torchax' dictionary and function of a torch module.

PEFT opens the adapter. torchax is not for the tests' own process: its import gives torch another
device, beside which `torch.random.fork_rng()` fails.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import torchax
from framework_training import check_base_and_products, trained

import loha_jax
from loha_jax import LoHaConfig, interop


class Net(torch.nn.Module):
    """Looks up, convolves, normalises and multiplies."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 32)
        self.conv = torch.nn.Conv1d(32, 32, 3, padding=1)
        self.up, self.norm = torch.nn.Linear(32, 64), torch.nn.LayerNorm(64)
        self.down = torch.nn.Linear(64, 32)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.down(self.norm(torch.nn.functional.gelu(self.up(x))))


def main(folder: Path):
    torch.manual_seed(0)
    net = Net().eval()
    base, theirs = torchax.extract_jax(net)
    before = jax.tree.map(np.array, base)
    run = loha_jax.adapt(lambda params, ids: theirs(params, (ids,)))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)))
    config = LoHaConfig(r=2, alpha=8, target_modules=["conv", "up", "down"], init_weights=False)
    adapted = loha_jax.inject(base, config, key=jax.random.key(0))
    adapted = trained(adapted, lambda params: ((run(params, ids) - 1) ** 2).mean())
    check_base_and_products(lambda params, ids: theirs(params, (ids,)), adapted, before, ids)

    outputs = run(base, ids), run(adapted, ids)  # before PEFT changes the module
    interop.save_peft(folder, adapted)
    with torch.no_grad():
        ids_in_torch = torch.tensor(np.array(ids)).long()
        plain = net(ids_in_torch).numpy()
        opened = peft.PeftModel.from_pretrained(net, folder)(ids_in_torch).numpy()
    np.testing.assert_allclose(outputs[0], plain, atol=1e-5)
    np.testing.assert_allclose(outputs[1], opened, atol=1e-5)
    assert np.abs(opened - plain).max() > 0.1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
