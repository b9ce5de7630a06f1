"""GPT-2, to whose layers PEFT has no LoHa: adapted in JAX with torch's orientation all the same."""

import copy

import jax
import numpy as np
import peft
import pytest
import torch
from leaves import loha_leaves
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from tests.models.transformers_twins import gpt2
from tests.models.trial import OUTPUT, random_factors, require_close, require_moved
from tests.models.twins import Size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]

CONFIG = {"r": 4, "alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(scope="module")
def twins(request):
    option = request.config.option
    return gpt2(Size(option.models_seed, option.models_width, option.models_layers))


@pytest.fixture(scope="module")
def adapted(twins, request):
    params = loha_jax.inject(
        twins.params, LoHaConfig(**CONFIG), key=jax.random.key(0), names=twins.names
    )
    return random_factors(params, np.random.default_rng(request.config.option.models_seed))


def test_flax_keeps_the_kernels_as_out_in(twins, adapted):
    """FlaxConv1D's kernels are [out, in], unlike those of every Dense.

    The name map says so, and so does the model.
    """
    assert {leaf.layout.word for leaf in loha_leaves(adapted)} == {"oi"}
    inferred = loha_jax.infer_layouts(twins.fn, twins.params, twins.inputs)
    assert {inferred[leaf.label] for leaf in loha_leaves(adapted)} == {"oi"}
    attention = next(leaf for leaf in loha_leaves(adapted) if leaf.label.endswith("c_attn"))
    width = twins.module.config.n_embd
    assert attention.adapters["default"].hada_w1_a.shape == (3 * width, 4)


def test_the_output_is_that_of_pytorch_with_the_update_added(twins, adapted):
    """The formula in numpy, on PyTorch's model: its Conv1D holds [in, out]."""
    state = interop.to_peft_state_dict(adapted)
    module = copy.deepcopy(twins.module)
    for leaf in loha_leaves(adapted):
        a, b, c, d = (
            state[f"base_model.model.{leaf.label}.hada_{part}"]
            for part in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        delta = (a @ b) * (c @ d) * CONFIG["alpha"] / CONFIG["r"]
        module.get_submodule(leaf.label).weight.data += torch.tensor(delta.T)
    with torch.no_grad():
        want = twins.output(module, twins.tensors).numpy()
        base = twins.output(twins.module, twins.tensors).numpy()
    require_moved(want, base, "the update")
    for strategy in ("factored", "fused"):
        got = jax.jit(loha_jax.adapt(twins.fn, strategy=strategy))(adapted, twins.inputs)
        require_close(got, want, OUTPUT, strategy)
    explained = loha_jax.explain(twins.fn, adapted, twins.inputs)
    assert not explained.dense
    assert not explained.unused


def test_peft_opens_no_adapter_of_it(twins, adapted, tmp_path):
    """PEFT refuses transformers' Conv1D, in a file as in a config, and saving says so."""
    refusal = r"Conv1D.* not supported, currently only adapters for"
    with pytest.raises(TypeError, match=refusal):
        peft.get_peft_model(copy.deepcopy(twins.module), peft.LoHaConfig(**CONFIG))
    with pytest.warns(
        UserWarning, match=r"GPT-2's projections.*will not open this folder.*save_merged"
    ):
        interop.save_peft(tmp_path, adapted)
    with pytest.raises(TypeError, match=refusal):
        peft.PeftModel.from_pretrained(copy.deepcopy(twins.module), tmp_path)
    again = interop.load_peft(
        tmp_path, twins.params, names=twins.names
    )  # it is a file for JAX alone
    for ours, loaded in zip(*map(jax.tree.leaves, (adapted, again)), strict=True):
        np.testing.assert_array_equal(ours, loaded)


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn", "c_fc", "mlp.c_proj"]])
def test_without_the_map_the_biases_show_the_layout(twins, targets, tmp_path):
    """A square projection goes by the others; PEFT and the merged checkpoint agree."""
    config = LoHaConfig(r=2, target_modules=targets)
    params = loha_jax.inject(twins.params, config, key=jax.random.key(0))
    params = random_factors(params, np.random.default_rng(0))
    want = np.asarray(loha_jax.adapt(twins.fn)(params, twins.inputs))
    require_moved(want, np.asarray(twins.fn(twins.params, twins.inputs)), "the update")
    interop.save_lora(tmp_path / "lora", params)
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(twins.module), tmp_path / "lora").eval()
    twins.module.save_pretrained(tmp_path / "base")
    interop.save_merged(tmp_path / "merged", params, base=tmp_path / "base")
    merged = type(twins.module).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for module in (opened, merged):
            require_close(want, twins.output(module, twins.tensors).numpy(), OUTPUT, "torch")


def test_a_map_by_contents_is_refused_where_the_biases_say_otherwise(twins, tmp_path):
    """Contents do not show that torch's Conv1D is [in, out]."""
    twins.module.save_pretrained(tmp_path)
    names = interop.NameMap.infer(twins.params, tmp_path)
    config = LoHaConfig(r=2, target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"layout 'io'.*c_attn.*GPT-2.*transformers\('gpt2'\)"):
        loha_jax.inject(twins.params, config, key=jax.random.key(0), names=names)


def test_its_own_torch_dictionary_keeps_its_weights_as_they_are(twins, tmp_path):
    """Square ones too: under torch's names, `io` is Conv1D's [in, out]."""
    twins.module.save_pretrained(tmp_path / "base")
    arrays = load_file(tmp_path / "base" / "model.safetensors")
    params = {name: jax.numpy.asarray(array) for name, array in arrays.items()}
    name = next(name for name in params if name.endswith("attn.c_proj.weight"))
    config = LoHaConfig(
        r=2, alpha=2, target_modules=r".*attn\.c_proj", init_weights=False, modules_to_save=["wpe"]
    )
    layouts = {r".*c_(attn|proj|fc)": "io"}
    adapted = loha_jax.inject(params, config, key=jax.random.key(0), layouts=layouts)
    factors = jax.tree.map(np.asarray, adapted[name].adapters["default"])
    delta = (factors.hada_w1_a @ factors.hada_w1_b) * (factors.hada_w2_a @ factors.hada_w2_b)
    interop.save_merged(tmp_path / "merged", adapted, base=tmp_path / "base")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(merged[name], arrays[name] + delta.T, atol=1e-6)
    empty = jax.tree.map(jax.numpy.zeros_like, params)
    loaded = interop.load_base(tmp_path / "base", empty, layouts=layouts)
    without_layouts = interop.load_base(tmp_path / "base", empty)
    for key, array in arrays.items():
        np.testing.assert_array_equal(loaded[key], array)
        np.testing.assert_array_equal(without_layouts[key], array)


def test_a_copy_of_a_projection_is_in_no_file(twins, tmp_path):
    """PEFT would read it as [in, out]."""
    config = LoHaConfig(r=2, target_modules=["c_fc"], modules_to_save=["attn.c_proj"])
    params = loha_jax.inject(twins.params, config, key=jax.random.key(0), names=twins.names)
    with pytest.raises(ValueError, match=r"c_proj.* is the weight of GPT-2's Conv1D"):
        interop.save_lora(tmp_path, params)


@pytest.mark.parametrize("onto", ["flax", "its own dictionary", "linear layers"])
def test_a_copy_of_a_projection_in_a_file_is_not_loaded(twins, tmp_path, onto):
    """PEFT wrote it as [in, out]; it is square, so that its shape fits."""
    config = peft.LoraConfig(
        r=2, target_modules=["c_fc"], modules_to_save=["attn.c_proj"], fan_in_fan_out=True
    )
    peft.get_peft_model(copy.deepcopy(twins.module), config).save_pretrained(tmp_path)
    given = {"base_params": twins.params, "names": twins.names}
    if onto != "flax":
        state = twins.module.state_dict()
        params = {name: jax.numpy.asarray(array.numpy()) for name, array in state.items()}
        given = {"base_params": params, "layouts": {r".*c_(attn|proj|fc)": "io"}}
    if onto == "linear layers":  # as nanoGPT's
        turned = {name: x.T if ".c_" in name and x.ndim > 1 else x for name, x in params.items()}
        given = {"base_params": turned}
    with pytest.raises(ValueError, match=r"attn\.c_proj\.weight.* weights of GPT-2's Conv1D"):
        interop.load_lora(tmp_path, **given)


@pytest.mark.parametrize("leaf", ["kernel", "weight"])
def test_a_lone_projection_of_a_dense_layer_is_read_from_its_checkpoint(twins, tmp_path, leaf):
    """The checkpoint shows by its other weights that the square one is [in, out]."""
    twins.module.save_pretrained(tmp_path / "base")
    theirs = twins.module.transformer.h[0].attn.c_proj.weight.detach().numpy()
    layer = {leaf: jax.numpy.zeros(theirs.shape)}
    params = {"transformer": {"h": {"0": {"attn": {"c_proj": layer}}}}}
    loaded = interop.load_base(tmp_path / "base", params, strict=False)
    got = loaded["transformer"]["h"]["0"]["attn"]["c_proj"][leaf]
    np.testing.assert_array_equal(got, theirs if leaf == "kernel" else theirs.T)


def test_a_difference_of_a_projection_in_a_file_of_lycoris_is_not_loaded(twins, tmp_path):
    params = loha_jax.inject(
        twins.params,
        LoHaConfig(r=2, target_modules=["c_fc"]),
        key=jax.random.key(0),
        names=twins.names,
    )
    file = interop.to_lycoris_state_dict(params, prefix="")
    file["transformer.h.0.attn.c_proj.diff"] = np.ones_like(
        twins.module.transformer.h[0].attn.c_proj.weight.detach()
    )
    save_file(file, tmp_path / "diff.safetensors")
    with pytest.raises(ValueError, match=r"c_proj\.diff: .* of GPT-2's Conv1D"):
        interop.load_lycoris(tmp_path / "diff.safetensors", twins.params, names=twins.names)
