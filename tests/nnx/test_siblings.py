"""Adapters beside the variables of an NNX model, as trainers of `nnx.LoRAParam` see them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nnx_models import Model, adapted, close, config, split
from nnx_reference import dense, factors, with_sums
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.nnx import InactiveLoHaParam, LoHaParam, inject
from loha_jax.nnx.model_tree import tree_of
from loha_jax.nnx.siblings import Settings, Siblings
from loha_jax.nnx.variables import axis_names

BASE = nnx.Not(nnx.LoRAParam)


def flat(model, *filters):
    return dict(nnx.to_flat_state(nnx.state(model, *filters)))


def assert_same_base(model, plain, rest=BASE):
    ours, theirs = flat(model, rest), flat(plain)
    assert list(ours) == list(theirs)
    for path, variable in theirs.items():
        assert type(ours[path]) is type(variable)
        np.testing.assert_array_equal(ours[path][...], variable[...])


# ---------------------------------------------------------------------------------------- the form


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(split(rngs, 3))


class Tied(nnx.Module):
    """Layers with one kernel, and methods that read it from outside of them."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.b.kernel = self.a.kernel

    def _kernel(self):
        return self.b.kernel[...]

    def back(self, x):
        return x @ self._kernel().T

    @nnx.jit
    def jitted(self, x):
        return self.back(x)

    def sizes(self):
        return "4x4"

    def __call__(self, x):
        return self.back(self.b(jnp.tanh(self.a(x))))


MODELS = {
    "layers": (Model, {}),
    "a stack": (Stacked, {"target_modules": ["layers"]}),
    "one kernel of two layers": (Tied, {"target_modules": ["a"]}),
    "a copy of a module": (Model, {"target_modules": ["up"], "modules_to_save": ["head"]}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MODELS)
def test_the_base_stays_in_its_place_and_the_rest_is_lora_params(name):
    build, settings = MODELS[name]
    model, plain = adapted(build, **settings), build(nnx.Rngs(0))
    assert_same_base(model, plain)
    trained = flat(model, nnx.LoRAParam)
    assert {type(variable) for variable in trained.values()} == {nnx.LoRAParam}
    assert all("_lora_" in path[-1] for path in trained)
    assert LoHaParam is nnx.LoRAParam
    assert loha_jax.unload(model) is model
    assert_same_base(model, plain, ...)
    assert nnx.graphdef(model) == nnx.graphdef(plain)


@pytest.mark.usefixtures("x64")
def test_arrays_of_inactive_adapters_are_no_lora_params():
    model = inject(adapted(), config(), rngs=nnx.Rngs(2), adapter_name="style")
    layer = model.layers[0].up
    assert type(layer.kernel_lora_hada_w1_a) is InactiveLoHaParam
    assert type(layer.kernel_lora_style_hada_w1_a) is nnx.LoRAParam
    loha_jax.set_adapter(model, "default")
    assert type(layer.kernel_lora_hada_w1_a) is nnx.LoRAParam
    assert_same_base(model, Model(nnx.Rngs(0)), nnx.Not(nnx.Any(nnx.LoRAParam, InactiveLoHaParam)))


@pytest.mark.usefixtures("x64")
def test_settings_are_equal_by_value():
    one, other = (adapted(seed=seed).head.kernel_lora for seed in (1, 2))
    assert isinstance(one, Settings)
    assert one == other
    assert hash(one) == hash(other)
    assert one != adapted(alpha=7).head.kernel_lora
    assert one != adapted().layers[0].up.kernel_lora


def test_a_kernel_in_a_list_has_its_factors_on_the_module_above():
    class Lists(nnx.Module):
        def __init__(self):
            self.ws = nnx.List([nnx.Param(jnp.eye(4)), nnx.Dict(w=nnx.Param(jnp.eye(4)))])
            self.pair = nnx.data((nnx.Param(jnp.eye(4)), 1))

        def __call__(self, x):
            return x @ self.ws[0] @ self.ws[1]["w"] @ self.pair[0]

    folds = {"ws/0": dense, "ws/1/w": dense, "pair/0": dense}
    targets = ["ws.0", "ws.1", "pair.0"]
    model = adapted(lambda rngs: Lists(), folds, target_modules=targets)
    assert model.ws_0_lora_hada_w1_a.shape == model.pair_0_lora_hada_w1_a.shape == (4, 2)
    assert model.ws[1].w_lora_hada_w1_a.shape == (4, 2)
    x = jnp.ones((1, 4))
    close(model(x), with_sums(Lists(), model, folds)(x), 1e-5)


def test_the_axis_that_a_stack_adds_is_in_the_metadata():
    metadata = {nnx.PARTITION_NAME: "layers"}
    kernel_init = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))

    class Layers(nnx.Module):
        def __init__(self, rngs):
            make = lambda rngs: nnx.Linear(4, 6, kernel_init=kernel_init, rngs=rngs)  # noqa: E731
            self.layers = nnx.vmap(make, transform_metadata=metadata)(split(rngs, 3))

    with nnx.use_eager_sharding(False):
        model = adapted(Layers, target_modules=["layers"])
    axes = {
        name: axis_names(variable) for name, variable in factors(model, "layers/kernel").items()
    }
    assert axes["hada_w1_a"] == axes["hada_w2_a"] == ("layers", "model", None)
    assert axes["hada_w1_b"] == axes["hada_w2_b"] == ("layers", None, None)
    run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), transform_metadata=metadata)
    assert run(model.layers, jnp.ones(4)).shape == (3, 6)
    factor = model.layers.kernel_lora_hada_w1_a
    assert axis_names(factor) == ("layers", "model", None)


def test_axis_names_of_the_kernel_are_not_those_of_a_factor():
    """Metadata with one entry per axis, under an older name of Flax, as MaxText has it."""
    layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    axes = ("embed", "mlp")
    layer.kernel = layer.kernel.replace(out_sharding=axes, sharding_names=axes, kept=1)
    model = inject(nnx.Dict(a=layer), config({"a/kernel": dense}), rngs=nnx.Rngs(1))
    own = model.a.kernel_lora_hada_w1_a.get_metadata()
    assert own["kept"] == 1
    assert own["out_sharding"] == ("mlp", None)


# ------------------------------------------------------------------------------- reads of a kernel


def test_reads_outside_of_the_layer():
    x = normal_array(0, (3, 4))
    model = adapted(Tied, {"a/kernel": dense}, target_modules=["a"])
    plain = with_sums(Tied(nnx.Rngs(0)), model, {"a/kernel": dense})
    close(model(x), plain(x), 1e-5)
    close(model.back(x), plain.back(x), 1e-5)
    close(model.jitted(x), plain.back(x), 1e-5)
    assert model.sizes() == "4x4"
    for name in ("a", "b"):  # each of the layers by itself
        close(getattr(model, name)(x), plain.a(x), 1e-5)
        close(nnx.clone(getattr(model, name))(x), plain.a(x), 1e-5)
    assert model.a.kernel_lora_hada_w1_a is model.b.kernel_lora_hada_w1_a
    # A function of the user's own reads the base, unless it runs through `adapt`.
    read = lambda model: model.a.kernel[...]  # noqa: E731
    np.testing.assert_array_equal(read(model), Tied(nnx.Rngs(0)).a.kernel[...])
    close(loha_jax.adapt(read)(model), plain.a.kernel[...], 1e-5)


# ---------------------------------------------------------------------------------------- trainers


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


X = normal_array(5, (6, 4))
NET_CONFIG = LoHaConfig(r=2, alpha=4, target_modules=["up", "down"])


def train(model, steps=20):
    """Train a model as tunix' PeftTrainer does: its LoRAParams alone, found by type."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(X) - 1.0) ** 2)  # noqa: E731
        grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
        value, gradients = grad(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_a_trainer_of_lora_params_leaves_the_base_and_peft_opens_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model, plain = inject(Net(nnx.Rngs(0)), NET_CONFIG, rngs=nnx.Rngs(1)), Net(nnx.Rngs(0))
    losses = train(model)
    assert losses[-1] < losses[0] / 4
    assert_same_base(model, plain)
    interop.save_peft(tmp_path / "peft", model)

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
            for name in ("up", "down"):
                layer = getattr(self, name)
                ours = getattr(plain, name)
                layer.weight.data = torch.tensor(np.array(ours.kernel[...]).T)
                layer.bias.data = torch.tensor(np.array(ours.bias[...]))

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    opened = peft.PeftModel.from_pretrained(Twin(), tmp_path / "peft").eval()
    with torch.no_grad():
        close(model(X), opened(torch.tensor(np.array(X))).numpy(), 1e-5)


def test_a_checkpoint_of_the_lora_params_resumes(tmp_path):
    model, other = (inject(Net(nnx.Rngs(0)), NET_CONFIG, rngs=nnx.Rngs(n)) for n in (1, 2))
    train(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.state(model, nnx.LoRAParam))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "step", nnx.state(other, nnx.LoRAParam)))
    np.testing.assert_array_equal(other(X), model(X))


def test_copies_of_a_model_exchange_their_weights_by_filter():
    """As an actor, its rollout and its reference do in reinforcement learning."""
    actor, rollout = (inject(Net(nnx.Rngs(0)), NET_CONFIG, rngs=nnx.Rngs(n)) for n in (1, 2))
    train(actor)
    nnx.update(rollout, nnx.state(actor, nnx.LoRAParam))
    np.testing.assert_array_equal(rollout(X), actor(X))
    assert jax.tree.structure(nnx.state(rollout)) == jax.tree.structure(nnx.state(actor))
    reference = Net(nnx.Rngs(7))
    nnx.update(reference, nnx.state(actor, BASE))
    assert_same_base(actor, reference)
    graphdef, trained, rest = nnx.split(rollout, nnx.LoRAParam, ...)
    np.testing.assert_array_equal(nnx.merge(graphdef, trained, rest)(X), actor(X))


# -------------------------------------------------------------------------- kernels that are trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantised:
    """A kernel of two variables, as quantisers make it."""

    values: nnx.Variable
    scale: nnx.Variable

    @property
    def shape(self):
        return self.values.shape


class Providing(nnx.Module):
    """A module whose update a provider adds, and not a call through `adapt`."""

    def __init__(self):
        self.kernel = nnx.data(
            Quantised(nnx.Param(jnp.ones((4, 6), jnp.int8)), nnx.Param(jnp.ones(6)))
        )

    def __call__(self, x):
        return x @ (self.kernel.values[...] * self.kernel.scale[...])


def test_a_kernel_of_several_variables_has_siblings_too():
    model = nnx.Dict(q=Providing())
    plain = loha_jax.inject(
        {"q": {"kernel": jnp.ones((4, 6))}},
        LoHaConfig(r=2, target_modules=["q"], init_weights=False),
        key=jax.random.key(0),
    )
    leaf = plain["q"]["kernel"]
    Siblings.of(leaf, model.q.kernel, intercepted=True).put(model.q, ("kernel",))
    base = flat(model, BASE)
    assert list(base) == [("q", "kernel", "scale"), ("q", "kernel", "values")]
    read = tree_of(model)["q"]["kernel"]
    assert read.kernel.values.dtype == jnp.int8
    np.testing.assert_array_equal(
        read.adapters["default"].hada_w1_a, leaf.adapters["default"].hada_w1_a
    )
    assert loha_jax.summary(model).rows == loha_jax.summary(plain).rows
    loha_jax.set_adapter(model, ())
    assert type(model.q) is Providing
    assert type(model.q.kernel_lora_hada_w1_a) is InactiveLoHaParam
    assert model.q.kernel_lora.intercepted
    loha_jax.unload(model)
    assert flat(model).keys() == base.keys()
