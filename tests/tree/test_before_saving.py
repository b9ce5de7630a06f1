"""Warnings and errors before an adapter is saved: changed bases, untrained adapters, halves."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_kernel import BASE, X, adapted, forward, reference

import loha_jax
from loha_jax import interop
from loha_jax.checkpoint import Checkpoints


def test_an_optimizer_over_the_whole_tree(tmp_path):
    """It leaves alpha/r unchanged, and every save names the base weights that it has changed."""
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


def test_new_statistics_of_a_saved_module_go_into_its_leaves(tmp_path):
    """Linen's `mutable=["batch_stats"]` returns plain arrays."""
    params = {"params": {**BASE, "bn": {"scale": jnp.ones(4)}}, "batch_stats": {"bn": {}}}
    params["batch_stats"]["bn"]["mean"] = jnp.zeros(4)
    base, params = params, adapted(base=params, modules_to_save=["bn"])
    returned = {"bn": {"mean": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"batch_stats\.bn\.mean: .*with_copy\('default', array"):
        interop.save_peft(tmp_path / "a", {**params, "batch_stats": returned})
    assert not (tmp_path / "a").exists()
    trainable, frozen = loha_jax.partition(params)
    with pytest.raises(ValueError, match=r"'mean'\], and the .* SavedWeight\. .*with_copy"):
        loha_jax.combine(trainable, {**frozen, "batch_stats": returned})
    leaf = frozen["batch_stats"]["bn"]["mean"].with_copy("default", returned["bn"]["mean"])
    frozen["batch_stats"]["bn"]["mean"] = leaf
    interop.save_peft(tmp_path / "b", loha_jax.combine(trainable, frozen))
    again = interop.load_peft(tmp_path / "b", base)
    np.testing.assert_array_equal(again["batch_stats"]["bn"]["mean"], jnp.ones(4))


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


def test_base_weights_that_a_file_brings_are_no_change(tmp_path):
    """A targeted output head is written with its weight and bias.

    Loading puts them under the adapter.
    """
    base = {**BASE, "lm_head": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
    interop.save_peft(tmp_path / "one", adapted(base=base, target_modules=["q", "lm_head"]))
    other = {**BASE, "lm_head": {"kernel": 2 * jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    loaded = interop.load_peft(tmp_path / "one", other)
    np.testing.assert_array_equal(loaded["lm_head"]["bias"], base["lm_head"]["bias"])
    interop.save_peft(tmp_path / "again", loaded)  # without a warning
