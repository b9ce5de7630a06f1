"""Checkpoints that bitsandbytes has packed, read as floats."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import loha_jax
from loha_jax.interop import FileError, load_base, save_merged

RNG = np.random.default_rng(0)


def four_bits(shape, block, nested=None, prefix="", dtype="float32"):
    """Tensors of a weight in bitsandbytes' form, and its values, one by one by the formula."""
    size = int(np.prod(shape))
    codes = RNG.integers(0, 16, size + size % 2)
    table = np.sort(RNG.normal(size=16)).astype(np.float32)
    blocks = -(-size // block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": list(shape)}
    tensors = {
        "": np.array([16 * a + b for a, b in codes.reshape(-1, 2)], np.uint8)[:, None],
        ".quant_map": table,
    }
    if nested is None:
        absmax = tensors[".absmax"] = RNG.uniform(0.5, 2, blocks).astype(np.float32)
    else:
        tensors[".absmax"] = RNG.integers(0, 256, blocks).astype(np.uint8)
        tensors[".nested_quant_map"] = np.sort(RNG.normal(size=256)).astype(np.float32)
        tensors[".nested_absmax"] = RNG.uniform(0.5, 2, -(-blocks // nested)).astype(np.float32)
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = np.array(
            [
                tensors[".nested_quant_map"][code] * tensors[".nested_absmax"][n // nested]
                + np.float32(0.25)
                for n, code in enumerate(tensors[".absmax"])
            ]
        )
    values = [table[codes[n]] * absmax[n // block] for n in range(size)]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[".quant_state.bitsandbytes__nf4"] = text
    named = {f"{prefix}q.weight{name}": tensor for name, tensor in tensors.items()}
    kind = getattr(ml_dtypes, dtype, None) or dtype
    return named, np.array(values, np.float32).astype(kind).reshape(shape)


STATE = "q.weight.quant_state.bitsandbytes__nf4"


def state(**fields):
    known = {"quant_type": "nf4", "blocksize": 16, "dtype": "float32", "shape": [8, 16]}
    return {STATE: np.frombuffer(json.dumps(known | fields).encode(), np.uint8)}


def loaded(folder, tensors, shape, **kwargs):
    save_file(tensors, folder / "model.safetensors")
    like = {"q": {"kernel": jax.ShapeDtypeStruct(shape[::-1], jnp.float32)}}
    return np.asarray(load_base(folder, like, **kwargs)["q"]["kernel"]).T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize(("shape", "block"), [((8, 16), 16), ((7, 5), 8), ((4, 6), 64)])
def test_four_bits(shape, block, nested, prefix, dtype, tmp_path):
    tensors, want = four_bits(shape, block, nested, prefix, dtype)
    got = loaded(tmp_path, tensors, shape)
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_eight_bits(tmp_path):
    values = RNG.integers(-127, 128, (4, 6)).astype(np.int8)
    largest = RNG.uniform(0.5, 2, 4).astype(np.float32)
    form = np.array(0, np.uint8)
    tensors = {"q.weight": values, "q.SCB": largest, "q.weight_format": form}
    got = loaded(tmp_path, tensors, (4, 6))
    np.testing.assert_allclose(got, values * largest[:, None] / 127, rtol=1e-6)


@pytest.mark.parametrize("form", [1, 2, 3])
def test_eight_bits_in_tiles(form, tmp_path):
    """bitsandbytes' layouts for some GPUs."""
    tensors = {"q.weight": np.ones((4, 6), np.int8), "q.SCB": np.ones(4, np.float32)}
    with pytest.raises(FileError, match=r"q\.weight_format.*not stored row by row.*dequantize"):
        loaded(tmp_path, tensors | {"q.weight_format": np.array(form, np.uint8)}, (4, 6))


def test_a_state_with_nulls(tmp_path):
    tensors, want = four_bits((8, 16), 16)
    tensors |= state(nested_blocksize=None, nested_offset=None)
    np.testing.assert_array_equal(loaded(tmp_path, tensors, (8, 16)), want.astype(np.float32))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_of_bitsandbytes(kind, nested, dtype, tmp_path):
    """The very values that bitsandbytes unpacks."""
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import save_file as save_torch

    weight = torch.randn(30, 50, dtype=getattr(torch, dtype))
    packed, state = quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=nested)
    parts = {f"q.weight.{name}": x.contiguous() for name, x in state.as_dict(packed=True).items()}
    save_torch({"q.weight": packed, **parts}, tmp_path / "model.safetensors")
    like = {"q": {"kernel": jax.ShapeDtypeStruct((50, 30), jnp.float32)}}
    got = np.asarray(load_base(tmp_path, like)["q"]["kernel"]).T
    np.testing.assert_array_equal(got, dequantize_4bit(packed, state).float().numpy())


def test_merges_are_refused(tmp_path):
    tensors, _ = four_bits((8, 16), 16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
    params = loha_jax.inject({"q": {"kernel": jnp.ones((16, 8))}}, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"bitsandbytes__nf4, .*4-bit nf4.*model\.dequantize\(\)"):
        save_merged(tmp_path / "merged", params, base=tmp_path)
    assert not (tmp_path / "merged").exists()


BROKEN = {
    "no JSON": ({STATE: np.ones(4, np.uint8)}, "is not JSON"),
    "a number": ({STATE: np.frombuffer(b"3", np.uint8)}, "no JSON object"),
    "long": ({STATE: np.ones(1 << 15, np.uint8)}, "no short text"),
    "floats": ({STATE: np.ones(4, np.float32)}, "no short text"),
    "no shape": (state(shape=None), "shape None"),
    "negative": (state(shape=[-8, -16]), r"shape \[-8, -16\]"),
    "many axes": (state(shape=[8, 16] + [1] * 98), "which no weight has"),
    "another shape": (state(shape=[8, 18]), "to hold 72 values of uint8"),
    "a large shape": (state(shape=[1 << 40, 1 << 40]), "values of uint8"),
    "a block of 0": (state(blocksize=0), "blocksize 0"),
    "a large block": (state(blocksize=1 << 40), "absmax to hold 1 values of float32"),
    "another dtype": (state(dtype="int8"), "dtype 'int8'"),
    "a list": (state(dtype=["float32"]), "which no weight has"),
    "a block of 17": (state(blocksize=17), "blocksize 17"),
    "an offset": (state(nested_blocksize=4, nested_offset=10**400), "which no weight has"),
    "not in float16": (
        state(dtype="float16") | {"q.weight.absmax": np.full(8, 1e6, np.float32)},
        "values that float16 does not",
    ),
    "nested by half": (state(nested_blocksize=4), "nested_offset None"),
    "nested": (state(nested_blocksize=4, nested_offset=0.1), "values of uint8, and it is float32"),
    "scales": ({"q.weight.absmax": np.ones(7, np.float32)}, "absmax to hold 8 values of float32"),
    "NaN": ({"q.weight.absmax": np.full(8, np.nan, np.float32)}, "not finite"),
}


@pytest.mark.parametrize(("tensors", "message"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_together(tensors, message, tmp_path):
    whole, _ = four_bits((8, 16), 16)
    with pytest.raises(FileError, match=message):
        loaded(tmp_path, whole | tensors, (8, 16))


def test_a_part_that_is_missing(tmp_path):
    whole, _ = four_bits((8, 16), 16)
    del whole["q.weight.quant_map"]
    with pytest.raises(FileError, match=r"needs q\.weight\.quant_map, which is not there"):
        loaded(tmp_path, whole, (8, 16))
