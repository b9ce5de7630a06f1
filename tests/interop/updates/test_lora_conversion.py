"""LoHa as LoRA and back: the mathematics against dense float64, the files, and what is refused."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_folders import dense

from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.updates.lora_conversion import loha_of, lora_of


def loha(shape, r, cp=False, seed=0, alpha=3.0, dtype=np.float32):
    """A module with random factors for a weight `[out, in/groups, *spatial]`."""
    random = np.random.default_rng(seed)
    out, in_, *spatial = shape
    if cp:
        core = (r, r, *spatial, *((1,) if len(spatial) == 1 else ()))
        shapes = {
            "w1_a": (r, out),
            "w1_b": (r, in_),
            "w2_a": (r, out),
            "w2_b": (r, in_),
            "t1": core,
            "t2": core,
        }
    else:
        a, b = (out, r), (r, in_ * math.prod(spatial))
        shapes = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
    tensors = {
        f"hada_{part}": random.standard_normal(s).astype(dtype) for part, s in shapes.items()
    }
    return AdapterModule("m", "loha", r, alpha, tensors)


def over_all_channels(weight, groups):
    """A grouped convolution's weight as that of one without groups, `[out, in, *spatial]`."""
    out, in_ = weight.shape[:2]
    whole = np.zeros((out, groups * in_, *weight.shape[2:]))
    for row in range(out):
        group = row // (out // groups)
        whole[row, group * in_ : (group + 1) * in_] = weight[row]
    return whole


def dense_lora(module):
    """PEFT's lora_A and grouped lora_B as one convolution over all channels."""
    a, b = (module.tensors[part].astype(np.float64) for part in ("lora_A", "lora_B"))
    out, slots = b.shape[:2]
    groups = a.shape[0] // slots
    rows = []
    for row in range(out):
        own = a[(row // (out // groups)) * slots :][:slots]
        rows.append(np.tensordot(b[row].reshape(-1), own, 1))
    return np.stack(rows) * module.alpha / module.r


LINEAR, WIDE, CONV1D, CONV2D, CONV3D = (9, 7), (4, 30), (6, 4, 3), (6, 4, 3, 2), (5, 3, 2, 1, 3)


CASES = [
    pytest.param(
        shape,
        r,
        cp,
        groups,
        id=f"{'x'.join(map(str, shape))}-r{r}{'-cp' * cp}{f'-g{groups}' * (groups > 1)}",
    )
    for shape, r, cp, groups in [
        (LINEAR, 1, False, 1),
        (LINEAR, 2, False, 1),
        (LINEAR, 3, False, 1),  # r² larger than both axes
        (WIDE, 3, False, 1),  # r² larger than out
        (CONV1D, 2, False, 1),
        (CONV1D, 2, True, 1),
        (CONV2D, 2, False, 1),
        (CONV2D, 2, True, 1),
        ((6, 4, 1, 1), 2, False, 1),
        (CONV3D, 2, False, 1),
        (CONV3D, 2, True, 1),
        (CONV2D, 1, False, 2),
        (CONV2D, 2, False, 3),
        (CONV2D, 2, True, 2),
        ((6, 1, 3, 3), 2, False, 6),  # depthwise
        ((8, 2, 3), 2, True, 4),
    ]
]


@pytest.mark.parametrize(("shape", "r", "cp", "groups"), CASES)
def test_the_exact_lora(shape, r, cp, groups):
    module = loha(shape, r, cp, dtype=np.float64)
    lora, error = lora_of(module, shape=shape, groups=groups)
    want = dense(module, shape)
    np.testing.assert_allclose(
        dense_lora(lora), over_all_channels(want, groups), rtol=0, atol=1e-12 * np.abs(want).max()
    )
    assert error == 0
    per_group = min(r * r, shape[0] // groups, math.prod(shape[1:]))
    assert lora.r == lora.alpha == groups * per_group
    assert lora.tensors["lora_A"].shape == (lora.r, groups * shape[1], *shape[2:])
    assert lora.tensors["lora_B"].shape == (shape[0], per_group, *(1,) * (len(shape) - 2))


def singular_values(weight, groups):
    """Squares of a dense weight's, group by group: `[groups, n]`."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, -1)
    return np.linalg.svd(blocks, compute_uv=False) ** 2


@pytest.mark.parametrize(("shape", "r", "cp", "groups"), CASES)
def test_a_smaller_rank_is_the_best_one(shape, r, cp, groups):
    """A smaller rank is the best one and its error the measured one."""
    module = loha(shape, r, cp, dtype=np.float64)
    want = dense(module, shape)
    squares = singular_values(want, groups)
    exact, _ = lora_of(module, shape=shape, groups=groups)
    for rank in range(1, exact.r + 3):
        lora, error = lora_of(module, rank, shape=shape, groups=groups)
        slots = min(math.ceil(rank / groups), exact.r // groups)
        assert lora.r == slots * groups
        difference = dense_lora(lora) - over_all_channels(want, groups)
        measured = np.linalg.norm(difference) / np.linalg.norm(want)
        best = math.sqrt(squares[:, slots:].sum() / squares.sum())  # Eckart and Young
        assert measured == pytest.approx(best, abs=1e-7)
        assert error == pytest.approx(measured, abs=1e-7)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    r=st.integers(1, 3),
    energy=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_an_energy_threshold(shape, r, energy, seed):
    """An energy threshold keeps the fewest singular values that reach it."""
    module = loha(shape, r, seed=seed, dtype=np.float64)
    squares = singular_values(dense(module, shape), 1)[0]
    lora, error = lora_of(module, energy=energy)
    kept = squares[: lora.r].sum() / squares.sum()
    before = squares[: lora.r - 1].sum() / squares.sum()
    assert before - 1e-12 < energy <= kept + 1e-12
    assert 1 - error**2 == pytest.approx(kept, abs=1e-9)


def test_an_energy_of_all_groups_counts_together():
    module = loha((8, 2, 3, 3), 2, dtype=np.float64)
    squares = singular_values(dense(module, (8, 2, 3, 3)), 2)
    lora, error = lora_of(module, energy=0.8, shape=(8, 2, 3, 3), groups=2)
    slots = lora.r // 2
    assert squares[:, : slots - 1].sum() < 0.8 * squares.sum() <= squares[:, :slots].sum()
    assert error == pytest.approx(math.sqrt(squares[:, slots:].sum() / squares.sum()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [{}, {"rank": 3}, {"energy": 0.5}, {"energy": 1.0}])
def test_no_update_is_rank_one_of_zeros(limit, groups):
    module = loha((4, 3), 2)
    module.tensors["hada_w2_b"][:] = 0
    lora, error = lora_of(module, **limit, shape=(4, 3, 1), groups=groups)
    assert (lora.r, error) == (groups, 0)
    assert not lora.tensors["lora_A"].any()
    assert not lora.tensors["lora_B"].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_low_precision_is_computed_in_float64(dtype):
    """Low precision is computed in float64 and given in float32."""
    module = loha((40, 30), 3, dtype=dtype)
    want = dense(module, (40, 30))
    for rank, slack in ((None, 0), (5, np.sqrt(singular_values(want, 1)[0][5:].sum()))):
        lora, _ = lora_of(module, rank)
        assert {t.dtype for t in lora.tensors.values()} == {np.dtype(np.float32)}
        assert np.linalg.norm(dense_lora(lora) - want) <= slack + 1e-6 * np.linalg.norm(want)


def test_a_lora_can_be_lowered_in_rank_too():
    module = loha((9, 7), 2, dtype=np.float64)
    lora, _ = lora_of(module)
    direct, twice = lora_of(module, 2), lora_of(lora, 2)
    assert twice[1] == pytest.approx(direct[1])
    np.testing.assert_allclose(dense_lora(twice[0]), dense_lora(direct[0]), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({}, {"rank": 1, "energy": 0.5}, "`rank` or `energy`, not both"),
        ({}, {"rank": 0}, "`rank` should be a positive integer"),
        ({}, {"rank": True}, "`rank` should be a positive integer"),
        ({}, {"rank": 0.5}, "`rank` should be a positive integer"),
        ({}, {"energy": 0.0}, r"`energy` should be a share in \(0, 1\]"),
        ({}, {"energy": 1.5}, r"`energy` should be a share in \(0, 1\]"),
        ({}, {"energy": float("nan")}, r"`energy` should be a share in \(0, 1\]"),
        ({}, {"shape": (4, 5)}, r"m has 4 rows and 6 columns; the weight's shape \[4, 5\]"),
        (
            {},
            {"shape": (4, 2, 3), "groups": 3},
            "m has 4 out channels, which 3 groups do not divide",
        ),
        (
            {},
            {"shape": (4, 2, 3), "groups": 0},
            "The groups of m should be a positive integer value but are 0",
        ),
        ({"dora_scale": np.ones((1, 6))}, {}, r"m has norms per input feature \[1, 6\]"),
        (
            {"dora_scale": np.ones((4, 1, 1))},
            {"shape": (4, 2, 3), "groups": 2},
            "m is a convolution in 2 groups with",
        ),
    ],
)
def test_what_lora_of_refuses(change, kwargs, message):
    module = dataclasses.replace(loha((4, 6), 2), **change)
    with pytest.raises(ValueError, match=message):
        lora_of(module, **kwargs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_named(value):
    module = loha((4, 6), 2)
    module.tensors["hada_w2_a"][1, 1] = value
    with pytest.raises(ValueError, match=r"m\.hada_w2_a has values that are not finite"):
        lora_of(module, 1)


@pytest.mark.parametrize(
    ("shape", "groups"), [((5, 4), 1), ((6, 4, 3), 1), ((6, 2, 3, 3), 2), ((6, 1, 2), 6)]
)
@pytest.mark.parametrize("random", [False, True])
def test_a_lora_is_exactly_a_loha_and_back(shape, groups, random):
    lora, _ = lora_of(loha(shape, 2), shape=shape, groups=groups)
    spare = np.random.default_rng(1).standard_normal((shape[0], lora.r)) if random else None
    back = loha_of(dataclasses.replace(lora, alpha=0.5), spare)
    assert (back.kind, back.r, back.alpha) == ("loha", lora.r, 0.5)
    got = over_all_channels(dense(back, shape), groups)
    np.testing.assert_allclose(got, dense_lora(lora) * 0.5 / lora.r, atol=1e-12)
    again, error = lora_of(back, shape=shape, groups=groups)
    # the columns that are zero do not count: the rank is LoRA's own, but for the blocks of groups
    assert again.r <= lora.r
    assert error == 0
    np.testing.assert_allclose(dense_lora(again), got, atol=1e-6)
