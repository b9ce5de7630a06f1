"""What XLA's compiler for NVIDIA's GPUs, and NVIDIA's own assembler, say of an adapted layer."""

import re

import pytest

from benchmarks import accelerator_cases, accelerators
from benchmarks.accelerator_compilers import compile_for, entry, figures, gpu
from benchmarks.case import NotInstalled

MIB = 2**20


@pytest.fixture(scope="module")
def device():
    try:
        return gpu()
    except NotInstalled as missing:
        pytest.skip(str(missing))


def compiled(device, method, into, out):
    case = accelerator_cases.linear(into, out, 4096, training=True)
    function, arguments = accelerators.program(case, method)
    return compile_for(device, function, *arguments)


@pytest.mark.parametrize("out", [4096, 14336])
def test_the_update_is_added_in_the_kernel_of_a_product(device, out):
    """The project's bar: 4 MiB more than the frozen layer's; for y and dx alike."""
    frozen, loha = (compiled(device, method, 4096, out) for method in (accelerators.FROZEN, "auto"))
    more = figures(loha)["temporary_bytes"] - figures(frozen)["temporary_bytes"]
    assert more <= 4 * MIB
    kinds = re.findall(r"\[4096,\d{4,}\]\S* fusion\(.*kind=(\w+)", entry(loha.as_text()))
    assert len(kinds) == 4  # x·W + h·KA, g·Wᵀ + dh·KBᵀ and their updates
    assert {*kinds} == {"kCustom"}  # products


@pytest.mark.parametrize("out", [4096, 14336])
def test_kernels_compile_without_spilling(device, out, monkeypatch, capfd):
    """A step has two: of x and of g. The assembler reports what registers do not hold."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    text = entry(compiled(device, "pallas", 4096, out).as_text())
    kernels = re.findall(r"\S+ = (\w+)\[[^\]]*\]\S* custom-call\(.*mosaic_gpu", text)
    assert kernels == ["bf16", "bf16"]
    said = capfd.readouterr()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said.out + said.err)
    assert spills
    assert {*spills} == {("0", "0")}
    assert not re.findall(r"f32\[(?:1,)?4096,\d{4,}\]", text)
