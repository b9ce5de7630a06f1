"""LyCORIS' files both ways, beside what LyCORIS wrote and computed."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from loha_jax.interop.disk.tensor_files import FileError
from loha_jax.interop.exchange.factors import module_factors
from lycoris_samples import CONVOLUTIONS, DATA, FORMS, LAYOUTS, base_params, inputs, model, native, outputs, trained
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted
from loha_jax.tree.plan import plan_injection


def loaded(form, base=None):
    return interop.load_lycoris(native(form)[0], base_params() if base is None else base, layouts=LAYOUTS)


def loha_leaves(params):
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_adapted) if isinstance(leaf, LoHaWeight)]


def adapter_of(params, name):
    """The one module of that name: its factors, rank and alpha."""
    found = [m for leaf in loha_leaves(params) for m in module_factors(leaf, "default") if m.name == name]
    assert len(found) == 1
    return found[0]


@functools.cache
def outputs_of_the_base():
    return jax.jit(model)(base_params(), inputs())


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def written(tmp_path, state, metadata=None, name="adapter.safetensors"):
    save_file({key: np.asarray(value, order="C") for key, value in state.items()}, tmp_path / name, metadata)
    return tmp_path / name


@pytest.mark.parametrize(
    ("form", "strategy"), [*((form, "merged") for form in FORMS), ("tucker", "factored"), ("dora_in", "factored")]
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
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_written_as_lycoris_writes_it(form, tmp_path):
    path, theirs = native(form)
    interop.save_lycoris(tmp_path / "adapter.safetensors", loaded(form))
    same_tensors(load_file(tmp_path / "adapter.safetensors"), theirs)
    read = interop.files.read_metadata
    assert read(tmp_path / "adapter.safetensors") == read(path) == {"note": f"lycoris 4.1.3 native {form}"}


@pytest.mark.parametrize("form", ["tucker", "dora"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly_and_written_bit_for_bit(form, dtype, tmp_path):
    half = {key: value.astype(dtype) for key, value in native(form)[1].items()}
    params = interop.load_lycoris(written(tmp_path, half), base_params(), layouts=LAYOUTS)
    assert all(
        t.dtype == jnp.float32 for leaf in loha_leaves(params) for t in leaf.adapters["default"].trained.values()
    )
    exact = {key: value.astype(np.float32) for key, value in half.items()}
    same_tensors(interop.to_lycoris_state_dict(params), exact)
    again = interop.to_lycoris_state_dict(params, dtype=np.dtype(dtype).name)
    same_tensors(again, {key: exact[key] if key.endswith("alpha") else value for key, value in half.items()})


@pytest.mark.parametrize("form", ["plain", "tucker", "scalar"])
def test_through_peft_and_back_bit_for_bit(form, tmp_path):
    """The folder is that of another converter, tensor by tensor; its c3d was left out, as PEFT has no Conv3d."""
    theirs = {key: value for key, value in native(form)[1].items() if not key.startswith("lycoris_c3d.")}
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
        same_tensors(interop.to_lycoris_state_dict(interop.load_peft(folder, base, layouts=LAYOUTS)), theirs)


@pytest.mark.parametrize(("given", "want"), [(None, 4), (0, 4), (3, 3), (np.float16(0.3), float(np.float16(0.3)))])
def test_alpha(given, want, tmp_path):
    """Without alpha the scale is 1, as in kohya's scripts and ComfyUI; LyCORIS' constructor takes 0 for that too."""
    state = native("plain")[1]
    if given is None:
        del state["lycoris_fc1.alpha"]
    else:
        state["lycoris_fc1.alpha"] = np.array([given] if given == 3 else given)
    params = interop.load_lycoris(written(tmp_path, state), base_params(), layouts=LAYOUTS)
    assert adapter_of(params, "fc1").alpha == want
    kernel = params["fc1"]["kernel"]
    factors = {part: state[f"lycoris_fc1.hada_{part}"].astype(np.float64) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    delta = want / 4 * (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])
    np.testing.assert_allclose(np.asarray(kernel) - np.asarray(kernel.kernel), delta.T, rtol=0, atol=2e-6)
    assert interop.to_lycoris_state_dict(params)["lycoris_fc1.alpha"] == np.float32(want)


def test_the_config_targets_these_modules_with_their_ranks_and_alphas():
    params = loaded("tucker")
    config = loha_leaves(params)[0].adapters["default"].config
    assert isinstance(config, LycorisConfig)
    assert (config.r, config.alpha, config.weight_decompose, config.use_effective_conv2d) == (4, 2, False, True)
    assert config.metadata == {"note": "lycoris 4.1.3 native tucker"}
    targets = plan_injection(base_params(), config, layouts=LAYOUTS).targets.values()
    planned = {t.names: (t.ranks, t.alphas, t.cp) for t in targets}
    found = {leaf.names: leaf.adapters["default"] for leaf in loha_leaves(params)}
    assert planned == {names: (f.ranks, f.alphas, f.is_cp) for names, f in found.items()}


def test_only_the_modules_of_the_file_are_adapted_where_names_end_alike(tmp_path):
    base = {"q": {"kernel": jnp.ones((3, 3))}, "a": {"q": {"kernel": jnp.ones((3, 3))}, "a.q": jnp.ones(3)}}
    factors = {
        f"q.hada_{part}": np.ones((3, 1) if part[-1] == "a" else (1, 3)) for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    path = written(tmp_path, {f"lycoris_{key}": value.astype(np.float32) for key, value in factors.items()})
    params = interop.load_lycoris(path, base)
    assert [leaf.names for leaf in loha_leaves(params)] == [("q",)]
    interop.save_peft(tmp_path / "peft", params)
    assert [leaf.names for leaf in loha_leaves(interop.load_peft(tmp_path / "peft", base))] == [("q",)]


def test_an_old_file_can_be_read_as_it_was_trained(tmp_path):
    """LyCORIS 1.9.0 and earlier used t1 in the place of t2."""
    state = native("tucker")[1]
    params = interop.load_lycoris(native("tucker")[0], base_params(), layouts=LAYOUTS, conv2d_weights_fix=True)
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
    with pytest.raises(ValueError, match=r"one use_effective_conv2d.*(conv3|c1d).*gconv|gconv.*(conv3|c1d)"):
        interop.save_peft(tmp_path / "peft", params)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("form", "message"),
    [("dora", r"has a weight decomposition.*save_lycoris.*save_lora"), ("plain", r"c3d is a convolution over 3 axes")],
)
def test_peft_does_not_get_what_it_cannot_hold(form, message, tmp_path):
    base = base_params(without=["c3d"] if form == "dora" else [])
    state = {k: v for k, v in native(form)[1].items() if form == "plain" or not k.startswith("lycoris_c3d.")}
    params = interop.load_lycoris(written(tmp_path, state), base, layouts=LAYOUTS)
    with pytest.raises(ValueError, match=message):
        interop.save_peft(tmp_path / "peft", params)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("options", [{"rs_lora": True}, {"rs_lora": True, "use_scalar": True}])
def test_rank_stabilisation_and_the_scalar_are_folded(options, tmp_path):
    config = LycorisConfig(
        r=4, alpha=3, target_modules=["fc1", "blocks.0.out", "conv3"], rank_pattern={"conv3": 9}, **options
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


class TestStacks:
    """Kernels that hold several modules, as `nn.scan` and `vmap` make them."""

    LAYOUTS = {"layers.q": "sio", "layers.conv": "skkio"}  # noqa: RUF012

    @staticmethod
    def base():
        random = np.random.default_rng(0)
        return {
            "layers": {
                "q": {"kernel": jnp.asarray(random.standard_normal((3, 5, 4)), jnp.float32)},
                "conv": {"kernel": jnp.asarray(random.standard_normal((3, 2, 2, 5, 4)), jnp.float32)},
            }
        }

    @staticmethod
    def module(name, r, alpha=1.0, cores=False, dora=None):
        random = np.random.default_rng(len(name) + r)
        shapes = {"hada_w1_a": (4, r), "hada_w1_b": (r, 5), "hada_w2_a": (4, r), "hada_w2_b": (r, 5)}
        if "conv" in name:
            shapes |= dict.fromkeys(("hada_w1_b", "hada_w2_b"), (r, 20))
        if cores:
            shapes = {part: (r, 4 if part[-1] == "a" else 5) for part in shapes}
            shapes |= {"hada_t1": (r, r, 2, 2), "hada_t2": (r, r, 2, 2)}
        if dora is not None:
            shapes["dora_scale"] = dora
        tensors = {part: random.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()}
        return {f"lycoris_{name}.{part}": t for part, t in {"alpha": np.float32(alpha), **tensors}.items()}

    def load(self, tmp_path, state):
        return interop.load_lycoris(written(tmp_path, state), self.base(), layouts=self.LAYOUTS)

    def test_modules_that_the_file_lacks_are_not_adapted(self, tmp_path):
        state = {
            **self.module("layers_0_q", 2, dora=(4, 1)),
            **self.module("layers_2_q", 3, alpha=0.5, dora=(4, 1)),
            **self.module("layers_1_conv", 2, cores=True),
        }
        params = self.load(tmp_path, state)
        same_tensors(interop.to_lycoris_state_dict(params), state)
        q, merged = self.base()["layers"]["q"]["kernel"], loha_jax.merge(params)["layers"]["q"]["kernel"]
        np.testing.assert_array_equal(merged[1], q[1])
        for index, r, alpha in ((0, 2, 1.0), (2, 3, 0.5)):
            t = {k.rpartition(".")[2]: v.astype(np.float64) for k, v in state.items() if f"layers_{index}_q" in k}
            delta = alpha / r * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
            rows = np.asarray(q[index], np.float64).T + delta
            rows *= t["dora_scale"] / np.linalg.norm(rows, axis=1, keepdims=True)
            np.testing.assert_allclose(merged[index], rows.T, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("layers_0_conv", {}), ("layers_1_conv", {"cores": True})),
            (("layers_0_q", {}), ("layers_1_q", {"dora": (4, 1)})),
            (("layers_0_q", {"dora": (1, 5)}), ("layers_1_q", {"dora": (4, 1)})),
        ],
    )
    def test_modules_of_different_forms_in_one_kernel_are_refused_by_name(self, one, other, tmp_path):
        state = {k: v for name, options in (one, other) for k, v in self.module(name, 2, **options).items()}
        name = one[0].replace("_", ".")
        with pytest.raises(ValueError, match=rf"one stacked kernel holds modules of different forms: {name} has"):
            self.load(tmp_path, state)


class TestNorms:
    """`train_norm=True`: differences of LayerNorm's and GroupNorm's parameters."""

    @staticmethod
    def base(dtype=jnp.float32):
        random = np.random.default_rng(3)
        values = iter(jnp.asarray(random.standard_normal(4), dtype) for _ in range(9))
        norm = lambda: {"scale": next(values), "bias": next(values)}  # noqa: E731
        return {
            "q": {"kernel": jnp.ones((4, 4), dtype)},
            "norm": norm(),
            "block": {"norm": norm(), "q": {"kernel": jnp.ones((4, 4), dtype)}},
        }

    @staticmethod
    def state():
        random = np.random.default_rng(4)
        state = TestStacks.module("q", 2)
        state = {k: v[:, :4] if k.endswith("_b") else v for k, v in state.items()}
        return state | {
            f"lycoris_norm.{part}": random.standard_normal(4).astype(np.float32) for part in ("w_norm", "b_norm")
        }

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_they_are_added_to_copies(self, dtype, tmp_path):
        base, state = self.base(dtype), self.state()
        params = interop.load_lycoris(written(tmp_path, state), base)
        merged = loha_jax.merge(params)
        for parameter, part in (("scale", "w_norm"), ("bias", "b_norm")):
            leaf = params["norm"][parameter]
            assert isinstance(leaf, SavedWeight)
            assert leaf.original is base["norm"][parameter]
            want = (base["norm"][parameter].astype(jnp.float32) + state[f"lycoris_norm.{part}"]).astype(dtype)
            np.testing.assert_array_equal(merged["norm"][parameter], want)
        assert merged["block"]["norm"]["scale"] is base["block"]["norm"]["scale"]  # "norm" matches its end
        ours = interop.to_lycoris_state_dict(params)
        assert ours.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_allclose(ours[key], value, rtol=0, atol=3e-2 if dtype == jnp.bfloat16 else 5e-7)

    def test_a_norm_without_a_difference_of_its_bias(self, tmp_path):
        state = {k: v for k, v in self.state().items() if not k.endswith("b_norm")}
        params = interop.load_lycoris(written(tmp_path, state), self.base())
        np.testing.assert_array_equal(params["norm"]["bias"], self.base()["norm"]["bias"])
        assert not interop.to_lycoris_state_dict(params)["lycoris_norm.b_norm"].any()

    def test_a_module_within_one_that_is_called_like_it(self, tmp_path):
        """`modules_to_save=["norm"]` would exclude `block.norm.q`."""
        base = self.base()
        base["block"]["norm"]["q"] = base["block"].pop("q")
        state = self.state()
        state |= {key.replace("_q.", "_block_norm_q."): value for key, value in state.items() if "_q." in key}
        params = interop.load_lycoris(written(tmp_path, state), base)
        assert interop.to_lycoris_state_dict(params).keys() == state.keys()

    def test_a_stack_of_norms_is_refused_by_its_path(self, tmp_path):
        base = {"layers": {"q": {"kernel": jnp.ones((2, 4, 4))}, "norm": {"scale": jnp.ones((2, 4))}}}
        names = {r"layers\.(.*)": [r"layers.0.\1", r"layers.1.\1"]}
        state = {
            key.replace("lycoris_", "lycoris_layers_1_"): t for key, t in self.state().items() if "b_norm" not in key
        }
        with pytest.raises(ValueError, match=r"layers\.norm\.scale of shape \[2, 4\] holds a stack"):
            interop.load_lycoris(written(tmp_path, state), base, names=names, layouts={"layers.q": "sio"})

    def test_they_go_through_peft(self, tmp_path):
        base = {name: value for name, value in self.base().items() if name != "block"}
        params = interop.load_lycoris(written(tmp_path, self.state()), base)
        interop.save_peft(tmp_path / "peft", params)
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] == ["norm"]
        again = interop.load_peft(tmp_path / "peft", base)
        same_tensors(interop.to_lycoris_state_dict(again), interop.to_lycoris_state_dict(params))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lycoris_norm.w_norm": np.ones(5, np.float32)}, r"norm\.w_norm: \[5\] in the file, \[4\] in the model"),
            (
                {"lycoris_nrom.w_norm": np.ones(4, np.float32)},
                r"the tree lacks \(1\): lycoris_nrom \(the tree has norm\)",
            ),
            ({"lycoris_norm.alpha": np.float32(1)}, r"\blycoris_norm\b.*alpha"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            interop.load_lycoris(written(tmp_path, self.state() | change), self.base())


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (
            {"a": {"b_c": {"kernel": jnp.ones((2, 2))}}, "a_b": {"c": {"kernel": jnp.ones((2, 2))}}},
            {"target_modules": ["b_c", "c"]},
            r"a\.b_c and a_b\.c would both be 'lycoris_a_b_c'",
        ),
        (
            {"q": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
            {"target_modules": ["q"], "modules_to_save": ["head"]},
            r"head is in modules_to_save.*save_peft",
        ),
        (
            {"q": {"kernel": jnp.ones((2, 2))}, "bn": {"scale": jnp.ones(2), "bias": jnp.ones(2), "mean": jnp.ones(2)}},
            {"target_modules": ["q"], "modules_to_save": ["bn"]},
            r"bn is in modules_to_save.*save_peft",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(base, config, message, tmp_path):
    params = loha_jax.inject(base, LoHaConfig(r=1, **config), key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        interop.save_lycoris(tmp_path / "adapter.safetensors", params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": "lora_unet"}, r"prefix='lora_unet' should end with '_'"),
        ({"dtype": "int8"}, r"dtype='int8'.*float16, bfloat16, float32"),
        ({"dtype": "half"}, r"dtype='half'|cannot hold"),
        ({"dtype": "nothing"}, r"dtype='nothing'"),
        ({"dtype": jnp.float16}, r"lycoris_q\.hada_w1_a has values that float16 cannot hold"),
        ({"metadata": {"steps": 3}}, r"metadata\['steps'\] is 3"),
        ({"adapter_name": "other"}, r"other"),
        ({"others": {"lycoris_": {}}}, r"none|no adapter"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, message, tmp_path):
    params = loha_jax.inject(
        {"q": {"kernel": jnp.ones((2, 2))}}, LoHaConfig(r=1, target_modules=["q"]), key=jax.random.key(0)
    )
    params = jax.tree.map(lambda t: t * 1e6, params)
    with pytest.raises(ValueError, match=message):
        interop.save_lycoris(tmp_path / "adapter.safetensors", params, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lycoris_fc1.hada_w2_b": None}, r"lycoris_fc1 lacks hada_w2_b"),
        ({"lycoris_conv3.hada_t2": None}, r"lycoris_conv3 lacks hada_t2"),
        ({"lycoris_fc1.hada_w2_b": np.ones((5, 24), np.float32)}, r"factors of lycoris_fc1 do not fit each other"),
        ({"lycoris_fc1.hada_w2_b": np.ones((4, 24), np.int32)}, r"lycoris_fc1\.hada_w2_b is int32"),
        (
            {"lycoris_fc1.alpha": np.array([1.0, 2.0])},
            r"lycoris_fc1\.alpha should be one finite number.*\[1\.0, 2\.0\]",
        ),
        ({"lycoris_fc1.alpha": np.array(np.nan)}, r"lycoris_fc1\.alpha should be one finite number.*nan"),
        ({"lycoris_fc1.weight": np.ones(3)}, r"not those of a LoHa \(1\): lycoris_fc1\.weight"),
        ({"loose": np.ones(3)}, r"not those of a LoHa \(1\): loose"),
        ({"lycoris_x.lora_up.weight": np.ones((2, 2))}, r"lycoris_x lacks lora_A \(lora_down\); it has lora_B"),
        ({"lycoris_fc1.lora_up.weight": np.ones((2, 2))}, r"lycoris_fc1 has the factors of a LoRA and hada_w1_a of a"),
        ({"lycoris_x.lora_magnitude_vector": np.ones(2)}, r"lycoris_x is a variant of LoRA"),
        ({"lora_unet_x.lokr_w1": np.ones((2, 2))}, r"a LoKr adapter"),
        ({"lycoris_x.on_input": np.ones(())}, r"a \(IA\)³ adapter"),
        ({"lycoris_x.oft_blocks": np.ones((2, 2, 2))}, r"an? OFT adapter"),
        ({"lycoris_x.diff": np.ones((2, 2))}, r"modules that the tree lacks \(1\): lycoris_x"),
        ({"lycoris_fc1.diff": np.ones((16, 24))}, r"fc1\.diff: fc1\.kernel has an adapter"),
        ({"base_model.model.x.hada_w1_a": np.ones((2, 2))}, r"PEFT's keys.*load_peft"),
    ],
)
def test_a_file_of_another_kind_or_broken_is_refused_by_its_key(change, message, tmp_path):
    state = native("tucker")[1] | change
    path = written(tmp_path, {key: value for key, value in state.items() if value is not None})
    with pytest.raises(FileError, match=message) as error:
        interop.load_lycoris(path, base_params(), layouts=LAYOUTS)
    assert str(path) in str(error.value)


def test_one_error_lists_all_that_does_not_fit(tmp_path):
    base = base_params(without=["fc1", "blocks.0.out"])
    base["fc"] = {"kernel": jnp.ones((24, 16))}
    base["conv3"]["kernel"] = jnp.ones((3, 3, 8, 11))
    base["c1d"]["kernel"] = jnp.ones((1, 6, 8))
    state = native("dora")[1]
    state["lycoris_gconv.dora_scale"] = state["lycoris_gconv.dora_scale"].reshape(-1)
    with pytest.raises(ValueError, match=r"nothing was loaded") as error:
        interop.load_lycoris(written(tmp_path, state), base, layouts=CONVOLUTIONS)
    for part in (
        "modules that the tree lacks (2): lycoris_blocks_0_out (the tree has blocks.0.q_proj), lycoris_fc1",
        "lycoris_fc1 (the tree has fc)",
        r"conv3.hada_w1_a: [10, 3] in the file, [11, 3] in the model",
        r"conv3.dora_scale: [10, 1, 1, 1] in the file, [11, 1, 1, 1] or [1, 8, 1, 1] in the model",
        r"c1d.hada_w1_b: [3, 18] in the file, [3, 6] in the model",
        r"gconv.dora_scale: [8] in the file, [8, 1, 1, 1] or [1, 4, 1, 1] in the model",
        "layouts=",
    ):
        assert part in str(error.value)
    assert not any(is_adapted(leaf) for leaf in jax.tree.leaves(base, is_leaf=is_adapted))


def test_cores_need_a_kernel_with_an_extent(tmp_path):
    base = base_params()
    base["conv3"]["kernel"] = jnp.ones((1, 1, 8, 10))
    with pytest.raises(ValueError, match=r"conv3\.hada_t1: \[3, 3, 3, 3\] in the file, none in the model"):
        interop.load_lycoris(native("tucker")[0], base, layouts=LAYOUTS)


def test_a_layout_that_cannot_be_told_is_asked_for():
    with pytest.raises(ValueError, match=r"c1d.*layouts="):
        interop.load_lycoris(native("plain")[0], base_params())


def test_it_adds_an_adapter_to_those_that_there_are(tmp_path):
    config = LoHaConfig(r=2, target_modules=["fc1"])
    base = loha_jax.inject(base_params(), config, key=jax.random.key(0), adapter_name="first")
    params = interop.load_lycoris(native("plain")[0], base, adapter_name="second", layouts=LAYOUTS)
    assert params["fc1"]["kernel"].adapters.keys() == {"first", "second"}
    assert params["fc1"]["kernel"].active == ("second",)
    with pytest.raises(ValueError, match=r"first.*second"):
        interop.to_lycoris_state_dict(params)
    same_tensors(interop.to_lycoris_state_dict(params, "second"), native("plain")[1])
    with pytest.raises(ValueError, match="second"):
        interop.load_lycoris(native("plain")[0], params, adapter_name="second", layouts=LAYOUTS)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        interop.load_lycoris(tmp_path / "nowhere.safetensors", base_params())
    with pytest.raises(ValueError, match=r"peft_plain is no file of LyCORIS.*`load_peft`"):
        interop.load_lycoris(DATA / "peft_plain", base_params())


def test_the_convolutions_of_the_sample_have_no_layout_of_their_own():
    assert {name: leaf.layout.word for leaf in loha_leaves(loaded("plain")) for name in leaf.names} == {
        **dict.fromkeys(("fc1", "blocks.0.q_proj", "blocks.0.out"), "io"),
        "conv1x1": "kkio",
        **CONVOLUTIONS,
    }
