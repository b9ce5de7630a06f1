"""`loha-jax diff`: adapters and checkpoints compared."""

import lycoris_samples
import numpy as np
from command_line import BASE, LINEAR, NATIVE, ONE, factors, peft_folder, run, run_json
from safetensors.numpy import load_file, save_file


def test_diff_of_adapters(tmp_path):
    found = run_json("diff", NATIVE, lycoris_samples.DATA / "peft_plain", code=1)
    assert found["only_first"] == ["c3d"]
    assert found["only_second"] == []
    assert all(m["bit_equal"] and not m["different"] for m in found["modules"])
    out, _ = run("diff", NATIVE, lycoris_samples.DATA / "peft_plain", code=1)
    assert "7 of 7 common modules are equal, 7 of them bit for bit" in out
    assert run_json("diff", NATIVE, NATIVE)["different"] is False
    tucker = run_json("diff", NATIVE, lycoris_samples.DATA / "native_tucker.safetensors", code=1)
    deltas = [
        load_file(lycoris_samples.DATA / f"native_{form}_delta.safetensors")
        for form in ("plain", "tucker")
    ]
    assert len(tucker["modules"]) == 8
    for module in tucker["modules"]:
        a, b = (d[f"lycoris_{module['name']}.delta"].astype(np.float64) for d in deltas)
        np.testing.assert_allclose(
            module["difference"], np.linalg.norm(a - b), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(module["norm"], np.linalg.norm(a), rtol=1e-5)


def test_the_tolerance_of_diff(tmp_path):
    near = dict(factors())
    near["q.hada_w1_a"] = ONE * np.float32(1 + 2**-10)
    first, second = peft_folder(tmp_path / "a", factors()), peft_folder(tmp_path / "b", near)
    row = run_json("diff", first, second, code=1)["modules"][0]
    np.testing.assert_allclose(row["relative"], 2**-10, rtol=1e-9)
    out, _ = run("diff", first, second, "--tolerance", 0.001, code=0)
    assert "1 of 1 common modules are within 0.001 (relative)" in out
    run("diff", first, second, "--tolerance", 0.0009, code=1)
    half = peft_folder(tmp_path / "c", factors(), alpha=4)
    row = run_json("diff", first, half, code=1)["modules"][0]
    assert (row["bit_equal"], row["alpha"], row["relative"]) == (True, [8.0, 4.0], 0.5)


def test_no_common_modules(tmp_path):
    out, _ = run("diff", NATIVE, peft_folder(tmp_path / "a", factors()), code=1)
    assert "There are no common modules: no name of one is in the other." in out


def test_diff_of_checkpoints(tmp_path):
    run("merge", BASE, LINEAR.adapter, tmp_path / "out")
    found = run_json("diff", BASE, tmp_path / "out", code=1)
    for row in found["tensors"]:
        change = (
            LINEAR.io.get(f"delta::{row['name'].removesuffix('.weight')}")
            if "weight" in row["name"]
            else None
        )
        wanted = 0 if change is None else np.abs(change).max()
        np.testing.assert_allclose(row["max_difference"], wanted, rtol=1e-5)
    run("diff", BASE, tmp_path / "out", "--tolerance", 1e4)
    assert "3 of 3 common tensors are equal" in run("diff", BASE, BASE)[0]
    save_file({"a": np.array([np.nan, 1], np.float32)}, tmp_path / "nan.safetensors")
    save_file({"a": np.array([0, 1], np.float32)}, tmp_path / "zero.safetensors")
    assert (
        run_json("diff", tmp_path / "nan.safetensors", tmp_path / "nan.safetensors")["different"]
        is False
    )
    row = run_json("diff", tmp_path / "nan.safetensors", tmp_path / "zero.safetensors", code=1)[
        "tensors"
    ][0]
    assert (row["max_difference"], row["different"]) == (None, True)
