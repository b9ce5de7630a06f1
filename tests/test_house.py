"""The house: which room imports which, what is in a wheel, how long a file may be."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import loha_jax
from loha_jax.tree.containers import PROVIDERS, Container

ROOT = Path(__file__).parents[1]
SOURCES = {"loha_jax": ROOT / "loha_jax", "loha_jax.interop": ROOT / "interop"}
ROOMS = {  # each imports only from itself and from those before it
    "loha_jax": (
        "runtime",
        "lowrank",
        "targets",
        "tree",
        "transform",
        "nnx",
        "linen",
        "qwix",
        "keras",
        "checkpoint",
        "train",
    ),
    "loha_jax.interop": ("disk", "formats", "updates", "names", "exchange", "merge", "commands"),
}
ORDER = [f"{package}.{room}" for package, rooms in ROOMS.items() for room in rooms]


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: where it stands, and the module that it needs."""

    line: int
    module: str
    name: str = ""


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    package, folder = next((p, f) for p, f in SOURCES.items() if f in path.parents)
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


MODULES = {
    module_of(path): path for folder in SOURCES.values() for path in sorted(folder.rglob("*.py"))
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST, module: str, is_package: bool) -> list[Import]:
    """Every import of a file, inside functions and under `TYPE_CHECKING` too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            # `from package import module` imports the module.
            found += [
                Import(
                    node.lineno,
                    full if (full := f"{base}.{alias.name}") in MODULES else base,
                    alias.name,
                )
                for alias in node.names
            ]
    return found


def room_of(module: str) -> str | None:
    """The room of a module.

    None for the faces `loha_jax` and `loha_jax.interop`, and for all that is not ours.
    """
    parts = module.split(".")
    room = ".".join(parts[: 3 if parts[:2] == ["loha_jax", "interop"] else 2])
    return room if room in ORDER else None


def wrong_imports(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """Imports of a room's file that are in a later room, or in a face."""
    here = room_of(module)
    wrong = []
    for found in imports_of(tree, module, is_package):
        if found.module.split(".")[0] != "loha_jax":
            continue
        there = room_of(found.module)
        later = there is None or (here is not None and ORDER.index(there) > ORDER.index(here))
        if later and not (here is None and there is None):
            wrong.append(f"{module}:{found.line} imports {found.name} of {found.module}")
    return wrong


def test_every_folder_is_a_room():
    for package, folder in SOURCES.items():
        held = {
            path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"
        }
        assert held == set(ROOMS[package])
        faces = {"__init__.py"} if package == "loha_jax" else {"__init__.py", "files.py"}
        assert {path.name for path in folder.glob("*.py")} == faces
    assert len(MODULES) > 80


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_one_way(room):
    """No exceptions: imports inside functions and those for types alone count."""
    modules = {name: path for name, path in MODULES.items() if room_of(name) == room}
    assert modules
    wrong = [
        line
        for module, path in modules.items()
        for line in wrong_imports(parse(path), module, path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


def test_core_never_imports_interop():
    """Not the face `loha_jax` either."""
    for module, path in MODULES.items():
        if module == "loha_jax.interop" or module.startswith("loha_jax.interop."):
            continue
        for found in imports_of(parse(path), module, path.name == "__init__.py"):
            assert not found.module.startswith("loha_jax.interop"), f"{module}:{found.line}"


@pytest.mark.parametrize(
    "line",
    [
        "from loha_jax.transform.adapt import adapt",
        "from loha_jax.transform import adapt",
        "import loha_jax.transform.adapt",
        "from ..transform import adapt",
        "from loha_jax import adapt",
        "import loha_jax",
        "from loha_jax import interop",
        "from loha_jax.interop.disk import atomic",
        "def f():\n    from loha_jax.nnx.calls import call",
        "if TYPE_CHECKING:\n    from loha_jax.nnx.calls import call",
    ],
)
def test_wrong_imports_are_found(line):
    assert wrong_imports(ast.parse(line), "loha_jax.tree.merge", False)


def test_right_imports_pass():
    lines = (
        "import jax\n"
        "from loha_jax.lowrank.layout import Layout\n"
        "from loha_jax.tree.leaves import is_adapted"
    )
    assert not wrong_imports(ast.parse(lines), "loha_jax.tree.merge", False)


# --- no module is found by a string ---


IMPORTERS = {"import_module", "__import__", "spec_from_file_location", "exec"}
TABLE = "loha_jax.tree.containers"  # imports what PROVIDERS names
FACE = "loha_jax"  # imports its public rooms when they are first used


def own_names_in_strings(tree: ast.Module) -> list[str]:
    """The strings of a file, besides docstrings, that are names of our modules."""
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in docs
    ]
    return [
        value for value in strings if isinstance(value, str) and "." in value and value in MODULES
    ]


def calls_in(tree: ast.Module) -> list[str]:
    """The last names of all functions that a file calls."""
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in called
    ]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_found_by_a_string(module):
    """Besides the table of containers, and the face, whose attributes are its public rooms."""
    tree = parse(MODULES[module])
    named, importers = (
        own_names_in_strings(tree),
        [call for call in calls_in(tree) if call in IMPORTERS],
    )
    assert sorted(named) == (sorted(PROVIDERS.values()) if module == TABLE else [])
    assert importers == (["import_module"] if module in (TABLE, FACE) else [])


def test_face_imports_only_its_public_rooms():
    assert set(loha_jax._SUBMODULES) <= {*ROOMS["loha_jax"], "interop"}
    for name in loha_jax._SUBMODULES:
        assert getattr(loha_jax, name).__name__ == f"loha_jax.{name}"


FUNCTIONS = [
    name for name, value in vars(Container).items() if inspect.isfunction(value) and name[0] != "_"
]


@pytest.mark.parametrize(("framework", "provider"), PROVIDERS.items(), ids=lambda x: str(x))
def test_every_container_has_the_functions_of_the_protocol(framework, provider):
    module, name = framework
    assert isinstance(getattr(importlib.import_module(module), name), type)
    held = importlib.import_module(provider)
    assert FUNCTIONS
    for function in FUNCTIONS:
        asked = list(inspect.signature(getattr(Container, function)).parameters.values())[1:]
        given = list(inspect.signature(getattr(held, function)).parameters.values())
        assert [(p.kind, p.default) for p in given] == [(p.kind, p.default) for p in asked], (
            function
        )


# --- the package ---


def packages_in_folders() -> set[str]:
    return {module for module, path in MODULES.items() if path.name == "__init__.py"}


def test_pyproject_lists_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    assert sorted(settings["packages"]) == sorted(packages_in_folders())
    assert set(packages_in_folders()) == {*SOURCES, *ORDER}


@pytest.mark.slow
def test_a_wheel_has_every_file(tmp_path):
    """Built from a copy: a build leaves folders beside the sources."""
    copy = tmp_path / "copy"
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    files = kept.stdout.decode().split("\0")[:-1] if kept.returncode == 0 else []
    files = [f for f in files if f.startswith(("loha_jax/", "interop/")) or "/" not in f]
    assert files, "not a git repository"
    for name in files:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, copy]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"loha_jax-{loha_jax.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        held = {name for name in archive.namelist() if name.startswith("loha_jax/")}
    assert held == {
        name.replace("interop/", "loha_jax/interop/", 1) if name.startswith("interop/") else name
        for name in files
        if "/" in name
    }


# --- the tests ---


def test_rooms_of_tests_are_rooms():
    """A folder of tests is named after the room that it tests."""
    others = {"accelerators", "data", "devices", "helpers", "interop", "models", "parity"}
    others |= {"trainers", "__pycache__"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - others
    assert folders == set(ROOMS["loha_jax"])
    inner = {path.name for path in (ROOT / "tests" / "interop").iterdir() if path.is_dir()} - {
        "__pycache__"
    }
    assert inner <= set(ROOMS["loha_jax.interop"])


# --- lengths ---


LIMITS = {"file": 400, "class": 250, "function": 50}
SEARCHED = ("loha_jax", "interop", "benchmarks", "examples", "tests", "run.py")
EXCEPTIONS = {
    "examples/finetune_minilm.py::run": "A script, read from the top down.",
    "examples/several_processes.py::train": "A script, read from the top down.",
    "examples/several_processes.py::demonstrate": "A script, read from the top down.",
    "examples/stable_diffusion_parts.py::run": "A script, read from the top down.",
    "examples/torch_checkpoint.py::run": "A script, read from the top down.",
}


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function from its `def` to its end, without its docstring."""
    doc = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)


def lengths(path: Path) -> dict[str, tuple[str, int]]:
    """The kind and the length of a file and of what is in it.

    Tests hold data: only their files are measured.
    """
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    found = {name: ("file", len(text.splitlines()))}
    if name.startswith("tests/"):
        return found

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                full = f"{prefix}{child.name}"
                if isinstance(child, ast.ClassDef):
                    measured = "class", (child.end_lineno or 0) - child.lineno + 1
                else:
                    measured = "function", code_lines(child)
                key = f"{name}::{full}"
                found[key] = max(found.get(key, measured), measured, key=lambda m: m[1])
                visit(child, f"{full}.")
            else:
                visit(child, prefix)

    visit(ast.parse(text), "")
    return found


def test_nothing_is_too_long():
    """An exception that is no longer needed is an error too."""
    places = [ROOT / name for name in SEARCHED]
    files = [
        file
        for place in places
        for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))
    ]
    measured = {name: length for file in files for name, length in lengths(file).items()}
    long = {
        name: f"{kind} of {n} lines" for name, (kind, n) in measured.items() if n > LIMITS[kind]
    }
    assert not (more := {name: said for name, said in long.items() if name not in EXCEPTIONS}), more
    assert not (gone := set(EXCEPTIONS) - set(long)), f"exceptions that nothing needs: {gone}"
    assert all(EXCEPTIONS.values())


# --- types ---


def annotations(path: Path) -> list[ast.expr]:
    """The annotations of all arguments of a file's functions."""
    functions = [
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    arguments = [
        argument
        for function in functions
        for argument in (
            *function.args.posonlyargs,
            *function.args.args,
            *function.args.kwonlyargs,
            function.args.vararg,
            function.args.kwarg,
        )
    ]
    return [a.annotation for a in arguments if a is not None and a.annotation is not None]


@pytest.mark.parametrize("room", ORDER)
def test_few_arguments_are_of_any_type(room):
    """`object` says that a value is only passed on; `Any` says nothing."""
    found = [a for m, path in MODULES.items() if room_of(m) == room for a in annotations(path)]
    anything = [annotation for annotation in found if ast.unparse(annotation) == "Any"]
    assert found
    assert len(anything) < 0.1 * len(found)
