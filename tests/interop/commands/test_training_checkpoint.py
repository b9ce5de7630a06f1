"""`loha-jax inspect` of folders that Orbax has written."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import run, run_json
from flax import nnx
from random_arrays import normal_array

import loha_jax
from loha_jax import checkpoint

CONFIG = loha_jax.LoHaConfig(r=2, alpha=6, target_modules=["q"], rank_pattern={"layers.1.q": 1})
BASE = {
    "layers": {"q": {"kernel": normal_array(0, (3, 4, 5))}, "norm": {"scale": np.ones((3, 4))}},
    "q": {"kernel": normal_array(1, (5, 7))},
}


def drawn(tree, seed=3):
    """A tree with other values in all of its float leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([normal_array(seed + n, x.shape) for n, x in enumerate(leaves)])


def adapted():
    params = loha_jax.inject(BASE, CONFIG, key=jax.random.key(0), layouts={"layers.q": "sio"})
    trainable, frozen = loha_jax.partition(params)
    return loha_jax.combine(drawn(trainable), frozen)


def norm_of(factors, index=(), scale=1.0):
    a1, b1, a2, b2 = (
        np.asarray(getattr(factors, f"hada_{part}"), np.float64)[index]
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    return scale * np.linalg.norm((a1 @ b1) * (a2 @ b2))


def norms(found):
    return {module["name"]: module["norm"] for module in found["modules"]}


def test_a_run_of_ours_with_its_alphas_and_stacks(tmp_path, monkeypatch):
    """Names, ranks and alphas come from the description, of the last step."""
    params = adapted()
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, loha_jax.scale(params, {"default": 9.0}))
        checkpoints.save(10, params, {"mu": drawn(loha_jax.partition(params)[0])})
    found = run_json("inspect", tmp_path / "run")
    assert (found["kind"], found["step"], found["steps"]) == ("orbax", 10, [3, 10])
    assert (found["items"], found["problems"], found["remarks"]) == (["state"], [], [])
    stack = params["layers"]["q"]["kernel"].adapters["default"]
    wanted = {f"layers.{n}.q": norm_of(stack, n, 6.0 if n == 1 else 3.0) for n in range(3)}
    wanted["q"] = norm_of(params["q"]["kernel"].adapters["default"], scale=3.0)
    assert norms(found) == pytest.approx(wanted, rel=1e-5)
    assert [m["r"] for m in found["modules"]] == [2, 1, 2, 2]
    assert {m["alpha"] for m in found["modules"]} == {6}
    assert run_json("inspect", tmp_path / "run" / "3")["norm"] == pytest.approx(9 * found["norm"])
    monkeypatch.chdir(tmp_path)  # Orbax refuses relative paths
    out, _ = run("inspect", "run")
    assert "checkpoint of a training run (Orbax)" in out
    assert "3, 10" in out
    inner = run_json("inspect", "run/10/state")
    assert any("folder above" in remark for remark in inner["remarks"])


def test_a_tree_that_the_user_saved(tmp_path):
    """Nothing says alpha there; a stack's first axis is found by the shapes."""
    params = adapted()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "7", {"params": params, "opt_state": {"mu": params}})
    found = run_json("inspect", tmp_path)
    assert (found["step"], found["problems"]) == (7, [])
    stack = params["layers"]["q"]["kernel"].adapters["default"]
    wanted = {f"params.layers.q.kernel[{n}]": norm_of(stack, n) for n in range(3)}
    wanted["params.q.kernel"] = norm_of(params["q"]["kernel"].adapters["default"])
    assert norms(found) == pytest.approx(wanted, rel=1e-5)
    assert any("does not say alpha" in remark for remark in found["remarks"])
    assert {"name": "params.q.kernel.kernel", "shape": [5, 7], "dtype": "float32"} in found[
        "others"
    ]


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=1)
        def layer(rngs):
            return nnx.Linear(4, 5, rngs=rngs)

        self.q = layer(rngs)


def test_the_state_of_an_nnx_model_with_two_adapters(tmp_path):
    """The layers are counted by the second axis, as in MaxText; the shapes show it."""
    model = Scanned(nnx.Rngs(0))
    for seed, name in enumerate(("default", "other")):
        loha_jax.nnx.inject(
            model,
            loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False),
            rngs=nnx.Rngs(seed),
            adapter_name=name,
            layouts={"q": "iso"},
        )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
    found = run_json("inspect", tmp_path / "state")
    state = nnx.to_pure_dict(nnx.state(model))["q"]
    for name, beside in (("", ""), (" (other)", "_other")):
        a1, b1, a2, b2 = (
            np.moveaxis(np.float64(state[f"kernel_lora{beside}_hada_{part}"]), 1, 0)
            for part in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        for n in range(3):
            wanted = np.linalg.norm((a1[n] @ b1[n]) * (a2[n] @ b2[n]))
            assert norms(found)[f"q.kernel[{n}]{name}"] == pytest.approx(wanted, rel=1e-5)
    assert len(found["modules"]) == 6
    assert {m["r"] for m in found["modules"]} == {2}


def test_what_cannot_be_told_is_a_remark(tmp_path):
    cube = np.ones((2, 2, 2), np.float32)
    tree = {
        "up": {f"kernel_lora_hada_{part}": cube for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "down": {"kernel_lora_hada_w1_a": cube[0]},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tree)
    found = run_json("inspect", tmp_path / "state")
    assert found["modules"] == []
    text = "\n".join(found["remarks"])
    assert "up.kernel: the shapes [2, 2, 2] and [2, 2, 2] do not show which axis" in text
    assert "down.kernel: hada_w1_b, hada_w2_a, hada_w2_b is missing" in text


def test_a_broken_value_is_a_problem(tmp_path):
    params = adapted()
    bad = jax.tree.map(lambda x: np.where(x > 1, np.nan, x), loha_jax.partition(params)[0])
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, loha_jax.combine(bad, loha_jax.partition(params)[1]))
    found = run_json("inspect", tmp_path, code=1)
    assert any("NaN" in problem for problem in found["problems"])


@pytest.mark.parametrize("broken", ["state/_METADATA", "description"])
def test_a_folder_that_orbax_cannot_read_is_an_error_that_names_it(tmp_path, broken):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, adapted())
    path = tmp_path / "1" / broken
    if path.is_dir():
        (path / "description.json").write_text("{}")
    else:
        path.write_bytes(b"{")
    error = run_json("inspect", tmp_path, code=2)["error"]
    assert str(tmp_path / "1") in error


def test_a_run_with_padded_steps_averages_and_an_optimizer(tmp_path):
    """Only the parameters are adapters; arrays of Adafactor and averages have their names."""
    params = {"v": adapted()["q"]}  # a module that is called as a moment of Adafactor
    items = {"params": params, "ema": params, "opt_state": [{"v": params, "v_row": params}]}
    options = ocp.CheckpointManagerOptions(step_format_fixed_length=8, step_prefix="ckpt")
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in (5, 100):
            saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            manager.save(step, args=ocp.args.Composite(**saved))
    found = run_json("inspect", tmp_path / "run")
    assert (found["step"], found["steps"], found["items"]) == (100, [5, 100], sorted(items))
    wanted = norm_of(params["v"]["kernel"].adapters["default"])
    assert norms(found) == pytest.approx({"v.kernel": wanted}, rel=1e-5)


def test_a_renamed_checkpoint_of_ours_is_an_error_that_says_why(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, adapted())
    (tmp_path / "1").rename(tmp_path / "best")
    error = run_json("inspect", tmp_path / "best", code=2)["error"]
    assert "called as its step" in error
