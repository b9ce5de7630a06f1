"""A convolutional net that knows the digits 0 to 4 learns 5 to 9 from 100 pictures, with LoHa.

Both forms of a convolution's adapter, side by side: flat, as PEFT has it by default, and CP, with
cores (`use_effective_conv2d`). Beside them, baselines that are strong on pictures this simple: a
linear probe on the frozen net's features, logistic regression on the raw pixels, and training all
of the net. Data: scikit-learn's 8x8 digits.

    python examples/digits_convnet.py [--quick]

It takes 2 minutes on two cores (--quick: 16 s). It needs `pip install -e ".[examples]"`.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import run_example, show_results
from report import console
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split

import loha_jax
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone

FLAT = loha_jax.LoHaConfig(r=4, alpha=8, target_modules=r"Conv_\d", modules_to_save=["classifier"])
CP = dataclasses.replace(FLAT, use_effective_conv2d=True)
FORMS = {"LoHa, flat": FLAT, "LoHa, CP": CP}
# Of 3e-3, 1e-2, 3e-2 (LoHa) and 1e-3, 3e-3, 1e-2 (all parameters), the best, or within two pictures
# of it, on the validation pictures of seeds 0 and 1.
LOHA_RATE, FULL_RATE = 1e-2, 3e-3

Params = Any
Pictures = tuple[np.ndarray, np.ndarray]  # [n, 8, 8, 1] from 0 to 1, and labels from 0 to 4


class ConvNet(nn.Module):
    """An ordinary Flax Linen classifier; with `features`, what its last layer sees."""

    @nn.compact
    def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
        """Logits, [n, 5]; or features, [n, 256]."""
        for width, strides in ((32, 1), (64, 2), (64, 2)):
            x = nn.relu(nn.Conv(width, (3, 3), strides)(x))
        x = x.reshape(x.shape[0], -1)
        return x if features else nn.Dense(5, name="classifier")(x)


def load_pictures(seed: int) -> tuple[Pictures, Pictures, Pictures, Pictures]:
    """All of 0 to 4; and of 5 to 9, labelled 0 to 4, 100 to train, 100 to validate, 696 to test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    high, labels = labels > 4, labels % 5
    split = partial(train_test_split, train_size=100, random_state=seed)
    train, rest, train_labels, rest_labels = split(
        images[high], labels[high], stratify=labels[high]
    )
    validation, test, validation_labels, test_labels = split(
        rest, rest_labels, stratify=rest_labels
    )
    few = (train, train_labels), (validation, validation_labels), (test, test_labels)
    return (images[~high], labels[~high]), *few  # type: ignore[return-value]  # scikit-learn's types say too little


def train(
    params: Params,
    pictures: Pictures,
    validation: Pictures,
    rate: float,
    steps: int,
    seed: int,
    full: bool,
):
    """Trains a tree's adapters, or (`full`) all of it; returns it and its validation accuracies."""
    # ----------------------------------------------------------------------------------------------
    apply = loha_jax.adapt(ConvNet().apply)  # the same function; no ΔW is built
    nothing = jax.tree.map(lambda _: None, params)
    trainable, frozen = (params, nothing) if full else loha_jax.partition(params)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    opt_state = tx.init(trainable)

    @jax.jit
    def train_step(trainable, opt_state, images, labels):
        def loss_fn(trainable):
            scores: Any = apply(loha_jax.combine(trainable, frozen), images)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(trainable), opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    # ----------------------------------------------------------------------------------------------
    rng, curve = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        rows = rng.integers(0, len(pictures[1]), 32)
        trainable, opt_state = train_step(
            trainable, opt_state, pictures[0][rows], pictures[1][rows]
        )
        if step % (steps // 10) == 0:
            curve.append((step, accuracy(loha_jax.combine(trainable, frozen), validation)))
    return loha_jax.combine(trainable, frozen), curve


logits = jax.jit(ConvNet().apply, static_argnames="features")


def accuracy(params: Params, pictures: Pictures) -> float:
    """The share of pictures whose label the net finds."""
    return float(
        (np.asarray(logits(loha_jax.merge(params), pictures[0])).argmax(1) == pictures[1]).mean()
    )


def regression_accuracy(train: Pictures, test: Pictures, features: Any) -> tuple[float, int]:
    """Accuracy and size of logistic regression on features, regularised by cross-validation."""
    search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": np.logspace(-3, 2, 11)}, cv=5)
    inputs = features(train[0])
    search.fit(inputs, train[1])
    return float(np.mean(search.predict(features(test[0])) == test[1])), 5 * (inputs.shape[1] + 1)


def size(tree: Any) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def run_seed(
    seed: int, steps: int
) -> tuple[dict[str, tuple[float, int]], dict[str, Any], Params, Pictures]:
    """Test accuracy and size by method; curves; the net with the flat adapter; test pictures."""
    low, few, validation, test = load_pictures(seed)
    start = ConvNet().init(jax.random.key(seed), low[0][:1])
    base, _ = train(start, low, low, FULL_RATE, 2 * steps, seed, full=True)
    results = {
        "raw pixels, logistic regression": regression_accuracy(
            few, test, lambda x: x.reshape(len(x), -1)
        ),
        "frozen net, linear probe": regression_accuracy(
            few, test, partial(logits, base, features=True)
        ),
    }
    curves, adapted = {}, {}
    for name, config in FORMS.items():
        params = loha_jax.inject(base, config, key=jax.random.key(seed))
        adapted[name], curves[name] = train(
            params, few, validation, LOHA_RATE, steps, seed, full=False
        )
        results[name] = accuracy(adapted[name], test), size(loha_jax.partition(params)[0])
    for name, params in {"all parameters": base, "all parameters, from scratch": start}.items():
        params, curves[name] = train(params, few, validation, FULL_RATE, steps, seed, full=True)
        results[name] = accuracy(params, test), size(params)
    return results, curves, adapted["LoHa, flat"], test


def run(options: argparse.Namespace) -> None:
    """All methods with some seeds, which draw weights, factors and the split."""
    seeds, steps = (
        ([options.seed], 60)
        if options.quick
        else (list(range(options.seed, options.seed + 5)), 300)
    )
    runs = []
    for seed in seeds:
        runs.append(run_seed(seed, steps))
        console.print(
            f"seed {seed}: "
            + ", ".join(f"{name} {found[0]:.3f}" for name, found in runs[-1][0].items())
        )
    _, curves, params, test = runs[0]
    interop.save_peft(options.out / "adapter", params)
    plot(options.out / "digits.png", curves, params, test)
    console.print(
        f"Adapter (flat), as PEFT writes it: {options.out / 'adapter'}; picture: digits.png beside "
        "it"
    )
    rows = []
    for name in runs[0][0]:
        found = np.array([results[name][0] for results, *_ in runs])
        rows.append([name, runs[0][0][name][1], found.mean(), found.min(), found.max()])
    title = (
        f"Accuracy on {len(test[1])} test pictures of 5 to 9, {len(seeds)} seed(s) from "
        f"{options.seed}"
    )
    show_results(
        options.out / "results.json",
        title,
        ["", "parameters trained", "mean", "lowest", "highest"],
        rows,
    )


def plot(path: Any, curves: dict[str, Any], params: Params, test: Pictures) -> None:
    """Draws the validation accuracies, and predictions of the adapted net: wrong ones first."""
    figure = plt.figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2).flat  # type: ignore[union-attr]
    axes = left.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    axes.set(title="100 pictures of 5 to 9", xlabel="step", ylabel="validation accuracy")
    axes.legend()
    found = np.asarray(logits(loha_jax.merge(params), test[0])).argmax(1)
    right.suptitle("LoHa, flat: what it takes test pictures for")
    for row, axes in zip(
        np.argsort(found == test[1], kind="stable"), right.subplots(3, 6).flat, strict=False
    ):
        axes.imshow(test[0][row, :, :, 0], cmap="gray_r")
        axes.set_title(
            str(found[row] + 5), color="tab:red" if found[row] != test[1][row] else "tab:green"
        )
        axes.axis("off")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_example(run, __doc__, "digits_convnet")
