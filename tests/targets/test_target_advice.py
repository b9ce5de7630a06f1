"""Messages where a config and a tree do not meet."""

import jax
import jax.numpy as jnp
import pytest

import loha_jax
from loha_jax import LoHaConfig

TREE = {"a": {"q_proj": {"kernel": jnp.ones((3, 3))}}}


def inject(tree, targets, **kwargs):
    return loha_jax.inject(
        tree, LoHaConfig(r=2, target_modules=targets), key=jax.random.key(0), **kwargs
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([".*q_proj"], r"list holds names or their endings: pass target_modules='\.\*q_proj'"),
        (["(q|v)_proj"], r"is a regular expression.*pass target_modules='\.\*\(q\|v\)_proj'"),
        (["^q_proj$"], r"is a regular expression.*pass target_modules='\.\*q_proj\$'"),
        (["a/q_proj"], "joined with dots, not slashes: 'a.q_proj'"),
        (["a/q_proj/kernel"], "not slashes and name the module, not the array in it: 'a.q_proj'"),
        (["q_proj.kernel"], "name the module, not the array in it: 'q_proj'"),
        (r".*\.q_proj\.weight$", r"name the module.*'\.\*\\\\\.q_proj'"),
    ],
)
def test_the_rule_that_a_target_breaks(targets, message):
    with pytest.raises(ValueError, match=message):
        inject(TREE, targets)


def test_one_entry_among_good_ones_is_a_warning_with_the_rule():
    with pytest.warns(UserWarning, match="pass target_modules='a.*"):
        inject(TREE, ["q_proj", "a.*"])


def test_an_integer_kernel_is_named():
    with pytest.raises(ValueError, match=r"q\.kernel int8\[3, 3\].*loha_jax\.ScaledArray"):
        inject({"q": {"kernel": jnp.ones((3, 3), jnp.int8), "kernel_scale": jnp.ones(3)}}, ["q"])


class Model:
    params = TREE


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (jnp.ones((3, 3)), r"one array of shape \(3, 3\).*Give it one"),
        (Model(), "got a Model: pass its `params`"),
        (len, "got a builtin"),
        ((len, len), r"got functions \(in a tuple\): pass .* `init` returns"),
    ],
)
def test_what_is_no_tree(tree, message):
    with pytest.raises(TypeError, match=message):
        inject(tree, ".*")


def test_a_keras_and_a_penzai_model(monkeypatch):
    keras_model = type("Sequential", (), {"__module__": "keras.src.models.sequential"})
    with pytest.raises(TypeError, match=r"Keras model.*v\.path: v\.value.*stateless_call"):
        inject(type("Mine", (keras_model,), {})(), ["dense"])
    parameter = type("Parameter", (), {"__module__": "penzai.core.variables"})
    with pytest.raises(TypeError, match=r"penzai parameters.*pz\.freeze_params"):
        inject([parameter()], ["dense"])


@pytest.mark.parametrize(
    ("field", "own"),
    [("lora_alpha", "`alpha`"), ("lora_dropout", "`rank_dropout` or"), ("rank", "`r`")],
)
@pytest.mark.parametrize("config", [LoHaConfig, loha_jax.LycorisConfig])
def test_loras_fields(config, field, own):
    with pytest.raises(TypeError, match=f"no `{field}`.*LoHa's is {own}"):
        config(r=2, **{field: 1})


def test_a_rank_far_above_what_a_kernel_holds_warns_once():
    tree = {f"q{n}": {"kernel": jnp.ones((3, 8))} for n in range(2)}
    with pytest.warns(
        UserWarning, match=r"r = 8 allows updates of rank 64.*q0 can have; 2 module"
    ) as found:
        loha_jax.inject(tree, LoHaConfig(r=8, target_modules=".*"), key=jax.random.key(0))
    assert [warning.filename for warning in found] == [__file__]
    loha_jax.inject(tree, LoHaConfig(r=4, target_modules=".*"), key=jax.random.key(0))


def test_all_linear_leaves_out_the_head_that_the_model_shows():
    """Not by its name: the last product has the table's rows as outputs."""
    tree = {
        "table": {"w": jnp.ones((7, 4))},
        "up": {"w": jnp.ones((4, 4))},
        "out": {"w": jnp.ones((4, 7))},
    }

    def fn(tree, ids):
        return jnp.tanh(tree["table"]["w"][ids] @ tree["up"]["w"]) @ tree["out"]["w"]

    layouts = loha_jax.infer_layouts(fn, tree, jnp.arange(3))
    assert (layouts.left_out, layouts.lookups) == ({"out"}, {"table"})
    adapted = inject(tree, "all-linear", layouts=layouts)
    assert [name for name in tree if isinstance(adapted[name]["w"], loha_jax.LoHaWeight)] == ["up"]
    assert isinstance(inject(tree, ["out"], layouts=layouts)["out"]["w"], loha_jax.LoHaWeight)


@pytest.mark.parametrize("scale", ["weight_scale_inv", "scale", "kernel_scale", "scale_weight"])
def test_a_float8_kernel_beside_its_scale_is_named(scale):
    tree = {"q": {"kernel": jnp.ones((4, 4), jnp.float8_e4m3fn), scale: jnp.ones((1, 1))}}
    with pytest.raises(
        ValueError, match=rf"q.kernel is float8_e4m3fn, and q.{scale} looks like its scale"
    ):
        inject(tree, ["q"])
    assert inject({"q": {"kernel": tree["q"]["kernel"]}}, ["q"])


class PeftConfig:
    """Called as PEFT's."""

    __module__ = "peft.tuners.loha.config"


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({"r": 2}, r"from_dict\(config\)"),
        (PeftConfig(), r"from_dict\(config\.to_dict\(\)\)"),
        (8, r"LoHaConfig\(r=8"),
    ],
)
def test_what_is_no_config(config, how):
    with pytest.raises(TypeError, match=rf"config should be a loha_jax\.LoHaConfig, got .*{how}"):
        loha_jax.inject(TREE, config, key=jax.random.key(0))


def test_weights_by_adapter_name():
    with pytest.raises(TypeError, match=r"weights should be \{adapter name: number\}, got 0\.5"):
        loha_jax.scale(TREE, 0.5)
