"""LyCORIS' options that are not PEFT's.

Rank stabilisation, the scalar, rank dropout without rescaling.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop

KEY = jax.random.key(0)
BASE = {
    "q": {"kernel": normal_array(0, (5, 6))},
    "v": {"kernel": normal_array(0, (5, 6))},
}


def inject(base=BASE, **options):
    config = LycorisConfig(
        target_modules=["q", "v"], **{"r": 4, "alpha": 3, "init_weights": False} | options
    )
    return loha_jax.inject(base, config, key=KEY)


def delta(params, name="q"):
    return np.asarray(loha_jax.merge(params)[name]["kernel"]) - np.asarray(
        loha_jax.unload(params)[name]["kernel"]
    )


def test_rank_stabilisation_scales_by_alpha_over_the_root_of_r():
    plain, stable = inject(), inject(rs_lora=True, rank_pattern={"v": 8}, alpha_pattern={"v": 2})
    np.testing.assert_allclose(
        delta(stable), delta(plain) * 2, rtol=1e-4, atol=1e-6
    )  # 3/√4 instead of 3/4
    (factors,) = stable["v"]["kernel"].adapters.values()
    np.testing.assert_allclose(factors.scaling, 2 / math.sqrt(8), rtol=1e-6)
    # files hold it folded into alpha, so that alpha/r is the scaling for every reader
    state = interop.to_lycoris_state_dict(stable)
    np.testing.assert_allclose(state["lycoris_q.alpha"], 6, rtol=1e-6)
    np.testing.assert_allclose(state["lycoris_v.alpha"], 2 * math.sqrt(8), rtol=1e-6)


def test_peft_gets_rank_stabilisation_folded_into_alpha(tmp_path):
    params = inject(rs_lora=True, rank_pattern={"v": 8}, alpha_pattern={"v": 2})
    interop.save_peft(tmp_path, params)
    config = LoHaConfig.from_pretrained(tmp_path)
    assert type(config) is LoHaConfig
    back = interop.load_peft(tmp_path, BASE)
    for name in ("q", "v"):
        np.testing.assert_array_equal(delta(back, name), delta(params, name))


@pytest.mark.parametrize("scheme", [True, "lycoris", False])
def test_the_scalar_starts_the_adapter_as_a_no_op_that_trains(scheme):
    params = inject(use_scalar=True, init_weights=scheme)
    for name in ("q", "v"):
        np.testing.assert_array_equal(loha_jax.merge(params)[name]["kernel"], BASE[name]["kernel"])
    (factors,) = params["q"]["kernel"].adapters.values()
    assert all(np.abs(w).min() > 0 for w in factors.tensors.values())
    trainable, frozen = loha_jax.partition(params)
    x = normal_array(0, (3, 5))

    def loss(trainable):
        p = loha_jax.combine(trainable, frozen)
        return loha_jax.adapt(
            lambda p, x: (jnp.tanh(x @ p["q"]["kernel"]) @ p["v"]["kernel"].T).sum()
        )(p, x)

    (gradient,) = jax.grad(loss)(trainable)["q"]["kernel"].adapters.values()
    assert float(jnp.abs(gradient.scalar)) > 0
    assert all(not w.any() for w in gradient.tensors.values())


def test_the_scalar_multiplies_the_update_and_is_folded_on_saving(tmp_path):
    params = inject(use_scalar=True)

    def with_scalar(leaf):
        (f,) = leaf.adapters.values()
        return dataclasses.replace(
            leaf, adapters={"default": dataclasses.replace(f, scalar=jnp.float32(0.6))}
        )

    trained = {name: {"kernel": with_scalar(params[name]["kernel"])} for name in params}
    np.testing.assert_allclose(delta(trained), 0.6 * delta(inject()), rtol=1e-4, atol=1e-6)
    interop.save_peft(tmp_path / "peft", trained)
    interop.save_lycoris(tmp_path / "lycoris.safetensors", trained)
    for back in (
        interop.load_peft(tmp_path / "peft", BASE),
        interop.load_lycoris(tmp_path / "lycoris.safetensors", BASE),
    ):
        np.testing.assert_allclose(delta(back), delta(trained), rtol=1e-4, atol=1e-6)
    summed = loha_jax.add_weighted_adapter(trained, ["default"], [0.5], "half")
    np.testing.assert_allclose(delta(summed), 0.5 * delta(trained), rtol=1e-4, atol=1e-6)


def test_rank_dropout_rescales_where_rank_dropout_scale_says_so():
    base = jax.tree.map(jnp.zeros_like, BASE)
    plain = inject(base)
    for rescaled in (False, True):
        params = inject(base, rank_dropout=0.5, rank_dropout_scale=rescaled)
        for seed in range(5):
            factor = delta(loha_jax.dropout(params, jax.random.key(seed))) / delta(plain)
            kept = factor[0] != 0
            want = 6 / kept.sum() if rescaled else 1
            np.testing.assert_allclose(
                factor, np.broadcast_to(np.where(kept, want, 0), factor.shape), rtol=1e-5
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rs_lora": 1}, "`rs_lora` should be True or False"),
        ({"wd_on_out": None}, "`wd_on_out` should be True or False"),
        ({"metadata": {"a": 1}}, "`metadata` should be a dict of strings"),
        ({"metadata": "x"}, "`metadata` should be a dict of strings"),
        ({"r": 0}, "`r` should be a positive integer"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LycorisConfig(**options)


def test_a_config_is_a_value():
    config = LycorisConfig(r=2, weight_decompose=True, metadata={"ss_v2": "False"})
    assert config == LycorisConfig(r=2, weight_decompose=True, metadata={"ss_v2": "False"})
    assert hash(config) == hash(dataclasses.replace(config))
    assert config != LycorisConfig(r=2, weight_decompose=True)
    assert config != LoHaConfig(r=2)


def test_the_summary_says_what_an_adapter_has_and_counts_it():
    plain, rich = inject(), inject(use_scalar=True, weight_decompose=True)
    assert {row.kind for row in loha_jax.summary(plain).rows} == {"loha"}
    assert {row.kind for row in loha_jax.summary(rich).rows} == {"loha, scalar, norms"}
    assert loha_jax.summary(rich).trainable_params - loha_jax.summary(
        plain
    ).trainable_params == 2 * (1 + 6)


def test_linen_layers_refuse_what_they_have_no_parameter_for():
    layer = loha_jax.linen.LoHaDense(6, r=4, alpha=3)
    x = jnp.ones((2, 5))
    tree = loha_jax.linen.to_adapted(layer.init(KEY, x), layer.init, KEY, x)
    config = LycorisConfig(r=4, alpha=3, target_modules=".*", weight_decompose=True)
    decomposed = loha_jax.inject(loha_jax.unload(tree), config, key=KEY)
    with pytest.raises(
        ValueError,
        match=r"has dora_scale .a LycorisConfig's., which the layer has no parameter for",
    ):
        loha_jax.linen.from_adapted(decomposed, layer.init, KEY, x)


def test_sums_with_a_weight_decomposition_are_refused_by_name():
    params = inject(weight_decompose=True)
    with pytest.raises(ValueError, match=r"default decompose\(s\) the weight of q"):
        loha_jax.add_weighted_adapter(params, ["default"], [1.0], "sum")


@pytest.mark.parametrize("init_weights", ["calibrated", "abba"])
def test_calibrated_values_are_refused_with_a_scalar(init_weights):
    with pytest.raises(ValueError, match=f"init_weights='{init_weights}'.*use_scalar=True"):
        LycorisConfig(init_weights=init_weights, use_scalar=True)
