from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_trees import KEY, base, dense, inject, saved, start
from flax import nnx

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, checkpoint
from loha_jax.checkpoint import Checkpoints
from loha_jax.interop import FileError


def replaced(tree, path, change):
    tree = dict(tree)
    tree[path[0]] = (
        change(tree[path[0]]) if len(path) == 1 else replaced(tree[path[0]], path[1:], change)
    )
    return tree


def without(tree, name):
    return {k: v for k, v in tree.items() if k != name}


OTHERS = {
    "a value of the base": (
        lambda: inject(replaced(base(), ["linear/~/sub", "w"], lambda x: x.at[1, 1].add(1e-6))),
        ["params['linear/~/sub']['w'].kernel (base): given other values"],
    ),
    "a leaf that is not adapted": (
        lambda: inject(replaced(base(), ["head", "bias"], lambda x: x * 2)),
        [
            "params['head']['bias'] (base): given other values, the checkpoint was made on "
            "bfloat16[2]"
        ],
    ),
    "two leaves": (
        lambda: inject(
            replaced(
                replaced(base(), ["head", "bias"], lambda x: x.astype(jnp.float32)),
                ["conv", "kernel"],
                jnp.sin,
            )
        ),
        [
            "params['head']['bias'] (base): given float32[2]",
            "params['conv']['kernel'] (base): given other values",
        ],
    ),
    "a leaf more": (
        lambda: {**dense(), "new": jnp.ones(3)},
        ["params['new'] (base): given float32[3], the checkpoint was made on nothing"],
    ),
    "a leaf less": (
        lambda: without(dense(), "conv"),
        [
            "params['conv']['kernel'] (base): given nothing, the checkpoint was made on "
            "float32[3,3,4,6]"
        ],
    ),
    "rank": (
        lambda: inject(base(), r=3),
        ["adapter default, ranks: given [3], the checkpoint has [2]", "config, r: given 3"],
    ),
    "alpha": (lambda: inject(base(), alpha=16), ["config, alpha: given 16, the checkpoint has 8"]),
    "dropout": (
        lambda: inject(base(), rank_dropout=0.5),
        ["config, rank_dropout: given 0.5, the checkpoint has 0.0"],
    ),
    "patterns": (
        lambda: inject(base(), rank_pattern={"sub": 2}),
        ["config, rank_pattern: given {'sub': 2}, the checkpoint has {}"],
    ),
    "class": (
        lambda: loha_jax.inject(
            base(), LycorisConfig(r=2, target_modules=["sub"], init_weights=False), key=KEY
        ),
        [
            "config, class: given 'LycorisConfig', the checkpoint has 'LoHaConfig'",
            "config, use_scalar: given False",
        ],
    ),
    "name of the adapter": (
        lambda: loha_jax.inject(
            base(),
            LoHaConfig(r=2, target_modules=["sub"], init_weights=False),
            key=KEY,
            adapter_name="other",
        ),
        ["adapter other: given an adapter, the checkpoint has nothing", "active: given ['other']"],
    ),
    "activity": (
        lambda: loha_jax.set_adapter(dense(), ()),
        ["active: given [], the checkpoint has ['default']"],
    ),
    "module": (
        lambda: loha_jax.inject(
            base(),
            LoHaConfig(r=2, target_modules=["x"], init_weights=False),
            key=KEY,
            names={".*sub": "x"},
        ),
        ["names: given ['x'], the checkpoint has ['linear.sub']"],
    ),
    "layout": (
        lambda: loha_jax.inject(
            base(),
            LoHaConfig(r=2, target_modules=["sub"], init_weights=False),
            key=KEY,
            layouts={".*sub": "oi"},
        ),
        ["layout: given 'oi', the checkpoint has 'io'"],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_all_differences_are_named(tmp_path, kind):
    """An error names all that differs from what was saved."""
    make, lines = OTHERS[kind]
    saved(tmp_path, 1)
    given = make()
    with pytest.raises(ValueError, match="belongs to something else than what was given") as raised:
        checkpoint.restore(tmp_path, given)
    assert not isinstance(raised.value, FileError)
    for line in lines:
        assert line in str(raised.value)
    assert checkpoint.restore(tmp_path, dense()).step == 1


def test_a_difference_of_many_leaves_is_one_line(tmp_path):
    """A deep model of another rank is named in as many lines as a shallow one, with the number."""

    def deep(r):
        layers = [{n: {"kernel": jnp.ones((4, 4))} for n in "qv"} for _ in range(6)]
        config = LoHaConfig(r=r, target_modules=["q", "v"])
        return loha_jax.inject({"layers": layers}, config, key=KEY)

    with Checkpoints(tmp_path) as run:
        run.save(1, deep(2))
    with pytest.raises(ValueError, match="belongs to something else") as raised:
        checkpoint.restore(tmp_path, deep(3))
    lines = [line for line in str(raised.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == 2  # the ranks and the config's r, from which the shapes follow
    assert all("(so in 11 more: params['layers'][0]['v']" in line for line in lines)


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        (
            optax.sgd(0.1),
            "opt_state: given ['EmptyState', 'EmptyState'], the checkpoint has ['ScaleByAdamState'",
        ),
        (
            optax.adabelief(0.1),
            "opt_state: given ['ScaleByBeliefState'",
        ),  # of the same names and shapes as Adam's
        (
            optax.adamw(lambda step: 0.1),
            "opt_state[2].count: given int32[], the checkpoint has nothing",
        ),
        (
            optax.adamw(0.1, mu_dtype=jnp.int32),
            ".mu['linear/~/sub']['w'].adapters['default'].hada_w1_a: given int32[5,2]",
        ),
    ],
    ids=["sgd", "adabelief", "schedule", "integers"],
)
def test_another_optimizer_is_an_error(tmp_path, optimizer, line):
    saved(tmp_path, 1)
    params = dense()
    with pytest.raises(ValueError, match="belongs to something else") as raised:
        checkpoint.restore(tmp_path, params, optimizer.init(loha_jax.partition(params)[0]))
    assert line in str(raised.value)


def nnx_run():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    config = LoHaConfig(r=2, target_modules="all-linear")
    model = loha_jax.nnx.inject(model, config, rngs=nnx.Rngs(1))
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.LoRAParam)


def test_an_optimizer_in_the_place_of_its_state_is_a_short_error(tmp_path):
    model, optimizer = nnx_run()
    checkpoint.save(tmp_path / "run", model, nnx.state(optimizer))
    for given, advice in [
        (optimizer, r"nnx\.state\(optimizer\)"),
        ({"adapter": optimizer}, r"nnx\.state\(optimizer\)"),
        (optax.adam(0.1), r"optimizer\.init\(trainable\)"),
        ([optax.adam(0.1)], r"optimizer\.init\(trainable\)"),
        (Solver(), r"optimizer\.init\(trainable\)"),
    ]:
        for call in (checkpoint.save, checkpoint.restore):
            with pytest.raises(TypeError, match=advice) as raised:
                call(tmp_path / "run", model, given, step=1)
            assert len(str(raised.value)) < 100
    restored = checkpoint.restore(tmp_path / "run", model, nnx.state(optimizer))
    nnx.update(optimizer, restored.opt_state)


class Solver:
    """An optimizer that is no pytree."""

    def init(self, params):
        raise NotImplementedError

    def update(self, grads, state):
        raise NotImplementedError


class Momentum(eqx.Module):
    """The state of an optimizer, with methods of an optimizer's names."""

    mean: jax.Array

    def init(self, params):
        raise NotImplementedError

    def update(self, grads):
        raise NotImplementedError


class Counted(NamedTuple):
    """The same as a tuple whose fields have these names."""

    init: jax.Array
    update: jax.Array


@pytest.mark.parametrize("state", [Momentum(jnp.arange(3.0)), Counted(jnp.ones(2), jnp.ones(3))])
def test_a_state_with_the_methods_of_an_optimizer_is_kept(tmp_path, state):
    checkpoint.save(tmp_path, inject(base()), state, step=1)
    restored = checkpoint.restore(tmp_path, inject(base()), state).opt_state
    assert type(restored) is type(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_optimizer_state_left_out(
    tmp_path,
):
    """A state that is not asked for is not needed and one that was not saved is an error."""
    params, opt_state = start()
    saved(tmp_path / "with", 1)
    assert checkpoint.restore(tmp_path / "with", params).opt_state is None
    checkpoint.save(tmp_path / "without", params)
    with pytest.raises(ValueError, match="opt_state"):
        checkpoint.restore(tmp_path / "without", params, opt_state)


def test_what_cannot_be_saved(tmp_path):
    params, _ = start()
    trainable, frozen = loha_jax.partition(params)
    for given, error, message in [
        ((base(),), ValueError, "holds no adapter"),
        ((trainable,), ValueError, "one half of `partition`"),
        ((frozen,), ValueError, "one half of `partition`"),
        ((nnx.Linear(2, 2, rngs=nnx.Rngs(0)),), ValueError, "holds no adapter"),
        ((params, {"x": "word"}), TypeError, r"opt_state\['x'\] is of type str"),
        ((jax.eval_shape(lambda: params),), ValueError, "no values to save"),
    ]:
        with pytest.raises(error, match=message):
            checkpoint.save(tmp_path, *given)
    for data, message in [
        ({1: 2}, "data should be what JSON holds"),
        ({"a": [b"x"]}, r"data\['a'\]\[0\] .* bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, params, data=data)
    with pytest.raises(ValueError, match=r"metrics\['loss'\] should be a number"):
        checkpoint.save(tmp_path, params, metrics={"loss": jnp.ones(2)})
    for step in (-1, 2.5, True, 2**31, "1"):
        with pytest.raises(ValueError, match="The step should be an integer"):
            checkpoint.save(tmp_path, params, step=step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": True}, {"keep_best": -1}, {"best_mode": "least"}]
)
def test_what_cannot_be_kept(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpoints(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
