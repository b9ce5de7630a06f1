"""An NNX language model learns film reviews; LoHa then teaches it Python's documentation.

The model is an ordinary NNX Transformer, its layers stacked by `nnx.vmap` and run by `nnx.scan`.
`loha_jax.nnx.inject` adapts it in place. Beside it: the frozen model, and training all parameters
on the same batches. What LoHa learned can be switched off again, so that the reviews are not
forgotten.

    python examples/nnx_language_model.py [--quick]

It takes 3 minutes on two cores (--quick: 22 s). It needs `pip install -e ".[examples]"`.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import run_example, show_results
from flax import nnx
from movie_sentences import load
from report import console, training_bar

import loha_jax
import loha_jax.nnx
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone

CONTEXT, BATCH = 128, 16
LOHA = loha_jax.LoHaConfig(
    r=8, alpha=16, target_modules=["query", "key", "value", "out", "up", "down", "head"]
)
# LoHa's: the best of 3e-3, 1e-2, 2e-2 on validation text, with one more layer. All parameters: not
# tuned.
LOHA_RATE, FULL_RATE = 2e-2, 3e-3


class Block(nnx.Module):
    """Attention and a feed-forward net, each after a norm."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, width] to the same."""
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.up_norm(x))))


class LanguageModel(nnx.Module):
    """Logits of the next byte at each position. It knows nothing of LoHa."""

    def __init__(self, layers: int, width: int, heads: int, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, width, rngs=rngs)
        make_layers = nnx.vmap(lambda rngs: Block(width, heads, rngs))
        # One Block whose arrays have a leading axis of layers.
        self.layers = make_layers(rngs.split(layers))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, length] to [batch, length, 256]."""
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.layers, x
        )
        return self.head(self.norm(x))


def loss_fn(model: LanguageModel, windows: Any) -> jax.Array:
    """Cross-entropy in nats per byte; `windows` are bytes, [batch, CONTEXT + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(
        model(windows[:, :-1]), windows[:, 1:]
    ).mean()


evaluate = nnx.jit(loss_fn)


@partial(nnx.jit, static_argnames="wrt")
def train_step(
    model: LanguageModel, optimizer: nnx.Optimizer, windows: Any, wrt: type
) -> jax.Array:
    """One step of the optimizer on the variables of type `wrt`."""
    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, windows)
    optimizer.update(model, grads)
    return loss


def train(
    model: LanguageModel,
    texts: dict[str, np.ndarray],
    rate: float,
    steps: int,
    seed: int,
    wrt: type,
) -> Any:
    """Trains in place; returns `(step, validation loss)` pairs."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 10), steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.0), wrt=wrt)
    rng, curve = np.random.default_rng(seed), [(0, held_out(model, texts["validation"]))]
    with training_bar(steps) as bar:
        for step in range(1, steps + 1):
            starts = rng.integers(0, len(texts["train"]) - CONTEXT, BATCH)
            loss = train_step(
                model, optimizer, texts["train"][starts[:, None] + np.arange(CONTEXT + 1)], wrt
            )
            bar.advance(float(loss))
            if step % max(1, steps // 8) == 0:
                curve.append((step, held_out(model, texts["validation"])))
    return curve


def held_out(model: LanguageModel, text: np.ndarray) -> float:
    """The loss on a text that was not trained on, cut into whole batches of windows."""
    windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    batches = [windows[n : n + 32] for n in range(0, len(windows) - 31, 32)]
    return float(np.mean([evaluate(model, batch) for batch in batches]))


@nnx.jit
def next_byte(model: LanguageModel, window: Any, key: jax.Array) -> jax.Array:
    """A byte that follows [CONTEXT] bytes, sampled."""
    return jax.random.categorical(key, model(window[None])[0, -1] / 0.7)


def write(model: LanguageModel, text: np.ndarray, seed: int) -> str:
    """The text that the model writes after the beginning of `text`."""
    written = list(text[:CONTEXT])
    for key in jax.random.split(jax.random.key(seed), 160):
        written.append(next_byte(model, np.array(written[-CONTEXT:]), key).item())
    return bytes(written[CONTEXT:]).decode(errors="replace")


def split(text: str, size: int) -> dict[str, np.ndarray]:
    """The first 86 % of a text to train with, 4 % to validate, 10 % to test; as bytes."""
    content = np.frombuffer(text.encode()[:size], np.uint8).astype(np.int32)
    train, validation, test = np.split(content, [int(0.86 * len(content)), int(0.9 * len(content))])
    return {"train": train, "validation": validation, "test": test}


def run(options: argparse.Namespace) -> None:
    """Pretrains, adapts in two ways, compares."""
    layers, width, heads = (2, 64, 2) if options.quick else (3, 160, 4)
    pretrain_steps, steps = (50, 30) if options.quick else (450, 150)
    most = 150_000 if options.quick else 2_000_000
    reviews = split("\n".join(load().texts), most)
    docs = split("\n".join(pydoc_data.topics.topics.values()), most)

    console.rule("Pretraining on film reviews", align="left")
    base = LanguageModel(layers, width, heads, rngs=nnx.Rngs(options.seed))
    pretrained = train(base, reviews, FULL_RATE, pretrain_steps, options.seed, nnx.Param)

    console.rule("LoHa on Python's documentation", align="left")
    # ----------------------------------------------------------------------------------------------
    model = nnx.clone(base)
    # In place; one adapter per layer of the stack.
    loha_jax.nnx.inject(model, LOHA, rngs=nnx.Rngs(options.seed + 1))
    print(loha_jax.summary(model).totals)
    loha_curve = train(model, docs, LOHA_RATE, steps, options.seed, wrt=loha_jax.nnx.LoHaParam)
    interop.save_peft(options.out / "adapter", model)
    # ----------------------------------------------------------------------------------------------

    console.rule("All parameters on Python's documentation", align="left")
    full = nnx.clone(base)
    full_curve = train(full, docs, FULL_RATE, steps, options.seed, wrt=nnx.Param)

    for name, writer in {"frozen": base, "LoHa": model}.items():
        console.rule(f"{name} writes on", align="left")
        console.print(write(writer, docs["test"], options.seed), markup=False)

    def row(name: str, model: LanguageModel, trained: type | None) -> list[object]:
        count = sum(x.size for x in jax.tree.leaves(nnx.state(model, trained))) if trained else 0
        return [name, count, held_out(model, docs["test"]), held_out(model, reviews["test"])]

    rows = [
        row("frozen", base, None),
        row("LoHa", model, loha_jax.nnx.LoHaParam),
        row("all parameters", full, nnx.Param),
    ]
    loha_jax.set_adapter(model, ())  # the base model is there still
    rows.append(row("LoHa, switched off", model, None))
    plot(options.out / "curves.png", pretrained, loha_curve, full_curve)
    console.print(
        f"Adapter, as PEFT writes it: {options.out / 'adapter'}. Curves: curves.png there"
    )
    title = f"Loss on test text, nats per byte (seed {options.seed})"
    head = ["", "parameters trained", "documentation", "film reviews"]
    show_results(options.out / "results.json", title, head, rows)


def plot(path: Any, pretrained: Any, loha: Any, full: Any) -> None:
    """Draws the validation losses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(*zip(*pretrained, strict=True), marker="o", color="tab:gray")
    left.set(
        title="Pretraining on film reviews", xlabel="step", ylabel="validation loss, nats per byte"
    )
    right.plot(*zip(*loha, strict=True), marker="o", label="LoHa")
    right.plot(*zip(*full, strict=True), marker="o", label="all parameters")
    right.axhline(loha[0][1], color="gray", linestyle="--", label="frozen")
    right.set(title="Python's documentation", xlabel="step")
    right.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_example(run, __doc__, "nnx_language_model")
