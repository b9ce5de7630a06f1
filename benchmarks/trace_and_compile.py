"""Seconds to trace and compile a 12-layer Transformer with `adapt`, beside the model applied as it is.

    python -m benchmarks.trace_and_compile [--layers 12 --repeats 5] [--json FILE]

A Linen Transformer of BERT-base's size (12 layers, width 768, all linears, r=8, 4 x 128 tokens), by shapes alone:
nothing is run. "plain" applies the unmodified model to the adapted tree; each LoHa leaf builds W + ΔW inside its layer.
"""

import argparse
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import loha_jax
from benchmarks.measure import compiled_counts, machine, median_ratio, table, write_json


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(num_heads=12, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(768, name="down")(nn.gelu(nn.Dense(3072, name="up")(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(self.layers):
            x = Layer(name=f"layers_{n}")(x)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    model = Transformer(args.layers)
    x = jax.ShapeDtypeStruct((4, 128, 768), jnp.float32)
    base = jax.eval_shape(model.init, jax.random.key(0), x)
    config = loha_jax.LoHaConfig(r=8, target_modules="all-linear")
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    trainable, frozen = loha_jax.partition(params)

    def step(apply: Any) -> Any:
        def run(trainable: Any, frozen: Any, x: jax.Array) -> Any:
            return jax.value_and_grad(lambda t: apply(loha_jax.combine(t, frozen), x).sum())(trainable)

        return run

    def frozen_step(params: Any, x: jax.Array) -> Any:
        return jax.value_and_grad(lambda x: model.apply(params, x).sum())(x)  # type: ignore[union-attr]

    adapted = loha_jax.adapt(model.apply)
    jobs: dict[str, tuple[Any, tuple]] = {
        "forward, frozen": (model.apply, (base, x)),
        "forward, plain": (model.apply, (params, x)),
        "forward, adapt": (adapted, (params, x)),
        "training step, frozen": (frozen_step, (base, x)),
        "training step, plain": (step(model.apply), (trainable, frozen, x)),
        "training step, adapt": (step(adapted), (trainable, frozen, x)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    counts: dict[str, dict[str, float]] = {}
    for turn in range(args.repeats + 1):  # the first turn warms up
        for name, (fn, inputs) in jobs.items():
            counts[name] = compiled_counts(fn, *inputs)
            if turn:
                seconds[name].append(counts[name]["trace_seconds"] + counts[name]["compile_seconds"])
    rows = [
        {
            "job": name,
            "trace + compile s": f"{statistics.median(times):.2f}",
            "over plain": f"{median_ratio(times, seconds[name.split(',')[0] + ', plain']):.2f}",
            "GFLOP": f"{counts[name]['flops'] / 1e9:.1f}",
            "temporary MB": f"{counts[name]['temporary_bytes'] / 1e6:.0f}",
        }
        for name, times in seconds.items()
    ]
    print(table(rows))
    for key, value in machine().items():
        print(f"{key}: {value}")
    write_json(args.json, {"machine": machine(), "arguments": vars(args), "counts": counts, "seconds": seconds})


if __name__ == "__main__":
    main()
