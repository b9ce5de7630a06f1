"""`infer_layouts`: reads each kernel's layout off the model itself."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import jax
from jax.extend.core import JaxprEqn

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.model_layouts import ModelLayouts
from loha_jax.targets.module_names import is_kernel_leaf, module_name
from loha_jax.transform.adapt import trace_and_evaluate
from loha_jax.transform.arguments import flat_arguments, flatten_with_path, has_shape
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.options import Observer, Options
from loha_jax.tree.containers import container_of
from loha_jax.tree.merge import unload
from loha_jax.tree.own_paths import own_path
from loha_jax.tree.quantised import types_of_quantised


def infer_layouts(
    fn: Callable[..., object], params: object, *args: object, **kwargs: object
) -> ModelLayouts:
    """Return the layouts of the kernels of `params`, from how `fn` uses them.

    `fn(params, *args, **kwargs)` is traced without computing anything; arrays may be
    `jax.ShapeDtypeStruct`s. Axes that a product contracts are in axes; batch axes, and axes that a
    scan takes apart, are stack axes; the others are out axes. A convolution says which are spatial.
    An embedding lookup reads positions of an out axis (the orientation of a tied output head). The
    first use of a kernel decides.

    Args:
        fn: the model's function, e.g. `model.apply` or `lambda params, x: ...`.
        params: its first argument: a tree of arrays, or an NNX model, adapted or not.
        args, kwargs: its other arguments.

    Returns:
        `{module name: layout}` for `inject(..., layouts=...)`. Arrays that no product, convolution
        or lookup reads as they are stored, axis by axis, are left out.
        `target_modules="all-linear"` then takes the modules in it that are multiplied with, and not
        those that are looked up or slid.

    Example:
        >>> import jax.numpy as jnp
        >>> infer_layouts(lambda p, x: jnp.einsum("bi,oi->bo", x, p["head"]["w"]),
        ...               {"head": {"w": jnp.ones((3, 5))}}, jnp.ones((2, 5)))
        {'head': 'oi'}
    """
    base = unload(
        copy.deepcopy(params) if container_of(params) is not None else params
    )  # unload changes a model in place
    base = types_of_quantised(base)
    arguments = flat_arguments(base, *args, **kwargs)
    leaves = arguments.leaves
    candidates: dict[int, str] = {}
    for position, (path, leaf) in enumerate(flatten_with_path(base)[0]):
        parts = own_path(base, path).parts
        if has_shape(leaf) and len(leaf.shape) >= 2 and is_kernel_leaf(parts):
            candidates[position] = module_name(parts)
    roles = _Roles({name: len(leaves[n].shape) for n, name in candidates.items()})

    def traced(arrays: list[jax.Array]) -> list[jax.Array]:
        values = [
            KernelView.unknown(array, candidates[n]) if n in candidates else array
            for n, array in zip(arguments.traced, arrays, strict=True)
        ]
        outputs = trace_and_evaluate(fn, arguments, values, {}, Options(observer=roles))
        return [o for o in jax.tree.leaves(outputs) if isinstance(o, jax.Array)]

    jax.eval_shape(traced, arguments.arrays)
    found = {name: layout for name in candidates.values() if (layout := roles.layout(name))}
    lookups = roles.lookups & found.keys()
    sizes = {
        name: Layout(found[name]).torch_shape(leaves[n].shape)
        for n, name in candidates.items()
        if name in found
    }
    # The output head: the last product, if it has as many inputs and outputs as a table has
    # features and rows.
    is_head = roles.last not in lookups and sizes.get(roles.last) in [
        sizes[name] for name in lookups
    ]
    return ModelLayouts(found, lookups=lookups, left_out={roles.last} if is_head else ())


@dataclasses.dataclass
class _Roles(Observer):
    """The `Observer` that notes what each axis of each kernel is at its first use."""

    ndims: dict[str, int]

    def __post_init__(self) -> None:
        self.found: dict[str, dict[int, str]] = {}
        self.stacked: dict[str, set[int]] = {}
        self.lookups: set[str] = set()
        self.last = ""  # the kernel of the last product

    def layout(self, name: str) -> str | None:
        roles = self.found.get(name)
        if roles is None or set(roles) != set(range(self.ndims[name])):
            return None
        word = "".join(roles[axis] for axis in range(self.ndims[name]))
        return Layout(word).word if "i" in word and "o" in word else None

    def scanned(self, view: KernelView, atom: int | None) -> None:
        stacked = self.stacked.setdefault(view.name, set())
        if atom is None:  # of size 1: the first such axis that is not taken yet
            ones = [
                a.axis for a in view.atoms if a.size == 1 and a.axis >= 0 and a.axis not in stacked
            ]
            stacked.update(ones[:1])
        elif view.atoms[atom].axis >= 0:
            stacked.add(view.atoms[atom].axis)

    def used(self, view: KernelView, eqn: JaxprEqn, operand: int) -> None:
        kinds = _operand_kinds(eqn, operand, view)
        if eqn.primitive.name == "dot_general":
            self.last = view.name
        if kinds is None or view.name in self.found:
            return
        roles = dict.fromkeys(self.stacked.get(view.name, ()), "s")
        for kind, atoms in zip(kinds, view.dims, strict=True):
            for n in atoms:
                axis = view.atoms[n].axis
                if axis >= 0 and roles.setdefault(axis, kind) != kind:
                    return  # one stored axis plays two parts: no layout describes it
        for axis in range(self.ndims[view.name]):
            if axis not in roles:
                roles[axis] = self._unseen(view, axis, kinds)
        self.found[view.name] = roles
        if eqn.primitive.name == "gather":
            self.lookups.add(view.name)

    def _unseen(self, view: KernelView, axis: int, kinds: list[str]) -> str:
        """Return the kind of an axis of size 1: the view's, or stack if it was indexed away."""
        ones = [kind for kind, atoms in zip(kinds, view.dims, strict=True) if not atoms]
        stored_ones = [
            a.axis
            for a in view.atoms
            if a.size == 1 and a.axis not in self.stacked.get(view.name, ())
        ]
        if len(ones) == len(stored_ones):
            return ones[stored_ones.index(axis)]
        return "s"


def _operand_kinds(eqn: JaxprEqn, operand: int, view: KernelView) -> list[str] | None:
    """Return the kind of each axis of the view for this equation, or None if it does not say."""
    primitive, ndim = eqn.primitive.name, len(view.shape)
    if primitive == "dot_general":
        contracted, batch = (sides[operand] for sides in eqn.params["dimension_numbers"])
        return ["i" if d in contracted else "s" if d in batch else "o" for d in range(ndim)]
    if primitive == "ragged_dot_general" and operand == 1:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        stacked = (*batch, *numbers.rhs_group_dimensions)
        return ["i" if d in contracted else "s" if d in stacked else "o" for d in range(ndim)]
    if primitive == "conv_general_dilated" and operand == 1:
        out, in_, *_ = eqn.params["dimension_numbers"].rhs_spec
        return ["o" if d == out else "i" if d == in_ else "k" for d in range(ndim)]
    if primitive == "gather" and operand == 0 and ndim == 2:
        rows = eqn.params["dimension_numbers"].collapsed_slice_dims
        return ["o" if d in rows else "i" for d in range(ndim)] if len(rows) == 1 else None
    return None
