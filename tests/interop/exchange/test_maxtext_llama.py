"""A model with MaxText's parameters, and the real Llama of transformers with PEFT's adapters."""

import jax
import jax.numpy as jnp
import maxtext_llama
import numpy as np
import pytest
import torch
from maxtext_llama import ATTENTION, HEAD, HEADS, HIDDEN, IDS, KEYS, LAYERS, VOCABULARY, WIDTH
from peft import LoHaConfig as PeftLoHa
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import loha_jax
from loha_jax import LoHaConfig, interop

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HEAD,
    "rms_norm_eps": maxtext_llama.EPSILON,
    "rope_theta": maxtext_llama.THETA,
    "tie_word_embeddings": False,
}
run = jax.jit(loha_jax.adapt(maxtext_llama.forward))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The checkpoint of a random Llama, with weights as large as those that are trained."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS))
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def params(base):
    return interop.load_base(base, maxtext_llama.shapes(), names=maxtext_llama.names())


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def opened(base):
    return LlamaForCausalLM.from_pretrained(base)


def adapted(params, **settings):
    config = LoHaConfig(r=3, alpha=5, target_modules=TARGETS, init_weights=False, **settings)
    tree = loha_jax.inject(params, config, key=jax.random.key(1), names=maxtext_llama.names())
    return jax.tree.map(lambda x: x * 2 if x.shape[-1:] == (3,) else x, tree)


def assert_moved(changed, unchanged):
    assert np.abs(np.asarray(changed) - np.asarray(unchanged)).max() > 0.1


def test_the_base_weights_are_those_of_transformers(base, params):
    """The hooks of MaxText turn each loaded kernel into the checkpoint's tensor; equal logits."""
    np.testing.assert_allclose(run(params, IDS), theirs(opened(base)), rtol=0, atol=1e-5)
    tensors = load_file(base / "model.safetensors")
    attention = params["decoder"]["layers"]["self_attention"]
    for name, scaled in (("query", True), ("key", False)):
        for n in range(LAYERS):
            own = maxtext_llama.hooks(attention[name]["kernel"][:, n], scaled=scaled)
            torch_name = f"model.layers.{n}.self_attn.{name[0]}_proj.weight"
            np.testing.assert_allclose(own, tensors[torch_name], rtol=2e-7)
    plain = interop.load_base(base, maxtext_llama.shapes(), names=maxtext_llama.names(rows=False))
    assert_moved(run(plain, IDS), run(params, IDS))


def test_a_loha_opens_in_peft(base, params, tmp_path):
    tree = adapted(params)
    interop.save_peft(tmp_path, tree)
    ours = run(tree, IDS)
    model = PeftModel.from_pretrained(opened(base), tmp_path)
    np.testing.assert_allclose(ours, theirs(model), rtol=0, atol=1e-5)
    assert_moved(ours, run(params, IDS))
    again = interop.load_peft(tmp_path, params, names=maxtext_llama.names())
    np.testing.assert_allclose(run(again, IDS), ours, rtol=0, atol=1e-5)
    other = interop.load_peft(tmp_path, tree, adapter_name="other")  # by the names of the tree
    np.testing.assert_allclose(run(other, IDS), ours, rtol=0, atol=1e-5)


def test_a_loha_of_peft_loads(base, params, tmp_path):
    config = PeftLoHa(r=3, alpha=5, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(opened(base), config)
    model.save_pretrained(tmp_path)
    tree = interop.load_peft(tmp_path, params, names=maxtext_llama.names())
    ours = run(tree, IDS)
    np.testing.assert_allclose(ours, theirs(model), rtol=0, atol=1e-5)
    assert np.abs(ours - run(params, IDS)).max() > 1e-3
    interop.save_peft(tmp_path / "again", tree)
    first, second = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        scaled = "q_proj.hada_w1_a" in key  # by sqrt(6), which rounds
        np.testing.assert_allclose(second[key], tensor, rtol=2e-7 if scaled else 0, err_msg=key)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_lora_opens_in_peft(base, params, tmp_path, rank):
    """The exact one has equal logits; the best of a smaller rank is the update's own SVD."""
    tree = adapted(params)
    interop.save_lora(tmp_path, tree, rank=rank)
    model = PeftModel.from_pretrained(opened(base), tmp_path)
    if rank is None:
        np.testing.assert_allclose(run(tree, IDS), theirs(model), rtol=0, atol=1e-5)
    loaded = interop.load_lora(tmp_path, params, names=maxtext_llama.names())
    np.testing.assert_allclose(run(loaded, IDS), theirs(model), rtol=0, atol=1e-5)
    pair = interop.as_lora(tree)["decoder"]["layers"]["self_attention"]["query"]
    kernel = tree["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    product = jnp.einsum("ilr,rlnh->ilnh", pair["kernel_lora_a"], pair["kernel_lora_b"])
    np.testing.assert_allclose(product, loha_jax.merge(kernel) - kernel.kernel, atol=1e-6)


def test_a_dora_of_peft_loads_and_is_written(base, params, tmp_path):
    """Its magnitudes are permuted and scaled with the rows."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, use_dora=True)
    model = get_peft_model(opened(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                factor = 1 + torch.rand(parameter.shape)
                parameter.mul_(factor) if "magnitude" in name else parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    tree = interop.load_lora(tmp_path, params, names=maxtext_llama.names())
    ours = run(tree, IDS)
    np.testing.assert_allclose(ours, theirs(model), rtol=0, atol=2e-5)
    assert_moved(ours, run(params, IDS))
    interop.save_lora(tmp_path / "again", tree)
    again = PeftModel.from_pretrained(opened(base), tmp_path / "again")
    np.testing.assert_allclose(ours, theirs(again), rtol=0, atol=2e-5)


def test_a_merged_model_opens_in_transformers(base, params, tmp_path):
    tree = adapted(params)
    interop.save_merged(tmp_path / "merged", tree, names=maxtext_llama.names(), base=base)
    np.testing.assert_allclose(
        run(tree, IDS), theirs(opened(tmp_path / "merged")), rtol=0, atol=1e-5
    )
    plain = maxtext_llama.names(rows=False)
    with pytest.raises(ValueError, match=r"made with .*scale=2.4.*does not have"):
        interop.save_merged(tmp_path / "other", tree, names=plain, base=base)
    assert not (tmp_path / "other").exists()
    interop.save_merged(tmp_path / "plain", params, names=maxtext_llama.names(), base=base)
    first, second = (load_file(f / "model.safetensors") for f in (base, tmp_path / "plain"))
    for key, tensor in first.items():
        scaled = "q_proj" in key
        np.testing.assert_allclose(second[key], tensor, rtol=2e-7 if scaled else 0, err_msg=key)


def test_biases_are_moved_too(tmp_path):
    """Qwen2 is a Llama with biases of query, key and value."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SETTINGS))
    randomise(model)
    model.save_pretrained(tmp_path / "base")
    shapes = maxtext_llama.shapes(bias=True)
    params = interop.load_base(tmp_path / "base", shapes, names=maxtext_llama.names())
    np.testing.assert_allclose(run(params, IDS), theirs(model), rtol=0, atol=1e-5)
    names = maxtext_llama.names()
    interop.save_merged(tmp_path / "out", params, names=names, base=tmp_path / "base")
    out = load_file(tmp_path / "out/model.safetensors")
    for key, tensor in load_file(tmp_path / "base/model.safetensors").items():
        np.testing.assert_allclose(out[key], tensor, rtol=2e-7, err_msg=key)


def test_names_of_a_model_with_other_rows_are_inferred(base, params):
    """Contents are compared with the transforms applied; the rounded query is settled by hand."""
    rows = maxtext_llama.names().rows
    names = interop.NameMap.infer(params, base, rows=rows)
    assert not names.ambiguous
    path = "decoder.layers.self_attention.query.kernel"
    assert list(names.unmatched) in ([], [path])
    if names.unmatched:
        assert "scale=2.44949" in names.unmatched[path]
        modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(LAYERS)]
        names = names.settle({path: (modules, "isoo")})
    again = interop.load_base(base, maxtext_llama.shapes(), names=names)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    without = interop.NameMap.infer(params, base)
    assert {*without.unmatched} == {path, path.replace("query", "key")}
    assert f"rows: {ATTENTION}query: RowTransform" in names.table()
