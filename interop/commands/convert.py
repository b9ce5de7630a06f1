"""`convert_adapter`: an adapter from one file format into another one, bit for bit where both hold the tensors."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loha_jax.targets.config import PEFT_VERSION, LoHaConfig
from loha_jax.targets.module_names import Names

from ..disk.atomic import move_into_place, naming, temporary_folder, write_atomically
from ..disk.base_checkpoint import read_config
from ..formats.adapter_file import AdapterModule
from ..formats.lora_config import check_decomposed, exact_targets, like_loha, lora_config
from ..formats.lycoris_files import (
    KOHYA_PREFIX,
    NATIVE_PREFIX,
    file_bytes,
    lycoris_state,
)
from ..formats.lycoris_keys import PARAMETER_OF
from ..formats.model_card import MODEL_CARD_NAME, model_card
from ..formats.peft_files import folder_contents, peft_state
from ..formats.ranks import ranks_and_alphas
from ..updates.lora_conversion import lora_of
from .conversion_source import ConversionSource, cast_module

FORMATS = ("peft", "lycoris", "kohya", "lora")
_KOHYA_DEFAULT = "lora_unet_"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        form: the format of the source.
        modules: the rank of each module written, by name.
        errors: for LoRA, the relative error of each module's update; 0 where it is exact.
        notes: remarks for the user, one sentence each.
    """

    form: str
    modules: dict[str, int]
    errors: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON's types."""
        modules = [
            {"name": name, "r": r, "error": self.errors.get(name)}
            for name, r in self.modules.items()
        ]
        return {"form": self.form, "modules": modules, "notes": list(self.notes)}


def convert_adapter(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | Path | None = None,
    prefix: str | None = None,
    only: str | None = None,
    names: Names | None = None,
    dtype: Any = None,
    force: bool = False,
) -> Conversion:
    """Write an adapter in another format. The target appears whole or not at all.

    Args:
        source: PEFT's folder (LoHa or LoRA), LyCORIS' or kohya's file.
        target: the folder (or, of LyCORIS and kohya, file) to write.
        to: "peft", "lycoris", "kohya" or "lora". A LoRA becomes the LoHa of the same rank that is
            equal to it.
        rank, energy: of `to="lora"`, see `lora_of`; the exact LoRA of rank r² by default.
        base: the base model's checkpoint: its names say what a LyCORIS file's underscores stand
            for, its shapes which modules are convolutions.
        prefix: of keys in LyCORIS' and kohya's files.
        only: a regular expression for the whole names of modules in the source; the others are left
            out.
        names: other names for modules, `{regex: template}` or a function, where the base model's
            were changed since the adapter was trained; patterns are for whole names of modules in
            the source.
        dtype: of the factors, instead of their own.
        force: a target that is there is replaced.

    Raises:
        FileExistsError: the target is there.
        ValueError: wrong arguments, or something that the target cannot hold, by name. Nothing is
            written then.

    Example:
        >>> import tempfile, jax, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject({"q": {"kernel": np.ones((3, 4), np.float32)}}, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loha_jax.interop.save_peft(f"{folder}/adapter", params)
        ...     convert_adapter(f"{folder}/adapter", f"{folder}/a.safetensors", "kohya").modules
        {'q': 2}
    """
    if to not in FORMATS:
        raise ValueError(f"Adapters are converted to {', '.join(FORMATS)}, not to {to!r}")
    if to != "lora" and (rank is not None or energy is not None):
        raise ValueError(
            '`rank=` and `energy=` are for `to="lora"`: other formats hold the factors as they are'
        )
    if prefix is not None and to not in ("lycoris", "kohya"):
        raise ValueError('`prefix=` is for `to="lycoris"` and `to="kohya"`')
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) and not force:
        raise FileExistsError(
            f"{target} is there already. Choose another place, or pass `force=True` to replace it"
        )
    if target == Path(os.path.abspath(source)):
        raise ValueError(f"{target} is the source itself")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{target.parent}' to put {target.name} into")
    read = ConversionSource(source, base, only, names)
    if dtype is not None and to != "lora":  # whose factors are computed from the source's own
        read.cast(dtype)
    job = _Targets(read)
    makers: dict[str, Callable[[], Callable[[Path], None]]] = {
        "peft": job.peft,
        "lora": lambda: job.lora(rank, energy, dtype),
        "lycoris": lambda: job.lycoris(NATIVE_PREFIX, prefix),
        "kohya": lambda: job.lycoris(_KOHYA_DEFAULT, prefix),
    }
    _write_whole(
        target, makers[to](), force
    )  # all content is made before the first file is touched
    ranks = {m.name: m.r for m in job.written.values()}
    return Conversion(read.adapter.form, ranks, job.errors, tuple(read.notes))


def _write_whole(target: Path, write: Callable[[Path], None], force: bool) -> None:
    with naming(target), temporary_folder(target) as work:
        write(work / "new")
        move_into_place(work / "new", target, force)


class _Targets:
    """The targets of a conversion: for each, a function that writes it to a path."""

    def __init__(self, source: ConversionSource):
        self._source, self._adapter = source, source.adapter
        self.errors: dict[str, float] = {}
        self.written: dict[str, AdapterModule] = {}

    def _config(self, modules: Mapping[str, AdapterModule], saved: list[str]) -> LoHaConfig:
        """Return a LoHa's config; the source's own if it has one."""
        given = {k: v for k, v in self._adapter.config.items() if v is not None}
        if self._adapter.config.get("peft_type") == "LOHA":
            config = LoHaConfig.from_dict(self._adapter.config)
        elif given:
            config = like_loha(self._adapter.config)
        else:
            config = LoHaConfig(modules_to_save=saved or None)
        if self._adapter.config.get("peft_type") == "LOHA" and self._source.is_unchanged:
            return dataclasses.replace(config, inference_mode=True, peft_version=PEFT_VERSION)
        return dataclasses.replace(
            config,
            **ranks_and_alphas(modules),
            use_effective_conv2d=any("hada_t1" in m.tensors for m in modules.values()),
            target_modules=self._targets(modules),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            inference_mode=True,
            peft_version=PEFT_VERSION,
        )

    def _targets(self, modules: Mapping[str, AdapterModule]) -> list[str] | str:
        given = self._adapter.config.get("target_modules")
        if self._source.is_unchanged and given and not isinstance(given, str):
            return sorted(given)
        if self._source.checkpoint is None:
            return sorted(modules)
        every = {key.rpartition(".")[0] for key in self._source.checkpoint.shapes}
        return exact_targets(set(modules), every - {""})

    def peft(self) -> Callable[[Path], None]:
        """Return a function that writes a PEFT LoHa folder."""
        modules = self._source.dotted(self._source.lohas())
        self._check_for_peft(modules)
        saved, norms = self._source.saved()
        config = self._config(modules, norms)
        return self._folder(modules, saved, config.to_dict())

    def _check_for_peft(self, modules: Mapping[str, AdapterModule]) -> None:
        shapes = self._source.shapes
        cores = {
            name: m.tensors["hada_t1"] for name, m in modules.items() if "hada_t1" in m.tensors
        }
        refused = {
            "a weight decomposition (DoRA)": [
                name for name, m in modules.items() if m.dora_scale is not None
            ],
            "a Conv3d": [
                n
                for n in modules
                if len(shapes.get(n, ())) > 4 or (n in cores and cores[n].ndim > 4)
            ],
        }
        if problems := [
            f"{what} in {', '.join(names)}" for what, names in refused.items() if names
        ]:
            raise ValueError(
                f"PEFT's LoHa cannot hold {' and '.join(problems)}. Leave them out with `only=`, or merge the adapter"
            )
        flat = [name for name in modules if name not in cores]
        if cores and flat:
            if self._source.checkpoint is None and not self._adapter.config:
                raise ValueError(
                    f"The source has modules with cores ({next(iter(cores))}) and without ({flat[0]}); whether the "
                    "latter are convolutions, which PEFT cannot hold together, only the base model's checkpoint says: "
                    "give `base=`"
                )
            if mixed := [name for name in flat if math.prod(shapes.get(name, ())[2:]) > 1]:
                raise ValueError(
                    "PEFT's config has one use_effective_conv2d for all modules, and the source has convolutions with "
                    f"cores ({', '.join(cores)}) and without ({', '.join(mixed)})"
                )

    def lora(self, rank: int | None, energy: float | None, dtype: Any) -> Callable[[Path], None]:
        """Return a function that writes a PEFT LoRA folder."""
        modules: dict[str, AdapterModule] = {}
        for name, module in self._source.dotted(self._adapter.modules).items():
            lora, self.errors[name] = lora_of(
                module, rank, energy, shape=self._source.shapes.get(name)
            )
            modules[name] = lora if dtype is None else cast_module(lora, dtype)
        saved, norms = self._source.saved()
        config = self._config(modules, norms)
        checkpoint = self._source.checkpoint
        is_gpt2 = (
            checkpoint is not None and read_config(checkpoint.folder).get("model_type") == "gpt2"
        )
        values = lora_config(config, modules, self._targets(modules), fan_in_fan_out=is_gpt2)
        check_decomposed(modules)
        if convolutions := [name for name in modules if len(self._source.shapes.get(name, ())) > 2]:
            self._source.notes.append(
                f"a checkpoint does not show the groups of convolutions: {', '.join(convolutions)} count as having none"
            )
        return self._folder(modules, saved, values)

    def _folder(
        self,
        modules: dict[str, AdapterModule],
        saved: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
    ) -> Callable[[Path], None]:
        self.written = modules
        files = folder_contents(peft_state(modules.values(), saved), config)
        files[MODEL_CARD_NAME] = model_card(config).encode()

        def write(path: Path) -> None:
            path.mkdir()
            for name, content in files.items():
                write_atomically(path / name, content)

        return write

    def lycoris(self, default: str, prefix: str | None) -> Callable[[Path], None]:
        """Return a function that writes a file of LyCORIS or kohya."""
        modules = self._source.lohas()
        is_kohya = default.startswith(KOHYA_PREFIX)
        own_prefixes = {m.prefix for m in modules.values()}
        kept = is_kohya and all(p.startswith(KOHYA_PREFIX) for p in own_prefixes) and prefix is None
        if not kept and len(own_prefixes) > 1:
            raise ValueError(
                f"The source holds several models' modules ({', '.join(sorted(own_prefixes))}); choose with `only=`"
            )
        chosen = None if kept else default if prefix is None else prefix
        known = [
            dataclasses.replace(m, in_shape=self._in_shape(own, m)) for own, m in modules.items()
        ]
        state, convolutions = lycoris_state(known, self._norm_differences(renamed=not kept), chosen)
        data = file_bytes(
            state, self._adapter.metadata if not self._adapter.config else {}, convolutions
        )
        self.written = modules

        return lambda path: write_atomically(path, data)

    def _in_shape(self, own: str, module: AdapterModule) -> tuple[int, ...] | None:
        """`(in, *spatial)` of a convolution, as the base model's checkpoint says."""
        core = module.tensors.get("hada_t1")
        shape = self._source.shapes.get(module.name)
        if shape is None and core is not None and core.ndim == 4 and core.shape[3] == 1:
            raise ValueError(
                f"The core of {own} is that of a Conv1d or of a Conv2d of width 1; the base model's checkpoint says "
                "which: `base=`"
            )
        return None if shape is None or len(shape) < 3 else shape[1:]

    def _norm_differences(self, *, renamed: bool) -> dict[str, np.ndarray]:
        """LyCORIS' differences, by torch's names where they are `renamed`. Other parameters have no place."""
        state: dict[str, np.ndarray] = {}
        refused: list[str] = []
        for key, value in self._adapter.others.items():
            module, _, part = key.rpartition(".")
            if self._adapter.config or part not in PARAMETER_OF:
                if not self._source.is_base_weight(module, part, value):
                    refused.append(key)
            else:
                state[f"{self._source.lookup.find_own(module)}.{part}" if renamed else key] = value
        if refused:
            raise ValueError(
                f"LyCORIS' files have no place for whole parameters (modules_to_save): {', '.join(refused)}. Leave "
                "them out with `only=`, or merge the adapter"
            )
        return state
