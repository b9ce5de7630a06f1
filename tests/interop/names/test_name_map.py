"""Torch names and layouts.

From mappings that models carry, from Flax' own habits, and from contents.
"""

import enum
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_names import D, E, F, H, K, N, llama3, nested, run_loader, torch_tensors

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop import NameMap
from loha_jax.targets.module_names import UnknownNameError


def qwen2():
    layer = r"model\.layers\.([0-9]+)\."
    return {
        **{pattern: value for pattern, value in llama3().items() if "q_norm" not in pattern},
        layer + r"self_attn\.q_proj\.bias": (r"layers.\1.attn.q_bias", None),
        layer + r"self_attn\.k_proj\.bias": (r"layers.\1.attn.k_bias", None),
    }


def qwen3():
    layer = r"model\.layers\.([0-9]+)\.mlp\."
    expert = layer + r"experts\.([0-9]+)\.(gate|up|down)_proj\.weight"
    return {
        **llama3(),
        layer + r"gate\.weight": (r"layers.\1.mlp.router.kernel", ((1, 0), None)),
        expert: (r"layers.\1.mlp.experts.\2.\3_proj.kernel", ((1, 0), None)),
    }


def stack_experts(tensors):
    """As tunix' qwen3 loader: experts.<n>.<kind>_proj.kernel of a layer become <kind>_proj."""
    out, groups = {}, {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"(.*)experts\.(\d+)\.(\w+_proj)\.kernel", key):
            groups.setdefault(found[1] + found[3], {})[int(found[2])] = value
        else:
            out[key] = value
    return out | {
        key: jnp.stack([parts[n] for n in sorted(parts)], 0) for key, parts in groups.items()
    }


def gemma(prefix=""):
    layer = prefix + r"model\.layers\.([0-9]+)\."
    return {
        prefix + r"model\.embed_tokens\.weight": ("embedder.input_embedding", None),
        layer + r"self_attn\.q_proj\.weight": (r"tmp.layers.\1.attn.q", ((1, 0), (D, N, H))),
        layer + r"self_attn\.k_proj\.weight": (r"tmp.layers.\1.attn.k", ((1, 0), (D, K, H))),
        layer + r"self_attn\.v_proj\.weight": (r"tmp.layers.\1.attn.v", ((1, 0), (D, K, H))),
        layer + r"self_attn\.o_proj\.weight": (
            r"layers.\1.attn.attn_vec_einsum.w",
            ((1, 0), (N, H, D)),
        ),
        layer + r"(post_feedforward_layernorm|post_ffw_layernorm)\.weight": (
            r"layers.\1.post_ffw_norm.scale",
            None,
        ),
        r"lm_head\.weight": ("unused.lm_head.weight", None),
        r"lm_head\.bias": ("unused.lm_head.bias", None),
        r".*\.bias": (r"unused.bias", None),
    }


def gemma3():
    return gemma(r"(?:language_model\.)?")


def gemma_preprocess():
    """As tunix' gemma loaders: q becomes [N, D, H], k and v one [2, K, D, H].

    A closure with state.
    """
    pending = {}

    def preprocess(tensors):
        out = dict(tensors)
        for key in list(out):
            if found := re.fullmatch(r"tmp\.layers\.(\d+)\.attn\.([qkv])", key):
                pending.setdefault(found[1], {})[found[2]] = out.pop(key)
        for layer, slots in list(pending.items()):
            if "q" in slots:
                out[f"layers.{layer}.attn.q_einsum.w"] = jnp.transpose(slots.pop("q"), (1, 0, 2))
            if "k" in slots and "v" in slots:
                k, v = (jnp.transpose(slots.pop(name), (1, 0, 2)) for name in ("k", "v"))
                out[f"layers.{layer}.attn.kv_einsum.w"] = jnp.stack([k, v], axis=0)
            if not slots:
                del pending[layer]
        return out

    return preprocess


MODELS = {
    "llama3": (llama3, None, "", ("ioo", "iio")),
    "qwen2": (qwen2, None, "", ("ioo", "iio")),
    "qwen3": (qwen3, lambda: stack_experts, "", ("ioo", "iio")),
    "gemma": (gemma, gemma_preprocess, "", ("oio", "iio")),
    "gemma3": (gemma3, gemma_preprocess, "language_model.", ("oio", "iio")),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_mappings_of_tunix_models_give_names_and_layouts(name, tmp_path):
    mapping, make, prefix, (q_word, o_word) = MODELS[name]
    tensors = torch_tensors(np.random.default_rng(0), kind=name, prefix=prefix)
    leaves = run_loader(mapping(), tensors, make() if make else None)
    save_file(tensors, tmp_path / "model.safetensors")
    names = NameMap(mapping(), base=tmp_path, preprocess=make() if make else None)
    assert not names.ambiguous
    assert not names.unmatched
    used = []
    for path, leaf in leaves.items():
        source = names.sources[path]
        used += source.keys
        want = np.stack([tensors[key] for key in source.keys])
        if source.layout is None:
            np.testing.assert_array_equal(np.asarray(leaf).reshape(want.shape), want)
            continue
        np.testing.assert_array_equal(source.layout.unfold(leaf).reshape(want.shape), want)
    assert sorted(used) == sorted(tensors)
    q = "layers.1.attn.q_einsum" if make and "gemma" in name else "layers.1.attn.q_proj"
    assert names(q) == f"{prefix}model.layers.1.self_attn.q_proj"
    assert names.layouts[q].word == q_word
    o = "attn_vec_einsum" if "gemma" in name else "o_proj"
    assert names.layouts[f"layers.0.attn.{o}"].word == o_word
    if "gemma" in name:
        assert names.layouts["layers.0.attn.kv_einsum"].word == "soio"
        kv = [f"{prefix}model.layers.0.self_attn.{n}_proj" for n in "kv"]
        assert list(names("layers.0.attn.kv_einsum")) == kv
    if name == "qwen3":
        assert names.layouts["layers.1.mlp.up_proj"].word == "sio"
        experts = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(E)]
        assert list(names("layers.1.mlp.up_proj")) == experts
    # the tree that the model holds gets the same arrays from load_base
    tree = nested(leaves)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    loaded = interop.load_base(tmp_path, like, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    config = LoHaConfig(r=2, target_modules=r".*\.(q_proj|k_proj|o_proj)")
    adapted = loha_jax.inject(tree, config, key=jax.random.key(0), names=names)
    state = interop.to_peft_state_dict(adapted)
    assert state[f"base_model.model.{prefix}model.layers.1.self_attn.k_proj.hada_w1_a"].shape == (
        K * H,
        2,
    )
    assert state[f"base_model.model.{prefix}model.layers.1.self_attn.o_proj.hada_w1_b"].shape == (
        2,
        N * H,
    )


def test_a_mapping_needs_the_names_of_a_checkpoint():
    with pytest.raises(ValueError, match=r"give the checkpoint, or \{name: shape\}, as `base=`"):
        NameMap(llama3())
    down = "model.layers.0.mlp.down_proj"
    names = NameMap(llama3(), base={f"{down}.weight": (D, F), "model.embed_tokens.weight": (7, D)})
    assert names("embedder.input_embedding") == "model.embed_tokens"
    with pytest.raises(UnknownNameError, match=r"layers.0.attn.zzz has no torch name"):
        names("layers.0.attn.zzz")
    tree = {
        "layers": {
            "0": {
                "mlp": {
                    "down_proj": {"kernel": jnp.ones((F, D))},
                    "other": {"kernel": jnp.ones((D, D))},
                }
            }
        }
    }
    config = LoHaConfig(r=2, target_modules=["down_proj"])
    adapted = loha_jax.inject(tree, config, key=jax.random.key(0), names=names)
    assert adapted["layers"]["0"]["mlp"]["down_proj"]["kernel"].names == (down,)
    with pytest.raises(UnknownNameError, match=r"layers.0.mlp.other has no torch name"):
        loha_jax.inject(
            tree, LoHaConfig(r=2, target_modules=["other"]), key=jax.random.key(0), names=names
        )


class Bonsai(enum.Enum):
    SCALE = None
    LINEAR = ((1, 0), None, False)
    CONV2D = ((2, 3, 1, 0), None, False)
    ATTN_Q = ((2, 0, 1), (N, H, D), True)
    ATTN_OUT = ((1, 0), (N, H, D), False)
    ATTN_BIAS = (None, (N, H), False)


def test_transforms_of_bonsai_models():
    """jax-bonsai: enum members, reshape first, unescaped dots, anchors."""
    mapping = {
        r"^vit.layer.([0-9]+).q.weight$": (r"layers.\1.q.kernel", Bonsai.ATTN_Q),
        r"^vit.layer.([0-9]+).q.bias$": (r"layers.\1.q.bias", Bonsai.ATTN_BIAS),
        r"^vit.layer.([0-9]+).o.weight$": (r"layers.\1.o.kernel", Bonsai.ATTN_OUT),
        r"^vit.patch.weight$": ("patch.kernel", Bonsai.CONV2D),
        r"^vit.norm.weight$": ("ln.scale", Bonsai.SCALE),
    }
    shapes = {
        "vit.layer.0.q.weight": (N * H, D),
        "vit.layer.0.q.bias": (N * H,),
        "vit.layer.0.o.weight": (D, N * H),
        "vit.patch.weight": (6, 3, 2, 2),
        "vit.norm.weight": (D,),
        "vit.head.weight": (2, D),
    }
    names = NameMap(mapping, base=shapes)
    words = {path: layout.word for path, layout in names.layouts.items()}
    assert words == {"layers.0.q": "ioo", "layers.0.o": "iio", "patch": "kkio"}
    assert names.unused == ("vit.head.weight",)
    assert names.sources["layers.0.q.bias"].axes == ((0, 1),)
    assert names("layers.0.q") == "vit.layer.0.q"
    assert "layers.0.q.kernel" in names.table()
    assert repr(names) == "NameMap(5 leaves, 0 ambiguous, 0 unmatched, 1 unused torch tensors)"


@pytest.mark.parametrize(
    ("transform", "shape", "message"),
    [
        (((1, 0), (N, D, H)), (N * H, D), "merges axes"),
        (((0, 1, 2), None), (3, 4), "does not take"),
        ((None, (5, 5)), (3, 4), "does not take"),
        (((1, 0), (12,)), (3, 4), "merges axes of the torch tensor in another order"),
    ],
)
def test_transforms_that_no_layout_can_say_are_errors(transform, shape, message, tmp_path):
    names = NameMap({r"a\.weight": ("a.w", transform)}, base={"a.weight": shape})
    assert message in names.unmatched["a.w"]
    with pytest.raises(UnknownNameError, match=message):
        names("a")


def test_forms_that_are_none_are_errors():
    with pytest.raises(ValueError, match=r"is None, \(permute, reshape\)"):
        NameMap({r"a": ("b", (1, 0, 2, 3))}, base={})
    with pytest.raises(ValueError, match="belong to a mapping"):
        NameMap({"a": "b"}, base={})
    many = NameMap(
        {r"a\.(\d)\.weight": ("a.w", None)}, base={"a.0.weight": (2, 2), "a.1.weight": (2, 2)}
    )
    with pytest.raises(
        UnknownNameError, match=r"the mapping gives it several tensors: a.0.weight, a.1.weight"
    ):
        many("a")
    summed = NameMap(
        {r"a\.(\d)\.weight": (r"a.\1", None)},
        base={"a.0.weight": (2, 3), "a.1.weight": (2, 3)},
        preprocess=lambda t: {
            "a.w": t["a.0"] + t["a.1"],
            "b.w": jnp.concatenate([t["a.0"], t["a.1"]]),
        },
    )
    assert set(summed.unmatched) == {"a.w", "b.w"}
    assert "does more with a.0.weight, a.1.weight than permute and stack" in summed.unmatched["a.w"]


def test_functions_and_tables_are_name_maps_too():
    table = NameMap({r"(.*)\.q": r"\1.query"}, layouts={r".*\.q": "oi"})
    tree = {"a": {"q": {"kernel": jnp.ones((3, 4))}}}
    config = LoHaConfig(r=2, target_modules=["query"])
    leaf = loha_jax.inject(tree, config, key=jax.random.key(0), names=table)["a"]["q"]["kernel"]
    assert (leaf.names, leaf.layout.word) == (("a.query",), "oi")
    leaf = loha_jax.inject(tree, config, key=jax.random.key(0), names=table, layouts={"a.q": "io"})[
        "a"
    ]["q"]["kernel"]
    assert leaf.layout.word == "io"
    assert NameMap(str.upper).then(lambda name: f"model.{name}")("a.q") == "model.A.Q"
    with pytest.raises(ValueError, match=r"names.layouts\['a.q'\] = 'ioo' describes 3 axes"):
        loha_jax.inject(
            tree, config, key=jax.random.key(0), names=NameMap(table._names, layouts={"a.q": "ioo"})
        )


def diffusers_rename(key):
    """diffusers 0.39's torch to Flax rule for UNet and VAE names."""
    for part in re.findall(r"\w+[.]\d+", key):
        key = key.replace(part, "_".join(part.split(".")))
    return key


@pytest.mark.parametrize(
    "name",
    [
        "time_embedding.linear_1",
        "conv_in",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.proj_in",
    ],
)
def test_diffusers_names(name):
    assert NameMap.diffusers()(diffusers_rename(name)) == name


def test_diffusers_autoencoders_call_their_attention_otherwise():
    names = NameMap.diffusers()
    for flax, name in {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
    }.items():
        assert (
            names(f"encoder.mid_block.attentions_0.{flax}")
            == f"encoder.mid_block.attentions.0.{name}"
        )
