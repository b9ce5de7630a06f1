"""What is a tree's structure and what is not: alpha/r, provenance, the base under an adapter."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from safetensors import safe_open

import loha_jax
from loha_jax import interop
from loha_jax.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
BASE = {"q": {"kernel": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32), "bias": jnp.zeros(4)}}
X = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)


def adapted(key=0, base=BASE, **fields):
    config = loha_jax.LoHaConfig(
        **{"r": 2, "alpha": 4, "target_modules": ["q"], "init_weights": False, **fields}
    )
    return loha_jax.inject(base, config, key=jax.random.key(key))


def forward(params, x):
    return x @ params["q"]["kernel"] + params["q"]["bias"]


def reference(kernel, tensors, scaling):
    """W + ΔW in float64, torch's orientation of the factors and an `io` kernel."""
    a1, b1, a2, b2 = (
        np.asarray(tensors[f"hada_w{n}_{s}"], np.float64) for n in (1, 2) for s in "ab"
    )
    return np.asarray(kernel, np.float64) + scaling * ((a1 @ b1) * (a2 @ b2)).T


# --- alpha/r is out of an optimizer's reach ---------------------------------------------------------------------------


def test_an_optimizer_over_the_whole_tree_leaves_alpha_over_r_alone_and_saving_names_the_changed_base(
    tmp_path,
):
    params = adapted()
    tx = optax.adamw(1e-2, weight_decay=0.5)
    state = tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda p: (loha_jax.adapt(forward)(p, X) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    leaf = params["q"]["kernel"]
    factors = leaf.adapters["default"]
    assert factors.scaling == 2.0
    want = reference(leaf.kernel, factors.tensors, 4 / 2)
    np.testing.assert_allclose(loha_jax.merge(params)["q"]["kernel"], want, rtol=1e-5)
    for save in (
        lambda: interop.save_peft(tmp_path / "peft", params),
        lambda: interop.save_lycoris(tmp_path / "lycoris.safetensors", params),
        lambda: interop.save_lora(tmp_path / "lora", params),
    ):
        with pytest.warns(
            UserWarning, match=r"have changed .*: q, q\.bias\. .*partition\(params\)\[0\]"
        ) as caught:
            save()
        assert caught[0].filename == __file__
    with (
        Checkpoints(tmp_path / "run") as checkpoints,
        pytest.warns(UserWarning, match="have changed"),
    ):
        checkpoints.save(1, params)


def test_leaves_beside_an_adapter_that_were_trained_are_named(tmp_path):
    """Adam moves a kernel under an adapter by nothing, its bias and other modules by a lot."""
    base = {
        **BASE,
        "o": {"kernel": jnp.ones((4, 4))},
        "bn": {"scale": jnp.ones(4), "mean": jnp.zeros(4)},
    }
    params = adapted(base=base, modules_to_save=["o"])
    moved = {
        **params,
        "q": {**params["q"], "bias": jnp.ones(4)},
        "bn": {"scale": 2 * jnp.ones(4), "mean": jnp.ones(4)},
    }
    with pytest.warns(
        UserWarning, match=r"have changed since the adapter was made: bn\.scale, q\.bias\. "
    ):
        interop.save_peft(tmp_path, moved)
    interop.save_peft(tmp_path, params)
    back = interop.load_peft(tmp_path, base)
    with pytest.warns(UserWarning, match=r"adapter was made: bn\.scale\. "):
        interop.save_peft(tmp_path, {**back, "bn": moved["bn"]})
    variables = {"params": BASE, "cache": {"index": jnp.zeros(3)}}
    params = adapted(base=variables)
    interop.save_peft(tmp_path, {**params, "cache": {"index": jnp.ones(3)}})


def test_the_right_way_to_train_saves_without_a_warning(tmp_path):
    trainable, frozen = loha_jax.partition(adapted())
    trained = jax.tree.map(lambda x: x * 0.9, trainable)
    interop.save_peft(tmp_path / "a", loha_jax.combine(trained, frozen))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapted())  # says nothing of other values
    interop.save_peft(tmp_path / "b", cast)
    merged = loha_jax.inject(
        adapted(),
        loha_jax.LoHaConfig(target_modules=["q"]),
        key=jax.random.key(1),
        adapter_name="b",
    )
    interop.save_peft(tmp_path / "c", loha_jax.merge(merged, ["default"], unload=False))


def test_an_untrained_adapter_is_saved_with_one_warning(tmp_path):
    params = adapted(init_weights=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        interop.save_peft(tmp_path, params)
    assert [str(w.message)[:35] for w in caught] == ["The adapter 'default' is untrained:"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(
    "use",
    [
        lambda half, path: interop.save_peft(path / "a", half),
        lambda half, path: interop.to_peft_state_dict(half),
        lambda half, path: interop.save_lycoris(path / "a.safetensors", half),
        lambda half, path: interop.save_lora(path / "a", half),
        lambda half, path: Checkpoints(path / "run").save(1, half),
        lambda half, path: loha_jax.merge(half),
        lambda half, path: loha_jax.adapt(forward)({"q": {**half["q"], "bias": 0.0}}, X),
        lambda half, path: forward({"q": {**half["q"], "bias": 0.0}}, X),
    ],
)
def test_one_half_of_partition_is_refused(use, half, tmp_path):
    with pytest.raises(ValueError, match=r"one half of `partition`.*combine\(trainable, frozen\)"):
        use(loha_jax.partition(adapted())[half], tmp_path)


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


# --- provenance is not structure --------------------------------------------------------------------------------------

PROVENANCE = [
    {"base_model_name_or_path": "org/base"},
    {"base_model_name_or_path": "/data/base", "revision": "main"},
    {"peft_version": "0.20.0"},
    {"task_type": "CAUSAL_LM", "auto_mapping": {"parent_library": "transformers"}},
    {"target_modules": "q", "init_weights": False},
]


def test_trees_that_differ_in_provenance_alone_have_one_structure():
    trees = [adapted(n, **fields) for n, fields in enumerate(PROVENANCE)]
    assert len({jax.tree.structure(tree) for tree in trees}) == 1
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *trees)
    got = mean["q"]["kernel"].adapters["default"].hada_w2_a
    np.testing.assert_allclose(
        got, np.mean([t["q"]["kernel"].adapters["default"].hada_w2_a for t in trees], 0), rtol=1e-6
    )
    assert len({config_of(tree) for tree in trees}) == len(trees)


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


def config_of(params):
    return params["q"]["kernel"].adapters["default"].config


def test_two_adapters_through_one_jitted_step_keep_their_own_provenance(tmp_path):
    tx, traces = optax.sgd(0.1), []

    @jax.jit
    def step(trainable, opt_state, frozen):
        traces.append(1)
        grads = jax.grad(
            lambda t: (loha_jax.adapt(forward)(loha_jax.combine(t, frozen), X) ** 2).sum()
        )(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    for n, name in enumerate(("org/one", "org/two")):
        trainable, frozen = loha_jax.partition(adapted(n, base_model_name_or_path=name))
        trainable, _ = step(trainable, tx.init(trainable), frozen)
        interop.save_peft(tmp_path / str(n), loha_jax.combine(trainable, frozen))
        assert (
            loha_jax.LoHaConfig.from_pretrained(tmp_path / str(n)).base_model_name_or_path == name
        )
    assert len(traces) == 1


def test_files_come_back_bit_for_bit_beside_a_shared_compilation(tmp_path):
    loaded = []
    for n in range(2):
        path = tmp_path / f"{n}.safetensors"
        interop.save_lycoris(path, adapted(n), prefix="lora_unet_", metadata={"ss_steps": str(n)})
        loaded.append(interop.load_lycoris(path, BASE))
        interop.save_lycoris(tmp_path / "again.safetensors", loaded[-1], prefix="lora_unet_")
        one, other = (safe_open(p, "np") for p in (path, tmp_path / "again.safetensors"))
        assert one.metadata() == other.metadata()  # safetensors writes its keys in any order
        assert one.metadata()["ss_steps"] == str(n)
        for name in {*one.keys(), *other.keys()}:
            np.testing.assert_array_equal(one.get_tensor(name), other.get_tensor(name))
    assert jax.tree.structure(loaded[0]) == jax.tree.structure(loaded[1])


def test_a_checkpoint_is_restored_after_provenance_has_changed(tmp_path):
    params = adapted(peft_version="0.20.0", base_model_name_or_path="/old")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params)
        restored = checkpoints.restore(
            adapted(5, peft_version="0.22.0", base_model_name_or_path="/new")
        )
        with pytest.raises(ValueError, match=r"rank_dropout: given 0\.5"):
            checkpoints.restore(adapted(rank_dropout=0.5))
    assert config_of(restored.params).base_model_name_or_path == "/new"
    for name, tensor in restored.params["q"]["kernel"].adapters["default"].tensors.items():
        np.testing.assert_array_equal(
            tensor, params["q"]["kernel"].adapters["default"].tensors[name]
        )


# --- configs: equality, hash, pickle ----------------------------------------------------------------------------------


def test_configs_are_compared_in_full_and_by_the_order_of_their_patterns():
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


def test_a_pickled_config_has_the_hash_of_the_process_that_reads_it(tmp_path):
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
        "assert config == fresh == held and len({config, fresh, held}) == 1, (hash(config), hash(fresh))\n"
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


# --- flax.serialization -----------------------------------------------------------------------------------------------


def saved_too():
    return adapted(
        base={"q": BASE["q"], "head": {"kernel": jnp.ones((4, 2))}}, modules_to_save=["head"]
    )


TREES = {
    "tree": saved_too,
    "trainable": lambda: loha_jax.partition(saved_too())[0],
    "frozen": lambda: loha_jax.partition(saved_too())[1],
    "optimizer": lambda: optax.adam(1e-3).init(loha_jax.partition(saved_too())[0]),
    "train state": lambda: TrainState.create(
        apply_fn=None, params=loha_jax.partition(saved_too())[0], tx=optax.adam(1e-3)
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_flax_serialization_round_trip(name):
    tree = TREES[name]()
    noisy = jax.tree.map(lambda x: x + jnp.ones_like(x), tree)
    for back in (
        serialization.from_bytes(tree, serialization.to_bytes(noisy)),
        serialization.from_state_dict(tree, serialization.to_state_dict(noisy)),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(
            tree if name != "train state" else back
        )
        for one, other in zip(jax.tree.leaves(noisy), jax.tree.leaves(back), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "other", [{"r": 3}, {"target_modules": ["head"]}, {"init_weights": True}], ids=str
)
def test_flax_serialization_refuses_another_structure(other):
    base = {"q": BASE["q"], "head": {"kernel": jnp.ones((4, 2))}}
    held = adapted(base=base, **other)  # without `modules_to_save`
    with pytest.raises(ValueError, match=r"the state has"):
        serialization.from_bytes(saved_too(), serialization.to_bytes(held))
    trainable, frozen = loha_jax.partition(saved_too())
    with pytest.raises(ValueError, match="partition"):
        serialization.from_bytes(frozen, serialization.to_bytes(trainable))


def test_flax_may_be_imported_before_or_after():
    for order in ("loha_jax, flax.serialization", "flax.serialization, loha_jax"):
        code = (
            f"import {order}\nimport jax.numpy as jnp, jax\n"
            "params = loha_jax.inject({'q': {'kernel': jnp.ones((2, 2))}},\n"
            "    loha_jax.LoHaConfig(target_modules=['q']), key=jax.random.key(0))\n"
            "flax.serialization.from_bytes(params, flax.serialization.to_bytes(params))\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


# --- a dropout that nobody applies ------------------------------------------------------------------------------------


def test_a_dropout_config_that_nothing_reads_is_a_warning_once(monkeypatch):
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


def test_base_weights_that_a_file_brings_are_no_change(tmp_path):
    """A targeted output head is written with its weight and bias; loading puts them under the adapter."""
    base = {**BASE, "lm_head": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
    interop.save_peft(tmp_path / "one", adapted(base=base, target_modules=["q", "lm_head"]))
    other = {**BASE, "lm_head": {"kernel": 2 * jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    loaded = interop.load_peft(tmp_path / "one", other)
    np.testing.assert_array_equal(loaded["lm_head"]["bias"], base["lm_head"]["bias"])
    interop.save_peft(tmp_path / "again", loaded)  # without a warning
