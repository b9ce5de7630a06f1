"""Shared by the tests in tests/interop/exchange: models, trees and references."""

import numpy as np
from lycoris_samples import LAYOUTS, base_params, native
from safetensors.numpy import save_file

from loha_jax import interop


def loaded(form, base=None):
    return interop.load_lycoris(
        native(form)[0], base_params() if base is None else base, layouts=LAYOUTS
    )


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def written(tmp_path, state, metadata=None, name="adapter.safetensors"):
    save_file(
        {key: np.asarray(value, order="C") for key, value in state.items()},
        tmp_path / name,
        metadata,
    )
    return tmp_path / name
