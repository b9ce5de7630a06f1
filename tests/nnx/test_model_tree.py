"""`loha_jax.nnx.inject` on Flax NNX models of any structure, and what their calls change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import IDS, adapted, close
from nnx_reference import F64, dense, with_sums
from random_arrays import normal_array

import loha_jax
from loha_jax.nnx import LoHaParam


@pytest.fixture(autouse=True)
def float64(x64):
    """Every test computes in float64."""


# ---------------------------------------------------------------------------- structures of models


class Containers(nnx.Module):
    """Layers in a list, a dict, and a plain list and dict."""

    def __init__(self, rngs):
        make = lambda: nnx.Linear(4, 4, rngs=rngs, **F64)  # noqa: E731
        self.a = nnx.List([make(), make()])
        self.b = nnx.Dict(x=make())
        self.c = nnx.data([make(), {"y": make()}])

    def __call__(self, x):
        for layer in (*self.a, self.b["x"], self.c[0], self.c[1]["y"]):
            x = jnp.tanh(layer(x))
        return x


class BareLists(nnx.Module):
    """Weights in a plain list and dict."""

    def __init__(self, rngs):
        self.ws = nnx.data(
            [nnx.Param(jax.random.normal(rngs.params(), (4, 4), jnp.float64)) for _ in range(2)]
        )
        self.d = nnx.Dict(w=nnx.Param(jax.random.normal(rngs.params(), (4, 4), jnp.float64)))

    def __call__(self, x):
        return x @ self.ws[0] @ self.ws[1][...] @ self.d["w"]


class SharedModule(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.b = nnx.Sequential(self.a, jnp.tanh, self.a)

    def __call__(self, x):
        return self.b(x) + self.a(x)


class SharedKernel(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.b = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class OwnMethods(nnx.Module):
    """Its weight is used by methods that are not `__call__`, one of which calls the other."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 4), jnp.float64))

    def encode(self, x, *, scale=1.0):
        return jnp.tanh(x @ self.w[...]) * scale

    def decode(self, x):
        return self.encode(x, scale=2.0) @ self.w.get_value().T


class Methods(nnx.Module):
    def __init__(self, rngs):
        self.own = OwnMethods(rngs)

    def __call__(self, x):
        return self.own.decode(x) + self.own.encode(x)


class Parent(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs, **F64)

    def __call__(self, x):
        return jnp.tanh(self.a(x))


class Child(Parent):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs, **F64)

    def __call__(self, x):
        return self.b(super().__call__(x))


class Linear(nnx.Linear):
    """A subclass of a layer that calls its parent's `__call__`."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Buffers(nnx.Module):
    """Arrays, functions, strings and None among the attributes."""

    def __init__(self, rngs):
        self.frequencies = jnp.arange(4.0)
        self.constant = np.arange(4.0)
        self.act = jnp.tanh
        self.name, self.nothing = "name", None
        self.a = Linear(4, 4, rngs=rngs, **F64)

    def __call__(self, x):
        return self.act(self.a(x * self.frequencies + self.constant))


STRUCTURES = {
    "containers": (
        Containers,
        {f"{p}/kernel": dense for p in ("a/0", "a/1", "b/x", "c/0", "c/1/y")},
    ),
    "weights in lists": (BareLists, {"ws/0": dense, "ws/1": dense, "d/w": dense}),
    "a shared module": (SharedModule, {"a/kernel": dense}),
    "a shared kernel": (SharedKernel, {"a/kernel": dense}),
    "own methods": (Methods, {"own/w": dense}),
    "super().__call__": (Child, {"a/kernel": dense, "b/kernel": dense}),
    "attributes": (Buffers, {"a/kernel": dense}),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_models_of_any_structure(name):
    build, folds = STRUCTURES[name]
    x = normal_array(0, (3, 4), jnp.float64)
    targets_ = [path.removesuffix("/kernel").removesuffix("/w").replace("/", ".") for path in folds]
    model = adapted(build, folds, target_modules=targets_)
    reference = with_sums(build(nnx.Rngs(0)), model, folds)
    close(model(x), reference(x))
    close(nnx.jit(lambda m, x: m(x))(model, x), reference(x))
    explained = loha_jax.explain(lambda m, x: m(x), model, x)
    assert (explained.dense, explained.unused) == ((), ())
    ids = [id(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    assert len(ids) == len(set(ids))
    assert len(ids) == len(
        [v for _, v in nnx.iter_graph(build(nnx.Rngs(0))) if isinstance(v, nnx.Variable)]
    ) + 4 * len(folds)


class Unusual(nnx.Module):
    """Its calls change an array, an attribute, statistics, a sown value; one returns the module."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, **F64)
        for statistic in (
            self.norm.mean,
            self.norm.var,
        ):  # Flax makes them float32 whatever the dtype
            statistic.set_value(statistic.get_value().astype(jnp.float64))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.w = nnx.Param(jnp.eye(4))
        self.calls = jnp.array(0)
        self.last_shape = ()
        self.axes = np.array([0, 1])

    def chain(self, x):
        self.last_shape = x.shape
        return self, x @ self.w[...]

    def __call__(self, x):
        self.calls = self.calls + 1
        x = self.drop(self.norm(self.a(x).transpose(*map(int, self.axes))))
        self.sow(nnx.Intermediate, "hidden", x)
        return x @ self.w[...]


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="Flax 0.12.3 has no nnx.capture")
def test_what_a_call_changes_is_changed_in_the_model():
    x = normal_array(0, (3, 4), jnp.float64)
    folds = {"a/kernel": dense, "w": dense}
    model = adapted(Unusual, folds, target_modules=["a", "w"])
    plain = with_sums(Unusual(nnx.Rngs(0)), model, folds)
    run = nnx.capture(lambda m, x: m(x), nnx.Intermediate)
    for _ in range(2):
        (ours, sown), (theirs, expected) = run(model, x), run(plain, x)
        close(ours, theirs)
        jax.tree.map(close, sown, expected)
    assert len(sown["hidden"].get_value()) == 1
    assert model.calls == plain.calls == 2
    rest = nnx.Not(nnx.Param)
    ours, theirs = (
        nnx.to_flat_state(nnx.state(model, rest)),
        nnx.to_flat_state(nnx.state(plain, rest)),
    )
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            a, b = (
                jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
                for v in (a, b)
            )
            close(a, b)
    returned, y = model.chain(x)
    assert returned is model
    assert model.last_shape == (3, 4)
    close(y, plain.chain(x)[1])


class Popping(nnx.Module):
    """Takes out what its call leaves behind, as tunix' classifier does, and an old cache."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.eye(4))
        self.old = nnx.Cache(jnp.zeros(3))

    def __call__(self, x):
        self.new = nnx.Intermediate(x @ self.w[...])
        found = nnx.pop(self, nnx.Any(nnx.Intermediate, nnx.Cache))
        return found["new"][...] + found["old"][0]


def test_variables_that_a_call_takes_out_are_out_of_the_model():
    x = jnp.arange(4.0)[None]
    model = adapted(Popping, {"w": dense}, target_modules=["w"])
    plain = with_sums(Popping(nnx.Rngs(0)), model, {"w": dense})
    close(model(x), plain(x))
    assert not hasattr(model, "old")
    assert not hasattr(model, "new")
    assert len(jax.tree.leaves(nnx.state(model, LoHaParam))) == 4


class Maker(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.eye(4))

    def made(self):
        return nnx.Param(self.w[...])

    def grow(self, x):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        return x @ self.w[...]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.made(), "returns a module or variable that it made"),
        (lambda m: m.grow(jnp.ones((1, 4))), "adds the module layer"),
    ],
)
def test_calls_whose_changes_cannot_be_kept_are_errors(use, message):
    with pytest.raises(ValueError, match=message):
        use(adapted(Maker, {"w": dense}, target_modules=["w"]))


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax 0.12.3 has no nnx.view")
def test_attention_decodes_with_its_cache():
    folds = {f"{name}/kernel": dense for name in ("query", "key", "value", "out")}

    def build(rngs):
        attention = nnx.MultiHeadAttention(2, 4, 6, decode=True, rngs=rngs, **F64)
        attention.init_cache((2, 5, 4), jnp.float64)
        return attention

    model = adapted(build, folds)
    plain = with_sums(build(nnx.Rngs(0)), model, folds)
    step = nnx.jit(lambda m, x: m(x))
    for n in range(5):
        x = normal_array(n, (2, 1, 4), jnp.float64)
        close((model if n % 2 else lambda x: step(model, x))(x), plain(x))
    close(model.cached_key[...], plain.cached_key[...])
    assert model.cache_index[...] == 5
    model.init_cache((2, 3, 4), jnp.float64)
    assert model.cached_key.shape == (2, 3, 2, 3)
    assert (
        loha_jax.explain(
            lambda m, x: m(x), nnx.view(model, decode=False), jnp.ones((2, 5, 4))
        ).dense
        == ()
    )


def gradients(model, x):
    graphdef, factors, rest = nnx.split(model, LoHaParam, ...)
    return jax.jit(jax.grad(lambda factors: (nnx.merge(graphdef, factors, rest)(x) ** 2).sum()))(
        factors
    )


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="Flax 0.12.3 has no tree mode")
def test_gradients_by_split_are_the_same_in_tree_mode():
    model, x = adapted(), jnp.asarray(IDS)
    expected = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, LoHaParam))(model)
    in_graph_mode = gradients(model, x)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        in_tree_mode = gradients(adapted(), x)
    for ours in (in_graph_mode, in_tree_mode):
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            close(one, other)
