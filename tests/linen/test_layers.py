import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_reference import (
    ALPHA,
    CASES,
    KEY,
    R,
    close,
    each_case,
    randomised,
    shapes_of,
    transposed,
)
from scipy import stats

import loha_jax
from loha_jax import linen
from loha_jax.linen import LoHaDense


def merged(case, params, scale=ALPHA / R):
    """The parameters of the Flax layer, with ΔW in the kernel."""
    plain = {name: value for name, value in params.items() if not name.startswith("hada")}
    kernel = params[case.kernel]
    return {**plain, case.kernel: kernel + case.fold(params, kernel.shape, scale)}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *((name, "auto") for name in CASES),
        *((n, s) for n in ("dense", "conv2d_cores") for s in ("fused", "dense")),
    ],
)
def test_equals_the_merged_flax_layer(name, strategy):
    """Results and gradients are those of the Flax layer with the update in its kernel."""
    case = CASES[name]
    layer, plain = (make(param_dtype=jnp.float64) for make in (case.layer, case.plain))
    layer = layer.clone(strategy=strategy)
    params, x = randomised(shapes_of(case, layer)), case.inputs(jnp.float64)

    def adapted(params, x):
        return layer.apply({"params": params}, x, method=case.method)

    def dense(params, x):
        return plain.apply({"params": merged(case, params)}, x, method=case.method)

    weights = randomised(jax.eval_shape(dense, params, x), 2)
    by = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)

    def run(fn):
        def loss(params, x):
            y = fn(params, x)
            return (jnp.tanh(y) * weights).sum(), y

        return jax.jit(jax.grad(loss, argnums=by, has_aux=True))(params, x)

    (got, y), (want, y_want) = run(adapted), run(dense)
    close(y, y_want)
    assert not np.any(got[0].pop(case.kernel))  # frozen
    assert np.any(want[0].pop(case.kernel))
    jax.tree.map(close, got, want)


@each_case
def test_kernel_and_bias_start_as_in_flax(case):
    """Kernel and bias start as Flax starts them and the output too."""
    layer, plain, x = case.layer(), case.plain(), case.inputs()
    # Eagerly: both then run the same programs of single operations, which round alike.
    y, variables = layer.init_with_output(KEY, x, method=case.method)
    y_want, want = plain.init_with_output(KEY, x, method=case.method)
    got = variables["params"]
    assert {name for name in got if not name.startswith("hada")} == set(want["params"])
    for name, value in want["params"].items():
        np.testing.assert_array_equal(got[name], value)
    np.testing.assert_allclose(y, y_want, rtol=1e-6, atol=1e-6)
    assert isinstance(layer, case.flax)


@each_case
def test_shapes_are_those_that_inject_gives(case):
    layer = case.layer()
    shapes = shapes_of(case, layer)
    base = {"q": {n: s for n, s in shapes.items() if not n.startswith("hada")}}
    config = loha_jax.LoHaConfig(
        r=R,
        target_modules=["q"],
        use_effective_conv2d=case.fields.get("use_effective_conv2d", False),
    )
    adapted = linen.to_adapted(
        {"params": randomised(shapes)},
        layer.init,
        KEY,
        case.inputs(),
        method=case.method,
    )
    layout = adapted["params"][case.kernel].layout
    leaf = loha_jax.inject(base, config, key=KEY, layouts={"q": layout})["q"][case.kernel]
    want = {name: t.shape for name, t in leaf.adapters["default"].tensors.items()}
    assert {name: s.shape for name, s in shapes.items() if name.startswith("hada")} == want


@pytest.mark.parametrize("init_weights", [True, False, "lycoris", "calibrated"])
def test_factors_follow_the_law_that_init_weights_names(init_weights):
    params = LoHaDense(300, r=40, init_weights=init_weights).init(KEY, jnp.ones((1, 200)))["params"]
    zero = {True: "hada_w2_b", False: None}.get(init_weights, "hada_w2_a")
    values = [np.ravel(params[name]) for name in sorted(params) if name.startswith("hada")]
    assert all(
        abs(np.corrcoef(a[:8000], b[:8000])[0, 1]) < 0.05
        for a in values
        for b in values
        if a is not b and a.any() and b.any()
    )
    for name, w in params.items():
        if not name.startswith("hada"):
            continue
        w = np.ravel(w)
        if name == zero:
            assert not w.any()
        elif init_weights == "lycoris":
            assert (
                stats.kstest(w, stats.norm(scale={"a": 0.1, "b": 1.0}[name[-1]]).cdf).pvalue > 1e-3
            )
        elif init_weights == "calibrated" and name != "hada_w2_b":
            assert stats.kstest(w, stats.norm(scale=40**-0.25).cdf).pvalue > 1e-3
        else:
            bound = 1 / np.sqrt({"a": 40, "b": 200}[name[-1]])
            assert stats.kstest(w, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def test_lower_precision_follows_flax_and_the_factors_stay_float32():
    layer = LoHaDense(5, r=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, init_weights=False)
    x = jax.random.normal(KEY, (4, 3))
    y, variables = layer.init_with_output(KEY, x)
    params = variables["params"]
    assert y.dtype == params["kernel"].dtype == jnp.bfloat16
    assert params["hada_w1_a"].dtype == jnp.float32
    delta = transposed(params, (3, 5), 8 / 2)
    want = x.astype(jnp.bfloat16).astype(jnp.float32) @ (
        params["kernel"].astype(jnp.float32) + delta
    )
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=2**-7 * np.abs(want).max())
