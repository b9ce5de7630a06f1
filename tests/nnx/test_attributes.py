"""Calls of adapted NNX models leave no traced value in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

X = normal_array(9, (2, 4))


class Cached(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.calls, self.shapes, self.seen = 0, [], []
        self.count = nnx.Variable(jnp.array(0))

    @functools.cached_property
    def doubled(self):
        return {"kernel": (self.q.kernel[...] * 2,)}

    @functools.cached_property
    def through(self):
        kernel = self.q.kernel[...]
        return lambda x: x @ kernel

    @functools.cached_property
    def width(self):
        return self.q.kernel.shape[0]

    def __call__(self, x):
        self.calls += 1
        self.shapes.append(x.shape)
        self.seen.append(x * 2)
        self.count[...] += 1
        return self.q(x) + x @ self.doubled["kernel"][0] + self.through(x) * self.width


def adapted(model):
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    return loha_jax.nnx.inject(model, config, rngs=nnx.Rngs(1))


def expected(model):
    kernel = np.asarray(loha_jax.merge(nnx.clone(model)).q.kernel[...], np.float64)
    return np.asarray(X, np.float64) @ kernel * 7 + np.asarray(model.q.bias[...])


def check(model, calls):
    for n, run in enumerate((lambda m, x: m(x), nnx.jit(lambda m, x: m(x)), lambda m, x: m(x)), 1):
        np.testing.assert_allclose(run(model, X), expected(model), rtol=0, atol=1e-5)
        assert model.count[...] == calls + n
    assert not [
        x for x in jax.tree.leaves(list(vars(model).values())) if isinstance(x, jax.core.Tracer)
    ]


def test_cached_properties_are_computed_with_the_weights_of_each_call():
    model = adapted(Cached())
    check(model, 0)
    assert "doubled" not in vars(model)
    for array in jax.tree.leaves(nnx.state(model, loha_jax.nnx.LoHaParam)):
        assert np.isfinite(array).all()
    factor = model.q.kernel_lora_hada_w1_a
    factor.set_value(factor.get_value() + 1)
    check(model, 3)
    # Plain data goes back, into the model's own list.
    assert (model.width, model.calls >= 4, model.shapes[0]) == (4, True, (2, 4))
    assert model.seen == []


def test_what_was_cached_before_the_model_was_adapted_is_computed_again():
    model = Cached()
    model(X)
    assert "doubled" in vars(model)
    model.seen.clear()
    check(adapted(model), 1)


class Remembers(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.q(x)
        self.last = nnx.data(y)
        self.both = nnx.data({"x": x, "y": y})
        return y


def test_arrays_that_a_call_keeps_as_data_are_values_after_it():
    model = adapted(Remembers())
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        for x in (X, 2 * X):
            y = run(model, x)
            np.testing.assert_array_equal(model.last, y)
            np.testing.assert_array_equal(model.both["x"], x)
            np.testing.assert_array_equal(model.both["y"], y)
