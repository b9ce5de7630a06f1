"""google-tunix' NNX language models, unmodified, beside their PyTorch twins.

Weights, adapters both ways, training.
"""

import dataclasses
import importlib
import importlib.util
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.nnx import LoHaParam, inject

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# tunix 0.1.7 was written for an earlier Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources:DeprecationWarning"),
]

VOCABULARY, LENGTH = 96, 7
TORCH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TUNIX = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 64,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
LLAMA = {**TUNIX, "vocab_size": VOCABULARY, "norm_eps": 1e-6}
GEMMA = {**TUNIX, "num_embed": VOCABULARY}
# tunix 0.1.7's llama3 and qwen3 compute with a rope base of 1e6 whatever their config says.


def tunix(name):
    """A module of tunix' models.

    tunix itself imports its trainers, and so all that they depend on.
    """
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        if spec is None:
            pytest.skip("google-tunix is not installed")
        package = types.ModuleType("tunix")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["tunix"] = package
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jax.experimental.shard_map", DeprecationWarning)
        return importlib.import_module(f"tunix.models.{name}")


def llama3(remat):
    config = transformers.LlamaConfig(**TORCH, rope_theta=1e6, tie_word_embeddings=False)
    model = tunix("llama3.model")
    made = model.ModelConfig(**LLAMA, rope_theta=1_000_000, remat_config=model.RematConfig[remat])
    return transformers.LlamaForCausalLM(config), model.Llama3, made, tunix("llama3.params"), None


def qwen2(remat):
    config = transformers.Qwen2Config(**TORCH, rope_theta=1e4, tie_word_embeddings=True)
    model = tunix("qwen2.model")
    made = model.ModelConfig(
        **LLAMA, rope_theta=10_000, use_tied_embedding=True, remat_config=model.RematConfig[remat]
    )
    return transformers.Qwen2ForCausalLM(config), model.Qwen2, made, tunix("qwen2.params"), None


def qwen3(remat):
    config = transformers.Qwen3Config(**TORCH, rope_theta=1e6, tie_word_embeddings=True)
    model = tunix("qwen3.model")
    made = model.ModelConfig(
        **LLAMA,
        rope_theta=1_000_000,
        use_tied_embedding=True,
        remat_config=model.RematConfig[remat],
    )
    return transformers.Qwen3ForCausalLM(config), model.Qwen3, made, tunix("qwen3.params"), None


def gemma2(remat):
    config = transformers.Gemma2Config(**TORCH, query_pre_attn_scalar=8)
    model, params = tunix("gemma.model"), tunix("gemma.params_safetensors")
    made = model.ModelConfig(
        **GEMMA,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        sliding_window_size=4096,
        attention_types=(model.AttentionType.LOCAL_SLIDING, model.AttentionType.GLOBAL),
        remat_config=model.RematConfig[remat],
    )
    return (
        transformers.Gemma2ForCausalLM(config),
        model.Gemma,
        made,
        params,
        params._make_preprocess_fn(made),
    )


def gemma3(remat):
    config = transformers.Gemma3TextConfig(
        **TORCH,
        query_pre_attn_scalar=8,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        sliding_window=512,
    )
    model, params = tunix("gemma3.model"), tunix("gemma3.params_safetensors")
    made = model.ModelConfig(
        **GEMMA,
        sliding_window_size=512,
        global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
        remat_config=model.RematConfig[remat],
    )
    return (
        transformers.Gemma3ForCausalLM(config),
        model.Gemma3,
        made,
        params,
        params._make_preprocess_fn(made),
    )


@dataclasses.dataclass
class Pair:
    """A PyTorch model, the same in tunix with its weights, and the names between them."""

    torch: torch.nn.Module
    jax: nnx.Module
    names: interop.NameMap


IDS = np.random.default_rng(0).integers(3, VOCABULARY, (2, LENGTH))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    (llama3, "NONE"),
    (qwen2, "BLOCK"),
    (qwen3, "DECODER"),
    (gemma2, "DECODER"),
    (gemma3, "BLOCK"),
]


def pair(make, remat, folder):
    torch.manual_seed(0)
    twin, cls, config, params, preprocess = make(remat)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # norms and biases too
    twin.eval().save_pretrained(folder)
    names = interop.NameMap(
        params._get_key_and_transform_mapping(config), base=folder, preprocess=preprocess
    )
    model = cls(config, rngs=nnx.Rngs(0))
    return Pair(twin, interop.load_base(folder, model, names=names), names)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def logits(model):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), IDS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (len(IDS), LENGTH, LENGTH))
    return model(jnp.asarray(IDS), positions, None, mask)[0]


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "remat"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_adapters_go_both_ways_and_train(make, remat, tmp_path):
    both = pair(make, remat, tmp_path / "base")
    base = torch_logits(both.torch)
    assert_close(logits(both.jax), base)

    graphdef = nnx.graphdef(both.jax)
    settings = {"r": 3, "alpha": 5, "target_modules": TARGETS}
    model = inject(
        both.jax, LoHaConfig(**settings, init_weights=False), rngs=nnx.Rngs(1), names=both.names
    )
    out = logits(model)
    assert np.abs(out - base).max() > 0.01 * np.abs(base).max()
    explained = loha_jax.explain(logits, model)
    assert (explained.dense, explained.unused) == ((), ())
    interop.save_peft(tmp_path / "ours", model)
    opened = peft.PeftModel.from_pretrained(
        pair(make, remat, tmp_path / "again").torch, tmp_path / "ours"
    ).eval()
    assert_close(out, torch_logits(opened))
    assert nnx.graphdef(loha_jax.unload(model)) == graphdef

    theirs = peft.get_peft_model(
        both.torch, peft.LoHaConfig(**settings, init_weights=False, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    interop.load_peft(tmp_path / "theirs", model, names=both.names)
    assert_close(logits(model), torch_logits(theirs.eval()))
    assert np.abs(logits(model) - base).max() > 0.01 * np.abs(base).max()

    frozen = jax.tree.map(np.asarray, nnx.state(loha_jax.unload(nnx.clone(model))))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=LoHaParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            scores = jax.nn.log_softmax(logits(model)[:, :-1].astype(jnp.float32))
            return -jnp.take_along_axis(scores, jnp.asarray(IDS)[:, 1:, None], -1).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoHaParam))(model)
        optimizer.update(model, gradients)
        return value

    # PyTorch's next step, from the same factors.
    torch_loss = theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    np.testing.assert_allclose(step(model, optimizer), torch_loss.item(), rtol=1e-5)
    torch_optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.5)
    torch_optimizer.zero_grad()
    torch_loss.backward()
    torch_optimizer.step()
    assert_close(logits(model), torch_logits(theirs))
    after = nnx.state(loha_jax.unload(model))
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.tree.map(np.asarray, after))
