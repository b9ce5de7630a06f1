"""LoRA folders that the real PEFT opens, those that it wrote, and its own `convert_to_lora`."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft_samples import torch_value
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from tests.models.transformers_twins import gpt2
from tests.models.twins import Size
from tests.parity.lora_models import (
    GROUPED,
    KEY,
    LINEAR,
    SPECS,
    TARGETS,
    Model,
    close,
    random_adapter,
    require_moved,
)
from tests.parity.models import jax_forward, jax_params, torch_output

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (
            "linear",
            {
                "rank_pattern": {"layers.1.q": 1},
                "alpha_pattern": {"mlp": 5},
                "modules_to_save": ["head"],
            },
        ),
        ("conv1d", {}),
        ("conv1d", {"use_effective_conv2d": True}),
        ("conv2d", {"modules_to_save": ["norm"]}),
        ("conv2d", {"use_effective_conv2d": True}),
        ("grouped", {"rank_pattern": {"stem": 1}}),
        ("grouped", {"use_effective_conv2d": True}),
        (
            "linear",
            {"config_class": LycorisConfig, "weight_decompose": True, "rank_pattern": {"q": 1}},
        ),
        ("conv1d", {"config_class": LycorisConfig, "weight_decompose": True}),
        (
            "conv2d",
            {"config_class": LycorisConfig, "weight_decompose": True, "use_effective_conv2d": True},
        ),
        ("linear", {"config_class": LycorisConfig, "rs_lora": True}),
    ],
)
def test_peft_opens_the_exact_lora_and_computes_what_jax_does(name, kwargs, tmp_path):
    model = Model(SPECS[name])
    params = model.inject(**kwargs)
    lora = interop.save_lora(tmp_path, params, groups=model.groups)
    assert set(lora.errors.values()) == {0}
    want, opened = model.output(params), model.opened(tmp_path)
    require_moved(model, want)
    close(torch_output(opened, model.x), want)
    assert lora.config["use_dora"] == kwargs.get("weight_decompose", False)
    if name != "grouped":  # PEFT merges no convolution in groups
        close(torch_output(opened.merge_and_unload(), model.x), want)
    close(model.output(model.load(tmp_path)), want)


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 0.8}], ids=["rank", "energy"])
def test_errors_are_those_between_pefts_models(name, limit, tmp_path):
    """Errors are those between the updates of PEFT's two models."""
    model = Model(SPECS[name])
    params = model.inject()
    lora = interop.save_lora(tmp_path / "lora", params, groups=model.groups, **limit)
    interop.save_peft(tmp_path / "loha", params)
    opened = model.opened(tmp_path / "lora")
    loha = peft.PeftModel.from_pretrained(copy.deepcopy(model.module), tmp_path / "loha")
    assert len(set(lora.errors.values())) > 1
    for module, error in lora.errors.items():
        layer = opened.base_model.model.get_submodule(module)
        want = (
            loha.base_model.model.get_submodule(module).get_delta_weight("default").detach().numpy()
        )
        if (
            getattr(layer.base_layer, "groups", 1) > 1
        ):  # PEFT computes no such delta: the one of its own forward pass
            got = response(layer)
        else:
            got = layer.get_delta_weight("default").detach().numpy().reshape(want.shape)
        measured = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)
        assert measured == pytest.approx(error, abs=1e-6), module
    close(model.output(model.load(tmp_path / "lora")), torch_output(opened, model.x))


def response(layer):
    """The kernel of a convolution's LoRA, measured on unit impulses.

    What reads other groups' channels is zero.
    """
    base = layer.base_layer
    out, into, *space = base.weight.shape
    pulses = torch.zeros(into * base.groups, into * base.groups, *(2 * size - 1 for size in space))
    for channel in range(len(pulses)):
        pulses[(channel, channel, *(size - 1 for size in space))] = 1
    lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        found = lora_b(
            torch.nn.functional.conv2d(pulses, lora_a.weight)
        ).numpy()  # [channel, out, *space], reversed
    kernel = np.flip(found, (2, 3)).swapaxes(0, 1)
    result = np.zeros(tuple(base.weight.shape))
    for row in range(out):
        first = row // (out // base.groups) * into
        result[row] = kernel[row, first : first + into]
        assert not np.delete(kernel[row], np.s_[first : first + into], axis=0).any()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_whose_projections_peft_has_lora_for_and_no_loha(dora, tmp_path):
    twins = gpt2(Size())
    config_class = LycorisConfig if dora else LoHaConfig
    options = {"weight_decompose": True} if dora else {}
    config = config_class(r=2, alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], **options)
    params = random_adapter(twins.params, config, names=twins.names)
    lora = interop.save_lora(tmp_path, params, names=twins.names)
    assert lora.config["fan_in_fan_out"] is True
    assert lora.config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(twins.module), tmp_path).eval()
    with torch.no_grad():
        got = twins.output(opened, twins.tensors).numpy()
        base = twins.output(twins.module, twins.tensors).numpy()
    want = np.asarray(twins.fn(loha_jax.merge(params), twins.inputs))
    assert np.abs(want - base).max() > 0.01
    close(got, want)
    again = interop.load_lora(tmp_path, twins.params, names=twins.names)
    close(np.asarray(twins.fn(loha_jax.merge(again), twins.inputs)), got)


def test_a_stacked_kernel_is_a_lora_per_layer(tmp_path):
    model = Model(LINEAR)
    layers = [model.base["layers"][str(n)] for n in range(3)]
    stacked = {**model.base, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    config = LoHaConfig(r=2, target_modules=["q"], rank_pattern={"layers.2.q": 1})
    where = {"layouts": {r"layers\.(q|mlp)": "sio"}}
    params = random_adapter(stacked, config, **where)
    lora = interop.save_lora(tmp_path, params)
    assert lora.config["target_modules"] == ["q"]
    for tree in (params, interop.load_lora(tmp_path, stacked, **where)):
        merged = loha_jax.merge(tree)
        unstacked = {
            str(n): jax.tree.map(lambda leaf, n=n: leaf[n], merged["layers"]) for n in range(3)
        }
        want = np.asarray(jax_forward(LINEAR)({**merged, "layers": unstacked}, model.x))
        require_moved(model, want)
        close(torch_output(model.opened(tmp_path), model.x), want)


def test_conv3d(tmp_path):
    module = torch.nn.ModuleDict(
        {"conv": torch.nn.Conv3d(2, 4, (3, 2, 1), stride=2, padding=1)}
    ).float()
    base = jax_params(module)
    for n, cp in enumerate((False, True)):
        config = LoHaConfig(r=2, target_modules=["conv"], use_effective_conv2d=cp)
        params = random_adapter(base, config)
        interop.save_lora(tmp_path / str(n), params)
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / str(n))
        x = torch.randn(2, 2, 6, 5, 4)
        merged = copy.deepcopy(module)
        kernel = torch_value(loha_jax.merge(params)["conv"]["kernel"]).copy()
        merged["conv"].weight.data = torch.tensor(kernel)
        with torch.no_grad():
            want = merged["conv"](x).numpy()
            assert np.abs(want - module["conv"](x).numpy()).max() > 0.01
            close(opened.base_model.model["conv"](x).numpy(), want)


def test_pefts_config_of_the_folder_is_a_plain_lora(tmp_path):
    model = Model(LINEAR)
    params = model.inject(
        base_model_name_or_path="org/base",
        task_type="FEATURE_EXTRACTION",
        rank_pattern={"layers.0.q": 1},
    )
    interop.save_lora(tmp_path, params)
    read = peft.LoraConfig.from_pretrained(tmp_path)
    smaller = {r"^layers\.0\.q": 1}
    want = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q", "mlp", "middle"],
        rank_pattern=smaller,
        alpha_pattern=smaller,
        base_model_name_or_path="org/base",
        task_type="FEATURE_EXTRACTION",
        inference_mode=True,
    )
    assert read.to_dict() == want.to_dict()
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(raw["target_modules"], list)  # what servers take
    assert raw.keys() <= want.to_dict().keys()


def test_convert_to_lora_has_no_smaller_error(tmp_path):
    """PEFT's `convert_to_lora` has no smaller error at any rank."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"q": torch.nn.Linear(40, 60), "k": torch.nn.Linear(30, 20)})
    base = jax_params(module)
    loha = peft.get_peft_model(
        module, peft.LoHaConfig(r=4, alpha=6, target_modules=["q", "k"], init_weights=False)
    )
    loha.save_pretrained(tmp_path)
    params = interop.load_peft(tmp_path, base)
    want = {
        name: loha.base_model.model[name]
        .get_delta_weight("default")
        .detach()
        .numpy()
        .astype(np.float64)
        for name in ("q", "k")
    }

    def errors(state):
        found = {}
        for name in ("q", "k"):
            a, b = (
                np.asarray(state[f"base_model.model.{name}.lora_{p}.weight"], np.float64)
                for p in "AB"
            )
            found[name] = (
                a.shape[0],
                np.linalg.norm(b @ a - want[name]) / np.linalg.norm(want[name]),
            )
        return found

    for limit in (1, 3, 8, 0.5, 0.9):
        _, state = peft.convert_to_lora(loha, rank=limit)
        theirs = errors({key: tensor.numpy() for key, tensor in state.items()})
        lora = interop.to_lora(
            params, **({"rank": limit} if isinstance(limit, int) else {"energy": limit})
        )
        ours = errors(lora.tensors)
        for name in ("q", "k"):
            assert ours[name][0] == theirs[name][0]
            assert ours[name][1] <= theirs[name][1] + 1e-7
            assert ours[name][1] == pytest.approx(lora.errors[name], abs=1e-6)


def random_lora(model, **kwargs):
    """PEFT's model with a LoRA whose factors and norms are random."""
    torch.manual_seed(1)
    names = {name.rsplit(".", 1)[-1] for name in (*model.spec.linears, *model.spec.conv_names)}
    targets = [name for name in TARGETS if name in names]
    wrapped = peft.get_peft_model(
        copy.deepcopy(model.module),
        peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": targets} | kwargs),
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.6)
            elif "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.4)
    return wrapped.eval()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (
            "linear",
            {
                "rank_pattern": {"layers.1.q": 1},
                "alpha_pattern": {"mlp": 9},
                "modules_to_save": ["head"],
            },
        ),
        ("linear", {"use_rslora": True, "rank_pattern": {"q": 5}, "lora_dropout": 0.1}),
        ("linear", {"use_dora": True}),
        (
            "linear",
            {
                "target_modules": "all-linear",
                "init_lora_weights": "gaussian",
                "exclude_modules": ["head"],
            },
        ),
        (
            "linear",
            {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        ),
        ("conv1d", {"use_rslora": True}),
        ("conv2d", {"modules_to_save": ["norm"]}),
        ("conv2d", {"use_dora": True, "rank_pattern": {"stem": 1}}),
    ],
)
@pytest.mark.parametrize("key", [None, KEY], ids=["dead", "random"])
def test_a_lora_of_peft_is_a_loha(name, kwargs, key, tmp_path):
    """A LoRA of PEFT is a LoHa and goes out as both."""
    model = Model(SPECS[name])
    wrapped = random_lora(model, **kwargs)
    want = torch_output(wrapped, model.x)
    require_moved(model, want)
    wrapped.save_pretrained(tmp_path / "peft")
    params = model.load(tmp_path / "peft", key=key)
    close(model.output(params), want)
    lora = interop.save_lora(tmp_path / "lora", params)
    close(torch_output(model.opened(tmp_path / "lora"), model.x), want)
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {k: t.shape for k, t in lora.tensors.items()} == {k: t.shape for k, t in state.items()}
    if kwargs.get("use_dora"):  # which PEFT's LoHa has not
        with pytest.raises(ValueError, match="weight decomposition"):
            interop.save_peft(tmp_path / "loha", params)
    else:
        interop.save_peft(tmp_path / "loha", params)
        close(torch_output(model.opened(tmp_path / "loha"), model.x), want)


def test_a_lora_over_groups(tmp_path):
    """A LoRA over groups of PEFT is refused unless each reads its own channels."""
    model = Model(GROUPED)
    wrapped = random_lora(model, r=6)
    wrapped.save_pretrained(tmp_path / "any")
    with pytest.raises(
        ValueError, match="conv is a convolution in 6 groups, and lora_A of group 0 reads channels"
    ):
        model.load(tmp_path / "any")
    masked = []
    with torch.no_grad():
        for name, module in wrapped.base_model.model.named_modules():
            groups = getattr(getattr(module, "base_layer", None), "groups", 1)
            if groups > 1:
                weight = module.lora_A["default"].weight
                slots, channels = weight.shape[0] // groups, weight.shape[1] // groups
                own = torch.zeros_like(weight)
                for g in range(groups):
                    block = np.s_[g * slots : (g + 1) * slots, g * channels : (g + 1) * channels]
                    own[block] = weight[block]
                weight.copy_(own)
                masked.append(name)
    assert masked == ["stem", "blocks.0.conv"]
    wrapped.save_pretrained(tmp_path / "own")
    want = torch_output(wrapped, model.x)
    require_moved(model, want)
    close(model.output(model.load(tmp_path / "own", key=KEY)), want)


def test_training_goes_on_from_a_lora(tmp_path):
    model = Model(LINEAR)
    random_lora(model).save_pretrained(tmp_path)
    trainable, frozen = loha_jax.partition(model.load(tmp_path, key=KEY))
    apply = loha_jax.adapt(jax_forward(LINEAR))
    y = model.spec.inputs(0)[1].astype(np.float32)

    @jax.jit
    def step(trainable):
        def loss(trainable):
            return jnp.mean((apply(loha_jax.combine(trainable, frozen), model.x) - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(trainable)
        return value, jax.tree.map(lambda p, g: p - 0.02 * g, trainable, gradient)

    first, after = step(trainable)
    for _ in range(5):
        last, after = step(after)
    assert last < first
    factors = loha_jax.combine(after, frozen)["layers"]["0"]["q"]["kernel"].adapters["default"]
    before = trainable["layers"]["0"]["q"]["kernel"].adapters["default"]
    for part in ("hada_w1_a", "hada_w1_b", "hada_w2_b"):
        assert np.abs(getattr(factors, part) - getattr(before, part)).max() > 1e-6, part
    assert np.abs(factors.hada_w2_a - before.hada_w2_a)[:, 1:].max() > 1e-9
    rank = np.linalg.matrix_rank(factors.delta(), tol=1e-6)
    assert rank > 3  # more than the LoRA could hold
