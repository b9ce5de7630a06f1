"""levanter's own trainer on an adapted Llama, by the script of examples/trainers.

In an environment of its own, which docs/trainers.md makes, with Python 3.12:

    PYTHON_WITH_PEFT=.venv/bin/python python -m pytest -s tests/trainers/test_levanter.py
"""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import loha_jax
from tests.trainers import torch_process

pytest.importorskip("levanter", reason="levanter has an environment of its own: docs/trainers.md")

import haliax as hax
from haliax.state_dict import to_torch_compatible_state_dict
from levanter.layers.attention import AttentionMask

pytestmark = pytest.mark.filterwarnings("ignore")  # of levanter and what it imports
EXAMPLE = Path(__file__).parents[2] / "examples" / "trainers" / "levanter_llama.py"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def run(out, steps):
    """Run the script, and return what it has at its end."""
    sys.argv = [str(EXAMPLE), "--steps", str(steps), "--out", str(out)]
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


def logits(end, model, ids):
    """The logits of levanter's model, adapted or not."""
    causal = AttentionMask.causal()
    named = hax.named(ids, ("batch", end["config"].max_Pos.resize(ids.shape[1])))
    return np.array(loha_jax.adapt(lambda model: model(named, causal).array)(model))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("levanter")
    return out, run(out, 20)


def test_the_trainer_trains_the_adapter_alone(trained, monkeypatch):
    """No array of the base changes; the optimizer has moments of the factors alone."""
    _, end = trained
    base = end["config"].model_type.init(end["vocabulary"], end["config"], key=jax.random.key(0))
    factors, model = end["trained"]
    pairs = list(zip(jax.tree.leaves(base), jax.tree.leaves(model), strict=True))
    changed = sum(not np.array_equal(*pair) for pair in pairs)
    print(f"\nloss: {end['losses'][0]:.3f} -> {end['losses'][-1]:.3f}, changed: ", end="")
    print(f"{changed} of {len(pairs)}")
    assert not changed
    assert end["losses"][-1] < end["losses"][0] - 0.3
    starts = end["trainable"][0]
    assert all(not np.array_equal(*pair) for pair in zip(starts, factors, strict=True))
    moments = [x.shape for x in jax.tree.leaves(end["state"].opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in factors])


def test_peft_opens_the_file(trained, tmp_path):
    """On transformers' Llama with the base weights under levanter's own torch names."""
    out, end = trained
    factors, model = end["trained"]
    base = {name: np.array(x) for name, x in to_torch_compatible_state_dict(model).items()}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(LLAMA))
    save_file(base, checkpoint / "model.safetensors", {"format": "pt"})
    ids = np.random.default_rng(0).integers(0, 256, (2, 32))
    plain, ours = logits(end, model, ids), logits(end, end["joined"]((factors, model)), ids)
    other = torch_process.logits_of(checkpoint, ids, tmp_path)
    theirs = torch_process.logits_of(checkpoint, ids, tmp_path, out / "adapter")
    difference, without = np.abs(theirs - ours).max(), np.abs(other - plain).max()
    moved = np.abs(ours - plain).max()
    print(f"\nPEFT - levanter: {difference:.1e}, without: {without:.1e}, moved by: {moved:.2g}")
    assert difference < 1e-5
    assert without < 1e-5
    assert moved > 0.1


def test_a_run_resumes(trained, tmp_path, capsys):
    """The factors are bit for bit those of a run that did not end; checkpoints have no base."""
    _, end = trained
    run(tmp_path, 10)
    resumed = run(tmp_path, 20)
    assert "starts at step 10" in capsys.readouterr().out
    assert resumed["losses"][-1] == end["losses"][-1]
    for ours, theirs in zip(resumed["trained"][0], end["trained"][0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    saved = json.loads(next((tmp_path / "checkpoints").rglob("manifest.json")).read_text())
    paths = {array["path"] for array in saved["arrays"]}
    factors = {f"model/0/{i}" for i in range(len(end["trained"][0]))}
    assert {path for path in paths if path.startswith("model")} == factors
