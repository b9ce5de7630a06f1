import functools
import json
import math
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loha_jax.interop import FileError

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, checkpoint
from loha_jax.checkpoint import Checkpoints

KEY = jax.random.key(0)


@functools.cache
def base():
    k = jax.random.split(KEY, 5)
    return {
        "layers": {"q": {"kernel": jax.random.normal(k[0], (3, 8, 6))}},
        "linear/~/sub": {"w": jax.random.normal(k[1], (6, 5)), "b": jnp.zeros(5)},
        "conv": {"kernel": jax.random.normal(k[2], (3, 3, 4, 6))},
        "head": {"kernel": jax.random.normal(k[3], (5, 2), jnp.bfloat16), "bias": jnp.ones(2, jnp.bfloat16)},
    }


def inject(tree, **options):
    options = {"r": 2, "target_modules": ["sub"], "init_weights": False, **options}
    return loha_jax.inject(tree, LoHaConfig(**options), key=KEY)


@functools.cache
def dense():
    return inject(base())


@functools.cache
def everything():
    """Stacks of unequal rank, cores, a weight decomposition, a scalar, copies, two adapters of which one is scaled."""
    config = LycorisConfig(
        r=2,
        alpha=3,
        target_modules=["q", "conv"],
        use_effective_conv2d=True,
        weight_decompose=True,
        use_scalar=True,
        rank_pattern={"layers.1.q": 3},
        modules_to_save=["head"],
    )
    layouts = {"layers.q": "sio"}
    params = loha_jax.inject(base(), config, key=KEY, layouts=layouts, adapter_name="first")
    second = LoHaConfig(r=1, target_modules=["q", "sub"], init_weights=False)
    params = loha_jax.inject(params, second, key=jax.random.key(1), layouts=layouts, adapter_name="second")
    return loha_jax.scale(loha_jax.set_adapter(params, ("first", "second")), {"second": 0.25})


TREES = {"dense": dense, "everything": everything}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),  # its numbers are weakly typed
    "noise and masks": optax.chain(
        optax.add_noise(0.1, 0.5, KEY),
        optax.masked(optax.sgd(0.1, momentum=0.9), lambda t: jax.tree.map(lambda x: x.ndim > 1, t)),
    ),
    "steps": optax.MultiSteps(optax.adafactor(1e-2, min_dim_size_to_factor=2), every_k_schedule=3),
    "nothing": optax.set_to_zero(),
}
KEYS = {
    "typed": jax.random.key(7),
    "raw": jax.random.PRNGKey(7),
    "several": jax.random.split(jax.random.key(7, impl="rbg"), 3),
    "none": None,
}


def trained(params, optimizer, steps=2):
    """Both after some updates with other values in every array."""
    trainable, frozen = loha_jax.partition(params)
    state = optimizer.init(trainable)
    update = jax.jit(optimizer.update)
    for n in range(steps):
        gradients = jax.tree.map(lambda x, n=n: np.cos(np.asarray(x) + n, dtype=np.float32).astype(x.dtype), trainable)
        updates, state = update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return loha_jax.combine(trainable, frozen), state


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    weak = getattr(leaf, "weak_type", None)
    return type(leaf), str(np.asarray(leaf).dtype), np.shape(leaf), weak, np.asarray(leaf).tobytes()


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree.leaves(expected), strict=True):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def saved(folder, *steps, params=None, **options):
    """A folder with a checkpoint per step, whose arrays tell the steps apart; and the trees by step."""
    params = dense() if params is None else params
    states = {}
    with Checkpoints(folder, keep=None) as checkpoints:
        for step in steps:
            states[step] = trained(params, OPTIMIZERS["adamw"], step)
            checkpoints.save(step, *states[step], key=jax.random.key(step), data={"batch": step}, **options)
    return states


def start():
    params = dense()
    return params, OPTIMIZERS["adamw"].init(loha_jax.partition(params)[0])


# ---- what is saved comes back


@pytest.mark.parametrize(("kind", "optimizer"), [*(("dense", name) for name in OPTIMIZERS), ("everything", "adamw")])
def test_everything_comes_back_bit_for_bit(tmp_path, kind, optimizer):
    fresh = TREES[kind]()
    tx = OPTIMIZERS[optimizer]
    params, opt_state = trained(fresh, tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            5, params, opt_state, data={"file": "a", "at": [1, 2.5, None]}, metrics={"loss": jnp.float32(0.5)}
        )
        restored = checkpoints.restore(fresh, tx.init(loha_jax.partition(fresh)[0]))
    assert (restored.step, restored.data, restored.metrics) == (5, {"file": "a", "at": [1, 2.5, None]}, {"loss": 0.5})
    assert_same_bits(restored.params, params)
    assert_same_bits(restored.opt_state, opt_state)
    for leaf, given in zip(jax.tree.leaves(restored.params), jax.tree.leaves(fresh), strict=True):
        if any(given is x for x in jax.tree.leaves(base_of(fresh))):
            assert leaf is given


def base_of(params):
    return [
        leaf.kernel if isinstance(leaf, loha_jax.LoHaWeight) else getattr(leaf, "original", leaf)
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, loha_jax.LoHaWeight | loha_jax.SavedWeight))
    ]


@pytest.mark.parametrize("kind", KEYS)
def test_keys_give_the_same_draws(tmp_path, kind):
    checkpoint.save(tmp_path, dense(), key=KEYS[kind])
    restored = checkpoint.restore(tmp_path, dense()).key
    if KEYS[kind] is None:
        assert restored is None
    else:
        assert bits(restored) == bits(KEYS[kind])


def test_arrays_of_numpy_numbers_and_empty_arrays_in_an_optimizer_state(tmp_path):
    state = {
        "numpy": np.arange(3.0),
        "int": 3,
        "float": math.nan,
        "bool": True,
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }
    state |= {"scalar": np.float64(0.1), "narrow": jnp.arange(3, dtype=jnp.int4), "key": jax.random.key(3)}
    checkpoint.save(tmp_path, dense(), state)
    fresh = {**state, "numpy": np.zeros(3), "int": 0, "narrow": jnp.zeros(3, jnp.int4), "key": KEY}
    restored = checkpoint.restore(tmp_path, dense(), fresh).opt_state
    assert math.isnan(restored.pop("float"))
    assert math.isnan(state.pop("float"))
    assert_same_bits(restored, state)


def test_the_given_tree_says_the_dtype_and_may_be_shapes(tmp_path):
    params, _ = trained(dense(), OPTIMIZERS["adamw"])
    checkpoint.save(tmp_path, params)
    trainable, frozen = loha_jax.partition(dense())
    half = loha_jax.combine(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), trainable), frozen)
    restored = loha_jax.partition(checkpoint.restore(tmp_path, half).params)[0]
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loha_jax.partition(params)[0])
    assert_same_bits(jax.tree.leaves(restored), jax.tree.leaves(expected))


def test_the_base_is_never_written(tmp_path):
    width, r = 1024, 4
    draw = np.random.default_rng(0).normal
    params = {f"layer{n}": {"kernel": draw(size=(width, width)).astype(np.float32)} for n in range(4)}
    params = loha_jax.inject(params, LoHaConfig(r=r, target_modules="all-linear"), key=KEY)
    trainable, frozen = loha_jax.partition(params)
    trainable, mu, nu = (jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), trainable) for _ in range(3))
    params, opt_state = loha_jax.combine(trainable, frozen), optax.ScaleByAdamState(jnp.int32(3), mu, nu)
    checkpoint.save(tmp_path, params, opt_state)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    factors = 4 * 4 * width * r * 4  # layers, factors, floats
    assert 0.7 * 3 * factors < on_disk < 3 * factors + 4 * 15_000  # they and Adam's two moments, and a description
    assert sum(x.nbytes for x in base_of(params)) > 16 * factors


# ---- what does not belong together is an error


def replaced(tree, path, change):
    tree = dict(tree)
    tree[path[0]] = change(tree[path[0]]) if len(path) == 1 else replaced(tree[path[0]], path[1:], change)
    return tree


def without(tree, name):
    return {k: v for k, v in tree.items() if k != name}


OTHERS = {
    "a value of the base": (
        lambda: inject(replaced(base(), ["linear/~/sub", "w"], lambda x: x.at[1, 1].add(1e-6))),
        ["params['linear/~/sub']['w'].kernel (base): given other values"],
    ),
    "a leaf that is not adapted": (
        lambda: inject(replaced(base(), ["head", "bias"], lambda x: x * 2)),
        ["params['head']['bias'] (base): given other values, the checkpoint was made on bfloat16[2]"],
    ),
    "two leaves": (
        lambda: inject(
            replaced(replaced(base(), ["head", "bias"], lambda x: x.astype(jnp.float32)), ["conv", "kernel"], jnp.sin)
        ),
        ["params['head']['bias'] (base): given float32[2]", "params['conv']['kernel'] (base): given other values"],
    ),
    "a leaf more": (
        lambda: {**dense(), "new": jnp.ones(3)},
        ["params['new'] (base): given float32[3], the checkpoint was made on nothing"],
    ),
    "a leaf less": (
        lambda: without(dense(), "conv"),
        ["params['conv']['kernel'] (base): given nothing, the checkpoint was made on float32[3,3,4,6]"],
    ),
    "rank": (
        lambda: inject(base(), r=3),
        ["adapter default, ranks: given [3], the checkpoint has [2]", "hada_w1_a: given float32[5,3]"],
    ),
    "alpha": (lambda: inject(base(), alpha=16), ["config, alpha: given 16, the checkpoint has 8"]),
    "dropout": (lambda: inject(base(), rank_dropout=0.5), ["config, rank_dropout: given 0.5, the checkpoint has 0.0"]),
    "patterns": (
        lambda: inject(base(), rank_pattern={"sub": 2}),
        ["config, rank_pattern: given {'sub': 2}, the checkpoint has {}"],
    ),
    "class": (
        lambda: loha_jax.inject(base(), LycorisConfig(r=2, target_modules=["sub"], init_weights=False), key=KEY),
        ["config, class: given 'LycorisConfig', the checkpoint has 'LoHaConfig'", "config, use_scalar: given False"],
    ),
    "name of the adapter": (
        lambda: loha_jax.inject(
            base(), LoHaConfig(r=2, target_modules=["sub"], init_weights=False), key=KEY, adapter_name="other"
        ),
        ["adapter other: given an adapter, the checkpoint has nothing", "active: given ['other']"],
    ),
    "activity": (lambda: loha_jax.set_adapter(dense(), ()), ["active: given [], the checkpoint has ['default']"]),
    "module": (
        lambda: loha_jax.inject(
            base(), LoHaConfig(r=2, target_modules=["x"], init_weights=False), key=KEY, names={".*sub": "x"}
        ),
        ["names: given ['x'], the checkpoint has ['linear.sub']"],
    ),
    "layout": (
        lambda: loha_jax.inject(
            base(), LoHaConfig(r=2, target_modules=["sub"], init_weights=False), key=KEY, layouts={".*sub": "oi"}
        ),
        ["layout: given 'oi', the checkpoint has 'io'"],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_was_not_saved_with_it_is_an_error_that_names_all_that_differs(tmp_path, kind):
    make, lines = OTHERS[kind]
    saved(tmp_path, 1)
    given = make()
    with pytest.raises(ValueError, match="belongs to something else than what was given") as raised:
        checkpoint.restore(tmp_path, given)
    assert not isinstance(raised.value, FileError)
    for line in lines:
        assert line in str(raised.value)
    assert checkpoint.restore(tmp_path, dense()).step == 1


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        (optax.sgd(0.1), "opt_state: given ['EmptyState', 'EmptyState'], the checkpoint has ['ScaleByAdamState'"),
        (optax.adabelief(0.1), "opt_state: given ['ScaleByBeliefState'"),  # of the same names and shapes as Adam's
        (optax.adamw(lambda step: 0.1), "opt_state[2].count: given int32[], the checkpoint has nothing"),
        (
            optax.adamw(0.1, mu_dtype=jnp.int32),
            ".mu['linear/~/sub']['w'].adapters['default'].hada_w1_a: given int32[5,2]",
        ),
    ],
    ids=["sgd", "adabelief", "schedule", "integers"],
)
def test_another_optimizer_is_an_error(tmp_path, optimizer, line):
    saved(tmp_path, 1)
    params = dense()
    with pytest.raises(ValueError, match="belongs to something else") as raised:
        checkpoint.restore(tmp_path, params, optimizer.init(loha_jax.partition(params)[0]))
    assert line in str(raised.value)


def test_a_state_that_is_not_asked_for_is_not_needed_and_one_that_was_not_saved_is_an_error(tmp_path):
    params, opt_state = start()
    saved(tmp_path / "with", 1)
    assert checkpoint.restore(tmp_path / "with", params).opt_state is None
    checkpoint.save(tmp_path / "without", params)
    with pytest.raises(ValueError, match="opt_state"):
        checkpoint.restore(tmp_path / "without", params, opt_state)


def test_what_cannot_be_saved(tmp_path):
    params, _ = start()
    trainable, frozen = loha_jax.partition(params)
    from flax import nnx

    for given, error, message in [
        ((base(),), ValueError, "holds no adapter"),
        ((trainable,), ValueError, "one half of `partition`"),
        ((frozen,), ValueError, "one half of `partition`"),
        ((nnx.Linear(2, 2, rngs=nnx.Rngs(0)),), TypeError, "not a model"),
        ((params, {"x": "word"}), TypeError, r"opt_state\['x'\] is of type str"),
        ((jax.eval_shape(lambda: params),), ValueError, "no values to save"),
    ]:
        with pytest.raises(error, match=message):
            checkpoint.save(tmp_path, *given)
    for data, message in [({1: 2}, "data should be what JSON holds"), ({"a": [b"x"]}, r"data\['a'\]\[0\] .* bytes")]:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, params, data=data)
    with pytest.raises(ValueError, match=r"metrics\['loss'\] should be a number"):
        checkpoint.save(tmp_path, params, metrics={"loss": jnp.ones(2)})
    for step in (-1, 2.5, True, 2**31, "1"):
        with pytest.raises(ValueError, match="The step should be an integer"):
            checkpoint.save(tmp_path, params, step=step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": True}, {"keep_best": -1}, {"best_mode": "least"}])
def test_what_cannot_be_kept(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpoints(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# ---- which are kept


@pytest.mark.parametrize(
    ("options", "losses", "left", "best"),
    [
        ({"keep": 2}, [3, 1, 2, 5, 4], [3, 4], None),
        ({"keep": None}, [3, 1, 2], [0, 1, 2], None),
        ({"keep": 1, "best": "loss"}, [3, 1, 2, 5, 4], [1, 4], 1),
        ({"keep": 1, "best": "loss", "best_mode": "max"}, [3, 1, 2, 5, 4], [3, 4], 3),
        ({"keep": 1, "best": "loss", "keep_best": 2}, [3, 1, 2, 5, 4], [1, 2, 4], 1),
        ({"keep": 1, "best": "loss", "keep_best": 0}, [3, 1, 2], [2], 2),
        ({"keep": 1, "best": "loss"}, [math.nan, 2, math.nan, 3], [1, 3], 1),
        ({"keep": 1, "best": "loss", "best_mode": "max"}, [math.nan, 2, math.nan, 1], [1, 3], 1),
        ({"keep": 2, "best": "loss"}, [math.nan, math.nan, math.nan], [1, 2], None),
        ({"keep": 1, "best": "loss"}, [None, 2, None, None], [1, 3], 1),
        ({"keep": 1, "best": "loss"}, [2, 1, 1, 3], [2, 3], 2),
    ],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_the_latest_and_the_best_stay(tmp_path, options, losses, left, best, reopened):
    params = dense()
    checkpoints = Checkpoints(tmp_path, **options)
    for step, loss in enumerate(losses):
        if reopened:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, **options)
        checkpoints.save(step, params, metrics=None if loss is None else {"loss": loss})
    assert (checkpoints.all_steps, checkpoints.latest_step, checkpoints.best_step) == (left, left[-1], best)
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert (checkpoints.all_steps, checkpoints.best_step) == (left, best)


def test_an_older_step_is_not_saved_over_later_ones(tmp_path):
    params, opt_state = start()
    saved(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 3):
            with pytest.raises(ValueError, match=r"holds checkpoints of .*3"):
                checkpoints.save(step, params, opt_state)
        checkpoints.save(4, params, opt_state)


def test_one_that_is_not_there(tmp_path):
    params = dense()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.restore(tmp_path / "none", params)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert (checkpoints.restore(params), checkpoints.latest_step, checkpoints.best_step) == (None, None, None)
        checkpoints.save(1, params)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2; it has \[1\]"):
            checkpoints.restore(params, step=2)


# ---- broken files


def files_of_a_checkpoint(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damages(size):
    yield "empty", lambda data: b""
    yield "half", lambda data: data[: size // 2]
    yield "longer", lambda data: data + b"\0"
    yield "zeros", lambda data: bytes(size)
    yield "deleted", lambda data: None
    for n in range(8):  # a bit each, spread over the file
        at = (2 * n + 1) * size // 16
        yield f"bit of byte {at}", lambda data, at=at, n=n: data[:at] + bytes([data[at] ^ (1 << n)]) + data[at + 1 :]


@pytest.mark.slow
def test_whatever_is_broken_gives_the_earlier_checkpoint_or_the_right_values(tmp_path):
    states = saved(tmp_path / "whole", 1, 2, metrics={"loss": 1.5})
    params, opt_state = start()
    fell_back = set()
    for name in files_of_a_checkpoint(tmp_path / "whole" / "2"):
        data = (tmp_path / "whole" / "2" / name).read_bytes()
        for kind, damage in damages(len(data)):
            folder = tmp_path / "broken"
            shutil.copytree(tmp_path / "whole", folder)
            path = folder / "2" / name
            path.unlink() if (broken := damage(data)) is None else path.write_bytes(broken)
            with warnings.catch_warnings(record=True) as caught, Checkpoints(folder, best="loss") as checkpoints:
                warnings.simplefilter("always")
                restored = checkpoints.restore(params, opt_state)
            messages = [str(w.message) for w in caught]
            assert restored.step == (1 if messages else 2), (name, kind)
            assert all(f"The checkpoint of step 2 ({folder / '2'}) is corrupted: " in m for m in messages), (name, kind)
            if messages:
                fell_back.add(name.parts[0])
                with Checkpoints(folder) as checkpoints, pytest.raises(FileError, match=r"step 2 .* is corrupted"):
                    checkpoints.restore(params, opt_state, step=2)
            assert_same_bits((restored.params, restored.opt_state), states[restored.step])
            assert bits(restored.key) == bits(jax.random.key(restored.step))
            assert (restored.data, restored.metrics) == ({"batch": restored.step}, {"loss": 1.5})
            shutil.rmtree(folder)
    assert fell_back == {"state", "description"}


def test_every_number_of_the_description_is_protected(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "1" / "description" / "description.json"
    text = path.read_text()
    for old, new in (('"batch": 1', '"batch": 2'), ('"r": 2', '"r": 3'), ('"step": 1', '"step": 7')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(FileError, match="is not as it was written"), pytest.warns(UserWarning, match="is skipped"):
            checkpoint.restore(tmp_path, dense())


def test_values_that_changed_without_a_trace_are_found(tmp_path):
    """Whole files, of another checkpoint of the same run: nothing but the digests can tell."""
    states = saved(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "3" / "state")
    shutil.copytree(tmp_path / "2" / "state", tmp_path / "3" / "state")
    with pytest.warns(UserWarning, match=r"step 3 .* the values of .*hada_w1_a.* are not those that were saved"):
        restored = checkpoint.restore(tmp_path, *start())
    assert restored.step == 2
    assert_same_bits(restored.params, states[2][0])
    shutil.rmtree(tmp_path / "3")
    (tmp_path / "2").rename(tmp_path / "5")
    with pytest.warns(UserWarning, match="is of step 2"):
        assert checkpoint.restore(tmp_path, dense()).step == 1


def test_where_all_are_broken_the_error_lists_them(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "state")
    with (
        pytest.raises(FileError, match="holds no intact checkpoint") as raised,
        pytest.warns(UserWarning, match="is corrupted"),
    ):
        checkpoint.restore(tmp_path, *start())
    assert all(f"The checkpoint of step {n}" in str(raised.value) for n in (1, 2))


def test_a_half_written_checkpoint_is_left_out_and_removed_by_the_next_save(tmp_path):
    saved(tmp_path, 1, 2)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (tmp_path / "2").rename(unfinished)
    params, opt_state = start()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=f"{unfinished} is unfinished"):
            assert checkpoints.restore(params, opt_state).step == 1
        assert unfinished.exists()
        checkpoints.save(2, params, opt_state)
        checkpoints.wait()
        assert not unfinished.exists()
        assert checkpoints.restore(params, opt_state).step == 2


def test_a_broken_checkpoint_is_replaced_and_does_not_count(tmp_path):
    states = saved(tmp_path, 1, 2, 3, metrics={"loss": 1.0})
    params, opt_state = start()
    for step in (2, 3):
        (tmp_path / str(step) / "state" / "manifest.ocdbt").unlink()
    with Checkpoints(tmp_path, keep=1, best="loss") as checkpoints:
        assert checkpoints.best_step == 3
        with pytest.warns(UserWarning, match="is corrupted"):
            assert checkpoints.restore(params, opt_state).step == 1
        assert checkpoints.best_step == 1
        checkpoints.save(2, *states[2], metrics={"loss": 2.0})  # 1 is the best, 2 the latest, 3 still ahead
        checkpoints.wait()
        assert checkpoints.all_steps == [1, 2, 3]
        checkpoints.save(4, *states[3], metrics={"loss": 3.0})
        checkpoints.wait()
        assert checkpoints.all_steps == [1, 4]
        assert_same_bits(checkpoints.restore(params, opt_state, step=1).params, states[1][0])


# ---- while the next step runs


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    params = {"a": {"kernel": jnp.ones((2048, 2048))}}
    params = loha_jax.inject(params, LoHaConfig(r=16, target_modules=["a"], init_weights=False), key=KEY)
    trainable, frozen = loha_jax.partition(params)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
    expected = {}
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for n in range(5):
            expected[n] = jax.tree.map(lambda x: np.array(x, copy=True), trainable)
            checkpoints.save(n, loha_jax.combine(trainable, frozen), {"mu": trainable})
            trainable = step(trainable)
        for n in range(5):
            restored = checkpoints.restore(params, {"mu": loha_jax.partition(params)[0]}, step=n)
            for tree in (loha_jax.partition(restored.params)[0], restored.opt_state["mu"]):
                for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected[n]), strict=True):
                    np.testing.assert_array_equal(a, b)


# ---- in new processes


def run(code, *arguments, devices=1):
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRAINING = """
import hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import loha_jax
from loha_jax.checkpoint import Checkpoints
assert "orbax" not in sys.modules

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (16, 32)) / 4},
          "down": {"kernel": jax.random.normal(jax.random.key(1), (32, 4)) / 6}}
config = loha_jax.LoHaConfig(r=3, target_modules="all-linear", rank_dropout=0.25)
params = loha_jax.inject(params, config, key=jax.random.key(2))
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 20)))
trainable, frozen = loha_jax.partition(params)
state, key, at = tx.init(trainable), jax.random.key(3), 0
examples = np.random.default_rng(0).normal(size=(100, 8, 16)).astype(np.float32)
apply = loha_jax.adapt(lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"])

@jax.jit
def step(trainable, state, key, x):
    def loss(trainable):
        return jnp.mean((apply(loha_jax.dropout(loha_jax.combine(trainable, frozen), key), x) - 1) ** 2)
    value, gradients = jax.value_and_grad(loss)(trainable)
    updates, state = tx.update(gradients, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

losses = []
with Checkpoints(folder) as checkpoints:
    if (restored := checkpoints.restore(params, state)) is not None:
        trainable, state = loha_jax.partition(restored.params)[0], restored.opt_state
        key, at = restored.key, restored.data["at"]
        assert restored.step == first
    for n in range(first, last):
        key, used = jax.random.split(key)
        trainable, state, value = step(trainable, state, used, examples[at])
        at += 1
        losses.append(np.asarray(value).tobytes().hex())
    checkpoints.save(last, loha_jax.combine(trainable, frozen), state, key=key, data={"at": at})
leaves = jax.tree.leaves((trainable, state, jax.random.key_data(key)))
print(json.dumps([losses, [np.asarray(x).tobytes().hex() for x in leaves]]))
"""


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    losses, final = run(TRAINING, tmp_path / "straight", 0, 12)
    first, _ = run(TRAINING, tmp_path / "resumed", 0, 6)
    second, resumed = run(TRAINING, tmp_path / "resumed", 6, 12)
    assert len(set(losses)) == 12
    assert first + second == losses
    assert resumed == final


FULL_DISK = """
import json, resource, sys
import jax, jax.numpy as jnp
import loha_jax
from loha_jax.checkpoint import Checkpoints

config = loha_jax.LoHaConfig(r=8, target_modules=["a"])
params = loha_jax.inject({"a": jnp.ones((64, 64))}, config, key=jax.random.key(0))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
errors, steps = [], []
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, params)
    checkpoints.wait()
    for limit in (0, 100, 1000):  # bytes that a file may have
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            checkpoints.save(2, params)
            checkpoints.wait()
        except Exception as error:
            errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        steps.append([checkpoints.all_steps, checkpoints.restore(params, step=1).step])
    checkpoints.save(2, params)
    checkpoints.wait()
    steps.append([checkpoints.all_steps, checkpoints.restore(params).step])
print(json.dumps([errors, steps]))
"""


def test_a_full_disk_is_an_error_and_the_checkpoints_before_it_stay(tmp_path):
    errors, steps = run(FULL_DISK, tmp_path)
    assert len(errors) == 3
    assert all("too large" in error for error in errors), errors
    assert steps == [[[1], 1]] * 3 + [[[1, 2], 2]]


MESHES = """
import contextlib, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import loha_jax
from loha_jax.checkpoint import Checkpoints

def on(mesh, tree):
    def put(x):
        if mesh is None or x.ndim == 0:
            return x if mesh is None else jax.device_put(x, NamedSharding(mesh, P()))
        axes = [name if size % mesh.shape[name] == 0 else None for name, size in zip(mesh.axis_names, x.shape)]
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))
    return jax.tree.map(put, tree)

devices = np.array(jax.devices())
meshes = [
    Mesh(devices.reshape(4, 2), ("fsdp", "tensor")),
    Mesh(devices.reshape(2, 4), ("fsdp", "tensor")),
    Mesh(devices, ("data",)),
    Mesh(devices[:2], ("fsdp",)),
    jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit)),
    None,
]
params = {"q": {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}, "bias": jnp.ones(8)}
config = loha_jax.LoHaConfig(r=4, target_modules=["q"], init_weights=False)
params = loha_jax.inject(params, config, key=jax.random.key(1))
tx = optax.adam(1e-2)
state = jax.tree.map(lambda x: x + 1, tx.init(loha_jax.partition(params)[0]))
fresh = jax.tree.map(lambda x: x * 0, loha_jax.partition(params)[0])
fresh = loha_jax.combine(fresh, loha_jax.partition(params)[1])
def context(mesh):
    return jax.set_mesh(mesh) if mesh is not None and "a" in mesh.shape else contextlib.nullcontext()

for n, source in enumerate(meshes):
    with context(source), Checkpoints(f"{sys.argv[1]}/{n}") as checkpoints:
        checkpoints.save(1, on(source, params), on(source, state))
    for target in (source, meshes[n - 1]):
        with context(target), Checkpoints(f"{sys.argv[1]}/{n}") as checkpoints:
            given, given_state = on(target, fresh), on(target, tx.init(loha_jax.partition(fresh)[0]))
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given_state)
            for wanted in (given_state, shapes) if target is not None else (given_state,):
                found = checkpoints.restore(given, wanted)
                for a, b, g in zip(jax.tree.leaves((found.params, found.opt_state)), jax.tree.leaves((params, state)),
                                   jax.tree.leaves((given, given_state)), strict=True):
                    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
                    assert a.sharding == g.sharding and a.committed == g.committed, (a.sharding, g.sharding)
                double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree))
                jax.block_until_ready(double((found.params, found.opt_state)))
print(json.dumps("done"))
"""


@pytest.mark.slow
def test_any_mesh_restores_what_any_mesh_saved(tmp_path):
    assert run(MESHES, tmp_path, devices=8) == "done"
