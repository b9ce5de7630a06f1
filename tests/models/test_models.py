"""Third-party models, unmodified, beside their PyTorch twins and the real PEFT.

python -m pytest tests/models --models-seed 1 --models-width 64 --models-layers 3
"""

import copy

import jax
import peft
import pytest
from leaves import loha_leaves

import loha_jax
from loha_jax import LoHaConfig
from tests.models.catalogue import CASES
from tests.models.media_twins import wav2vec2
from tests.models.trial import CHECKS, Trial
from tests.models.twins import Size

pytestmark = [
    pytest.mark.slow,
    # The last releases of transformers and diffusers with Flax say on import that they are.
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    # PEFT asks the Hugging Face hub, which cannot be reached, whether the base model's vocabulary
    # was enlarged.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


@pytest.fixture(scope="module")
def size(request):
    o = request.config.option
    return Size(o.models_seed, o.models_width, o.models_layers)


@pytest.fixture(scope="module", params=CASES)
def trial(request, size):
    """One case; its tests run one after the other and share what was compiled."""
    return Trial(CASES[request.param], size)


@pytest.mark.parametrize("check", CHECKS)
def test_adapters_go_both_ways(trial, check):
    CHECKS[check](trial)


def kernels(params):
    return {name: leaf.layout.word for leaf in loha_leaves(params) for name in leaf.names}


def injected(twins, config, layouts):
    """By shape alone."""
    shapes = jax.eval_shape(lambda params: params, twins.params)
    key = jax.random.key(0, impl="unsafe_rbg")
    return loha_jax.inject(
        shapes, LoHaConfig(**config), key=key, names=twins.names, layouts=layouts
    )


def test_inferred_layouts_are_those_that_were_used(trial):
    twins = trial.twins
    inferred = loha_jax.infer_layouts(twins.fn, twins.params, twins.inputs)
    assert kernels(injected(twins, trial.case.config, inferred)) == kernels(trial.adapted)


def test_all_linear_is_what_peft_calls_so(trial):
    """With layouts of the model itself, and by leaf names alone."""
    twins, config = trial.twins, {"r": 2, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(
        copy.deepcopy(twins.module), peft.LoHaConfig(**config)
    ).targeted_module_names
    if trial.case.build is wav2vec2:
        # PEFT leaves out what a model says is its output embedding. Wav2Vec2ForCTC says nothing of
        # its lm_head.
        theirs.remove("lm_head")
    inferred = loha_jax.infer_layouts(twins.fn, twins.params, twins.inputs)
    for layouts in (inferred, twins.layouts):
        assert sorted(kernels(injected(twins, config, layouts))) == sorted(theirs)
