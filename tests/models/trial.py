"""The checks that run on every model of the catalogue.

Each raises AssertionError, or returns what it measured.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import tempfile
import unittest.mock
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
from peft.tuners.loha import layer as peft_layer
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted
from tests.models.catalogue import Case
from tests.models.twins import Size, Twins
from tests.parity.models import plain_cp, plain_key

OUTPUT = 1e-4  # of the largest output: how far twins may be from each other, adapted or not
MOVED = 1e-2  # of the largest output: how far at least an adapter moves the base's
GRADIENT = 1e-3  # of the largest entry of a factor's gradient
STEPS = 2


def distance(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes {got.shape} and {want.shape}"
    assert np.isfinite(got).all(), "not finite"
    return float(np.abs(got - want).max() / np.abs(want).max())


def require_close(got: Any, want: Any, bound: float, what: str) -> float:
    found = distance(got, want)
    assert found <= bound, (
        f"{what}: differ by {found:.1e} of the largest entry, {bound:.0e} is allowed"
    )
    return found


def require_moved(got: Any, base: Any, what: str) -> float:
    found = distance(got, base)
    assert found >= MOVED, (
        f"{what} moves the base's output by {found:.1e} only: a lost adapter would not show"
    )
    return found


def random_factors(params: Any, random: np.random.Generator) -> Any:
    """Random factors whose update is about half as large as the weight.

    Saved modules are moved off their originals.
    """

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, SavedWeight):
            copies = {
                k: v + jnp.asarray(random.normal(0, 0.1, v.shape), v.dtype)
                for k, v in leaf.copies.items()
            }
            return dataclasses.replace(leaf, copies=copies)
        if not isinstance(leaf, LoHaWeight):
            return leaf
        ((name, factors),) = leaf.adapters.items()
        (r,), (alpha,) = set(factors.ranks), set(factors.alphas)
        # The standard deviation of ΔW is alpha/r · (r·s²)·... of normal factors of standard
        # deviation s.
        wanted = 0.5 * float(np.sqrt(np.mean(np.square(np.asarray(leaf.kernel))))) * r / alpha
        deviation = (wanted / r**2) ** (1 / 6) if factors.is_cp else (wanted / r) ** (1 / 4)
        filled = {
            k: jnp.asarray(random.normal(0, deviation, v.shape), v.dtype)
            for k, v in factors.tensors.items()
        }
        return dataclasses.replace(leaf, adapters={name: dataclasses.replace(factors, **filled)})

    return jax.tree.map(fill, params, is_leaf=is_adapted)


class Trial:
    """One case of the catalogue.

    Its models, and the functions that its checks share, compiled once.
    """

    def __init__(self, case: Case, size: Size):
        self.case, self.size = case, size

    @functools.cached_property
    def twins(self) -> Twins:
        return self.case.build(dataclasses.replace(self.size))  # with random numbers of its own

    @functools.cached_property
    def fn(self) -> Any:
        return jax.jit(self.twins.fn)

    @functools.cached_property
    def adapted_fn(self) -> Any:
        return jax.jit(loha_jax.adapt(self.twins.fn))

    @functools.cached_property
    def base_output(self) -> Any:
        return self.fn(self.twins.params, self.twins.inputs)

    @functools.cached_property
    def adapted(self) -> Any:
        """The base parameters with an adapter of random factors."""
        params = loha_jax.inject(
            self.twins.params,
            LoHaConfig(**self.case.config),
            key=jax.random.key(
                self.size.seed, impl="unsafe_rbg"
            ),  # compiles fast; the values are replaced
            names=self.twins.names,
            layouts=self.twins.layouts,
        )
        return random_factors(params, np.random.default_rng(self.size.seed))

    @functools.cached_property
    def adapted_output(self) -> Any:
        return self.adapted_fn(self.adapted, self.twins.inputs)

    @functools.cached_property
    def opened(self) -> Any:
        """The real PEFT's model with the adapter that was saved from JAX, to be trained."""
        with tempfile.TemporaryDirectory() as folder:
            interop.save_peft(folder, self.adapted)
            model = peft.PeftModel.from_pretrained(
                copy.deepcopy(self.twins.module), folder, is_trainable=True
            )
        return self._ready(model)

    def _ready(self, model: Any) -> Any:
        """Without dropout and with BatchNorm's stored statistics, in training too.

        What is frozen stays as it is.
        """
        for module in model.modules() if self.case.peft_stride else ():
            if isinstance(module, peft_layer.Conv1d):
                module.stride = module.base_layer.stride
        return model.eval()

    def peft_output(self, model: Any) -> torch.Tensor:
        return self.twins.output(model, self.twins.tensors)

    @functools.cached_property
    def goal(self) -> np.ndarray:
        return (
            np.random.default_rng(self.size.seed)
            .standard_normal(self.base_output.shape)
            .astype(np.float32)
        )

    def peft_loss(self, model: Any) -> torch.Tensor:
        return ((self.peft_output(model) - torch.tensor(self.goal)) ** 2).mean()

    def check_twins(self) -> str:
        """The base models are twins.

        What follows compares adapters, and no mistake in the weights.
        """
        with torch.no_grad():
            want = self.peft_output(self.twins.module).numpy()
        return f"{require_close(self.base_output, want, OUTPUT, 'the base models'):.0e}"

    def check_export(self) -> str:
        """JAX to PEFT: random factors, saved, opened by the real PEFT on the PyTorch twin."""
        with torch.no_grad():
            theirs = self.peft_output(self.opened).numpy()
        found = require_close(self.adapted_output, theirs, OUTPUT, "PEFT with the adapter from JAX")
        moved = require_moved(theirs, self.base_output, "the adapter from JAX")
        return f"{found:.0e} ({moved:.2g})"

    def check_products(self) -> str:
        """Every adapted product without ΔW kept, and the result that of the merged weights."""
        explained = loha_jax.explain(self.twins.fn, self.adapted, self.twins.inputs)
        assert not explained.dense, f"dense: {explained.dense}"
        assert not explained.unused, f"never read: {explained.unused}"
        merged = self.fn(loha_jax.merge(self.adapted), self.twins.inputs)
        require_close(self.adapted_output, merged, OUTPUT, "adapt(fn) and the merged weights")
        counts = collections.Counter(use.strategy for use in explained.uses)
        return " + ".join(f"{count} {strategy}" for strategy, count in sorted(counts.items()))

    def check_training(self) -> str:
        """PEFT's loss and gradients, and steps of Adam in JAX.

        The steps lower the loss and leave the base as it was.
        """
        trainable, frozen = loha_jax.partition(self.adapted)
        before = [np.array(leaf) for leaf in jax.tree.leaves(self.twins.params)]
        apply, goal = loha_jax.adapt(self.twins.fn), self.goal
        tx = optax.adam(1e-4)

        @jax.jit
        def step(trainable: Any, state: Any, frozen: Any, inputs: Any) -> Any:
            def loss_fn(trainable: Any) -> Any:
                return ((apply(loha_jax.combine(trainable, frozen), inputs) - goal) ** 2).mean()

            loss, gradient = jax.value_and_grad(loss_fn)(trainable)
            updates, state = tx.update(gradient, state)
            return optax.apply_updates(trainable, updates), state, loss, gradient

        state, losses, first = tx.init(trainable), [], None
        for _ in range(STEPS + 1):
            trainable, state, loss, gradient = step(trainable, state, frozen, self.twins.inputs)
            losses.append(float(loss))
            first = gradient if first is None else first
        assert np.isfinite(losses).all(), losses
        assert losses == sorted(losses, reverse=True), f"the loss rises: {losses}"
        after = jax.tree.leaves(loha_jax.unload(loha_jax.combine(trainable, frozen)))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), (
            "the base changed"
        )

        with _true_cp_gradient():
            self.opened.zero_grad()
            loss = self.peft_loss(self.opened)
            loss.backward()
        require_close(losses[0], loss.item(), OUTPUT, "the loss")
        ours = interop.to_peft_state_dict(loha_jax.combine(first, frozen))
        named = dict(self.opened.named_parameters())
        theirs = {plain_key(k): p.grad.numpy() for k, p in named.items() if p.grad is not None}
        assert theirs, "PEFT trains nothing"
        worst = max(
            require_close(ours[key], want, GRADIENT, f"the gradient of {key}")
            for key, want in theirs.items()
        )
        return f"{losses[0]:.3g} to {losses[-1]:.3g}, gradients {worst:.0e}"

    def check_import(self) -> str:
        """PEFT to JAX: an adapter made, trained and saved by the real PEFT is loaded here.

        Saved again, it is the same file.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.size.seed)
            model = peft.get_peft_model(
                copy.deepcopy(self.twins.module), peft.LoHaConfig(**self.case.config)
            )
            model = self._ready(model)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.peft_loss(model).backward()
                optimizer.step()
        with torch.no_grad():
            theirs = self.peft_output(model).numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            names, layouts = self.twins.names, self.twins.layouts
            loaded = interop.load_peft(folder, self.twins.params, names=names, layouts=layouts)
            file = load_file(f"{folder}/adapter_model.safetensors")
        again = interop.to_peft_state_dict(loaded)
        assert again.keys() == file.keys(), f"keys: {again.keys() ^ file.keys()}"
        assert all(np.array_equal(again[key], file[key]) for key in file), (
            "a value changed on its way"
        )
        # The config in the tree says who wrote it. That aside the trees are alike: one compiled
        # function serves both.
        alike = jax.tree.unflatten(jax.tree.structure(self.adapted), jax.tree.leaves(loaded))
        ours = self.adapted_fn(alike, self.twins.inputs)
        found = require_close(ours, theirs, OUTPUT, "the adapter from PEFT")
        moved = require_moved(theirs, self.base_output, "the adapter from PEFT")
        return f"{found:.0e} ({moved:.2g})"


CHECKS = {
    "twins": Trial.check_twins,
    "export": Trial.check_export,
    "products": Trial.check_products,
    "training": Trial.check_training,
    "import": Trial.check_import,
}


@contextlib.contextmanager
def _true_cp_gradient() -> Iterator[None]:
    """Use torch's autograd for the form with cores.

    PEFT's own backward pass is wrong there for w1_a and w2_a.
    """
    with unittest.mock.patch.object(peft_layer, "make_weight_cp", plain_cp):
        yield
