"""Files that PEFT wrote, read and written back; what is checked before anything changes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_samples import LINEAR, NAMES, Sample, torch_value, two_kernels
from random_arrays import normal_array
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop

MODEL_TYPES = {"llama_default_targets": "llama", "llama_tied": "llama", "bert_seqcls": "bert"}


def load(sample, **kwargs):
    assert sample.state  # skips where torch is missing for the one pickle
    return interop.load_peft(
        sample.adapter,
        sample.params(),
        layouts=sample.layouts,
        model_type=MODEL_TYPES.get(sample.name),
        **kwargs,
    )


def at(tree, dotted):
    for part in dotted.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_pefts(name):
    sample = Sample(name)
    merged = loha_jax.merge(load(sample))
    bound = 1e-5 if "bf16" not in name else 0  # the same single rounding to bfloat16
    for module in sample.meta["layers"]:
        want = sample.io[f"merged_weight::{module}"]
        got = torch_value(at(merged, module)["kernel"]).astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())
        assert at(merged, module)["kernel"].dtype == sample.base[f"{module}.weight"].dtype


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_adapter_is_written_back_bit_for_bit(name, tmp_path):
    sample = Sample(name)
    interop.save_peft(tmp_path, load(sample))
    if name == "linear_bin":  # PEFT's file is a pickle; ours is always safetensors
        ours = load_file(tmp_path / "adapter_model.safetensors")
        assert ours.keys() == sample.state.keys()
        assert all(np.array_equal(ours[key], sample.state[key]) for key in ours)
    else:
        theirs = (sample.adapter / "adapter_model.safetensors").read_bytes()
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == theirs
    theirs = json.loads((sample.adapter / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    for config in (theirs, ours):  # PEFT writes sets in the order of its hash seed
        for key in ("target_modules", "modules_to_save"):
            if isinstance(config[key], list):
                config[key] = sorted(config[key])
    assert ours == theirs


@pytest.mark.parametrize("name", LINEAR)
def test_state_dicts_keep_pefts_keys_and_values(name):
    sample = Sample(name)
    ours = interop.to_peft_state_dict(load(sample))
    assert list(ours) != []
    for key, want in sample.state.items():
        np.testing.assert_array_equal(ours[key], want)
        assert ours[key].dtype == want.dtype


def test_named_adapters_have_folders_of_their_own(tmp_path):
    base, params = two_kernels(tmp_path)
    params = loha_jax.inject(
        params,
        LoHaConfig(r=1, target_modules=["lin1"]),
        key=jax.random.key(1),
        adapter_name="style",
    )
    interop.save_peft(tmp_path / "both", params)
    files = sorted(
        str(p.relative_to(tmp_path / "both")) for p in (tmp_path / "both").rglob("*") if p.is_file()
    )
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "style/adapter_config.json",
        "style/adapter_model.safetensors",
    ]
    again = interop.load_peft(
        tmp_path / "both" / "style",
        interop.load_peft(tmp_path / "both", base),
        adapter_name="style",
    )
    assert loha_jax.adapter_names(again) == ("default", "style")
    for name in ("default", "style"):
        one, two = interop.to_peft_state_dict(params, name), interop.to_peft_state_dict(again, name)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[k], two[k]) for k in one)
    interop.save_peft(tmp_path / "one", params, adapters=["style"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["README.md", "style"]
    with pytest.raises(FileNotFoundError, match=r"there is one in its sub-folder\(s\) style"):
        interop.load_peft(tmp_path / "one", base)
    with pytest.raises(ValueError, match="the tree has no 'zzz'"):
        interop.save_peft(tmp_path, params, adapters=["zzz"])
    with pytest.raises(ValueError, match="Say which adapter: the tree has default, style"):
        interop.to_peft_state_dict(params)


def test_what_does_not_fit_in_many_modules_is_said_once(tmp_path):
    """A wrong layout of 30 kernels, and 120 keys of another model, with their numbers."""
    base = {"layers": [{"q": {"kernel": jnp.ones((4, 6))}} for _ in range(30)]}
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    interop.save_peft(tmp_path, loha_jax.inject(base, config, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"misshapen \(120\): ") as error:
        interop.load_peft(tmp_path, base, layouts={".*": "oi"})
    message = str(error.value)
    for shapes in ("[6, 2] in the file, [4, 2]", "[2, 4] in the file, [2, 6]"):
        assert message.count(shapes) == 1
    assert message.count("(so in 59 more: ") == 2
    with pytest.raises(ValueError, match=r"unexpected keys \(120\).*missing keys \(120\)") as error:
        interop.load_peft(tmp_path, base, names=lambda name: f"model.{name.rpartition('.')[0]}.x.q")
    assert len(str(error.value)) < 4000


def test_everything_that_does_not_fit_is_listed_in_one_error(tmp_path):
    base, _ = two_kernels(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.model.other.hada_w1_a"] = state.pop("base_model.model.lin0.hada_w1_a")
    state["base_model.model.lin1.hada_w2_b"] = np.zeros((2, 5), np.float32)
    save_file(state, path)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        interop.load_peft(tmp_path, base)
    message = str(error.value)
    assert str(path) in message
    assert "unexpected keys (1): base_model.model.other.hada_w1_a" in message
    assert "missing keys (1): base_model.model.lin0.hada_w1_a" in message
    assert (
        "misshapen (1): base_model.model.lin1.hada_w2_b: [2, 5] in the file, [2, 4] in the model"
        in message
    )


def test_a_rank_that_the_config_does_not_say_is_an_error(tmp_path):
    base, params = two_kernels(tmp_path)
    state = interop.to_peft_state_dict(params)
    with pytest.raises(ValueError, match=r"misshapen \(8\)"):
        interop.from_peft_state_dict(state, LoHaConfig(r=3, target_modules=["lin0", "lin1"]), base)


def test_base_weights_in_the_file_replace_the_kernel_as_in_peft():
    sample = Sample("llama_lm_head_targeted")
    params = sample.params()
    kernel = params["lm_head"]["kernel"]
    same = interop.load_peft(sample.adapter, params)
    assert same["lm_head"]["kernel"].kernel is kernel
    params["lm_head"]["kernel"] = jnp.zeros_like(kernel)
    replaced = interop.load_peft(sample.adapter, params)
    np.testing.assert_array_equal(replaced["lm_head"]["kernel"].kernel, kernel)


def test_a_targeted_head_brings_its_bias_as_in_peft(tmp_path):
    """PEFT writes all of such a head.

    tests/models compares the file of a GPT-J, whose head has a bias, bit for bit.
    """
    base = {"lm_head": {"kernel": jnp.ones((3, 4)), "bias": jnp.arange(4.0)}}
    params = loha_jax.inject(
        base, LoHaConfig(r=2, target_modules=["lm_head"]), key=jax.random.key(0)
    )
    head = "base_model.model.lm_head.base_layer"
    assert {"weight", "bias"} == {
        k.removeprefix(f"{head}.") for k in interop.to_peft_state_dict(params) if head in k
    }
    interop.save_peft(tmp_path, params)
    assert interop.load_peft(tmp_path, base)["lm_head"]["bias"] is base["lm_head"]["bias"]
    other = {"lm_head": {"kernel": base["lm_head"]["kernel"], "bias": jnp.zeros(4)}}
    np.testing.assert_array_equal(
        interop.load_peft(tmp_path, other)["lm_head"]["bias"], base["lm_head"]["bias"]
    )
    with pytest.raises(
        ValueError, match=r"unexpected keys \(1\): base_model\.model\.lm_head\.base_layer\.bias"
    ):
        interop.load_peft(tmp_path, {"lm_head": {"kernel": base["lm_head"]["kernel"]}})


@pytest.mark.parametrize("leave_out", [False, True])
def test_integer_counters_survive_with_or_without_a_leaf_for_them(leave_out, tmp_path):
    sample = Sample("modules_to_save")
    params = sample.params()
    if leave_out:
        del params["bn"]["num_batches_tracked"]
    interop.save_peft(tmp_path, interop.load_peft(sample.adapter, params))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (
        sample.adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_a_conv3d_is_refused_by_name():
    config = LoHaConfig(r=1, target_modules=["c"])
    kernel = jnp.ones((3, 3, 3, 2, 4))
    params = loha_jax.inject(
        {"c": {"kernel": kernel}}, config, key=jax.random.key(0), layouts={"c": "kkkio"}
    )
    with pytest.raises(ValueError, match="c is a convolution over 3 axes"):
        interop.to_peft_state_dict(params)


def test_the_order_of_patterns_survives_sorting(tmp_path):
    """Patterns whose order matters are written so that sorting does no harm."""
    base = {"layers": {str(n): {"q": {"kernel": jnp.ones((3, 4))}} for n in range(2)}}
    # Sorted, "layers.0.q" comes before "q" and would win.
    config = LoHaConfig(
        r=2,
        alpha=1,
        target_modules=["q"],
        alpha_pattern={"q": 2, "layers.0.q": 40},
        init_weights=False,
    )
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    interop.save_peft(tmp_path, params)
    loaded = interop.load_peft(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, loha_jax.merge(loaded), loha_jax.merge(params))


def test_stacks_are_written_as_the_modules_they_hold(tmp_path):
    base = {"layers": {"q": {"kernel": normal_array(1, (3, 4, 5))}}}
    config = LoHaConfig(
        r=2,
        target_modules=["q"],
        rank_pattern={"layers.2.q": 3},
        init_weights=False,
        layers_to_transform=[0, 2],
        layers_pattern="layers",
    )
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={"layers.q": "sio"})
    state = interop.to_peft_state_dict(params)
    shapes = {
        key.removeprefix("base_model.model."): value.shape
        for key, value in state.items()
        if "w1_" in key
    }
    assert shapes == {
        "layers.0.q.hada_w1_a": (5, 2),
        "layers.0.q.hada_w1_b": (2, 4),
        "layers.2.q.hada_w1_a": (5, 3),
        "layers.2.q.hada_w1_b": (3, 4),
    }
    interop.save_peft(tmp_path, params)
    loaded = interop.load_peft(tmp_path, base, layouts={"layers.q": "sio"})
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    unrolled = {
        "layers": {str(n): {"q": {"kernel": base["layers"]["q"]["kernel"][n]}} for n in range(3)}
    }
    apart = loha_jax.merge(interop.load_peft(tmp_path, unrolled))
    for n in range(3):
        np.testing.assert_array_equal(
            apart["layers"][str(n)]["q"]["kernel"],
            loha_jax.merge(params)["layers"]["q"]["kernel"][n],
        )


def test_modules_that_peft_saves_by_the_end_of_their_name_are_read(tmp_path):
    """PEFT wraps every module whose name ends with "head", without a dot before it."""
    base = {
        n: {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)} for n in ("lin0", "overhead", "head")
    }
    config = LoHaConfig(r=2, target_modules=["lin0"], modules_to_save=["head"])
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    assert isinstance(params["overhead"]["kernel"], jax.Array)  # here an entry is a whole name
    state = interop.to_peft_state_dict(params)
    state["base_model.model.overhead.weight"] = np.full((4, 3), 7, np.float32)
    state["base_model.model.overhead.bias"] = np.full(4, 8, np.float32)
    loaded = interop.from_peft_state_dict(state, config, base)
    np.testing.assert_array_equal(loha_jax.merge(loaded)["overhead"]["kernel"], np.full((3, 4), 7))
    assert loaded["lin0"]["kernel"].adapters["default"].config.modules_to_save == (
        "head",
        "overhead",
    )
    assert interop.to_peft_state_dict(loaded).keys() == state.keys()
    with pytest.raises(ValueError, match=r"unexpected keys \(1\): base_model.model.footer.weight"):
        interop.from_peft_state_dict(
            {**state, "base_model.model.footer.weight": np.ones(3)}, config, base
        )


def test_nested_saved_modules_and_their_statistics_round_trip(tmp_path):
    base = {
        "q": {"kernel": jnp.ones((3, 4))},
        "head": {
            "0": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)},
            "norm": {
                "scale": jnp.ones(4),
                "bias": jnp.zeros(4),
                "mean": jnp.full(4, 3.0),
                "var": jnp.full(4, 2.0),
            },
            "num_batches_tracked": jnp.int32(7),
        },
    }
    config = LoHaConfig(r=2, target_modules=["q"], modules_to_save=["head"], init_weights=False)
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    params = jax.tree.map(lambda x, m: x + 1 if m else x, params, loha_jax.trainable_mask(params))
    interop.save_peft(tmp_path, params)
    state = load_file(tmp_path / "adapter_model.safetensors")
    saved = {k.removeprefix("base_model.model.head."): v for k, v in state.items() if ".head." in k}
    assert saved.keys() == {
        *(
            "0.weight",
            "0.bias",
            "norm.weight",
            "norm.bias",
            "norm.running_mean",
            "norm.running_var",
        ),
        "num_batches_tracked",
        "norm.num_batches_tracked",  # PEFT wants it; the tree has none
    }
    assert saved["num_batches_tracked"] == 7
    assert saved["norm.num_batches_tracked"] == 0
    assert saved["num_batches_tracked"].dtype == saved["norm.num_batches_tracked"].dtype == np.int64
    np.testing.assert_array_equal(saved["norm.running_mean"], np.full(4, 3))  # saved, not trained
    np.testing.assert_array_equal(saved["norm.weight"], np.full(4, 2))
    jax.tree.map(np.testing.assert_array_equal, interop.load_peft(tmp_path, base), params)
