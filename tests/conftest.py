"""Settings of all tests."""

import collections
import functools
import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jax._src.interpreters import mlir
from jax._src.lru_cache import LRUCache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported
# pytest's workers share the cores. Threads of PyTorch beside them wait for one another: parity with
# PEFT took a third longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nearly every program of the tests runs once or twice: to optimise it costs more than it saves.
# tests/test_examples.py runs programs that are optimised as a user's are.
CHEAP_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later ones do not know it, and end the process
    CHEAP_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *CHEAP_TO_COMPILE])

# Traces are many small objects, few of them garbage: by Python's thresholds, looking for it takes
# 7 % of the time of tests of NNX models.
gc.set_threshold(100_000, 20, 20)

settings.register_profile(
    "default", deadline=None, max_examples=50, derandomize=True, print_blob=True
)
settings.load_profile("default")


def pytest_addoption(parser):
    group = parser.getgroup("cases", "tests with parameters")
    group.addoption("--cases", type=int, help="of each such test, run so many cases at most")
    group = parser.getgroup(
        "parity", "generated cases beside the real PEFT (tests/parity/test_harness.py)"
    )
    group.addoption("--parity-seed", type=int, default=0, help="seed of the cases")
    group.addoption("--parity-cases", type=int, default=120, help="how many in all")
    group = parser.getgroup(
        "models", "third-party models beside their PyTorch twins (tests/models)"
    )
    group.addoption(
        "--models-seed", type=int, default=0, help="seed of weights, inputs and factors"
    )
    group.addoption(
        "--models-width", type=int, default=32, help="width of the models, a multiple of 32"
    )
    group.addoption("--models-layers", type=int, default=2, help="layers of the models")
    group = parser.getgroup("fuzz", "broken and hostile files (tests/interop/test_fuzz.py)")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of the cases")
    group.addoption("--fuzz-cases", type=int, default=2000, help="how many")
    group = parser.getgroup(
        "checkpoint", "processes killed while they save (tests/checkpoint/test_killed_saves.py)"
    )
    group.addoption("--checkpoint-kills", type=int, default=8, help="how many")
    group.addoption("--checkpoint-seed", type=int, default=0, help="seed of the moments")


def pytest_configure(config):
    """Let all processes of a run read what one has compiled.

    The programs are in COMPILED_PROGRAMS, or in a folder of this run alone. JAX's own environment
    variable is not used: processes that tests start, and some kill, do not write there.
    """
    if not os.environ.get(
        "COMPILED_PROGRAMS"
    ):  # else .ci/run's, or that of the process that started this worker
        os.environ["COMPILED_PROGRAMS"] = tempfile.mkdtemp(prefix="loha-jax-compiled-")
        config.add_cleanup(forget_folder)
    LRUCache.put = put_whole
    # JAX makes a context for each program that it compiles: 5 of the 18 ms of a small one.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    jax.config.update("jax_compilation_cache_dir", os.environ["COMPILED_PROGRAMS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A program that cannot be read is an error, as every warning here, and not compiled again in
    # silence.
    jax.config.update("jax_raise_persistent_cache_errors", True)


def forget_folder():
    shutil.rmtree(os.environ.pop("COMPILED_PROGRAMS"), ignore_errors=True)


def put_whole(self, key, value):
    """Write a compiled program in one step, as another process may be reading it."""
    path = Path(str(self.path)) / f"{key}-cache"
    part = path.with_name(f"{key}.{os.getpid()}.part")
    part.write_bytes(value)
    part.replace(path)


# The first needs the `tpu` extra and JAX_PLATFORMS=cpu; the others' conftest.py files say why they
# need processes of their own.
ONLY_WHEN_ASKED = ("accelerators", "devices", "trainers")


def pytest_ignore_collect(collection_path, config):
    """Collect these folders only if they are asked for by their paths."""
    if (
        collection_path.parent != Path(__file__).parent
        or collection_path.name not in ONLY_WHEN_ASKED
    ):
        return None
    asked = (Path(str(argument).split("::")[0]).parts for argument in config.args)
    return None if any(collection_path.name in parts for parts in asked) else True


# Each of them has tests of a minute. Begun last, they would leave the other workers idle.
LONGEST = (
    "test_examples.py",
    "test_several_processes.py",
    "test_harness.py",
    "test_torchax.py",
    "test_docs.py",
)


def pytest_collection_modifyitems(config, items):
    """Begin with the longest tests, and keep so many cases of each test as --cases says."""
    items.sort(key=lambda item: Path(item.nodeid.split("::")[0]).name not in LONGEST)
    keep_cases(config, items)


def keep_cases(config, items):
    """Keep so many cases of each test as --cases says: the first, the last, and some between."""
    most = config.option.cases
    if most is None:
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    kept = set()
    for of_test in cases.values():
        step = max(1.0, (len(of_test) - 1) / max(1, most - 1))
        kept |= {of_test[round(n * step)] for n in range(min(most, len(of_test)))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_report_header(config):
    o = config.option
    return [
        f"cases of each test: {o.cases or 'all'}",
        f"parity cases: --parity-seed {o.parity_seed} --parity-cases {o.parity_cases}",
        f"models: --models-seed {o.models_seed} --models-width {o.models_width} --models-layers "
        f"{o.models_layers}",
        f"fuzz: --fuzz-seed {o.fuzz_seed} --fuzz-cases {o.fuzz_cases}",
        f"kills: --checkpoint-seed {o.checkpoint_seed} --checkpoint-kills {o.checkpoint_kills}",
    ]


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


MODULES_REMEMBERED = 8
finished_modules = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Forget the compiled programs of every eight modules: they would be gigabytes by the end.

    Modules share the small programs of operations outside of `jit`.
    """
    yield
    if next(finished_modules) % MODULES_REMEMBERED == 0:
        jax.clear_caches()
        mlir.make_ir_context.cache_clear()
