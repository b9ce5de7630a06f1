import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaves import loha_leaves
from lycoris_samples import CONVOLUTIONS, DATA, LAYOUTS, base_params, native
from lycoris_trees import loaded, same_tensors, written

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.runtime.untrusted import FileError
from loha_jax.tree.leaves import is_adapted


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (
            {
                "a": {"b_c": {"kernel": jnp.ones((2, 2))}},
                "a_b": {"c": {"kernel": jnp.ones((2, 2))}},
            },
            {"target_modules": ["b_c", "c"]},
            r"a\.b_c and a_b\.c would both be 'lycoris_a_b_c'",
        ),
        (
            {
                "q": {"kernel": jnp.ones((2, 2))},
                "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
            },
            {"target_modules": ["q"], "modules_to_save": ["head"]},
            r"head is in modules_to_save.*save_peft",
        ),
        (
            {
                "q": {"kernel": jnp.ones((2, 2))},
                "bn": {"scale": jnp.ones(2), "bias": jnp.ones(2), "mean": jnp.ones(2)},
            },
            {"target_modules": ["q"], "modules_to_save": ["bn"]},
            r"bn is in modules_to_save.*save_peft",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(base, config, message, tmp_path):
    params = loha_jax.inject(base, LoHaConfig(r=1, **config), key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        interop.save_lycoris(tmp_path / "adapter.safetensors", params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": "lora_unet"}, r"prefix='lora_unet' should end with '_'"),
        ({"dtype": "int8"}, r"dtype='int8'.*float16, bfloat16, float32"),
        ({"dtype": "half"}, r"dtype='half'|cannot hold"),
        ({"dtype": "nothing"}, r"dtype='nothing'"),
        ({"dtype": jnp.float16}, r"lycoris_q\.hada_w1_a has values that float16 cannot hold"),
        ({"metadata": {"steps": 3}}, r"metadata\['steps'\] is 3"),
        ({"adapter_name": "other"}, r"other"),
        ({"others": {"lycoris_": {}}}, r"none|no adapter"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, message, tmp_path):
    params = loha_jax.inject(
        {"q": {"kernel": jnp.ones((2, 2))}},
        LoHaConfig(r=1, target_modules=["q"]),
        key=jax.random.key(0),
    )
    params = jax.tree.map(lambda t: t * 1e6, params)
    with pytest.raises(ValueError, match=message):
        interop.save_lycoris(tmp_path / "adapter.safetensors", params, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lycoris_fc1.hada_w2_b": None}, r"lycoris_fc1 lacks hada_w2_b"),
        ({"lycoris_conv3.hada_t2": None}, r"lycoris_conv3 lacks hada_t2"),
        (
            {"lycoris_fc1.hada_w2_b": np.ones((5, 24), np.float32)},
            r"factors of lycoris_fc1 do not fit each other",
        ),
        ({"lycoris_fc1.hada_w2_b": np.ones((4, 24), np.int32)}, r"lycoris_fc1\.hada_w2_b is int32"),
        (
            {"lycoris_fc1.alpha": np.array([1.0, 2.0])},
            r"lycoris_fc1\.alpha should be one finite number.*\[1\.0, 2\.0\]",
        ),
        (
            {"lycoris_fc1.alpha": np.array(np.nan)},
            r"lycoris_fc1\.alpha should be one finite number.*nan",
        ),
        ({"lycoris_fc1.weight": np.ones(3)}, r"not those of a LoHa \(1\): lycoris_fc1\.weight"),
        ({"loose": np.ones(3)}, r"not those of a LoHa \(1\): loose"),
        (
            {"lycoris_x.lora_up.weight": np.ones((2, 2))},
            r"lycoris_x lacks lora_A \(lora_down\); it has lora_B",
        ),
        (
            {"lycoris_fc1.lora_up.weight": np.ones((2, 2))},
            r"lycoris_fc1 has the factors of a LoRA and hada_w1_a of a",
        ),
        ({"lycoris_x.lora_magnitude_vector": np.ones(2)}, r"lycoris_x is a variant of LoRA"),
        ({"lora_unet_x.lokr_w1": np.ones((2, 2))}, r"a LoKr adapter"),
        ({"lycoris_x.on_input": np.ones(())}, r"a \(IA\)³ adapter"),
        ({"lycoris_x.oft_blocks": np.ones((2, 2, 2))}, r"an? OFT adapter"),
        ({"lycoris_x.diff": np.ones((2, 2))}, r"modules that the tree lacks \(1\): lycoris_x"),
        ({"lycoris_fc1.diff": np.ones((16, 24))}, r"fc1\.diff: fc1\.kernel has an adapter"),
        ({"base_model.model.x.hada_w1_a": np.ones((2, 2))}, r"PEFT's keys.*load_peft"),
    ],
)
def test_a_file_of_another_kind_or_broken_is_refused_by_its_key(change, message, tmp_path):
    state = native("tucker")[1] | change
    path = written(tmp_path, {key: value for key, value in state.items() if value is not None})
    with pytest.raises(FileError, match=message) as error:
        interop.load_lycoris(path, base_params(), layouts=LAYOUTS)
    assert str(path) in str(error.value)


def test_one_error_lists_all_that_does_not_fit(tmp_path):
    base = base_params(without=["fc1", "blocks.0.out"])
    base["fc"] = {"kernel": jnp.ones((24, 16))}
    base["conv3"]["kernel"] = jnp.ones((3, 3, 8, 11))
    base["c1d"]["kernel"] = jnp.ones((1, 6, 8))
    state = native("dora")[1]
    state["lycoris_gconv.dora_scale"] = state["lycoris_gconv.dora_scale"].reshape(-1)
    with pytest.raises(ValueError, match=r"nothing was loaded") as error:
        interop.load_lycoris(written(tmp_path, state), base, layouts=CONVOLUTIONS)
    for part in (
        "modules that the tree lacks (2): lycoris_blocks_0_out (the tree has blocks.0.q_proj), "
        "lycoris_fc1",
        "lycoris_fc1 (the tree has fc)",
        r"conv3.hada_w1_a: [10, 3] in the file, [11, 3] in the model",
        r"conv3.dora_scale: [10, 1, 1, 1] in the file, [11, 1, 1, 1] or [1, 8, 1, 1] in the model",
        r"c1d.hada_w1_b: [3, 18] in the file, [3, 6] in the model",
        r"gconv.dora_scale: [8] in the file, [8, 1, 1, 1] or [1, 4, 1, 1] in the model",
        "layouts=",
    ):
        assert part in str(error.value)
    assert not any(is_adapted(leaf) for leaf in jax.tree.leaves(base, is_leaf=is_adapted))


def test_cores_need_a_kernel_with_an_extent(tmp_path):
    base = base_params()
    base["conv3"]["kernel"] = jnp.ones((1, 1, 8, 10))
    with pytest.raises(
        ValueError, match=r"conv3\.hada_t1: \[3, 3, 3, 3\] in the file, none in the model"
    ):
        interop.load_lycoris(native("tucker")[0], base, layouts=LAYOUTS)


def test_a_layout_that_cannot_be_told_is_asked_for():
    with pytest.raises(ValueError, match=r"c1d.*layouts="):
        interop.load_lycoris(native("plain")[0], base_params())


def test_it_adds_an_adapter_to_those_that_there_are(tmp_path):
    config = LoHaConfig(r=2, target_modules=["fc1"])
    base = loha_jax.inject(base_params(), config, key=jax.random.key(0), adapter_name="first")
    params = interop.load_lycoris(native("plain")[0], base, adapter_name="second", layouts=LAYOUTS)
    assert params["fc1"]["kernel"].adapters.keys() == {"first", "second"}
    assert params["fc1"]["kernel"].active == ("second",)
    with pytest.raises(ValueError, match=r"first.*second"):
        interop.to_lycoris_state_dict(params)
    same_tensors(interop.to_lycoris_state_dict(params, "second"), native("plain")[1])
    with pytest.raises(ValueError, match="second"):
        interop.load_lycoris(native("plain")[0], params, adapter_name="second", layouts=LAYOUTS)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        interop.load_lycoris(tmp_path / "nowhere.safetensors", base_params())
    with pytest.raises(ValueError, match=r"peft_plain is no file of LyCORIS.*`load_peft`"):
        interop.load_lycoris(DATA / "peft_plain", base_params())


def test_a_folder_is_not_written_over(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"save_lycoris writes a file, .*safetensors"):
        interop.save_lycoris(tmp_path, loaded("plain"))


def test_the_convolutions_of_the_sample_have_no_layout_of_their_own():
    assert {
        name: leaf.layout.word for leaf in loha_leaves(loaded("plain")) for name in leaf.names
    } == {
        **dict.fromkeys(("fc1", "blocks.0.q_proj", "blocks.0.out"), "io"),
        "conv1x1": "kkio",
        **CONVOLUTIONS,
    }
