"""Deviations of other libraries that the catalogue works around.

Each test fails once the deviation is gone.
"""

import copy

import jax
import numpy as np
import peft
import pytest
import torch
import transformers as hf

import loha_jax
from loha_jax import LoHaConfig, interop
from tests.models.catalogue import CASES
from tests.models.diffusers_twins import unet
from tests.models.media_twins import resnet_basic, wav2vec2
from tests.models.transformers_twins import electra, mistral, of_module, t5
from tests.models.trial import OUTPUT, Trial, distance, require_close, require_moved
from tests.models.twins import Size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]


@pytest.fixture
def size(request):
    option = request.config.option
    return Size(option.models_seed, option.models_width, option.models_layers)


def gap(twins):
    """How far the base models are from each other."""
    with torch.no_grad():
        want = twins.output(twins.module, twins.tensors).numpy()
    return distance(jax.jit(twins.fn)(twins.params, twins.inputs), want)


def test_flax_electra_takes_all_tokens_for_the_second_sentence(size):
    twins = electra(size)
    del twins.inputs["token_type_ids"]
    assert gap(twins) > 100 * OUTPUT


def test_flax_mistral_without_a_window_sees_nothing(size):
    twins = mistral(size)
    twins.module.config.sliding_window = None
    assert gap(of_module(twins.module, hf.FlaxMistralForCausalLM, twins.inputs)) > 100 * OUTPUT


def test_flax_t5_uses_a_name_that_jax_has_dropped(size):
    twins = t5(size)
    model = hf.FlaxT5ForConditionalGeneration.module_class(twins.module.config)
    arguments = {k: np.ones((1, 3), np.int32) for k in ("input_ids", "attention_mask")}
    with pytest.raises(TypeError, match="a_max"):
        model.apply(
            {"params": twins.params},
            **arguments,
            decoder_input_ids=np.ones((1, 3)),
            decoder_attention_mask=None,
        )


def test_transformers_loads_no_basic_resnet(size, tmp_path):
    twins = resnet_basic(size)
    twins.module.save_pretrained(tmp_path)
    broken = hf.FlaxResNetForImageClassification.from_pretrained(tmp_path, from_pt=True)
    path = (
        "params",
        "resnet",
        "encoder",
        "stages",
        "0",
        "layers",
        "0",
        "layer",
        "layer_0",
        "convolution",
        "kernel",
    )
    theirs, ours = broken.params, twins.params
    for key in path:
        theirs, ours = theirs[key], ours[key]
    torch_kernel = (
        twins.module.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight.detach().numpy()
    )
    np.testing.assert_array_equal(ours, torch_kernel.transpose(2, 3, 1, 0))
    assert distance(theirs, ours) > 0.1


def test_diffusers_flax_unet_is_another_function():
    """Its group norms' epsilon and its gelu.

    Beside diffusers' own PyTorch UNet, adapted models differ as bases do.

    The catalogue's twin computes what the Flax model computes, and is then within 1e-6.
    """
    trial = Trial(CASES["unet-conv_cp"], Size())
    trial.twins = unet(Size(), exact=True)
    base = gap(trial.twins)
    with torch.no_grad():
        theirs = trial.peft_output(trial.opened).numpy()
    require_moved(theirs, trial.base_output, "the adapter")
    assert base > 1e-5
    assert distance(trial.adapted_output, theirs) < 5 * base


def test_pefts_conv1d_hides_the_stride_that_whisper_reads():
    """These outputs are merged; the catalogue compares them un-merged, with the stride lent."""
    trial = Trial(CASES["whisper-conv"], Size())
    opened = trial.opened
    for module in opened.modules():
        if isinstance(module, peft.tuners.loha.layer.Conv1d):
            del module.stride
    with pytest.raises(AttributeError, match="stride"):
        trial.peft_output(opened)
    merged = opened.merge_and_unload().eval()
    with torch.no_grad():
        require_close(
            trial.adapted_output, trial.peft_output(merged).numpy(), OUTPUT, "merged by PEFT"
        )


def test_a_convolution_with_weight_norm_has_no_kernel_to_adapt(size, tmp_path):
    """Wav2Vec2's positional convolution.

    PEFT adapts the weight that torch makes of it, Flax stores none.

    A target that names it matches nothing here, and PEFT's file for it does not load: nothing is
    left out silently.
    """
    twins = wav2vec2(size)
    config = {"r": 2, "target_modules": r".*(pos_conv_embed\.conv|q_proj)"}
    model = peft.get_peft_model(copy.deepcopy(twins.module), peft.LoHaConfig(**config))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected keys \(4\): .*pos_conv_embed\.conv\.hada"):
        interop.load_peft(tmp_path, twins.params, names=twins.names)
    with pytest.raises(ValueError, match="not found in the base model"):
        loha_jax.inject(
            twins.params,
            LoHaConfig(r=2, target_modules=["pos_conv_embed.conv"]),
            key=jax.random.key(0),
            names=twins.names,
        )
