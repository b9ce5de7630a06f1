"""Base checkpoints that hold no plain values.

Scaled float8 is merged, everything else is refused by name.
"""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from merge_inputs import read_all
from quantised_bases import E4M3, FORMS, SHAPE, adapter, quantised, spread, write

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.interop import NameMap, load_base, save_merged, save_peft
from loha_jax.interop.commands.convert import convert_adapter
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.runtime.untrusted import FileError

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
    "GPTQ": (
        {"q.qweight": INT, "q.qzeros": INT, "q.scales": ONE, "q.g_idx": INT[0]},
        {},
        r"q\.qweight.*GPTQ or AWQ",
    ),
    "compressed-tensors": ({"q.weight_packed": INT, "q.weight_scale": ONE}, {}, "weight_packed"),
    "torchao": ({"q._weight_qdata": INT, "q._weight_scale": ONE}, {}, "torchao"),
    "quanto": ({"q.weight._data": INT, "q.weight._scale": ONE}, {}, r"q\.weight\._data"),
    "MXFP8": (
        {"q.weight": F8, "q.weight_scale": np.ones((8, 1), np.uint8)},
        {},
        "q.weight_scale, which holds uint8",
    ),
    "another spelling": ({"q.weight": F8, "q.scale": ONE}, {}, r"unknown form \(q\.scale\)"),
    "two scales": (
        {"q.weight": F8, "q.weight_scale": ONE, "q.weight_scale_2": ONE},
        {},
        "unknown form",
    ),
    "no scale": (
        {"q.weight": F8},
        {"quant_method": "fp8"},
        "has no scale, though quantization_config",
    ),
    "a marker": (
        {"q.weight": F8, "scaled_fp8": np.ones(2, E4M3)},
        {},
        "has no scale, though scaled_fp8",
    ),
    "blocks of unknown size": (
        {"q.weight": F8, "q.weight_scale_inv": np.ones((2, 2), np.float32)},
        {},
        "does not fit",
    ),
    "blocks that do not fit": (
        {"q.weight": F8, "q.weight_scale_inv": np.ones((2, 2), np.float32)},
        {"quant_method": "fp8", "weight_block_size": [3, 3]},
        r"does not fit its scale q\.weight_scale_inv \[2, 2\]; weight_block_size in config.json "
        r"is \[3, 3\]",
    ),
    "a scaled bfloat16": (
        {"q.weight": np.ones((8, 8), ml_dtypes.bfloat16), "q.weight_scale": ONE},
        {},
        "float8 only",
    ),
    "a scale of NaN": (
        {"q.weight": F8, "q.weight_scale": ONE * np.nan},
        {},
        "negative or not finite",
    ),
}


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
    same = read_all(tmp_path / "same")
    assert all(same[key].tobytes() == tensors[key].tobytes() for key in tensors)
    save_merged(tmp_path / "out", loha_jax.interop.load_peft(path, tree), base=base)
    out = read_all(tmp_path / "out")
    name = next(key for key in tensors if key != "q.weight")
    stored = out["q.weight"].astype(np.float64) * spread(out[name], SHAPE, size)
    assert np.linalg.norm(stored - weight - delta) < 0.03 * np.linalg.norm(weight + delta)
    tiny, _ = adapter(tmp_path / "tiny", scale=1e-4)
    with pytest.warns(UserWarning, match="loses .* of the update, most in q.weight"):
        save_merged(tmp_path / "lost", loha_jax.interop.load_peft(tiny, tree), base=base)


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
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    np.testing.assert_allclose(a["q.weight_scale"], b["q.weight_scale"], rtol=1e-5)
    assert np.mean(a["q.weight"].view(np.uint8) == b["q.weight"].view(np.uint8)) > 0.99
