"""qwix' quantised kernels in Linen's metadata boxes, in trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from jax.sharding import PartitionSpec
from qwix_models import BASES
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.tree.quantised import is_quantised

KEY = jax.random.key(0)
X = normal_array(1, (4, 16))
CONFIG = LoHaConfig(r=2, target_modules=["up"], init_weights=False, rank_dropout=0.5)
BOXES = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}


class Net(nn.Module):
    """An adapted layer, and one that is only quantised."""

    box: str

    @nn.compact
    def __call__(self, x):
        initial = BOXES[self.box](nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(24, name="up", kernel_init=initial)(x)
        return nn.Dense(8, name="down", kernel_init=initial)(nn.gelu(x))


@pytest.fixture(params=[(box, base) for box in BOXES for base in ("int8", "nf4")], ids=str)
def trees(request):
    """The model, its adapted tree, the same without boxes, and the same on a float base."""
    box, base = request.param
    rule = qwix.QuantizationRule(module_path=".*", **BASES[base])
    model = Net(box)
    variables = qwix.quantize_model(model, qwix.PtqProvider([rule])).init(KEY, X)
    plain = nn.meta.unbox(variables)

    def adapted(tree):
        return loha_jax.inject(tree, CONFIG, key=KEY)

    return model, adapted(variables), adapted(plain), adapted(loha_jax.dequantise(plain))


@pytest.mark.filterwarnings("ignore:Quantising the merged weights again")
def test_metadata(trees):
    """Factors have the names of their own axes, and merged kernels those of the kernel."""
    _, params, plain, _ = trees
    specs = nn.get_partition_spec(params)["params"]["up"]["kernel"]
    factors = specs.adapters["default"]
    assert factors.hada_w1_a == factors.hada_w2_a == PartitionSpec("mlp", None)
    assert factors.hada_w1_b == factors.hada_w2_b == PartitionSpec(None, "embed")
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(params), plain)
    merged = loha_jax.merge(params)["params"]
    assert merged["up"]["kernel"].names == ("embed", "mlp")
    assert merged["up"]["kernel"].value.dtype == jnp.float32
    assert is_quantised(merged["down"]["kernel"])
    assert loha_jax.dequantise(params)["params"]["down"]["kernel"].names == ("embed", "mlp")
    base = loha_jax.unload(params)["params"]
    assert base["up"]["kernel"].array.qvalue.names == ("embed", "mlp")
    assert repr(params["params"]["up"]["kernel"]).startswith("LoHaWeight(f32[16,24] (")
    assert loha_jax.merge(params, requantise=True)["params"]["up"]["kernel"].array.qvalue.names


def test_values(trees):
    """Outputs, gradients, dropout, merging: those of the float base."""
    model, params, _, wanted = trees
    want = model.apply(loha_jax.merge(wanted), X)
    run = loha_jax.adapt(model.apply)
    np.testing.assert_allclose(run(params, X), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(run)(params, X), want, atol=1e-5)
    merged = loha_jax.dequantise(loha_jax.merge(params))
    np.testing.assert_allclose(model.apply(merged, X), want, atol=1e-5)
    assert loha_jax.explain(model.apply, params, X).uses[0].strategy == "factored"

    def gradients(tree):
        trainable, frozen = loha_jax.partition(tree)

        def loss(trainable):
            tree = loha_jax.dropout(loha_jax.combine(trainable, frozen), jax.random.key(2))
            return (run(tree, X) ** 2).sum()

        return jax.tree.leaves(nn.meta.unbox(jax.grad(loss)(trainable)))

    for got, expected in zip(gradients(params), gradients(wanted), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_files(trees, tmp_path):
    """A file has the same tensors, and is read onto a boxed base."""
    _, params, _, wanted = trees
    jax.tree.map(
        np.testing.assert_array_equal,
        interop.to_peft_state_dict(params),
        interop.to_peft_state_dict(wanted),
    )
    interop.save_peft(tmp_path / "adapter", params)
    loaded = interop.load_peft(tmp_path / "adapter", loha_jax.unload(params))
    up = loaded["params"]["up"]["kernel"]
    assert up.adapters["default"].hada_w1_a.names == ("mlp", None)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(loaded), nn.meta.unbox(params))
