"""`NameMap`: the torch names, and where it knows them the layouts, of the leaves of a JAX model."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names, all_names, module_name
from loha_jax.targets.row_transforms import Rows, checked_rows, row_transform

from .content_match import match_contents
from .conv1d import GPT2_CONV1D, looks_like_conv1d
from .leaf_source import Source
from .settled_names import Choice, SettledNames
from .torch_mapping import Preprocess, TorchMapping, is_torch_mapping, map_sources

_TRANSFORMERS_NAMES = {
    r"(.*)\.weight_g": r"\1.parametrizations.weight.original0",
    r"(.*)\.weight_v": r"\1.parametrizations.weight.original1",
    r"(.*\.layers\.\d+)\.layer\.layer_(\d+)\.(.*)": r"\1.layer.\2.\3",
}
_TRANSFORMERS_LAYOUTS = {
    r"(.*\.)?encoder\.conv[12]": "kio",
    r"(.*\.)?conv_layers\.\d+\.conv": "kio",
}
# Of an autoencoder.
_DIFFUSERS_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class NameMap:
    """Torch names of a model's leaves, for `names=` of `inject` and all loaders and savers.

    Two forms of `names` are read:

    - a function of the default dotted name, or `{regex: template}`, as `loha_jax.inject` takes
      them;
    - `{torch_regex: (jax_path, transform)}`, the mapping that google-tunix and jax-bonsai models
      load their weights with. Its patterns are run on the names in the checkpoint `base=`; every
      layout follows from its shapes.

    `NameMap.transformers`, `NameMap.diffusers` and `NameMap.infer` make other ones.

    Args:
        names: see above.
        base: the torch checkpoint (a safetensors file or folder; only headers are read) or `{name:
            shape}`.
        preprocess: the function that stacks tensors after the mapping (tunix' `preprocess_fn`).
        layouts: `{regex: layout}` by default dotted name; they come before those that the mapping
            gives.
        rows: `{regex: RowTransform}` by default dotted name: modules whose rows torch has in
            another order or scaled. A pattern that matches no module of a tree is an error there.

    Raises:
        TypeError: a value of `rows` is no `RowTransform`.
        ValueError: a transform is of no known form; a mapping without `base`; `preprocess` or
            `base` without a mapping.

    Example:
        >>> pattern = r"model\\.layers\\.(\\d+)\\.q_proj\\.weight"
        >>> mapping = {pattern: (r"layers.\\1.q.w", ((1, 0), (6, 2, 4)))}
        >>> names = NameMap(mapping, base={"model.layers.0.q_proj.weight": (8, 6)})
        >>> names("layers.0.q"), names.layouts["layers.0.q"].word
        ('model.layers.0.q_proj', 'ioo')
    """

    def __init__(
        self,
        names: Names | TorchMapping | None = None,
        *,
        base: str | Path | Mapping[str, Sequence[int]] | None = None,
        preprocess: Preprocess | None = None,
        layouts: Layouts | None = None,
        rows: Rows | None = None,
    ):
        self._names: Names | None = None
        self._leaves = SettledNames()
        self.is_settled = False  # by a checkpoint's contents or a mapping
        self._given = dict(layouts or {})
        self.rows = checked_rows(rows)
        self._after: tuple[Names, ...] = ()
        self._is_gpt2 = False
        if is_torch_mapping(names):
            if base is None:
                raise ValueError(
                    "The patterns of a mapping {torch_regex: (jax_path, transform)} are run on "
                    "torch's names: give the checkpoint, or {name: shape}, as `base=`"
                )
            self._leaves, self.is_settled = map_sources(names, base, preprocess), True
            return
        self._names = cast("Names | None", names)
        if base is not None or preprocess is not None:
            raise ValueError(
                "`base` and `preprocess` belong to a mapping {torch_regex: (jax_path, transform)}"
            )

    @property
    def sources(self) -> dict[str, Source]:
        """`Source` by leaf path ("layers.0.attn.q_proj.w"), where a checkpoint settled it."""
        return {path: self.source(path) for path in self._leaves.sources}

    @property
    def unmatched(self) -> dict[str, str]:
        """Leaf paths with no torch name, and why."""
        return self._leaves.unmatched

    @property
    def unused(self) -> tuple[str, ...]:
        """Torch names that no leaf has."""
        return self._leaves.unused

    @property
    def ambiguous(self) -> dict[str, tuple[str, ...]]:
        """Leaf paths with the torch names, and layouts where these differ, that each could have."""
        return self._leaves.ambiguous

    @property
    def layouts(self) -> dict[str, str | Layout | None]:
        """Layouts by default module name, which `inject` uses where it is given none.

        None for a leaf called like a kernel that is a vector in torch.
        """
        return {**self._leaves.layouts, **self._given}

    @classmethod
    def transformers(cls, model_type: str | None = None) -> NameMap:
        """Return the names of Flax models in transformers (up to 4.57, the last release with them).

        They are torch's, with kernel, scale and embedding for weight, but for these:

        - ResNet's `layer_0` is torch's `layer.0`.
        - A weight norm's `weight_g` and `weight_v` are `parametrizations.weight.original0` and `1`.
        - The Conv1d kernels of Whisper and Wav2Vec2 are `kio`.
        - GPT-2's projections are `[out, in]`; torch has `[in, out]`. PEFT has no LoHa for them.

        Args:
            model_type: `config.model_type`. Only "gpt2" makes a difference.

        Example:
            >>> NameMap.transformers()("resnet.encoder.stages.0.layers.0.layer.layer_1.convolution")
            'resnet.encoder.stages.0.layers.0.layer.1.convolution'
        """
        result = cls(_TRANSFORMERS_NAMES, layouts=_TRANSFORMERS_LAYOUTS)
        if model_type == "gpt2":
            result._given[GPT2_CONV1D] = "oi"
            result._is_gpt2 = True
        return result

    @classmethod
    def diffusers(cls) -> NameMap:
        """Return the names of Flax models in diffusers (up to 0.39, the last release with them).

        `down_blocks_0` is torch's `down_blocks.0`, and an autoencoder's `query`, `key`, `value` and
        `proj_attn` are `to_q`, `to_k`, `to_v` and `to_out.0`.

        Example:
            >>> NameMap.diffusers()("down_blocks_0.attentions_1.attn1.to_out_0")
            'down_blocks.0.attentions.1.attn1.to_out.0'
        """
        return cls(lambda name: ".".join(map(_diffusers_part, name.split("."))))

    @classmethod
    def infer(cls, params: PyTree, base: str | Path, *, rows: Rows | None = None) -> NameMap:
        """Find names and layouts by contents: each leaf among the tensors of a torch checkpoint.

        It finds permuted and reshaped kernels (`[D, N, H]`, convolutions), stacks along any one or
        two axes (`[L, in, out]`, `[2, K, D, H]`), and tied copies. Tensors are compared bit for bit
        after rounding to the coarser of the two dtypes, so that bfloat16 parameters of a float32
        file are found, and the reverse. Whatever is not settled by contents is listed in
        `ambiguous` (two tensors of zeros, a symmetric kernel) or `unmatched`. `inject`, `load_base`
        and `save_merged` then raise an error that names it. `settle` gives it a name.
        Biases and scales without contents of their own follow the module whose other parameter was
        found.

        One tensor is in memory at a time: sums of hashed values find candidates to compare.

        Args:
            params: the tree with the checkpoint's values, adapted or not.
            base: a safetensors file, or a folder with one or with shards and an index.
            rows: as for `NameMap`; contents are compared with them applied. Scales that are no
                power of two round: a leaf that no tensor equals then is unmatched.

        Raises:
            TypeError: `params` has shapes instead of values.
            FileNotFoundError, ValueError: see `Checkpoint`; or it is quantised.

        A torch `Conv1D` (GPT-2) stores [in, out] instead of [out, in], which contents do not show:
        give `layouts=`.

        Example:
            >>> import tempfile, numpy as np
            >>> from safetensors.numpy import save_file
            >>> w = np.arange(48, dtype=np.float32).reshape(8, 6)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     save_file({"model.q_proj.weight": w}, f"{folder}/model.safetensors")
            ...     params = {"attn": {"q": jnp.asarray(w.T.reshape(6, 2, 4))}}
            ...     names = NameMap.infer(params, folder)
            >>> print(names.table())
            leaf    shape    torch                layout
            attn.q  [6,2,4]  model.q_proj.weight  ioo
        """
        result = cls(rows=rows)
        result._leaves, result.is_settled = match_contents(params, base, result), True
        return result

    def then(self, names: Names) -> NameMap:
        """Return this map with its torch names renamed by a function or `{regex: template}`.

        For checkpoints whose tensors are called otherwise than the model's modules: with one map to
        load the base and another to exchange adapters.

        Example:
            >>> NameMap({r"h\\.(.*)": r"layers.\\1"}).then({r"(.*)": r"model.\\1"})("h.0.q")
            'model.layers.0.q'
        """
        result = copy.copy(self)
        if result.is_settled:
            result._leaves = result._leaves.renamed(names)
        else:
            result._after = (*self._after, names)
        return result

    def settle(self, choices: Mapping[str, Choice]) -> NameMap:
        """Return this map with some leaves settled by hand.

        Args:
            choices: by leaf path or default module name, as `table` prints them: the torch name of
                the module or parameter (a list of them for a stack), or `(name, layout)`.

        Raises:
            KeyError: the map knows no such leaf.
            ValueError: the name is none of those whose contents fit, or the layout does not fit the
                leaf.

        Example:
            >>> names = NameMap({r"a\\.weight": ("q.w", None)}, base={"a.weight": (3, 3)})
            >>> names.settle({"q.w": ("other.weight", "io")})("q")
            'other'
        """
        result = copy.copy(self)
        result._leaves, result.is_settled = self._leaves.settle(choices), True
        return result

    def __call__(self, name: str) -> str | Sequence[str]:
        """Return the torch module name of a default module name; a list of them for a stack.

        Raises:
            UnknownNameError: nothing settles it; the message lists what it could be.
        """
        if self.is_settled:
            return self._leaves.module_names(name)
        given = [name]
        for names in (self._names, *self._after):
            given = [new for one in given for new in all_names(one, names)]
        return given[0] if len(given) == 1 else given

    def source(self, path: str) -> Source:
        """Return where the values of a leaf are in the checkpoint, by leaf path.

        Raises:
            ValueError: the map does not know it; the message says why.
        """
        rows = row_transform(module_name(path.split(".")), self)
        return dataclasses.replace(self._leaves.source(path), rows=rows)

    def is_conv1d(self, name: str) -> bool:
        """Return whether torch stores the weight of a module (by default name) as [in, out]."""
        return self._is_gpt2 and looks_like_conv1d(name)

    def table(self) -> str:
        """Return the map as text, by leaf; then what is not settled, and transforms of rows."""
        own = (f"rows: {pattern}: {transform}" for pattern, transform in self.rows.items())
        return "\n".join((self._leaves.table(), *own))

    def __repr__(self) -> str:
        if self.is_settled:
            return f"NameMap({self._leaves})"
        if isinstance(self._names, Mapping):
            return f"NameMap({len(self._names)} patterns)"
        return f"NameMap({getattr(self._names, '__qualname__', repr(self._names))})"


def _diffusers_part(name: str) -> str:
    # linear_1 and linear_2 of an embedding are called so in torch
    numbered = name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name)
    return _DIFFUSERS_ATTENTION.get(name, numbered)
