"""LoRAs for readers of one rank, for servers, and as kohya's file.

The servers are not installed: their loaders' rules are written out here (vLLM's
`lora/peft_helper.py` and `lora/lora_model.py`, sglang-jax' `srt/lora/lora_memory_pool.py`).
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def tree(names=NAMES, shape=(24, 20), **options):
    """Adapted kernels [in, out] of zeros, and ΔW [out, in] of each: the merged kernels."""
    given = {"r": 3, "alpha": 7, "init_weights": False, "target_modules": list(names)}
    base = {}
    for name in names:
        node = base
        for part in name.split("."):
            node = node.setdefault(part, {})
        node["kernel"] = jnp.zeros(shape)
    params = loha_jax.inject(base, LoHaConfig(**given | options), key=jax.random.key(0))
    merged, found = loha_jax.merge(params), {}
    for name in names:
        node = merged
        for part in name.split("."):
            node = node[part]
        found[name] = np.asarray(node["kernel"]).T
    return params, found


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def by_vllm(folder, option):
    """One scaling for all modules, patterns are not read; a rank over the option is refused."""
    config, tensors = read(folder)
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    most = int(option.removeprefix("--max-lora-rank "))
    assert most in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    found = {}
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name != key.removeprefix("base_model.model."):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert config["r"] <= most
            assert len(a) <= most
            found[name] = b @ a * (config["lora_alpha"] / config["r"])
    return found


def by_sglang(folder, option):
    """The weights of a layer that contain a module's name; cut off or padded to the option."""
    config, tensors = read(folder)
    assert isinstance(config["target_modules"], list)
    most = int(option.removeprefix("--max-lora-rank "))
    found = {}
    for layer in (0, 1):
        inside = {k: t for k, t in tensors.items() if f"layers.{layer}." in k}
        for module in {name.split(".")[-1] for name in config["target_modules"]}:
            pair = {}
            for key, tensor in inside.items():
                if module in key:
                    name = key.removeprefix("base_model.model.").partition(".lora_")[0]
                    pair["A" if "lora_A.weight" in key else "B"] = tensor
            if pair:
                found[name] = pair["B"][:, :most] @ pair["A"][:most]
                found[name] = found[name] * (config["lora_alpha"] / config["r"])
    return found


@pytest.mark.parametrize(("server", "reader"), [("vllm", by_vllm), ("sglang", by_sglang)])
@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 1}}]
)
def test_a_server_computes_the_update(server, reader, options, tmp_path):
    params, want = tree(**options)
    lora = interop.save_lora(tmp_path, params, server=server)
    assert (
        lora.server_option == {"vllm": "--max-lora-rank 16", "sglang": "--max-lora-rank 9"}[server]
    )
    assert f"start the server with {lora.server_option}" in str(lora)
    found = reader(tmp_path, lora.server_option)
    assert found.keys() == want.keys()
    for name, update in want.items():
        np.testing.assert_allclose(found[name], update, rtol=0, atol=1e-5 * np.abs(update).max())


@pytest.mark.parametrize(
    ("server", "names", "options", "message"),
    [
        ("tgi", NAMES, {}, "`server` is one of vllm, sglang, got 'tgi'"),
        *(
            (
                "sglang",
                (name,),
                {},
                f"does not take {name}: it reads only model.layers.<n>.self_attn",
            )
            for name in (
                "q_proj",
                "model.layers.0.q_proj",
                "model.layers.0.mlp.fc1",
                "model.layers.0.mlp.experts.0.up_proj",
                "vision.layers.0.self_attn.q_proj",
            )
        ),
        (
            "vllm",
            NAMES,
            {"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]},
            "modules_to_save",
        ),
    ],
)
def test_what_a_server_would_get_wrong_is_refused(server, names, options, message, tmp_path):
    params, _ = tree(names, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.save_lora(tmp_path / "lora", params, server=server)
    assert not (tmp_path / "lora").exists()


def test_a_module_that_sglang_knows_by_another_name_is_renamed(tmp_path):
    base = {"blocks": {"0": {"query": {"kernel": jnp.ones((4, 4))}}}}
    config = LoHaConfig(r=2, target_modules=["query", "q_proj"], init_weights=False)
    names = {r"blocks\.(\d+)\.query": r"model.layers.\1.self_attn.q_proj"}
    with pytest.warns(UserWarning, match="match no module"):
        params = loha_jax.inject(base, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"names=\{regex: template\}.*--names 'REGEX=TEMPLATE'"):
        interop.save_lora(tmp_path / "lora", params, server="sglang")
    with pytest.warns(UserWarning, match="match no module"):
        params = loha_jax.inject(base, config, key=jax.random.key(0), names=names)
    interop.save_lora(tmp_path / "lora", params, server="sglang", names=names)
    assert by_sglang(tmp_path / "lora", "--max-lora-rank 4").keys() == {
        "model.layers.0.self_attn.q_proj"
    }


def test_sglang_does_not_take_a_regular_expression_apart(tmp_path):
    name = "layers.0.self_attn.q_proj"
    params, _ = tree((name, f"mtp.{name}"), target_modules=rf"{name}")
    with pytest.raises(ValueError, match="`target_modules` as a regular expression"):
        interop.save_lora(tmp_path / "lora", params, server="sglang")


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_a_weight_decomposition_and_convolutions_are_refused(server, tmp_path):
    base = {"layers": {"0": {"self_attn": {"q_proj": {"kernel": jnp.ones((4, 4))}}}}}
    config = LycorisConfig(
        r=2, target_modules=["q_proj"], init_weights=False, weight_decompose=True
    )
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"does not take a weight decomposition \(DoRA\)"):
        interop.save_lora(tmp_path, params, server=server)
    base = {"layers": {"0": {"self_attn": {"q_proj": {"kernel": jnp.ones((3, 3, 4, 4))}}}}}
    config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={".*": "kkio"})
    with pytest.raises(
        ValueError, match=r"does not take convolutions \(layers.0.self_attn.q_proj\)"
    ):
        interop.save_lora(tmp_path, params, server=server)


def test_a_rank_that_no_server_takes_says_what_the_largest_loses(tmp_path):
    params, want = tree(("layers.0.q_proj",), (600, 560), r=23)
    with pytest.raises(ValueError, match="rank 529, and vLLM takes 512 at most") as error:
        interop.save_lora(tmp_path, params, server="vllm")
    values = np.linalg.svd(want["layers.0.q_proj"], compute_uv=False)
    lost = np.linalg.norm(values[512:]) / np.linalg.norm(values)
    said = re.search(r"error of an update is (\S+) \(layers\.0\.q_proj\)", str(error.value))
    assert float(said[1]) == pytest.approx(lost, rel=0.05)  # of two digits
    lora = interop.save_lora(tmp_path, params, server="vllm", rank=512)
    assert lora.server_option == "--max-lora-rank 512"


def test_one_rank_for_all_modules(tmp_path):
    params, want = tree(rank_pattern={"down_proj": 1})
    assert interop.to_lora(params).config["rank_pattern"]
    lora = interop.save_lora(tmp_path, params, uniform_rank=True)
    config, tensors = read(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (9, 9)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, update in want.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert (len(a), b.shape[1]) == (9, 9)
        np.testing.assert_allclose(b @ a, update, rtol=0, atol=1e-5 * np.abs(update).max())
    assert lora.errors == dict.fromkeys(want, 0)


def test_one_rank_of_convolutions_in_groups_and_linear_layers():
    base = {
        "conv": {"kernel": normal(0, 3, 3, 2, 6).astype(np.float32)},
        "q": {"kernel": normal(1, 8, 8).astype(np.float32)},
    }
    config = LoHaConfig(r=2, alpha=4, target_modules=["conv", "q"], init_weights=False)
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={"conv": "kkio"})
    plain, padded = (
        interop.to_lora(params, groups={"conv": 3}, uniform_rank=uniform)
        for uniform in (False, True)
    )
    assert padded.config["rank_pattern"] == {}
    assert padded.config["r"] % 3 == 0

    def update(lora, name):
        a, b = (lora.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        groups = len(a) // b.shape[1]
        b = b.reshape(groups, -1, b.shape[1])
        return np.stack(
            [b[g] @ part.reshape(len(part), -1) for g, part in enumerate(np.split(a, groups))]
        )

    for name in ("conv", "q"):
        np.testing.assert_array_equal(update(padded, name), update(plain, name))


def test_kohyas_file(tmp_path):
    params, want = tree(rank_pattern={"down_proj": 2})
    interop.save_lora(tmp_path / "a.safetensors", params, form="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    for name, update in want.items():
        own = f"lora_unet_{name.replace('.', '_')}"
        down, up = (tensors[f"{own}.lora_{side}.weight"] for side in ("down", "up"))
        alpha = tensors[f"{own}.alpha"]
        assert alpha.shape == ()
        found = up @ down * (alpha / len(down))
        np.testing.assert_allclose(found, update, rtol=0, atol=1e-5 * np.abs(update).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "a1111"}, "`form` is one of peft, kohya, diffusers, got 'a1111'"),
        ({"form": "diffusers"}, "the part of the model and a dot"),
        ({"form": "diffusers", "prefix": "unet_"}, "got 'unet_'"),
        ({"prefix": "x."}, '`prefix=` is for `form="kohya"`'),
        ({"form": "kohya", "prefix": "x"}, "should end with '_'"),
        ({"form": "kohya", "server": "vllm"}, "`server` reads PEFT's folders"),
    ],
)
def test_wrong_arguments_are_refused(options, message, tmp_path):
    params, _ = tree()
    with pytest.raises(ValueError, match=message):
        interop.save_lora(tmp_path / "a.safetensors", params, **options)
    assert not list(tmp_path.iterdir())


def test_names_that_look_like_keys_and_names_that_meet(tmp_path):
    params, want = tree(("my_lora_A.q",))
    interop.save_lora(tmp_path / "a.safetensors", params, form="diffusers", prefix="unet.")
    tensors = load_file(tmp_path / "a.safetensors")
    found = tensors["unet.my_lora_A.q.lora_B.weight"] @ tensors["unet.my_lora_A.q.lora_A.weight"]
    np.testing.assert_allclose(found, want["my_lora_A.q"], rtol=0, atol=1e-6)
    params, _ = tree(("a.b_c", "a_b.c"))
    with pytest.raises(
        ValueError, match=r"a_b.c and another module would both be 'lora_unet_a_b_c'"
    ):
        interop.save_lora(tmp_path / "b.safetensors", params, form="kohya")


def test_a_file_has_no_place_for_whole_parameters(tmp_path):
    params, _ = tree(modules_to_save=["down_proj"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"has no place for base_model\.model\.model\.layers\.1"):
        interop.save_lora(tmp_path / "a.safetensors", params, form="kohya")
    assert not list(tmp_path.iterdir())
