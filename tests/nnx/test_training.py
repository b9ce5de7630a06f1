import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from nnx_models import FOLDS, IDS, Model, adapted, close, config, split
from nnx_reference import F64, dense, factors

import loha_jax
from loha_jax.nnx import LoHaParam, inject, set_dropout


@pytest.fixture(autouse=True)
def float64(x64):
    """Every test computes in float64."""


# ---------------------------------------------------------------------------------------- training


def functional(model, **settings):
    """The tree of a model, with the factors that `adapted` draws, and the model as its function."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    tree = loha_jax.inject(params, config(**settings), key=nnx.Rngs(1).params())

    def fn(tree, x):
        variables = nnx.to_flat_state(state)
        flat = flatten_dict(tree, is_leaf=lambda _, x: not isinstance(x, dict))
        leaves = [flat[path] for path, _ in variables]
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
            close(factors(model, path)[name][...], tensor)
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
        assert isinstance(model.l0.kernel.get_value(), jax.ShapeDtypeStruct)
        graphdef, state = nnx.split(model)

        def kernel_shaped(call):
            def step(state, x):
                loss = lambda m: (call(m, x) ** 2).sum()  # noqa: E731
                return nnx.grad(loss, argnums=nnx.DiffState(0, LoHaParam))(
                    nnx.merge(graphdef, state)
                )

            compiled = (
                jax.jit(step).lower(state, jax.ShapeDtypeStruct((64, 512), jnp.float32)).compile()
            )
            made = re.findall(r"= f32\[512,512\]\S* (\w[\w-]*)\(", compiled.as_text())
            return [
                operation
                for operation in made
                if operation not in ("parameter", "get-tuple-element")
            ]

        assert kernel_shaped(lambda m, x: m(x)) == []
        assert kernel_shaped(
            loha_jax.adapt(lambda m, x: m(x), strategy="dense")
        )  # the search finds them


def test_shapes_are_injected_without_values():
    shapes = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    inside = nnx.eval_shape(lambda: adapted())
    inject(shapes, config(), rngs=nnx.Rngs(1))
    real = adapted()

    def described(model):
        flat = nnx.to_flat_state(nnx.state(model))
        return [(path, v.get_value().shape, v.get_value().dtype) for path, v in flat]

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
        base = model.layers[0].kernel
        assert (base.get_metadata(), base.get_value().sharding) == (
            expected.get_metadata(),
            expected.get_value().sharding,
        )
        model(jnp.ones((2, 4)))
        merged = loha_jax.merge(model).layers[0].kernel
        assert merged.get_metadata() == expected.get_metadata()


# ----------------------------------------------------------------------------------------- dropout


def drops(seed=1, **settings):
    """One layer whose outputs are the rows of ΔW·x, so that masks can be read off."""
    build = lambda rngs: nnx.Sequential(  # noqa: E731
        nnx.Linear(4, 64, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs, **F64)
    )
    return adapted(build, {"layers/0/kernel": dense}, seed=seed, **settings)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax 0.12.3 has no nnx.view")
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
        close(
            ratio, kept * (kept.size / max(kept.sum(), 1) if kind == "rank_dropout" else 1.0), 1e-9
        )
        factors.append(kept)
    assert len({f.tobytes() for f in factors}) > (90 if kind == "rank_dropout" else 1)
    draws = np.stack(factors)[:, :, :1] if kind == "module_dropout" else np.stack(factors)
    assert abs(draws.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / draws.size)
    model.eval()
    close(run(model, x), full)
    close(nnx.view(model, deterministic=True)(x), full)
    assert (
        jnp.abs(nnx.view(model, deterministic=False)(x) - full).max() > 0
        or kind == "module_dropout"
    )


def test_dropout_differs_by_index_of_a_stack_and_trains():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(
                lambda rngs: nnx.Linear(4, 64, use_bias=False, rngs=rngs, **F64)
            )(split(rngs, 3))

        def __call__(self, x):
            return nnx.vmap(lambda layer: layer(x))(self.layers)

    model = adapted(Stacked, {"layers/kernel": dense}, rank_dropout=0.5)
    x = jnp.ones((1, 4))
    base = Stacked(nnx.Rngs(0))(x)
    for run in (lambda m: m(x), lambda m: nnx.vmap(lambda layer: layer(x))(m.layers)):
        masks = np.abs(np.asarray(run(model) - base)) > 1e-12
        assert len({mask.tobytes() for mask in masks}) == 3
        assert (np.abs(np.asarray(run(model) - base) > 1e-12) != masks).any()
    before = model.layers.kernel_lora_rngs.count[...]
    nnx.grad(lambda m: m(x).sum(), argnums=nnx.DiffState(0, LoHaParam))(model)
    assert (model.layers.kernel_lora_rngs.count[...] > before).all()


def test_an_adapter_that_drops_out_without_a_stream_is_an_error():
    model = loha_jax.inject(Model(nnx.Rngs(0)), config(rank_dropout=0.5), key=jax.random.key(0))
    model(IDS)  # in evaluation mode
    model.train()
    with pytest.raises(ValueError, match="set_dropout"):
        model(IDS)
    set_dropout(model, nnx.Rngs(0))
    model(IDS)
