"""Stable Diffusion's text encoder and UNet, with the LoHa settings of PEFT's own example.

The models are transformers' FlaxCLIPTextModel and diffusers' FlaxUNet2DConditionModel as they are,
but tiny and with random weights, for no pretrained ones can be had offline. Both adapters are
trained together to take the noise out of pieces of two real photos, which come with scikit-learn,
and are saved as diffusers and PEFT read them; where torch and peft are installed, PEFT opens them
in the PyTorch models. Expect no pictures of it: it shows how, not how well.

    python examples/stable_diffusion_parts.py [--quick]

It takes 2 minutes on two cores (--quick: 38 s). It needs `pip install -e ".[examples]"` and
`pip install --no-deps diffusers==0.39.0`, the last with Flax.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import missing, run_example, show_results
from report import console
from safetensors.numpy import load_file
from sklearn.datasets import load_sample_images
from transformers import CLIPTextConfig, FlaxCLIPTextModel

import loha_jax
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone
from loha_jax.train import fit

if packages := missing({"diffusers": "--no-deps diffusers==0.39.0"}):
    sys.exit(
        f"This example needs more than this Python has: {sys.executable} -m pip install {packages}"
    )
logging.disable(
    logging.WARNING
)  # diffusers and transformers would say that these releases are the last with Flax
from diffusers import FlaxUNet2DConditionModel  # noqa: E402  # pyright: ignore[reportPrivateImportUsage]

# What PEFT's LoHa page gives for Stable Diffusion; the convolutions of the residual blocks are an
# addition.
TEXT_LOHA = loha_jax.LoHaConfig(
    r=8,
    alpha=32,
    target_modules=["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    rank_dropout=0.0,
    module_dropout=0.0,
)
UNET_LOHA = loha_jax.LoHaConfig(
    r=8,
    alpha=32,
    target_modules=[
        *["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
        *["conv1", "conv2", "conv_shortcut"],
    ],
    rank_dropout=0.0,
    module_dropout=0.0,
    use_effective_conv2d=True,  # convolutions larger than 1x1 get the form with cores
)
TEXT_CONFIG = CLIPTextConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 3,  # Stable Diffusion has 4: it works on what an autoencoder makes of a picture
    "out_channels": 3,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
QUICK = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
CAPTIONS = ("a temple", "a flower")
RATE, BATCH = 1e-2, 16
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).astype(
    np.float32
)  # of a picture's variance, after n steps

Params = Any


def batches(count: int, seed: int, held_out: bool = False) -> list[dict[str, np.ndarray]]:
    """Pieces of 16x16 pixels of two photos, with noise; the right quarter of each is held out."""
    rng = np.random.default_rng(seed)
    photos = [np.array(image[:424], np.float32).reshape(106, 4, 160, 4, 3).mean((1, 3)) / 127.5 - 1
              for image in load_sample_images().images]  # fmt: skip
    photos = [photo[:, 120:] if held_out else photo[:, :120] for photo in photos]
    captions = np.array([list(text.ljust(16).encode()) for text in CAPTIONS], np.int32)
    result = []
    for _ in range(count):
        which, t = rng.integers(0, 2, BATCH), rng.integers(0, 1000, BATCH)
        pieces = []
        for n in which:
            y, x = (rng.integers(0, size - 16) for size in photos[n].shape[:2])
            pieces.append(photos[n][y : y + 16, x : x + 16].transpose(2, 0, 1))
        noise = rng.standard_normal((BATCH, 3, 16, 16)).astype(np.float32)
        kept = KEPT[t][:, None, None, None]
        noisy = kept**0.5 * np.stack(pieces) + (1 - kept) ** 0.5 * noise
        result.append(
            {"noisy": noisy, "noise": noise, "t": t.astype(np.int32), "caption": captions[which]}
        )
    return result


def run(options: argparse.Namespace) -> None:
    """Inject, train, save, open in PyTorch."""
    steps = 16 if options.quick else 300
    keys = jax.random.split(jax.random.key(options.seed), 3)
    text_encoder = FlaxCLIPTextModel(TEXT_CONFIG, seed=options.seed)
    config = UNET_CONFIG | QUICK if options.quick else UNET_CONFIG
    unet: Any = FlaxUNet2DConditionModel(**config)
    base = {"text_encoder": text_encoder.params, "unet": jax.jit(unet.init_weights)(keys[0])}

    # ----------------------------------------------------------------------------------------------
    unet_names = interop.NameMap.diffusers()  # Flax's down_blocks_0 is torch's down_blocks.0
    params = {
        "text_encoder": loha_jax.inject(base["text_encoder"], TEXT_LOHA, key=keys[1]),
        "unet": loha_jax.inject(base["unet"], UNET_LOHA, key=keys[2], names=unet_names),
    }

    @loha_jax.adapt  # no ΔW is built
    def predict_noise(params: Params, batch: dict[str, Any]) -> jax.Array:
        text = text_encoder(batch["caption"], params=params["text_encoder"]).last_hidden_state  # type: ignore[attr-defined]
        return unet.apply({"params": params["unet"]}, batch["noisy"], batch["t"], text).sample

    def loss_fn(params: Params, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        return jnp.mean((predict_noise(params, batch) - batch["noise"]) ** 2)

    tx = optax.adam(optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps))
    result = fit(
        loss_fn, params, tx, batches(steps, options.seed), key=jax.random.key(options.seed)
    )  # both parts
    # ----------------------------------------------------------------------------------------------
    params, losses = result.params, [row["loss"] for row in result.history]
    for part, tree in params.items():
        interop.save_peft(options.out / part, tree)
        print(f"{options.out / part}: {loha_jax.summary(tree).totals}")

    test = batches(8, options.seed + 1, held_out=True)
    predict = jax.jit(predict_noise)
    trees = {"base": base, "LoHa": loha_jax.merge(params)}
    predicted = {name: [predict(tree, batch) for batch in test] for name, tree in trees.items()}
    guesses = {
        "no noise at all": [jnp.zeros_like(b["noise"]) for b in test],
        "the noisy piece itself": [b["noisy"] for b in test],
        "frozen random models": predicted["base"],
        "with LoHa": predicted["LoHa"],
    }
    plot(options.out / "denoised.png", losses, test[0], np.asarray(predicted["LoHa"][0]))
    rows = []
    for name, guess in guesses.items():
        rows.append(
            [
                name,
                float(
                    np.mean(
                        [np.mean((g - b["noise"]) ** 2) for g, b in zip(guess, test, strict=True)]
                    )
                ),
            ]
        )
    title = (
        f"Error of a guess of the noise, {BATCH * len(test)} held-out pieces (seed {options.seed})"
    )
    show_results(options.out / "results.json", title, ["", "mean squared error"], rows)

    if packages := missing():
        console.print(f"To have PEFT open both adapters: pip install {packages}")
        return
    ours = {"frozen random models": predicted["base"][0], "with LoHa": predicted["LoHa"][0]}
    theirs = noise_in_torch(options.out, config, base, unet_names, test[0])
    rows = [[name, float(np.abs(theirs[name] - ours[name]).max())] for name in ours]
    show_results(
        options.out / "torch.json",
        "In PyTorch",
        ["", "largest difference of the predicted noise"],
        rows,
    )


def noise_in_torch(
    out: Path, config: dict[str, Any], base: Params, unet_names: Any, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The predictions of PyTorch's models, alone and with the adapters that PEFT opens.

    The two UNets differ by themselves: diffusers' Flax one approximates the gelu and adds another
    epsilon in a norm.
    """
    import torch
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
    from peft import PeftModel
    from transformers import CLIPTextModel

    modules = {
        "text_encoder": CLIPTextModel(TEXT_CONFIG).eval(),
        "unet": UNet2DConditionModel(**config).eval(),
    }
    for part, module in modules.items():
        tensors = torch_tensors(
            out / f"{part}_base", base[part], unet_names if part == "unet" else None
        )
        module.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    tensors = {name: torch.tensor(value) for name, value in batch.items()}

    def noise() -> np.ndarray:
        with torch.inference_mode():
            text = modules["text_encoder"](tensors["caption"].long()).last_hidden_state
            return modules["unet"](tensors["noisy"], tensors["t"].long(), text).sample.numpy()

    frozen = noise()
    for part, module in modules.items():
        modules[part] = PeftModel.from_pretrained(module, out / part).eval()
    return {"frozen random models": frozen, "with LoHa": noise()}


def torch_tensors(folder: Path, params: Params, names: Any) -> dict[str, np.ndarray]:
    """The tensors of a plain tree with the names and shapes of PyTorch."""
    (folder / "model.safetensors").unlink(
        missing_ok=True
    )  # save_merged does not write over weights
    interop.save_merged(folder, params, names=names)
    return load_file(folder / "model.safetensors")


def plot(
    path: Path, losses: list[float], batch: dict[str, np.ndarray], predicted: np.ndarray
) -> None:
    """Draws the loss, and held-out pieces: with noise, and less the noise that is predicted."""
    figure = plt.figure(figsize=(11, 3.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3)).flat  # type: ignore[union-attr]
    axes = left.subplots()
    axes.plot(losses, linewidth=0.5)
    axes.set(title="Training loss", xlabel="step", ylabel="mean squared error")
    right.suptitle("Held-out pieces, little to much noise: noisy, denoised, true")
    order = np.argsort(batch["t"])[::2]
    kept = KEPT[batch["t"]][:, None, None, None]
    pieces = [
        (batch["noisy"] - (1 - kept) ** 0.5 * noise) / kept**0.5
        for noise in (predicted, batch["noise"])
    ]
    for row, images in zip(right.subplots(3, len(order)), [batch["noisy"], *pieces], strict=True):
        for axes, n in zip(row, order, strict=True):
            axes.imshow(np.clip(images[n].transpose(1, 2, 0) / 2 + 0.5, 0, 1))
            axes.axis("off")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_example(run, __doc__, "stable_diffusion_parts")
