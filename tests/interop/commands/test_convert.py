"""Adapters from one file format into another: bit for bit, or refused by name."""

import json

import jax
import jax.numpy as jnp
import lycoris_samples
import ml_dtypes
import numpy as np
import pytest
from lora_folders import dense
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.interop.commands.convert import FORMATS, convert_adapter
from loha_jax.interop.commands.differences import compare_paths
from loha_jax.interop.disk.tensor_files import safetensors_bytes
from loha_jax.interop.formats.read_adapter import read_adapter

BASE = lycoris_samples.DATA / "base_tiny.safetensors"
WITHOUT_C3D = r"(?!.*c3d).*"


def content(path):
    """Everything of an adapter by module, as bytes."""
    adapter = read_adapter(path)
    return {
        m.name: (
            m.kind,
            m.r,
            m.alpha,
            {part: (t.dtype, t.shape, t.tobytes()) for part, t in m.tensors.items()},
        )
        for m in adapter.modules.values()
    }


def bits(path):
    return {key: (t.dtype, t.shape, t.tobytes()) for key, t in load_file(path).items()}


@pytest.mark.parametrize("by_way_of", ["lycoris", "kohya", "peft"])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("bert_seqcls", "modules_to_save")]
)
def test_peft_there_and_back(name, by_way_of, tmp_path):
    sample = Sample(name)
    base = sample.folder / "base.safetensors"
    convert_adapter(sample.adapter, tmp_path / "there", by_way_of, base=base)
    convert_adapter(tmp_path / "there", tmp_path / "back", "peft", base=base)
    assert content(tmp_path / "back") == content(sample.adapter)


@pytest.mark.parametrize("name", ["bert_seqcls", "modules_to_save"])
def test_saved_modules_come_along(name, tmp_path):
    sample = Sample(name)
    convert_adapter(sample.adapter, tmp_path / "there", "peft")
    convert_adapter(tmp_path / "there", tmp_path / "back", "peft")
    old, new = (
        load_file(path / "adapter_model.safetensors")
        for path in (sample.adapter, tmp_path / "back")
    )
    assert old.keys() == new.keys()
    assert all(
        old[key].tobytes() == new[key].tobytes() and old[key].dtype == new[key].dtype for key in old
    )
    configs = [LoHaConfig.from_pretrained(path) for path in (sample.adapter, tmp_path / "back")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("form", lycoris_samples.FORMS)
@pytest.mark.parametrize("by_way_of", ["kohya", "lycoris"])
def test_lycoris_there_and_back(form, by_way_of, tmp_path):
    """Conv3d, cores, weight decompositions of both kinds: every tensor and alpha as it was."""
    path, _ = lycoris_samples.native(form)
    convert_adapter(path, tmp_path / "there", by_way_of, base=BASE)
    convert_adapter(tmp_path / "there", tmp_path / "back.safetensors", "lycoris", base=BASE)
    assert bits(tmp_path / "back.safetensors") == bits(path)


@pytest.mark.parametrize("form", lycoris_samples.FORMS)
def test_names_that_need_not_change_need_no_base(form, tmp_path):
    """Of a Conv1d, too: its core has three axes in LyCORIS' and kohya's files."""
    path, _ = lycoris_samples.native(form)
    convert_adapter(path, tmp_path / "kohya.safetensors", "kohya")
    convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "kohya")
    convert_adapter(tmp_path / "again.safetensors", tmp_path / "back.safetensors", "lycoris")
    assert bits(tmp_path / "kohya.safetensors") == bits(tmp_path / "again.safetensors")
    assert bits(tmp_path / "back.safetensors") == bits(path)


@pytest.mark.parametrize("form", ["plain", "tucker", "scalar"])
def test_lycoris_becomes_what_another_converter_made_of_it(form, tmp_path):
    path, _ = lycoris_samples.native(form)
    convert_adapter(path, tmp_path / "peft", "peft", base=BASE, only=WITHOUT_C3D)
    assert content(tmp_path / "peft") == content(lycoris_samples.DATA / f"peft_{form}")
    convert_adapter(tmp_path / "peft", tmp_path / "back.safetensors", "lycoris", base=BASE)
    wanted = {key: value for key, value in bits(path).items() if "c3d" not in key}
    assert bits(tmp_path / "back.safetensors") == wanted


def test_kohya_keeps_its_components_and_takes_one_to_peft(tmp_path):
    path, base = (
        lycoris_samples.DATA / "kohya_tucker.safetensors",
        lycoris_samples.DATA / "kohya_base.safetensors",
    )
    parts = {"unet": {}, "te": {}}
    for key, value in load_file(base).items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    for part, state in parts.items():
        save_file(state, tmp_path / f"{part}.safetensors")
    with pytest.raises(ValueError, match=r"several models' modules \(lora_te_, lora_unet_\)"):
        convert_adapter(path, tmp_path / "peft", "peft")
    for part in parts:
        only = f"lora_{part}_.*"
        convert_adapter(
            path,
            tmp_path / f"{part}_peft",
            "peft",
            base=tmp_path / f"{part}.safetensors",
            only=only,
        )
        convert_adapter(
            *(path, tmp_path / f"{part}_lora", "lora"),
            **{"base": tmp_path / f"{part}.safetensors", "only": only, "form": "kohya"},
        )
        assert all(key.startswith(f"lora_{part}_") for key in load_file(tmp_path / f"{part}_lora"))
        convert_adapter(
            *(tmp_path / f"{part}_peft", tmp_path / f"{part}_back", "kohya"),
            **{"base": tmp_path / f"{part}.safetensors", "prefix": f"lora_{part}_"},
        )
        old = {k: v for k, v in load_file(path).items() if k.startswith(f"lora_{part}_")}
        new = load_file(tmp_path / f"{part}_back")
        assert old.keys() == new.keys()
        for key, value in old.items():  # alpha is written in float32
            assert value.tobytes() == new[key].astype(value.dtype).tobytes()


@pytest.mark.parametrize("base", [None, "base.safetensors"])
def test_a_loha_of_gpt2s_projections_is_no_folder_for_peft(base, tmp_path):
    """A LoRA's settings say it, or the biases of the base do."""
    tree = {"c_attn": {"kernel": jnp.ones((24, 8)), "bias": jnp.ones(24)}}  # as in Flax
    config = LoHaConfig(r=2, target_modules=["c_attn"], init_weights=False)
    params = loha_jax.inject(tree, config, key=jax.random.key(0))
    loha_jax.interop.save_lora(tmp_path / "lora", params)
    if base is not None:
        base = tmp_path / base
        save_file({"c_attn.weight": np.ones((8, 24)), "c_attn.bias": np.ones(24)}, base)
    done = convert_adapter(tmp_path / "lora", tmp_path / "loha", "peft", base=base)
    assert any("PEFT has no LoHa for GPT-2's Conv1D" in note for note in done.notes)
    convert_adapter(tmp_path / "lora", tmp_path / "again", "lora", base=base)
    for folder in ("lora", "again"):
        settings = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert settings["fan_in_fan_out"] is True


@pytest.mark.parametrize(("rank", "energy"), [(None, None), (2, None), (None, 0.9)])
def test_lora_has_the_error_that_it_reports(rank, energy, tmp_path):
    path, _ = lycoris_samples.native("tucker")
    done = convert_adapter(path, tmp_path / "lora", "lora", base=BASE, rank=rank, energy=energy)
    rows = compare_paths(path, tmp_path / "lora")["modules"]
    assert len(rows) == len(done.errors) == len(lycoris_samples.LAYERS)
    for row in rows:
        np.testing.assert_allclose(row["relative"], done.errors[row["name"]], rtol=1e-4, atol=3e-7)
    if rank is None and energy is None:
        assert not any(done.errors.values())


def test_a_lora_becomes_the_loha_that_is_equal_to_it(tmp_path):
    convert_adapter(Sample("llama_patterns").adapter, tmp_path / "lora", "lora")
    convert_adapter(tmp_path / "lora", tmp_path / "loha", "peft")
    found = compare_paths(tmp_path / "lora", tmp_path / "loha", tolerance=1e-12)
    assert not found["different"]
    assert read_adapter(tmp_path / "loha").form == "peft"


@pytest.mark.parametrize("to", FORMATS)
def test_another_dtype(to, tmp_path):
    sample = Sample("linear")
    convert_adapter(sample.adapter, tmp_path / "out", to, dtype=np.dtype(ml_dtypes.bfloat16))
    adapter = read_adapter(tmp_path / "out")
    assert {str(t.dtype) for m in adapter.modules.values() for t in m.tensors.values()} == {
        "bfloat16"
    }
    found = compare_paths(sample.adapter, tmp_path / "out", tolerance=2**-6)
    assert not found["different"]


def norm_file(path, base):
    """A LyCORIS file with a normalisation layer."""
    state = {f"lycoris_q.hada_w{n}_{x}": np.ones((3, 3), np.float32) for n in "12" for x in "ab"}
    save_file({**state, "lycoris_a_norm.w_norm": np.full(3, 0.5, np.float32)}, path)
    save_file(
        {"q.weight": np.ones((3, 3)), "a.norm.weight": np.ones(3), "a.norm.bias": np.full(3, 2.0)},
        base,
    )


def test_norm_layers_become_saved_modules(tmp_path):
    norm_file(tmp_path / "a.safetensors", tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"lycoris_a_norm.*`base=`"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "no", "peft")
    convert_adapter(
        tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=tmp_path / "base.safetensors"
    )
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    np.testing.assert_array_equal(state["base_model.model.a.norm.weight"], np.full(3, 1.5))
    np.testing.assert_array_equal(state["base_model.model.a.norm.bias"], np.full(3, 2.0))
    assert LoHaConfig.from_pretrained(tmp_path / "peft").modules_to_save == ("a.norm",)


def test_ranks_and_alphas_of_each_module_survive(tmp_path):
    state = {}
    for name, r, alpha in (("a_q", 2, 1.0), ("b_a_q", 3, 1.0), ("q", 2, 0.5), ("c_q", 2, 1.0)):
        state |= {f"lycoris_{name}.hada_w{n}_a": np.ones((4, r), np.float32) for n in "12"}
        state |= {f"lycoris_{name}.hada_w{n}_b": np.ones((r, 4), np.float32) for n in "12"}
        state[f"lycoris_{name}.alpha"] = np.array(alpha, np.float32)
    save_file(state, tmp_path / "a.safetensors")
    names = ["a.q", "b.a.q", "q", "c.q", "d.q"]
    save_file(
        {f"{name}.weight": np.ones((4, 4), np.float32) for name in names},
        tmp_path / "base.safetensors",
    )
    convert_adapter(
        tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=tmp_path / "base.safetensors"
    )
    modules = read_adapter(tmp_path / "peft").modules
    assert {n: (m.r, m.alpha) for n, m in modules.items()} == {
        **{"a.q": (2, 1.0), "b.a.q": (3, 1.0)},
        **{"q": (2, 0.5), "c.q": (2, 1.0)},
    }
    targets = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(targets, str)  # the list would have matched d.q by its ending "q"


@pytest.mark.parametrize(
    ("source", "to", "options", "match"),
    [
        ("native_plain", "peft", {}, r"lycoris_blocks_0_out.*`base=`"),
        ("native_plain", "peft", {"base": BASE}, r"a Conv3d in c3d"),
        (
            "native_dora",
            "peft",
            {"base": BASE, "only": WITHOUT_C3D},
            r"weight decomposition \(DoRA\) in .*fc1",
        ),
        (
            "native_plain",
            "peft",
            {"base": "other"},
            r"has no weight for lycoris_blocks_0_out, .*lycoris_fc1",
        ),
        (
            "native_plain",
            "lycoris",
            {"only": "nothing"},
            r"no module whose whole name in the file matches",
        ),
        ("native_plain", "lycoris", {"rank": 2}, r'`rank=` and `energy=` are for `to="lora"`'),
        ("native_plain", "peft", {"prefix": "x_"}, r'`prefix=` is for `to="lycoris"`'),
        ("native_plain", "kohya", {"prefix": "x"}, r"should end with '_'"),
        ("native_plain", "peft", {"form": "kohya"}, r'`form=` is for `to="lora"`'),
        ("native_plain", "lora", {"form": "peft2"}, r"`form` is one of peft, kohya, diffusers"),
        ("native_plain", "lora", {"base": BASE, "form": "diffusers"}, r"a dot as `prefix=`"),
        ("native_plain", "lora", {"base": BASE, "rank": 0}, r"positive integer"),
        ("native_plain", "lora", {"base": BASE, "rank": 2, "energy": 0.5}, r"not both"),
        ("native_dora_in", "lora", {"base": BASE}, r"norms per input feature"),
        ("native_plain", "gguf", {}, r"not to 'gguf'"),
        ("peft:modules_to_save", "lycoris", {}, r"modules_to_save\): .*head\.0\.weight"),
        ("peft:conv1d_cp", "lycoris", {}, r"`base=`"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(source, to, options, match, tmp_path):
    if source.startswith("peft:"):
        path = Sample(source.removeprefix("peft:")).adapter
    else:
        path = lycoris_samples.DATA / f"{source}.safetensors"
    if options.get("base") == "other":
        options = {"base": Sample("linear").folder / "base.safetensors"}
    with pytest.raises(ValueError, match=match):
        convert_adapter(path, tmp_path / "out", to, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "prefix", "down", "up"),
    [("kohya", None, "lora_down", "lora_up"), ("diffusers", "unet.", "lora_A", "lora_B")],
)
def test_a_lora_in_one_file_has_the_update(form, prefix, down, up, tmp_path):
    path, _ = lycoris_samples.native("plain")
    target = tmp_path / "a.safetensors"
    done = convert_adapter(path, target, "lora", base=BASE, form=form, prefix=prefix)
    written, found = load_file(target), {}
    for key, a in written.items():
        own = key.removesuffix(f".{down}.weight")
        if own != key:
            b, r = written[f"{own}.{up}.weight"], len(a)
            scale = written.get(f"{own}.alpha", r) / r
            name = own.removeprefix(prefix or "lora_unet_").replace(".", "_")
            found[name] = scale * (b.reshape(len(b), -1) @ a.reshape(r, -1))
    assert set(done.errors.values()) == {0}
    assert (len(set(done.modules.values())) == 1) == (form == "diffusers")
    modules = {module.name: module for module in read_adapter(path).modules.values()}
    assert found.keys() == modules.keys()
    for name, module in modules.items():
        want = dense(module, (len(module.tensors["hada_w1_a"]), -1))
        np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_cores_beside_flat_convolutions_are_refused(tmp_path):
    tucker, plain = (
        load_file(lycoris_samples.native("tucker")[0]),
        load_file(lycoris_samples.native("plain")[0]),
    )
    mixed = {k: v for k, v in tucker.items() if "conv3" in k} | {
        k: v for k, v in plain.items() if "gconv" in k
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match=r"cores \(conv3\) and without \(gconv\)"):
        convert_adapter(tmp_path / "mixed.safetensors", tmp_path / "out", "peft", base=BASE)
    with pytest.raises(ValueError, match=r"`base=`"):
        convert_adapter(tmp_path / "mixed.safetensors", tmp_path / "out", "peft")


def test_what_is_there_stays_without_force(tmp_path):
    source = Sample("linear").adapter
    for to in ("peft", "lycoris"):
        target = tmp_path / to
        target.write_text("mine")
        with pytest.raises(FileExistsError, match="`force=True`"):
            convert_adapter(source, target, to)
        assert target.read_text() == "mine"
        convert_adapter(source, target, to, force=True)
        assert content(target).keys() == content(source).keys()
    with pytest.raises(ValueError, match=r"is, or holds, .* which would be replaced"):
        convert_adapter(tmp_path / "peft", tmp_path / "peft", "peft", force=True)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        convert_adapter(source, tmp_path / "a" / "b", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lycoris", "peft"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    from loha_jax.interop.disk import atomic

    monkeypatch.setattr(
        atomic, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        convert_adapter(Sample("linear").adapter, tmp_path / "out", "peft")
    assert not list(tmp_path.iterdir())


def test_bits_of_a_nan_survive(tmp_path):
    """A conversion is no judge of values."""
    odd = np.array([0x7FC01234, 0xFFC00001], np.uint32).view(np.float32)
    factors = {f"hada_w{n}_{x}": np.ones((2, 2), np.float32) for n in "12" for x in "ab"}
    factors["hada_w1_a"][0] = odd
    folder = tmp_path / "in"
    folder.mkdir()
    state = {f"base_model.model.q.{part}": tensor for part, tensor in factors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {}))
    (folder / "adapter_config.json").write_text(LoHaConfig(r=2, target_modules=["q"]).to_json())
    convert_adapter(folder, tmp_path / "out.safetensors", "lycoris")
    found = load_file(tmp_path / "out.safetensors")["lycoris_q.hada_w1_a"][0].view(np.uint32)
    np.testing.assert_array_equal(found, odd.view(np.uint32))
