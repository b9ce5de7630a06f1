"""What the compilers of TPUs say of one adapted Linear layer, beside LoRA of equal parameters."""

import re

import pytest

from benchmarks import accelerator_cases, accelerators
from benchmarks.accelerator_compilers import compile_for, entry, figures, tpu

MIB = 2**20
BARS = {"v5e": 1.20, "v6e": 1.50}
"""The project's, in cycles over those of the frozen layer."""


@pytest.fixture(scope="module", params=BARS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(kind):
    """The layer of 4,096 features for 4,096 tokens: forward and backward, in bfloat16."""
    device = tpu(kind)
    case = accelerator_cases.linear(4096, 4096, 4096, training=True)

    def program(method):
        function, arguments = accelerators.program(case, method)
        return compile_for(device, function, *arguments)

    return {m: program(m) for m in (accelerators.FROZEN, accelerators.LORA, "auto")}


def test_it_costs_less_than_lora(kind, compiled):
    found = {method: figures(program) for method, program in compiled.items()}
    frozen, lora, loha = (found[m] for m in (accelerators.FROZEN, accelerators.LORA, "auto"))
    assert frozen["cycles"] < loha["cycles"] < lora["cycles"]
    assert loha["cycles"] <= BARS[kind] * frozen["cycles"]
    assert loha["temporary_bytes"] <= frozen["temporary_bytes"] + 4 * MIB


def test_no_array_of_the_activations_shape_is_float32(compiled):
    """Nor one of the kernel's shape, which is the same here."""
    arrays = re.findall(r" = \(?(\w+\[[\d,]+\])", entry(compiled["auto"].as_text()))
    assert "bf16[4096,4096]" in arrays
    assert "f32[4096,4096]" not in arrays
