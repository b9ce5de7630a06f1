import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from leaves import adapted_names, loha_leaves

import loha_jax
from loha_jax import LoHaConfig, SavedWeight

KEY = jax.random.key(0)


def tree():
    return {
        "encoder": {
            "layer": {
                str(n): {
                    "query": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)},
                    "value": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)},
                    "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
                }
                for n in range(2)
            }
        },
        "classifier": {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)},
    }


def test_targets_become_loha_weights_around_the_very_same_arrays():
    base = tree()
    params = loha_jax.inject(base, LoHaConfig(r=2, alpha=3, target_modules=["query"]), key=KEY)
    leaf = params["encoder"]["layer"]["1"]["query"]["kernel"]
    assert leaf.kernel is base["encoder"]["layer"]["1"]["query"]["kernel"]
    assert leaf.names == ("encoder.layer.1.query",)
    factors = leaf.adapters["default"]
    assert {n: t.shape for n, t in factors.tensors.items()} == {
        "hada_w1_a": (6, 2),
        "hada_w1_b": (2, 4),
        "hada_w2_a": (6, 2),
        "hada_w2_b": (2, 4),
    }
    assert factors.scaling == 1.5
    assert params["encoder"]["layer"]["1"]["value"] == base["encoder"]["layer"]["1"]["value"]
    assert adapted_names(params) == ["encoder.layer.0.query", "encoder.layer.1.query"]


def test_an_adapted_tree_starts_as_a_no_op():
    """An adapted tree starts as a no-op and `init_weights=False` does not."""
    base = tree()
    for init_weights, moves in (
        (True, False),
        ("lycoris", False),
        ("calibrated", False),
        (False, True),
    ):
        config = LoHaConfig(r=2, target_modules=["query"], init_weights=init_weights)
        merged = loha_jax.merge(loha_jax.inject(base, config, key=KEY))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), base, merged)
        assert all(jax.tree.leaves(same)) is not moves


def test_ranks_and_alphas_follow_the_first_pattern():
    config = LoHaConfig(
        r=2,
        alpha=2,
        target_modules=["query", "value"],
        rank_pattern={r"layer\.1\.query": 3, "query": 4},
        alpha_pattern={"^encoder.layer.0.value": 9},
    )
    params = loha_jax.inject(tree(), config, key=KEY)
    found = {
        leaf.names[0]: (f.ranks[0], f.alphas[0], float(f.scaling), f.hada_w1_a.shape[1])
        for leaf in loha_leaves(params)
        for f in leaf.adapters.values()
    }
    assert found == {
        "encoder.layer.0.query": (4, 2, 0.5, 4),
        "encoder.layer.0.value": (2, 9, 4.5, 2),
        "encoder.layer.1.query": (3, 2, pytest.approx(2 / 3), 3),
        "encoder.layer.1.value": (2, 2, 1.0, 2),
    }


def test_modules_to_save_become_saved_weights_with_copies():
    base = tree()
    params = loha_jax.inject(
        base, LoHaConfig(target_modules=["query"], modules_to_save=["classifier"]), key=KEY
    )
    saved = params["classifier"]["kernel"]
    assert isinstance(saved, SavedWeight)
    assert saved.name == "classifier.weight"
    assert saved.original is base["classifier"]["kernel"]
    assert (
        saved.copies["default"] is not saved.original
    )  # donating the copy must not free the original
    assert params["classifier"]["bias"].name == "classifier.bias"
    headed = loha_jax.inject(
        base, LoHaConfig(target_modules=["query"], task_type="SEQ_CLS"), key=KEY
    )
    assert isinstance(headed["classifier"]["bias"], SavedWeight)


def test_a_second_adapter_joins_the_first_and_becomes_active():
    first = loha_jax.inject(tree(), LoHaConfig(r=2, target_modules=["query"]), key=KEY)
    config = LoHaConfig(r=3, target_modules=["query", "value"])
    both = loha_jax.inject(first, config, key=KEY, adapter_name="style")
    leaf = both["encoder"]["layer"]["0"]["query"]["kernel"]
    assert set(leaf.adapters) == {"default", "style"}
    assert leaf.active == ("style",)
    assert set(both["encoder"]["layer"]["0"]["value"]["kernel"].adapters) == {"style"}
    with pytest.raises(ValueError, match="Adapter with name 'style' already exists"):
        loha_jax.inject(both, config, key=KEY, adapter_name="style")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", None])
def test_unusable_adapter_names(name):
    with pytest.raises(ValueError, match="adapter's name"):
        loha_jax.inject(tree(), LoHaConfig(target_modules=["query"]), key=KEY, adapter_name=name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoHaConfig(target_modules=["quary"]), r"Target modules \{'quary'\} not found.*'query'"),
        (LoHaConfig(target_modules=["query"], exclude_modules=".*"), "All modules were excluded"),
        (
            LoHaConfig(target_modules=["query"], exclude_modules=["query"]),
            "No modules were targeted",
        ),
        (
            LoHaConfig(target_modules=["norm"]),
            r"cannot be adapted.*encoder\.layer\.0\.norm\.scale float32\[4\]",
        ),
        (LoHaConfig(), "Please specify `target_modules`"),
    ],
)
def test_configs_that_fit_nothing_are_errors(config, message):
    with pytest.raises(ValueError, match=message):
        loha_jax.inject(tree(), config, key=KEY)


@pytest.mark.parametrize(
    ("config", "category", "message"),
    [
        (
            LoHaConfig(target_modules=["query", "valeu"]),
            UserWarning,
            r"target_modules=\['valeu'\].*'value'",
        ),
        (
            LoHaConfig(target_modules=["query"], exclude_modules=["nothere"]),
            UserWarning,
            "no modules were excluded",
        ),
        (
            LoHaConfig(target_modules=["query"], modules_to_save=["hed"]),
            UserWarning,
            r"modules_to_save=\['hed'\]",
        ),
        (
            LoHaConfig(target_modules=["query"], rank_pattern={"zzz": 2}),
            RuntimeWarning,
            r"rank_pattern keys.*\['zzz'\]",
        ),
        (
            LoHaConfig(target_modules=["query"], alpha_pattern={"zzz": 2}),
            RuntimeWarning,
            "alpha_pattern keys",
        ),
    ],
)
def test_entries_that_match_nothing_are_warnings(config, category, message):
    """Entries that match nothing are warnings at the caller's line."""
    with pytest.warns(category, match=message) as caught:
        loha_jax.inject(tree(), config, key=KEY)
    assert [w.filename for w in caught] == [__file__]


def test_default_targets_by_model_type():
    params = loha_jax.inject(tree(), LoHaConfig(), key=KEY, model_type="bert")
    assert len(adapted_names(params)) == 4


def test_dtypes_are_pefts():
    for base, factor in (
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
    ):
        params = loha_jax.inject(
            {"q": {"kernel": jnp.ones((4, 4), base)}}, LoHaConfig(target_modules=["q"]), key=KEY
        )
        assert params["q"]["kernel"].dtype == base
        assert params["q"]["kernel"].adapters["default"].hada_w1_a.dtype == factor
        assert loha_jax.merge(params)["q"]["kernel"].dtype == base


def test_float64_kernels_get_float64_factors(x64):
    params = loha_jax.inject(
        {"q": {"kernel": jnp.ones((4, 4))}}, LoHaConfig(target_modules=["q"]), key=KEY
    )
    assert params["q"]["kernel"].adapters["default"].hada_w1_a.dtype == jnp.float64


def test_factors_depend_on_names_alone():
    """The order of the tree and the adapter's name do not change the factors."""

    def reverse(node):
        return {k: reverse(node[k]) for k in reversed(node)} if isinstance(node, dict) else node

    config = LoHaConfig(target_modules=["query", "value"], init_weights=False)
    one = loha_jax.merge(loha_jax.inject(tree(), config, key=KEY))
    two = loha_jax.merge(loha_jax.inject(reverse(tree()), config, key=KEY, adapter_name="other"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_stack_has_the_factors_of_its_layers():
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    layers = {"layers": {str(n): {"q": {"kernel": jnp.ones((3, 4))}} for n in range(3)}}
    stacked = {"layers": {"q": {"kernel": jnp.ones((3, 3, 4))}}}
    apart = loha_jax.inject(layers, config, key=KEY)["layers"]
    together = loha_jax.inject(stacked, config, key=KEY, layouts={"layers.q": "sio"})["layers"][
        "q"
    ]["kernel"]
    assert together.names == ("layers.0.q", "layers.1.q", "layers.2.q")
    for n in range(3):
        for name, tensor in apart[str(n)]["q"]["kernel"].adapters["default"].tensors.items():
            np.testing.assert_array_equal(together.adapters["default"].tensors[name][n], tensor)


def test_a_stack_may_have_unequal_ranks_and_untargeted_layers():
    config = LoHaConfig(
        r=2,
        target_modules=["q"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        rank_pattern={r"layers\.2\.q": 3},
        init_weights=False,
    )
    base = {"layers": {"q": {"kernel": jnp.ones((3, 3, 4))}}}
    params = loha_jax.inject(base, config, key=KEY, layouts={"layers.q": "sio"})
    factors = params["layers"]["q"]["kernel"].adapters["default"]
    assert factors.ranks == (2, 0, 3)
    moved = np.abs(np.asarray(loha_jax.merge(params)["layers"]["q"]["kernel"]) - 1).max(axis=(1, 2))
    assert moved[0] > 0
    assert moved[1] == 0
    assert moved[2] > 0
    trainable, frozen = loha_jax.partition(params)

    def loss(trainable):
        return (
            loha_jax.merge(loha_jax.combine(trainable, frozen))["layers"]["q"]["kernel"] ** 2
        ).sum()

    gradient = jax.grad(loss)(trainable)["layers"]["q"]["kernel"].adapters["default"]
    for name in gradient.tensors:
        padding = np.asarray(gradient.tensors[name])[np.asarray(factors.tensors[name]) == 0]
        assert not padding.any()  # training leaves the padding at zero
    assert loha_jax.summary(params).trainable_params == 2 * (2 + 3) * (3 + 4)


def test_all_linear():
    """`all-linear` takes dense kernels and leaves out embeddings and the head."""
    base = {
        "embed": {"embedding": jnp.ones((9, 4))},
        "dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)},
        "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
        "position": jnp.ones((1, 5, 4)),
        "lm_head": {"kernel": jnp.ones((4, 9))},
    }
    params = loha_jax.inject(base, LoHaConfig(target_modules="all-linear"), key=KEY)
    assert adapted_names(params) == ["dense"]


def test_ambiguous_kernels_matter_only_when_targeted():
    base = {"q": {"kernel": jnp.ones((4, 4))}, "odd": {"kernel": jnp.ones((2, 3, 4))}}
    assert adapted_names(loha_jax.inject(base, LoHaConfig(target_modules=["q"]), key=KEY)) == ["q"]
    with pytest.raises(
        ValueError, match=r"odd\.kernel of shape \(2, 3, 4\) could be several things"
    ):
        loha_jax.inject(base, LoHaConfig(target_modules=["odd"]), key=KEY)
    with pytest.raises(ValueError, match="describes 2 axes"):
        loha_jax.inject(base, LoHaConfig(target_modules=["odd"]), key=KEY, layouts={"odd": "io"})


def test_layouts_by_name_or_regular_expression():
    """Layouts are found by name or regular expression and reported when they match nothing."""
    base = {
        "a": {"q": {"kernel": jnp.ones((2, 3, 4))}},
        "b": {"q": {"kernel": jnp.ones((2, 3, 4))}},
    }
    config = LoHaConfig(r=1, target_modules=["q"])
    params = loha_jax.inject(base, config, key=KEY, layouts={r"\w\.q": "ioo", "a.q": "iio"})
    assert params["a"]["q"]["kernel"].layout.word == "iio"
    assert params["b"]["q"]["kernel"].layout.word == "ioo"
    with pytest.warns(UserWarning, match=r"layouts=\['c\.q'\] match no kernel\..*'q'") as caught:
        loha_jax.inject(base, config, key=KEY, layouts={r"[ab]\.q": "ioo", "c.q": "io"})
    assert [w.filename for w in caught] == [__file__]


def test_two_kernels_of_one_name_are_an_error():
    base = {"a": {"kernel": jnp.ones((3, 3))}, "b": {"kernel": jnp.ones((3, 3))}}
    with pytest.raises(ValueError, match="Two kernels have the module name 'same'"):
        loha_jax.inject(
            base, LoHaConfig(target_modules=["same"]), key=KEY, names=lambda name: "same"
        )


@pytest.mark.parametrize("init_weights", [True, "lycoris", "calibrated", "abba"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_kernels_are_refused(shape, init_weights):
    config = LoHaConfig(target_modules=["q"], init_weights=init_weights)
    base = {"block": {"q": {"kernel": jnp.ones(shape)}}}
    with pytest.raises(ValueError, match=r"cannot be adapted.*block\.q\.kernel float32\[.*0"):
        loha_jax.inject(base, config, key=KEY)


def test_integer_kernels_are_refused():
    with pytest.raises(ValueError, match="cannot be adapted"):
        loha_jax.inject(
            {"q": {"kernel": jnp.ones((3, 3), jnp.int8)}}, LoHaConfig(target_modules=["q"]), key=KEY
        )


def llama_shapes(layers=80, d=8192, kv=1024, mlp=28672):
    def kernel(i, o):
        return {"kernel": jax.ShapeDtypeStruct((i, o), jnp.bfloat16)}

    return {
        "model": {
            "embed_tokens": {"embedding": jax.ShapeDtypeStruct((128256, d), jnp.bfloat16)},
            "layers": {
                str(n): {
                    "self_attn": {
                        "q_proj": kernel(d, d),
                        "k_proj": kernel(d, kv),
                        "v_proj": kernel(d, kv),
                        "o_proj": kernel(d, d),
                    },
                    "mlp": {
                        "gate_proj": kernel(d, mlp),
                        "up_proj": kernel(d, mlp),
                        "down_proj": kernel(mlp, d),
                    },
                    "input_layernorm": {"weight": jax.ShapeDtypeStruct((d,), jnp.bfloat16)},
                }
                for n in range(layers)
            },
        },
        "lm_head": kernel(d, 128256),
    }


def test_a_70b_llama_is_injected_by_shape_alone():
    shapes = llama_shapes()
    config = LoHaConfig(r=8, target_modules="all-linear")
    start = time.perf_counter()
    params = loha_jax.inject(shapes, config, key=KEY)
    seconds = time.perf_counter() - start
    assert loha_jax.summary(params).trainable_params == 80 * 2 * 8 * (
        4 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    traced = jax.eval_shape(lambda p: loha_jax.inject(p, config, key=KEY), shapes)
    assert jax.tree.structure(traced) == jax.tree.structure(params)
    # No timing in tests: this only catches a return to per-layer compilation, which took minutes.
    assert seconds < 60


def test_nnx_state_and_equinox_modules_are_trees_too():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    config = LoHaConfig(r=2, target_modules="all-linear", init_weights=False)
    params = loha_jax.inject({"lin": state}, config, key=KEY)
    x = jnp.ones((2, 3))
    expected = x @ loha_jax.merge(params)["lin"]["kernel"][...] + model.bias[...]
    np.testing.assert_allclose(nnx.merge(graph, params["lin"])(x), expected, rtol=1e-6)
    np.testing.assert_allclose(
        loha_jax.adapt(lambda p, x: nnx.merge(graph, p["lin"])(x))(params, x), expected, rtol=1e-6
    )

    linear = eqx.nn.Linear(3, 4, key=KEY)
    module = loha_jax.inject({"lin": linear}, config, key=KEY, layouts={"lin": "oi"})["lin"]
    np.testing.assert_allclose(module(x[0]), loha_jax.merge(module)(x[0]), rtol=1e-6)


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loha_jax.inject(tree(), LoHaConfig(target_modules=["query"], task_type="SEQ_CLS"), key=KEY)
