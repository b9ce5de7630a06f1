"""Adapters from the difference of two checkpoints, opened by PEFT, LyCORIS and `merge`."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from command_line import run, run_json
from safetensors.numpy import load_file, save_file

from loha_jax.interop import load_lycoris
from loha_jax.interop.commands.extract import extract_adapter
from loha_jax.interop.merge.files import merge_checkpoint

SHAPES = {
    "embed_tokens.weight": (20, 8),
    "q.weight": (8, 8),
    "q.bias": (8,),
    "conv.weight": (8, 4, 3, 3),
    "norm.weight": (8,),
    "same.weight": (6, 8),
}


def write(folder, tensors, config=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def checkpoints(folder, shapes=SHAPES, dtype=np.float32, config=None):
    """A base and a tuned checkpoint, which differ but for `same`."""
    rng = np.random.default_rng(0)
    base = {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}
    sizes = {key: 0 if key.startswith("same") else 0.1 for key in shapes}
    tuned = {
        key: (value + sizes[key] * rng.normal(size=value.shape)).astype(dtype)
        for key, value in base.items()
    }
    return write(folder / "tuned", tuned, config), write(folder / "base", base, config)


def change_of(tuned, base, key):
    return tuned[key].astype(np.float64) - base[key].astype(np.float64)


def missing(found, tuned, base, key):
    """‖found − tuned‖ / ‖tuned − base‖: the relative error of the update."""
    size = np.linalg.norm(change_of(tuned, base, key))
    return np.linalg.norm(found.astype(np.float64) - tuned[key].astype(np.float64)) / size


def test_peft_opens_it_and_adds_what_was_reported(tmp_path):
    torch, peft = (
        pytest.importorskip(name, reason="the main test run has it") for name in ("torch", "peft")
    )
    tuned_path, base_path = checkpoints(tmp_path)
    done = extract_adapter(tuned_path, base_path, tmp_path / "adapter", r=2, alpha=6)
    tuned, base = (load_file(p / "model.safetensors") for p in (tuned_path, base_path))
    model = torch.nn.Module()
    model.q, model.conv = torch.nn.Linear(8, 8), torch.nn.Conv2d(4, 8, 3)
    with torch.no_grad():
        model.q.weight.copy_(torch.tensor(base["q.weight"]))
        model.conv.weight.copy_(torch.tensor(base["conv.weight"]))
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    errors = {module.name: module.error for module in done.modules}
    assert set(errors) == {"q", "conv"}
    for name, error in errors.items():
        found = merged.get_submodule(name).weight.detach().numpy()
        assert missing(found, tuned, base, f"{name}.weight") == pytest.approx(error, rel=1e-4)
        assert error < 1


def test_the_report(tmp_path):
    tuned_path, base_path = checkpoints(tmp_path)
    found = run_json("extract", tuned_path, base_path, tmp_path / "adapter", "--rank", 2)
    tuned, base = (load_file(p / "model.safetensors") for p in (tuned_path, base_path))
    assert set(found["left_out"]) == {"embed_tokens.weight", "q.bias", "norm.weight"}
    assert found["unchanged"] == 1
    modules = {module["name"]: module for module in found["modules"]}
    for name, module in modules.items():
        change = change_of(tuned, base, f"{name}.weight").reshape(8, -1)
        values = np.linalg.svd(change, compute_uv=False)
        assert module["size"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
        lost = np.linalg.norm(values[4:]) / np.linalg.norm(values)
        assert module["lora_error"] == pytest.approx(lost, rel=1e-5)
    for kind in ("error", "lora_error"):
        lost = math.hypot(*(m[kind] * m["size"] for m in modules.values()))
        size = math.hypot(*(m["size"] for m in modules.values()))
        assert found[kind] == pytest.approx(lost / size, rel=1e-9)


@pytest.mark.parametrize("to", ["peft", "lycoris", "kohya"])
def test_merging_it_gives_the_tuned_weights_but_for_the_error(to, tmp_path):
    tuned_path, base_path = checkpoints(tmp_path)
    target = tmp_path / ("adapter" if to == "peft" else "adapter.safetensors")
    done = extract_adapter(tuned_path, base_path, target, r=2, to=to, only="q|conv")
    merge_checkpoint(base_path, [(target, 1.0)], tmp_path / "merged")
    tuned, base, merged = (
        load_file(p / "model.safetensors") for p in (tuned_path, base_path, tmp_path / "merged")
    )
    for module in done.modules:
        key = f"{module.name}.weight"
        assert missing(merged[key], tuned, base, key) == pytest.approx(module.error, rel=1e-4)
    assert done.left_out == {"q.bias": "a LoHa changes `<module>.weight` of two or more axes only"}


def test_lycoris_file_is_loaded_onto_a_tree(tmp_path):
    tuned_path, base_path = checkpoints(tmp_path, {"q.weight": (8, 18)})
    extract_adapter(tuned_path, base_path, tmp_path / "a.safetensors", r=2, to="lycoris")
    kernel = load_file(base_path / "model.safetensors")["q.weight"].T
    params = load_lycoris(tmp_path / "a.safetensors", {"q": {"kernel": kernel}})
    assert params["q"]["kernel"].adapters["default"].config.r == 2


def test_a_merged_adapter_is_found_again(tmp_path):
    _, base_path = checkpoints(tmp_path, {"q.weight": (10, 12)})
    shapes = 2 * ((10, 2), (2, 12))
    a1, b1, a2, b2 = (np.random.default_rng(n).normal(size=s) for n, s in enumerate(shapes))
    base = load_file(base_path / "model.safetensors")["q.weight"]
    tuned = write(tmp_path / "sum", {"q.weight": (base + (a1 @ b1) * (a2 @ b2)).astype(np.float32)})
    done = extract_adapter(tuned, base_path, tmp_path / "adapter", r=2, starts=4)
    assert done.error < 1e-3


C_ATTN, C_PROJ = "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"


@pytest.mark.parametrize(
    ("key", "shapes", "config"),
    [
        (C_ATTN, {C_ATTN: (18, 8)}, {"model_type": "gpt2"}),
        (C_ATTN, {C_ATTN: (8, 8)}, {"model_type": "gpt2"}),
        # a bias shows it where no config says it, and that of c_attn for a square weight
        (C_ATTN, {C_ATTN: (8, 24), "h.0.attn.c_attn.bias": (24,)}, None),
        (C_PROJ, {C_PROJ: (8, 8), C_ATTN: (8, 24), "h.0.attn.c_attn.bias": (24,)}, None),
    ],
)
def test_projections_of_gpt2_are_stored_as_in_out(key, shapes, config, tmp_path):
    tuned_path, base_path = checkpoints(tmp_path, shapes, config=config)
    module = key.removesuffix(".weight")
    done = extract_adapter(tuned_path, base_path, tmp_path / "adapter", r=2, only=module)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    w1_b = factors[f"base_model.model.{module}.hada_w1_b"]
    assert w1_b.shape == (2, shapes[key][0])
    assert [note for note in done.notes if "PEFT has no LoHa" in note] == [*done.notes]
    assert "convert it to lora" in done.notes[0]
    merge_checkpoint(base_path, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    tuned, base, merged = (
        load_file(p / "model.safetensors") for p in (tuned_path, base_path, tmp_path / "merged")
    )
    lost = missing(merged[key], tuned, base, key)
    assert lost == pytest.approx(done.modules[0].error, rel=1e-4)


def test_linear_layers_called_like_gpt2s_are_linear(tmp_path):
    """Of GPT-BigCode (StarCoder), whose biases are as long as the first axis."""
    shapes = {C_ATTN: (24, 8), "h.0.attn.c_attn.bias": (24,), C_PROJ: (8, 8)}
    tuned, base = checkpoints(tmp_path, shapes, config={"model_type": "gpt_bigcode"})
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert factors["base_model.model.h.0.attn.c_attn.hada_w1_a"].shape == (24, 2)
    assert done.notes == ()


def test_bfloat16_checkpoints_and_factors(tmp_path):
    bf16 = np.dtype(ml_dtypes.bfloat16)
    tuned, base = checkpoints(tmp_path, {"q.weight": (8, 8)}, dtype=bf16)
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, dtype=bf16)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {f.dtype for f in factors.values()} == {bf16}
    f = {name.rpartition("hada_")[2]: x.astype(np.float64) for name, x in factors.items()}
    change = change_of(*(load_file(p / "model.safetensors") for p in (tuned, base)), "q.weight")
    update = (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
    assert np.linalg.norm(update - change) / np.linalg.norm(change) == pytest.approx(
        done.error, abs=0.02
    )


@pytest.mark.parametrize(
    ("shapes", "config", "key", "reason"),
    [
        ({"wte.weight": (20, 8)}, {}, "wte.weight", "no format has a LoHa for an embedding"),
        ({"lm_head.weight": (20, 8)}, {"tie_word_embeddings": True}, "lm_head.weight", "is tied"),
        ({"q.scale": (8, 8)}, {}, "q.scale", "of two or more axes only"),
    ],
)
def test_what_no_loha_holds_is_named(shapes, config, key, reason, tmp_path):
    tuned, base = checkpoints(tmp_path, shapes | {"q.weight": (8, 8)}, config=config)
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2)
    assert reason in done.left_out[key]
    assert [module.name for module in done.modules] == ["q"]


@pytest.mark.parametrize("name", ["x_embedder", "embed_out", "time_embedding.linear_1", "lm_head"])
def test_what_only_sounds_like_an_embedding_is_fitted(name, tmp_path):
    tuned, base = checkpoints(tmp_path, {f"{name}.weight": (8, 8)})
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, steps=5)
    assert [module.name for module in done.modules] == [name]


def test_tensors_that_only_one_has_or_of_two_shapes_are_named(tmp_path):
    tuned, _ = checkpoints(tmp_path, {"q.weight": (8, 8), "k.weight": (4, 8), "v.weight": (4, 4)})
    tensors = load_file(tuned / "model.safetensors")
    changed = {"q.weight": tensors["q.weight"] * 1.5, "k.weight": tensors["k.weight"][:3]}
    base = write(tmp_path / "other", changed | {"o.weight": tensors["v.weight"]})
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, steps=5)
    assert set(done.left_out) == {"k.weight", "v.weight", "o.weight"}
    assert "it is [4, 8] in" in done.left_out["k.weight"]
    assert done.left_out["v.weight"] == f"it is not in {base}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no tensor of one name in common that --only 'nothing' chooses"),
        (["--only", "same"], "have the same values"),
        (["--only", "norm"], "differ in nothing that a LoHa can hold. norm.weight:"),
        (["--rank", "0"], "`r` should be a positive integer"),
        (["--alpha", "0"], "`alpha` should be a positive number"),
        (["--prefix", "lora_unet_"], "--prefix is for --to lycoris and --to kohya"),
        (["--only", "("], "is not a regular expression"),
    ],
)
def test_what_cannot_be_extracted_is_refused(arguments, message, tmp_path):
    tuned, base = checkpoints(tmp_path)
    _, error = run("extract", tuned, base, tmp_path / "adapter", *arguments, code=2)
    assert message in " ".join(error.split())
    assert not (tmp_path / "adapter").exists()


def test_what_is_not_finite_is_refused_by_name(tmp_path):
    _, base = checkpoints(tmp_path, {"q.weight": (8, 8)})
    tuned = write(tmp_path / "nan", {"q.weight": np.full((8, 8), np.nan, np.float32)})
    _, error = run("extract", tuned, base, tmp_path / "adapter", code=2)
    assert "`change` has values that are not finite" in " ".join(error.split())


def test_a_convolution_of_three_axes_is_left_out_of_peft_s_folder(tmp_path):
    tuned, base = checkpoints(tmp_path, {"q.weight": (8, 8), "c.weight": (8, 1, 2, 2, 2)})
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, steps=5)
    assert done.left_out == {"c.weight": "PEFT's LoHa cannot hold a Conv3d"}
    target = tmp_path / "a.safetensors"
    assert not extract_adapter(tuned, base, target, r=2, steps=5, to="lycoris").left_out


def test_a_weight_of_three_axes_counts_as_a_conv1d_and_is_named(tmp_path):
    tuned, base = checkpoints(tmp_path, {"experts.weight": (8, 2, 4)})
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, steps=5)
    assert done.notes == ("weights of three axes count as those of a Conv1d: experts",)


def test_a_head_tied_in_a_part_of_the_config(tmp_path):
    config = {"text_config": {"tie_word_embeddings": True}}
    shapes = {"q.weight": (8, 8), "language_model.lm_head.weight": (9, 8)}
    tuned, base = checkpoints(tmp_path, shapes, config=config)
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, steps=5)
    assert "is tied" in done.left_out["language_model.lm_head.weight"]


def test_equal_nans_and_integers_are_unchanged(tmp_path):
    same = {"n.weight": np.full((2, 2), np.nan, np.float32), "i.weight": np.ones((2, 2), np.int8)}
    weight = np.ones((8, 8), np.float32)
    base = write(tmp_path / "base", same | {"q.weight": weight})
    tuned = write(tmp_path / "tuned", same | {"q.weight": 2 * weight, "i.weight": same["i.weight"]})
    done = extract_adapter(tuned, base, tmp_path / "adapter", r=2, steps=5)
    assert (done.unchanged, done.left_out) == (2, {})


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_very_large_and_small_changes_are_reported(size, tmp_path):
    tuned, base = checkpoints(tmp_path, {"q.weight": (8, 8)})
    paths = []
    for path in (tuned, base):
        weight = load_file(path / "model.safetensors")["q.weight"]
        paths.append(write(tmp_path / f"scaled {path.name}", {"q.weight": size * weight}))
    found = run_json("extract", *paths, tmp_path / "adapter", "--steps", 5, "--rank", 2)
    assert 0 < found["error"] < 1
    change = change_of(*(load_file(p / "model.safetensors") for p in paths), "q.weight")
    assert found["modules"][0]["size"] == pytest.approx(np.linalg.norm(change), rel=1e-6)


@pytest.mark.parametrize("command", ["extract", "convert", "merge"])
def test_no_command_replaces_what_it_reads(command, tmp_path):
    tuned, base = checkpoints(tmp_path, {"q.weight": (8, 8)})
    adapter = tmp_path / "adapter"
    extract_adapter(tuned, base, adapter, r=2, steps=5)
    inputs = {"extract": [tuned, base], "merge": [base, adapter], "convert": [adapter]}[command]
    more = ["--to", "peft", "--base", base] if command == "convert" else []
    (tmp_path / "link").symlink_to(base)
    places = [*inputs, base, tmp_path] + ([] if command == "merge" else [tmp_path / "link"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in places:
        _, error = run(command, *inputs, place, *more, "--force", code=2)
        assert "which would be replaced" in " ".join(error.split())
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_what_is_there_is_kept_without_force(tmp_path):
    tuned, base = checkpoints(tmp_path, {"q.weight": (8, 8)})
    (tmp_path / "adapter").mkdir()
    run("extract", tuned, base, tmp_path / "adapter", "--steps", 3, "--rank", 2, code=2)
    assert not any((tmp_path / "adapter").iterdir())
    run("extract", tuned, base, tmp_path / "adapter", "--steps", 3, "--rank", 2, "--force")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
