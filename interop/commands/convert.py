"""`convert_adapter`: an adapter from one file format into another.

The factors stay the same, bit for bit, where both formats hold them.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from pathlib import Path

from jax.typing import DTypeLike

from loha_jax.targets.module_names import Names

from ..disk.atomic import check_place
from ..formats.lora_files import check_form
from .conversion_source import read_source
from .lycoris_file import lycoris_file
from .peft_folder import loha_folder, lora_folder


class Format(enum.StrEnum):
    """The formats that an adapter is converted to."""

    peft = enum.auto()
    lycoris = enum.auto()
    kohya = enum.auto()
    lora = enum.auto()


FORMATS = tuple(Format)


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

    def to_json(self) -> dict[str, object]:
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
    form: str = "peft",
    prefix: str | None = None,
    only: str | None = None,
    names: Names | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
) -> Conversion:
    """Write an adapter in another format. The target appears whole or not at all.

    Args:
        source: PEFT's folder (LoHa or LoRA), LyCORIS' or kohya's file.
        target: the folder or file to write.
        to: "peft", "lycoris", "kohya" or "lora". A LoRA becomes the LoHa of the same rank that is
            equal to it.
        rank, energy: of `to="lora"`, see `lora_of`; the exact LoRA of rank r² by default.
        base: the base model's checkpoint: its names say what a LyCORIS file's underscores stand
            for, its shapes which modules are convolutions.
        form: of `to="lora"`: "peft" for a folder, "kohya" or "diffusers" for a file.
        prefix: of keys in files.
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
        >>> import tempfile, jax, loha_jax, numpy as np
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"q": {"kernel": np.ones((3, 4), np.float32)}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
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
    if form != "peft" and to != "lora":
        raise ValueError('`form=` is for `to="lora"`')
    if prefix is not None and form == "peft" and to not in ("lycoris", "kohya"):
        raise ValueError(
            '`prefix=` is for `to="lycoris"`, `to="kohya"` and `to="lora"` as one file'
        )
    if form != "peft":
        check_form(form, prefix)
    target = Path(os.path.abspath(target))
    check_place(target, force, [source] if base is None else [source, base])
    read = read_source(source, base, only, names)
    if dtype is not None and to != "lora":  # whose factors are computed from the source's own
        read.cast(dtype)
    if to == "peft":
        made = loha_folder(read)
    elif to == "lora":
        made = lora_folder(read, rank, energy, dtype, form, prefix)
    else:
        made = lycoris_file(read, to, prefix)
    made.write(target, force)
    ranks = {module.name: module.r for module in made.modules}
    return Conversion(read.adapter.form, ranks, made.errors, tuple(read.notes))
