"""Adapters as a broken disk, a careless program or a stranger could have made them."""

from __future__ import annotations

import json
import os
import shutil

HUGE = 2**62
EVIL_VALUES = (
    None, True, -1, 0, 1.5, HUGE, 10**400, float("nan"), float("inf"),
    "", "x" * 5000, "../../etc/passwd", "/dev/zero", "\0", "(a+)+$", "(.*)*(.*)*x", "[", "(" * 3000,
    "all-linear", [], {}, [[]], [None], ["q", 7], {"q": -1}, {"q": "x"}, {"(.*a)*b": 2}, {"": 0},
    {"q": HUGE}, [0] * 500,
)  # fmt: skip
DTYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I8",
    "U64",
    "BOOL",
    "F8_E8M0",
    "F4",
    "C64",
    "nonsense",
    "",
    7,
    None,
)


def deep(levels):
    return "[" * levels + "]" * levels


def mutate_bytes(data, random):
    """Bits flipped, bytes lost, added, repeated or exchanged."""
    data = bytearray(data)
    at = int(random.integers(0, max(len(data), 1)))
    end = min(len(data), at + int(random.integers(1, 64)))
    kind = random.integers(0, 8)
    if kind == 0:
        for _ in range(int(random.integers(1, 9))):
            n = int(random.integers(0, max(len(data), 1)))
            data[n : n + 1] = bytes([int(random.integers(0, 256))])
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = random.bytes(int(random.integers(1, 64)))
    elif kind == 4:
        data[at:at] = data[at:end]
    elif kind == 5:
        data[:8] = int(
            random.choice([0, 1, len(data), len(data) - 8, 2**20, 2**31, 2**40, 2**63])
        ).to_bytes(8, "little")
    elif kind == 6:
        data = bytearray(random.bytes(int(random.integers(0, 200))))
    else:
        data[at:end] = b"\xff" * (end - at)
    return bytes(data)


def mutate_safetensors(data, random):
    """The header's entries changed, so that the file looks well-formed at first sight."""
    if random.random() < 0.3:
        return mutate_bytes(data, random)
    size = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    keys = [key for key in header if key != "__metadata__"]
    key = str(random.choice(keys))
    other = str(random.choice(keys))
    entry = header[key]
    kind = random.integers(0, 14)
    if kind == 0:
        entry["dtype"] = DTYPES[random.integers(0, len(DTYPES))]
    elif kind == 1:
        entry["shape"] = [[], [0], [HUGE], [2**32, 2**32], [-1], [1.5], "x", [1] * 300, None][
            random.integers(0, 9)
        ]
    elif kind == 2:
        entry["data_offsets"] = [[0, HUGE], [-1, 4], [8, 0], [0], "x", [0, len(values) + 1], None][
            random.integers(0, 7)
        ]
    elif kind == 3:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 4:
        del header[key]
    elif kind == 5:
        header[
            ["", "..", "a/b", "\0", key + ".x", "base_model.model." + key, key.upper()][
                random.integers(0, 7)
            ]
        ] = entry
    elif kind == 6:
        header[key], header[other] = header[other], entry
    elif kind == 7:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 8:
        header["__metadata__"] = [
            {"a": 1},
            [],
            "x",
            {"lora_adapter_metadata": "{"},
            {"a": "b" * 9999},
        ][random.integers(0, 5)]
    elif kind == 9:
        entry.pop(str(random.choice(list(entry))))
    elif kind == 10:  # NaN, infinity, or another value, in one place
        start = entry["data_offsets"][0]
        values = (
            values[:start]
            + [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0"][random.integers(0, 3)]
            + values[start + 4 :]
        )
    elif kind == 11:
        text = (
            json.dumps(header)[:-1]
            + ', "deep": '
            + deep(int(random.choice([10, 200, 100_000])))
            + "}"
        )
        return len(text).to_bytes(8, "little") + text.encode() + values
    elif kind == 12:
        text = json.dumps(header)
        text = text[:-1] + f", {text[1:]}"  # every key twice
        return len(text).to_bytes(8, "little") + text.encode() + values
    else:
        entry["extra"] = 1
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def mutate_json(data, random):
    """One field of a JSON object changed, lost or added; or the text itself broken."""
    kind = random.integers(0, 10)
    if kind == 0:
        return mutate_bytes(data, random)
    if kind == 1:
        return deep(int(random.choice([3, 80, 100_000]))).encode()
    values = json.loads(data)
    key = str(random.choice(list(values)))
    evil = EVIL_VALUES[random.integers(0, len(EVIL_VALUES))]
    if kind == 2:
        del values[key]
    elif kind == 3:
        values[str(random.choice(["x", "use_khatri_rao", "__class__", "peft_type"]))] = evil
    elif kind == 4:
        return json.dumps([values, evil]).encode()
    elif kind == 5 and isinstance(values[key], dict) and values[key]:
        values[key][str(random.choice(list(values[key])))] = evil
    else:
        values[key] = evil
    return json.dumps(values).encode()


def mutate_place(path, random):
    """Something else where a file was; nothing that would wait for a writer may be opened."""
    path.unlink()
    kind = random.integers(0, 6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.write_bytes(b"")


def mutate_folder(source, target, random):
    """A copy of a folder (or file) in which one file has changed.

    Returns the changed file's path.
    """
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    files = sorted(
        p for p in target.rglob("*") if p.suffix in (".json", ".safetensors", ".bin")
    ) or [target]
    path = files[random.integers(0, len(files))]
    if random.random() < 0.03:
        mutate_place(path, random)
        return path
    mutate = {".json": mutate_json, ".safetensors": mutate_safetensors}.get(
        path.suffix, mutate_bytes
    )
    path.write_bytes(mutate(path.read_bytes(), random))
    return path
