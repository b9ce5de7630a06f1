"""`loha-jax inspect`: what a file holds and what is broken in it."""

import json
import re

import lycoris_samples
import numpy as np
import pytest
from command_line import BASE, LINEAR, NATIVE, factors, peft_folder, run, run_json
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file, save_file

from loha_jax.interop.disk.tensor_files import safetensors_bytes


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


@pytest.mark.parametrize("has_config", [True, False])
def test_inspect_of_pefts_weights_alone_asks_for_the_folder(has_config, tmp_path):
    """The file is not broken; it is half of an adapter."""
    folder = peft_folder(tmp_path / "a", factors())
    if not has_config:
        (folder / "adapter_config.json").unlink()
    _, err = run("inspect", folder / "adapter_model.safetensors", code=2)
    advice = f"give its folder, '{folder}'" if has_config else "put its adapter_config.json beside"
    assert err.count("adapter_config.json") == (0 if has_config else 1)
    assert advice in err
    if not has_config:
        assert "put its adapter_config.json into it" in run("inspect", folder, code=2)[1]


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


def test_names_that_a_terminal_would_obey_are_shown_harmless(tmp_path):
    name = "layers.\x1b[2Jq[red]"
    folder = peft_folder(tmp_path / "a", factors(name))
    out, _ = run("inspect", folder)
    assert "\x1b[2J" not in out
    assert r"\x1b[2Jq[red]" in out
    _, err = run("merge", BASE, folder, tmp_path / "out", code=2)
    assert "\x1b" not in err
    assert run_json("inspect", folder)["modules"][0]["name"] == name


def test_a_folder_around_adapters_is_an_error_that_names_them(tmp_path):
    """As `save_peft` writes adapters that are not called "default"."""
    peft_folder(tmp_path / "mix", factors())
    error = run_json("inspect", tmp_path, code=2)["error"]
    assert str(tmp_path / "mix") in error
