"""The search for a Python that is new enough for the trainers, and the environment it makes."""

import os
import sys
from pathlib import Path

import pytest

import run


def fake(path, status):
    """A program that ends with a status, as a Python that is asked for its version does."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No Python but a too old one that runs this."""
    monkeypatch.setattr(sys, "executable", str(fake(tmp_path / "this" / "python", 1)))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")


def test_no_newer_python(alone):
    """The message says what is needed, and where was looked."""
    with pytest.raises(run.Failed, match=r"needs Python 3\.12 or newer.*none was found") as error:
        run.find_newer_python()
    assert str(alone / "this" / "python") in str(error.value)
    assert str(alone / "pyenv" / "versions") in str(error.value)


def test_path_before_pyenv(alone):
    """A name in PATH may be there and not work, as pyenv's do."""
    pyenv = fake(alone / "pyenv" / "versions" / "3.13.0" / "bin" / "python", 0)
    fake(alone / "pyenv" / "versions" / "3.12.1" / "bin" / "python", 1)
    assert run.find_newer_python() == pyenv
    broken = fake(alone / "path" / "python3.14", 127)
    assert run.find_newer_python() == pyenv
    broken.unlink()
    broken.parent.rmdir()
    named = fake(alone / "path" / "python3.12", 0)
    assert run.find_newer_python() == named


def test_this_python_if_new_enough(alone, monkeypatch):
    this = fake(alone / "newer" / "python", 0)
    monkeypatch.setattr(sys, "executable", str(this))
    assert run.find_newer_python() == this


def test_a_step_is_quiet_unless_it_fails(capfd):
    """pip prints hundreds of lines; they are wanted only where it fails."""
    program = "import sys; print('one'); print('two', file=sys.stderr); sys.exit({})"
    run.step("Working", [sys.executable, "-c", program.format(0)])
    assert capfd.readouterr().out == "==> Working\n"
    with pytest.raises(run.Failed, match="status 3; see above"):
        run.step("Working", [sys.executable, "-c", program.format(3)])
    assert set(capfd.readouterr().out.splitlines()) == {"==> Working", "one", "two"}


def test_the_oldest_jax_has_an_environment_of_its_own(monkeypatch):
    """Made by this Python. Arguments choose the tests instead."""
    installed, ran = [], []
    monkeypatch.setattr(run, "environment_in", lambda folder, find: folder / find.__name__)
    monkeypatch.setattr(run.Installer, "__init__", lambda self, python, distributions: None)
    monkeypatch.setattr(run.Installer, "install", lambda self, what: installed.append(what[1][-1]))
    monkeypatch.setattr(run, "run", lambda python, command, folder: ran.append((python, command)))
    run.main(["test-oldest"])
    run.main(["test-oldest", "tests/tree"])
    assert {python for python, _ in ran} == {run.REPOSITORY / ".venv-oldest" / "this_python"}
    assert [command[-1] for _, command in ran] == [run.CORE_ON_OLDEST[-1], "tests/tree"]
    assert installed == [f"{run.REPOSITORY}[oldest]"] * 2


def test_the_newest_jax_has_an_environment_of_its_own(monkeypatch):
    """Not the active one. Without arguments all three runs are made, whichever fails."""
    installed, ran = [], []

    def fake_run(python, command, folder):
        ran.append((python, command))
        return len(ran) % 2

    monkeypatch.setattr(run, "environment_in", lambda folder, find: folder / "python")
    monkeypatch.setattr(run.Installer, "__init__", lambda self, python, distributions: None)
    monkeypatch.setattr(run.Installer, "install", lambda self, what: installed.append(what[1]))
    monkeypatch.setenv("PYTHON_WITH_PEFT", "")
    monkeypatch.setattr(run, "find_environment", lambda: Path(sys.executable))
    monkeypatch.setattr(run, "run", fake_run)
    assert run.main(["test-newest"]) == 1
    assert {python.parent.name for python, _ in ran} == {".venv-newest"}
    assert [command[-1] for _, command in ran][1:] == ["tests/devices", "tests/trainers"]
    assert os.environ["PYTHON_WITH_PEFT"] == sys.executable
    assert any("google-tunix==0.1.7" in packages for packages in installed)
    run.main(["test-newest", "tests/tree"])
    assert ran[3:] == [(ran[0][0], ["-m", "pytest", "tests/tree"])]
