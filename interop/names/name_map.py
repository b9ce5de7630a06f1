"""`NameMap`: the torch names, and where it knows them the layouts, of the leaves of a JAX model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.names.content_match import Leaf, Options, match_contents
from loha_jax.interop.names.leaf_source import Source
from loha_jax.interop.names.torch_mapping import is_torch_mapping, map_sources, torch_names

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.module_names import KERNEL_LEAVES, Names, UnknownNameError, all_names, module_name, path_parts
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_adapted
from loha_jax.tree.named_tree import Layouts
from loha_jax.tree.text_table import text_table

GPT2_CONV1D = r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)"
"""GPT-2's projections, which are no Linear in torch: transformers' own `Conv1D`, with weights [in, out]."""

_COLLECTION = re.compile(r"(params|batch_stats)\.")


def leaf_path(parts: Sequence[str]) -> str:
    """The dotted path of a leaf without a leading collection: the key of a map's sources."""
    return _COLLECTION.sub("", re.sub(r"/~/|/", ".", ".".join(parts)), count=1)


class NameMap:
    """Torch names of a model's leaves, to give to `inject`, `load_peft`, `load_base` and `save_merged` as `names=`.

    Three forms of `names` are read:

    - a function of the default dotted name, or `{regex: template}`, as `loha_jax.inject` takes them;
    - `{torch_regex: (jax_path, transform)}`, the mapping that google-tunix and jax-bonsai models load their weights
      with. With `base=` the patterns are run on the checkpoint's names, and every layout follows from its shapes.
      Without, patterns are inverted, which gives names alone.

    `NameMap.transformers`, `NameMap.diffusers` and `NameMap.infer` make other ones.

    Args:
        names: see above.
        base: the torch checkpoint (a safetensors file or folder; only headers are read) or `{name: shape}`.
        preprocess: the function that stacks tensors after the mapping (tunix' `preprocess_fn`).
        layouts: `{regex: layout}` by default dotted name; they come before those that the mapping gives.

    Attributes:
        sources: `Source` by leaf path ("layers.0.attn.q_proj.w"), where contents or a checkpoint's names settled it.
        layouts: by default module name ("layers.0.attn.q_proj"); `inject` uses them where it is given none.
        unmatched: leaf paths with no torch name, and why.
        unused: torch names that no leaf has.

    Raises:
        ValueError: a transform is of no known form; `preprocess` or `base` without a mapping.

    Example:
        >>> mapping = {r"model\\.layers\\.(\\d+)\\.q_proj\\.weight": (r"layers.\\1.q.w", ((1, 0), (6, 2, 4)))}
        >>> names = NameMap(mapping, base={"model.layers.0.q_proj.weight": (8, 6)})
        >>> names("layers.0.q"), names.layouts["layers.0.q"].word
        ('model.layers.0.q_proj', 'ioo')
    """

    def __init__(
        self,
        names: Names | Mapping[str, Any] | None = None,
        *,
        base: str | Path | Mapping[str, Sequence[int]] | None = None,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        layouts: Layouts | None = None,
    ):
        self._names: Names | None = None
        self._mapping: Mapping[str, Any] | None = None
        self._preprocess = preprocess
        self._given = dict(layouts or {})
        self._after: tuple[Names, ...] = ()
        self._conv1d: re.Pattern[str] | None = None
        self._tied: dict[str, tuple[str, ...]] = {}
        self._closed = False
        self.sources: dict[str, Source] = {}
        self._options: dict[str, Options] = {}
        self.unmatched: dict[str, str] = {}
        self.unused: tuple[str, ...] = ()
        self._shapes: dict[str, tuple[int, ...]] = {}
        if not is_torch_mapping(names):
            if base is not None or preprocess is not None:
                raise ValueError("`base` and `preprocess` belong to a mapping {torch_regex: (jax_path, transform)}")
            self._names = names
            return
        assert isinstance(names, Mapping)
        self._mapping = names
        if base is None:
            return
        if not isinstance(base, Mapping):
            base = Checkpoint(base).shapes
        mapped = map_sources(names, {key: tuple(shape) for key, shape in base.items()}, preprocess)
        self._closed = True
        self.sources = {_without_box(path): source for path, source in mapped.sources.items()}
        self.unmatched = {_without_box(path): reason for path, reason in mapped.problems.items()}
        self.unused = tuple(mapped.unused)

    @classmethod
    def transformers(cls, model_type: str | None = None) -> NameMap:
        """The names of Flax models in Hugging Face transformers (4.57 is the last release that has them).

        They are torch's, with kernel, scale and embedding for weight. What differs: ResNet's `layer_0` is torch's
        `layer.0`, a weight norm's `weight_g` and `weight_v` are `parametrizations.weight.original0` and `1`, the Conv1d
        kernels of Whisper and Wav2Vec2 are `kio`, and GPT-2's projections are kept as [out, in], where torch has [in,
        out] (its `Conv1D`, to which PEFT has no LoHa).

        Args:
            model_type: `config.model_type`. Only "gpt2" makes a difference.

        Example:
            >>> NameMap.transformers()("resnet.encoder.stages.0.layers.0.layer.layer_1.convolution")
            'resnet.encoder.stages.0.layers.0.layer.1.convolution'
        """
        result = cls(
            {
                r"(.*)\.weight_g": r"\1.parametrizations.weight.original0",
                r"(.*)\.weight_v": r"\1.parametrizations.weight.original1",
                r"(.*\.layers\.\d+)\.layer\.layer_(\d+)\.(.*)": r"\1.layer.\2.\3",
            },
            layouts={r"(.*\.)?encoder\.conv[12]": "kio", r"(.*\.)?conv_layers\.\d+\.conv": "kio"},
        )
        if model_type == "gpt2":
            result._given[GPT2_CONV1D] = "oi"
            result._conv1d = re.compile(GPT2_CONV1D)
        return result

    @classmethod
    def diffusers(cls) -> NameMap:
        """The names of Flax models in diffusers (0.39 is the last release that has them).

        `down_blocks_0` is torch's `down_blocks.0`, and an autoencoder's `query`, `key`, `value` and `proj_attn` are
        `to_q`, `to_k`, `to_v` and `to_out.0`.

        Example:
            >>> NameMap.diffusers()("down_blocks_0.attentions_1.transformer_blocks_0.attn1.to_out_0")
            'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0'
        """
        vae = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

        def part(name: str) -> str:
            # linear_1 and linear_2 of an embedding are called so in torch
            return vae.get(name, name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name))

        return cls(lambda name: ".".join(map(part, name.split("."))))

    @classmethod
    def infer(cls, params: Any, base: str | Path) -> NameMap:
        """Names and layouts out of contents alone: each leaf is found among the tensors of a torch checkpoint.

        Found are permuted and reshaped kernels (`[D, N, H]`, convolutions), stacks along any one or two axes (`[L, in,
        out]`, `[2, K, D, H]`), and tied copies. Tensors are compared bit for bit after rounding to the coarser of the
        two dtypes, so that bfloat16 parameters of a float32 file are found, and the reverse. Whatever is not settled by
        contents is listed in `ambiguous` (two tensors of zeros, a symmetric kernel) or `unmatched`, and an error once
        `inject`, `load_base` or `save_merged` ask for it; `settle` names it. Biases and scales that have no contents
        of their own follow the module whose other parameter was found.

        One torch tensor is in memory at a time: sums of hashed values find candidates, then contents are compared.

        Args:
            params: the tree with the checkpoint's values, adapted or not.
            base: a safetensors file, or a folder with one or with shards and an index.

        Raises:
            TypeError: `params` has shapes instead of values.
            FileNotFoundError, ValueError: see `Checkpoint`; or it is quantised.

        A torch `Conv1D` (GPT-2) stores [in, out] instead of [out, in], which contents do not show: give `layouts=`.

        Example:
            >>> import tempfile, numpy as np
            >>> from safetensors.numpy import save_file
            >>> w = np.arange(48, dtype=np.float32).reshape(8, 6)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     save_file({"model.q_proj.weight": w}, f"{folder}/model.safetensors")
            ...     names = NameMap.infer({"attn": {"q": jnp.asarray(w.T.reshape(6, 2, 4))}}, folder)
            >>> print(names.table())
            leaf    shape    torch                layout
            attn.q  [6,2,4]  model.q_proj.weight  ioo
        """
        leaves = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)[0]:
            if isinstance(leaf, LoHaWeight):
                leaf = leaf.kernel
            elif isinstance(leaf, SavedWeight):
                leaf = leaf.original
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(
                    "NameMap.infer compares values, and the tree holds shapes (jax.ShapeDtypeStruct). Give it the "
                    "parameters that were loaded from this checkpoint."
                )
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not jnp.issubdtype(
                leaf.dtype, jax.dtypes.extended
            ):  # fmt: skip
                parts = path_parts(path)
                leaves.append(Leaf(leaf_path(parts), parts, leaf))
        checkpoint = Checkpoint(base)
        if checkpoint.quantisation.scales or checkpoint.quantisation.packed:
            raise ValueError(
                f"NameMap.infer compares values, and {base} is quantised ({checkpoint.quantisation.example}). Give it "
                "the float checkpoint of the same model"
            )
        found = match_contents(leaves, checkpoint)
        result = cls()
        result._closed = True
        result.sources, result._options, result.unmatched = found.sources, found.ambiguous, found.unmatched
        result.unused = tuple(found.unused)
        result._tied = {path: (*s.keys, *s.also) for path, s in found.sources.items() if s.also}
        result._shapes = {leaf.path: tuple(leaf.array.shape) for leaf in leaves}
        return result

    def then(self, names: Names) -> NameMap:
        """This map with its torch names renamed: by a function of the name, or `{regex: template}` (fullmatch).

        For checkpoints whose tensors are called otherwise than the model's modules: with one map to load the base and
        another to exchange adapters.

        Example:
            >>> NameMap({r"h\\.(.*)": r"layers.\\1"}).then({r"(.*)": r"model.\\1"})("h.0.q")
            'model.layers.0.q'
        """
        result = self._copy()
        result._after = (*self._after, names)
        result.sources = {
            path: dataclasses.replace(
                source, keys=_renamed(source.keys, names), also=_renamed(source.also, names)
            )
            for path, source in self.sources.items()
        }  # fmt: skip
        result._tied = {path: _renamed(keys, names) for path, keys in self._tied.items()}
        return result

    def settle(self, choices: Mapping[str, str | Sequence[str] | tuple[Any, str | Layout]]) -> NameMap:
        """This map with some leaves settled by hand.

        Args:
            choices: by leaf path or default module name, as `table` prints them: the torch name of the module or
                parameter (a list of them for a stack), or `(name, layout)`.

        Raises:
            KeyError: the map knows no such leaf.
            ValueError: the name is none of those whose contents fit, or the layout does not fit the leaf.

        Example:
            >>> names = NameMap({r"a\\.weight": ("q.w", None)}, base={"a.weight": (3, 3)})
            >>> names.settle({"q.w": ("other.weight", "io")})("q")
            'other'
        """
        result = self._copy()
        for name, choice in choices.items():
            known = [*self.sources, *self._options, *self.unmatched]
            paths = [name] if name in known else [p for p in known if module_name(p.split(".")) == name]
            if len(paths) > 1:
                paths = [p for p in paths if p.rpartition(".")[2] in KERNEL_LEAVES] or paths
            if len(paths) != 1:
                raise KeyError(f"settle: {name!r} is no leaf of this map; it has {', '.join(known)}")
            (path,) = paths
            result._settle(path, choice)
        return result

    def _settle(self, path: str, choice: Any) -> None:
        layout = None
        if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], Layout):
            choice, layout = choice
        elif isinstance(choice, tuple) and len(choice) == 2 and re.fullmatch(r"[siok\d ]+", str(choice[1])):
            choice, layout = choice[0], Layout(choice[1])
        names = [choice] if isinstance(choice, str) else list(choice)
        try:
            if (options := self._options.get(path)) is not None:
                keys = [name if name in options.keys else _parameter(name) for name in names]
                source = options.choose(keys, layout)
            else:
                tied = self._tied.get(path, ())
                keys = tuple(name if name in tied else _parameter(name) for name in names)
                source = self.sources.get(path)
                if layout is not None:
                    source = Source.of_layout(keys, layout)
                elif source is None:
                    raise ValueError("nothing tells its layout; give (name, layout)")
                also = tuple(key for key in tied if key not in keys)
                source = dataclasses.replace(source, keys=keys, also=also)
        except ValueError as error:
            raise ValueError(f"settle({{{path!r}: {choice!r}}}): {error}") from error
        self.sources[path] = source
        for table in (self._options, self.unmatched, self._tied):
            table.pop(path, None)

    def _copy(self) -> NameMap:
        result = NameMap()
        result.__dict__.update(self.__dict__)
        for name in ("_given", "_tied", "_options", "sources", "unmatched"):
            setattr(result, name, dict(getattr(self, name)))
        return result

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> NameMap:
        """This map with the sources that follow from a checkpoint's names and shapes, where it is a mapping without."""
        if self._mapping is None or self._closed:
            return self
        result = NameMap(self._mapping, base=shapes, preprocess=self._preprocess, layouts=self._given)
        for names in self._after:
            result = result.then(names)
        return result

    @property
    def ambiguous(self) -> dict[str, tuple[str, ...]]:
        """Leaf paths with the torch names, and layouts where these differ, that each could have."""
        tied = {path: keys for path, keys in self._tied.items() if path in self.sources}
        return {**tied, **{path: options.words for path, options in self._options.items()}}

    @property
    def layouts(self) -> dict[str, Any]:
        """Layouts by default module name; None for a leaf called like a kernel that is a vector in torch."""
        known: dict[str, Any] = {}
        for path, source in self.sources.items():
            is_vector = len(source.axes) < 2 and len(source.order) > 1 and path.rpartition(".")[2] in KERNEL_LEAVES
            if source.layout is not None or is_vector:
                known[module_name(path.split("."))] = source.layout
        return {**known, **self._given}

    def __call__(self, name: str) -> str | Sequence[str]:
        """The torch module name of a default module name; a list of them for a stack.

        Raises:
            UnknownNameError: nothing settles it; the message lists what it could be.
        """
        if self._mapping is None and not self._closed:
            given = all_names(name, self._names)
            for after in self._after:
                given = _renamed(given, after)
            return given[0] if len(given) == 1 else given
        if self._closed:
            return self._of_sources(name)
        found = {m for path in self._paths_of(name) for m in map(_module, torch_names(self._mapping or {}, path))}
        for after in self._after:
            found = set(_renamed(sorted(found), after))
        if len(found) != 1:
            what = f"could be {', '.join(sorted(found))}" if found else "has no counterpart in the mapping"
            raise UnknownNameError(
                f"{name} {what}. Give the torch checkpoint, NameMap(mapping, base=...), which settles it.",
                sorted(found),
            )
        return found.pop()

    def _paths_of(self, name: str) -> list[str]:
        """Leaf paths that a default module name may stand for."""
        return [name, *(f"{name}.{leaf}" for leaf in KERNEL_LEAVES), f"{name}.scale", f"{name}.bias"]

    def _of_sources(self, name: str) -> str | Sequence[str]:
        for path in self._paths_of(name):
            if path in self._tied or path in self._options:
                options = self.ambiguous[path]
                keys = self._options[path].keys if path in self._options else self._tied[path]
                raise UnknownNameError(
                    f"{path} could be {', '.join(options)}: their contents do not tell them apart. Say which with "
                    f"names.settle({{{path!r}: ...}}).",
                    [_module(key) for key in keys],
                )
            if path in self.sources:
                modules = tuple(_module(key) for key in self.sources[path].keys)
                return modules[0] if len(modules) == 1 and not self.sources[path].stack else modules
            if path in self.unmatched:
                raise UnknownNameError(
                    f"{path} has no torch name: {self.unmatched[path]}. Give it one with "
                    f"names.settle({{{path!r}: (name, layout)}})."
                )
        raise UnknownNameError(f"{name} has no torch name: the map, which has {len(self.sources)} leaves, lacks it.")

    def source(self, path: str) -> Source:
        """Where the values of a leaf are in the checkpoint, by leaf path.

        Raises:
            ValueError: the map does not know it; the message says why.
        """
        if path in self.sources:
            return self.sources[path]
        if path in self.ambiguous:
            raise ValueError(f"could be {', '.join(self.ambiguous[path])}")
        raise ValueError(self.unmatched.get(path, "the map has no torch name for it"))

    @property
    def is_settled(self) -> bool:
        """Whether the map has sources: it was inferred, or a mapping was run on a checkpoint."""
        return self._closed

    def is_conv1d(self, name: str) -> bool:
        """Whether torch stores the weight of a module (by default name) as [in, out]."""
        return self._conv1d is not None and self._conv1d.fullmatch(name) is not None

    def table(self) -> str:
        """All that the map says: leaf, shape, torch name, layout; then what is ambiguous, unmatched and unused."""
        rows = [("leaf", "shape", "torch", "layout")]
        for path, source in self.sources.items():
            shape = f"[{','.join(map(str, self._shapes[path]))}]" if path in self._shapes else ""
            keys = source.keys if len(source.keys) < 3 else (source.keys[0], "…", source.keys[-1])
            also = f" = {', '.join(source.also)}" if source.also else ""
            rows.append((path, shape, ", ".join(keys) + also, source.layout.word if source.layout else "-"))
        lines = text_table(rows)
        lines += [f"ambiguous: {path}: {', '.join(options)}" for path, options in self.ambiguous.items()]
        lines += [f"unmatched: {path}: {reason}" for path, reason in self.unmatched.items()]
        lines += [f"unused: {key}" for key in self.unused]
        return "\n".join(lines)

    def __repr__(self) -> str:
        if self._closed:
            return (
                f"NameMap({len(self.sources)} leaves, {len(self.ambiguous)} ambiguous, "
                f"{len(self.unmatched)} unmatched, {len(self.unused)} unused torch tensors)"
            )
        inner = self._mapping if self._mapping is not None else self._names
        shown = f"{len(inner)} patterns" if isinstance(inner, Mapping) else getattr(inner, "__qualname__", repr(inner))
        return f"NameMap({shown})"


def _without_box(path: str) -> str:
    """A JAX path as `path_parts` gives it: without the attribute that boxes the array, as tunix' gemma4 writes it."""
    return leaf_path(path.removesuffix(".value").removesuffix(".raw_value").split("."))


def _renamed(keys: Sequence[str], names: Names) -> tuple[str, ...]:
    return tuple(name for key in keys for name in all_names(key, names))


def _module(key: str) -> str:
    """The module of a torch parameter: all but the last part of its name, where that is a usual one."""
    module, _, last = key.rpartition(".")
    return module if last in ("weight", "bias", "running_mean", "running_var") and module else key


def _parameter(name: str) -> str:
    return name if _module(name) != name else f"{name}.weight"
