"""A training step of the example's model, all-MiniLM-L6-v2: loha-jax, the frozen base, and the real PEFT, in one run.

    python run.py example --quick          (installs what this needs)
    python -m benchmarks.minilm_step [--batch 16 --length 32 --rank 8] [--json FILE]

LoHa on query, key, value and attention output, classifier trained whole, as in examples/finetune_minilm.py. "Frozen" is
the step with the gradient of the embeddings' output alone, through every layer, as any adapter needs it.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import loha_jax
from benchmarks.measure import compiled_counts, interleaved_seconds, machine, median_ratio, table, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
TARGETS = ["query", "key", "value", "attention.output.dense"]


def torch_runs(folder: Path, batch: dict[str, np.ndarray], rank: int) -> dict[str, Any]:
    """Training steps in PyTorch: the frozen model and PEFT's LoHa; {} without torch and peft."""
    try:
        import peft
        import torch
        from transformers import BertModel
    except ImportError:
        print("torch and peft are not installed: only JAX is measured")
        return {}

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
            self.classifier = torch.nn.Linear(384, 2)

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.classifier((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    config = peft.LoHaConfig(r=rank, alpha=2 * rank, target_modules=TARGETS, modules_to_save=["classifier"])
    frozen = Classifier()
    frozen.requires_grad_(False)
    frozen.bert.embeddings.LayerNorm.requires_grad_(True)
    ids, mask, labels = (torch.tensor(batch[name], dtype=torch.int64) for name in ("ids", "mask", "labels"))

    def run(model: Any) -> Any:
        def step() -> None:
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(ids, mask), labels).backward()

        return step

    return {"PyTorch frozen": run(frozen), "PEFT LoHa": run(peft.get_peft_model(Classifier(), config))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    args = parser.parse_args()
    from minilm import classify, embed, init_classifier, load_minilm, model_folder

    folder = model_folder()
    model, bert = load_minilm(folder)
    base = {"bert": bert, "classifier": init_classifier(384, 2, jax.random.key(0))}
    config = loha_jax.LoHaConfig(
        r=args.rank, alpha=2 * args.rank, target_modules=TARGETS, modules_to_save=["classifier"]
    )
    trainable, frozen = loha_jax.partition(loha_jax.inject(base, config, key=jax.random.key(1)))
    random = np.random.default_rng(0)
    shape = (args.batch, args.length)
    batch = {
        "ids": random.integers(1000, 20000, shape).astype(np.int32),
        "mask": np.ones(shape, np.int32),
        "labels": random.integers(0, 2, args.batch).astype(np.int32),
    }

    def loss(logits: jax.Array, batch: dict[str, Any]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def logits(params: Any, batch: dict[str, Any]) -> jax.Array:
        return classify(params["classifier"], embed(model, params["bert"], batch["ids"], batch["mask"]))

    def adapted_step(strategy: str) -> Any:
        apply = loha_jax.adapt(logits, strategy=strategy)

        def step(trainable: Any, frozen: Any, batch: dict[str, Any]) -> Any:
            return jax.value_and_grad(lambda t: loss(apply(loha_jax.combine(t, frozen), batch), batch))(trainable)

        return step

    def frozen_step(norm: Any, base: Any, batch: dict[str, Any]) -> Any:
        def with_norm(norm: Any) -> jax.Array:
            embeddings = {**base["bert"]["embeddings"], "LayerNorm": norm}
            return loss(logits({**base, "bert": {**base["bert"], "embeddings": embeddings}}, batch), batch)

        return jax.value_and_grad(with_norm)(norm)

    norm = jax.tree.map(jnp.asarray, bert["embeddings"]["LayerNorm"])
    jobs: dict[str, tuple[Any, tuple]] = {"JAX frozen": (frozen_step, (norm, base, batch))}
    for strategy in ("auto", "factored", "fused", "dense"):
        jobs[f"loha-jax {strategy}"] = (adapted_step(strategy), (trainable, frozen, batch))
    counts = {name: compiled_counts(fn, *inputs) for name, (fn, inputs) in jobs.items()}
    jitted = {name: jax.jit(fn) for name, (fn, _) in jobs.items()}
    runs: dict[str, Any] = {name: (lambda n=name: jitted[n](*jobs[n][1])) for name in jobs}
    seconds = interleaved_seconds(runs | torch_runs(folder, batch, args.rank), args.repeats)
    rows = []
    for name, times in seconds.items():
        row = {"step": name, "GFLOP": "-", "temporary MB": "-", "trace + compile s": "-"}
        if name in jobs:
            row["GFLOP"] = f"{counts[name]['flops'] / 1e9:.1f}"
            row["temporary MB"] = f"{counts[name]['temporary_bytes'] / 1e6:.0f}"
            row["trace + compile s"] = f"{counts[name]['trace_seconds'] + counts[name]['compile_seconds']:.1f}"
        own_base = seconds["JAX frozen" if name in jobs else "PyTorch frozen"]
        row["median ms"] = f"{1e3 * statistics.median(times):.0f}"
        row["time over its frozen base"] = f"{median_ratio(times, own_base):.2f}"
        if "PEFT LoHa" in seconds:
            row["time over PEFT LoHa"] = f"{median_ratio(times, seconds['PEFT LoHa']):.2f}"
        rows.append(row)
    print(f"MiniLM, {args.batch} x {args.length} tokens, r={args.rank}, float32, value and gradient\n")
    print(table(rows))
    for key, value in machine().items():
        print(f"{key}: {value}")
    write_json(
        args.json, {"machine": machine(), "arguments": vars(args), "counts": counts, "seconds": seconds, "rows": rows}
    )


if __name__ == "__main__":
    main()
