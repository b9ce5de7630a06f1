"""Base checkpoints that hold no plain values: scaled float8 is merged, everything else is refused by name."""

import json
import math
import re
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.interop import NameMap, load_base, save_merged, save_peft
from loha_jax.interop.commands.convert import convert_adapter
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.disk.tensor_files import safetensors_bytes
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.runtime.untrusted import FileError

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
RANDOM = np.random.default_rng(5)


def normal(*shape, scale=1.0):
    return (scale * RANDOM.standard_normal(shape)).astype(np.float32)


def spread(scale, shape, block):
    """A scale in a weight's shape, by index arithmetic: scale[..., i // block]."""
    if scale.size == 1:
        return np.full(shape, scale.reshape(()).astype(np.float32))
    rows = np.arange(shape[0])[:, None] // block[0]
    if scale.ndim == 1:
        scale = scale[:, None]
    return scale.astype(np.float32)[rows, np.arange(shape[1])[None] // block[1] % scale.shape[1]]


FORMS = {
    "tensor": ("weight_scale", (), None, {}),
    "one": ("weight_scale", (1,), None, {"quant_method": "modelopt"}),
    "comfy": ("scale_weight", (1,), None, None),
    "row": (
        "weight_scale",
        (20, 1),
        None,
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "rows": ("weight_scale", (20,), None, {"quant_method": "fbgemm_fp8"}),
    "blocks": (
        "weight_scale_inv",
        (3, 2),
        (8, 16),
        {"quant_method": "fp8", "weight_block_size": [8, 16]},
    ),
    "powers": (
        *("weight_scale_inv", (3, 2), (8, 16)),
        {"quant_method": "fp8", "weight_block_size": [8, 16], "scale_fmt": "ue8m0"},
    ),
}
SHAPE = (20, 28)


def quantised(form, dtype=E4M3, scale_dtype=np.float32):
    name, shape, block, config = FORMS[form]
    size = block or (1 if math.prod(shape) > 1 else 64, 64)
    weight = normal(*SHAPE, scale=0.05) * np.exp(normal(SHAPE[0], 1))
    limit = float(ml_dtypes.finfo(dtype).max)
    tiles = (-(-SHAPE[0] // size[0]), -(-SHAPE[1] // size[1]))
    scale = np.zeros(tiles, np.float32)
    for i, j in np.ndindex(tiles):
        tile = weight[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
        scale[i, j] = np.abs(tile).max() / limit
    if form == "powers":
        scale = np.exp2(np.ceil(np.log2(scale)))
    scale = scale.reshape(shape).astype(scale_dtype)
    full = spread(scale, SHAPE, size)
    values = np.clip(weight / full, -limit, limit).astype(dtype)
    return {"q.weight": values, f"q.{name}": scale}, values.astype(np.float32) * full, size, config


def write(folder, tensors, quantization=None, **config):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder, names=("q",), shape=SHAPE, scale=1.0):
    folder.mkdir()
    state = {}
    for name in names:
        for n in "12":
            state[f"base_model.model.{name}.hada_w{n}_a"] = normal(shape[0], 2) * np.sqrt(scale)
            state[f"base_model.model.{name}.hada_w{n}_b"] = normal(2, shape[1])
    text = LoHaConfig(r=2, alpha=2, target_modules=list(names)).to_json()
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {"format": "pt"}))
    first = f"base_model.model.{names[0]}.hada_w"
    a = state[f"{first}1_a"].astype(np.float64) @ state[f"{first}1_b"]
    return folder, a * (state[f"{first}2_a"].astype(np.float64) @ state[f"{first}2_b"])


def read(path):
    checkpoint = Checkpoint(path)
    return {key: checkpoint.read(key) for key in checkpoint.shapes}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("form", FORMS)
def test_a_merge_into_scaled_float8(form, dtype, tmp_path, monkeypatch):
    """Every stored value is within half a unit of float8 of W + ΔW, and the report's error is the true one."""
    monkeypatch.setattr("loha_jax.interop.merge.shard._BLOCK", 500)  # several blocks of rows
    tensors, weight, size, config = quantised(form, dtype)
    extra = {"q.input_scale": np.array([0.3], np.float32), "other.weight": normal(3, 3)}
    base = write(tmp_path / "base", {**tensors, **extra}, config)
    path, delta = adapter(tmp_path / "adapter", scale=0.1)
    report = merge_checkpoint(base, [(path, 0.5)], tmp_path / "out")
    out = read(tmp_path / "out")
    name = next(key for key in tensors if key != "q.weight")
    assert out.keys() == {*tensors, *extra}
    assert {k: (v.dtype, v.shape) for k, v in out.items()} == {
        k: (v.dtype, v.shape) for k, v in {**tensors, **extra}.items()
    }
    for key, value in extra.items():
        np.testing.assert_array_equal(out[key], value)
    full = spread(out[name], SHAPE, size)
    stored, exact = out["q.weight"].astype(np.float64) * full, weight + 0.5 * delta
    info = ml_dtypes.finfo(dtype)
    half = np.maximum(
        np.abs(exact) * float(info.eps) / 2, float(info.smallest_subnormal) / 2 * full
    )
    assert np.all(np.abs(stored - exact) <= half * 1.01)
    if form == "powers":
        np.testing.assert_array_equal(np.log2(out[name]) % 1, 0)
    loss = report.losses["q.weight"]
    np.testing.assert_allclose(
        loss.relative, np.linalg.norm(stored - exact) / np.linalg.norm(exact), rtol=1e-3
    )
    np.testing.assert_allclose(
        loss.share, np.linalg.norm(stored - exact) / np.linalg.norm(0.5 * delta), rtol=1e-3
    )


@pytest.mark.parametrize("form", FORMS)
def test_no_update_keeps_the_bits(form, tmp_path):
    tensors, _, _, config = quantised(form)
    base = write(tmp_path / "base", tensors, config)
    path, _ = adapter(tmp_path / "adapter")
    merge_checkpoint(base, [(path, 0.0)], tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
def test_scales_keep_their_dtype(scale_dtype, tmp_path):
    tensors, weight, size, config = quantised("row", scale_dtype=scale_dtype)
    base = write(tmp_path / "base", tensors, config)
    path, delta = adapter(tmp_path / "adapter")
    merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    out = read(tmp_path / "out")
    assert out["q.weight_scale"].dtype == scale_dtype
    stored = out["q.weight"].astype(np.float64) * spread(out["q.weight_scale"], SHAPE, size)
    exact = weight + delta
    assert np.linalg.norm(stored - exact) < 0.04 * np.linalg.norm(exact)


def test_a_scale_in_another_shard(tmp_path):
    tensors, weight, size, config = quantised("blocks")
    base = tmp_path / "base"
    base.mkdir()
    parts = {"a.safetensors": "q.weight_scale_inv", "b.safetensors": "q.weight"}
    for name, key in parts.items():
        (base / name).write_bytes(safetensors_bytes({key: tensors[key]}, {}))
    index = {"metadata": {}, "weight_map": {key: name for name, key in parts.items()}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps({"quantization_config": config}))
    path, delta = adapter(tmp_path / "adapter")
    merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    out = read(tmp_path / "out")
    stored = out["q.weight"].astype(np.float64) * spread(out["q.weight_scale_inv"], SHAPE, size)
    assert np.linalg.norm(stored - weight - delta) < 0.04 * np.linalg.norm(weight + delta)
    with pytest.raises(
        ValueError, match=r"scaled by q.weight_scale_inv, which is in another shard"
    ):
        merge_checkpoint(base / "b.safetensors", [(path, 1.0)], tmp_path / "out2")


F8 = np.ones((8, 8), E4M3)
ONE = np.ones((1,), np.float32)
INT = np.ones((8, 8), np.int8)
U8 = np.ones((32, 1), np.uint8)
REFUSED = {
    "int8": ({"q.weight": INT}, {}, "q.weight holds int8"),
    "int8 with a scale": ({"q.weight": INT, "q.weight_scale": ONE}, {}, "q.weight holds int8"),
    "bitsandbytes 8-bit": ({"q.weight": INT, "q.SCB": ONE}, {}, r"q\.SCB \(bitsandbytes 8-bit"),
    "bitsandbytes 4-bit": (
        {"q.weight": U8, "q.weight.absmax": ONE, "q.weight.quant_state.bitsandbytes__nf4": U8},
        {},
        "bitsandbytes 4-bit",
    ),
    "GPTQ": ({"q.qweight": INT, "q.qzeros": INT, "q.scales": ONE, "q.g_idx": INT[0]}, {}, r"q\.qweight.*GPTQ or AWQ"),
    "compressed-tensors": ({"q.weight_packed": INT, "q.weight_scale": ONE}, {}, "weight_packed"),
    "torchao": ({"q._weight_qdata": INT, "q._weight_scale": ONE}, {}, "torchao"),
    "quanto": ({"q.weight._data": INT, "q.weight._scale": ONE}, {}, r"q\.weight\._data"),
    "MXFP8": ({"q.weight": F8, "q.weight_scale": np.ones((8, 1), np.uint8)}, {}, "q.weight_scale, which holds uint8"),
    "another spelling": ({"q.weight": F8, "q.scale": ONE}, {}, r"unknown form \(q\.scale\)"),
    "two scales": ({"q.weight": F8, "q.weight_scale": ONE, "q.weight_scale_2": ONE}, {}, "unknown form"),
    "no scale": ({"q.weight": F8}, {"quant_method": "fp8"}, "has no scale, though quantization_config"),
    "a marker": ({"q.weight": F8, "scaled_fp8": np.ones(2, E4M3)}, {}, "has no scale, though scaled_fp8"),
    "blocks of unknown size": ({"q.weight": F8, "q.weight_scale_inv": np.ones((2, 2), np.float32)}, {}, "does not fit"),
    "blocks that do not fit": (
        {"q.weight": F8, "q.weight_scale_inv": np.ones((2, 2), np.float32)},
        {"quant_method": "fp8", "weight_block_size": [3, 3]},
        r"does not fit its scale q\.weight_scale_inv \[2, 2\]; weight_block_size in config.json is \[3, 3\]",
    ),
    "a scaled bfloat16": ({"q.weight": np.ones((8, 8), ml_dtypes.bfloat16), "q.weight_scale": ONE}, {}, "float8 only"),
    "a scale of NaN": ({"q.weight": F8, "q.weight_scale": ONE * np.nan}, {}, "negative or not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_forms_are_refused_by_name(kind, tmp_path):
    tensors, config, match = REFUSED[kind]
    base = write(tmp_path / "base", tensors, config)
    path, _ = adapter(tmp_path / "adapter", shape=(8, 8))
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    like = {"q": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    with pytest.raises(ValueError, match=match) as error:
        load_base(base, like, strict=False)
    assert "strict=False" not in str(error.value)
    tree = {"q": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match=match):
        save_merged(tmp_path / "out", tree, base=base)
    if "scale of NaN" not in kind:
        with pytest.raises(ValueError, match=match):
            convert_adapter(path, tmp_path / "converted", "lora", base=base)


@pytest.mark.parametrize("form", FORMS)
def test_load_base_multiplies_by_scales(form, tmp_path):
    tensors, weight, _, config = quantised(form)
    base = write(tmp_path / "base", {**tensors, "q.input_scale": ONE}, config)
    for dtype in (jnp.float32, jnp.bfloat16):
        like = {"q": {"kernel": jax.ShapeDtypeStruct(SHAPE[::-1], dtype)}}
        loaded = load_base(base, like)["q"]["kernel"]
        np.testing.assert_array_equal(loaded, weight.T.astype(dtype))
    with pytest.raises(FileError, match="float8_e4m3fn leaf has no place"):
        load_base(base, {"q": {"kernel": jax.ShapeDtypeStruct(SHAPE[::-1], E4M3)}}, strict=False)
    with pytest.raises(ValueError, match="is quantised"):
        NameMap.infer({"q": {"kernel": jnp.asarray(weight.T)}}, base)
    with pytest.raises(ValueError, match="is quantised"):
        merge_checkpoint(base, [], tmp_path / "out", dtype=jnp.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_save_merged_quantises_again(form, tmp_path):
    tensors, weight, size, config = quantised(form)
    base = write(tmp_path / "base", tensors, config)
    path, delta = adapter(tmp_path / "adapter")
    tree = {"q": {"kernel": jnp.asarray(weight.T)}}
    save_merged(tmp_path / "same", tree, base=base)
    same = read(tmp_path / "same")
    assert all(same[key].tobytes() == tensors[key].tobytes() for key in tensors)
    save_merged(tmp_path / "out", loha_jax.interop.load_peft(path, tree), base=base)
    out = read(tmp_path / "out")
    name = next(key for key in tensors if key != "q.weight")
    stored = out["q.weight"].astype(np.float64) * spread(out[name], SHAPE, size)
    assert np.linalg.norm(stored - weight - delta) < 0.03 * np.linalg.norm(weight + delta)
    tiny, _ = adapter(tmp_path / "tiny", scale=1e-4)
    with pytest.warns(UserWarning, match="loses .* of the update, most in q.weight"):
        save_merged(tmp_path / "lost", loha_jax.interop.load_peft(tiny, tree), base=base)


def test_float8_without_scales_says_what_it_loses(tmp_path):
    weight = normal(64, 64, scale=0.05).astype(E4M3)
    base = write(tmp_path / "base", {"q.weight": weight})
    large, delta = adapter(tmp_path / "large", shape=(64, 64), scale=0.1)
    report = merge_checkpoint(base, [(large, 1.0)], tmp_path / "out")
    exact = weight.astype(np.float64) + delta
    lost = np.linalg.norm(
        exact.astype(np.float32).astype(E4M3).astype(np.float64) - exact
    ) / np.linalg.norm(delta)
    np.testing.assert_allclose(report.losses["q.weight"].share, lost, rtol=1e-3)
    small, _ = adapter(tmp_path / "small", shape=(64, 64), scale=5e-4)
    with pytest.raises(
        ValueError, match=r"float8_e4m3fn, which has no scales here, loses \d+% of the update"
    ):
        merge_checkpoint(base, [(small, 1.0)], tmp_path / "lost")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "large", "out", "small"]
    report = merge_checkpoint(base, [(small, 1.0)], tmp_path / "lost", force=True)
    assert "loses" in report.notes[-1]
    tree = {"q": {"kernel": jnp.asarray(weight.T)}}
    for path, refused in ((large, False), (small, True)):
        params = loha_jax.interop.load_peft(path, tree)
        if not refused:
            loha_jax.merge(params)
            continue
        for call in (
            lambda p=params: loha_jax.merge(p),
            lambda p=params: save_merged(tmp_path / "no", p),
        ):
            with pytest.raises(ValueError, match=r"to float8 loses .* pass force=True"):
                call()
        for call in (
            loha_jax.merge,
            lambda p, force: save_merged(tmp_path / "forced", p, force=force),
        ):
            with pytest.warns(UserWarning, match="loses .* of the update"):
                call(params, force=True)


def test_the_bfloat16_loss_is_reported_and_noted_where_it_is_large(tmp_path):
    weight = normal(64, 64).astype(ml_dtypes.bfloat16)
    base = write(tmp_path / "base", {"q.weight": weight})
    for name, scale, noted in (("large", 0.1, False), ("small", 1e-4, True)):
        path, delta = adapter(tmp_path / name, shape=(64, 64), scale=scale)
        report = merge_checkpoint(base, [(path, 1.0)], tmp_path / f"{name}_out")
        stored = read(tmp_path / f"{name}_out")["q.weight"].astype(np.float64)
        lost = np.linalg.norm(stored - weight.astype(np.float64) - delta) / np.linalg.norm(delta)
        np.testing.assert_allclose(report.losses["q.weight"].share, lost, rtol=2e-2)
        assert bool(report.notes) == noted == (lost > 0.5)


def kohya(folder, prefixes, shape=(8, 8)):
    state = {}
    for prefix in prefixes:
        for n in "12":
            state |= {
                f"{prefix}q.hada_w{n}_a": normal(shape[0], 2),
                f"{prefix}q.hada_w{n}_b": normal(2, shape[1]),
            }
        state[f"{prefix}q.alpha"] = np.float32(2)
    folder.write_bytes(safetensors_bytes(state, {}))
    return folder


def test_two_text_encoders_are_not_added_up(tmp_path):
    base = write(tmp_path / "base", {"q.weight": normal(8, 8)})
    path = kohya(tmp_path / "a.safetensors", ["lora_te1_", "lora_te2_"])
    with pytest.raises(ValueError, match=r"lora_te1_q and lora_te2_q are both q\.weight"):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    with pytest.raises(ValueError, match="lora_te1_q and lora_te2_q are both q"):
        convert_adapter(path, tmp_path / "out.safetensors", "kohya", base=base)
    assert merge_checkpoint(base, [(path, 1.0)], tmp_path / "out", only="lora_te1_.*").merged == 1


def test_names_that_give_two_modules_one_name_are_refused(tmp_path):
    base = write(tmp_path / "base", {"q.weight": normal(*SHAPE)})
    path, _ = adapter(tmp_path / "adapter", names=("a.q", "b.q"))
    names = {r"[ab]\.q": "q"}
    with pytest.raises(ValueError, match=r"a\.q and b\.q are both q\.weight"):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out", names=names)
    with pytest.raises(ValueError, match=r"a\.q and b\.q"):
        convert_adapter(path, tmp_path / "out", "peft", names=names)


def test_modules_that_were_renamed(tmp_path):
    """transformers 4.52 moved a vision-language model's parts into `model`."""
    weight = normal(*SHAPE)
    new = "model.language_model.layers.0.q_proj"
    base = write(
        tmp_path / "base",
        {f"{new}.weight": weight, "model.visual.blocks.0.q_proj.weight": normal(*SHAPE)},
    )
    old = ("language_model.model.layers.0.q_proj", "visual.blocks.0.q_proj")
    path, delta = adapter(tmp_path / "adapter", names=old)
    advice = {r"language_model\.model\.(.*)": r"model.language_model.\1"}
    with pytest.raises(ValueError, match=re.escape(f"`names={advice}` renames modules")):
        merge_checkpoint(base, [(path, 1.0)], tmp_path / "out")
    names = {
        r"language_model\.model\.(.*)": r"model.language_model.\1",
        r"visual\.(.*)": r"model.visual.\1",
    }
    assert merge_checkpoint(base, [(path, 1.0)], tmp_path / "out", names=names).merged == 2
    np.testing.assert_allclose(
        read(tmp_path / "out")[f"{new}.weight"], weight + delta, rtol=1e-5, atol=1e-5
    )
    for base_path in (None, base):
        target = tmp_path / f"converted{base_path is None}"
        done = convert_adapter(path, target, "peft", names=names, base=base_path)
        assert list(done.modules) == [new, "model.visual.blocks.0.q_proj"]
        merge_checkpoint(base, [(target, 1.0)], tmp_path / f"out{base_path is None}")
        again = read(tmp_path / f"out{base_path is None}")
        np.testing.assert_array_equal(
            again[f"{new}.weight"], read(tmp_path / "out")[f"{new}.weight"]
        )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_a_pickled_base_says_what_to_do(name, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / name).write_bytes(b"x" * 100)
    path, _ = adapter(tmp_path / "adapter")
    like = {"q": {"kernel": jax.ShapeDtypeStruct(SHAPE[::-1], jnp.float32)}}
    for place in (base, base / name):
        for call in (
            lambda p=place: merge_checkpoint(p, [(path, 1.0)], tmp_path / "o"),
            lambda p=place: load_base(p, like),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match="save_pretrained"):
                call()


def test_saved_adapters_of_a_loaded_scaled_base(tmp_path):
    tensors, _, _, config = quantised("row")
    base = write(tmp_path / "base", tensors, config)
    tree = load_base(base, {"q": {"kernel": jax.ShapeDtypeStruct(SHAPE[::-1], jnp.float32)}})
    params = loha_jax.inject(
        tree, LoHaConfig(r=2, target_modules=["q"], init_weights=False), key=jax.random.key(0)
    )
    save_peft(tmp_path / "adapter", params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a small update
        save_merged(tmp_path / "a", params, base=base)
        merge_checkpoint(base, [(tmp_path / "adapter", 1.0)], tmp_path / "b")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    np.testing.assert_allclose(a["q.weight_scale"], b["q.weight_scale"], rtol=1e-5)
    assert np.mean(a["q.weight"].view(np.uint8) == b["q.weight"].view(np.uint8)) > 0.99
