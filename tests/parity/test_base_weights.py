"""Base checkpoints of torch in Flax twins, and merged ones back in torch."""

import json
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop import NameMap
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.names.tree_sources import find_sources_in

IDS = np.random.default_rng(0).integers(3, 60, (2, 7))
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=32)
    return (
        transformers.LlamaForCausalLM(config),
        transformers.FlaxLlamaForCausalLM,
        {"input_ids": IDS},
    )


def bert():
    config = transformers.BertConfig(**TEXT, max_position_embeddings=32, num_labels=3)
    return (
        transformers.BertForSequenceClassification(config),
        transformers.FlaxBertForSequenceClassification,
        {"input_ids": IDS},
    )


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return (
        transformers.GPT2LMHeadModel(config),
        transformers.FlaxGPT2LMHeadModel,
        {"input_ids": IDS},
    )


def resnet(layer_type="bottleneck"):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=3
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    return (
        transformers.ResNetForImageClassification(config),
        transformers.FlaxResNetForImageClassification,
        {"pixel_values": pixels},
    )


def resnet_basic():
    return resnet("basic")


def whisper():
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    more = {
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "suppress_tokens": None,
    }
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes, **ends, **more
    )
    config.begin_suppress_tokens = None
    features = np.random.default_rng(0).standard_normal((2, 8, 40)).astype(np.float32)
    return (
        transformers.WhisperForConditionalGeneration(config),
        transformers.FlaxWhisperForConditionalGeneration,
        {"input_features": features, "decoder_input_ids": IDS},
    )


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **(TEXT | {"vocab_size": 20, "num_hidden_layers": 1}),
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
        do_stable_layer_norm=True, mask_time_prob=0.05,
    )  # fmt: skip
    values = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    return (
        transformers.Wav2Vec2ForCTC(config),
        transformers.FlaxWav2Vec2ForCTC,
        {"input_values": values},
    )


def clip():
    text = dict(TEXT, max_position_embeddings=32, eos_token_id=2, bos_token_id=1)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    return (
        transformers.CLIPModel(config),
        transformers.FlaxCLIPModel,
        {"input_ids": IDS, "pixel_values": pixels},
    )


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    return (
        transformers.ViTForImageClassification(config),
        transformers.FlaxViTForImageClassification,
        {"pixel_values": pixels},
    )


def randomised(model):
    """Biases, scales and statistics off their zeros and ones, so that a lost one shows."""
    generator = torch.Generator().manual_seed(1)
    statistics = [(name, buffer) for name, buffer in model.named_buffers() if "running_" in name]
    for name, tensor in [*model.named_parameters(), *statistics]:
        if tensor.is_floating_point() and (tensor.ndim == 1 or "bias" in name):
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.add_(0.2 * noise.to(tensor.dtype))
    return model.eval()


@pytest.fixture(scope="module")
def twins():
    made = {}

    def make(builder):
        if builder not in made:
            torch.manual_seed(0)
            model, cls, inputs = builder()
            flax = cls(model.config, seed=0, dtype=jnp.float32)
            made[builder] = randomised(model), flax, inputs
        return made[builder]

    return make


def torch_logits(model, inputs):
    with torch.no_grad():
        output = model(**{k: torch.tensor(v) for k, v in inputs.items()})
    return (
        output[0].float().numpy()
        if not hasattr(output, "logits_per_image")
        else output.logits_per_image.numpy()
    )


def flax_logits(model, params, inputs):
    output = model(**inputs, params=params)
    return np.asarray(
        output.logits_per_image if hasattr(output, "logits_per_image") else output.logits,
        np.float32,
    )


def assert_close(a, b):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def shapes_of(flax):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(flax.params))


TIED = {
    gpt2: {"lm_head.weight": "transformer.wte.weight"},
    whisper: {},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "builder", [llama, bert, gpt2, resnet, resnet_basic, whisper, wav2vec2, clip, vit]
)
def test_a_checkpoint_in_its_flax_twin(builder, twins, tmp_path):
    """Transformers checkpoints load into their Flax twins."""
    model, flax, inputs = twins(builder)
    model.save_pretrained(tmp_path)
    names = NameMap.transformers(model.config.model_type)
    params = interop.load_base(tmp_path, shapes_of(flax), names=names, tied=TIED.get(builder))
    assert_close(flax_logits(flax, params, inputs), torch_logits(model, inputs))
    # the same names and layouts are in the contents
    inferred = NameMap.infer(params, tmp_path)
    assert not inferred.unmatched
    again = interop.load_base(tmp_path, shapes_of(flax), names=inferred)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    _, sources, problems = find_sources_in(Checkpoint(tmp_path), params, names, None)
    assert not problems
    for position, leaf in enumerate(inferred.sources):
        assert inferred.sources[leaf].keys == sources[position].keys
        assert inferred.sources[leaf].axes == sources[position].axes


MERGED = {
    llama: (["q_proj", "v_proj", "down_proj", "lm_head"], "40KB"),
    bert: (["query", "output.dense", "classifier"], "5GB"),
    resnet: (r".*convolution", "5GB"),
}


@pytest.mark.slow
@pytest.mark.parametrize("builder", MERGED)
def test_a_merged_tree_in_torch(builder, twins, tmp_path):
    """A merged tree is a folder that transformers loads in torch."""
    targets, size = MERGED[builder]
    model, flax, inputs = twins(builder)
    base, merged = tmp_path / "base", tmp_path / "merged"
    model.save_pretrained(base, max_shard_size=size)
    (base / "tokenizer.json").write_text("{}")
    names = NameMap.transformers()
    params = interop.load_base(base, shapes_of(flax), names=names)
    config = LoHaConfig(r=4, alpha=16, target_modules=targets, init_weights=False)
    adapted = loha_jax.inject(params, config, key=jax.random.key(1), names=names)
    want = flax_logits(flax, adapted, inputs)
    assert np.abs(want - torch_logits(model, inputs)).max() > 1e-2 * np.abs(want).max()
    interop.save_merged(merged, adapted, names=names, base=base, max_shard_size=size)
    again, info = type(model).from_pretrained(merged, output_loading_info=True)
    assert not any(
        info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert_close(torch_logits(again.eval(), inputs), want)
    assert sorted(p.name for p in merged.iterdir()) == sorted(p.name for p in base.iterdir())
    assert stat.S_IMODE((merged / "config.json").stat().st_mode) == stat.S_IMODE(
        next(merged.glob("*.saf*")).stat().st_mode
    )
    ours, theirs = Checkpoint(merged), Checkpoint(base)
    assert (ours.shapes, ours.dtypes) == (theirs.shapes, theirs.dtypes)
    if builder is llama:
        assert len(list(merged.glob("model-*.safetensors"))) > 1
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        total = sum(
            load_file(file)[key].nbytes
            for key, name in index["weight_map"].items()
            for file in [merged / name]
        )
        assert index["metadata"]["total_size"] == total
    # a map out of contents gives the same files
    interop.save_merged(
        tmp_path / "inferred",
        adapted,
        names=NameMap.infer(params, base),
        base=base,
        max_shard_size=size,
    )
    for file in merged.iterdir():
        assert (tmp_path / "inferred" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_bfloat16_checkpoints_stay_bfloat16(twins, tmp_path):
    model, flax, inputs = twins(llama)
    half = transformers.LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "base")
    like = shapes_of(flax)
    names = NameMap.transformers()
    exact = interop.load_base(tmp_path / "base", like, names=names)
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype("float32")}
    assert_close(flax_logits(flax, exact, inputs), torch_logits(half.float(), inputs))
    params = interop.load_base(tmp_path / "base", like, names=names, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    config = LoHaConfig(r=4, alpha=16, target_modules=["q_proj"], init_weights=False)
    adapted = loha_jax.inject(params, config, key=jax.random.key(1), names=names)
    interop.save_merged(tmp_path / "merged", adapted, base=tmp_path / "base", names=names)
    again, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, torch_dtype="auto"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.bfloat16
    merged = jax.tree.map(lambda x: x.astype(jnp.float32), loha_jax.merge(adapted))
    assert_close(torch_logits(again.float().eval(), inputs), flax_logits(flax, merged, inputs))
    # asked for, float32: the config says so
    interop.save_merged(
        tmp_path / "wide", adapted, base=tmp_path / "base", names=names, dtype=np.float32
    )
    assert set(Checkpoint(tmp_path / "wide").dtypes.values()) == {np.dtype(np.float32)}
    saved = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert {saved.get("dtype"), saved.get("torch_dtype")} - {None} == {"float32"}
    names = NameMap.infer(exact, tmp_path / "base")  # float32 parameters of a bfloat16 file
    assert (names.unmatched, names.ambiguous) == ({}, {})


@pytest.mark.slow
def test_statistics_of_a_batch_norm_are_loaded_and_saved(twins, tmp_path):
    model, flax, _ = twins(resnet)
    model.save_pretrained(tmp_path / "base")
    names = NameMap.transformers()
    params = interop.load_base(tmp_path / "base", shapes_of(flax), names=names)
    want = model.state_dict()["resnet.embedder.embedder.normalization.running_var"].numpy()
    stats = params["batch_stats"]["resnet"]["embedder"]["embedder"]["normalization"]
    np.testing.assert_array_equal(stats["var"], want)
    stats["var"] = stats["var"] * 2
    interop.save_merged(tmp_path / "new", params, names=names, base=tmp_path / "base")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    np.testing.assert_array_equal(
        tensors["resnet.embedder.embedder.normalization.running_var"], want * 2
    )
    counters = [key for key in tensors if key.endswith("num_batches_tracked")]
    assert counters  # copied through: the tree has no place for them
    assert all(tensors[key].dtype == np.int64 for key in counters)


@pytest.mark.slow
def test_a_stacked_model(twins, tmp_path):
    """The Llama's layers are one leaf per kind, `[L, in, out]`, as `nn.scan` keeps them.

    Heads have axes of their own.
    """
    model, flax, _ = twins(llama)
    model.save_pretrained(tmp_path / "base")
    names = NameMap.transformers()
    params = interop.load_base(tmp_path / "base", shapes_of(flax), names=names)
    layers = params["model"]["layers"]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(layers[n] for n in sorted(layers)))
    query = stacked["self_attn"]["q_proj"]["kernel"]
    stacked["self_attn"]["q_proj"]["kernel"] = query.reshape(2, 32, 4, 8)
    tree = {**params, "model": {**params["model"], "layers": stacked}}
    found = NameMap.infer(tree, tmp_path / "base")
    assert found.layouts["model.layers.self_attn.q_proj"].word == "sioo"
    assert found.sources["model.layers.input_layernorm.weight"].stack == (0,)
    again = interop.load_base(tmp_path / "base", tree, names=found)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    # the same by names alone: the file's names show which scales are stacked
    layouts = {r"model\.layers\..*_proj": "sio", r"model\.layers\.self_attn\.q_proj": "sioo"}
    layouts = {key: layouts[key] for key in reversed(layouts)}
    again = interop.load_base(tmp_path / "base", tree, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    every = loha_jax.inject(
        tree, LoHaConfig(r=1, target_modules="all-linear"), key=jax.random.key(0), names=found
    )
    scale = every["model"]["layers"]["input_layernorm"]["weight"]
    assert scale is tree["model"]["layers"]["input_layernorm"]["weight"]  # [2, 32], and no kernel
    config = LoHaConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_weights=False, layers_to_transform=[1]
    )
    adapted = loha_jax.inject(tree, config, key=jax.random.key(0), names=found)
    interop.save_merged(tmp_path / "merged", adapted, names=found, base=tmp_path / "base")
    want = loha_jax.merge(adapted)["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    for n in range(2):
        np.testing.assert_allclose(
            tensors[f"model.layers.{n}.mlp.down_proj.weight"], want[n].T, rtol=0, atol=1e-7
        )
