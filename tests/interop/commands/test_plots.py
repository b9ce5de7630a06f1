"""`loha-jax inspect --plot`: effective ranks and the picture."""

import sys

import numpy as np
import pytest
from command_line import factors, peft_folder, run, run_json
from matplotlib.axes import Axes
from matplotlib.image import imread
from random_arrays import normal_array

from loha_jax.interop.commands.inspection import inspect_path
from loha_jax.interop.commands.plots import lines, plot_modules

NAMES = [f"layers.{n}.{kind}" for n in range(3) for kind in ("q", "v")]


@pytest.fixture
def adapter(tmp_path):
    tensors = {}
    for n, name in enumerate(NAMES):
        tensors |= {
            f"{name}.hada_w{pair}_{side}": np.asarray(normal_array(10 * n + seed, shape))
            for seed, (pair, side, shape) in enumerate(
                [(1, "a", (6, 3)), (1, "b", (3, 7)), (2, "a", (6, 3)), (2, "b", (3, 7))]
            )
        }
    return peft_folder(tmp_path / "adapter", tensors, alpha=6)


def test_the_effective_rank_is_that_of_the_paper(adapter):
    """exp of the entropy of the singular values over their sum, from ΔW itself."""
    found = inspect_path(adapter, effective_ranks=True)
    for n, name in enumerate(NAMES):
        a1, b1, a2, b2 = (
            np.float64(normal_array(10 * n + seed, shape))
            for seed, shape in enumerate([(6, 3), (3, 7), (6, 3), (3, 7)])
        )
        values = np.linalg.svd(2 * (a1 @ b1) * (a2 @ b2), compute_uv=False)
        p = values / values.sum()
        (module,) = [m for m in found["modules"] if m["name"] == name]
        np.testing.assert_allclose(module["effective_rank"], np.exp(-(p * np.log(p)).sum()))
        np.testing.assert_allclose(module["norm"], np.sqrt((values**2).sum()))
    assert "effective_rank" not in inspect_path(adapter)["modules"][0]


def test_a_line_for_each_kind_of_module(adapter):
    modules = inspect_path(adapter, effective_ranks=True)["modules"]
    found = lines(modules, "effective_rank")
    assert list(found) == ["layers.*.q", "layers.*.v"]
    assert [layer for layer, _ in found["layers.*.v"]] == [0, 1, 2]
    by_name = {m["name"]: m["effective_rank"] for m in modules}
    assert found["layers.*.v"][2][1] == by_name["layers.2.v"]


def test_a_module_of_no_layer_is_a_line_across_the_picture(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot

    def recorded(axes, x, y, *args, **kwargs):
        drawn.append((kwargs["label"], tuple(x), tuple(y)))
        return plot(axes, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", recorded)
    names = ("layers.0.q", "layers.1.q", "head")
    modules = [{"name": name, "norm": n, "effective_rank": n} for n, name in enumerate(names)]
    plot_modules(modules, tmp_path / "a.png")
    assert lines(modules, "norm")["head"] == [(None, 2)]
    assert drawn == 2 * [("layers.*.q", (0, 1), (0, 1)), ("head", (0, 1), (2, 2))]
    modules = [module for module in modules if module["name"] == "head"]
    plot_modules(modules, tmp_path / "b.png")  # there is no layer at all


def test_the_picture_is_written_beside_the_table(adapter, tmp_path):
    out, _ = run("inspect", adapter, "--plot", tmp_path / "updates.png")
    assert "layers.2.v" in out
    pixels = imread(tmp_path / "updates.png")
    assert pixels.shape[0] > 300
    assert pixels.std() > 0.01


def test_an_update_of_zero_has_no_effective_rank(tmp_path):
    zero = np.zeros((3, 3), np.float32)
    folder = peft_folder(tmp_path / "a", factors("q", hada_w2_b=zero))
    out, _ = run("inspect", folder, "--plot", tmp_path / "zero.svg")
    assert "the update of q is zero" in out
    assert (tmp_path / "zero.svg").stat().st_size > 1000
    (module,) = inspect_path(folder, effective_ranks=True)["modules"]
    assert module["effective_rank"] is None


@pytest.mark.parametrize(("name", "error"), [("a.doc", "not supported"), ("no/a.png", "No such")])
def test_a_picture_that_cannot_be_written_is_an_error(adapter, tmp_path, name, error):
    assert error in run_json("inspect", adapter, "--plot", tmp_path / name, code=2)["error"]


def test_without_matplotlib_the_error_says_what_to_install(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = run_json("inspect", adapter, "--plot", tmp_path / "a.png", code=2)
    assert "pip install matplotlib" in found["error"]
