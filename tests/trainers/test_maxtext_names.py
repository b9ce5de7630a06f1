"""MaxText's own Llama, trained by its SFT, under the names of Hugging Face's.

Its base weights are converted by MaxText's own functions: the mapping of llama3.1, its hooks, and
`process_maxtext_param`, which its `to_huggingface.py` calls. PEFT, on transformers' Llama with
these weights, opens what MaxText has trained.
"""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import maxtext_llama
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.checkpoint_conversion import to_huggingface
from maxtext.checkpoint_conversion.utils import param_mapping, utils
from maxtext.utils import lora_utils, model_creation_utils
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.qwix import LoHaProvider
from tests.trainers import torch_process

THEIRS = "(maxtext|flax|jax|optax|orbax|tunix)"
pytestmark = pytest.mark.filterwarnings(rf"ignore::DeprecationWarning:{THEIRS}\..*")

EXAMPLE = Path(__file__).parents[2] / "examples/trainers/maxtext_scanned.py"
HEAD, LAYERS, RANK, ALPHA = 24, 2, 4, 8.0
IDS = np.random.default_rng(0).integers(0, 256, (2, 8))
SETTINGS = [
    *("steps=5", "learning_rate=3e-2", "base_num_kv_heads=2", f"head_dim={HEAD}"),
    *("rope_type=llama3.1", "rope_use_scale=false"),
    "lora.lora_module_path='.*(query|key|value|out|wi_0|wo)'",
]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def trained(folder, *, scanned):
    """MaxText's trainer and mesh, with a provider (scanned) or `inject` (unscanned)."""
    example = runpy.run_path(str(EXAMPLE))
    names = maxtext_llama.names(HEAD, scanned=scanned)

    def provider(config):
        path = lora_utils._get_lora_module_path(config)
        return LoHaProvider(module_path=path, rank=RANK, alpha=ALPHA, names=names)

    def inject(model, mesh, config):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        loha = LoHaConfig(r=RANK, alpha=ALPHA, target_modules=targets)
        return loha_jax.nnx.inject(model, loha, rngs=nnx.Rngs(5), names=names)

    with pytest.MonkeyPatch.context() as patch:
        if scanned:
            patch.setattr(lora_utils, "_build_lora_provider", provider)
        else:
            patch.setattr(lora_utils, "apply_lora_to_model", inject)
        return example["train"](folder, [*SETTINGS, f"scan_layers={str(scanned).lower()}"]), names


def logits(model, config, mesh):
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
        out = model(jnp.asarray(IDS), positions, decoder_segment_ids=jnp.ones_like(IDS))
    nnx.pop(model, nnx.Intermediate)
    return np.asarray(out)


def converted(model, config, folder):
    """Write the base model as MaxText's `to_huggingface` converts it."""
    given = (LLAMA, config, config.scan_layers)
    mapping = param_mapping.PARAM_MAPPING["llama3.1-8b"](*given)
    hooks = param_mapping.HOOK_FNS["llama3.1-8b"](*given, saving_to_hf=True)
    shapes = {
        "embed_tokens": (256, 64),
        "lm_head": (256, 64),
        "q_proj": (4 * HEAD, 64),
        "k_proj": (2 * HEAD, 64),
        "v_proj": (2 * HEAD, 64),
        "o_proj": (64, 4 * HEAD),
        "gate_proj": (128, 64),
        "up_proj": (128, 64),
        "down_proj": (64, 128),
    }
    keys = [key for own in mapping.values() for key in ([own] if isinstance(own, str) else own)]
    wanted = {key: shapes.get(key.split(".")[-2], (64,)) for key in keys}
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key = "-".join(("params", *map(str, path)))
        found = utils.process_maxtext_param(key, value.get_value(), mapping, hooks, wanted, config)
        tensors |= {name: np.ascontiguousarray(array) for name, array in found}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA))


def taken_by_the_exporter(model):
    """Whether MaxText's `to_huggingface` adds each module's LoRA of `as_lora` as the update it is.

    It has no product for kernels with an axis of heads.
    """
    found = jax.tree_util.tree_leaves_with_path(interop.as_lora(model))
    lora = {"-".join(key.key for key in path): array for path, array in found}
    merged, bare = (f(nnx.clone(model)) for f in (loha_jax.merge, loha_jax.unload))
    states = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (merged, bare))
    for (path, value), (_, before) in zip(*states, strict=True):
        key = "-".join(map(str, path))
        if f"{key}_lora_a" in lora:
            want = np.asarray(value.get_value() - before.get_value())
            try:
                delta = to_huggingface._get_lora_delta(f"params-{key}", lora, 1.0)
            except (TypeError, ValueError):
                yield path[-2], False
            else:
                assert abs(want).max() > 1e-3
                np.testing.assert_allclose(delta, want, rtol=0, atol=1e-7)
                yield path[-2], True


@pytest.mark.parametrize("scanned", [True, False])
def test_a_trained_llama_opens_under_the_names_of_hugging_face(scanned, tmp_path):
    (trainer, mesh), names = trained(tmp_path / "run", scanned=scanned)
    model, config = trainer.model, trainer.training_hooks.config
    base = model_creation_utils.from_pretrained(config, mesh=mesh)
    converted(base, config, tmp_path / "base")
    ours, before = logits(model, config, mesh), logits(base, config, mesh)
    theirs = torch_process.logits_of(tmp_path / "base", IDS, tmp_path)
    np.testing.assert_allclose(before, theirs, rtol=0, atol=1e-5)

    interop.save_peft(tmp_path / "adapter", model)
    theirs = torch_process.logits_of(tmp_path / "base", IDS, tmp_path, tmp_path / "adapter")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    moved, error = abs(ours - before).max(), abs(ours - theirs).max()
    print(
        f"\nscanned={scanned}: the adapter moves logits by {moved:.2f}, PEFT - MaxText {error:.1e}"
    )
    assert moved > 0.1
    assert dict(taken_by_the_exporter(model)) == {
        **dict.fromkeys(("query", "key", "value", "out"), False),
        **dict.fromkeys(("wi_0", "wo"), True),
    }

    again = nnx.clone(base)
    interop.load_peft(tmp_path / "adapter", again, names=names)
    np.testing.assert_allclose(logits(again, config, mesh), ours, rtol=0, atol=1e-5)
    interop.save_merged(tmp_path / "merged", model, names=names, base=tmp_path / "base")
    theirs = torch_process.logits_of(tmp_path / "merged", IDS, tmp_path)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

    interop.save_merged(tmp_path / "ours", base, names=names, base=tmp_path / "base")
    maxtexts, mine = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "ours"))
    for key, tensor in maxtexts.items():  # its product with sqrt(24) in float32 rounds otherwise
        np.testing.assert_allclose(mine[key], tensor, rtol=2e-7 if "q_proj" in key else 0)
    loaded = interop.load_base(tmp_path / "base", nnx.clone(base), names=names)
    for (path, value), (_, want) in zip(
        *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (loaded, base)), strict=True
    ):
        rtol = 2e-7 if "query" in path else 0
        np.testing.assert_allclose(value.get_value(), want.get_value(), rtol=rtol, err_msg=path)
