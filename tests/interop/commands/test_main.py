"""The command line: exit codes, JSON, help, and arguments that no one should give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import BASE, LINEAR, NATIVE, NATIVE_BASE, factors, peft_folder, run, run_json
from peft_samples import Sample
from safetensors.numpy import load_file
from typer.testing import CliRunner

from loha_jax.interop.commands.main import app


@pytest.mark.parametrize(
    "command", [[], ["inspect"], ["convert"], ["merge"], ["extract"], ["diff"]]
)
def test_help_says_the_exit_codes(command):
    out, _ = run(*command, "--help")
    text = " ".join(out.split())
    assert "Exit codes: 0 fine; 1" in text
    assert "--json" in text


def test_no_command_shows_the_help():
    result = CliRunner().invoke(app, [])
    assert "merge" in result.output


def test_version():
    import loha_jax

    assert run("--version")[0].strip() == loha_jax.__version__


def test_merge_writes_and_reports(tmp_path):
    found = run_json(
        "merge",
        BASE,
        LINEAR.adapter,
        tmp_path / "out",
        "--weight",
        0.5,
        "--with",
        f"{LINEAR.adapter}=-0.25",
    )
    assert found["merged"] == 2
    assert found["files"] == ["base.safetensors"]
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for key, value in LINEAR.base.items():
        change = (
            LINEAR.io.get(f"delta::{key.removesuffix('.weight')}", 0)
            if key.endswith(".weight")
            else 0
        )
        np.testing.assert_allclose(merged[key], value + 0.25 * change, rtol=1e-5, atol=1e-5)
    out, _ = run("merge", BASE, LINEAR.adapter, tmp_path / "again")
    assert "2 merged, 0 replaced, 1 as they were" in out


def test_an_equals_sign_in_a_path_is_no_weight(tmp_path):
    path = tmp_path / "a=b"
    path.symlink_to(LINEAR.adapter.resolve())
    assert run_json("merge", BASE, LINEAR.adapter, tmp_path / "out", "--with", path)["merged"] == 2
    run("merge", BASE, LINEAR.adapter, tmp_path / "out2", "--with", f"{path}=0.5")


def test_convert_reports_ranks_and_errors(tmp_path):
    found = run_json(
        "convert", NATIVE, tmp_path / "lora", "--to", "lora", "--rank", 2, "--base", NATIVE_BASE
    )
    assert {m["r"] for m in found["modules"]} == {2}
    assert all(0 < m["error"] < 1 for m in found["modules"])
    out, _ = run("convert", NATIVE, tmp_path / "exact", "--to", "lora", "--base", NATIVE_BASE)
    assert out.count("exact") > 7


BROKEN = ["", "x", "\x00" * 8, "\xff" * 16]


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "nope"),
        ("inspect", "folder"),
        *(("inspect", f"broken{n}.safetensors") for n in range(len(BROKEN))),
        ("merge", "nope", LINEAR.adapter, "out"),
        ("merge", BASE, "nope", "out"),
        ("merge", BASE, BASE, "out"),
        ("merge", BASE, LINEAR.adapter, "no/such/place"),
        ("merge", BASE, LINEAR.adapter, "file"),
        ("merge", BASE, LINEAR.adapter, "out", "--weight", "nan"),
        ("merge", BASE, LINEAR.adapter, "out", "--weight", "inf"),
        ("merge", BASE, LINEAR.adapter, "out", "--with", "nope=1"),
        ("merge", BASE, LINEAR.adapter, "out", "--with", f"{LINEAR.adapter}=nan"),
        ("merge", BASE, LINEAR.adapter, "out", "--only", "("),
        ("merge", BASE, Sample("llama_patterns").adapter, "out"),
        ("convert", LINEAR.adapter, "out", "--to", "lora", "--rank", "-1"),
        ("convert", LINEAR.adapter, "out", "--to", "lora", "--energy", "nan"),
        ("convert", LINEAR.adapter, "out", "--to", "peft", "--rank", "1"),
        ("convert", LINEAR.adapter, "out", "--to", "peft", "--base", "nope"),
        ("convert", "nope", "out", "--to", "peft"),
        ("diff", LINEAR.adapter, BASE),
        ("diff", LINEAR.adapter, "nope"),
    ],
    ids=lambda arguments: " ".join(str(a)[-20:] for a in arguments),
)
def test_errors_are_a_sentence_and_exit_code_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [a.resolve() if isinstance(a, Path) else a for a in arguments]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for n, content in enumerate(BROKEN):
        (tmp_path / f"broken{n}.safetensors").write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    out, err = run(*arguments, code=2)
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert run_json(*arguments, code=2)["error"] == err.removeprefix("Error: ").strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("unknown",),
        ("inspect",),
        ("inspect", "a", "b"),
        ("convert", "a", "b"),
        ("convert", "a", "b", "--to", "gguf"),
        ("convert", "a", "b", "--to", "lora", "--rank", "two"),
        ("merge", "a", "b", "c", "--dtype", "int8"),
        ("diff", "a", "b", "--tolerance", "-1"),
        ("diff", "a", "b", "--tolerance", "nan"),
        ("inspect", "a", "--nope"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_exit_code_2(arguments):
    out, err = run(*arguments, code=2)
    assert out == ""
    assert "Usage" in err or "Error" in err


def test_a_warning_is_a_note_on_standard_error(tmp_path):
    folder = peft_folder(tmp_path / "a", factors())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "new_option": 1}))
    out, err = run("inspect", folder, "--json")
    assert json.loads(out)["problems"] == []
    assert err.startswith("Note: ")
    assert "new_option" in err


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("choose with `only=`", "choose with --only"),
        ("pass `force=True` to replace it", "pass --force to replace it"),
        ('`rank=` is for `to="lora"`', "--rank is for --to lora"),
        (r"`names={'a[.](.*)': 'b.\\1'}`", r"--names 'a[.](.*)=b.\1'"),
        ("`names={'a' b'}` and `config=`", "`names={'a' b'}` and `config=`"),
    ],
)
def test_errors_name_options_and_not_arguments(said, shown, monkeypatch):
    from loha_jax.interop.commands import inspection

    def refuse(_, **__):
        raise ValueError(said)

    monkeypatch.setattr(inspection, "inspect_path", refuse)
    assert run("inspect", BASE, code=2)[1] == f"Error: {shown}\n"


def test_output_that_the_terminal_cannot_encode_is_escaped():
    """As on Windows, where standard output may not know ΔW."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "cp1252"}
    command = [
        sys.executable,
        "-m",
        "loha_jax.interop.commands.main",
        "inspect",
        str(LINEAR.adapter),
    ]
    done = subprocess.run(
        command, capture_output=True, env=environment, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u2016" in done.stdout


def test_an_interrupted_merge_says_how_to_go_on(tmp_path, monkeypatch):
    from loha_jax.interop.merge import files as merge_files

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_files, "merge_checkpoint", interrupt)
    _, err = run("merge", BASE, LINEAR.adapter, tmp_path / "out", code=130)
    assert "the same command resumes" in err


def test_a_fault_is_said_without_a_traceback(tmp_path, monkeypatch):
    from loha_jax.interop.commands import inspection

    monkeypatch.setattr(inspection, "inspect_path", lambda _, **__: {}["lost"])
    _, err = run("inspect", BASE, code=2)
    assert "KeyError" in err
    assert "LOHA_JAX_TRACEBACK=1" in err


def test_as_a_program(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "loha_jax.interop.commands.main"]
    root = Path(__file__).parents[3]
    script = [*command, "merge", str(BASE), str(LINEAR.adapter), str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        script, capture_output=True, text=True, cwd=root, env=environment, check=True
    )
    assert json.loads(done.stdout)["merged"] == 2
    assert done.stderr == ""
    again = subprocess.run(
        script, capture_output=True, text=True, cwd=root, env=environment, check=False
    )
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_help_imports_nothing_large():
    """`loha_jax.interop` itself takes 0.2 s beside the second of jax."""
    code = (
        "import sys, loha_jax.interop.commands.main\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('flax', 'orbax', 'torch', "
        "'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
