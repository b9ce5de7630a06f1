"""A training step of a few Dense layers: loha-jax's strategies, the frozen base, and the real PEFT, in one run.

    python -m benchmarks.dense_layers [--width 2048 --tokens 2048 --layers 4 --rank 8] [--json FILE]

FLOPs and bytes are XLA's own counts (`cost_analysis`, `memory_analysis`). "Frozen" is the base's step with the gradient
of its input, which every adapter needs too. PEFT runs the same layers in PyTorch, if it is installed; its FLOPs are
counted by torch's `FlopCounterMode`, and its extra bytes are what autograd saves over the frozen PyTorch model.
"""

import argparse
import re
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import loha_jax
from benchmarks.measure import compiled_counts, interleaved_seconds, machine, median_ratio, table, write_json

STRATEGIES = ("auto", "factored", "fused", "dense")


def forward(params: Any, x: jax.Array) -> jax.Array:
    for name in sorted(params, key=int):
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def training_step(apply: Any) -> Any:
    def step(trainable: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(trainable: Any, x: jax.Array) -> jax.Array:
            return apply(loha_jax.combine(trainable, frozen), x).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(trainable, x)

    return step


def frozen_step(params: Any, x: jax.Array) -> Any:
    return jax.value_and_grad(lambda x: forward(params, x).sum())(x)


def kernel_shaped(fn: Any, shape: tuple[int, ...], *args: Any) -> int:
    """How many arrays of the kernel's shape the compiled step makes; the token count must differ from the width."""
    text = jax.jit(fn).lower(*args).compile().as_text() or ""
    entry = text[text.index("ENTRY ") :]
    made = re.findall(rf"= \w+\[{shape[0]},{shape[1]}\]\S* (\w+)", entry)
    return sum(op not in ("parameter", "get-tuple-element", "bitcast", "copy") for op in made)


def torch_steps(kernels: list[np.ndarray], x: np.ndarray, rank: int) -> dict[str, dict[str, Any]]:
    """Steps of the frozen PyTorch model and of PEFT's LoHa on it, with torch's FLOP count; {} without both."""
    try:
        import peft
        import torch
        from torch.utils.flop_counter import FlopCounterMode
    except ImportError:
        print("torch and peft are not installed: only JAX is measured")
        return {}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(*k.shape, bias=False) for k in kernels)
            for layer, kernel in zip(self.layers, kernels, strict=True):
                layer.weight = torch.nn.Parameter(torch.tensor(kernel.T.copy()), requires_grad=False)

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    config = peft.LoHaConfig(r=rank, alpha=2 * rank, target_modules=[str(n) for n in range(len(kernels))])
    models = {"PyTorch frozen": Net(), "PEFT LoHa": peft.get_peft_model(Net(), config)}
    steps = {}
    for name, model in models.items():
        inputs = torch.tensor(x, requires_grad=True)
        saved: dict[int, int] = {}

        def step(model: Any = model, inputs: Any = inputs) -> Any:
            model.zero_grad()
            inputs.grad = None
            model(inputs).sum().backward()

        def keep(tensor: Any, saved: dict[int, int] = saved) -> Any:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(inputs).sum().backward()
        counter = FlopCounterMode(display=False)
        with counter:
            step()
        held = sum(size for pointer, size in saved.items() if pointer not in parameters)
        steps[name] = {"run": step, "flops": counter.get_total_flops(), "saved_bytes": held}
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()

    random = np.random.default_rng(0)
    d = args.width
    kernels = [(random.standard_normal((d, d)) / np.sqrt(d)).astype(np.float32) for _ in range(args.layers)]
    x = jnp.asarray(random.standard_normal((args.tokens, d)), jnp.float32)
    base = {str(n): {"kernel": jnp.asarray(kernel)} for n, kernel in enumerate(kernels)}
    config = loha_jax.LoHaConfig(r=args.rank, alpha=2 * args.rank, target_modules=list(base))
    trainable, frozen = loha_jax.partition(loha_jax.inject(base, config, key=jax.random.key(0)))

    jobs: dict[str, tuple[Any, tuple]] = {"JAX frozen": (frozen_step, (base, x))}
    for strategy in STRATEGIES:
        apply = loha_jax.adapt(forward, strategy=strategy)
        jobs[f"loha-jax {strategy}"] = (training_step(apply), (trainable, frozen, x))
    counts = {name: compiled_counts(fn, *inputs) for name, (fn, inputs) in jobs.items()}
    other = jnp.zeros((d + 8, d))  # so that an activation is not taken for a kernel
    for name, (fn, inputs) in jobs.items():
        counts[name]["kernel_shaped"] = kernel_shaped(fn, (d, d), *inputs[:-1], other)
    torch_jobs = torch_steps(kernels, np.asarray(x), args.rank)

    jitted = {name: jax.jit(fn) for name, (fn, _) in jobs.items()}
    runs: dict[str, Any] = {name: (lambda n=name: jitted[n](*jobs[n][1])) for name in jobs}
    runs |= {name: job["run"] for name, job in torch_jobs.items()}
    seconds = interleaved_seconds(runs, args.repeats)

    rows = []
    for name, times in seconds.items():
        own_base = "JAX frozen" if name in jobs else "PyTorch frozen"
        flops = counts[name]["flops"] if name in jobs else torch_jobs[name]["flops"]
        base_flops = counts["JAX frozen"]["flops"] if name in jobs else torch_jobs["PyTorch frozen"]["flops"]
        if name in jobs:
            extra = counts[name]["temporary_bytes"] - counts["JAX frozen"]["temporary_bytes"]
        else:
            extra = torch_jobs[name]["saved_bytes"] - torch_jobs["PyTorch frozen"]["saved_bytes"]
        rows.append(
            {
                "step": name,
                "GFLOP": f"{flops / 1e9:.1f}",
                "over its frozen base": f"{flops / base_flops:.3f}",
                "extra MB": f"{extra / 1e6:.1f}",
                "kernel-shaped arrays": counts[name]["kernel_shaped"] if name in jobs else "-",
                "median s": f"{statistics.median(times):.3f}",
                "time over its base": f"{median_ratio(times, seconds[own_base]):.2f}",
            }
        )
    print(f"{args.layers} Dense {d}x{d}, {args.tokens} tokens, r={args.rank}, float32, value and gradient\n")
    print(table(rows))
    for key, value in machine().items():
        print(f"{key}: {value}")
    write_json(
        args.json, {"machine": machine(), "arguments": vars(args), "counts": counts, "seconds": seconds, "rows": rows}
    )


if __name__ == "__main__":
    main()
