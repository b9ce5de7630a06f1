"""Every example in the docstrings and every Python block of the documentation runs."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import loha_jax
from loha_jax import interop

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    name
    for package in (loha_jax, interop)
    for _, name, is_package in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not is_package
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


FACES = ("nnx", "linen", "qwix", "keras", "train", "checkpoint")
FOLDERS = [Path(path) for package in (loha_jax, interop) for path in package.__path__]


def examples(text):
    return len(re.findall(r"^ *>>> ", text, re.MULTILINE))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(
        module, extraglobs={"jax": jax, "jnp": jnp}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0
    assert result.attempted == examples(Path(module.__file__ or "").read_text(encoding="utf-8"))


def test_no_file_with_examples_is_left_out():
    files = {path for folder in FOLDERS for path in folder.rglob("*.py")}
    tested = {Path(importlib.import_module(name).__file__ or "") for name in MODULES}
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    # Only the faces of packages are left out: no examples there.
    assert not any(examples(texts[path]) for path in files - tested)
    assert {path.name for path in files - tested} == {"__init__.py"}
    assert len(tested) > 80
    assert sum(map(examples, texts.values())) > 250


BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_pages_have_blocks():
    assert len([page for page in PAGES if BLOCK.search(page.read_text())]) > 15


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.stem
)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    for package in ("haiku", "haliax", "penzai"):
        imported = re.search(rf"^(import|from) {package}\b", page.read_text(), re.MULTILINE)
        if imported and importlib.util.find_spec(package) is None:
            pytest.skip(f"the newest environment has no {package}; the main run has it")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        if " peft" in block and importlib.util.find_spec("peft") is None:
            continue  # on the newest JAX; the main run has PEFT
        exec(compile(block, page.name, "exec"), names)


def test_pages_have_up_to_100_columns():
    folders = [ROOT / name for name in ("docs", "examples", "benchmarks")]
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        rows = (line for line in text.splitlines() if not line.lstrip().startswith("|"))
        assert max(map(len, rows)) <= 100 or page.name == "tables.md", page  # a report writes that


def test_the_figures_are_those_that_the_script_draws_and_the_pages_show(tmp_path):
    """The numbers are read from the pages and records; drawing fails where they are missing."""
    pytest.importorskip("matplotlib", reason="the newest environment has none; the main run has it")
    path = ROOT / "docs" / "_site" / "figures.py"
    spec = importlib.util.spec_from_file_location("figures", path)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.main(tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn <= {file.name for file in (ROOT / "docs" / "figures").iterdir()}
    text = "".join(page.read_text() for page in PAGES)
    for file in (ROOT / "docs" / "figures").iterdir():
        assert f"figures/{file.name})" in text, file
    ((_, *bars),) = [t for t in figures.tables(ROOT / "docs/notes/speed.md") if "seconds" in t[0]]
    assert [row[0] for row in bars][-1] == "PEFT LoRA r=16"


def test_the_site_has_every_page_and_every_public_name():
    """`mkdocs build` checks the links; it is not installed here."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs).as_posix()): path for path in docs.rglob("*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)) == set(pages)
    named = re.findall(
        r"^::: ([\w.]+)$", "".join(map(Path.read_text, pages.values())), re.MULTILINE
    )
    faces = [loha_jax, interop, *(importlib.import_module(f"loha_jax.{n}") for n in FACES)]
    public = [f"{face.__name__}.{name}" for face in faces for name in face.__all__]
    assert sorted(named) == sorted(name.replace("loha_jax.interop.", "interop.") for name in public)


def test_every_public_name_has_a_docstring_with_an_example():
    exempt = {"Factors", "SavedWeight", "khatri_rao_columns", "khatri_rao_rows", "adapter_names"}
    for module in (loha_jax, interop):
        for name in set(module.__all__) - exempt:
            text = getattr(module, name).__doc__ or ""
            assert (
                ">>> " in text or name == "from_peft_state_dict" or name == "to_peft_state_dict"
            ), name


def test_the_core_never_imports_torch():
    for module in MODULES:
        source = Path(importlib.import_module(module).__file__ or "").read_text()
        assert not re.search(r"^(import|from) torch", source, re.MULTILINE), module


def test_every_row_of_the_parity_table_names_a_test_that_exists_or_says_why():
    text = (ROOT / "docs" / "peft-parity.md").read_text()
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| PEFT", "| behav"))
    ]
    assert len(rows) > 60
    for row in rows:
        _, _, here, _ = re.split(r"(?<!\\)\|", row)
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", here)
        for path, name in named:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
        assert named or re.match(r"harness|No meaning|Not here|Not there yet", here.strip()), row
