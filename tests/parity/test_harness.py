"""The real PEFT and loha_jax side by side on generated models and configs, in float64.

    python -m pytest tests/parity/test_harness.py --parity-seed 1 --parity-cases 1000

Each case: same targets and counts, or both refuse; the same outputs from the same factors, both
ways through files; merged, unloaded, several adapters; and the same gradients and trajectories of
SGD and AdamW over 20 steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from peft.tuners.loha import layer as peft_layer
from peft_samples import torch_value

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.tree.leaves import is_adapted
from tests.parity.models import (
    Spec,
    configs,
    jax_forward,
    jax_params,
    layouts,
    plain_cp,
    plain_key,
    specs,
    torch_output,
)

STEPS = 20

# PEFT's alpha/r is a float32: relative error 6e-8 of the update, which training doubles a few
# times.
OUTPUT, GRADIENT, TRAJECTORY = 1e-6, 1e-5, 1e-4

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
    ),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:(target_modules|modules_to_save)=:UserWarning"),
]


@dataclasses.dataclass
class Case:
    """A model with PEFT's adapter and random factors, and its base parameters in JAX."""

    spec: Spec
    kwargs: dict[str, Any]
    seed: int
    model: Any
    base: Any

    @property
    def config(self) -> LoHaConfig:
        return LoHaConfig(**self.kwargs)

    def inject(self, base: Any, config: LoHaConfig, **kwargs: Any) -> Any:
        key = jax.random.key(
            self.seed, impl="unsafe_rbg"
        )  # compiles faster than threefry; the values are replaced
        return loha_jax.inject(base, config, key=key, layouts=layouts(self.spec), **kwargs)

    def load(self, folder: Any, base: Any, **kwargs: Any) -> Any:
        return interop.load_peft(folder, base, layouts=layouts(self.spec), **kwargs)


def wrap(spec: Spec, kwargs: dict[str, Any], case_seed: int) -> Case:
    """Has PEFT wrap the model; its `model` is None where PEFT refuses the config."""
    module = spec.torch_model(case_seed)
    base = jax_params(module)
    try:
        model = peft.get_peft_model(module, peft.LoHaConfig(**kwargs)).eval()
    except ValueError:
        return Case(spec, kwargs, case_seed, None, base)
    randomize(model, case_seed)
    return Case(spec, kwargs, case_seed, model, base)


def randomize(model: Any, case_seed: int) -> None:
    """Random factors of an update about as large as the weights."""
    generator = torch.Generator().manual_seed(case_seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
                )
            elif "modules_to_save" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
                )


def close(got: Any, want: Any, bound: float, what: str = "") -> None:
    """Equal up to `bound` of the largest entry."""
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got), want, rtol=0, atol=bound * max(np.abs(want).max(), 1), err_msg=what
    )


def state_of(model: Any, adapter: str = "default") -> dict[str, np.ndarray]:
    return {
        k: v.numpy().copy()
        for k, v in peft.get_peft_model_state_dict(model, adapter_name=adapter).items()
    }


def torch_training(
    model: Any, x: np.ndarray, y: np.ndarray
) -> tuple[dict[str, Any], dict[str, list[float]], dict]:
    """First gradients, losses of both optimizers, and the factors that AdamW ends with."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for name in ("sgd", "adamw"):
        model.load_state_dict(start)
        if name == "sgd":
            optimizer: Any = torch.optim.SGD(trained.values(), lr=0.01)
        else:
            optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
        losses[name] = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()
            loss.backward()
            if not gradients:
                gradients = {plain_key(n): p.grad.numpy().copy() for n, p in trained.items()}
            losses[name].append(float(loss.detach()))
            optimizer.step()
    final = state_of(model)
    model.load_state_dict(start)
    return gradients, losses, final


def jax_training(
    spec: Spec, params: Any, x: Any, y: Any, strategy: str
) -> tuple[Any, dict[str, Any], Any]:
    """The same in JAX, compiled as one function."""
    trainable, frozen = loha_jax.partition(params)
    apply = loha_jax.adapt(jax_forward(spec), strategy=strategy)

    @jax.jit  # traced and lowered once for all three uses
    @jax.value_and_grad
    def loss_and_gradient(trainable, frozen, x, y):
        return ((apply(loha_jax.combine(trainable, frozen), x) - y) ** 2).mean()

    optimizers = {"sgd": optax.sgd(0.01), "adamw": optax.adamw(0.01, weight_decay=0.1)}

    def train(trainable, *rest):
        losses, ends = {}, {}
        for name, tx in optimizers.items():

            def step(carry, _, tx=tx):
                trainable, state = carry
                loss, gradient = loss_and_gradient(trainable, *rest)
                updates, state = tx.update(gradient, state, trainable)
                return (optax.apply_updates(trainable, updates), state), loss

            (ends[name], _), losses[name] = jax.lax.scan(
                step, (trainable, tx.init(trainable)), length=STEPS
            )
        return loss_and_gradient(trainable, *rest)[1], losses, ends["adamw"]

    gradient, losses, end = jax.jit(train)(trainable, frozen, x, y)
    return loha_jax.combine(gradient, frozen), losses, loha_jax.combine(end, frozen)


def random_factors(params: Any, case_seed: int) -> Any:
    mask, random = loha_jax.trainable_mask(params), np.random.default_rng(case_seed)
    return jax.tree.map(
        lambda v, m: jnp.asarray(random.normal(0, 0.5, v.shape), v.dtype) if m else v, params, mask
    )


def torch_weights(tree: Any) -> dict[str, np.ndarray]:
    """Kernels of a plain tree by dotted name, with torch's axes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(key.key) for key in path[:-1]): torch_value(leaf)
        for path, leaf in flat
        if path[-1].key == "kernel"
    }


def check(case: Case, second: dict[str, Any], strategy: str, folder: Any) -> None:
    spec, model, base = case.spec, case.model, case.base
    if model is None:
        with pytest.raises(ValueError):  # noqa: PT011  PEFT refuses it too
            case.inject(base, case.config)
        return
    x, y = spec.inputs(case.seed)
    forward = jax.jit(jax_forward(spec))
    theirs = torch_output(model, x)

    # The same targets, shapes and counts. PEFT counts parameters alone, ours is the size of the
    # tree.
    fresh = case.inject(base, case.config)
    wanted = {key: value.shape for key, value in state_of(model).items()}
    assert {key: value.shape for key, value in interop.to_peft_state_dict(fresh).items()} == wanted
    buffers = sum(buffer.numel() for buffer in spec.torch_model(0).buffers())
    saved = [
        leaf
        for leaf in jax.tree.leaves(fresh, is_leaf=is_adapted)
        if isinstance(leaf, loha_jax.SavedWeight)
    ]
    copied = sum(leaf.size for leaf in saved if leaf.is_buffer)
    summary = loha_jax.summary(fresh)
    counts = (summary.trainable_params, summary.all_params - buffers - copied)
    assert counts == model.get_nb_trainable_parameters()

    # PEFT -> JAX, through a file: outputs, merged weights, the base back.
    model.save_pretrained(folder / "peft")
    loaded = case.load(folder / "peft", base)
    adapted = jax.jit(loha_jax.adapt(forward, strategy=strategy))
    close(adapted(loaded, x), theirs, OUTPUT)
    merged = loha_jax.merge(loaded, safe=True)
    close(forward(merged, x), theirs, OUTPUT)
    assert all(
        a is b for a, b in zip(*map(jax.tree.leaves, (loha_jax.unload(loaded), base)), strict=True)
    )

    # The same gradients and trajectories.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_layer, "make_weight_cp", plain_cp)
        gradients, losses, final = torch_training(model, x, y)
    our_gradients, our_losses, end = jax_training(spec, loaded, x, y, strategy)
    gradient_state = interop.to_peft_state_dict(our_gradients)
    for key, want in gradients.items():
        close(gradient_state[key], want, GRADIENT, key)
    for name, want in losses.items():
        close(our_losses[name], want, TRAJECTORY, name)
    end_state = interop.to_peft_state_dict(end)
    assert end_state.keys() == final.keys()
    for key, want in final.items():
        close(end_state[key], want, TRAJECTORY, key)

    # JAX -> PEFT with factors of our own, beside a second adapter of another config.
    ours = random_factors(fresh, case.seed)
    interop.save_peft(folder / "ours", ours)
    opened = peft.PeftModel.from_pretrained(spec.torch_model(case.seed), folder / "ours").eval()
    close(adapted(ours, x), torch_output(opened, x), OUTPUT)
    back = case.load(folder / "ours", base)
    for a, b in zip(*map(jax.tree.leaves, (back, ours)), strict=True):
        np.testing.assert_array_equal(a, b)
    try:
        opened.add_adapter("second", peft.LoHaConfig(**second))
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011
            case.inject(ours, LoHaConfig(**second), adapter_name="second")
    else:
        both = random_factors(
            case.inject(ours, LoHaConfig(**second), adapter_name="second"), case.seed + 1
        )
        interop.save_peft(folder / "both", both)
        opened.load_adapter(folder / "both" / "second", "second")
        opened.base_model.set_adapter(["default", "second"])
        opened.eval()
        active = loha_jax.set_adapter(both, ["default", "second"])
        close(adapted(active, x), torch_output(opened, x), OUTPUT)
        opened.set_adapter("second")
        close(forward(both, x), torch_output(opened, x), OUTPUT)
        with opened.disable_adapter():
            close(forward(loha_jax.set_adapter(both, ()), x), torch_output(opened, x), 1e-12)
        opened.set_adapter("default")
        opened.delete_adapter("second")
        one = loha_jax.set_adapter(loha_jax.delete_adapter(both, "second"), "default")
        close(forward(one, x), torch_output(opened, x), OUTPUT)

    # Merged by both, to the same weights.
    plain = opened.merge_and_unload(safe_merge=True).state_dict()
    for name, kernel in torch_weights(loha_jax.merge(ours)).items():
        close(kernel, plain[f"{name}.weight"], OUTPUT, name)


CHUNKS = 8
"""The number of tests that the cases run in, side by side if pytest has several workers.

The first one runs every day.
"""


@pytest.mark.parametrize(
    "chunk", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, CHUNKS))]
)
def test_peft_and_loha_jax_do_the_same(chunk, request, tmp_path_factory):
    """The number of cases and the seed are options of pytest; hypothesis prints a failing case."""
    options = request.config.option

    @seed(options.parity_seed * CHUNKS + chunk)
    @settings(
        max_examples=-(-options.parity_cases // CHUNKS),
        derandomize=False,
        database=None,
        phases=[
            Phase.explicit,
            Phase.generate,
        ],  # each case compiles: shrinking a failing one would take an hour
    )
    @given(st.data(), specs, st.integers(0, 2**16), st.sampled_from(["factored", "fused", "auto"]))
    def run(data, spec, case_seed, strategy):
        kwargs = data.draw(configs(spec))
        second = data.draw(configs(spec, second=True))
        with jax.enable_x64(True):
            check(wrap(spec, kwargs, case_seed), second, strategy, tmp_path_factory.mktemp("case"))

    run()
