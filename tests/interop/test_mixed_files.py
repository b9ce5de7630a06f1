"""Files of LyCORIS, kohya, OneTrainer and SimpleTuner with more than plain factors.

The reference is formulas in float64.
"""

import json
import re

import mixed_files
import ml_dtypes
import numpy as np
import pytest
from mixed_files import (
    KERNELS,
    SHAPES,
    base,
    delta,
    loaded,
    loha,
    lora,
    merged,
    normal,
    same,
    tree,
    weight,
    write,
)
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import loha_jax
from loha_jax import interop
from loha_jax.interop.commands.convert import convert_adapter
from loha_jax.interop.commands.inspection import inspect_path
from loha_jax.interop.commands.main import app
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.runtime.untrusted import FileError


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("name", ["conv", "one", "c1", "c3"])
def test_the_convolutions_of_onetrainer(name, tmp_path):
    tensors = loha(name, "conv") | {"alpha": np.float32(1)}
    path, want = (
        write(tmp_path / "a.safetensors", {name: tensors}),
        weight(name) + delta(name, tensors, 0.5),
    )
    same(loaded(path, [name])[name], want)
    same(merged(tmp_path, path, [name])[name], want)
    (module,) = inspect_path(path)["modules"]
    assert (module["r"], module["rows"], module["alpha"]) == (2, 6, 1)
    np.testing.assert_allclose(module["norm"], np.linalg.norm(delta(name, tensors, 0.5)), rtol=1e-5)
    for to in ("kohya", "lycoris"):
        convert_adapter(path, tmp_path / f"{to}.safetensors", to, base=tmp_path / "base")
        assert run("diff", path, tmp_path / f"{to}.safetensors")[0] == 0
        same(loaded(tmp_path / f"{to}.safetensors", [name])[name], want)


@pytest.mark.parametrize(
    ("part", "shape", "match"),
    [
        (
            "hada_w1_a",
            (6, 2, 3, 3),
            r"factors of lora_unet_down_conv do not fit each other.*\[6, 2, 3, 3\]",
        ),
        ("hada_w1_a", (2, 6, 1, 1), r"factors of lora_unet_down_conv do not fit each other"),
        (
            "hada_w2_b",
            (2, 9, 2, 2),
            r"do not fit each other: hada_w1_b \[2, 4, 3, 3\], hada_w2_b \[2, 9, 2, 2\]",
        ),
        ("hada_w2_b", (3, 4, 3, 3), r"factors of lora_unet_down_conv do not fit"),
        (
            "both",
            (2, 9, 2, 2),
            r"down\.conv: a kernel .* of \[9, 2, 2\] in the file, \[4, 3, 3\] in the model",
        ),
        (
            "both",
            (2, 4, 9),
            r"down\.conv: a kernel \[in, \.\.\.\] of \[4, 9\] in the file, \[4, 3, 3\] in the "
            r"model",
        ),
    ],
)
def test_a_misshapen_convolution_is_refused_by_name(part, shape, match, tmp_path):
    """Factors with the right number of values in another shape are refused."""
    tensors = loha("conv", "conv")
    for key in ("hada_w1_b", "hada_w2_b") if part == "both" else (part,):
        tensors[key] = normal(*shape)
    path = write(tmp_path / "a.safetensors", {"conv": tensors})
    with pytest.raises(FileError, match=match):
        loaded(path, ["conv"])
    with pytest.raises(ValueError, match="do not fit"):
        merged(tmp_path, path, ["conv"])


@pytest.mark.parametrize(
    "names",
    [
        ("lora_up", "lora_down"),
        ("lora_B", "lora_A"),
        ("lora.up", "lora.down"),
        ("lora_B.default", "lora_A.default"),
    ],
)
@pytest.mark.parametrize("name", ["k", "conv"])
def test_a_lora_beside_a_loha(name, names, tmp_path):
    modules = {"q": loha("q"), name: lora(name, names=names) | {"alpha": np.float16([4])}}
    path = write(tmp_path / "a.safetensors", modules)
    want = {
        "q": weight("q") + delta("q", modules["q"]),
        name: weight(name) + delta(name, lora(name), 2.0),
    }
    for got in (loaded(path, ["q", name]), merged(tmp_path, path, ["q", name])):
        for module, value in want.items():
            same(got[module], value)
    found = inspect_path(path)
    assert found["kinds"] == {"LoHa": 1, "LoRA": 1}
    assert sorted(m["kind"] for m in found["modules"]) == ["loha", "lora"]
    only = loaded(path, ["q", name], only="lora_unet_down_q")
    same(only["q"], want["q"])
    np.testing.assert_array_equal(only[name], weight(name))


def test_the_core_of_a_locon(tmp_path):
    parts = {
        "lora_up.weight": normal(6, 2, 1, 1),
        "lora_mid.weight": normal(2, 2, 3, 3),
        "lora_down.weight": normal(2, 4, 1, 1),
        "alpha": np.float32(1),
    }
    path = write(tmp_path / "a.safetensors", {"conv": parts})
    want = weight("conv") + delta("conv", parts, 0.5)
    same(loaded(path, ["conv"])["conv"], want)
    same(merged(tmp_path, path, ["conv"])["conv"], want)


@pytest.mark.parametrize("name", ["k", "conv"])
def test_full_differences_are_added(name, tmp_path):
    modules = {
        "q": loha("q") | {"diff_b": normal(6)},
        name: {"diff": normal(*SHAPES[name]), "diff_b": normal(6)},
    }
    path = write(tmp_path / "a.safetensors", modules)
    folder = base(tmp_path / "base", "q", name)
    biases = {f"down.{n}.bias": np.ones(6, np.float32) for n in ("q", name)}
    save_file({**load_file(folder / "model.safetensors"), **biases}, folder / "model.safetensors")
    merge_checkpoint(folder, [(path, 0.5)], tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    layouts = {f"down.{n}": KERNELS[n] for n in ("q", name) if n in KERNELS}
    params = loha_jax.merge(interop.load_lycoris(path, tree("q", name), layouts=layouts))["down"]
    for module in ("q", name):
        change, bias = delta(module, modules[module]), modules[module]["diff_b"]
        same(got[f"down.{module}.weight"], weight(module) + 0.5 * change)
        same(got[f"down.{module}.bias"], 1 + 0.5 * bias)
        same(
            np.moveaxis(np.asarray(params[module]["kernel"]), (-1, -2), (0, 1)),
            weight(module) + change,
        )
        same(params[module]["bias"], 1 + bias)
    assert inspect_path(path)["kinds"] == {"LoHa": 1, "difference": 2}
    adapted = interop.load_lycoris(path, tree("q", name), layouts=layouts)
    with pytest.raises(ValueError, match=r"down\.q has factors and a copy of down\.q\.bias"):
        interop.save_peft(tmp_path / "peft", adapted)
    assert not (tmp_path / "peft").exists()
    if name == "conv":
        with pytest.raises(
            ValueError, match=r"down\.conv is in modules_to_save, and LyCORIS' files have no place"
        ):
            interop.save_lycoris(tmp_path / "again.safetensors", adapted)
    with pytest.raises(
        ValueError,
        match=r"down_q have factors and differences|down\.q have factors and differences",
    ):
        convert_adapter(path, tmp_path / "peft", "peft", base=folder)


def test_the_difference_of_a_bias_is_written_again(tmp_path):
    path = write(tmp_path / "a.safetensors", {"q": loha("q") | {"diff_b": normal(6)}})
    interop.save_lycoris(
        tmp_path / "b.safetensors", interop.load_lycoris(path, tree("q")), prefix="lora_unet_"
    )
    ours, theirs = load_file(tmp_path / "b.safetensors"), load_file(path)
    assert ours.keys() - theirs.keys() == {"lora_unet_down_q.alpha"}
    for key, value in theirs.items():
        same(ours[key], value)


OTHERS = {
    "LoKr": {"lokr_w1": normal(2, 2), "lokr_w2": normal(3, 2)},
    "OFT": {"oft_blocks": normal(2, 3, 3)},
    "(IA)³": {"weight": normal(6), "on_input": np.array(False)},
    "GLoRA": {f"{part}.weight": normal(2, 2) for part in ("a1", "a2", "b1", "b2")},
    "variant of LoRA": lora("k") | {"lora_magnitude_vector.weight": normal(6)},
    "": {"set_weight": normal(6, 4)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_loha_cannot_hold(kind, tmp_path):
    """Adapters of other kinds are named, and left out on request."""
    path = write(tmp_path / "a.safetensors", {"q": loha("q"), "k": OTHERS[kind]})
    said = (
        rf"lora_unet_down_k is a {re.escape(kind)} adapter"
        if kind
        else r"not those of a LoHa \(1\): lora_unet_down_k"
    )
    with pytest.raises(FileError, match=rf"{said}.*`only=` 'lora_unet_down_q'"):
        loaded(path, ["q", "k"])
    got = loaded(path, ["q", "k"], only="lora_unet_down_q")
    same(got["q"], weight("q") + delta("q", loha("q")))
    np.testing.assert_array_equal(got["k"], weight("k"))
    folder, out = base(tmp_path / "b", "q", "k"), tmp_path / "o"
    code, text = run("merge", folder, path, out)
    assert code == 2
    assert "--only 'lora_unet_down_q'" in text
    assert not out.exists()
    assert run("merge", folder, path, out, "--only", "lora_unet_down_q")[0] == 0
    assert (
        run("convert", path, tmp_path / "c", "--to", "kohya", "--only", "lora_unet_down_q")[0] == 0
    )
    found = inspect_path(path)
    assert found["kinds"] == {"LoHa": 1, kind or "unknown": 1}
    assert found["foreign"][0]["file_name"] == "lora_unet_down_k"
    assert run("diff", path, path)[0] == 0


def test_another_component_may_hold_what_it_likes(tmp_path):
    path = write(
        tmp_path / "a.safetensors", {"q": loha("q")}, extra={"lora_te_q.lokr_w1": normal(2, 2)}
    )
    same(loaded(path, ["q"], prefix="lora_unet_")["q"], weight("q") + delta("q", loha("q")))


def test_bundled_embeddings_are_named(tmp_path):
    extra = {
        "bundle_emb.trigger.string_to_param.*": normal(2, 8),
        "bundle_emb.other.clip_l": normal(1, 8),
    }
    path = write(tmp_path / "a.safetensors", {"q": loha("q")}, extra=extra)
    with pytest.warns(UserWarning, match=r"token embeddings \(bundle_emb\..*'trigger'") as warned:
        got = loaded(path, ["q"])
    assert warned[0].filename == mixed_files.__file__  # which calls the library
    same(got["q"], weight("q") + delta("q", loha("q")))
    report = merge_checkpoint(base(tmp_path / "b", "q"), [(path, 1.0)], tmp_path / "o")
    assert "bundle_emb.other.clip_l" in report.notes[0]
    done = convert_adapter(path, tmp_path / "c", "kohya")
    assert "bundle_emb" in done.notes[0]
    assert inspect_path(path)["kinds"] == {"LoHa": 1, "token embedding": 2}
    save_file(extra, tmp_path / "emb.safetensors")
    with pytest.raises(FileError, match="only token embeddings"):
        interop.load_lycoris(tmp_path / "emb.safetensors", tree("q"))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "style.safetensors"])
def test_a_folder_with_one_file(name, tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    parts = loha("q") | {"alpha": np.float32(4)}
    path = write(folder / name, {"q": parts}, prefix="lycoris_down_")
    (folder / "lycoris_config.json").write_text(
        json.dumps({"algo": "loha", "linear_dim": 2, "linear_alpha": 1})
    )
    if name.startswith("pytorch"):
        write(folder / "ema.safetensors", {"q": parts})
    want = weight("q") + delta("q", parts, 2.0)
    same(loaded(folder, ["q"])["q"], want)
    same(merged(tmp_path, folder, ["q"])["q"], want)
    assert run("diff", folder, path)[0] == 0
    assert inspect_path(folder)["kind"] == "lycoris"
    target = tmp_path / "peft"
    convert_adapter(folder, target, "peft", base=tmp_path / "base")
    again = loha_jax.merge(interop.load_peft(target, tree("q")))["down"]["q"]["kernel"]
    same(again, want.T)


def test_a_folder_with_several_files_is_refused_with_their_names(tmp_path):
    for name in ("a-000001.safetensors", "a.safetensors"):
        write(tmp_path / name, {"q": loha("q")})
    with pytest.raises(
        FileError, match=r"several safetensors files: a-000001\.safetensors, a\.safetensors"
    ):
        interop.load_lycoris(tmp_path, tree("q"))
    for command in (("inspect", tmp_path), ("convert", tmp_path, tmp_path / "o", "--to", "kohya")):
        code, text = run(*command)
        assert code == 2
        assert "a-000001.safetensors, a.safetensors" in text


@pytest.mark.parametrize(
    ("said", "rank", "fine"),
    [
        ({"transformer.r": 2, "transformer.lora_alpha": 2}, 2, True),
        ({"transformer.r": 2, "transformer.lora_alpha": 4}, 2, False),
        (
            {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_rslora": True},
            2,
            False,
        ),
        ({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"q": 1}}, 2, False),
        ({"transformer.lora_alpha": [2]}, 2, False),
    ],
)
def test_a_scale_that_only_the_header_tells_is_not_ignored(said, rank, fine, tmp_path):
    """diffusers writes no alpha beside lora_A and lora_B, but LoraConfig's into the header."""
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    names = ("lora_B", "lora_A")
    path = write(
        tmp_path / "a.safetensors",
        {"q": lora("q", rank, names)},
        "transformer.down.",
        metadata=metadata,
    )
    if fine:
        same(loaded(path, ["q"])["q"], weight("q") + delta("q", lora("q", rank)))
        return
    with pytest.raises(
        FileError, match=r"transformer\.down\.q has no alpha of its own, and its header"
    ):
        loaded(path, ["q"])


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
@pytest.mark.parametrize("kind", ["loha", "lora"])
def test_factors_in_low_precision(kind, dtype, tmp_path):
    """The values are those that the file holds; alpha may have any floating dtype, and one axis."""
    parts = {
        part: t.astype(dtype) for part, t in (loha("q") if kind == "loha" else lora("q")).items()
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        _bytes(
            {
                f"lora_unet_down_q.{p}": t
                for p, t in (parts | {"alpha": np.array([1], dtype)}).items()
            }
        )
    )
    want = weight("q") + delta("q", parts, 0.5)
    same(loaded(path, ["q"])["q"], want)
    same(merged(tmp_path, path, ["q"])["q"], want)


def _bytes(tensors):
    from loha_jax.interop.disk.safetensors_file import Header

    header = Header.of([(key, t.dtype, t.shape) for key, t in tensors.items()])
    data = bytearray(header.data.ljust(header.file_size, b"\0"))
    for key, t in tensors.items():
        start, end = header.places[key]
        data[start:end] = t.tobytes()
    return bytes(data)


def test_a_scale_beside_quantised_factors_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {"q": loha("q") | {"hada_w1_a_scale": np.float32(2)}})
    with pytest.raises(FileError, match=r"lora_unet_down_q\.hada_w1_a_scale"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("only", "match"), [("(", r"is not a regular"), ("x", r"matches `only=` 'x'; it")]
)
def test_a_choice_that_chooses_nothing(only, match, tmp_path):
    path = write(tmp_path / "a.safetensors", {"q": loha("q")})
    with pytest.raises(ValueError, match=match):
        loaded(path, ["q"], only=only)
    code, text = run("convert", path, tmp_path / "o", "--to", "kohya", "--only", only)
    assert code == 2
    assert "--only" in text
