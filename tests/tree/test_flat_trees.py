"""Flat dictionaries (`safetensors.flax.load_file`, `flatten_dict`).

Names, layouts and files as of the nested tree.
"""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaves import adapted_names, loha_leaves
from safetensors.flax import load_file

import loha_jax
from loha_jax import LoHaConfig, interop

RANDOM = np.random.default_rng(0)
NESTED = {
    "params": {
        "decoder": {
            "layers_0": {
                "q_proj": {"kernel": jnp.asarray(RANDOM.normal(size=(4, 4)), jnp.float32)}
            },
            "conv": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.zeros(4)},
            "norm": {"scale": jnp.ones(4)},
        }
    }
}
FLAT = {
    "slashes": lambda tree: flax.traverse_util.flatten_dict(tree, sep="/"),
    "dots": lambda tree: flax.traverse_util.flatten_dict(tree, sep="."),
    "tuples": flax.traverse_util.flatten_dict,
}


@pytest.mark.parametrize("targets", [["q_proj", "conv"], "all-linear"])
@pytest.mark.parametrize("form", FLAT)
def test_a_flat_tree_is_the_nested_one(form, targets, tmp_path):
    config = LoHaConfig(r=2, target_modules=targets, init_weights=False)
    nested = loha_jax.inject(NESTED, config, key=jax.random.key(0))
    flat = loha_jax.inject(FLAT[form](NESTED), config, key=jax.random.key(0))
    expected, found = ({leaf.names[0]: leaf for leaf in loha_leaves(t)} for t in (nested, flat))
    assert {n: leaf.layout for n, leaf in found.items()} == {
        n: leaf.layout for n, leaf in expected.items()
    }
    assert interop.to_peft_state_dict(flat).keys() == interop.to_peft_state_dict(nested).keys()
    interop.save_peft(tmp_path / "adapter", flat)
    loaded = loha_jax.merge(interop.load_peft(tmp_path / "adapter", FLAT[form](NESTED)))
    jax.tree.map(np.testing.assert_array_equal, loaded, FLAT[form](loha_jax.merge(nested)))
    interop.save_merged(tmp_path / "flat", flat)
    interop.save_merged(tmp_path / "nested", nested)
    read = [load_file(tmp_path / name / "model.safetensors") for name in ("flat", "nested")]
    jax.tree.map(np.testing.assert_array_equal, *read)
    again = interop.load_base(tmp_path / "flat", FLAT[form](NESTED))
    jax.tree.map(np.testing.assert_array_equal, again, loaded)


def test_all_linear_leaves_torchs_embeddings_and_head_out():
    shapes = {
        "model.embed_tokens": (8, 4),
        "model.layers.0.q_proj": (4, 4),
        "lm_head": (8, 4),
        "model.norm": (4,),
    }
    flat = {f"{name}.weight": jnp.ones(shape) for name, shape in shapes.items()}
    adapted = loha_jax.inject(
        flat, LoHaConfig(r=2, target_modules="all-linear"), key=jax.random.key(0)
    )
    assert adapted_names(adapted) == ["model.layers.0.q_proj"]


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"linear/~/sub": {"w": jnp.ones((3, 4))}}, "linear.sub"),
        ({"layers.0": {"weight": jnp.ones((3, 4))}}, "layers.0"),
        ({"a..b": {"w": jnp.ones((3, 4))}}, "a..b"),
        ({("a", 0): {"w": jnp.ones((3, 4))}}, "a.0"),
    ],
)
def test_names_of_keys_with_dots_and_slashes(tree, name):
    adapted = loha_jax.inject(tree, LoHaConfig(r=2, target_modules=[name]), key=jax.random.key(0))
    assert adapted_names(adapted) == [name]
