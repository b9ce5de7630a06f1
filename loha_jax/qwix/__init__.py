"""LoHa for models that qwix runs: NNX and Linen, on float and on quantised bases.

    provider = loha_jax.qwix.LoHaProvider(module_path=".*(q_proj|v_proj)", rank=4, alpha=8.0)
    model = qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(0))

It needs the extra `qwix`: `pip install 'loha-jax[qwix]'`.
"""

from loha_jax.qwix.linen_tree import linen_params, linen_tree
from loha_jax.qwix.provider import LoHaProvider
from loha_jax.qwix.rules import LoHaRule

__all__ = ["LoHaProvider", "LoHaRule", "linen_params", "linen_tree"]
