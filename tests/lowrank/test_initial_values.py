"""Every bound and standard deviation of PEFT's and LyCORIS' initialisation.

They are tested by statistics with computed bounds.
"""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import loha_jax
from loha_jax.lowrank.initial_values import factor_shapes, init_factors

# Shapes and bounds from PEFT's kaiming_uniform_(a=sqrt(5)): 1/sqrt(shape[1] * prod(shape[2:])) of
# each factor.
LINEAR = (
    factor_shapes(300, 400, (), 16, False),
    {"w1_a": 16, "w1_b": 400, "w2_a": 16, "w2_b": 400},
)
FLAT_CONV = (
    factor_shapes(300, 40, (3, 3), 16, False),
    {"w1_a": 16, "w1_b": 360, "w2_a": 16, "w2_b": 360},
)
CP_CONV = (
    factor_shapes(300, 400, (3, 3), 16, True),
    {"w1_a": 300, "w1_b": 400, "w2_a": 300, "w2_b": 400, "t1": 144, "t2": 144},
)
CP_CONV1D = (
    factor_shapes(300, 400, (5,), 16, True),
    {"w1_a": 300, "w1_b": 400, "w2_a": 300, "w2_b": 400, "t1": 80, "t2": 80},
)


def test_shapes_are_pefts():
    assert factor_shapes(4, 6, (), 3, False) == {
        "hada_w1_a": (4, 3),
        "hada_w1_b": (3, 6),
        "hada_w2_a": (4, 3),
        "hada_w2_b": (3, 6),
    }
    assert factor_shapes(4, 6, (3, 3), 3, False)["hada_w1_b"] == (3, 54)
    cp = factor_shapes(4, 6, (3, 1), 3, True)
    assert (cp["hada_t1"], cp["hada_w1_a"], cp["hada_w1_b"]) == ((3, 3, 3, 1), (3, 4), (3, 6))
    assert factor_shapes(4, 6, (5,), 3, True)["hada_t2"] == (3, 3, 5, 1)


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize(("shapes", "fan_in"), [LINEAR, FLAT_CONV, CP_CONV, CP_CONV1D])
def test_pefts_law_is_uniform_within_one_over_root_fan_in(shapes, fan_in, init_weights):
    factors = init_factors(jax.random.key(0), ["layer"], shapes, init_weights, jnp.float32)
    for name, n in fan_in.items():
        values = np.asarray(factors[f"hada_{name}"][0]).ravel()
        if name == "w2_b" and init_weights:
            assert not values.any()
            continue
        bound = 1 / math.sqrt(n)
        assert np.abs(values).max() <= bound
        # A fixed key, so this either always holds or never does; 1e-4 over 30 checks.
        assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4, name


@pytest.mark.parametrize(("shapes", "fan_in"), [LINEAR, CP_CONV])
def test_lycoris_law_is_normal_with_a_zero_w2_a(shapes, fan_in):
    factors = init_factors(jax.random.key(0), ["layer"], shapes, "lycoris", jnp.float32)
    for name in fan_in:
        values = np.asarray(factors[f"hada_{name}"][0]).ravel()
        if name == "w2_a":
            assert not values.any()
        else:
            std = 1.0 if name.endswith("b") else 0.1
            assert stats.kstest(values, stats.norm(0, std).cdf).pvalue > 1e-4, name


def test_draws_depend_on_the_key_and_the_name_alone():
    shapes = LINEAR[0]
    both = init_factors(jax.random.key(0), ["a", "b"], shapes, False, jnp.float32)
    alone = init_factors(jax.random.key(0), ["b"], shapes, False, jnp.float32)
    other = init_factors(jax.random.key(1), ["b"], shapes, False, jnp.float32)
    for name in shapes:
        np.testing.assert_array_equal(both[name][1], alone[name][0])
        assert (both[name][0] != both[name][1]).any()
        assert (alone[name] != other[name]).any()
    # Factors of equal shape are drawn independently.
    assert np.abs(
        np.corrcoef(alone["hada_w1_a"].ravel(), alone["hada_w2_a"].ravel())[0, 1]
    ) < 4 / math.sqrt(300 * 16)


@pytest.mark.parametrize(
    ("impl", "partitionable", "law"),
    [
        ("threefry2x32", True, True),
        ("threefry2x32", True, "lycoris"),
        ("threefry2x32", False, True),
        ("rbg", True, True),
        ("unsafe_rbg", True, True),
    ],
)
def test_draws_are_the_same_in_a_stack_and_under_jit(impl, partitionable, law):
    shapes = {"hada_w1_a": (5, 3), "hada_w2_b": (3, 7)}
    with jax.threefry_partitionable(partitionable):
        key = jax.random.key(0, impl=impl)

        def draw(key, names, stack=None):
            return init_factors(key, names, shapes, law, jnp.float32, stack)

        stacked, alone = draw(key, ["a", "b"], (2, 1)), draw(key, ["b"], ())
        traced = jax.jit(lambda key: draw(key, ["a", "b"], (2, 1)))(key)
    for name, shape in shapes.items():
        assert stacked[name].shape == (2, 1, *shape)
        np.testing.assert_array_equal(stacked[name][1, 0], alone[name])
        np.testing.assert_array_equal(stacked[name], traced[name])


@pytest.mark.parametrize("law", [True, "lycoris"])
def test_values_are_those_of_a_draw_of_the_factors_own_shape(law):
    factors = init_factors(jax.random.key(5), ["q"], {"hada_w1_b": (3, 7)}, law, jnp.float32)
    key, digest = jax.random.key(5), hashlib.sha256(b"q").digest()
    for data in (int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big"), 1):
        key = jax.random.fold_in(key, np.uint32(data))
    if law is True:
        expected = jax.random.uniform(key, (3, 7), jnp.float32, -1 / math.sqrt(7), 1 / math.sqrt(7))
    else:
        expected = jax.random.normal(key, (3, 7))
    np.testing.assert_array_equal(factors["hada_w1_b"][0], expected)


def test_all_shapes_share_one_compiled_draw():
    compiled, key = [], jax.random.key(0)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    for n in range(1, 8):
        init_factors(key, ["q"], factor_shapes(8 * n, 5 * n, (), n, False), True, jnp.float32)
    assert len(compiled) == 1


def test_a_raw_key_that_was_read_from_a_file_is_a_key():
    base, config = (
        {"q": {"kernel": jnp.ones((3, 4))}},
        loha_jax.LoHaConfig(r=2, target_modules=["q"]),
    )
    key = jax.random.PRNGKey(3)
    trees = [loha_jax.inject(base, config, key=k) for k in (key, np.asarray(key))]
    assert all(map(np.array_equal, *map(jax.tree.leaves, trees)))
