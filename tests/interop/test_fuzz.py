"""Thousands of broken files.

Each is loaded rightly or refused with a `FileError`, in bounded time, and leaves nothing.

python run.py test tests/interop/test_fuzz.py --fuzz-cases 100000 --fuzz-seed 7
"""

import contextlib
import importlib.util
import json
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from lycoris_samples import LAYOUTS, base_params
from mutations import mutate_folder
from peft_samples import Sample
from typer.testing import CliRunner

import loha_jax
from loha_jax import interop
from loha_jax.interop.commands.main import app
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.formats.read_adapter import read_adapter

SECONDS = 30  # far more than any case needs, far less than a pattern that backtracks
MEGABYTES = 1500  # what a process may grow by over all cases


class TooLong(Exception):
    pass


@contextlib.contextmanager
def watched():
    """End a case that does not end by itself."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sources(folder):
    """`(what, path, load)` of each real file.

    `load` gives a tree. It is None where nothing is loaded into one.
    """
    found = []
    for name in (
        "linear",
        "conv2d_cp",
        "conv1d_cp",
        "modules_to_save",
        "llama_patterns",
        "linear_bin",
    ):
        sample = Sample(name)
        if name == "linear_bin" and importlib.util.find_spec("torch") is None:
            continue
        base, given = sample.params(), sample.layouts
        found.append(
            (name, sample.adapter, lambda p, b=base, g=given: interop.load_peft(p, b, layouts=g))
        )
    data = Path(__file__).parents[1] / "data" / "lycoris"
    base = base_params()
    for form in ("plain", "tucker", "dora"):
        path = data / f"native_{form}.safetensors"
        found.append((form, path, lambda p: interop.load_lycoris(p, base, layouts=LAYOUTS)))
    found += [
        (f"read {what}", path, lambda p: read_adapter(p) and None) for what, path, _ in list(found)
    ]
    linear = Sample("linear")
    params = linear.params()
    interop.save_lora(folder / "lora", interop.load_peft(linear.adapter, params))
    found.append(("lora", folder / "lora", lambda p: interop.load_lora(p, params)))
    interop.save_merged(folder / "base", params, max_shard_size=200)
    found.append(("base", folder / "base", lambda p: interop.load_base(p, params)))
    found.append(("checkpoint", folder / "base", lambda p: Checkpoint(p) and None))
    return found


CHUNKS = 16
"""The number of tests that the broken files are spread over. The first one runs every day."""


def part_of(cases, chunk):
    """Return the numbers of the cases of one of the tests."""
    return range(chunk * cases // CHUNKS, (chunk + 1) * cases // CHUNKS)


@pytest.mark.parametrize(
    "chunk", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, CHUNKS))]
)
def test_broken_files_are_loaded_rightly_or_refused(chunk, tmp_path, request):
    cases, seed = part_of(request.config.option.fuzz_cases, chunk), request.config.option.fuzz_seed
    kinds = sources(tmp_path)
    whole = {what: load(path) for what, path, load in kinds}
    grown_from = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"loaded": 0, "refused": 0}
    for case in cases:
        random = np.random.default_rng((seed, case))
        what, path, load = kinds[case % len(kinds)]
        target = tmp_path / "case" / path.name
        changed = mutate_folder(path, target, random)
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = load(target)
        except (interop.FileError, FileNotFoundError):
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"case {case} of seed {seed}: {what}, {changed.name}")
            raise
        else:
            outcomes["loaded"] += 1
            if tree is not None:
                check(tree, whole[what], f"case {case} of seed {seed}: {what}, {changed.name}")
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
        shutil.rmtree(tmp_path / "case")
    assert min(outcomes.values()) > len(cases) // 20, outcomes
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown_from) / (
        2**20 if sys.platform == "darwin" else 1024
    )
    assert grown < MEGABYTES


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong(tmp_path, request):
    """Exit code 2 with one message and nothing written; or a result. Never a traceback."""
    cases, seed = request.config.option.fuzz_cases // 5, request.config.option.fuzz_seed
    linear = Sample("linear")
    interop.save_merged(tmp_path / "base", linear.params(), max_shard_size=200)
    lycoris = Path(__file__).parents[1] / "data" / "lycoris"
    kohya = lycoris / "kohya_tucker.safetensors"
    commands = [
        (linear.adapter, lambda p, out: ["inspect", p]),
        (kohya, lambda p, out: ["inspect", p]),
        (tmp_path / "base", lambda p, out: ["inspect", p]),
        (linear.adapter, lambda p, out: ["convert", p, out, "--to", "lora", "--rank", 2]),
        (linear.adapter, lambda p, out: ["convert", p, out, "--to", "lycoris"]),
        (kohya, lambda p, out: ["convert", p, out, "--to", "lycoris"]),
        (linear.adapter, lambda p, out: ["merge", tmp_path / "base", p, out]),
        (tmp_path / "base", lambda p, out: ["merge", p, linear.adapter, out]),
        (linear.adapter, lambda p, out: ["diff", p, linear.adapter]),
        (tmp_path / "base", lambda p, out: ["diff", tmp_path / "base", p]),
    ]
    codes = {0: 0, 1: 0, 2: 0}
    for case in range(cases):
        random = np.random.default_rng((seed, 1, case))
        path, arguments = commands[case % len(commands)]
        target, out = tmp_path / "case" / path.name, tmp_path / "case" / "out"
        changed = mutate_folder(path, target, random)
        command = [*map(str, arguments(target, out)), "--json"]
        where = f"case {case} of seed {seed}: {command}, {changed.name}"
        with watched(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(app, command)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            where,
            result.exception,
        )
        assert "Traceback" not in result.output, where
        assert isinstance(json.loads(result.stdout), dict), where
        codes[result.exit_code] += 1
        left = [
            p.name
            for p in (tmp_path / "case").iterdir()
            if p != target and not (p == out and not result.exit_code)
        ]
        assert not left, (where, left)
        shutil.rmtree(tmp_path / "case")
    assert min(codes.values()) > cases // 50, codes


def check(tree, whole, where):
    """Check that the adapted modules are among those of the whole file.

    Their factors have the kind of their shapes, and finite values.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_weight) if is_weight(leaf)]
    wholes = {
        leaf.names: leaf for leaf in jax.tree.leaves(whole, is_leaf=is_weight) if is_weight(leaf)
    }
    assert bool(leaves) == bool(wholes), where
    for leaf in leaves:
        assert (
            leaf.kernel.shape == wholes[leaf.names].kernel.shape if leaf.names in wholes else True
        ), where
        merged = np.asarray(loha_jax.merge({"q": leaf})["q"])
        assert merged.shape == leaf.kernel.shape, where
        for factors in leaf.adapters.values():
            assert all(np.isfinite(np.asarray(x)).all() for x in factors.trained.values()), where


def is_weight(leaf):
    return isinstance(leaf, loha_jax.LoHaWeight)
