"""Every kind of file and folder given to every function and command.

Opened, or refused by what it is.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import loha_jax
from loha_jax import interop
from loha_jax.interop.commands.main import app

BASE = {"q": {"kernel": jnp.ones((4, 6))}, "k": {"kernel": jnp.ones((4, 6))}}
CONFIG = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)


def make_loha(folder):
    interop.save_peft(folder, loha_jax.inject(BASE, CONFIG, key=jax.random.key(0)))


def make_lora(folder):
    interop.save_lora(folder, loha_jax.inject(BASE, CONFIG, key=jax.random.key(0)))


def make_lycoris(path, prefix="lycoris_"):
    interop.save_lycoris(path, loha_jax.inject(BASE, CONFIG, key=jax.random.key(0)), prefix=prefix)


def make_other_peft(folder):
    make_loha(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "LOKR"}))


def make_diffusers(folder):
    """As diffusers' `save_lora_adapter`: keys without PEFT's prefix, the config in the header."""
    make_loha(folder / "peft")
    config = (folder / "peft" / "adapter_config.json").read_text()
    state = load_file(folder / "peft" / "adapter_model.safetensors")
    state = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    save_file(state, folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": config})


def make_simpletuner(folder):
    folder.mkdir()
    make_lycoris(folder / "pytorch_lora_weights.safetensors")
    (folder / "lycoris_config.json").write_text(json.dumps({"algo": "loha", "linear_dim": 2}))


def make_kohya_lora(path):
    up, down = np.ones((6, 2), np.float32), np.ones((2, 4), np.float32)
    save_file({"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down}, path)


def make_lokr(path):
    save_file({"lora_unet_q.lokr_w1": np.ones((2, 2), np.float32)}, path)


def make_checkpoint(path):
    save_file({f"{n}.weight": np.ones((6, 4), np.float32) for n in "qk"}, path)


def make_checkpoint_folder(folder):
    folder.mkdir()
    make_checkpoint(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


# What is made, under which name, who opens it ("" for nobody), and what everybody else says of it.
KINDS = {
    "loha folder": (make_loha, "a", "load_peft", "a PEFT folder of a LoHa; `load_peft` opens it"),
    "lora folder": (make_lora, "a", "load_lora", "a PEFT folder of a LoRA; `load_lora` opens it"),
    "other folder of PEFT": (make_other_peft, "a", "", "an adapter of PEFT's 'LOKR'"),
    "diffusers": (
        make_diffusers,
        "a",
        "load_peft",
        "a PEFT folder of a LoHa; `load_peft` opens it",
    ),
    "lycoris": (make_lycoris, "a.safetensors", "load_lycoris", "`load_lycoris` opens it"),
    "simpletuner": (make_simpletuner, "a", "load_lycoris", "`load_lycoris` opens it"),
    "kohya's lora": (make_kohya_lora, "a.safetensors", "load_lycoris", "`load_lycoris` opens it"),
    "lokr": (make_lokr, "a.safetensors", "", "LoKr|`load_lycoris` opens it"),
    "checkpoint": (
        make_checkpoint,
        "a.safetensors",
        "",
        "the checkpoint of a model and not an adapter",
    ),
    "checkpoint folder": (
        make_checkpoint_folder,
        "a",
        "",
        "the checkpoint of a model and not an adapter",
    ),
    "file of PEFT": (
        make_loha,
        "a/adapter_model.safetensors",
        "",
        r"is a file of PEFT's without its settings; give its folder, '.*/a'",
    ),
}
LOADERS = {
    "load_peft": interop.load_peft,
    "load_lora": interop.load_lora,
    "load_lycoris": lambda path, base: interop.load_lycoris(path, base, prefix=None),
}


def made(kind, tmp_path):
    make, name, *_ = KINDS[kind]
    path = tmp_path / name
    make(path.parent if "/" in name else path)
    return path


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_loader_says_who_opens_what_it_does_not(kind, loader, tmp_path):
    path, opens, said = made(kind, tmp_path), KINDS[kind][2], KINDS[kind][3]
    if loader == opens:
        assert loha_jax.summary(LOADERS[loader](path, BASE))
        return
    with pytest.raises((ValueError, OSError), match=said) as error:
        LOADERS[loader](path, BASE)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_each_command_opens_every_adapter_and_says_what_is_none(kind, tmp_path):
    path, is_adapter = made(kind, tmp_path), KINDS[kind][2] != ""
    make_checkpoint_folder(tmp_path / "base")
    commands = {
        "inspect": ("inspect", path),
        "merge": ("merge", tmp_path / "base", path, tmp_path / "out"),
        "convert": ("convert", path, tmp_path / "new", "--to", "kohya"),
        "diff": ("diff", path, path),
    }
    for name, arguments in commands.items():
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if is_adapter:
            assert result.exit_code == 0, (name, result.output)
        elif name in ("merge", "convert"):
            assert result.exit_code == 2
            assert re.search(KINDS[kind][3], result.output), (name, result.output)
            assert not re.search(
                r"`load_(base|lora)`", result.output.replace("of a LoRA, `load_lora`", "")
            )
    assert (tmp_path / "out").exists() == is_adapter


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_nowhere_or_nothing(loader, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LOADERS[loader](tmp_path / "nowhere", BASE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"empty'. Give .* file|adapter_config.json' at .*empty'"
    ):
        LOADERS[loader](tmp_path / "empty", BASE)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises((ValueError, OSError), match=r"text\.safetensors"):
        LOADERS[loader](tmp_path / "text.safetensors", BASE)


def test_a_folder_of_folders_names_them(tmp_path):
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        make_lycoris(Path(tmp_path, name, "pytorch_lora_weights.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-10', '.*checkpoint-20'"):
        interop.load_lycoris(tmp_path, BASE)
