"""A flat dictionary of torch's names beside the module that it comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from framework_training import check_base_and_products, trained
from safetensors.flax import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(4, 4, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.layers = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4, bias=False)})]
        )

    def forward(self, x):
        return self.layers[0]["q_proj"](torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


def test_torchs_names_square_weights_and_the_real_peft(tmp_path):
    torch.manual_seed(0)
    module = Net().eval()
    save_file(
        {name: jnp.asarray(t.numpy()) for name, t in module.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    flat = load_file(tmp_path / "m.safetensors")
    config = LoHaConfig(r=2, target_modules=["q_proj", "conv1"], init_weights=False)
    adapted = loha_jax.inject(flat, config, key=jax.random.key(0))
    assert adapted["layers.0.q_proj.weight"].layout.word == "oi"
    assert adapted["conv1.weight"].layout.word == "oikk"
    interop.save_peft(tmp_path / "adapter", adapted)
    opened = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").merge_and_unload()
    merged = loha_jax.merge(adapted)
    for name, tensor in opened.state_dict().items():
        np.testing.assert_allclose(merged[name], tensor.numpy(), atol=1e-6, err_msg=name)
    interop.save_merged(tmp_path / "out", adapted, base=tmp_path / "m.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, load_file(tmp_path / "out/model.safetensors"), merged
    )


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)])

    def forward(self, x):
        return self.layers[1](torch.relu(self.layers[0](x)))


def forward(params, x):
    h = jax.nn.relu(x @ params["layers.0.weight"].T + params["layers.0.bias"])
    return h @ params["layers.1.weight"].T + params["layers.1.bias"]


def test_a_state_dict_is_trained_and_its_file_opens_in_peft(tmp_path):
    torch.manual_seed(0)
    module = MLP().eval()
    params = {name: jnp.asarray(t.numpy().copy()) for name, t in module.state_dict().items()}
    before = jax.tree.map(np.array, params)
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    config = LoHaConfig(r=2, alpha=8, target_modules=["layers.0", "layers.1"])
    adapted = loha_jax.inject(params, config, key=jax.random.key(0))
    apply = loha_jax.adapt(forward)
    adapted = trained(adapted, lambda t: jnp.mean((apply(t, x) - 1.0) ** 2))
    check_base_and_products(forward, adapted, before, x)
    np.testing.assert_allclose(forward(loha_jax.merge(adapted), x), apply(adapted, x), atol=1e-5)
    interop.save_peft(tmp_path / "adapter", adapted)
    base = module(torch.tensor(x)).detach().numpy()
    opened = peft.PeftModel.from_pretrained(module, tmp_path / "adapter")
    theirs = opened(torch.tensor(x)).detach().numpy()
    assert np.abs(theirs - base).max() > 0.01
    np.testing.assert_allclose(apply(adapted, x), theirs, atol=1e-5)
    again = interop.load_peft(tmp_path / "adapter", params)
    np.testing.assert_allclose(apply(again, x), theirs, atol=1e-5)


@pytest.mark.parametrize("names", [("c_attn", "c_proj"), ("attn.c_attn", "out.c_proj")])
def test_a_weight_whose_bias_says_in_out_is_asked_for_its_layout(names, tmp_path):
    """GPT-2's Conv1D in torch, and a dictionary of one's own with torch's names."""
    shapes = dict(zip((f"h.0.{name}" for name in names), [(4, 12), (4, 4)], strict=True))
    params = {f"{name}.weight": jnp.ones(shape) for name, shape in shapes.items()}
    params |= {f"{name}.bias": jnp.ones(shape[1]) for name, shape in shapes.items()}
    for name in names:  # the square one lies near the other
        config = LoHaConfig(r=2, target_modules=[name])
        with pytest.raises(ValueError, match=rf"{name}\.weight.*bias.*\[in, out\].*layouts="):
            loha_jax.inject(params, config, key=jax.random.key(0))
        layouts = {r"h\.0\..*": "io"}
        adapted = loha_jax.inject(params, config, key=jax.random.key(0), layouts=layouts)
        assert adapted[f"h.0.{name}.weight"].layout.word == "io"
        with pytest.warns(
            UserWarning, match=rf"h\.0\.{name} look like GPT-2's.*not open"
        ) as caught:
            interop.save_peft(tmp_path / name, adapted)
        assert len(caught) == 2  # and that it is untrained
        with pytest.warns(UserWarning, match="untrained"):
            assert interop.save_lora(tmp_path / "lora", adapted).config["fan_in_fan_out"] is True


def test_linear_layers_called_like_gpt2s_open_in_peft(tmp_path):
    """As nanoGPT's, whose weights are [out, in]."""
    torch.manual_seed(0)
    names = {"c_attn": (8, 24), "c_proj": (24, 8), "q_attn": (8, 8)}
    module = torch.nn.ModuleDict({name: torch.nn.Linear(*shape) for name, shape in names.items()})
    params = {name: jnp.asarray(t.detach().numpy()) for name, t in module.state_dict().items()}
    config = LoHaConfig(r=2, target_modules=list(names), init_weights=False)
    adapted = loha_jax.inject(params, config, key=jax.random.key(0))
    interop.save_peft(tmp_path, adapted)  # without a warning
    merged = peft.PeftModel.from_pretrained(module, tmp_path).merge_and_unload().state_dict()
    for name, array in loha_jax.merge(adapted).items():
        np.testing.assert_allclose(merged[name], array, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 6), (6, 6)])
def test_a_transposed_convolution_behind_a_norm_is_asked_for_its_layout(inputs, outputs):
    """Its weight is [in, out, ...], and the norm is of its inputs."""
    torch.manual_seed(0)
    up = torch.nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    module = torch.nn.ModuleDict({"norm": torch.nn.GroupNorm(2, inputs), "up": up})
    params = {name: jnp.asarray(t.detach().numpy()) for name, t in module.state_dict().items()}
    config = LoHaConfig(r=2, target_modules=["up"], init_weights=False)
    with pytest.raises(ValueError, match=r"'iokk' \(a transposed convolution\).*layouts="):
        loha_jax.inject(params, config, key=jax.random.key(0))
    adapted = loha_jax.inject(params, config, key=jax.random.key(0), layouts={"up": "iokk"})
    factors = adapted["up.weight"].adapters["default"]
    assert factors.hada_w1_a.shape == (outputs, 2)
    pairs = [(factors.hada_w1_a, factors.hada_w1_b), (factors.hada_w2_a, factors.hada_w2_b)]
    first, second = (np.asarray(a) @ np.asarray(b) for a, b in pairs)
    delta = (first * second * 4).reshape(outputs, inputs, 2, 2)  # alpha/r = 8/2
    x = np.random.default_rng(0).normal(size=(1, inputs, 3, 3)).astype(np.float32)
    weight = up.weight.detach() + torch.tensor(delta.swapaxes(0, 1))
    theirs = torch.nn.functional.conv_transpose2d(torch.tensor(x), weight, stride=2)

    def forward(params, x):
        taps = jnp.flip(params["up.weight"], (2, 3))
        return jax.lax.conv_general_dilated(
            *(x, taps, (1, 1), [(1, 1), (1, 1)]),
            lhs_dilation=(2, 2),
            dimension_numbers=("NCHW", "IOHW", "NCHW"),
        )

    np.testing.assert_allclose(loha_jax.adapt(forward)(adapted, x), theirs, atol=1e-4)


T = torch.nn


def up(*sizes, kind: type[T.Module] = T.ConvTranspose2d, bias=False, **options):
    return kind(*sizes, stride=2, bias=bias, **options)


# `m` holds transposed convolutions whose biases or norms fit convolutions too.
TRANSPOSED = {
    "with a bias": lambda: {"m": T.Sequential(up(8, 8, 2, bias=True), T.ReLU())},
    "of one axis": lambda: {"m": T.Sequential(up(8, 8, 4, kind=T.ConvTranspose1d, bias=True))},
    "before a norm": lambda: {"m": T.ModuleList([up(8, 8, 4), T.BatchNorm2d(8)])},
    "depthwise": lambda: {"m": T.Sequential(up(8, 8, 4, groups=8), T.BatchNorm2d(8))},
    "in groups": lambda: {
        "m": T.ModuleDict({"up": T.Sequential(up(8, 8, 4, groups=2, bias=True))})
    },
    "odd, beside another": lambda: {
        "m": T.Sequential(up(8, 8, 3, bias=True)),
        "decoder": T.Sequential(up(16, 8, 3, bias=True), T.ReLU()),
    },
    "Mask R-CNN": lambda: {"m": T.ModuleDict({"conv5_mask": up(8, 8, 2, bias=True)})},
}


def state(module):
    return {name: jnp.asarray(t.numpy()) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_of_as_many_inputs_as_outputs_is_asked_for(name):
    params = state(T.ModuleDict(TRANSPOSED[name]()))
    key = next(key for key in params if key.startswith("m.") and params[key].ndim > 2)
    module = key.removesuffix(".weight")
    config = LoHaConfig(r=2, target_modules=[module], init_weights=False)
    with pytest.raises(ValueError, match=rf"{module}.*'oik+' .*'iok+' \(a transposed.*layouts="):
        loha_jax.inject(params, config, key=jax.random.key(0))
    layouts = {module: "io" + "k" * (params[key].ndim - 2)}
    loha_jax.inject(params, config, key=jax.random.key(0), layouts=layouts)


def test_all_linear_does_not_ask_which_convolution_it_is():
    params = state(T.ModuleDict({**TRANSPOSED["with a bias"](), "q": T.Linear(4, 4)}))
    config = LoHaConfig(r=2, target_modules="all-linear")
    adapted = loha_jax.inject(params, config, key=jax.random.key(0))
    assert [row.module for row in loha_jax.summary(adapted).rows] == ["q"]


def test_a_file_does_not_settle_a_transposed_convolution_and_a_checkpoint_needs_no_answer(tmp_path):
    """PEFT has no LoHa for it, and the file of `save_peft` looks as a convolution's."""
    params = state(T.ModuleDict(TRANSPOSED["with a bias"]()))
    config = LoHaConfig(r=2, target_modules=["m.0"], init_weights=False)
    layouts = {r"m\.0": "iokk"}
    adapted = loha_jax.inject(params, config, key=jax.random.key(0), layouts=layouts)
    with pytest.warns(UserWarning, match="transposed convolutions"):
        interop.save_peft(tmp_path / "adapter", adapted)
    with pytest.raises(ValueError, match=r"m\.0\.weight.*'iokk'.*layouts="):
        interop.load_peft(tmp_path / "adapter", params)
    loaded = interop.load_peft(tmp_path / "adapter", params, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, loha_jax.merge(loaded), loha_jax.merge(adapted))
    save_file(params, tmp_path / "base.safetensors")
    empty = jax.tree.map(jnp.zeros_like, params)
    base = interop.load_base(tmp_path / "base.safetensors", empty)
    jax.tree.map(np.testing.assert_array_equal, base, params)


def test_a_merged_dictionary_needs_no_answer_for_what_stays_as_it_is(tmp_path):
    params = state(T.ModuleDict({**TRANSPOSED["with a bias"](), "q": T.Linear(4, 4)}))
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    adapted = loha_jax.inject(params, config, key=jax.random.key(0))
    interop.save_merged(tmp_path, adapted)
    merged = load_file(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, merged, loha_jax.merge(adapted))


@pytest.mark.parametrize("bias", [False, True])
def test_a_square_kernel_of_flax_that_enlarges_is_asked_for_by_load_base(bias, tmp_path):
    """A checkpoint's shape fits `kkio` and, with `transpose_kernel`, `kkoi`."""
    params = {"up": {"kernel": jnp.ones((2, 2, 8, 8))} | ({"bias": jnp.ones(8)} if bias else {})}
    layer = up(8, 8, 2, bias=bias)
    file = {f"up.{name}": jnp.asarray(t.numpy()) for name, t in layer.state_dict().items()}
    save_file(file, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"up\.kernel.*'kkio'.*'kkoi'"):
        interop.load_base(tmp_path / "base.safetensors", params)


@pytest.mark.parametrize("leaf", ["weight", "kernel"])
def test_a_lone_square_projection_called_like_gpt2s_is_asked_for(leaf):
    """GPT-2's are turned, in torch as in Flax; nothing here shows whether this is one."""
    params = {"attn": {"c_proj": {leaf: jnp.ones((4, 4)), "bias": jnp.ones(4)}}}
    config = LoHaConfig(r=2, target_modules=["c_proj"])
    with pytest.raises(ValueError, match=rf"c_proj\.{leaf}.*'io', 'oi' .*GPT-2.*layouts="):
        loha_jax.inject(params, config, key=jax.random.key(0))
    without = {"attn": {"c_proj": {leaf: params["attn"]["c_proj"][leaf]}}}
    loha_jax.inject(without, config, key=jax.random.key(0))


def test_parameters_of_torch_called_scale_and_mean_keep_their_names(tmp_path):
    """As Mimi's layer scales. Flax' `scale` is torch's `weight`."""
    module = T.ModuleDict({"q": T.Linear(4, 4), "gate": T.Module()})
    module["gate"].scale = T.Parameter(torch.randn(4))
    module["gate"].register_buffer("mean", torch.randn(4))
    params = state(module)
    save_file(params, tmp_path / "base.safetensors")
    empty = jax.tree.map(jnp.zeros_like, params)
    loaded = interop.load_base(tmp_path / "base.safetensors", empty)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    adapted = loha_jax.inject(loaded, config, key=jax.random.key(0))
    interop.save_merged(tmp_path / "merged", adapted, base=tmp_path / "base.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == params.keys()


@pytest.mark.parametrize("name", ["embed_tokens", "wte"])
def test_no_lora_is_written_of_a_lookup_table(name, tmp_path):
    """PEFT reads other tensors for one, and opens the file without it."""
    params = {f"{name}.weight": jnp.ones((9, 4)), "q.weight": jnp.ones((4, 4))}
    config = LoHaConfig(r=2, target_modules=[name, "q"], init_weights=False)
    adapted = loha_jax.inject(params, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=rf"{name} is an embedding table"):
        interop.save_lora(tmp_path, adapted)
