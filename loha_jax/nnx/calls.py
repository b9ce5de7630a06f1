"""Calls of functions of adapted NNX models: through `run`, on plain clones of the models.

A call has three steps. `Originals` takes the models among the arguments apart, into arrays and the
rest. `Clones` puts copies of the models in their original form together from traced arrays, and
notes the changes that the function makes to them. These are then made to the caller's models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jaxtyping import PyTree

from loha_jax.nnx.clones import Changes, Clones, Originals, Returned
from loha_jax.nnx.graph import is_node
from loha_jax.nnx.siblings import AdaptedVariable, called_among


def nodes_among(args: PyTree) -> Iterator[AdaptedVariable]:
    """Yield the adapted variables of all models among the leaves of `args`."""
    nodes = [leaf for leaf in jax.tree.leaves(args, is_leaf=is_node) if is_node(leaf)]
    return iter(called_among(nnx.iter_graph(nodes)).values())


def call(
    run: Callable[[Callable[..., PyTree], tuple, dict], PyTree],
    fn: Callable[..., PyTree],
    args: tuple,
    kwargs: dict[str, PyTree],
    *,
    changes: bool = True,
) -> PyTree:
    """Call `fn` with the models among its arguments in their original form.

    Args:
        run: called as `run(fn, args, kwargs)` with a function of trees, in which adapted kernels
            are leaves.
        fn: the function of models.
        args, kwargs: its arguments.
        changes: whether the changes that `fn` makes to its models are made to the caller's too:
            BatchNorm statistics, counts of random streams, `sow`, attributes that hold plain data.

    Returns:
        The result of `fn`. A module of its models in it is the caller's.
    """
    originals = Originals(args, kwargs)
    made = Changes()

    def pure(arrays: tuple[list[PyTree], list[PyTree]], others: list[PyTree]) -> PyTree:
        nonlocal made
        clones = Clones(originals, *arrays)
        inner_args, inner_kwargs = originals.arguments(clones.nodes, others)
        result = fn(*inner_args, **inner_kwargs)
        made = clones.changes() if changes else Changes()
        return clones.mark(result), made.values()

    result, values = run(pure, ((originals.weights, originals.values), originals.others), {})
    originals.change(made, values)
    return jax.tree.map(lambda x: originals.graph[x.path] if isinstance(x, Returned) else x, result)
