"""The writers of `loha_jax.interop`, ended at chosen moments.

Run by test_crash_safety.py in a process of its own.

    python crash_writers.py FOLDER CASES SEED [WRITER ...]

Every case forks this process, which has imported everything and started nothing, so that a case
takes little time. The result is JSON on the last line: `{check: {writer: {...}}}`. CASES is the
number of kills of each writer.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
from ctypes import CDLL, c_uint32
from pathlib import Path

import numpy as np
from crash_child import in_child
from crash_results import OUT, PLACE, as_read, files_of, has_result, leftovers, verdict
from jax._src import xla_bridge

import loha_jax
from loha_jax import interop
from loha_jax.interop.commands.convert import convert_adapter
from loha_jax.interop.disk.checkpoint_writer import CheckpointWriter
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.lowrank.layout import Layout
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight

OLD, NEW = 1, 2
SHAPE, RANK = (48, 40), 4


def tree(version, alpha=None, names=("default",)):
    """An adapted tree of numpy arrays.

    Its shapes are the same in all versions: a mix of two would load.
    """
    values = np.random.default_rng(version)
    alpha = float(version if alpha is None else alpha)
    adapters = {}
    for name in names:
        shapes = [(SHAPE[1], RANK), (RANK, SHAPE[0])] * 2
        factors = [values.normal(size=shape).astype(np.float32) for shape in shapes]
        config = loha_jax.LoHaConfig(r=RANK, alpha=alpha, target_modules=["q"])
        tensors = dict(zip(FACTOR_NAMES, factors, strict=False))
        adapters[name] = Factors(**tensors, ranks=(RANK,), alphas=(alpha,), config=config)
    kernel = np.ones(SHAPE, np.float32)
    return {"q": {"kernel": LoHaWeight(kernel, adapters, Layout("io"), ("q",), names)}}


def base(folder):
    """A checkpoint of two shards with a config."""
    folder.mkdir()
    tensors = [(name, np.dtype(np.float32), SHAPE[::-1]) for name in ("q.weight", "k.weight")]
    with CheckpointWriter(
        folder, tensors, SHAPE[0] * SHAPE[1] * 4, metadata={"format": "pt"}
    ) as writer:
        for n, (name, dtype, shape) in enumerate(tensors):
            writer.write(name, np.full(shape, n, dtype))
        writer.commit()
    (folder / "config.json").write_text("{}")


def save_peft(same_alpha=False, names=("default",)):
    return lambda sources, out, version: interop.save_peft(
        out, tree(version, 1 if same_alpha else None, names)
    )


def save_lora(sources, out, version):
    interop.save_lora(out, tree(version), rank={OLD: None, NEW: 3}[version])


def save_lycoris(sources, out, version):
    interop.save_lycoris(out, tree(version))


def save_merged(sources, out, version):
    interop.save_merged(
        out, tree(version), base=sources / "base", max_shard_size=SHAPE[0] * SHAPE[1] * 4
    )


def merge(sources, out, version):
    merge_checkpoint(sources / "base", [(sources / f"adapter{version}", 1.0)], out, force=True)


def convert(to):
    return lambda sources, out, version: convert_adapter(
        sources / f"adapter{version}", out, to, force=True
    )


# name: (write, whether there is an old result, names of strange files beside it)
WRITERS = {
    "peft, new": (save_peft(), False, ()),
    "peft, same config": (save_peft(same_alpha=True), True, ()),
    "peft, other config": (save_peft(), True, ()),
    "peft, other config, strange files": (save_peft(), True, ("notes.txt",)),
    "peft, two adapters": (save_peft(names=("default", "b")), True, ()),
    "lora, other config": (save_lora, True, ()),
    "lora, other config, strange files": (save_lora, True, ("notes.txt",)),
    "lycoris": (save_lycoris, True, ()),
    "merged, new": (save_merged, False, ()),
    "merged, strange files": (save_merged, False, ("notes.txt",)),
    "merge files, new": (merge, False, ()),
    "merge files, replaced": (merge, True, ()),
    "convert to peft": (convert("peft"), True, ()),
    "convert to kohya": (convert("kohya"), True, ()),
    "convert to lora": (convert("lora"), True, ()),
}


def prepare(root):
    """The place as it was before, with nothing of an earlier case."""
    shutil.rmtree(root / PLACE, ignore_errors=True)
    shutil.copytree(root / "before", root / PLACE)


def setup(root, writer):
    """Make the place as it is before a write.

    Returns the write, the contents of the old and the new result, and what the write takes.
    """
    make, has_old, strange = WRITERS[writer]
    sources = root.parent / "sources"
    shutil.rmtree(root, ignore_errors=True)
    (root / PLACE).mkdir(parents=True)

    def write(version):
        make(sources, root / PLACE / OUT, version)

    if has_old:
        status, text, _ = in_child(lambda: write(OLD))
        assert status == 0, text
    if strange:
        (root / PLACE / OUT).mkdir(exist_ok=True)
    for name in strange:
        (root / PLACE / OUT / name).write_text("the author's own")
    old = files_of(root / PLACE / OUT)
    shutil.copytree(root / PLACE, root / "before")
    status, text, (operations, seconds) = in_child(lambda: write(NEW))
    assert status == 0, text
    new = files_of(root / PLACE / OUT)
    assert not leftovers(root), leftovers(root)
    assert has_result(new)
    assert verdict(new, old, new) == "new", "it cannot be told from the old one"
    return write, old, new, operations, seconds


def kill(root, writer, cases, seed):
    """Kills at `cases` moments: half of them before single operations, half at random times."""
    write, old, new, operations, seconds = setup(root, writer)
    random.seed(seed)
    points = random.sample(range(1, operations + 1), min(operations, -(-cases // 2)))
    moments = [("point", p) for p in points] + [("time", None)] * (cases - len(points))
    result = {
        "operations": operations,
        "killed": 0,
        "ended": {},
        "other_readers": {},
        "left": 0,
        "blocked": 0,
        "problems": [],
    }
    for kind, point in moments:
        prepare(root)
        delay = random.uniform(0, seconds) if kind == "time" else None
        status, text, _ = in_child(lambda: write(NEW), point=point, kill_after=delay)
        result["killed"] += status == -signal.SIGKILL
        if status not in (0, -signal.SIGKILL):
            result["problems"].append([kind, point or delay, "failed", text])
        files = as_read(root / PLACE / OUT)
        ended = verdict(files, old, new)
        plain = verdict(files_of(root / PLACE / OUT), old, new)
        for key, value in (("ended", ended), ("other_readers", plain)):
            result[key][value] = result[key].get(value, 0) + 1
        result["left"] += bool(leftovers(root))
        allowed = {"old", "new", "new and old"} | (set() if has_result(old) else {"none"})
        if ended not in allowed or "MIX" in plain:
            result["problems"].append([kind, point or delay, ended, plain])
        status, text, _ = in_child(lambda: write(NEW))  # the next run
        again = verdict(files_of(root / PLACE / OUT), old, new)
        if status == 1 and "already holds weights" in text and ended in ("none", "new"):
            result["blocked"] += ended == "none"  # shards are there, their index is not
        elif status or again != "new" or leftovers(root):
            result["problems"].append(
                [kind, point or delay, "next run", status, text, again, leftovers(root)]
            )
    return result


def full_disk(root, writer, cases):
    """Limit the size of files, as on a full disk; then use a small disk, if one can be had."""
    write, old, new, _, _ = setup(root, writer)
    sizes = [p.stat().st_size for p in (root / PLACE).rglob("*") if p.is_file()]
    largest, needed = max(sizes), sum(-(-size // 4096) + 1 for size in sizes)
    result = {"refused": 0, "problems": [], "disk": "limit"}

    def judge(status, text, what):
        files = as_read(root / PLACE / OUT)
        ended = verdict(files, old, new)
        allowed = {"new", "new and old"} if status == 0 else {"old", "new and old", "none"}
        if status == 1 and ended == "none" and has_result(old):
            allowed = {"old"}
        result["refused"] += status == 1
        said = any(
            word in text
            for word in ("File too large", "No space left", "GB free", "RESOURCE_EXHAUSTED")
        )
        left = [
            name for name in leftovers(root) if not name.endswith(".merging")
        ]  # finished shards, to go on with
        if ended not in allowed or (status and not said) or (status and left):
            result["problems"].append([what, status, text, ended, left])

    for size in sorted({0, 1, largest // 2, largest - 1, largest}):
        prepare(root)

        def limited(size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write(NEW)

        judge(*in_child(limited)[:2], f"limit of {size}")
    libc = CDLL(None, use_errno=True)
    if os.geteuid() or not _mount(libc, root / PLACE, 1 << 20):
        return result
    result["disk"] = "tmpfs"
    _unmount(libc, root / PLACE)
    pages = 16 + 2 * needed
    for size in range(4, pages, max(1, pages // cases)):
        shutil.rmtree(root / PLACE, ignore_errors=True)
        (root / PLACE).mkdir()
        _mount(libc, root / PLACE, size * 4096)
        try:
            try:
                shutil.copytree(root / "before", root / PLACE, dirs_exist_ok=True)
            except (OSError, shutil.Error):
                continue  # too small for what was there
            judge(*in_child(lambda: write(NEW))[:2], f"tmpfs of {size} pages")
        finally:
            _unmount(libc, root / PLACE)
    return result


def _mount(libc, place, size):
    return libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()) == 0


def _unmount(libc, place):
    assert libc.umount2(os.fsencode(place), 2) == 0


def read_only(root, writer):
    """No folder below the place, and not the place, may be written to."""
    write, old, new, _, _ = setup(root, writer)
    prepare(root)
    place = root / PLACE

    def refused():
        for folder in [place, *(p for p in place.rglob("*") if p.is_dir())]:
            folder.chmod(0o555)
        _drop_capabilities()
        write(NEW)

    status, text, _ = in_child(refused)
    for folder in [place, *(p for p in place.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    ended = verdict(as_read(place / OUT), old, new)
    whole = files_of(place / OUT) == old
    fine = (
        status == 1 and "Permission denied" in text and OUT in text and ".tmp" not in text and whole
    )
    return {
        "problems": [] if fine and not leftovers(root) else [[status, text, ended, leftovers(root)]]
    }


def _drop_capabilities():
    """root, who may write everywhere, becomes an owner like others."""
    header, data = (c_uint32 * 2)(0x20080522, 0), (c_uint32 * 6)()
    if not os.geteuid():
        assert CDLL(None).capset(header, data) == 0


def main():
    folder, cases, seed, *writers = sys.argv[1:]
    folder = Path(folder)
    sources = folder / "sources"
    sources.mkdir(parents=True)
    base(sources / "base")
    for version in (OLD, NEW):
        interop.save_peft(sources / f"adapter{version}", tree(version))
    assert not xla_bridge.backends_are_initialized(), "a process with JAX's threads must not fork"
    found = {"kill": {}, "full disk": {}, "read-only": {}}
    for name in writers or WRITERS:
        found["kill"][name] = kill(folder / "kill", name, int(cases), int(seed))
        found["full disk"][name] = full_disk(folder / "full", name, max(2, int(cases) // 4))
        found["read-only"][name] = read_only(folder / "read", name)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
