"""A tree's structure: alpha/r is part of it, the way a number is written is not."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_kernel import RNG, X, adapted, config_of, forward, reference

import loha_jax
from loha_jax import interop

STACK = {"q": {"kernel": jnp.asarray(RNG.normal(size=(3, 5, 4)), jnp.float32)}}


@pytest.mark.parametrize("transform", ["vmap", "scan", "adapt scan", "dense"])
@pytest.mark.parametrize("alphas", [{}, {"1": 8.0}, {"0": 1.0, "2": 3.0}])
def test_slices_of_a_stack_keep_their_own_alpha_over_r(transform, alphas):
    """Outside `adapt`, a scan or vmap cuts the arrays of a leaf, but not what is static."""
    config = loha_jax.LoHaConfig(
        r=2,
        alpha=4,
        target_modules=["0", "1", "2"],
        init_weights=False,
        alpha_pattern=alphas,
    )
    params = loha_jax.inject(
        STACK, config, key=jax.random.key(0), layouts={"q": "sio"}, names={"q": "q.{}"}
    )
    leaf = params["q"]["kernel"]
    given = tuple(alphas.get(str(n), 4.0) for n in range(3))
    factors = leaf.adapters["default"]
    assert factors.alphas == given
    assert (factors.module_index is None) == (not alphas)
    apply = {
        "vmap": lambda: jax.vmap(lambda w: X @ w)(leaf),
        "scan": lambda: jax.lax.scan(lambda c, w: (c, X @ w), 0, leaf)[1],
        "adapt scan": lambda: loha_jax.adapt(
            lambda leaf: jax.lax.scan(lambda c, w: (c, X @ w), 0, leaf)[1]
        )(leaf),
        "dense": lambda: X @ jnp.asarray(leaf),
    }[transform]
    tensors = factors.tensors
    for n, got in enumerate(apply()):
        want = reference(
            STACK["q"]["kernel"][n], {name: t[n] for name, t in tensors.items()}, given[n] / 2
        )
        np.testing.assert_allclose(got, np.asarray(X, np.float64) @ want, rtol=2e-5, atol=2e-5)


def test_a_number_that_scale_is_given_inside_jit_compiles_once():
    params, traces = adapted(), []

    @jax.jit
    def run(params, x, s):
        traces.append(1)
        return loha_jax.adapt(forward)(loha_jax.scale(params, {"default": s}), x)

    leaf = params["q"]["kernel"]
    for s in (0.0, 0.5, -2.0):
        want = np.asarray(X, np.float64) @ reference(
            leaf.kernel, leaf.adapters["default"].tensors, 2 * s
        )
        np.testing.assert_allclose(run(params, X, s), want, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(
            loha_jax.adapt(forward)(loha_jax.scale(params, {"default": s}), X), want, atol=2e-5
        )
    assert len(traces) == 1
    assert (
        loha_jax.scale(params, {"default": np.float32(0.5)})["q"]["kernel"]
        .adapters["default"]
        .scaling
        == 1.0
    )


@pytest.mark.parametrize(
    "fields",
    [{"rank_dropout": 0.5}, {"module_dropout": 0.5}, {"r": 3}, {"alpha": 5}],
    ids=lambda f: next(iter(f)),
)
def test_what_computing_needs_is_structure(fields):
    assert jax.tree.structure(adapted()) != jax.tree.structure(adapted(**fields))


def test_how_a_number_is_written_is_no_structure(tmp_path):
    whole, point = adapted(alpha=4), adapted(key=1, alpha=4.0)
    assert jax.tree.structure(whole) == jax.tree.structure(point)
    jax.tree.map(lambda x, y: (x + y) / 2, whole, point)
    for params, written in ((whole, "4"), (jax.tree.map(lambda x: x, point), "4.0")):
        interop.save_peft(tmp_path, params)
        assert f'"alpha": {written},' in (tmp_path / "adapter_config.json").read_text()


# --- configs: equality, hash, pickle ---


def test_equal_configs():
    """Configs are compared in full and by the order of their patterns."""
    one = loha_jax.LoHaConfig(
        rank_pattern={"a": 2, "b": 3}, target_modules=["x", "y"], auto_mapping={"a": [1]}
    )
    assert one == dataclasses.replace(one)
    assert hash(one) == hash(dataclasses.replace(one))
    for fields in (
        {"rank_pattern": {"b": 3, "a": 2}},
        {"peft_version": "0"},
        {"auto_mapping": {"a": [2]}},
    ):
        assert one != dataclasses.replace(one, **fields)
    assert one != loha_jax.LycorisConfig(
        **{f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    )


def test_the_hash_of_a_pickled_config(tmp_path):
    """A pickled config has the hash of the process that reads it."""
    params = adapted(base_model_name_or_path="org/base")
    config = config_of(params)
    hash(config), jax.tree.structure(params)
    (tmp_path / "pickle").write_bytes(pickle.dumps((config, jax.tree.map(np.asarray, params))))
    code = (
        "import pickle, sys, jax, loha_jax\n"
        "config, params = pickle.load(open(sys.argv[1], 'rb'))\n"
        "fresh = loha_jax.LoHaConfig(r=2, alpha=4, target_modules=['q'], init_weights=False,\n"
        "    base_model_name_or_path='org/base')\n"
        "held = params['q']['kernel'].adapters['default'].config\n"
        "assert config == fresh == held and len({config, fresh, held}) == 1, (hash(config), "
        "hash(fresh))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "pickle"], check=True, env=environment)


def test_pickle_and_copy_give_the_same_structure():
    params = adapted()
    for other in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), copy.copy(params)):
        assert jax.tree.structure(other) == jax.tree.structure(params)
        np.testing.assert_array_equal(
            loha_jax.merge(other)["q"]["kernel"], loha_jax.merge(params)["q"]["kernel"]
        )


# --- a dropout that nobody applies ---


def test_a_forgotten_dropout_is_a_warning_once(monkeypatch):
    """A dropout config that nothing reads is a warning once."""
    from loha_jax.tree import forgotten_dropout

    monkeypatch.setattr(forgotten_dropout, "_done", set())
    trainable, frozen = loha_jax.partition(adapted(rank_dropout=0.5))

    def loss(trainable):
        return loha_jax.adapt(forward)(loha_jax.combine(trainable, frozen), X).sum()

    loha_jax.adapt(forward)(loha_jax.combine(trainable, frozen), X)  # no training
    with pytest.warns(UserWarning, match=r"rank_dropout=0\.5.*loha_jax\.dropout\(params, key\)"):
        jax.grad(loss)(trainable)
    jax.grad(loss)(trainable)  # once
    forgotten_dropout._done.clear()
    loha_jax.dropout(loha_jax.combine(trainable, frozen), jax.random.key(0))
    jax.grad(loss)(trainable)
