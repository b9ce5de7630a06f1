"""The peers in PyTorch: frozen base, PEFT's LoHa and LoRA, LyCORIS' LoHa, each on its own copy.

The copies share the base's weights. A peer whose package is missing is left out. On a GPU, float32
products may use TF32, as they do in JAX.
"""

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import (
    FORWARD,
    LYCORIS_BYPASS,
    LYCORIS_REBUILD,
    PEFT_LOHA,
    PEFT_LORA,
    TORCH_FROZEN,
    Adapter,
    NotInstalled,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = True


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """A frozen model.

    Attributes:
        module: on `DEVICE`; its parameters take no gradient.
        inputs: of the module's forward. Those that take a gradient are the input that gradients go
            back to; where there is none, see `require_output_gradient`.
        loss: a scalar, from the module's outputs.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    loss: Callable[[Any], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model with an adapter, or none.

    Attributes:
        module: what is called.
        trained: the adapter's parameters.
    """

    model: TorchModel
    module: torch.nn.Module
    trained: tuple[torch.nn.Parameter, ...]

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.trained)

    def runner(self, kind: str) -> Callable[[], None]:
        """A forward pass or a training step; it returns when the work is done."""
        return self.forward if kind == FORWARD else self.step

    def forward(self) -> None:
        self.module.eval()
        with torch.no_grad():
            self.module(**self.model.inputs)
        synchronize()

    def step(self) -> None:
        self.module.train()
        for tensor in (*self.trained, *self.model.inputs.values()):
            tensor.grad = None
        self.model.loss(self.module(**self.model.inputs)).backward()
        synchronize()

    def flops(self, kind: str) -> int:
        """FLOPs of the products and convolutions of one run, by PyTorch's own counter.

        Raises:
            RuntimeError: a training step leaves a parameter without a gradient.
        """
        with FlopCounterMode(display=False) as counter:
            self.runner(kind)()
        if kind != FORWARD and any(p.grad is None for p in self.trained):
            raise RuntimeError("the adapter is not trained: parameters without a gradient")
        return counter.get_total_flops()


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def require_output_gradient(module: torch.nn.Module) -> None:
    """Has gradients go back to this module's output (an embedding's)."""
    module.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())


def peer(name: str, model: TorchModel, adapter: Adapter) -> Peer:
    """Builds a peer.

    Raises:
        NotInstalled: its package is not there.
    """
    try:
        wrapped, network = _PEERS[name](fresh_copy(model.module), adapter)
    except ImportError as error:
        raise NotInstalled(f"{name}: {error}") from error
    return Peer(model, wrapped, tuple(p for p in network.parameters() if p.requires_grad))


def fresh_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Other modules, the very same weights."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _frozen(module: torch.nn.Module, adapter: Adapter) -> tuple[torch.nn.Module, torch.nn.Module]:
    return module, module


def peft_config(adapter: Adapter) -> Any:
    """The adapter as PEFT takes it."""
    import peft

    return peft.LoHaConfig(
        r=adapter.rank,
        alpha=adapter.alpha,
        target_modules=list(adapter.targets),
        use_effective_conv2d=adapter.cp,
    )


def _peft_loha(
    module: torch.nn.Module, adapter: Adapter
) -> tuple[torch.nn.Module, torch.nn.Module]:
    import peft

    model = peft.get_peft_model(module, peft_config(adapter))  # type: ignore[arg-type]  # any module will do
    return model, model


def _peft_lora(
    module: torch.nn.Module, adapter: Adapter
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """LoRA of the rank that has as many parameters: 2r, less where LoHa has cores."""
    import peft

    shapes = [
        tuple(module.get_parameter(f"{name}.weight").shape) for name in _targets(module, adapter)
    ]
    loha = sum(_loha_parameters(shape, adapter) for shape in shapes)
    rank_one = sum(shape[0] + math.prod(shape[1:]) for shape in shapes)
    rank = max(round(loha / rank_one), 1)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(adapter.targets))
    model = peft.get_peft_model(module, config)  # type: ignore[arg-type]
    return model, model


def _loha_parameters(shape: tuple[int, ...], adapter: Adapter) -> int:
    out, into, *kernel = shape
    positions = math.prod(kernel)
    if adapter.cp and positions > 1:
        return 2 * (adapter.rank * (out + into) + adapter.rank**2 * positions)
    return 2 * adapter.rank * (out + into * positions)


def _lycoris(
    module: torch.nn.Module, adapter: Adapter, *, bypass: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    # Not `create_lycoris`: it takes its targets from the presets that come with it, or from a file.
    import lycoris.logging
    from lycoris.wrapper import LycorisNetwork

    lycoris.logging.logger.setLevel(logging.WARNING)
    targets = _targets(module, adapter)
    LycorisNetwork.apply_preset(
        {
            "enable_conv": True,
            "target_module": [],
            "target_name": [name.replace(".", r"\.") + "$" for name in targets],
            "module_algo_map": {},
            "name_algo_map": {},
        }
    )
    network = LycorisNetwork(
        module,
        lora_dim=adapter.rank,
        conv_lora_dim=adapter.rank,
        alpha=adapter.alpha,
        conv_alpha=adapter.alpha,
        use_tucker=adapter.cp,
        network_module="loha",
        bypass_mode=bypass,
    )
    if len(network.loras) != len(targets):
        raise RuntimeError(f"LyCORIS adapts {len(network.loras)} modules of {len(targets)}")
    network.apply_to()
    return module, network.to(DEVICE)


def _targets(module: torch.nn.Module, adapter: Adapter) -> list[str]:
    """Full names of the adapted modules, by PEFT's rule."""
    return [
        name
        for name, _ in module.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in adapter.targets)
    ]


_PEERS: dict[str, Callable[[torch.nn.Module, Adapter], tuple[torch.nn.Module, torch.nn.Module]]] = {
    TORCH_FROZEN: _frozen,
    PEFT_LOHA: _peft_loha,
    PEFT_LORA: _peft_lora,
    LYCORIS_REBUILD: functools.partial(_lycoris, bypass=False),
    LYCORIS_BYPASS: functools.partial(_lycoris, bypass=True),
}
