"""The command line: exit codes, JSON, help, and arguments that no one should give."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lycoris_samples
import numpy as np
import pytest
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from loha_jax import LoHaConfig
from loha_jax.interop.commands.main import app
from loha_jax.interop.disk.tensor_files import safetensors_bytes

LINEAR = Sample("linear")
BASE = LINEAR.folder / "base.safetensors"
NATIVE = lycoris_samples.DATA / "native_plain.safetensors"
NATIVE_BASE = lycoris_samples.DATA / "base_tiny.safetensors"
ONE = np.ones((3, 3), np.float32)


def run(*arguments, code=0):
    """Standard output and standard error of a run in this process."""
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "100", "NO_COLOR": "1"}
    )
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def run_json(*arguments, code=0):
    """The document, which is all there is on standard output."""
    out, _ = run(*arguments, "--json", code=code)
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def peft_folder(folder, tensors, **config):
    folder.mkdir()
    state = {f"base_model.model.{key}": value for key, value in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {}))
    config = {"r": 3, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(LoHaConfig(**config).to_json())
    return folder


def factors(name="q", **changed):
    return {
        f"{name}.{part}": changed.get(part, ONE)
        for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    }


@pytest.mark.parametrize("command", [[], ["inspect"], ["convert"], ["merge"], ["diff"]])
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


@pytest.mark.parametrize("name", NAMES)
def test_inspect_adapters(name):
    sample = Sample(name)
    found = run_json("inspect", sample.adapter)
    assert (found["command"], found["kind"], found["problems"]) == ("inspect", "peft", [])
    for module in found["modules"]:
        wanted = np.linalg.norm(sample.io[f"delta::{module['name']}"].astype(np.float64))
        np.testing.assert_allclose(module["norm"], wanted, rtol=1e-5)
        layer = sample.meta["layers"][module["name"]]
        assert (module["r"], module["alpha"]) == (layer["r"], layer["alpha"])
    assert {m["name"] for m in found["modules"]} == {
        k.split("::")[1] for k in sample.io if k.startswith("delta::")
    }
    assert found["parameters"] == sum(
        value.size for key, value in sample.state.items() if ".hada_" in key
    )


def test_inspect_a_lycoris_file_and_a_checkpoint():
    found = run_json("inspect", NATIVE)
    deltas = load_file(lycoris_samples.DATA / "native_plain_delta.safetensors")
    for module in found["modules"]:
        wanted = np.linalg.norm(deltas[f"{module['file_name']}.delta"].astype(np.float64))
        np.testing.assert_allclose(module["norm"], wanted, rtol=1e-5)
    assert found["kind"] == "lycoris"
    assert found["metadata"] == {"note": "lycoris 4.1.3 native plain"}
    checkpoint = run_json("inspect", BASE)
    assert checkpoint["kind"] == "checkpoint"
    assert {t["name"]: t["shape"] for t in checkpoint["tensors"]} == {
        k: list(v.shape) for k, v in LINEAR.base.items()
    }


def test_inspect_tables_name_every_module(tmp_path):
    many = {key: value for n in range(40) for key, value in factors(f"layers.{n}.q").items()}
    folder = peft_folder(tmp_path / "a", many)
    out, _ = run("inspect", folder)
    assert "layers.*.q" in out
    assert "layers.7.q" not in out
    out, _ = run("inspect", folder, "--all")
    assert all(f"layers.{n}.q" in out for n in range(40))
    assert "PEFT LoHa folder" in out


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (
            factors(hada_w1_a=np.full((3, 3), np.nan, np.float32)),
            r"q\.hada_w1_a has 9 NaN and 0 infinite",
        ),
        (
            factors(hada_w2_b=np.full((3, 3), -np.inf, np.float32)),
            r"q\.hada_w2_b has 0 NaN and 9 infinite",
        ),
        ({k: v for k, v in factors().items() if "w2_a" not in k}, r"q lacks hada_w2_a"),
        (factors(hada_w2_b=np.ones((2, 3), np.float32)), r"the factors of q do not fit"),
        (
            factors() | {k: v for k, v in factors("p").items() if "w1_b" not in k},
            r"p lacks hada_w1_b",
        ),
    ],
)
def test_inspect_says_what_is_broken(tensors, match, tmp_path):
    folder = peft_folder(tmp_path / "a", tensors)
    found = run_json("inspect", folder, code=1)
    assert any(re.search(match, problem) for problem in found["problems"]), found["problems"]
    out, _ = run("inspect", folder, code=1)
    assert "Broken" in out


def test_inspect_remarks_on_updates_that_are_zero(tmp_path):
    folder = peft_folder(tmp_path / "a", factors(hada_w2_b=np.zeros((3, 3), np.float32)))
    found = run_json("inspect", folder)
    assert found["remarks"] == ["the update of q is zero: hada_w2_b is zero"]
    assert found["modules"][0]["norm"] == 0


def test_a_lora_of_a_grouped_convolution_is_named(tmp_path):
    """Its factors have in channels of all groups, and multiply to no change of the weight."""
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {
        "lora_A": np.ones((4, 8, 3, 3), np.float32),
        "lora_B": np.ones((8, 2, 1, 1), np.float32),
    }
    state = {f"base_model.model.q.{part}.weight": tensor for part, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {}))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = run_json("inspect", folder)
    assert found["remarks"] == [
        "no norm: q is the LoRA of a convolution in groups, which is not supported here"
    ]
    save_file({"q.weight": np.ones((8, 4, 3, 3), np.float32)}, tmp_path / "base.safetensors")
    assert (
        "q is the LoRA of"
        in run_json("merge", tmp_path / "base.safetensors", folder, tmp_path / "o", code=2)["error"]
    )
    assert not (tmp_path / "o").exists()


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


def test_diff_of_adapters(tmp_path):
    found = run_json("diff", NATIVE, lycoris_samples.DATA / "peft_plain", code=1)
    assert found["only_first"] == ["c3d"]
    assert found["only_second"] == []
    assert all(m["bit_equal"] and not m["different"] for m in found["modules"])
    out, _ = run("diff", NATIVE, lycoris_samples.DATA / "peft_plain", code=1)
    assert "7 of 7 common modules are equal, 7 of them bit for bit" in out
    assert run_json("diff", NATIVE, NATIVE)["different"] is False
    tucker = run_json("diff", NATIVE, lycoris_samples.DATA / "native_tucker.safetensors", code=1)
    deltas = [
        load_file(lycoris_samples.DATA / f"native_{form}_delta.safetensors")
        for form in ("plain", "tucker")
    ]
    for module in tucker["modules"]:
        a, b = (d[f"lycoris_{module['name']}.delta"].astype(np.float64) for d in deltas)
        np.testing.assert_allclose(
            module["difference"], np.linalg.norm(a - b), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(module["norm"], np.linalg.norm(a), rtol=1e-5)


def test_the_tolerance_of_diff(tmp_path):
    near = dict(factors())
    near["q.hada_w1_a"] = ONE * np.float32(1 + 2**-10)
    first, second = peft_folder(tmp_path / "a", factors()), peft_folder(tmp_path / "b", near)
    row = run_json("diff", first, second, code=1)["modules"][0]
    np.testing.assert_allclose(row["relative"], 2**-10, rtol=1e-9)
    run("diff", first, second, "--tolerance", 0.001, code=0)
    run("diff", first, second, "--tolerance", 0.0009, code=1)
    half = peft_folder(tmp_path / "c", factors(), alpha=4)
    row = run_json("diff", first, half, code=1)["modules"][0]
    assert (row["bit_equal"], row["alpha"], row["relative"]) == (True, [8.0, 4.0], 0.5)


def test_diff_of_checkpoints(tmp_path):
    run("merge", BASE, LINEAR.adapter, tmp_path / "out")
    found = run_json("diff", BASE, tmp_path / "out", code=1)
    for row in found["tensors"]:
        change = (
            LINEAR.io.get(f"delta::{row['name'].removesuffix('.weight')}")
            if "weight" in row["name"]
            else None
        )
        wanted = 0 if change is None else np.abs(change).max()
        np.testing.assert_allclose(row["max_difference"], wanted, rtol=1e-5)
    run("diff", BASE, tmp_path / "out", "--tolerance", 1e4)
    assert "2 of 3" not in run("diff", BASE, BASE)[0]
    save_file({"a": np.array([np.nan, 1], np.float32)}, tmp_path / "nan.safetensors")
    save_file({"a": np.array([0, 1], np.float32)}, tmp_path / "zero.safetensors")
    assert (
        run_json("diff", tmp_path / "nan.safetensors", tmp_path / "nan.safetensors")["different"]
        is False
    )
    row = run_json("diff", tmp_path / "nan.safetensors", tmp_path / "zero.safetensors", code=1)[
        "tensors"
    ][0]
    assert (row["max_difference"], row["different"]) == (None, True)


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


def test_names_that_a_terminal_would_obey_are_shown_harmless(tmp_path):
    name = "layers.\x1b[2Jq[red]"
    folder = peft_folder(tmp_path / "a", factors(name))
    out, _ = run("inspect", folder)
    assert "\x1b[2J" not in out
    assert r"\x1b[2Jq[red]" in out
    _, err = run("merge", BASE, folder, tmp_path / "out", code=2)
    assert "\x1b" not in err
    assert run_json("inspect", folder)["modules"][0]["name"] == name


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

    def refuse(_):
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

    monkeypatch.setattr(inspection, "inspect_path", lambda _: {}["lost"])
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
        "print([m for m in sys.modules if m.split('.')[0] in ('flax', 'orbax', 'torch', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
