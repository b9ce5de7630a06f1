"""Kernels whose layout neither a name nor a bias settles: the file that is loaded may show it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import loha_jax
from loha_jax import interop

RNG = np.random.default_rng(0)


def values(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def loha(out, columns):
    """PEFT's flat factors, and the update that they stand for."""
    tensors = {"hada_w1_a": values(out, 2), "hada_w1_b": values(2, columns)}
    tensors |= {"hada_w2_a": values(out, 2), "hada_w2_b": values(2, columns)}
    w1_a, w1_b, w2_a, w2_b = (np.float64(t) for t in tensors.values())
    return tensors, (w1_a @ w1_b) * (w2_a @ w2_b)


def write(folder, kind, tensors):
    """A file of one module, `mix`, with alpha/r = 1/2, and the function that reads it."""
    folder.mkdir(exist_ok=True)
    if kind == "lycoris":
        path = folder / "adapter.safetensors"
        save_file(
            {
                f"lycoris_mix.{key}": t
                for key, t in (tensors | {"alpha": np.ones((), np.float32)}).items()
            },
            path,
        )
        return interop.load_lycoris, path
    names = (
        {"peft_type": "LOHA", "alpha": 1}
        if kind == "peft"
        else {"peft_type": "LORA", "lora_alpha": 1}
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 2, "target_modules": ["mix"], **names})
    )
    ends = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    save_file(
        {f"base_model.model.mix.{ends.get(key, key)}": t for key, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return (interop.load_peft if kind == "peft" else interop.load_lora), folder


@pytest.mark.parametrize("kind", ["peft", "lycoris", "lora"])
@pytest.mark.parametrize("spatial", [(3, 3), (1, 1)], ids=str)
def test_a_convolution_without_a_bias(kind, spatial, tmp_path):
    columns = 4 * spatial[0] * spatial[1]
    if kind == "lora":
        a, b = values(2, 4, *spatial), values(6, 2, 1, 1)
        tensors, update = {"lora_A": a, "lora_B": b}, b.reshape(6, 2) @ a.reshape(2, columns)
    else:
        tensors, update = loha(6, columns)
        if kind == "lycoris":  # OneTrainer's shapes
            ends = {"a": (6, 2, 1, 1), "b": (2, 4, *spatial)}
            tensors = {key: t.reshape(ends[key[-1]]) for key, t in tensors.items()}
    load, path = write(tmp_path, kind, tensors)
    kernel = values(*spatial, 4, 6)
    merged = loha_jax.merge(load(path, {"mix": {"kernel": jnp.asarray(kernel)}}))["mix"]["kernel"]
    want = kernel + update.reshape(6, 4, *spatial).transpose(2, 3, 1, 0) / 2
    np.testing.assert_allclose(merged, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_what_the_file_leaves_open_is_refused(tmp_path):
    """[4, 12] could be a Conv1d's 3 x 4 inputs, or those of an attention's output."""
    tensors, _ = loha(4, 12)
    load, path = write(tmp_path, "peft", tensors)
    with pytest.raises(ValueError, match="could be several things"):
        load(path, {"mix": {"kernel": jnp.ones((3, 4, 4))}})
    assert load(path, {"mix": {"kernel": jnp.ones((3, 4, 4))}}, layouts={"mix": "kio"})


def test_stacked_kernels_are_no_convolution(tmp_path):
    """The file has one module per layer, so that none is called as the whole kernel is."""
    tensors, _ = loha(6, 4)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 2, "alpha": 1, "target_modules": ["mix"], "peft_type": "LOHA"})
    )
    state = {
        f"base_model.model.{i}.{j}.mix.{key}": t
        for key, t in tensors.items()
        for i in "01"
        for j in "01"
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    base = {"mix": {"kernel": jnp.ones((2, 2, 4, 6))}}
    with pytest.raises(ValueError, match="could be several things"):
        interop.load_peft(tmp_path, base)


def test_a_base_checkpoint_shows_it_too(tmp_path):
    weight = values(6, 4, 3, 3)
    save_file({"mix.weight": weight}, tmp_path / "model.safetensors")
    loaded = interop.load_base(tmp_path, {"mix": {"kernel": jnp.zeros((3, 3, 4, 6))}})
    np.testing.assert_array_equal(loaded["mix"]["kernel"], weight.transpose(2, 3, 1, 0))
