"""`load_base`: what does not fit, what is tied, and how leaves are kept."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from base_folders import small, write
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    folder, tree, _ = small(tmp_path)
    tree["a"]["kernel"] = jnp.zeros((4, 4))
    tree["a"]["bias"] = jnp.zeros(4, int)
    tree["c"] = {"kernel": jnp.zeros((4, 2)), "odd": jnp.zeros((2, 2, 2, 2, 2, 2))}
    del tree["b"]
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        interop.load_base(folder, tree)
    for part in (
        str(folder),
        "tensors that are not in the file (2)",
        "c.weight (for c.kernel [4, 2])",
        "a.weight (for a.kernel) is [4, 3] in the file, a leaf [4, 4] needs [4, 4]",
        "a.bias (for a.bias) is float32, the leaf int32",
        "tensors that no leaf takes (1): b.weight",
        "`tied=`",
    ):
        assert part in str(error.value)
    assert "strict=False" not in str(error.value)  # it would not help: leaves are without values
    folder, tree, _ = small(tmp_path / "unread")
    del tree["b"]
    with pytest.raises(ValueError, match=r"no leaf takes \(1\): b\.weight.*`strict=False`"):
        interop.load_base(folder, tree)


def test_tensors_may_be_left_unread_where_that_is_asked_for(tmp_path):
    folder, tree, tensors = small(tmp_path)
    del tree["b"]
    loaded = interop.load_base(folder, tree, strict=False)
    np.testing.assert_array_equal(loaded["a"]["kernel"], tensors["a.weight"].T)


def test_a_tied_weight_is_read_and_checked_where_it_is_named(tmp_path):
    folder, tree, tensors = small(tmp_path)
    tree["head"] = {"kernel": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match=r"head.weight \(for head.kernel \[4, 2\]\)"):
        interop.load_base(folder, tree)
    tied = {"head.weight": "b.weight"}
    loaded = interop.load_base(folder, tree, tied=tied)
    np.testing.assert_array_equal(loaded["head"]["kernel"], tensors["b.weight"].T)
    interop.save_merged(tmp_path / "same", loaded, base=folder, tied=tied)
    assert load_file(tmp_path / "same" / "model.safetensors").keys() == tensors.keys()
    with pytest.raises(ValueError, match=r"head.weight .* is not in the base checkpoint"):
        interop.save_merged(tmp_path / "new", loaded, base=folder)
    loaded["head"]["kernel"] += 1
    with pytest.raises(
        ValueError,
        match=r"b.kernel and head.kernel are both b.weight in torch.*Nothing was written",
    ):
        interop.save_merged(tmp_path / "new", loaded, base=folder, tied=tied)
    assert not any((tmp_path / "new").glob("*"))


def test_leaves_keep_their_shardings_and_dtypes(tmp_path):
    folder, tree, tensors = small(tmp_path)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    tree["a"]["kernel"] = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=sharding)
    tree["b"]["kernel"] = jax.device_put(tree["b"]["kernel"], sharding)
    loaded = interop.load_base(folder, tree)
    assert loaded["a"]["kernel"].sharding == loaded["b"]["kernel"].sharding == sharding
    assert loaded["a"]["kernel"].dtype == jnp.bfloat16
    assert loaded["a"]["bias"].dtype == jnp.float32
    want = tensors["a.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded["a"]["kernel"], want)
    loaded = interop.load_base(folder, tree, dtype=jnp.float16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float16")}
    write(folder, {**tensors, "a.bias": np.full(4, 1e6, np.float32)})
    with pytest.raises(ValueError, match=r"a.bias has 4 values that float16 cannot hold"):
        interop.load_base(folder, tree, dtype=jnp.float16)


def test_an_adapted_tree_is_no_place_for_a_base(tmp_path):
    folder, tree, _ = small(tmp_path)
    adapted = loha_jax.inject(tree, LoHaConfig(r=1, target_modules=["a"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="load it first, then inject"):
        interop.load_base(folder, adapted)


def test_folders_that_are_no_checkpoint_say_so(tmp_path):
    _, tree, tensors = small(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        interop.load_base(tmp_path / "none", tree)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"it has pytorch_model.bin.*safe_serialization=True"
    ):
        interop.load_base(tmp_path / "bin", tree)
    write(tmp_path / "two", tensors, "x.safetensors")
    write(tmp_path / "two", tensors, "y.safetensors")
    with pytest.raises(
        ValueError, match=r"several safetensors files and no index: x.safetensors, y.safetensors"
    ):
        interop.load_base(tmp_path / "two", tree)
    interop.load_base(tmp_path / "two" / "y.safetensors", tree)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((tmp_path / "a" / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"broken.safetensors is not a readable safetensors file"):
        interop.load_base(broken, tree)
    interop.save_merged(
        tmp_path / "shards", interop.load_base(tmp_path / "a", tree), max_shard_size=40
    )
    index = tmp_path / "shards" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    interop.load_base(index, tree)
    index.write_text(
        json.dumps(
            {"weight_map": {**content["weight_map"], "z.weight": content["weight_map"]["a.bias"]}}
        )
    )
    with pytest.raises(ValueError, match=r"names tensors that its shards do not hold: z.weight"):
        interop.load_base(tmp_path / "shards", tree)
    index.write_text(
        json.dumps({"weight_map": {**content["weight_map"], "z.weight": "model-9.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match=r"model-9.safetensors"):
        interop.load_base(tmp_path / "shards", tree)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of safetensors shards"):
        interop.load_base(tmp_path / "shards", tree)
