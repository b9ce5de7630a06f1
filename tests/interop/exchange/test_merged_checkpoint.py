"""`save_merged`: what is copied, what is merged, and what is never overwritten."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base_folders import small, write
from safetensors import safe_open
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.disk.checkpoint_writer import parse_size


def test_what_the_tree_does_not_hold_is_copied_through(tmp_path):
    folder, tree, tensors = small(tmp_path / "base")
    write(
        folder,
        {**tensors, "vision.weight": np.ones((2, 2), np.float16), "steps": np.array(3, np.int64)},
    )
    (folder / "config.json").write_text('{"model_type": "x"}')
    params = interop.load_base(folder, tree, strict=False)
    adapted = loha_jax.inject(
        params, LoHaConfig(r=2, target_modules=["b"], init_weights=False), key=jax.random.key(0)
    )
    interop.save_merged(tmp_path / "new", adapted, base=folder)
    again = load_file(tmp_path / "new" / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in again.items()} == {
        k: (v.dtype, v.shape) for k, v in load_file(folder / "model.safetensors").items()
    }
    np.testing.assert_array_equal(again["a.weight"], tensors["a.weight"])
    merged = np.asarray(loha_jax.merge(adapted)["b"]["kernel"])
    np.testing.assert_array_equal(again["b.weight"], merged.T)
    assert (tmp_path / "new" / "config.json").read_text() == (folder / "config.json").read_text()
    with safe_open(tmp_path / "new" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # without the adapter, and with a chosen one
    for adapters, want in ([], tensors["b.weight"]), (["default"], merged.T):
        interop.save_merged(tmp_path / f"n{len(adapters)}", adapted, base=folder, adapters=adapters)
        np.testing.assert_array_equal(
            load_file(tmp_path / f"n{len(adapters)}" / "model.safetensors")["b.weight"], want
        )
    with pytest.raises(ValueError, match="zzz"):
        interop.save_merged(tmp_path / "n3", adapted, base=folder, adapters=["zzz"])


def test_saved_modules_are_written_with_their_trained_copies(tmp_path):
    folder, tree, _ = small(tmp_path / "base")
    params = interop.load_base(folder, tree)
    config = LoHaConfig(r=2, target_modules=["a"], modules_to_save=["b"])
    adapted = loha_jax.inject(params, config, key=jax.random.key(0))
    copies = {"default": adapted["b"]["kernel"].copies["default"] + 1}
    adapted["b"]["kernel"] = loha_jax.SavedWeight(
        adapted["b"]["kernel"].original,
        copies,
        adapted["b"]["kernel"].layout,
        "b.weight",
        ("default",),
    )
    for base in (folder, None):
        target = tmp_path / f"new{base is None}"
        interop.save_merged(target, adapted, base=base)
        np.testing.assert_array_equal(
            load_file(target / "model.safetensors")["b.weight"], copies["default"].T
        )


def test_nothing_is_written_over_and_nothing_half(tmp_path, monkeypatch):
    folder, tree, _ = small(tmp_path / "base")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds weights \(model.safetensors\)"):
        interop.save_merged(folder, tree, base=folder)
    with pytest.raises(NotADirectoryError, match="is a file"):
        interop.save_merged(folder / "model.safetensors", tree)
    assert (folder / "model.safetensors").read_bytes() == before
    message = r"cannot be saved; nothing was written. leaves that do not fit \(1\): x.weight"
    with pytest.raises(ValueError, match=message):
        interop.save_merged(
            tmp_path / "new", {**tree, "x": {"kernel": jnp.ones((2, 2))}}, base=folder
        )
    assert not (tmp_path / "new").exists()
    nan = {"a": {"kernel": jnp.full((3, 4), jnp.nan)}}
    nan = loha_jax.inject(nan, LoHaConfig(r=1, target_modules=["a"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="NaNs or infinities"):
        interop.save_merged(tmp_path / "new", nan, safe=True)
    assert not list(tmp_path.glob("*new*"))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="disk full"):
        interop.save_merged(tmp_path / "new", tree, base=folder)
    assert not list(tmp_path.glob("*new*"))


def test_a_parameter_of_no_module(tmp_path):
    """A parameter of no module needs the checkpoint that names it."""
    tree = {"emb": {"cls_token": jnp.ones((1, 1, 4))}, "wq": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="give `base=`"):
        interop.save_merged(tmp_path / "new", tree)
    base = write(
        tmp_path,
        {"emb.cls_token": np.ones((1, 1, 4), np.float32), "wq.weight": np.ones((4, 3), np.float32)},
    )
    loaded = interop.load_base(base, tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    interop.save_merged(tmp_path / "new", loaded, base=base)
    assert load_file(tmp_path / "new" / "model.safetensors")["wq.weight"].shape == (4, 3)


def test_heads_have_biases_that_are_flat_in_torch(tmp_path):
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((8, 6), np.float32), rng.standard_normal(8, np.float32)
    base = write(tmp_path, {"q.weight": w, "q.bias": b})
    like = {"q": {"kernel": jnp.zeros((6, 2, 4)), "bias": jnp.zeros((2, 4))}}
    loaded = interop.load_base(base, like, layouts={"q": "ioo"})
    np.testing.assert_array_equal(loaded["q"]["kernel"], w.T.reshape(6, 2, 4))
    np.testing.assert_array_equal(loaded["q"]["bias"], b.reshape(2, 4))
    interop.save_merged(tmp_path / "new", loaded, layouts={"q": "ioo"})
    again = load_file(tmp_path / "new" / "model.safetensors")
    np.testing.assert_array_equal(again["q.weight"], w)
    np.testing.assert_array_equal(again["q.bias"], b)


@pytest.mark.parametrize("size", [0, -1, "many", "5 XB", "0GB"])
def test_sizes_that_are_none_are_errors(size):
    with pytest.raises(ValueError, match="positive number of bytes"):
        parse_size(size)
