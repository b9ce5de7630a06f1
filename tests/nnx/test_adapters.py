import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import FOLDS, IDS, Model, adapted, close, config
from nnx_reference import ALPHA, at, factors, ndh, numpy_delta, with_sums
from random_arrays import normal_array

import loha_jax
from loha_jax.nnx import InactiveLoHaParam, LoHaParam, inject, set_dropout


@pytest.fixture(autouse=True)
def float64(x64):
    """Every test computes in float64."""


# -------------------------------------------------------------------------------- several adapters


def two_adapters(**settings):
    model = adapted(**settings)
    return inject(model, config(alpha=5, **settings), rngs=nnx.Rngs(7), adapter_name="style")


def with_deltas(weights, folds=FOLDS):
    """A plain model with the weighted sum of the updates of `two_adapters`."""
    model, plain = two_adapters(), Model(nnx.Rngs(0))
    for path, fold in folds.items():
        variable = at(plain, path)
        for name, weight in weights.items():
            alpha = {"default": ALPHA, "style": 5}[name]
            delta = numpy_delta(model, path, adapter=name, alpha=alpha)
            variable.set_value(variable.get_value() + weight * fold(delta, variable.shape))
    return plain


ADAPTERS = {  # what is done, and the weights of the adapters after it
    "injected twice": (lambda m: m, {"style": 1.0}),
    "set_adapter": (lambda m: loha_jax.set_adapter(m, "default"), {"default": 1.0}),
    "both": (
        lambda m: loha_jax.set_adapter(m, ["default", "style"]),
        {"default": 1.0, "style": 1.0},
    ),
    "none": (lambda m: loha_jax.set_adapter(m, ()), {}),
    "scale": (
        lambda m: loha_jax.scale(
            loha_jax.set_adapter(m, ["default", "style"]), {"default": 0.5, "style": -2.0}
        ),
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
    "merge both": (
        lambda m: loha_jax.merge(m, ["default", "style"], safe=True),
        {"default": 1.0, "style": 1.0},
    ),
    "unload": (loha_jax.unload, {}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_functions_of_adapters_change_a_model_in_place(name):
    change, weights = ADAPTERS[name]
    model = two_adapters()
    assert change(model) is model
    close(model(IDS), with_deltas(weights)(IDS))
    active = {"add_weighted_adapter": {"mix"}}.get(name, set(weights))
    for path in FOLDS:
        for adapter in loha_jax.adapter_names(model):
            expected = LoHaParam if adapter in active else InactiveLoHaParam
            assert {type(v) for v in factors(model, path, adapter).values()} == {expected}, path
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
    optimizer.update(
        model, nnx.grad(lambda m: m(IDS).sum(), argnums=nnx.DiffState(0, LoHaParam))(model)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, InactiveLoHaParam), inactive)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), nnx.state(model, LoHaParam), before)
    assert all(jax.tree.leaves(moved))


def test_each_row_through_its_own_adapter():
    model = loha_jax.set_adapter(two_adapters(), ["default", "style"])
    ids = jnp.concatenate([jnp.asarray(IDS)] * 2)[:3]
    chosen = jnp.array([1, -1, 0])
    expected = [
        with_deltas(w)(ids[n : n + 1])[0]
        for n, w in enumerate([{"style": 1.0}, {}, {"default": 1.0}])
    ]
    for transform in (lambda f: f, nnx.jit):
        run = transform(
            lambda m, x, chosen: loha_jax.adapt(lambda m, x: m(x), adapter_index=chosen)(m, x)
        )
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
        frozen = {
            p: np.asarray(v.get_value())
            for p, v in nnx.to_flat_state(nnx.state(Normed(nnx.Rngs(0))))
        }
        x = normal_array(0, (5, 4))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=LoHaParam)
        plain = loha_jax.merge(nnx.clone(model))

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(
                model,
                nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, LoHaParam))(model),
            )

        plain_grads = nnx.grad(lambda m: (m(x) ** 2).sum())(
            plain
        )  # updates plain's statistics as well
        expected = plain.head.kernel[...] - 0.1 * plain_grads["head"]["kernel"][...]
        step(model, optimizer)
        close(model.head.kernel_lora_copy[...], expected, 1e-6)
        close(model.norm.mean_lora_copy[...], plain.norm.mean[...], 1e-7)
        assert type(model.norm.mean_lora_copy) is nnx.BatchStat
        assert jnp.abs(model.norm.mean_lora_copy[...] - model.norm.mean[...]).max() > 1e-3
        assert loha_jax.explain(lambda m, x: m(x), model, x).dense == ()
        model.eval()
        out = model(x)
        merged = loha_jax.merge(nnx.clone(model))
        close(merged(x), out, 1e-5)
        assert type(merged.norm.mean) is nnx.BatchStat
        np.testing.assert_array_equal(merged.norm.mean[...], model.norm.mean_lora_copy[...])
        rest = loha_jax.unload(model)
        for path, variable in nnx.to_flat_state(nnx.state(rest)):
            np.testing.assert_array_equal(frozen[path], variable.get_value())


# ------------------------------------------------------------------------------ layouts and errors


class Bare(nnx.Module):
    """A weight of three axes; nothing but its use says what they are."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2, 4, 3), jnp.float64))

    def __call__(self, x):
        return jnp.einsum("btd,ndh->btnh", x, self.w[...])


def test_an_ambiguous_weight_is_an_error_that_both_ways_settle():
    build, folds, x = lambda rngs: nnx.Dict(l=Bare(rngs)), {"l/w": ndh}, jnp.ones((1, 5, 4))
    with pytest.raises(
        ValueError, match=r"l\.w of shape \(2, 4, 3\) could be several.*layouts=.*infer_layouts"
    ):
        adapted(build, folds)
    inferred = loha_jax.infer_layouts(lambda m, x: m.l(x), build(nnx.Rngs(0)), x)
    assert {name: str(layout) for name, layout in inferred.items()} == {"l": "oio"}
    for layouts in (inferred, {"l": "oio"}):
        model = inject(build(nnx.Rngs(0)), config(folds), rngs=nnx.Rngs(1), layouts=layouts)
        close(model.l(x), with_sums(build(nnx.Rngs(0)), model, folds).l(x))
    with pytest.raises(ValueError, match="describes 2 axes"):
        inject(build(nnx.Rngs(0)), config(folds), rngs=nnx.Rngs(1), layouts={"l": "io"})


class Taken(Model):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.head.kernel_lora_hada_w1_a = nnx.Param(jnp.eye(4))


WRONG = {
    "partition": (lambda: loha_jax.partition(adapted()), TypeError, "not a model"),
    "trainable_mask": (lambda: loha_jax.trainable_mask(adapted()), TypeError, "nnx.split"),
    "dropout": (lambda: loha_jax.dropout(adapted(), jax.random.key(0)), TypeError, "set_dropout"),
    "no such target": (lambda: adapted(target_modules=["upp"]), ValueError, r"'upp'.*'up'"),
    "the name again": (
        lambda: inject(adapted(), config(), rngs=nnx.Rngs(0)),
        ValueError,
        "already exists",
    ),
    "no such adapter": (
        lambda: loha_jax.set_adapter(adapted(), "other"),
        ValueError,
        "Adapter other not found",
    ),
    "in a list without a module": (
        lambda: adapted(lambda rngs: nnx.List([nnx.Param(jnp.eye(4))]), target_modules=["0"]),
        ValueError,
        "0 sits in a list that no module holds",
    ),
    "the name of a sibling is taken": (
        lambda: adapted(Taken, target_modules=["head"]),
        ValueError,
        "The module of head.kernel already has an attribute kernel_lora_hada_w1_a",
    ),
    "a norm": (lambda: adapted(target_modules=["norm"]), ValueError, "cannot be adapted"),
    "no rngs": (lambda: inject(Model(nnx.Rngs(0)), config()), TypeError, "rngs"),
    "a key for rngs": (
        lambda: inject(Model(nnx.Rngs(0)), config(), rngs=jax.random.key(0)),
        TypeError,
        "nnx.Rngs",
    ),
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


@pytest.mark.parametrize("targets_", [["upp"], ["up", "head"]])
def test_a_failed_injection_changes_nothing(targets_):
    model = Taken(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    with pytest.raises(ValueError, match=targets_[-1]):
        inject(model, config(target_modules=targets_), rngs=nnx.Rngs(0))
    assert type(model) is Taken
    assert nnx.graphdef(model) == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), state)
