"""The benchmark of learning: its methods, the order of its runs and the file of its records."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from benchmarks.learning import plan, records
from benchmarks.learning.__main__ import main
from benchmarks.learning.methods import METHODS
from benchmarks.learning.report import Estimate, task_report
from benchmarks.learning.task import Facts, Run
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.training import ADAM, decayed, make_step, scaled

CONFIG = loha_jax.LoHaConfig(r=2, alpha=4, target_modules=["query", "Conv_0"])
KEY = jax.random.key(0)
BASE = {
    "query": {"kernel": normal_array(0, (6, 5)), "bias": jnp.zeros(5)},
    "Conv_0": {"kernel": normal_array(0, (3, 3, 4, 7)), "bias": jnp.zeros(7)},
    "other": {"kernel": jnp.ones((5, 5))},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_as_the_base(name):
    trained, frozen = METHODS[name].start(BASE, CONFIG, KEY)
    tree = loha_jax.merge(METHODS[name].tree(trained, frozen))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (BASE, tree))))


def test_methods_train_equally_many_numbers():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(METHODS[name].start(BASE, CONFIG, KEY)[0]))
        for name in METHODS
    }
    assert counts.pop("full") == 6 * 5 + 36 * 7
    assert set(counts.values()) == {2 * 2 * (6 + 5) + 2 * 2 * (36 + 7)}


@pytest.mark.parametrize("name", ["lora", "hira"])
def test_a_low_rank_update_is_that_of_the_paper(name):
    trained, frozen = METHODS[name].start(BASE, CONFIG, KEY)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    found = METHODS[name].tree(trained, frozen)["Conv_0"]["kernel"]
    w, pair = np.asarray(BASE["Conv_0"]["kernel"]), trained["Conv_0/kernel"]
    product = 2 * np.asarray(pair["a"]) @ np.asarray(pair["b"])
    product = product.reshape(3, 3, 4, 7) * (w if name == "hira" else 1)
    np.testing.assert_allclose(found, w + product, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora-plus", "loha-calibrated-plus"])
def test_with_plus_the_factors_that_start_at_zero_learn_four_times_as_fast(name):
    trained, _ = METHODS[name].start(BASE, CONFIG, KEY)
    moved = scaled(jax.tree.map(jnp.ones_like, trained), 0.5, METHODS[name].faster)
    for factor, move in zip(*map(jax.tree.leaves, (trained, moved)), strict=True):
        assert (move == (0.5 if factor.any() else 2.0)).all()


def test_what_decays_is_pulled_to_its_start_and_nothing_else():
    method = METHODS["loha-calibrated-decay"]
    start, _ = method.start(BASE, CONFIG, KEY)
    moved = jax.tree.map(lambda x: x + 0.5, start)
    pull = decayed(jax.tree.map(jnp.zeros_like, start), moved, start, method)
    found = {
        jax.tree_util.keystr(path[-1:], simple=True): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(pull)
    }
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, 0.5 if "_w1_" in name else 0, rtol=1e-5)
    assert set(found) == {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}


@pytest.mark.parametrize("name", ["loha-calibrated-clip", "lora-clip", "lora"])
def test_only_what_clips_is_deaf_to_the_size_of_a_later_gradient(name):
    """Adam's first step is deaf to the size; a second gradient shows it unless it is clipped."""

    def loss(base, head, batch):
        return batch["size"] * jnp.sum(jnp.sin(base["query"]["kernel"]))

    def second_step(size):
        factors, frozen = METHODS[name].start(BASE, CONFIG, KEY)
        trained = {"factors": factors, "head": {}}
        state = (trained, ADAM.init(trained))
        for scale in (100.0, size):
            step = make_step(loss, METHODS[name])
            state, _ = step(state, factors, frozen, {"size": jnp.float32(scale)}, 0.1, 0.0)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state[0]["factors"])])

    assert np.allclose(second_step(100.0), second_step(300.0), atol=1e-5) == ("clip" in name)


FACTS = Facts(lambda quick: NotImplemented, "accuracy", True, 8, 2, 5, 0.5, 4e-3, (2, 8))
PEAKS = {"loha-calibrated": 4e-3, "lora": 2.5e-4, "loha-peft": 6.4e-2, "full": 1e-4}


def simulated():
    """Records of a task in which each method has one best rate, in the order of the plan."""
    done = {}
    while run := next(plan.comparison(FACTS, "task", PEAKS, 5, done), None):
        distance = abs(math.log2(run.rate / PEAKS[run.method]))
        where = {"machine": "one", "versions": {"jax": "0"}}
        done[run] = {
            "score": 0.9 - 0.01 * distance + 0.001 * run.seed,
            "losses": [1.0, 0.4],
            "parameters": 7,
            "seconds": 1.0,
            "cpu_seconds": 1.0,
            **where,
        }
    return done


def test_the_plan_finds_the_best_rates_and_reads_the_test_there():
    done = simulated()
    for method, peak in PEAKS.items():
        scores = plan.validation(FACTS, "task", method, done)
        best = plan.best_rate(FACTS, scores)
        assert abs(math.log2(best / peak)) <= 0.5
        assert plan.is_settled(FACTS, "task", method, done)
        assert set(plan.grid(method)) <= set(scores)
        tested = {run.seed for run in done if run[1:3] == ("test", method) and run.rate == best}
        assert tested == set(range(5))


def test_the_first_group_comes_first():
    methods = [run.method for run in simulated()]
    assert set(methods[: methods.index("full")]) == set(PEAKS) - {"full"}
    assert set(PEAKS) - {"full"} < set(plan.GROUPS[0])


def test_the_table_has_paired_differences():
    text = "\n".join(task_report("task", FACTS, simulated()))
    # Calibrated finds its peak; LoRA does too, one step below the grid: no difference, no error.
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    (row,) = [row for row in rows if row[1:2] == ["loha-calibrated"] and "±" in row[4]]
    assert row[2:4] == ["7", "0.004"]
    assert row[5].lstrip("+-") == "0.0000 ± 0.0000"
    assert row[6:8] == ["5", "20"]


def test_an_estimate_is_mean_and_standard_error():
    found = Estimate.of([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "of" / "text.jsonl"
    assert records.read(path) == {}
    run = Run("text", "test", "lora", 8, 4e-3, 1)
    records.append(path, run, {"score": None, "losses": [0.5]})
    records.append(path, run._replace(seed=2), {"score": 0.5, "losses": []})
    found = records.read(path)
    assert list(found) == [run, run._replace(seed=2)]
    assert found[run]["score"] is None
    assert found[run]["versions"]["jax"] == jax.__version__
    path.write_text(path.read_text() + '{"task": "text"')
    with pytest.raises(ValueError, match="line 3"):
        records.read(path)


def test_ranks_are_planned_for_each_method_once():
    runs = list(plan.ranks(FACTS, "task", ["lora", "loha-peft", "full"], {}))
    assert len(runs) == len(set(runs)) == 2 * 2 * 2
    assert {run.method for run in runs} == {"lora", "loha-peft"}
    assert {run.rate for run in runs} == {4e-3}


def test_every_task_is_of_known_methods():
    assert {method for group in plan.GROUPS for method in group} == set(METHODS)
    assert all(facts.r in facts.ranks for facts in TASKS.values())


@pytest.mark.parametrize("option", ["--r", "--seeds"])
@pytest.mark.parametrize("given", ["0", "-1", "two"])
def test_no_number_of_options_counts_as_none_given(option, given, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["learning", "text", option, given])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"argument {option}: should be a positive integer" in capsys.readouterr().err
