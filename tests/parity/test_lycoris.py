"""The real lycoris-lora opens what we write, and we open what it writes.

Outputs are those of its forward pass.

Never of its merge: that of LyCORIS 4.1.3 multiplies by alpha/r twice.
"""

import jax
import jax.numpy as jnp
import lycoris
import lycoris.kohya
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from lycoris_samples import CONVOLUTIONS, DATA, LAYERS, inputs, jax_tree, kohya_state, trained
from lycoris_samples import model as sample_forward
from peft_samples import torch_value
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LycorisConfig, interop
from tests.parity.unet import small_unet


class Net(torch.nn.Module):
    """The samples' network and a normalisation layer.

    Every kind of layer that LyCORIS adapts with LoHa.
    """

    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(24, 16)
        self.norm = torch.nn.LayerNorm(12)
        q_proj, out = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 12)
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": q_proj, "out": out})])
        self.conv1x1 = torch.nn.Conv2d(6, 8, 1)
        self.conv3 = torch.nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.gconv = torch.nn.Conv2d(8, 8, (3, 2), groups=2)
        self.c1d = torch.nn.Conv1d(6, 8, 3, padding=1)
        self.c3d = torch.nn.Conv3d(4, 6, (2, 3, 3))
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, x):
        block, image = self.blocks[0], self.conv1x1(x["img"])
        return {
            "lin": self.norm(block["out"](torch.tanh(block["q_proj"](self.fc1(x["x"]))))),
            "conv3": self.conv3(image),
            "gconv": self.gconv(image),
            "c1d": self.c1d(x["seq"]),
            "c3d": self.c3d(x["vol"]),
        }


@jax.jit
def jax_forward(params, x):
    """The twin of `Net.forward`; adapted weights are added up, as LyCORIS does."""
    params = loha_jax.merge(params)
    out = sample_forward(params, x)
    y = out["lin"] - out["lin"].mean(-1, keepdims=True)
    normed = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return out | {"lin": normed * params["norm"]["scale"] + params["norm"]["bias"]}


def net():
    torch.manual_seed(0)
    return Net().eval()


def torch_outputs(module):
    with torch.no_grad():
        out = module({key: torch.from_numpy(value) for key, value in inputs().items()})
    return {key: value.numpy() for key, value in out.items()}


def base_of(module):
    return jax_tree({key: value.numpy() for key, value in module.state_dict().items()})


def same_outputs(ours, theirs, base):
    for name, want in theirs.items():
        assert np.abs(want - base[name]).max() > 1e-3, f"the adapter does nothing to {name}"
        np.testing.assert_allclose(
            ours[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name
        )


def same_tensors(ours, theirs):
    """Bit for bit but for alpha, which LyCORIS rounds to the dtype of the file."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(
            ours[key].astype(np.float64), tensor.astype(np.float64), err_msg=key
        )


@pytest.fixture
def network(monkeypatch):
    """Make LyCORIS' wrapper.

    Its list of layers is a class attribute, which `create_lycoris` changes for good.
    """
    kinds = ["Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm"]
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_MODULE", kinds)
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", "lycoris")

    def make(module, **options):
        made = lycoris.LycorisNetwork(
            module,
            network_module="loha",
            lora_dim=4,
            alpha=3,
            conv_lora_dim=3,
            conv_alpha=1,
            **options,
        )
        with torch.no_grad():
            for lora in made.loras:
                for name, parameter in lora.named_parameters():
                    mean, std = {"dora_scale": (1, 0.1), "scalar": (0.6, 0)}.get(name, (0, 0.3))
                    parameter.normal_(mean, std)
        return made

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_tucker": True, "train_norm": True},
        {"use_tucker": True, "use_scalar": True},
        {"weight_decompose": True},
        {"weight_decompose": True, "wd_on_out": False, "use_tucker": True},
        {"bypass_mode": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_what_lycoris_writes_gives_its_outputs(options, network, tmp_path):
    module, path = net(), tmp_path / "adapter.safetensors"
    base, unadapted = base_of(module), torch_outputs(module)
    made = network(module, **options)
    made.apply_to()
    made.save_weights(str(path), torch.float32, {"steps": "3"})
    params = interop.load_lycoris(path, base, layouts=CONVOLUTIONS)
    same_outputs(jax_forward(params, inputs()), torch_outputs(module), unadapted)
    interop.save_lycoris(tmp_path / "again.safetensors", params)
    ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(path)
    norms = [key for key in theirs if key.endswith("_norm")]
    for key in norms:  # held as original + difference
        np.testing.assert_allclose(ours.pop(key), theirs.pop(key), rtol=0, atol=1e-6)
    assert bool(norms) == ("train_norm" in options)
    same_tensors(ours, theirs)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"use_effective_conv2d": True, "modules_to_save": ["norm"]}, "float32"),
        ({"rs_lora": True, "use_scalar": True}, "float32"),
        ({"weight_decompose": True}, "float32"),
        ({"use_effective_conv2d": True}, "bfloat16"),
    ],
    ids=["cores, norm", "rs_lora, scalar", "dora", "bfloat16"],
)
def test_lycoris_opens_what_we_write(options, dtype, tmp_path):
    module, path = net(), tmp_path / "adapter.safetensors"
    base, unadapted = base_of(module), torch_outputs(module)
    config = LycorisConfig(
        r=4, alpha=3, target_modules=LAYERS, rank_pattern={"conv3": 5, "c1d": 2}, **options
    )
    params = trained(base, config, CONVOLUTIONS)
    interop.save_lycoris(path, params, dtype=dtype)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), module)
    assert len(network.loras) == len(LAYERS) + ("modules_to_save" in options)
    network.apply_to()
    if dtype != "float32":  # compare with the rounded factors, as LyCORIS does
        params = interop.load_lycoris(path, base, layouts=CONVOLUTIONS)
        network.float()
    same_outputs(jax_forward(params, inputs()), torch_outputs(module), unadapted)


def test_peft_opens_what_is_folded(tmp_path):
    """Rank stabilisation goes into alpha, the scalar into `hada_w1_a`.

    Normalisation layers become `modules_to_save`.
    """
    module = net()
    base, unadapted = base_of(module), torch_outputs(module)
    config = LycorisConfig(
        r=4,
        alpha=3,
        target_modules=[name for name in LAYERS if name != "c3d"],
        rank_pattern={"conv3": 5, "c1d": 2},
        modules_to_save=["norm"],
        use_effective_conv2d=True,
        rs_lora=True,
        use_scalar=True,
    )
    params = trained(base, config, CONVOLUTIONS)
    interop.save_peft(tmp_path / "peft", params)
    theirs = torch_outputs(peft.PeftModel.from_pretrained(module, tmp_path / "peft").eval())
    theirs.pop("c3d")
    same_outputs(jax_forward(params, inputs()), theirs, unadapted)


def as_torch(state):
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def unet():
    model = small_unet()
    model.load_state_dict(as_torch(kohya_state("unet")))
    return model.eval()


def text_encoder(state=None):
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    model = transformers.CLIPTextModel(config)
    model.load_state_dict(as_torch(state or kohya_state("te")))
    return model.eval()


def te_output(model, ref):
    with torch.no_grad():
        return model(torch.from_numpy(ref["input_ids"])).last_hidden_state.numpy()


def unet_output(model, ref):
    """The UNet's output for the text that the adapted encoder gives."""
    with torch.no_grad():
        given = (torch.from_numpy(np.array(ref[key])) for key in ("latents", "t", "te_out"))
        return model(*given).sample.numpy()


def torch_state(params):
    """The adapted weights as a torch state dict, for the torch twin."""
    state = {}
    for (*path, leaf), value in flatten_dict(jax.jit(loha_jax.merge)(params)).items():
        name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
        state[".".join([*path, name])] = (
            torch_value(value) if leaf == "kernel" else np.asarray(value)
        )
    return state


def close(got, want, base):
    assert np.abs(want - base).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("form", ["tucker", "dora_attn"])
def test_a_kohya_text_encoder(form):
    path, ref = (
        DATA / f"kohya_{form}.safetensors",
        load_file(DATA / f"kohya_{form}_ref.safetensors"),
    )
    params = interop.load_lycoris(path, jax_tree(kohya_state("te")), prefix="lora_te_")
    close(te_output(text_encoder(torch_state(params)), ref), ref["te_out"], ref["te_base"])


@pytest.fixture
def kohya_unet():
    return interop.load_lycoris(
        DATA / "kohya_tucker.safetensors", jax_tree(kohya_state("unet")), prefix="lora_unet_"
    )


def test_peft_opens_a_kohya_unet(kohya_unet, tmp_path):
    """LyCORIS → JAX → PEFT → LyCORIS: no factor changes on the way."""
    ref = load_file(DATA / "kohya_tucker_ref.safetensors")
    interop.save_peft(tmp_path / "peft", kohya_unet)
    model = peft.PeftModel.from_pretrained(unet(), tmp_path / "peft").eval()
    close(unet_output(model, ref), ref["unet_out"], ref["unet_base"])
    again = interop.load_peft(tmp_path / "peft", jax_tree(kohya_state("unet")))
    theirs = load_file(DATA / "kohya_tucker.safetensors")
    same_tensors(
        interop.to_lycoris_state_dict(again, prefix="lora_unet_"),
        {key: value for key, value in theirs.items() if key.startswith("lora_unet_")},
    )


def test_kohya_opens_two_components_of_ours(kohya_unet, tmp_path, monkeypatch):
    path, ref = tmp_path / "adapter.safetensors", load_file(DATA / "kohya_tucker_ref.safetensors")
    te = interop.load_lycoris(
        DATA / "kohya_tucker.safetensors", jax_tree(kohya_state("te")), prefix="lora_te_"
    )
    interop.save_lycoris(path, kohya_unet, prefix="lora_unet_", others={"lora_te_": te})
    encoder, model = text_encoder(), unet()
    # LyCORIS 4.1.3 counts diffusers' time embedding twice, by its class and by its name, and
    # refuses the UNet.
    monkeypatch.setattr(lycoris.kohya.LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    network, _ = lycoris.kohya.create_network_from_weights(1.0, str(path), None, encoder, model)
    network.apply_to(encoder, model, True, True)
    network.load_state_dict(as_torch(load_file(path)), strict=False)
    close(te_output(encoder, ref), ref["te_out"], ref["te_base"])
    close(unet_output(model, ref), ref["unet_out"], ref["unet_base"])


def test_rank_stabilisation_is_in_the_alphas_of_a_file(tmp_path):
    linear = torch.nn.Linear(24, 16)
    module = lycoris.LohaModule("lora_unet_q", linear, lora_dim=4, alpha=2, rs_lora=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    base = base_of(torch.nn.ModuleDict({"q": linear}))
    state = {
        f"lora_unet_q.{part}": tensor.detach().numpy()
        for part, tensor in module.custom_state_dict().items()
    }
    save_file(state, tmp_path / "adapter.safetensors")
    params = interop.load_lycoris(tmp_path / "adapter.safetensors", base)
    assert params["q"]["kernel"].adapters["default"].alphas == (4,)  # 2·√4
    x = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    close(x @ np.asarray(params["q"]["kernel"]) + base["q"]["bias"], want, want * 0)
