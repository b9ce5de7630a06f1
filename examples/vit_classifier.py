"""A small ViT that knows 0 to 4 learns 5 to 9, with PEFT's settings for image classification.

LoHa on query and value, and a new classifier that is trained and saved whole (`modules_to_save`).
The model is transformers' FlaxViTForImageClassification, used as it is; where torch and peft are
installed, PEFT opens the adapter in its PyTorch twin. Data and baselines: those of
digits_convnet.py.

    python examples/vit_classifier.py [--quick]

It takes 50 s on two cores (--quick: 21 s). It needs `pip install -e ".[examples]"`.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import missing, run_example, show_results
from digits_convnet import Pictures, load_pictures, regression_accuracy, size
from report import console
from transformers import FlaxViTForImageClassification, FlaxViTModel, ViTConfig

import loha_jax
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone

logging.disable(logging.WARNING)  # transformers would say that this release is the last with Flax

LOHA = loha_jax.LoHaConfig(
    r=8, alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
)
PRETRAIN_RATE, LOHA_RATE, FULL_RATE = (
    1e-3,
    3e-2,
    3e-3,
)  # the last two from a few tried on validation pictures

# 16 patches of 4x4 of a digit enlarged to 16x16.
CONFIG = ViTConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    image_size=16,
    patch_size=4,
    num_channels=1,
    num_labels=5,
    hidden_dropout_prob=0.0,
    initializer_range=0.1,
)

SHAPE = (1, 16, 16, 1)

Params = Any


def enlarged(pictures: Pictures) -> Pictures:
    """[n, 8, 8, 1] as [n, 1, 16, 16], which is how transformers' models take pictures."""
    return pictures[0].repeat(2, 1).repeat(2, 2).transpose(0, 3, 1, 2), pictures[1]


def train(
    model: Any,
    params: Params,
    pictures: Pictures,
    validation: Pictures,
    rate: float,
    steps: int,
    seed: int,
    full: bool,
) -> tuple[Params, list[tuple[int, float]]]:
    """Trains adapter and classifier, or (`full`) all; returns them and validation accuracies."""
    # ----------------------------------------------------------------------------------------------
    logits = loha_jax.adapt(
        lambda params, images: model(images, params=params).logits
    )  # no ΔW is built
    nothing = jax.tree.map(lambda _: None, params)
    trainable, frozen = (params, nothing) if full else loha_jax.partition(params)
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps))
    opt_state = tx.init(trainable)

    @jax.jit
    def train_step(trainable, opt_state, frozen, images, labels):
        def loss_fn(trainable):
            scores = logits(loha_jax.combine(trainable, frozen), images)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(trainable), opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    # ----------------------------------------------------------------------------------------------
    rng, curve = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        rows = rng.integers(0, len(pictures[1]), 32)
        trainable, opt_state = train_step(
            trainable, opt_state, frozen, pictures[0][rows], pictures[1][rows]
        )
        if step % (steps // 10) == 0:
            curve.append((step, accuracy(model, loha_jax.combine(trainable, frozen), validation)))
    return loha_jax.combine(trainable, frozen), curve


@partial(jax.jit, static_argnums=0)
def _logits(model: Any, params: Params, images: Any) -> jax.Array:
    return model(images, params=params).logits


def predict(model: Any, params: Params, images: np.ndarray) -> np.ndarray:
    """The logits of adapted or plain parameters."""
    return np.asarray(_logits(model, loha_jax.merge(params), images))


def features(base: Params, images: np.ndarray) -> np.ndarray:
    """The classifier's input from the frozen model: its first token."""
    encoder = FlaxViTModel(CONFIG, input_shape=SHAPE, add_pooling_layer=False, _do_init=False)
    return np.asarray(encoder(images, params=base["vit"]).last_hidden_state[:, 0])  # type: ignore[attr-defined]


def accuracy(model: Any, params: Params, pictures: Pictures) -> float:
    """The share of pictures whose label the model finds."""
    return float((predict(model, params, pictures[0]).argmax(1) == pictures[1]).mean())


def logits_in_torch(base: Params, adapter: Path, images: np.ndarray) -> np.ndarray:
    """The logits of PyTorch's ViT with the adapter that PEFT opens."""
    import torch
    from peft import PeftModel
    from transformers import ViTForImageClassification
    from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model

    writable = jax.tree.map(np.array, base)  # JAX's arrays are not, which torch warns of
    module = load_flax_weights_in_pytorch_model(ViTForImageClassification(CONFIG), writable)
    module = PeftModel.from_pretrained(module, adapter).eval()
    with torch.inference_mode():
        return module(torch.tensor(images)).logits.numpy()


def run(options: argparse.Namespace) -> None:
    """Pretrains, adapts, compares, saves."""
    steps = 30 if options.quick else 400
    low, few, validation, test = map(enlarged, load_pictures(options.seed))
    model = FlaxViTForImageClassification(CONFIG, input_shape=SHAPE, seed=options.seed)
    console.print("Pretraining on 0 to 4")
    base, _ = train(
        model, model.params, low, low, PRETRAIN_RATE, 2 * steps, options.seed, full=True
    )

    console.print("LoHa on 5 to 9")
    params = loha_jax.inject(base, LOHA, key=jax.random.key(options.seed))
    print(loha_jax.summary(params).totals)
    params, curve = train(
        model, params, few, validation, LOHA_RATE, steps, options.seed, full=False
    )

    console.print("All parameters on 5 to 9")
    full, full_curve = train(
        model, base, few, validation, FULL_RATE, steps, options.seed, full=True
    )

    interop.save_peft(options.out / "adapter", params)
    if packages := missing():
        console.print(f"To have PEFT open the adapter: pip install {packages}")
    else:
        difference = np.abs(
            logits_in_torch(base, options.out / "adapter", test[0])
            - predict(model, params, test[0])
        )
        rows = [["LoHa", float(difference.max())]]
        show_results(
            options.out / "torch.json",
            "Opened by PEFT",
            ["", "largest difference of a logit"],
            rows,
        )

    plot(options.out / "curves.png", curve, full_curve)
    trained = size(loha_jax.partition(params)[0])
    pixels, pixels_size = regression_accuracy(few, test, lambda x: x.reshape(len(x), -1))
    probe, probe_size = regression_accuracy(few, test, partial(features, base))
    rows = [
        ["raw pixels, logistic regression", pixels_size, pixels],
        ["frozen ViT, linear probe", probe_size, probe],
        ["LoHa", trained, accuracy(model, params, test)],
        ["all parameters", size(full), accuracy(model, full, test)],
    ]
    title = f"Accuracy on {len(test[1])} test pictures of 5 to 9, after 100 (seed {options.seed})"
    show_results(options.out / "results.json", title, ["", "parameters trained", "accuracy"], rows)


def plot(path: Path, loha: Any, full: Any) -> None:
    """Draws the validation accuracies."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(*zip(*loha, strict=True), marker="o", label="LoHa and classifier")
    axes.plot(*zip(*full, strict=True), marker="o", label="all parameters")
    axes.set(title="ViT, 100 pictures of 5 to 9", xlabel="step", ylabel="validation accuracy")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_example(run, __doc__, "vit_classifier")
