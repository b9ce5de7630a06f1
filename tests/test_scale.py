"""`python -m benchmarks.scale`.

What it predicts beside what XLA compiles, and beside numbers from elsewhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PUBLISHED = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}
LENGTH = 8192

pytestmark = pytest.mark.slow  # one run of the command for all of them


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("scale") / "scale.json"
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "--json", str(file)]
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compiled FLOPs" in done.stdout
    return json.loads(file.read_text())["records"]


def test_models_have_the_published_numbers_of_parameters(records):
    assert {r["model"]: r["parameters"] for r in records if r["kind"] == "parameters"} == PUBLISHED


def test_the_compiled_layer_is_within_ten_percent_of_the_prediction(records):
    (check,) = (r for r in records if r["kind"] == "check")
    assert (check["model"], check["fsdp"], check["tensor"]) == ("8B", 4, 2)
    assert check["arguments"]["compiled"] == check["arguments"]["predicted"]
    for figure in ("results", "kept", "flops"):
        assert check[figure]["ratio"] == pytest.approx(1, abs=0.1), figure
    assert not check["off"]


# In and out features of the seven linear modules, by whether the out or the in axis is split over
# the tensor axis.
SPLIT_OUT = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 14336), (4096, 14336)]
SPLIT_IN = [(4096, 4096), (14336, 4096)]


@pytest.mark.parametrize("devices", [8, 32, 128, 512, 2048])
def test_bytes_per_device_of_8b(records, devices):
    (r,) = (r for r in records if r["kind"] == "prediction" and r["devices"] == devices)
    fsdp, tensor, rank = devices // 2, 2, 8
    norms = (2 * 32 + 1) * 4096
    assert r["bytes"]["base"] == 2 * ((PUBLISHED["8B"] - norms) / devices + norms)
    factors = 0.0
    for (into, out), (in_parts, out_parts) in [
        *((shape, (fsdp, tensor)) for shape in SPLIT_OUT),
        *((shape, (tensor, fsdp)) for shape in SPLIT_IN),
    ]:
        factors += 2 * rank * (into / in_parts + out / out_parts)
    assert r["bytes"]["factors"] == r["bytes"]["gradients"] == 4 * 32 * factors
    assert r["bytes"]["optimizer"] == 2 * r["bytes"]["factors"] + 4 * 32  # and AdamW's count
    assert r["bytes"]["layer_inputs"] == 32 * 2 * LENGTH * 4096 // tensor
    assert r["total_bytes"] == sum(r["bytes"].values())


def test_flops_of_8b_are_those_of_the_products_counted_by_hand(records):
    r = next(r for r in records if r["kind"] == "prediction")
    kernels = sum(into * out for into, out in (*SPLIT_OUT, *SPLIT_IN))
    # Forward, once more but for down's result, and the gradient of the input.
    products = 2 * LENGTH * (3 * kernels - 14336 * 4096)
    # Scores and mix in the forward pass and once more, scores again, four products in the backward
    # pass.
    attention = (2 + 2 + 1 + 4) * 2 * LENGTH**2 * 4096
    head = 2 * 2 * LENGTH * 4096 * 128256
    assert r["frozen_flops"] * 2 == pytest.approx(32 * (products + attention) + head, rel=0.05)
    # x·KB and its product with KA, r² columns, likewise; and two more for the gradients of KA and
    # KB.
    adapters = sum(2 * LENGTH * 64 * (into + out) for into, out in (*SPLIT_OUT, *SPLIT_IN))
    assert (r["flops"] - r["frozen_flops"]) * 2 == pytest.approx(32 * 4 * adapters, rel=0.1)
    assert r["peft_layer_bytes"] == 4 * kernels // 2
    assert r["peft_flops"] / r["frozen_flops"] > 1.9  # x·ΔW beside x·W, in both passes
