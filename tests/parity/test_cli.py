"""The command line beside the real PEFT.

Merged checkpoints are its merged models, converted folders open in it.
"""

import json
import warnings

import jax.numpy as jnp
import lycoris_samples
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from typer.testing import CliRunner

from loha_jax.interop.commands.main import app
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.merge.files import merge_checkpoint
from tests.parity.merge_in_peft import CheckedTensor, compare_with_peft

LLAMAS = ["llama_default_targets", "llama_patterns", "llama_lm_head_targeted"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def merge_like_peft(base, adapter, out):
    """Merge by the command line and compare every tensor with PEFT's.

    Returns the names of the compared tensors.
    """
    run("merge", base, adapter, out)
    results, unable = compare_with_peft(out, base, [(adapter, 1.0)])
    assert results
    assert not unable
    assert all(result.is_fine for result in results), results
    return {result.key for result in results}


def llama(sample, dtype):
    config = transformers.LlamaConfig.from_dict(
        json.loads((sample.folder / "base_config.json").read_text())
    )
    config.tie_word_embeddings = False
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(
        {k: v.to(dtype) for k, v in load_torch(sample.folder / "base.safetensors").items()}
    )
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LLAMAS)
def test_a_merged_llama_is_pefts(name, dtype, tmp_path):
    sample = Sample(name)
    llama(sample, dtype).save_pretrained(tmp_path / "base", max_shard_size="10KB")
    merge_like_peft(tmp_path / "base", sample.adapter, tmp_path / "out")
    theirs = (
        peft.PeftModel.from_pretrained(llama(sample, dtype), sample.adapter)
        .merge_and_unload()
        .state_dict()
    )
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        unit = torch.finfo(dtype).eps * 2 ** torch.floor(
            torch.log2(theirs[key].float().abs().max())
        )
        limit = (
            unit if dtype != torch.float32 else 4 * unit
        )  # the last bits of float32 go by the order of sums
        assert (value.float() - theirs[key].float()).abs().max() <= limit, key
        if dtype != torch.float32:
            assert (value == theirs[key]).float().mean() > 0.99


@pytest.mark.parametrize("to", [None, "bfloat16"])
@pytest.mark.parametrize("weights", [(1.0,), (0.5, -0.25)])
@pytest.mark.parametrize("name", NAMES)
def test_merged_tensors_are_pefts(name, weights, to, tmp_path):
    """Linear, convolutions flat and with cores, saved modules; one adapter and two."""
    sample = Sample(name)
    dtype = None if to is None else np.dtype(ml_dtypes.bfloat16)
    adapters = [(sample.adapter, weight) for weight in weights]
    base = sample.folder / "base.safetensors"
    merge_checkpoint(base, adapters, tmp_path / "out", dtype=dtype)
    results, unable = compare_with_peft(tmp_path / "out", base, adapters)
    assert not unable
    adapted = {f"{key.split('::')[1]}.weight" for key in sample.io if key.startswith("delta::")}
    assert {result.key for result in results} == adapted
    assert all(result.is_fine for result in results), results


def test_a_merged_lora_and_dora_are_pefts(tmp_path):
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(12, 8), "k": torch.nn.Conv2d(3, 5, 3)})
    save_torch(
        {k: v.contiguous() for k, v in base.state_dict().items()}, tmp_path / "base.safetensors"
    )
    for use_dora in (False, True):
        config = peft.LoraConfig(
            r=2, target_modules=["q", "k"], use_dora=use_dora, init_lora_weights=False
        )
        base.config = {"model_type": "custom"}
        model = peft.get_peft_model(torch.nn.ModuleDict(base).eval(), config)
        model.save_pretrained(tmp_path / f"lora{use_dora}")
        model.unload()
        lora, out = tmp_path / f"lora{use_dora}", tmp_path / f"out{use_dora}"
        assert merge_like_peft(tmp_path / "base.safetensors", lora, out) == {"q.weight", "k.weight"}


def test_a_wrong_merge_is_seen(tmp_path):
    """The comparison sees a change of two units in one value."""
    sample = Sample("linear_bf16_base_fp32_adapter")
    base, out = sample.folder / "base.safetensors", tmp_path / "out"
    merge_like_peft(base, sample.adapter, out)
    path = out / "base.safetensors"
    start, _ = Checkpoint(path).header(path).places["lin1.weight"]
    data = bytearray(path.read_bytes())
    data[start : start + 2] = (int.from_bytes(data[start : start + 2], "little") + 2).to_bytes(
        2, "little"
    )
    path.write_bytes(data)
    results, _ = compare_with_peft(out, base, [(sample.adapter, 1.0)])
    assert [result.key for result in results if not result.is_fine] == ["lin1.weight"]


def test_what_peft_has_not_is_not_compared(tmp_path):
    path, _ = lycoris_samples.native("dora")
    base = lycoris_samples.DATA / "base_tiny.safetensors"
    run("merge", base, path, tmp_path / "out")
    results, unable = compare_with_peft(tmp_path / "out", base, [(path, 1.0)])
    assert results == []
    assert len(unable) == len(lycoris_samples.LAYERS)
    assert CheckedTensor("x", 1.0, 1.5).is_fine is False


@pytest.mark.parametrize("form", ["plain", "tucker"])
def test_a_converted_lycoris_file_opens_in_peft(form, tmp_path):
    """The outputs of PEFT's model are those of LyCORIS' forward pass."""
    path, _ = lycoris_samples.native(form)
    base = lycoris_samples.DATA / "base_tiny.safetensors"
    run("convert", path, tmp_path / "peft", "--to", "peft", "--base", base, "--only", "(?!.*c3d).*")
    _compare_with_lycoris(form, base, tmp_path / "peft")


def test_a_converted_lycoris_file_opens_as_a_lora_in_peft(tmp_path):
    path, _ = lycoris_samples.native("plain")
    base = lycoris_samples.DATA / "base_tiny.safetensors"
    run(
        "convert",
        path,
        tmp_path / "lora",
        "--to",
        "lora",
        "--base",
        base,
        "--only",
        "(?!.*(c3d|gconv)).*",
    )
    _compare_with_lycoris("plain", base, tmp_path / "lora", without=("conv3gconv", "c3d"))


def _compare_with_lycoris(form, base, adapter, without=("c3d",)):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            nn = torch.nn
            self.fc1 = nn.Linear(24, 16)
            self.blocks = nn.ModuleList(
                [nn.ModuleDict({"q_proj": nn.Linear(16, 16, False), "out": nn.Linear(16, 12)})]
            )
            self.conv1x1, self.conv3 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 10, 3, 2, 1)
            self.gconv = nn.Conv2d(8, 8, (3, 2), groups=2)
            self.c1d, self.c3d = nn.Conv1d(6, 8, 3, padding=1), nn.Conv3d(4, 6, (2, 3, 3))
            self.config = {"model_type": "custom"}

    network = Network()
    network.load_state_dict(load_torch(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(network, adapter).eval()
    inner, inputs = (
        model.base_model.model,
        {k: torch.from_numpy(v) for k, v in lycoris_samples.inputs().items()},
    )
    wanted = lycoris_samples.outputs(form)
    with torch.no_grad():
        block = inner.blocks[0]
        found = {
            "lin": block["out"](torch.tanh(block["q_proj"](inner.fc1(inputs["x"])))),
            "conv3": inner.conv3(inner.conv1x1(inputs["img"])),
            "c1d": inner.c1d(inputs["seq"]),
        }
    assert found.keys() & wanted.keys() == found.keys(), wanted.keys()
    for key, value in found.items():
        np.testing.assert_allclose(
            value.numpy(), wanted[key], rtol=0, atol=2e-6 * np.abs(wanted[key]).max()
        )


def test_a_loha_of_gpt2_merges_into_what_its_own_mathematics_says(tmp_path):
    """PEFT has no LoHa for GPT-2; transformers loads the merged checkpoint."""
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    random = np.random.default_rng(0)
    names = {"transformer.h.0.attn.c_attn": (24, 8), "transformer.h.0.attn.c_proj": (8, 8)}
    from loha_jax import LoHaConfig, hada_weight
    from loha_jax.interop.disk.tensor_files import safetensors_bytes

    state, deltas = {}, {}
    for name, (out, in_) in names.items():
        parts = [
            random.standard_normal(s).astype(np.float32)
            for s in ((out, 2), (2, in_), (out, 2), (2, in_))
        ]
        keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        state |= {f"base_model.model.{name}.{k}": p for k, p in zip(keys, parts, strict=True)}
        deltas[name] = np.asarray(hada_weight(*map(jnp.asarray, parts), 4.0))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {}))
    text = LoHaConfig(r=2, alpha=8, target_modules=["c_attn", "attn.c_proj"]).to_json()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    merge_like_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name, delta in deltas.items():
        wanted = model.state_dict()[f"{name}.weight"].numpy() + delta.T
        np.testing.assert_allclose(
            merged[f"{name}.weight"].numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
        )
    untouched = load_file(tmp_path / "base" / "model.safetensors")
    out = Checkpoint(tmp_path / "out")
    assert all(
        np.array_equal(out.read(k), v)
        for k, v in untouched.items()
        if k.removesuffix(".weight") not in names
    )
