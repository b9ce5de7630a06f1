"""Settings of all tests."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Nearly every program of the tests runs once or twice: LLVM's optimisation costs more than it saves.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser):
    group = parser.getgroup("parity", "generated cases beside the real PEFT (tests/parity/test_harness.py)")
    group.addoption("--parity-seed", type=int, default=0, help="seed of the cases")
    group.addoption("--parity-cases", type=int, default=120, help="how many in all")
    group = parser.getgroup("models", "third-party models beside their PyTorch twins (tests/models)")
    group.addoption("--models-seed", type=int, default=0, help="seed of weights, inputs and factors")
    group.addoption("--models-width", type=int, default=32, help="width of the models, a multiple of 32")
    group.addoption("--models-layers", type=int, default=2, help="layers of the models")
    group = parser.getgroup("fuzz", "broken and hostile files (tests/interop/test_fuzz.py)")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of the cases")
    group.addoption("--fuzz-cases", type=int, default=2000, help="how many")
    group = parser.getgroup("checkpoint", "processes killed while they save (tests/test_checkpoint_kill.py)")
    group.addoption("--checkpoint-kills", type=int, default=8, help="how many")
    group.addoption("--checkpoint-seed", type=int, default=0, help="seed of the moments")


def pytest_ignore_collect(collection_path, config):
    """tests/devices needs a process of its own, with eight devices: it is run when it is asked for by its path."""
    asked = any("devices" in Path(str(argument).split("::")[0]).parts for argument in config.args)
    return True if collection_path == Path(__file__).parent / "devices" and not asked else None


def pytest_report_header(config):
    o = config.option
    return [
        f"parity cases: --parity-seed {o.parity_seed} --parity-cases {o.parity_cases}",
        f"models: --models-seed {o.models_seed} --models-width {o.models_width} --models-layers {o.models_layers}",
        f"fuzz: --fuzz-seed {o.fuzz_seed} --fuzz-cases {o.fuzz_cases}",
        f"kills: --checkpoint-seed {o.checkpoint_seed} --checkpoint-kills {o.checkpoint_kills}",
    ]


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Compiled programs are gigabytes by the end of a run: each module leaves none behind."""
    yield
    jax.clear_caches()
