"""The adapted leaves of a tree."""

import jax

from loha_jax.tree.leaves import LoHaWeight, is_adapted


def loha_leaves(tree):
    leaves = jax.tree.leaves(tree, is_leaf=is_adapted)
    return [leaf for leaf in leaves if isinstance(leaf, LoHaWeight)]


def adapted_names(tree):
    """The names of all adapted modules; a stack has one for each of its modules."""
    return [name for leaf in loha_leaves(tree) for name in leaf.names]
