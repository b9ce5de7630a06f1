"""The result that a reader finds after a writer was ended: old, new, or a mix."""

from pathlib import Path

from loha_jax.interop.disk.paired_files import PENDING

PLACE = "place"  # the folder that is watched
OUT = "out"


def files_of(path):
    """The content of a file or folder, without what begins with a dot."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    names = {str(p.relative_to(path)): p for p in found}
    return {
        name: p.read_bytes()
        for name, p in names.items()
        if not any(part[0] == "." for part in Path(name).parts)
    }


def as_read(path):
    """The same with pending files in their places, as `load_peft` reads them."""
    files = files_of(path)
    for pending in path.rglob(f"{PENDING}/*") if path.is_dir() else ():
        files[str((pending.parent.parent / pending.name).relative_to(path))] = pending.read_bytes()
    return files


def units(files):
    """An adapter each, or the whole."""
    inner = {name: data for name, data in files.items() if name.startswith("b/")}
    return (
        [inner, {name: data for name, data in files.items() if name not in inner}]
        if inner
        else [files]
    )


def has_result(files):
    """Tell if a reader finds a checkpoint (weights or their index) or an adapter (a config)."""
    names = {Path(name).name for name in files}
    marks = {"adapter_config.json", "model.safetensors", "model.safetensors.index.json", ""}
    return bool(names & marks)


def verdict(files, old, new):
    """Old, new or neither; of several adapters in one folder, of each."""
    found = []
    for n, unit in enumerate(units(files)):
        wanted = {"old": units(old), "new": units(new)}
        matching = [k for k, v in wanted.items() if n < len(v) and v[n] == unit]
        if not matching and not has_result(unit):
            matching = ["none"]
        found += matching[:1] or ["MIX of " + ", ".join(sorted(unit))]
    return " and ".join(sorted(set(found)))


def leftovers(root):
    return sorted(
        str(p.relative_to(root)) for p in (root / PLACE).rglob(".*") if p.is_file() or p.is_dir()
    )
