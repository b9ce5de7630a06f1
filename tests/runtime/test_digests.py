import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_arrays import normal_array

from loha_jax.runtime.digests import digests, grid

DTYPES = [
    *("bool", "int8", "uint16", "int32", "uint32", "float16", "float32", "complex64", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "int4", "uint4", "float4_e2m1fn"),
]


def of(array, **options):
    return digests({"x": array}, **options)["x"]


def draw(shape, dtype, seed=0):
    values = np.random.default_rng(seed).integers(
        -7 if np.dtype(dtype).kind != "u" else 0, 7, shape
    )
    return values.astype(jnp.dtype(dtype))


def mixed(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def by_hand(array):
    """The definition, element by element in Python's integers, for elements of 4 bytes."""
    sums = [0, 0]
    for index, value in np.ndenumerate(array.view(np.uint32)):
        place = sum(
            mixed((n + 0x9E3779B9 * (axis + 1)) % 2**32) for axis, n in enumerate((*index, 0))
        )
        for lane, (m, n) in enumerate([(0x85EBCA6B, 1), (0x27D4EB2F, 0x165667B1)]):
            sums[lane] += mixed((int(value) * m + place * n) % 2**32)
    return "".join(f"{total % 2**32:08x}" for total in sums)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 1)])
def test_the_definition(shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert of(array) == of(jnp.asarray(array)) == by_hand(np.asarray(array))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_jax_agree_and_every_element_counts(dtype):
    array = draw((3, 4), dtype)
    assert of(array) == of(jnp.asarray(array))
    found = {of(array)}
    for index in np.ndindex(array.shape):
        other = array.copy()
        other[index] = not other[index] if dtype == "bool" else (0 if other[index] else 1)
        found.add(of(other))
    assert len(found) == 13


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_wide_types_agree(dtype, x64):
    array = draw((3, 4), dtype) / 3 if dtype != "int64" else draw((3, 4), dtype) << 40
    assert of(array) == of(jnp.asarray(array))
    assert of(array) != of(np.nextafter(array, 1) if dtype == "float64" else array + 1)


def test_the_words_of_traced_arrays_are_those_of_numpy():
    """Accelerators hash their own shards; on a CPU that path is not taken."""
    from loha_jax.runtime.digests import _device_words, _host_words

    for dtype in DTYPES:
        array = draw((3, 2), dtype)
        np.testing.assert_array_equal(
            _device_words(jnp.asarray(array)), _host_words(array), err_msg=dtype
        )


@given(st.data())
@settings(max_examples=40)
def test_what_is_swapped_or_flipped_is_found(data):
    size = data.draw(st.integers(2, 300))
    array = (
        np.random.default_rng(size)
        .normal(size=size)
        .astype(data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16])))
    )
    other = array.copy()
    a, b = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    other[[a, b]] = other[[b, a]]
    flipped = array.view(np.uint8).copy()
    flipped[data.draw(st.integers(0, flipped.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert len({of(array), of(flipped.view(array.dtype))}) == 2
    assert (of(other) == of(array)) == (array[a] == array[b])


@pytest.mark.parametrize(
    "shape", [(8, 4096, 300), (3,), (), (128256, 64), (0, 5), (90, 90, 90, 90)]
)
def test_a_sample_is_bounded_and_spread(shape):
    indices = grid(shape, 1 << 12)
    assert np.prod([len(i) for i in indices]) <= 1 << 12
    for i, size in zip(indices, shape, strict=True):
        assert len(set(i)) == len(i) >= min(size, 2)
        assert ((i >= 0) & (i < size)).all()
        assert size < 2 or i[-1] - i[0] >= size / 2 - 1


def test_a_sample_sees_what_it_reads():
    array = np.zeros((6, 200, 300), np.float32)
    indices = grid(array.shape, 1000)
    other = array.copy()
    other[5, indices[1][3], indices[2][-1]] = 1
    unseen = array.copy()
    unseen[5, indices[1][3] + 1, indices[2][-1]] = 1
    whole = of(array, sample=1000)
    assert of(other, sample=1000) != whole
    assert of(unseen, sample=1000) == whole
    assert of(jnp.asarray(other), sample=1000) == of(other, sample=1000)
    assert of(np.ones((3, 4)), sample=1000) == of(np.ones((3, 4)))


def test_empty_arrays_and_none():
    assert digests({}) == {}
    assert digests({"a": np.zeros((0, 3)), "b": jnp.zeros((2, 0))}) == {
        "a": "0" * 16,
        "b": "0" * 16,
    }


def test_the_names_keep_their_order():
    arrays = {name: normal_array(n, (4,)) for n, name in enumerate("zyxabc")}
    found = digests(arrays)
    assert list(found) == list(arrays)
    assert found == {name: of(array) for name, array in arrays.items()}
