"""`adapt`: runs a model on an adapted tree without materialising ΔW.

`adapt` traces the function with plain kernels (`trace_and_evaluate`), then evaluates the jaxpr with
views of the adapted kernels instead (`interpreter.evaluate`). A rule (`product_rules`) says which
product reads a view. `forms.compute` computes it, without ΔW as two products with the factors
(`factored_product`).
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.typing import ArrayLike

from loha_jax.runtime._compat import without_dead_code
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.scalars import one_of
from loha_jax.transform import control_flow_rules, product_rules, structural_rules
from loha_jax.transform.adapter_per_row import check_index, run_per_example
from loha_jax.transform.arguments import FlatArguments, TreeDef, flatten, is_array
from loha_jax.transform.closures import closed_over
from loha_jax.transform.compute_dtype import COMPUTE_DTYPES, ComputeDtype
from loha_jax.transform.interpreter import densify, evaluate
from loha_jax.transform.kernel_view import KernelView, Value, frozen_kernel
from loha_jax.transform.options import Options
from loha_jax.transform.packed_kernel import PackedKernel, plain
from loha_jax.transform.rows import mark_rows
from loha_jax.transform.strategy import STRATEGIES, Strategy
from loha_jax.transform.typed_jax import Operand, array_type
from loha_jax.tree.containers import is_model_part, on_trees
from loha_jax.tree.forgotten_dropout import warn_of_forgotten_dropout
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted
from loha_jax.tree.quantised import QuantisedArray, is_quantised, wrapped

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")

RULES = (control_flow_rules, product_rules, structural_rules)
"""The modules whose import registers the rules."""


def adapt(
    fn: F,
    *,
    strategy: str | Mapping[str, str] = "auto",
    training: bool = True,
    forward_mode: bool = False,
    compute_dtype: str = "auto",
    adapter_index: ArrayLike | Sequence[int] | None = None,
    in_axes: object = None,
    out_axes: object = 0,
) -> F:
    """Return `fn` with every product of an adapted kernel computed without keeping ΔW.

    `fn` is traced with plain kernels, and its jaxpr evaluated: equations that read a `LoHaWeight`
    of the arguments are computed on the factors, all others as they are. This works for Linen, NNX,
    Equinox, Haiku and hand-written models; through jit, scan (stacked kernels too), while, cond,
    remat, vmap, grad, shard_map, custom_jvp and custom_vjp; and for kernels that are transposed,
    reshaped, sliced, cast or used twice. An unknown operation gets the dense weight: slower, never
    wrong. `explain` lists where.

    Args:
        fn: any function of pytrees. Arrays among its arguments are traced; everything else (bools,
            strings, None) stays as it is. Adapted weights that it closes over, instead of taking
            them as arguments, are not seen: a warning says so.
        strategy: "auto" chooses for each product, by FLOPs and by the device, between "factored"
            (x·W + (x·KB)·KA, without an array of the kernel's shape) and "fused" (x·(W + ΔW), with
            ΔW materialised in the forward pass and again in the backward pass); "dense" keeps ΔW.
            "pallas" is "factored" as one Pallas program for TPUs and Hopper GPUs, never timed;
            products that it does not suit are factored, and `explain` says why. Or `{regex:
            strategy}` by torch module name (fullmatch), "auto" for the rest.
        training: whether "auto" counts the backward pass. False for inference.
        forward_mode: use plain products, which `jax.jvp` can differentiate, at some cost in speed.
            Without it adapted products are `jax.custom_vjp`.
        compute_dtype: what a factored update is computed in, where input and kernel are bfloat16 or
            float16. "float32": in float32, as in PEFT. "input": in the common dtype of the two (in
            the input's if the kernel is quantised), with sums and the factors' gradients in
            float32, as JAX's LoRA libraries do. "auto": "float32" on CPU, and "input" on other
            devices (`jax.default_backend()`). Fused products round W + ΔW to W's dtype by either
            rule; `strategy="factored"` does not.
        adapter_index: integers `[batch]`, one per row: the active adapter (in the order of
            `set_adapter`) that the row runs through, -1 for the base model. The adapters have equal
            ranks and targets; one that lacks a module leaves it as it is. Results are those of
            calling `fn` row by row, each a batch of one, concatenated; scalars become one per row.
            With the strategy "auto" all products are factored. Base products run once for the
            whole batch.
        in_axes: with `adapter_index`, which arguments have rows and along which axis, as for
            `jax.vmap`. A tuple has an entry for each positional argument: an integer, None (the
            same for all rows) or a tree of them that is a prefix of the argument's. A dict has
            entries by the arguments' names, keyword arguments too. One integer stands for all
            arguments but the adapted tree. By default it is 0 for the one array, weights excepted,
            that has an axis as long as `adapter_index`; several such arrays (positions as long as
            the batch, a mask, a random key, a cache) are an error.
        out_axes: with `adapter_index`, the axis of each result along which the rows are
            concatenated: an integer, or a prefix of the result's tree.

    Returns:
        A function with the same signature and results. Jit it (or `fn`) like `fn`.

    Raises:
        ValueError: the strategy or `compute_dtype` is unknown; or, when called, a leaf comes from
            one half of `partition`, `adapter_index` is out of range (NaN results where it is
            traced), the adapters differ in shape, no argument has rows, or several may have.

    Example:
        >>> import loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> adapt(lambda p, x: x @ p["q"]["kernel"])(params, jnp.ones((2, 3))).shape
        (2, 3)
    """
    options = make_options(strategy, training, forward_mode, compute_dtype)

    @functools.wraps(fn)
    def adapted(*args: object, **kwargs: object) -> object:
        if adapter_index is None:
            return run(fn, args, kwargs, options)
        by_row = dataclasses.replace(
            options,
            strategy="factored" if strategy == "auto" else options.strategy,
            base_apart=True,
        )
        index = check_index(adapter_index)
        args, kwargs = mark_rows(fn, args, kwargs, in_axes, index.shape[0])

        def run_rows(
            fn: Callable[..., R], args: tuple[object, ...], kwargs: dict[str, object]
        ) -> R:
            def run_row(args: tuple[object, ...], kwargs: dict[str, object]) -> R:
                return run(fn, args, kwargs, by_row)

            return run_per_example(run_row, args, kwargs, index, out_axes)

        return on_trees(run_rows, fn, args, kwargs, changes=False)

    vars(adapted)["__loha_jax__"] = (fn, options, adapter_index is not None)  # for `explain`
    return cast(F, adapted)


def make_options(
    strategy: str | Mapping[str, str],
    training: bool,
    forward_mode: bool,
    compute_dtype: str = "auto",
) -> Options:
    """Return the options of an evaluation, from the arguments of `adapt`."""
    rule: ComputeDtype = one_of("compute_dtype", compute_dtype, COMPUTE_DTYPES)

    def checked(strategy: str) -> Strategy:
        return one_of("The strategy", strategy, STRATEGIES)

    if isinstance(strategy, str):
        return Options(checked(strategy), training, forward_mode, rule)
    by_name: list[tuple[re.Pattern[str], Strategy]] = [
        (re.compile(pattern), checked(chosen)) for pattern, chosen in strategy.items()
    ]
    return Options(tuple(by_name), training, forward_mode, rule)


def run(
    fn: Callable[..., R], args: tuple[object, ...], kwargs: dict[str, object], options: Options
) -> R:
    """Call `fn` with the adapted leaves of its arguments, and of models among them, as views."""
    return on_trees(functools.partial(_run, options), fn, args, kwargs)


def _run(
    options: Options, fn: Callable[..., R], args: tuple[object, ...], kwargs: dict[str, object]
) -> R:
    """Call `fn` on trees: on its jaxpr with views where an argument is adapted, else as it is."""
    leaves, treedef = flatten((args, kwargs), is_leaf=_is_leaf)
    named = options.observer is not None or not isinstance(options.strategy, str)
    values: list[Value] = []  # what the jaxpr of fn is evaluated on
    traced: list[int] = []  # their positions among the leaves
    originals: dict[int, object] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, SavedWeight):
            leaf = leaves[position] = leaf.__jax_array__()
        if isinstance(leaf, LoHaWeight):
            originals[len(values)] = leaf
            leaf = _view(leaf, named)
        elif is_quantised(leaf):
            originals[len(values)] = leaf
            leaf = _base_view(wrapped(leaf))
        elif not is_array(leaf):
            continue
        traced.append(position)
        values.append(leaf)
    arguments = FlatArguments(leaves, treedef, traced)
    if not originals:
        if names := closed_over(fn):
            warn_caller(
                f"The function that adapt was given closes over adapted kernels "
                f"({', '.join(names)}) and takes none as an argument: it computes with W + ΔW as "
                "an array. Pass the adapted tree as an argument.",
            )
        args, kwargs = arguments.fill(values)
        return fn(*args, **kwargs)
    return trace_and_evaluate(fn, arguments, values, originals, options)


def trace_and_evaluate(
    fn: Callable[..., R],
    arguments: FlatArguments,
    values: Sequence[Value],
    originals: Mapping[int, object],
    options: Options,
) -> R:
    """Trace `fn` with plain arrays and evaluate its jaxpr on values, some of which are views.

    An output that is one of the adapted inputs is that leaf again, so that a function that returns
    its parameters returns them adapted.

    Args:
        fn: the function.
        arguments: its arguments.
        values: what the jaxpr is evaluated on, one per traced argument.
        originals: the adapted and the quantised leaves, by position among the values.
        options: of the evaluation.
    """
    out_trees: list[TreeDef] = []
    static_outputs: dict[int, object] = {}

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        args, kwargs = arguments.fill(arrays)
        outputs, out_tree = flatten(fn(*args, **kwargs))
        out_trees.append(out_tree)
        for n, output in enumerate(outputs):
            if not isinstance(output, jax.Array | np.ndarray | np.generic | float | int | complex):
                static_outputs[n] = output
        return [o for n, o in enumerate(outputs) if n not in static_outputs]

    arrays = [_traced_as(value) for value in values]
    closed: ClosedJaxpr = without_dead_code(jax.make_jaxpr(flat)(*arrays))
    jaxpr: Jaxpr = closed.jaxpr
    returned = {jaxpr.invars[n]: leaf for n, leaf in originals.items()}
    with standard_promotion():
        results = evaluate(jaxpr, closed.consts, values, options)
        dense = [
            returned[var]
            if not isinstance(var, Literal) and var in returned
            else _as_array(densify(value, options, "return", "the function returns it"), var)
            for var, value in zip(jaxpr.outvars, results, strict=True)
        ]
    dynamic, count = iter(dense), len(dense) + len(static_outputs)
    return out_trees[0].unflatten(
        [static_outputs[n] if n in static_outputs else next(dynamic) for n in range(count)]
    )


def _as_array(value: ArrayLike, var: Operand) -> jax.Array:
    """Return an output as `jax.jit` would return it: constants as arrays, arrays as they are."""
    if isinstance(value, jax.Array):
        return value
    kind = array_type(var)
    constant = np.asarray(value)
    return jnp.asarray(constant.item()) if kind.weak_type else jnp.asarray(constant, kind.dtype)


def _is_leaf(x: object) -> bool:
    """Return whether x is adapted or quantised.

    A quantised kernel that holds variables is a model's own, which computes with it.
    """
    if not is_quantised(x):
        return is_adapted(x)
    return not any(map(is_model_part, jax.tree.leaves(x, is_leaf=is_model_part)))


@standard_promotion()
def _view(leaf: LoHaWeight, named: bool) -> Value:
    """Return the leaf as a view; the plain kernel where no adapter is active."""
    leaf.require_whole()
    warn_of_forgotten_dropout(leaf.active_adapters)
    if not leaf.active_adapters:
        return _base_view(leaf.kernel)
    return KernelView.of(leaf, leaf.label if named else "")


def _base_view(kernel: jax.Array | QuantisedArray) -> Value:
    """Return a kernel that no adapter changes: a view of a quantised one, else the array."""
    frozen = frozen_kernel(kernel)
    return KernelView.unknown(frozen, "") if isinstance(frozen, PackedKernel) else frozen


def _traced_as(value: Value) -> jax.Array | jax.ShapeDtypeStruct:
    """Return what a function is traced with in the place of a value."""
    kernel = value.kernel if isinstance(value, KernelView) else value
    return jax.eval_shape(plain, kernel) if isinstance(kernel, PackedKernel) else kernel
