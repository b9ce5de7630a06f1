"""A LoHa fitted to a change of a weight: errors against numpy and SciPy's least squares."""

import ml_dtypes
import numpy as np
import pytest
import scipy.optimize

from loha_jax.interop import fit_loha


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def update_of(fit):
    """ΔW in float64, by PEFT's formula."""
    f = {name: factor.astype(np.float64) for name, factor in fit.factors.items()}
    first, second = (f[f"hada_w{n}_a"] @ f[f"hada_w{n}_b"] for n in "12")
    return first * second * fit.alpha / fit.r


def relative(difference, change):
    return np.linalg.norm(difference) / np.linalg.norm(change)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-30, 1e15])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_the_errors_are_those_of_the_factors_and_of_the_svd(size, alpha):
    change = size * random(24, 4, 3, 3)
    fit = fit_loha(change, 3, alpha=alpha)
    matrix = change.reshape(24, 36)
    assert fit.error == pytest.approx(relative(update_of(fit) - matrix, matrix), rel=1e-5)
    u, s, vt = np.linalg.svd(matrix)
    best_lora = (u[:, :6] * s[:6]) @ vt[:6]
    assert fit.lora_error == pytest.approx(relative(best_lora - matrix, matrix), rel=1e-9)
    assert (fit.r, fit.alpha) == (3, alpha or 3.0)
    assert fit.size == pytest.approx(size * np.linalg.norm(matrix / size), rel=1e-9)
    assert {name: f.shape for name, f in fit.factors.items()} == {
        "hada_w1_a": (24, 3), "hada_w1_b": (3, 36), "hada_w2_a": (24, 3), "hada_w2_b": (3, 36),
    }  # fmt: skip
    assert all(f.dtype == np.float32 for f in fit.factors.values())


def test_random_matrices_are_held_better_than_by_lora():
    """The case of ABBA's study of reconstruction: all directions matter alike."""
    fit = fit_loha(random(96, 128), 4)
    assert fit.error < fit.lora_error - 0.01


def test_a_change_of_few_directions_is_held_better_by_lora():
    fit = fit_loha(random(96, 8) @ random(8, 128, seed=1), 4)
    assert fit.lora_error < 1e-6
    assert fit.error > 0.1


def test_a_change_of_rank_one_is_found_again():
    assert fit_loha(random(10, 1) @ random(1, 12, seed=1), 2).error < 1e-3


def test_it_is_as_good_as_least_squares_in_float64():
    change, r = random(9, 11), 2

    def missing(flat):
        a1, b1, a2, b2 = np.split(flat, np.cumsum([18, 22, 18]))
        first, second = (a.reshape(9, r) @ b.reshape(r, 11) for a, b in ((a1, b1), (a2, b2)))
        return (first * second - change).ravel()

    found = [
        scipy.optimize.least_squares(missing, random(80, seed=seed), max_nfev=50).cost
        for seed in range(6)
    ]
    least = np.sqrt(2 * min(found)) / np.linalg.norm(change)
    assert fit_loha(change, r, starts=3, steps=500).error < 1.03 * least


def product_of_pairs(seed):
    """The update of a LoHa of rank 2."""
    a1, a2 = (random(10, 2, seed=seed + n) for n in (0, 2))
    b1, b2 = (random(2, 12, seed=seed + n) for n in (1, 3))
    return (a1 @ b1) * (a2 @ b2)


def test_the_update_of_a_loha_is_found_again():
    assert fit_loha(product_of_pairs(0), 2).error < 1e-3


def test_more_starts_find_what_the_first_does_not():
    errors = [fit_loha(product_of_pairs(16), 2, starts=starts).error for starts in (1, 4, 12)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[0] > 0.1
    assert errors[2] < 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_pair_is_the_difference_of_its_weights(dtype):
    base = random(10, 12).astype(dtype)
    tuned = (base.astype(np.float32) + 0.1 * random(10, 12, seed=1)).astype(dtype)
    change = tuned.astype(np.float32) - base.astype(np.float32)
    fit = fit_loha((tuned, base), 2)
    assert fit.error == pytest.approx(relative(update_of(fit) - change, change), rel=1e-5)


def test_a_pair_of_float64_is_subtracted_in_float64():
    base = 1e8 * random(10, 12)
    change = 0.1 * random(10, 12, seed=1)
    fit = fit_loha((base + change, base), 2)
    assert fit.error == pytest.approx(relative(update_of(fit) - change, change), rel=1e-4)


def test_no_change_is_an_update_of_zero_that_can_be_trained():
    fit = fit_loha(np.zeros((3, 4)), 2)
    assert (fit.error, fit.lora_error) == (0, 0)
    assert not update_of(fit).any()
    others = [f for name, f in fit.factors.items() if name != "hada_w2_a"]
    assert all(f.all() for f in others)


def test_a_rank_above_the_matrix_holds_it_whole():
    fit = fit_loha(random(2, 3), 4)
    assert fit.lora_error == 0
    assert fit.error < 1e-3


SQUARE = np.eye(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SQUARE, 0), "`r` should be a positive integer value but the value passed is 0"),
        ((SQUARE, 2.0), "`r` should be a positive integer"),
        ((SQUARE, True), "`r` should be a positive integer"),
        ((np.ones(3), 2), r"should be \[out, in\].*has the shape \[3\]"),
        ((SQUARE * np.nan, 2), "not finite"),
        (((SQUARE, np.eye(4)), 2), r"\[3, 3\] and the base weight \[4, 4\]"),
        (((SQUARE,), 2), "a tuple of 1"),
        (([SQUARE, SQUARE], 2), "not a list"),
        ((1j * SQUARE, 2), "complex"),
        ((np.zeros((0, 4)), 2), r"not empty, but has the shape \[0, 4\]"),
        ((1e200 * SQUARE, 2), "up to 1e\\+200; with alpha=2, .* too large or too small"),
        ((1e-200 * SQUARE, 2), "up to 1e-200"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_loha(*arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0),
        ("alpha", np.nan),
        ("alpha", "8"),
        ("alpha", 10**400),
        ("steps", 0),
        ("starts", 1.5),
    ],
)
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be a positive"):
        fit_loha(SQUARE, 2, **{name: value})


def test_an_alpha_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="alpha=1e-300, the factors would be too large"):
        fit_loha(SQUARE, 2, alpha=1e-300)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_parameters_of_torch_are_read(dtype):
    torch = pytest.importorskip("torch", reason="the main test run has it")
    weight = torch.nn.Parameter(torch.tensor(random(10, 12), dtype=getattr(torch, dtype)))
    fit = fit_loha((weight, 0 * weight), 2)
    change = weight.detach().double().numpy()
    assert fit.error == pytest.approx(relative(update_of(fit) - change, change), rel=1e-5)


def test_scalars_of_numpy_are_numbers():
    fit = fit_loha(random(10, 12), np.int64(2), alpha=np.float32(4), steps=np.int32(5))
    assert (fit.r, fit.alpha) == (2, 4.0)
