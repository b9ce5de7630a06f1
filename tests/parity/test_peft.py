"""The real PEFT and loha_jax on the same models: same targets, counts and outputs, both ways through files."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_samples import flax_leaf, flax_value

import loha_jax
from loha_jax import LoHaConfig, interop


class Net(torch.nn.Module):
    """Layers with names that end alike, in containers."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"q": torch.nn.Linear(width, 6), "mlp": torch.nn.Linear(6, width, bias=False)})
            for _ in range(3)
        )
        self.head = torch.nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["mlp"](layer["q"](x)))
        return self.head(x)


def jax_params(module):
    flat = {}
    for key, value in module.state_dict().items():
        *path, leaf = key.split(".")
        value = value.numpy()
        flat[(*path, flax_leaf(path, leaf, value))] = flax_value(path, leaf, value)
    return unflatten_dict(flat)


def jax_forward(params, x):
    for n in range(3):
        layer = params["layers"][str(n)]
        x = jnp.tanh((x @ layer["q"]["kernel"] + layer["q"]["bias"]) @ layer["mlp"]["kernel"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


configs = st.fixed_dictionaries(
    {
        "target_modules": st.sampled_from(
            [["q"], ["q", "mlp"], r".*\.[12]\.(q|mlp)", "all-linear", ["layers.1.q", "head"]]
        )
    },
    optional={
        "r": st.integers(1, 4),
        "alpha": st.one_of(st.integers(1, 9), st.floats(0.25, 8)),
        "rank_pattern": st.sampled_from([{}, {"q": 3}, {r"layers\.1\.q": 2, "q": 5}, {"^layers.0.q": 1}]),
        "alpha_pattern": st.sampled_from([{}, {"q": 3.5}, {r"0\.q": 2}]),
        "layers_to_transform": st.sampled_from([None, 1, [0, 2]]),
        "exclude_modules": st.sampled_from([None, [r"layers.2.q"], r".*\.0\..*"]),
        "modules_to_save": st.sampled_from([None, ["head"]]),
    },
)


def both(kwargs, width, seed):
    """PEFT's model with random factors, and the base parameters; None where PEFT refuses the config."""
    torch.manual_seed(seed)
    base = Net(width)
    params = jax_params(base)
    if kwargs.get("layers_to_transform") is not None:
        kwargs = kwargs | {"layers_pattern": "layers"}
    try:
        model = peft.get_peft_model(base, peft.LoHaConfig(init_weights=False, **kwargs)).eval()
    except ValueError:
        return None, params, kwargs
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.7)
    return model, params, kwargs


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
@pytest.mark.filterwarnings("ignore:target_modules=:UserWarning")
@settings(max_examples=40)
@given(configs, st.integers(3, 7), st.integers(0, 2**16))
def test_files_go_both_ways_with_the_same_outputs(tmp_path_factory, kwargs, width, seed):
    model, params, kwargs = both(kwargs, width, seed)
    config = LoHaConfig(init_weights=False, **kwargs)
    if model is None:
        with pytest.raises(ValueError):  # noqa: PT011  PEFT refuses it too
            loha_jax.inject(params, config, key=jax.random.key(0))
        return
    x = np.random.default_rng(seed).standard_normal((5, width)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(x)).numpy()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder / "peft")

    # PEFT -> JAX
    loaded = interop.load_peft(folder / "peft", params)
    bound = 1e-4 * max(np.abs(theirs).max(), 1)
    np.testing.assert_allclose(jax.jit(loha_jax.adapt(jax_forward))(loaded, x), theirs, rtol=0, atol=bound)
    np.testing.assert_allclose(jax_forward(loha_jax.merge(loaded), x), theirs, rtol=0, atol=bound)
    trainable, total = model.get_nb_trainable_parameters()
    summary = loha_jax.summary(loaded)
    assert (summary.trainable_params, summary.all_params) == (trainable, total)

    # JAX -> PEFT, with factors of our own
    ours = loha_jax.inject(params, config, key=jax.random.key(seed))
    mask, random = loha_jax.trainable_mask(ours), np.random.default_rng(seed)
    ours = jax.tree.map(lambda v, m: jnp.asarray(random.normal(0, 0.7, v.shape), v.dtype) if m else v, ours, mask)
    assert interop.to_peft_state_dict(ours).keys() == interop.to_peft_state_dict(loaded).keys()
    interop.save_peft(folder / "ours", ours)
    torch.manual_seed(seed)
    opened = peft.PeftModel.from_pretrained(Net(width), folder / "ours").eval()
    with torch.no_grad():
        theirs = opened(torch.tensor(x)).numpy()
    bound = 1e-4 * max(np.abs(theirs).max(), 1)
    np.testing.assert_allclose(jax_forward(ours, x), theirs, rtol=0, atol=bound)
    base = jax_forward(params, x)
    assert np.abs(theirs - base).max() > bound


def test_gradients_equal_pefts():
    model, params, _ = both({"target_modules": ["q", "mlp"], "r": 3, "modules_to_save": ["head"]}, 5, 0)
    assert model is not None
    model.train()
    x = np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)
    (model(torch.tensor(x)) ** 2).sum().backward()
    theirs = {
        name.replace(".default", "").replace("modules_to_save.", ""): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    state = {k: v.numpy() for k, v in peft.get_peft_model_state_dict(model).items()}
    loaded = interop.from_peft_state_dict(
        state, LoHaConfig(r=3, target_modules=["q", "mlp"], modules_to_save=["head"]), params
    )
    trainable, frozen = loha_jax.partition(loaded)
    for strategy in ("factored", "fused", "dense"):
        run = loha_jax.adapt(jax_forward, strategy=strategy)
        gradient = jax.grad(lambda t, run=run: (run(loha_jax.combine(t, frozen), x) ** 2).sum())(trainable)
        ours = interop.to_peft_state_dict(loha_jax.combine(gradient, frozen))
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(
                ours[key], theirs[key], rtol=0, atol=1e-4 * np.abs(theirs[key]).max(), err_msg=key
            )
