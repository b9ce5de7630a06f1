"""Base checkpoints of torch in Flax twins, and merged ones back in torch."""

import copy
import functools
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
from tests.models.media_twins import clip, resnet, resnet_basic, vit, wav2vec2, whisper
from tests.models.transformers_twins import bert, gpt2, llama
from tests.models.twins import Size


@pytest.fixture(scope="module")
def twins():
    """The twins of a builder, made once."""
    return functools.cache(lambda builder: builder(Size()))


def torch_logits(twins, model=None):
    with torch.no_grad():
        return twins.output(model or twins.module, twins.tensors).float().numpy()


def flax_logits(twins, params):
    return np.asarray(twins.fn(params, twins.inputs), np.float32)


def in_float32(twins, model):
    """A model's weights in float32, without the rounding of its rotary frequencies."""
    wide = copy.deepcopy(twins.module)
    wide.load_state_dict(model.state_dict())
    return wide


def assert_close(a, b):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def shapes_of(twins):
    return jax.eval_shape(lambda params: params, twins.params)


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
    made = twins(builder)
    made.module.save_pretrained(tmp_path)
    names = NameMap.transformers(made.module.config.model_type)
    params = interop.load_base(tmp_path, shapes_of(made), names=names, tied=TIED.get(builder))
    assert_close(flax_logits(made, params), torch_logits(made))
    # the same names and layouts are in the contents
    inferred = NameMap.infer(params, tmp_path)
    assert not inferred.unmatched
    again = interop.load_base(tmp_path, shapes_of(made), names=inferred)
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
    made = twins(builder)
    base, merged = tmp_path / "base", tmp_path / "merged"
    made.module.save_pretrained(base, max_shard_size=size)
    (base / "tokenizer.json").write_text("{}")
    names = NameMap.transformers()
    params = interop.load_base(base, shapes_of(made), names=names)
    config = LoHaConfig(r=4, alpha=16, target_modules=targets, init_weights=False)
    adapted = loha_jax.inject(params, config, key=jax.random.key(1), names=names)
    want = flax_logits(made, adapted)
    assert np.abs(want - torch_logits(made)).max() > 1e-2 * np.abs(want).max()
    interop.save_merged(merged, adapted, names=names, base=base, max_shard_size=size)
    again, info = type(made.module).from_pretrained(merged, output_loading_info=True)
    assert not any(
        info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert_close(torch_logits(made, again.eval()), want)
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
    made = twins(llama)
    half = transformers.LlamaForCausalLM(made.module.config).to(torch.bfloat16)
    half.load_state_dict(made.module.state_dict())
    half.save_pretrained(tmp_path / "base")
    like = shapes_of(made)
    names = NameMap.transformers()
    exact = interop.load_base(tmp_path / "base", like, names=names)
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype("float32")}
    assert_close(flax_logits(made, exact), torch_logits(made, in_float32(made, half)))
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
    assert_close(torch_logits(made, in_float32(made, again)), flax_logits(made, merged))
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
    made = twins(resnet)
    made.module.save_pretrained(tmp_path / "base")
    names = NameMap.transformers()
    params = interop.load_base(tmp_path / "base", shapes_of(made), names=names)
    want = made.module.state_dict()["resnet.embedder.embedder.normalization.running_var"].numpy()
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
    made = twins(llama)
    made.module.save_pretrained(tmp_path / "base")
    names = NameMap.transformers()
    params = interop.load_base(tmp_path / "base", shapes_of(made), names=names)
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
