"""Adapters merged into scaled float8, and what rounding loses."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from merge_inputs import read_all
from quantised_bases import (
    E4M3,
    E5M2,
    FORMS,
    SHAPE,
    adapter,
    normal,
    quantised,
    spread,
    write,
)

import loha_jax
from loha_jax.interop import save_merged
from loha_jax.interop.disk.tensor_files import safetensors_bytes
from loha_jax.interop.merge.files import merge_checkpoint


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("form", FORMS)
def test_a_merge_into_scaled_float8(form, dtype, tmp_path, monkeypatch):
    """Every stored value is within half a unit of float8 of W + ΔW.

    The report's error is the true one.
    """
    monkeypatch.setattr("loha_jax.interop.merge.shard._BLOCK", 500)  # several blocks of rows
    tensors, weight, size, config = quantised(form, dtype)
    extra = {"q.input_scale": np.array([0.3], np.float32), "other.weight": normal(3, 3)}
    base = write(tmp_path / "base", {**tensors, **extra}, config)
    path, delta = adapter(tmp_path / "adapter", scale=0.1)
    report = merge_checkpoint(base, [(path, 0.5)], tmp_path / "out")
    out = read_all(tmp_path / "out")
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
    out = read_all(tmp_path / "out")
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
    out = read_all(tmp_path / "out")
    stored = out["q.weight"].astype(np.float64) * spread(out["q.weight_scale_inv"], SHAPE, size)
    assert np.linalg.norm(stored - weight - delta) < 0.04 * np.linalg.norm(weight + delta)
    with pytest.raises(
        ValueError, match=r"scaled by q.weight_scale_inv, which is in another shard"
    ):
        merge_checkpoint(base / "b.safetensors", [(path, 1.0)], tmp_path / "out2")


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
    small, _ = adapter(tmp_path / "small", shape=(64, 64), scale=1e-4)
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


def test_the_loss_by_rounding_to_bfloat16(tmp_path):
    """The bfloat16 loss is reported and noted where it is large."""
    weight = normal(64, 64).astype(ml_dtypes.bfloat16)
    base = write(tmp_path / "base", {"q.weight": weight})
    for name, scale, noted in (("large", 0.1, False), ("small", 1e-4, True)):
        path, delta = adapter(tmp_path / name, shape=(64, 64), scale=scale)
        report = merge_checkpoint(base, [(path, 1.0)], tmp_path / f"{name}_out")
        stored = read_all(tmp_path / f"{name}_out")["q.weight"].astype(np.float64)
        lost = np.linalg.norm(stored - weight.astype(np.float64) - delta) / np.linalg.norm(delta)
        np.testing.assert_allclose(report.losses["q.weight"].share, lost, rtol=2e-2)
        assert bool(report.notes) == noted == (lost > 0.5)
