"""What the compiler of TPUs lets the devices of a mesh exchange for an adapter: no kernel."""

import re
from collections import Counter

import jax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import accelerators, llama3
from benchmarks.accelerator_cases import Case
from benchmarks.accelerator_compilers import bytes_of, collectives, compile_for, tpus

HIDDEN, WIDE, TOKENS = 256, 1024, 192
METHODS = (accelerators.FROZEN, accelerators.LORA, "auto", "dense")


@pytest.fixture(scope="module")
def exchanged():
    """The types of the collectives' results: two Linear layers on 2x2 devices, recomputed."""
    mesh = llama3.make_mesh(2, 2, tpus("v5e:2x2"))
    splits = {"up": (HIDDEN, WIDE, llama3.IN_OUT), "down": (WIDE, HIDDEN, llama3.OUT_IN)}
    params = {
        name: {"kernel": llama3.array(mesh, (into, out), llama3.BASE_DTYPE, *split)}
        for name, (into, out, split) in splits.items()
    }
    x = llama3.array(mesh, (2, TOKENS, HIDDEN), llama3.BASE_DTYPE, *llama3.RESIDUAL)

    wide, narrow = (NamedSharding(mesh, PartitionSpec(*s)) for s in (llama3.WIDE, llama3.RESIDUAL))

    @jax.checkpoint
    def layer(params, x):
        h = lax.with_sharding_constraint(jax.nn.silu(x @ params["up"]["kernel"]), wide)
        return lax.with_sharding_constraint(x + h @ params["down"]["kernel"], narrow)

    case = Case("MLP", layer, params, x, x, mesh=mesh)

    def compiled(method):
        function, arguments = accelerators.program(case, method)
        return collectives(compile_for(mesh, function, *arguments).as_text() or "")

    return {method: compiled(method) for method in METHODS}


def arrays(types):
    return Counter(array for type_ in types for array in re.findall(r"\w+\[[\d,]+\]", type_))


def is_low_rank(array):
    """Whether it has the factored form's r² columns."""
    return str(accelerators.RANK**2) in re.findall(r"\d+", array.split("[")[1]) or (
        f"[{accelerators.RANK},{accelerators.RANK}," in array
    )


def test_of_kernels_and_activations_the_frozen_layers_alone_are_exchanged(exchanged):
    """So neither W nor ΔW is gathered for the adapter, and no gradient of its shape is added up."""
    loha = Counter({a: n for a, n in arrays(exchanged["auto"]).items() if not is_low_rank(a)})
    assert loha == arrays(exchanged[accelerators.FROZEN])
    assert arrays(exchanged["dense"]) != loha


def test_collectives_are_no_more_than_loras(exchanged):
    assert len(exchanged["auto"]) <= len(exchanged[accelerators.LORA])


def test_types_and_bytes_of_collectives():
    """Each step of one that runs beside other work has its text, and its channel."""
    text = """
  %all-gather.4 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=12, x={}
  %all-gather.5 = bf16[64,512]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=12, x={}
  %all-reduce.1 = (f32[8,8,2]{2,1,0}, /*index=1*/pred[]) all-reduce(%a, %b), channel_id=1, to=%add
  %permute.s = (s8[4]{0}, s8[4]{0}, u32[], u32[]) collective-permute-start(%c), channel_id=3
  %permute.d = s8[4]{0} collective-permute-done(%permute.s)
"""
    assert [bytes_of(type_) for type_ in collectives(text)] == [64 * 512 * 2, 128 * 4 + 1, 4]
