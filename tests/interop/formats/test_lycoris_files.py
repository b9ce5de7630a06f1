"""Keys, prefixes, components and metadata of LyCORIS' and kohya's files."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from leaves import adapted_names, loha_leaves
from lycoris_modules import factors, written
from lycoris_samples import DATA, LAYOUTS, base_params, jax_tree, kohya_state, native
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.disk.tensor_files import read_metadata
from loha_jax.interop.formats.lycoris_files import ModuleNames, split_prefix
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.tree.leaves import LoHaWeight

KOHYA = {"lora_unet_": "unet", "lora_te_": "te"}


def tree(*names):
    return jax_tree({f"{name}.weight": np.ones((3, 3), np.float32) for name in names})


def content_hash(path):
    """As A1111 and sd-scripts compute it: SHA-256 of the file after its header."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("lycoris_blocks_0_q", ("lycoris_", "blocks_0_q")),
        ("lora_unet_down_blocks_0", ("lora_unet_", "down_blocks_0")),
        ("lora_te_text_model_x", ("lora_te_", "text_model_x")),
        ("lora_te1_x", ("lora_te1_", "x")),
        ("lora_te2_x", ("lora_te2_", "x")),
        ("lycoris.x.y", ("lycoris.", "x.y")),
        ("unet.x.y", ("unet.", "x.y")),
        ("transformer.x.y", ("transformer.", "x.y")),
        ("diffusion_model.x.y", ("diffusion_model.", "x.y")),
        ("model.diffusion_model.x.y", ("model.diffusion_model.", "x.y")),
        ("text_encoder_2.x.y", ("text_encoder_2.", "x.y")),
        ("text_encoders.clip_l.transformer.x.y", ("text_encoders.clip_l.transformer.", "x.y")),
        ("unet_x", ("", "unet_x")),
        ("model.layers.0.q", ("", "model.layers.0.q")),
    ],
)
def test_prefixes(name, want):
    assert split_prefix(name) == want


PART = st.text("ab_", min_size=1, max_size=3).filter(lambda part: not part.startswith("text"))


@given(names=st.sets(st.lists(PART, min_size=1, max_size=3).map(".".join), min_size=1, max_size=12))
def test_a_name_with_underscores_is_the_only_module_it_can_be(names):
    lookup = ModuleNames(names)
    for name in names:
        same = sorted(other for other in names if other.replace(".", "_") == name.replace(".", "_"))
        if len(same) == 1:
            assert lookup.find("lycoris_", name.replace(".", "_")) == name
        else:
            with pytest.raises(ValueError, match=" or ".join(same).replace(".", r"\.")):
                lookup.find("lycoris_", name.replace(".", "_"))
        assert lookup.find("unet.", name) == lookup.find("", name) == name
    assert lookup.find("lycoris_", "c") is None


@pytest.mark.parametrize("own", ["a_b_c", "lycoris_a_b_c"])
def test_modules_with_one_name(own, tmp_path):
    """Modules with one name are an error where the file uses it."""
    base = tree("a.b_c", "a_b.c", "a.d")
    with pytest.raises(ValueError, match=rf"{own} could be a\.b_c or a_b\.c"):
        interop.load_lycoris(written(tmp_path, {own: factors()}), base)
    other = own.replace("a_b_c", "a_d")
    assert set(
        adapted_names(interop.load_lycoris(written(tmp_path, {other: factors()}), base))
    ) == {"a.d"}


def test_a_stacked_kernel_is_found_by_the_names_of_its_modules(tmp_path):
    base = {"scan": {"layer_q": {"kernel": jnp.ones((2, 3, 3))}}}
    names = {r"scan\.layer_q": "model.layers.{}.layer.q"}
    path = written(tmp_path, {"lycoris_model_layers_1_layer_q": factors()})
    params = interop.load_lycoris(path, base, names=names, layouts={"scan.layer_q": "sio"})
    leaf = params["scan"]["layer_q"]["kernel"]
    assert (leaf.names, leaf.adapters["default"].ranks) == (
        ("model.layers.0.layer.q", "model.layers.1.layer.q"),
        (0, 1),
    )


@pytest.mark.parametrize(
    ("in_file", "in_tree"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "encoder.layers.0.mlp.fc1"),
        ("lora_te_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("transformer.h.0.fc", "transformer.h.0.fc"),
        ("transformer.h.0.fc", "h.0.fc"),
        ("diffusion_model.double_blocks.0.img_mlp", "double_blocks.0.img_mlp"),
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("a_b", "a.b"),
    ],
)
def test_names_in_the_file_and_in_the_tree(in_file, in_tree, tmp_path):
    params = interop.load_lycoris(
        written(tmp_path, {in_file: factors()}), tree(in_tree, "other.fc")
    )
    assert set(adapted_names(params)) == {in_tree}


def test_two_modules_of_the_file_cannot_be_one_of_the_tree(tmp_path):
    path = written(tmp_path, {"lora_te_text_model_fc": factors(), "lora_te_fc": factors()})
    with pytest.raises(
        ValueError, match=r"lora_te_(text_model_)?fc and lora_te_(text_model_)?fc are both fc"
    ):
        interop.load_lycoris(path, tree("fc"))


def test_the_component_is_chosen_by_its_prefix(tmp_path):
    path = DATA / "kohya_tucker.safetensors"
    with pytest.raises(
        ValueError,
        match=r"several components: 'lora_te_' \(\d+ modules\), 'lora_unet_' \(\d+ modules\)",
    ):
        interop.load_lycoris(path, jax_tree(kohya_state("unet")))
    with pytest.raises(ValueError, match=r"begins with prefix='lycoris_'; the file has 'lora_te_'"):
        interop.load_lycoris(path, jax_tree(kohya_state("unet")), prefix="lycoris_")
    plain = written(tmp_path, {"transformer.h.0.fc": factors(), "lm_head": factors()})
    both = interop.load_lycoris(plain, tree("transformer.h.0.fc", "lm_head"), prefix="")
    assert set(adapted_names(both)) == {"transformer.h.0.fc", "lm_head"}


def test_a_kohya_file_both_ways(tmp_path):
    """Half precision, cores and flat factors, two components, and sd-scripts' metadata.

    The hash in the metadata is right.
    """
    path, again = DATA / "kohya_tucker.safetensors", tmp_path / "again.safetensors"
    theirs, metadata = load_file(path), read_metadata(path)
    loaded = {
        p: interop.load_lycoris(path, jax_tree(kohya_state(part)), prefix=p)
        for p, part in KOHYA.items()
    }
    prefixed = [
        name.replace(".", "_") for params in loaded.values() for name in adapted_names(params)
    ]
    assert len(prefixed) == len({key.rpartition(".")[0] for key in theirs})
    others = {"lora_te_": loaded["lora_te_"]}
    interop.save_lycoris(
        again, loaded["lora_unet_"], prefix="lora_unet_", others=others, dtype="float16"
    )
    ours = load_file(again)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == (np.float32 if key.endswith(".alpha") else np.float16)
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    written_metadata = read_metadata(again)
    assert "sshs_model_hash" in metadata
    assert written_metadata == {**metadata, "sshs_model_hash": content_hash(again)}


@pytest.mark.parametrize("form", ["tucker", "dora_attn"])
def test_the_weights_are_those_of_the_file(form):
    """Every module of the text encoder in float64, by LyCORIS' formula."""
    path, prefix, base = DATA / f"kohya_{form}.safetensors", "lora_te_", jax_tree(kohya_state("te"))
    file = read_adapter(path)
    params = interop.load_lycoris(path, base, prefix=prefix)
    leaves = loha_leaves(params)
    dense = jax.jit(LoHaWeight.dense)  # compiled once for each shape
    merged = [dense(dataclasses.replace(leaf, names=("one",))) for leaf in leaves]
    assert len(leaves) == sum(own.startswith(prefix) for own in file.modules)
    for leaf, got in zip(leaves, merged, strict=True):
        module = file.modules[prefix + leaf.names[0].replace(".", "_")]
        t = {part: tensor.astype(np.float64) for part, tensor in module.tensors.items()}
        sides = [t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"] for n in (1, 2)]
        kernel = np.asarray(leaf.layout.unfold(leaf.kernel), np.float64)
        want = kernel + module.alpha / module.r * sides[0] * sides[1]
        if module.dora_scale is not None:
            want *= module.dora_scale.astype(np.float64) / np.linalg.norm(
                want, axis=1, keepdims=True
            )
        np.testing.assert_allclose(
            leaf.layout.unfold(got), want, rtol=0, atol=1e-5 * np.abs(want).max()
        )


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te1_"])
@pytest.mark.parametrize("form", ["tucker", "dora_in"])
def test_kohya_keys_come_with_what_user_interfaces_read(form, prefix, tmp_path):
    params = interop.load_lycoris(native(form)[0], base_params(), layouts=LAYOUTS)
    path = tmp_path / "adapter.safetensors"
    interop.save_lycoris(
        path, params, prefix=prefix, metadata={"note": "mine", "ss_network_dim": "64"}
    )
    metadata = read_metadata(path)
    assert json.loads(metadata.pop("ss_network_args")) == {
        "algo": "loha",
        "conv_dim": "3",
        "conv_alpha": "1.0",
        "use_tucker": str(form == "tucker"),
        **({"dora_wd": "True", "wd_on_output": "False"} if form == "dora_in" else {}),
    }
    assert metadata == {
        "note": "mine",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "64",  # the caller's word
        "ss_network_alpha": "2.0",
        "sshs_model_hash": content_hash(path),
    }


def test_a_hash_of_another_file_is_never_kept(tmp_path):
    stale = {"sshs_model_hash": "0x00", "sshs_legacy_hash": "00", "ss_v2": "False"}
    params = interop.load_lycoris(written(tmp_path, {"lora_unet_q": factors()}, stale), tree("q"))
    interop.save_lycoris(tmp_path / "native.safetensors", params)
    assert read_metadata(tmp_path / "native.safetensors") == {"ss_v2": "False"}
    interop.save_lycoris(
        tmp_path / "kohya.safetensors", params, prefix="lora_unet_", metadata=stale
    )
    metadata = read_metadata(tmp_path / "kohya.safetensors")
    assert metadata["sshs_model_hash"] == content_hash(tmp_path / "kohya.safetensors")
    assert "sshs_legacy_hash" not in metadata


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("lycoris_", "lycoris_blocks_0_q_proj"),
        ("lora_unet_", "lora_unet_blocks_0_q_proj"),
        ("diffusion_model.", "diffusion_model.blocks.0.q_proj"),
        ("", "blocks.0.q_proj"),
    ],
)
def test_every_prefix_can_be_read_again(prefix, key, tmp_path):
    params = interop.load_lycoris(native("dora")[0], base_params(), layouts=LAYOUTS)
    interop.save_lycoris(tmp_path / "adapter.safetensors", params, prefix=prefix)
    assert f"{key}.hada_w1_a" in load_file(tmp_path / "adapter.safetensors")
    again = interop.load_lycoris(tmp_path / "adapter.safetensors", base_params(), layouts=LAYOUTS)
    for name, tensor in interop.to_lycoris_state_dict(params).items():
        np.testing.assert_array_equal(interop.to_lycoris_state_dict(again)[name], tensor)


def test_components_must_differ_in_their_keys(tmp_path):
    params = loha_jax.inject(
        tree("a.b"), LoHaConfig(r=1, target_modules=["b"]), key=jax.random.key(0)
    )
    other = loha_jax.inject(tree("b"), LoHaConfig(r=1, target_modules=["b"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"Two components would both write 'lora_te_a_b"):
        interop.save_lycoris(
            tmp_path / "x.safetensors", params, prefix="lora_te_", others={"lora_te_a_": other}
        )
    assert not list(tmp_path.iterdir())


def test_nnx_models(tmp_path):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.LayerNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.q(x))

    norm = {
        "w_norm": np.array([1, 2, 3], np.float32),
        "b_norm": np.array([0.5, 0.25, 0], np.float32),
    }
    path = written(
        tmp_path, {"lora_unet_q": factors(), "lora_unet_norm": norm, "lora_te_q": factors(3, 3, 2)}
    )
    unet, encoder, x = Block(nnx.Rngs(0)), Block(nnx.Rngs(1)), jnp.arange(6.0).reshape(2, 3)
    before = unet(x)
    assert interop.load_lycoris(path, unet, prefix="lora_unet_") is unet
    interop.load_lycoris(path, encoder, prefix="lora_te_")
    t = factors()
    delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    fresh = Block(nnx.Rngs(0))
    fresh.q.kernel[...] += delta.T
    fresh.norm.scale[...] += norm["w_norm"]
    fresh.norm.bias[...] += norm["b_norm"]
    assert jnp.abs(unet(x) - before).max() > 0.1
    np.testing.assert_allclose(unet(x), fresh(x), rtol=1e-5, atol=1e-5)
    interop.save_lycoris(
        tmp_path / "again.safetensors", unet, prefix="lora_unet_", others={"lora_te_": encoder}
    )
    ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(path)
    assert {k for k in ours if not k.endswith(".alpha")} == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
