"""LyCORIS' files both ways, beside what LyCORIS wrote and computed."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from leaves import loha_leaves
from lycoris_samples import (
    DATA,
    FORMS,
    LAYOUTS,
    base_params,
    inputs,
    model,
    native,
    outputs,
    trained,
)
from lycoris_trees import loaded, same_tensors, written
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LycorisConfig, interop
from loha_jax.interop.disk.tensor_files import read_metadata
from loha_jax.interop.exchange.from_tree import module_factors
from loha_jax.tree.plan import plan_injection


def adapter_of(params, name):
    """The one module of that name: its factors, rank and alpha."""
    found = [
        m for leaf in loha_leaves(params) for m in module_factors(leaf, "default") if m.name == name
    ]
    assert len(found) == 1
    return found[0]


@functools.cache
def outputs_of_the_base():
    return jax.jit(model)(base_params(), inputs())


@pytest.mark.parametrize(
    ("form", "strategy"),
    [*((form, "merged") for form in FORMS), ("tucker", "factored"), ("dora_in", "factored")],
)
def test_outputs_are_those_of_lycoris(form, strategy):
    params, x = loaded(form), inputs()
    if strategy == "merged":
        got = jax.jit(lambda params, x: model(loha_jax.merge(params), x))(params, x)
    else:
        got = jax.jit(loha_jax.adapt(model, strategy=strategy))(params, x)
        assert not loha_jax.explain(model, params, x, strategy=strategy).dense
    base = outputs_of_the_base()
    for name, want in outputs(form).items():
        assert np.abs(want - base[name]).max() > 0.01
        np.testing.assert_allclose(
            got[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_written_as_lycoris_writes_it(form, tmp_path):
    path, theirs = native(form)
    interop.save_lycoris(tmp_path / "adapter.safetensors", loaded(form))
    same_tensors(load_file(tmp_path / "adapter.safetensors"), theirs)
    read = read_metadata
    assert (
        read(tmp_path / "adapter.safetensors")
        == read(path)
        == {"note": f"lycoris 4.1.3 native {form}"}
    )


@pytest.mark.parametrize("form", ["tucker", "dora"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly_and_written_bit_for_bit(form, dtype, tmp_path):
    half = {key: value.astype(dtype) for key, value in native(form)[1].items()}
    params = interop.load_lycoris(written(tmp_path, half), base_params(), layouts=LAYOUTS)
    assert all(
        t.dtype == jnp.float32
        for leaf in loha_leaves(params)
        for t in leaf.adapters["default"].trained.values()
    )
    exact = {key: value.astype(np.float32) for key, value in half.items()}
    same_tensors(interop.to_lycoris_state_dict(params), exact)
    again = interop.to_lycoris_state_dict(params, dtype=np.dtype(dtype).name)
    same_tensors(
        again, {key: exact[key] if key.endswith("alpha") else value for key, value in half.items()}
    )


@pytest.mark.parametrize("form", ["plain", "tucker", "scalar"])
def test_through_peft_and_back_bit_for_bit(form, tmp_path):
    """The folder is that of another converter, tensor by tensor.

    Its c3d was left out, as PEFT has no Conv3d.
    """
    theirs = {
        key: value for key, value in native(form)[1].items() if not key.startswith("lycoris_c3d.")
    }
    base = base_params(without=["c3d"])
    params = interop.load_lycoris(written(tmp_path, theirs), base, layouts=LAYOUTS)
    interop.save_peft(tmp_path / "peft", params)
    same_tensors(
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        load_file(DATA / f"peft_{form}" / "adapter_model.safetensors"),
    )
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    want = json.loads((DATA / f"peft_{form}" / "adapter_config.json").read_text())
    assert config.keys() == want.keys()
    for field in ("r", "alpha", "use_effective_conv2d", "modules_to_save", "exclude_modules"):
        assert config[field] == want[field], field
    assert sorted(config["target_modules"]) == sorted(want["target_modules"])
    for folder in (tmp_path / "peft", DATA / f"peft_{form}"):
        same_tensors(
            interop.to_lycoris_state_dict(interop.load_peft(folder, base, layouts=LAYOUTS)), theirs
        )


@pytest.mark.parametrize(
    ("given", "want"), [(None, 4), (0, 4), (3, 3), (np.float16(0.3), float(np.float16(0.3)))]
)
def test_alpha(given, want, tmp_path):
    """Without alpha the scale is 1, as in kohya's scripts and ComfyUI.

    LyCORIS' constructor takes 0 for that too.
    """
    state = native("plain")[1]
    if given is None:
        del state["lycoris_fc1.alpha"]
    else:
        state["lycoris_fc1.alpha"] = np.array([given] if given == 3 else given)
    params = interop.load_lycoris(written(tmp_path, state), base_params(), layouts=LAYOUTS)
    assert adapter_of(params, "fc1").alpha == want
    kernel = params["fc1"]["kernel"]
    factors = {
        part: state[f"lycoris_fc1.hada_{part}"].astype(np.float64)
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    delta = want / 4 * (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])
    np.testing.assert_allclose(
        np.asarray(kernel) - np.asarray(kernel.kernel), delta.T, rtol=0, atol=2e-6
    )
    assert interop.to_lycoris_state_dict(params)["lycoris_fc1.alpha"] == np.float32(want)


def test_the_config_of_loaded_modules():
    """The config targets these modules with their ranks and alphas."""
    params = loaded("tucker")
    config = loha_leaves(params)[0].adapters["default"].config
    assert isinstance(config, LycorisConfig)
    assert (config.r, config.alpha, config.weight_decompose, config.use_effective_conv2d) == (
        4,
        2,
        False,
        True,
    )
    assert config.metadata == {"note": "lycoris 4.1.3 native tucker"}
    targets = plan_injection(base_params(), config, layouts=LAYOUTS).targets.values()
    planned = {t.names: (t.ranks, t.alphas, t.cp) for t in targets}
    found = {leaf.names: leaf.adapters["default"] for leaf in loha_leaves(params)}
    assert planned == {names: (f.ranks, f.alphas, f.is_cp) for names, f in found.items()}


def test_names_that_end_alike(tmp_path):
    """Only the modules of the file are adapted where names end alike."""
    base = {
        "q": {"kernel": jnp.ones((3, 3))},
        "a": {"q": {"kernel": jnp.ones((3, 3))}, "a.q": jnp.ones(3)},
    }
    factors = {
        f"q.hada_{part}": np.ones((3, 1) if part[-1] == "a" else (1, 3))
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    path = written(
        tmp_path, {f"lycoris_{key}": value.astype(np.float32) for key, value in factors.items()}
    )
    params = interop.load_lycoris(path, base)
    assert [leaf.names for leaf in loha_leaves(params)] == [("q",)]
    interop.save_peft(tmp_path / "peft", params)
    assert [leaf.names for leaf in loha_leaves(interop.load_peft(tmp_path / "peft", base))] == [
        ("q",)
    ]


def test_an_old_file_can_be_read_as_it_was_trained(tmp_path):
    """LyCORIS 1.9.0 and earlier used t1 in the place of t2."""
    state = native("tucker")[1]
    params = interop.load_lycoris(
        native("tucker")[0], base_params(), layouts=LAYOUTS, conv2d_weights_fix=True
    )
    want = dict(state)
    for name in ("conv3", "gconv"):
        want[f"lycoris_{name}.hada_t2"] = state[f"lycoris_{name}.hada_t1"]
    same_tensors(interop.to_lycoris_state_dict(params), want)


def test_a_flat_convolution_may_have_its_spatial_axes(tmp_path):
    state = native("plain")[1]
    spatial = {"conv3": (3, 3), "gconv": (3, 2), "c1d": (3,), "c3d": (2, 3, 3)}
    for name, shape in spatial.items():
        for part in ("hada_w1_b", "hada_w2_b"):
            tensor = state[f"lycoris_{name}.{part}"]
            state[f"lycoris_{name}.{part}"] = tensor.reshape(3, -1, *shape)
    params = interop.load_lycoris(written(tmp_path, state), base_params(), layouts=LAYOUTS)
    same_tensors(interop.to_lycoris_state_dict(params), native("plain")[1])


def test_convolutions_with_and_without_cores_in_one_file(tmp_path):
    state = {**native("tucker")[1]}
    plain = native("plain")[1]
    state = {k: v for k, v in state.items() if not k.startswith(("lycoris_gconv.", "lycoris_c3d."))}
    state |= {k: v for k, v in plain.items() if k.startswith("lycoris_gconv.")}
    params = interop.load_lycoris(written(tmp_path, state), base_params(), layouts=LAYOUTS)
    same_tensors(interop.to_lycoris_state_dict(params), state)
    got = jax.jit(model)(params, inputs())
    for name, form in (("conv3", "tucker"), ("c1d", "tucker"), ("gconv", "plain")):
        want = outputs(form)[name]
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5 * np.abs(want).max())
    with pytest.raises(
        ValueError, match=r"one use_effective_conv2d.*(conv3|c1d).*gconv|gconv.*(conv3|c1d)"
    ):
        interop.save_peft(tmp_path / "peft", params)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("dora", r"has a weight decomposition.*save_lycoris.*save_lora"),
        ("plain", r"c3d is a convolution over 3 axes"),
    ],
)
def test_peft_does_not_get_what_it_cannot_hold(form, message, tmp_path):
    base = base_params(without=["c3d"] if form == "dora" else [])
    state = {
        k: v
        for k, v in native(form)[1].items()
        if form == "plain" or not k.startswith("lycoris_c3d.")
    }
    params = interop.load_lycoris(written(tmp_path, state), base, layouts=LAYOUTS)
    with pytest.raises(ValueError, match=message):
        interop.save_peft(tmp_path / "peft", params)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("options", [{"rs_lora": True}, {"rs_lora": True, "use_scalar": True}])
def test_rank_stabilisation_and_the_scalar_are_folded(options, tmp_path):
    config = LycorisConfig(
        r=4,
        alpha=3,
        target_modules=["fc1", "blocks.0.out", "conv3"],
        rank_pattern={"conv3": 9},
        **options,
    )
    base = base_params()
    params = trained(base, config, LAYOUTS)
    interop.save_lycoris(tmp_path / "adapter.safetensors", params)
    interop.save_peft(tmp_path / "peft", params)
    assert interop.to_lycoris_state_dict(params)["lycoris_conv3.alpha"] == np.float32(9)  # 3·√9
    assert len(json.loads((tmp_path / "peft" / "adapter_config.json").read_text())) == 20
    merge = jax.jit(loha_jax.merge)
    want = merge(params)
    for again in (
        interop.load_lycoris(tmp_path / "adapter.safetensors", base),
        interop.load_peft(tmp_path / "peft", base),
    ):
        for got, value in zip(jax.tree.leaves(merge(again)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6)
