"""Linen's boxes around adapted leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import loha_jax
from loha_jax import LoHaConfig

KEY = jax.random.key(0)


def test_partitioned_boxes_keep_their_metadata():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(
                4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
            )(x)

    variables = Net().init(KEY, jnp.ones((1, 3)))
    config = LoHaConfig(r=2, target_modules=["Dense_0"], init_weights=False, rank_dropout=0.5)
    params = loha_jax.inject(variables, config, key=KEY)
    plain = loha_jax.inject(nn.meta.unbox(variables), config, key=KEY)
    specs = nn.get_partition_spec(params)["params"]["Dense_0"]["kernel"]
    assert specs.kernel == PartitionSpec("a", "b")
    factors = specs.adapters["default"]
    assert factors.hada_w1_a == factors.hada_w2_a == PartitionSpec("b", None)
    assert factors.hada_w1_b == factors.hada_w2_b == PartitionSpec(None, "a")
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(params), plain)
    assert loha_jax.merge(params)["params"]["Dense_0"]["kernel"].names == ("a", "b")

    x, key = jnp.ones((2, 3)), jax.random.key(3)
    expected = Net().apply(loha_jax.merge(plain), x)
    np.testing.assert_allclose(Net().apply(params, x), expected, rtol=1e-6)
    np.testing.assert_allclose(loha_jax.adapt(Net().apply)(params, x), expected, rtol=1e-6)
    dropped = loha_jax.dropout(params, key)
    assert jax.tree.structure(dropped) == jax.tree.structure(params)
    jax.tree.map(
        np.testing.assert_array_equal, nn.meta.unbox(dropped), loha_jax.dropout(plain, key)
    )
    halves = loha_jax.partition(params)
    assert jax.tree.structure(loha_jax.combine(*halves)) == jax.tree.structure(params)
    returned = loha_jax.adapt(lambda tree: tree)(params)
    assert jax.tree.structure(returned) == jax.tree.structure(params)
    assert loha_jax.explain(Net().apply, params, x).uses[0].strategy == "factored"
