"""Layouts that are given, beside what the layers of a model know, and earlier adapters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.tree.containers import adapted_leaves

KEY = jax.random.key(0)


class Named(nnx.Module):
    """A model whose layers have names."""

    def __init__(self, **layers):
        for name, layer in layers.items():
            setattr(self, name, layer)


def rngs():
    return nnx.Rngs(0)


def heads():
    return nnx.LinearGeneral(4, (4, 4), rngs=rngs())


def haliax_linear():
    hax = pytest.importorskip("haliax")  # not in the environment of the newest JAX
    return hax.nn.Linear.init(hax.Axis("in", 4), hax.Axis("out", 4), key=KEY)


MODELS = {
    "nnx": (lambda: Named(q=nnx.Linear(4, 4, rngs=rngs())), "io", "oi"),
    "heads": (lambda: Named(q=heads()), "ioo", "oio"),
    "the order of heads": (lambda: Named(q=heads()), "ioo", "i o1 o0"),
    "equinox": (lambda: {"q": eqx.nn.Linear(4, 4, key=KEY)}, "oi", "io"),
    "nnx's table": (lambda: Named(q=nnx.Embed(4, 4, rngs=rngs())), "oi", "io"),  # as torch's
    "equinox' table": (lambda: {"q": eqx.nn.Embedding(4, 4, key=KEY)}, "oi", "io"),
    "haliax": (lambda: {"q": haliax_linear()}, "oi", "io"),
}


def inject(model, word, **options):
    config = LoHaConfig(r=2, target_modules=r"(\d+\.)*q(\.\d+)*")
    return loha_jax.inject(model, config, key=KEY, layouts={"q": word}, **options)


@pytest.mark.parametrize("name", MODELS)
def test_what_contradicts_the_layer_counts_with_a_warning(name):
    make, own, word = MODELS[name]
    path = (
        rf"q\.(kernel|weight|embedding) of shape \(.*\) is '{own}' to its layer.*given as '{word}'"
    )
    with pytest.warns(UserWarning, match=path) as caught:
        adapted = inject(make(), word)
    assert [w.filename for w in caught] == [__file__]
    assert [leaf.layout.word for leaf in adapted_leaves(adapted)] == [word]
    inject(make(), own)  # warnings are errors


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (heads, "iso"),  # a module for each: fused projections are several in torch
        (lambda: nnx.Conv(4, 4, (2, 2), rngs=rngs()), "iiio"),  # torch's Linear over patches
        (lambda: nnx.Linear(1, 1, rngs=rngs()), "oi"),
    ],
)
def test_another_view_of_a_kernel_is_no_contradiction(make, word):
    (leaf,) = adapted_leaves(inject(Named(q=make()), word))
    assert leaf.layout.word == word


def test_what_a_function_shows_agrees_with_its_layers():
    model = Named(
        conv=nnx.Conv(4, 4, (2, 2), rngs=rngs()),
        up=nnx.ConvTranspose(4, 4, (2, 2), rngs=rngs()),
        turned=nnx.ConvTranspose(4, 4, (2, 2), transpose_kernel=True, rngs=rngs()),
        heads=heads(),
        q=nnx.Linear(4, 4, rngs=rngs()),
    )
    x = jnp.ones((1, 4, 4, 4))
    layouts = loha_jax.infer_layouts(
        lambda m, x: (m.turned(m.up(m.conv(m.q(x)))), m.heads(x)), model, x
    )
    assert set(layouts) == {"conv", "up", "turned", "heads", "q"}
    config = LoHaConfig(r=2, target_modules=list(layouts))
    loha_jax.inject(model, config, key=KEY, layouts=layouts)


def test_a_name_map_that_contradicts_a_layer_too():
    """As one by contents does of GPT-2's Conv1D, which torch keeps as [in, out]."""
    names = interop.NameMap(layouts={"q": "oi"})
    config = LoHaConfig(r=2, target_modules=["q"])
    with pytest.warns(UserWarning, match=r"q\.kernel.*is 'io' to its layer.*given as 'oi'"):
        loha_jax.inject(MODELS["nnx"][0](), config, key=KEY, names=names)


def test_many_contradictions_are_one_line():
    model = {"layers": [eqx.nn.Linear(4, 4, key=KEY) for _ in range(6)]}
    config = LoHaConfig(r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match=r"^layers\.0\.weight .*\(so in 5 more: ") as caught:
        loha_jax.inject(model, config, key=KEY, layouts={".*": "io"})
    assert len(caught) == 1


def test_a_second_adapter_has_the_layout_of_the_first():
    """Another one would change what the first adapter does to the kernel."""
    base = {"q": {"kernel": jnp.ones((4, 4))}}
    params = inject(base, "oi")
    with pytest.raises(ValueError, match=r"q the layout 'io', .*an adapter.*made with 'oi'"):
        inject(params, "io", adapter_name="second")
    both = inject(params, "oi", adapter_name="second")
    assert loha_jax.adapter_names(both) == ("default", "second")
