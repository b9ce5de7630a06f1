"""The frozen models in PyTorch; linear.py, transformers.py and convnet.py have those in JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.torch_peers import DEVICE, TorchModel, cross_entropy, require_output_gradient


def frozen(module: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """The module on the device, with parameters of a dtype that take no gradient."""
    return module.to(DEVICE, getattr(torch, dtype)).requires_grad_(False)


def integers(array: np.ndarray) -> torch.Tensor:
    """Token ids or labels on the device."""
    return torch.tensor(array, dtype=torch.int64, device=DEVICE)


def linear(kernel: np.ndarray, x: np.ndarray, cotangent: np.ndarray, dtype: str) -> TorchModel:
    """One Linear layer, named "layer"."""
    layer = torch.nn.Linear(*kernel.shape, bias=False, device="meta").to_empty(device="cpu")
    layer.load_state_dict({"weight": torch.from_numpy(kernel.T)})
    inputs, towards = (
        torch.tensor(a, device=DEVICE).to(getattr(torch, dtype)) for a in (x, cotangent)
    )
    module = frozen(torch.nn.Sequential(), dtype)
    module.add_module("layer", frozen(layer, dtype))
    return TorchModel(module, {"input": inputs.requires_grad_()}, lambda y: (y * towards).sum())


def llama(config: Any, batch: dict[str, np.ndarray], dtype: str) -> TorchModel:
    """Hugging Face's Llama, with random weights."""
    import transformers

    module = frozen(transformers.LlamaForCausalLM(config), dtype)
    require_output_gradient(module.get_submodule("model.embed_tokens"))
    labels = integers(batch["labels"])
    return TorchModel(
        module, {"input_ids": integers(batch["ids"])}, lambda out: cross_entropy(out.logits, labels)
    )


class SentenceClassifier(torch.nn.Module):
    """The first layers of BERT, its outputs averaged over the tokens, and a linear classifier."""

    def __init__(self, folder: Path, layers: int, classes: int):
        import transformers

        super().__init__()
        self.bert: Any = transformers.BertModel.from_pretrained(
            folder,
            num_hidden_layers=layers,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.classifier = torch.nn.Linear(self.bert.config.hidden_size, classes)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * weights).sum(1) / weights.sum(1))


def minilm(
    folder: Path, layers: int, classes: int, batch: dict[str, np.ndarray], dtype: str
) -> TorchModel:
    """The example's sentence encoder, its first layers, with a classifier."""
    module = frozen(SentenceClassifier(folder, layers, classes), dtype)
    require_output_gradient(module.get_submodule("bert.embeddings"))
    labels = integers(batch["labels"])
    inputs = {name: integers(batch[name]) for name in ("ids", "mask")}
    return TorchModel(module, inputs, lambda logits: cross_entropy(logits, labels))


class Block(torch.nn.Module):
    """Two 3x3 convolutions around a shortcut; the first one and the shortcut take the stride."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.norm1 = torch.nn.GroupNorm(8, into)
        self.conv1 = torch.nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.norm2 = torch.nn.GroupNorm(8, out)
        self.conv2 = torch.nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = torch.nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(torch.relu(self.norm2(y)))


class ConvNet(torch.nn.Module):
    """A stem, one block per width, and a linear classifier."""

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        pairs = zip([widths[0], *widths], widths, strict=False)
        blocks = [Block(into, out, 1 if n == 0 else 2) for n, (into, out) in enumerate(pairs)]
        self.blocks = torch.nn.Sequential(*blocks)
        self.classifier = torch.nn.Linear(widths[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.blocks(self.stem(images))).mean((2, 3)))


def convnet(
    widths: Sequence[int], classes: int, images: np.ndarray, labels: np.ndarray, dtype: str
) -> TorchModel:
    """A small ResNet; `images` are [batch, height, width, channels]."""
    module = frozen(ConvNet(widths, classes), dtype)
    x = (
        torch.tensor(images.transpose(0, 3, 1, 2), device=DEVICE)
        .to(getattr(torch, dtype))
        .requires_grad_()
    )
    targets = integers(labels)
    return TorchModel(module, {"images": x}, lambda logits: cross_entropy(logits, targets))
