"""Networks in PyTorch and in JAX whose LoRA folders are compared."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from loha_jax.tree.inject import apply_plan, stack_factors
from loha_jax.tree.plan import plan_injection
from tests.parity.models import Conv, Spec, jax_forward, jax_params, layouts, torch_output

BOUND = 1e-5
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than threefry


def chain(*convs):
    """Convolutions of `(into, out, kernel, groups)` with a stride and padding."""
    return Spec(
        0,
        tuple(
            Conv(i, o, k, (1,) * len(k), (1,) * len(k), (1,) * len(k), g) for i, o, k, g in convs
        ),
    )


LINEAR = Spec(5, ())
CONV1D = chain((3, 4, (3,), 1), (4, 5, (2,), 1))
CONV2D = chain((3, 4, (3, 2), 1), (4, 5, (1, 1), 1), (5, 4, (3, 3), 1))
GROUPED = chain((4, 6, (3, 3), 2), (6, 6, (3, 1), 6))
SPECS = {"linear": LINEAR, "conv1d": CONV1D, "conv2d": CONV2D, "grouped": GROUPED}
TARGETS = ["q", "mlp", "stem", "conv", "middle"]
GROUPS = {"stem": 2, r"blocks\.0\.conv": 6}


def random_adapter(base, config, **kwargs):
    """An adapter as `inject` makes it, with random factors and norms.

    The factors move the output, and the norms are not W's own. `inject` itself draws in a program
    that is compiled for every set of shapes.
    """
    random = np.random.default_rng(0)

    def factors(target, kernel):
        modules = [
            {k: random.standard_normal(s) for k, s in target.shapes(r).items()} if r else {}
            for r in target.ranks
        ]
        return stack_factors(modules, target)

    def norms(target, config, kernel):
        if not isinstance(config, LycorisConfig) or not config.weight_decompose:
            return {}
        weight, stack = np.asarray(target.layout.unfold(kernel)), len(target.stack)
        own = np.sqrt((weight**2).sum(tuple(range(stack + 1, weight.ndim)), keepdims=True))
        return {"dora_scale": jnp.asarray(own * random.uniform(0.7, 1.6, own.shape), jnp.float32)}

    plan = plan_injection(base, config, **kwargs)
    return apply_plan(
        base, plan, "default", factors, lambda saved, kernel: jnp.array(kernel), norms
    )


@dataclasses.dataclass
class Model:
    """A network in PyTorch and in JAX, in float32, and an input."""

    spec: Spec

    def __post_init__(self):
        self.module = self.spec.torch_model(0).float()
        self.base = jax_params(self.module)
        self.x = self.spec.inputs(0)[0].astype(np.float32)
        self.groups = GROUPS if self.spec is GROUPED else None

    def inject(self, config_class=LoHaConfig, **kwargs):
        """A `random_adapter` of the layers that have no other role."""
        names = {name.rsplit(".", 1)[-1] for name in (*self.spec.linears, *self.spec.conv_names)}
        targets = [name for name in TARGETS if name in names]
        config = config_class(**{"r": 2, "alpha": 3, "target_modules": targets} | kwargs)
        return random_adapter(self.base, config, layouts=layouts(self.spec))

    def output(self, params):
        return np.asarray(jax_forward(self.spec)(loha_jax.merge(params), self.x))

    def opened(self, folder):
        """PEFT's model of a folder; that every tensor of the file is in it is checked."""
        model = peft.PeftModel.from_pretrained(copy.deepcopy(self.module), folder).eval()
        theirs, ours = (
            peft.get_peft_model_state_dict(model),
            load_file(folder / "adapter_model.safetensors"),
        )
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            np.testing.assert_array_equal(theirs[key].numpy(), tensor, err_msg=key)
        return model

    def load(self, folder, **kwargs):
        return interop.load_lora(folder, self.base, layouts=layouts(self.spec), **kwargs)


def close(got, want, what=""):
    np.testing.assert_allclose(
        got, want, rtol=0, atol=BOUND * max(np.abs(want).max(), 1), err_msg=what
    )


def require_moved(model, output):
    assert np.abs(output - torch_output(model.module, model.x)).max() > 0.01
