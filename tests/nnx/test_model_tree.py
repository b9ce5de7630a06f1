"""`loha_jax.nnx.inject` on whole Flax NNX models: calls, NNX's own functions, training, adapters, files."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_reference import ALPHA, F64, R, at, dense, ndh, numpy_delta, table, targets, with_sums

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.nnx import InactiveLoHaParam, LoHaParam, inject, set_dropout

WIDTH = 4
IDS = np.arange(10).reshape(2, 5)


class Block(nnx.Module):
    def __init__(self, rngs, width=WIDTH):
        self.norm = nnx.LayerNorm(width, rngs=rngs, **F64)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs, **F64)
        self.down = nnx.Linear(2 * width, width, rngs=rngs, **F64)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs, **F64)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs, **F64)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


FOLDS = {
    "embed/embedding": table,
    "head/kernel": dense,
    **{f"layers/{n}/{name}/kernel": dense for n in range(2) for name in ("up", "down")},
}


def config(folds=FOLDS, **settings):
    """Random factors, so that the update is not zero."""
    return LoHaConfig(**{"r": R, "alpha": ALPHA, "init_weights": False, "target_modules": targets(folds)} | settings)


def adapted(build=Model, folds=FOLDS, seed=1, **settings):
    return inject(build(nnx.Rngs(0)), config(folds, **settings), rngs=nnx.Rngs(seed))


def close(a, b, atol=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def float64(x64):
    """Every test computes in float64."""


# ---------------------------------------------------------------------------------------------- structures of models


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
        self.ws = nnx.data([nnx.Param(jax.random.normal(rngs.params(), (4, 4), jnp.float64)) for _ in range(2)])
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
    "containers": (Containers, {f"{p}/kernel": dense for p in ("a/0", "a/1", "b/x", "c/0", "c/1/y")}),
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
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
    targets_ = [path.removesuffix("/kernel").removesuffix("/w").replace("/", ".") for path in folds]
    model = adapted(build, folds, target_modules=targets_)
    reference = with_sums(build(nnx.Rngs(0)), model, folds)
    close(model(x), reference(x))
    close(nnx.jit(lambda m, x: m(x))(model, x), reference(x))
    explained = loha_jax.explain(lambda m, x: m(x), model, x)
    assert (explained.dense, explained.unused) == ((), ())
    ids = [id(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    assert len(ids) == len(set(ids))
    assert len(ids) == len([v for _, v in nnx.iter_graph(build(nnx.Rngs(0))) if isinstance(v, nnx.Variable)]) + 4 * len(
        folds
    )


class Unusual(nnx.Module):
    """Its calls change it: an array, a plain attribute, statistics, a sown value; one returns the module itself."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, **F64)
        for statistic in (self.norm.mean, self.norm.var):  # Flax makes them float32 whatever the dtype
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


def test_what_a_call_changes_is_changed_in_the_model():
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
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
    rest = nnx.Not(nnx.Any(nnx.Param, LoHaParam, loha_jax.nnx.variables.Untrained))
    ours, theirs = nnx.to_flat_state(nnx.state(model, rest)), nnx.to_flat_state(nnx.state(plain, rest))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            a, b = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (a, b))
            close(a, b)
    returned, y = model.chain(x)
    assert returned is model
    assert model.last_shape == (3, 4)
    close(y, plain.chain(x)[1])


class Popping(nnx.Module):
    """Takes out what its call leaves behind, as tunix' classifier does, and what was there before."""

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
        x = jax.random.normal(jax.random.key(n), (2, 1, 4), jnp.float64)
        close((model if n % 2 else lambda x: step(model, x))(x), plain(x))
    close(model.cached_key[...], plain.cached_key[...])
    assert model.cache_index[...] == 5
    model.init_cache((2, 3, 4), jnp.float64)
    assert model.cached_key.shape == (2, 3, 2, 3)
    assert loha_jax.explain(lambda m, x: m(x), nnx.view(model, decode=False), jnp.ones((2, 5, 4))).dense == ()


# ---------------------------------------------------------------------------------------------- NNX's own functions


def jit_on_state(model, x):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def split_by_type(model, x):
    graphdef, factors, rest = nnx.split(model, LoHaParam, ...)
    assert len(jax.tree.leaves(factors)) == 4 * len(FOLDS)
    return nnx.merge(graphdef, factors, rest)(x)


def update_another(model, x):
    other = adapted(seed=2)
    assert jnp.abs(other(x) - model(x)).max() > 1e-3
    nnx.update(other, nnx.state(model, LoHaParam))
    return other(x)


def in_tree_mode(model, x):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        graphdef, state = nnx.split(model)
        close(nnx.merge(graphdef, state)(x), model(x))
        close(nnx.jit(lambda m, x: m(x))(model, x), model(x))
        return adapted()(x)


def gradients(model, x):
    graphdef, factors, rest = nnx.split(model, LoHaParam, ...)
    return jax.jit(jax.grad(lambda factors: (nnx.merge(graphdef, factors, rest)(x) ** 2).sum()))(factors)


def test_gradients_by_split_are_the_same_in_tree_mode():
    model, x = adapted(), jnp.asarray(IDS)
    expected = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, LoHaParam))(model)
    in_graph_mode = gradients(model, x)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        in_tree_mode = gradients(adapted(), x)
    for ours in (in_graph_mode, in_tree_mode):
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            close(one, other)


def scan_over_rows(model, x):
    return nnx.scan(lambda m, x: m(x[None])[0], in_axes=(None, 0), out_axes=0)(model, x)


FUNCTIONS = {
    "call": lambda m, x: m(x),
    "split and merge": lambda m, x: nnx.merge(*nnx.split(m))(x),
    "split by type": split_by_type,
    "state and update": update_another,
    "clone": lambda m, x: nnx.clone(m)(x),
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m))(x),
    "tree map": lambda m, x: jax.tree.map(lambda a: a, m)(x),
    "view": lambda m, x: nnx.view(m, deterministic=True, raise_if_not_found=False)(x),
    "nnx.jit": lambda m, x: nnx.jit(lambda m, x: m(x))(m, x),
    "cached_partial": lambda m, x: nnx.cached_partial(nnx.jit(lambda m, x: m(x)), m)(x),
    "jax.jit on the model": lambda m, x: jax.jit(lambda m, x: m(x))(m, x),
    "jax.jit on its state": jit_on_state,
    "remat": lambda m, x: nnx.remat(lambda m, x: m(x))(m, x),
    "vmap over rows": lambda m, x: nnx.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(m, x),
    "jax.vmap over rows": lambda m, x: jax.vmap(lambda x: m(x[None])[0])(x),
    "scan over rows": scan_over_rows,
    "cond": lambda m, x: nnx.cond(x[0, 0] == 0, lambda m, x: m(x), lambda m, x: m(x) + 1, m, x),
    "tree mode": in_tree_mode,
    "adapt": lambda m, x: loha_jax.adapt(lambda m, x: m(x))(m, x),
    "adapt, fused": lambda m, x: loha_jax.adapt(lambda m, x: m(x), strategy="fused")(m, x),
}


@pytest.fixture(scope="module")
def reference():
    with jax.enable_x64(True):
        model = adapted()
        return np.asarray(with_sums(Model(nnx.Rngs(0)), model, FOLDS)(IDS))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_goes_through_nnxs_functions(name, reference):
    model = adapted()
    close(FUNCTIONS[name](model, jnp.asarray(IDS)), reference)
    close(model(IDS), reference)


def test_the_model_is_printed_and_tabulated(capsys):
    model = adapted()
    nnx.display(model)
    assert "AdaptedKernel" in repr(model)
    assert "hada_w1_a" in repr(nnx.state(model, LoHaParam))
    out = model(IDS)
    text = nnx.tabulate(model, jnp.asarray(IDS), console_kwargs={"width": 200})
    assert "layers/0/up/kernel" in text
    assert "LoHaParam" in text
    close(model(IDS), out)


@pytest.mark.parametrize("scanned", ["inside", "outside"])
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_layers_stacked_by_vmap_and_scanned(scanned, remat):
    call = nnx.remat(lambda layer, x: layer(x)) if remat else lambda layer, x: layer(x)
    forward = nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(Block)(rngs.split(3))

        def __call__(self, x):
            return forward(x, self.layers)

    run = (lambda m, x: m(x)) if scanned == "inside" else (lambda m, x: forward(x, m.layers))
    folds = {"layers/up/kernel": dense, "layers/down/kernel": dense}
    x = jax.random.normal(jax.random.key(0), (3, WIDTH), jnp.float64)
    model = adapted(Stacked, folds, target_modules=["up", "down"])
    assert model.layers.up.kernel.names == ("layers.0.up", "layers.1.up", "layers.2.up")
    plain = with_sums(Stacked(nnx.Rngs(0)), model, folds)
    close(run(model, x), run(plain, x))
    explained = loha_jax.explain(run, model, x)
    assert (explained.dense, explained.unused) == ((), ())
    loss = lambda m: (run(m, x) ** 2).sum()  # noqa: E731
    ours = nnx.grad(loss, argnums=nnx.DiffState(0, LoHaParam))(model)
    kernel = nnx.grad(loss)(plain)["layers"]["up"]["kernel"][...]
    f = {n: v.get_value() for n, v in model.layers.up.kernel.adapters["default"].items()}
    expected = (kernel.swapaxes(1, 2) * (f["hada_w2_a"] @ f["hada_w2_b"]) * ALPHA / R) @ f["hada_w1_b"].swapaxes(1, 2)
    close(ours["layers"]["up"]["kernel"]["adapters"]["default"]["hada_w1_a"][...], expected)
    nnx.vmap(lambda layer: layer(x))(model.layers)
    close(nnx.vmap(lambda layer: layer(x))(model.layers), nnx.vmap(lambda layer: layer(x))(plain.layers))


# ---------------------------------------------------------------------------------------------- training


def functional(model, **settings):
    """The model as a function of a tree, the tree adapted with the factors that `adapted` draws, and the function."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    tree = loha_jax.inject(params, config(**settings), key=nnx.Rngs(1).params())

    def fn(tree, x):
        variables = nnx.to_flat_state(state)
        leaves = [loha_jax.nnx.model_tree._flat_leaves(tree)[path] for path, _ in variables]
        flat = [(path, v.replace(leaf)) for (path, v), leaf in zip(variables, leaves, strict=True)]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))(x)

    return tree, fn


def test_training_equals_training_the_tree_and_leaves_the_base_alone():
    model, tx = adapted(), optax.adam(1e-2)
    base = jax.tree.map(np.asarray, nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=LoHaParam)

    @nnx.jit
    def step(model, optimizer, x):
        loss_fn = lambda model: (model(x) ** 2).mean()  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, LoHaParam))(model)
        optimizer.update(model, grads)
        return loss

    tree, fn = functional(Model(nnx.Rngs(0)))
    trainable, frozen = loha_jax.partition(tree)
    opt_state, apply = tx.init(trainable), loha_jax.adapt(fn)

    @jax.jit
    def tree_step(trainable, opt_state, x):
        loss_fn = lambda t: (apply(loha_jax.combine(t, frozen), x) ** 2).mean()  # noqa: E731
        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, loss

    losses = []
    for _ in range(4):
        trainable, opt_state, expected = tree_step(trainable, opt_state, jnp.asarray(IDS))
        losses.append(step(model, optimizer, jnp.asarray(IDS)))
        close(losses[-1], expected)
    assert losses[-1] < losses[0]
    trained = loha_jax.combine(trainable, frozen)
    for path in FOLDS:
        leaf = trained
        for part in path.split("/"):
            leaf = leaf[int(part) if part.isdigit() else part]
        for name, tensor in leaf.adapters["default"].tensors.items():
            close(at(model, path).adapters["default"][name][...], tensor)
    after = nnx.state(loha_jax.unload(model), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, after))


class Wide(nnx.Module):
    def __init__(self, rngs):
        for n in range(3):
            setattr(self, f"l{n}", nnx.Linear(512, 512, use_bias=False, rngs=rngs))

    def __call__(self, x):
        return self.l2(jnp.tanh(self.l1(jnp.tanh(self.l0(x)))))


def test_the_jitted_step_makes_no_array_of_a_kernels_shape():
    with jax.enable_x64(False):
        targets_ = ["l0", "l1", "l2"]
        model = nnx.eval_shape(lambda: adapted(Wide, target_modules=targets_))
        assert isinstance(model.l0.kernel.base.get_value(), jax.ShapeDtypeStruct)
        graphdef, state = nnx.split(model)

        def kernel_shaped(call):
            def step(state, x):
                loss = lambda m: (call(m, x) ** 2).sum()  # noqa: E731
                return nnx.grad(loss, argnums=nnx.DiffState(0, LoHaParam))(nnx.merge(graphdef, state))

            compiled = jax.jit(step).lower(state, jax.ShapeDtypeStruct((64, 512), jnp.float32)).compile()
            made = re.findall(r"= f32\[512,512\]\S* (\w[\w-]*)\(", compiled.as_text())
            return [operation for operation in made if operation not in ("parameter", "get-tuple-element")]

        assert kernel_shaped(lambda m, x: m(x)) == []
        assert kernel_shaped(loha_jax.adapt(lambda m, x: m(x), strategy="dense"))  # the search finds them


def test_shapes_are_injected_without_values():
    shapes = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    inside = nnx.eval_shape(lambda: adapted())
    inject(shapes, config(), rngs=nnx.Rngs(1))
    real = adapted()
    described = lambda m: [(p, v.get_value().shape, v.get_value().dtype) for p, v in nnx.to_flat_state(nnx.state(m))]  # noqa: E731
    assert described(shapes) == described(inside) == described(real)
    assert nnx.graphdef(shapes) == nnx.graphdef(inside) == nnx.graphdef(real)
    assert nnx.eval_shape(lambda m, x: m(x), shapes, jnp.asarray(IDS)).shape == (2, 5, 3)
    assert loha_jax.summary(shapes) == loha_jax.summary(real)


def test_sharding_metadata_of_the_base_stays():
    def build(rngs):
        kernel_init = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))
        return nnx.Sequential(nnx.Linear(4, 6, kernel_init=kernel_init, rngs=rngs))

    with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        plain, model = build(nnx.Rngs(0)), adapted(build, {"layers/0/kernel": dense})
        expected = plain.layers[0].kernel
        assert "model" in str(expected.get_metadata())
        base = model.layers[0].kernel.base
        assert (base.get_metadata(), base.get_value().sharding) == (
            expected.get_metadata(),
            expected.get_value().sharding,
        )
        model(jnp.ones((2, 4)))
        merged = loha_jax.merge(model).layers[0].kernel
        assert merged.get_metadata() == expected.get_metadata()


# ---------------------------------------------------------------------------------------------- dropout


def drops(seed=1, **settings):
    """One layer whose outputs are the rows of ΔW·x, so that masks can be read off."""
    build = lambda rngs: nnx.Sequential(  # noqa: E731
        nnx.Linear(4, 64, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs, **F64)
    )
    return adapted(build, {"layers/0/kernel": dense}, seed=seed, **settings)


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_dropout_draws_anew_in_training_and_not_in_evaluation(kind, transform):
    model, x = drops(**{kind: 0.25}), jnp.ones((1, 4))
    run = transform(lambda m, x: m(x))
    model.eval()
    full = run(model, x)
    close(run(model, x), full)
    model.train()
    factors = []
    for _ in range(100):
        ratio = np.asarray(run(model, x) / full)
        kept = ratio > 0.5
        # The kept rows are multiplied by out/kept, a module as a whole by nothing.
        close(ratio, kept * (kept.size / max(kept.sum(), 1) if kind == "rank_dropout" else 1.0), 1e-9)
        factors.append(kept)
    assert len({f.tobytes() for f in factors}) > (90 if kind == "rank_dropout" else 1)
    draws = np.stack(factors)[:, :, :1] if kind == "module_dropout" else np.stack(factors)
    assert abs(draws.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / draws.size)
    model.eval()
    close(run(model, x), full)
    close(nnx.view(model, deterministic=True)(x), full)
    assert jnp.abs(nnx.view(model, deterministic=False)(x) - full).max() > 0 or kind == "module_dropout"


def test_dropout_differs_by_index_of_a_stack_and_trains():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 64, use_bias=False, rngs=rngs, **F64))(rngs.split(3))

        def __call__(self, x):
            return nnx.vmap(lambda layer: layer(x))(self.layers)

    model = adapted(Stacked, {"layers/kernel": dense}, rank_dropout=0.5)
    x = jnp.ones((1, 4))
    base = Stacked(nnx.Rngs(0))(x)
    for run in (lambda m: m(x), lambda m: nnx.vmap(lambda layer: layer(x))(m.layers)):
        masks = np.abs(np.asarray(run(model) - base)) > 1e-12
        assert len({mask.tobytes() for mask in masks}) == 3
        assert (np.abs(np.asarray(run(model) - base) > 1e-12) != masks).any()
    before = model.layers.kernel.rngs.count[...]
    nnx.grad(lambda m: m(x).sum(), argnums=nnx.DiffState(0, LoHaParam))(model)
    assert (model.layers.kernel.rngs.count[...] > before).all()


def test_an_adapter_that_drops_out_without_a_stream_is_an_error():
    model = loha_jax.inject(Model(nnx.Rngs(0)), config(rank_dropout=0.5), key=jax.random.key(0))
    model(IDS)  # in evaluation mode
    model.train()
    with pytest.raises(ValueError, match="set_dropout"):
        model(IDS)
    set_dropout(model, nnx.Rngs(0))
    model(IDS)


# ---------------------------------------------------------------------------------------------- several adapters


def two_adapters(**settings):
    model = adapted(**settings)
    return inject(model, config(alpha=5, **settings), rngs=nnx.Rngs(7), adapter_name="style")


def with_deltas(weights, folds=FOLDS):
    """A plain model with the weighted sum of the updates of `two_adapters`."""
    model, plain = two_adapters(), Model(nnx.Rngs(0))
    for path, fold in folds.items():
        variable = at(plain, path)
        for name, weight in weights.items():
            delta = numpy_delta(at(model, path), adapter=name, alpha={"default": ALPHA, "style": 5}[name])
            variable.set_value(variable.get_value() + weight * fold(delta, variable.shape))
    return plain


ADAPTERS = {  # what is done, and the weights of the adapters after it
    "injected twice": (lambda m: m, {"style": 1.0}),
    "set_adapter": (lambda m: loha_jax.set_adapter(m, "default"), {"default": 1.0}),
    "both": (lambda m: loha_jax.set_adapter(m, ["default", "style"]), {"default": 1.0, "style": 1.0}),
    "none": (lambda m: loha_jax.set_adapter(m, ()), {}),
    "scale": (
        lambda m: loha_jax.scale(loha_jax.set_adapter(m, ["default", "style"]), {"default": 0.5, "style": -2.0}),
        {"default": 0.5, "style": -2.0},
    ),
    "delete_adapter": (lambda m: loha_jax.delete_adapter(m, "style"), {}),
    "delete and set": (
        lambda m: loha_jax.set_adapter(loha_jax.delete_adapter(m, "style"), "default"),
        {"default": 1.0},
    ),
    "add_weighted_adapter": (
        lambda m: loha_jax.add_weighted_adapter(m, ["default", "style"], [0.7, 0.3], "mix"),
        {"default": 0.7, "style": 0.3},
    ),
    "merge": (loha_jax.merge, {"style": 1.0}),
    "merge one, keep the other": (
        lambda m: loha_jax.merge(m, ["default"], unload=False),
        {"default": 1.0, "style": 1.0},
    ),
    "merge both": (lambda m: loha_jax.merge(m, ["default", "style"], safe=True), {"default": 1.0, "style": 1.0}),
    "unload": (loha_jax.unload, {}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_functions_of_adapters_change_a_model_in_place(name):
    change, weights = ADAPTERS[name]
    model = two_adapters()
    assert change(model) is model
    close(model(IDS), with_deltas(weights)(IDS))
    active = {"add_weighted_adapter": {"mix"}}.get(name, set(weights))
    for path, node in loha_jax.nnx.variables.adapted_nodes(model).items():
        for adapter, variables in node.adapters.items():
            expected = LoHaParam if adapter in active else InactiveLoHaParam
            assert {type(v) for v in variables.values()} == {expected}, path
    if name in ("merge", "merge both", "unload"):
        assert type(model) is Model
        assert type(model.layers[0].up) is nnx.Linear
        assert type(model.layers[0].up.kernel) is nnx.Param
        assert nnx.graphdef(model) == nnx.graphdef(Model(nnx.Rngs(0)))
    if name == "unload":
        expected = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), expected)


def test_only_the_active_adapter_is_trained():
    model = two_adapters()
    assert loha_jax.adapter_names(model) == ("default", "style")
    rows = loha_jax.summary(model).rows
    assert {(row.adapter, row.active) for row in rows} == {("default", False), ("style", True)}
    inactive = jax.tree.map(np.asarray, nnx.state(model, InactiveLoHaParam))
    before = jax.tree.map(np.asarray, nnx.state(model, LoHaParam))
    assert len(jax.tree.leaves(inactive)) == len(jax.tree.leaves(before)) == 4 * len(FOLDS)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=LoHaParam)
    optimizer.update(model, nnx.grad(lambda m: m(IDS).sum(), argnums=nnx.DiffState(0, LoHaParam))(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, InactiveLoHaParam), inactive)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), nnx.state(model, LoHaParam), before)
    assert all(jax.tree.leaves(moved))


def test_each_row_through_its_own_adapter():
    model = loha_jax.set_adapter(two_adapters(), ["default", "style"])
    ids = jnp.concatenate([jnp.asarray(IDS)] * 2)[:3]
    chosen = jnp.array([1, -1, 0])
    expected = [with_deltas(w)(ids[n : n + 1])[0] for n, w in enumerate([{"style": 1.0}, {}, {"default": 1.0}])]
    for transform in (lambda f: f, nnx.jit):
        run = transform(lambda m, x, chosen: loha_jax.adapt(lambda m, x: m(x), adapter_index=chosen)(m, x))
        close(run(model, ids, chosen), np.stack(expected))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.a(x)))


def test_modules_to_save_are_trained_whole_and_their_originals_are_not():
    with jax.enable_x64(False):
        settings = {"target_modules": ["a"], "modules_to_save": ["head", "norm"]}
        model = adapted(Normed, **settings)
        frozen = {p: np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(Normed(nnx.Rngs(0))))}
        x = jax.random.normal(jax.random.key(0), (5, 4))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=LoHaParam)
        plain = loha_jax.merge(nnx.clone(model))

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, LoHaParam))(model))

        plain_grads = nnx.grad(lambda m: (m(x) ** 2).sum())(plain)  # updates plain's statistics as well
        expected = plain.head.kernel[...] - 0.1 * plain_grads["head"]["kernel"][...]
        step(model, optimizer)
        close(model.head.kernel.copies["default"][...], expected, 1e-6)
        close(model.norm.mean.copies["default"][...], plain.norm.mean[...], 1e-7)
        assert type(model.norm.mean.copies["default"]) is nnx.BatchStat
        assert jnp.abs(model.norm.mean.copies["default"][...] - model.norm.mean.base[...]).max() > 1e-3
        assert loha_jax.explain(lambda m, x: m(x), model, x).dense == ()
        model.eval()
        out = model(x)
        merged = loha_jax.merge(nnx.clone(model))
        close(merged(x), out, 1e-5)
        assert type(merged.norm.mean) is nnx.BatchStat
        np.testing.assert_array_equal(merged.norm.mean[...], model.norm.mean.copies["default"][...])
        rest = loha_jax.unload(model)
        for path, variable in nnx.to_flat_state(nnx.state(rest)):
            np.testing.assert_array_equal(frozen[path], variable.get_value())


# ---------------------------------------------------------------------------------------------- layouts and errors


class Bare(nnx.Module):
    """A weight of three axes; nothing but its use says what they are."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2, 4, 3), jnp.float64))

    def __call__(self, x):
        return jnp.einsum("btd,ndh->btnh", x, self.w[...])


def test_an_ambiguous_weight_is_an_error_that_both_ways_settle():
    build, folds, x = lambda rngs: nnx.Dict(l=Bare(rngs)), {"l/w": ndh}, jnp.ones((1, 5, 4))
    with pytest.raises(ValueError, match=r"l\.w of shape \(2, 4, 3\) could be several.*layouts=.*infer_layouts"):
        adapted(build, folds)
    inferred = loha_jax.infer_layouts(lambda m, x: m.l(x), build(nnx.Rngs(0)), x)
    assert {name: str(layout) for name, layout in inferred.items()} == {"l": "oio"}
    for layouts in (inferred, {"l": "oio"}):
        model = inject(build(nnx.Rngs(0)), config(folds), rngs=nnx.Rngs(1), layouts=layouts)
        close(model.l(x), with_sums(build(nnx.Rngs(0)), model, folds).l(x))
    with pytest.raises(ValueError, match="describes 2 axes"):
        inject(build(nnx.Rngs(0)), config(folds), rngs=nnx.Rngs(1), layouts={"l": "io"})


class InTuple(nnx.Module):
    def __init__(self, rngs):
        self.ws = nnx.data((nnx.Param(jnp.eye(4)),))


WRONG = {
    "partition": (lambda: loha_jax.partition(adapted()), TypeError, "not a model"),
    "trainable_mask": (lambda: loha_jax.trainable_mask(adapted()), TypeError, "nnx.split"),
    "dropout": (lambda: loha_jax.dropout(adapted(), jax.random.key(0)), TypeError, "set_dropout"),
    "no such target": (lambda: adapted(target_modules=["upp"]), ValueError, r"'upp'.*'up'"),
    "the name again": (lambda: inject(adapted(), config(), rngs=nnx.Rngs(0)), ValueError, "already exists"),
    "no such adapter": (lambda: loha_jax.set_adapter(adapted(), "other"), ValueError, "Adapter other not found"),
    "in a tuple": (lambda: adapted(InTuple, target_modules=["ws.0"]), ValueError, "ws.0 sits in a tuple"),
    "a norm": (lambda: adapted(target_modules=["norm"]), ValueError, "cannot be adapted"),
    "no rngs": (lambda: inject(Model(nnx.Rngs(0)), config()), TypeError, "rngs"),
    "a key for rngs": (lambda: inject(Model(nnx.Rngs(0)), config(), rngs=jax.random.key(0)), TypeError, "nnx.Rngs"),
    "a tree for a model": (
        lambda: inject({"l": {"kernel": jnp.eye(3)}}, config(), rngs=nnx.Rngs(0)),
        TypeError,
        "loha_jax.inject",
    ),
    "set_dropout of a tree": (lambda: set_dropout({}, nnx.Rngs(0)), TypeError, "loha_jax.dropout"),
    "two copies of one module": (
        lambda: loha_jax.set_adapter(
            two_adapters(target_modules=["up"], modules_to_save=["head"]), ["default", "style"]
        )(IDS),
        ValueError,
        "Only one adapter at a time can replace head",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_to_do(name):
    use, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        use()


class InTupleToo(Model):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.ws = nnx.data((nnx.Param(jnp.eye(4)),))


@pytest.mark.parametrize("targets_", [["upp"], ["up", "ws.0"]])
def test_a_failed_injection_changes_nothing(targets_):
    model = InTupleToo(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    with pytest.raises(ValueError, match=targets_[-1]):
        inject(model, config(target_modules=targets_), rngs=nnx.Rngs(0))
    assert type(model) is InTupleToo
    assert nnx.graphdef(model) == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), state)
