import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft_samples import NAMES, Sample

from loha_jax import LoHaConfig
from loha_jax.targets.field_checks import TASK_TYPES


@pytest.mark.parametrize("name", NAMES)
def test_config_files_of_peft_survive_a_round_trip(name):
    text = (Sample(name).adapter / "adapter_config.json").read_text()
    config = LoHaConfig.from_json(text)
    assert LoHaConfig.from_json(config.to_json()) == config
    theirs, ours = json.loads(text), json.loads(config.to_json())
    assert list(ours) == list(theirs)
    assert len(ours) == 20
    for key, value in theirs.items():
        assert (
            sorted(ours[key]) == sorted(value)
            if key == "target_modules" and isinstance(value, list)
            else True
        )
        assert ours[key] == value or key == "target_modules"


def test_lists_become_sets_and_survive_hash_copy_and_pickle():
    config = LoHaConfig(
        target_modules=["q", "v", "q"], exclude_modules=("x",), rank_pattern={"q": 2}
    )
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"x"}
    again = LoHaConfig(target_modules=["v", "q"], exclude_modules=["x"], rank_pattern={"q": 2})
    assert config == again
    assert hash(config) == hash(again)
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=3).target_modules == {"q", "v"}
    assert LoHaConfig(rank_pattern={"a": 1, "b": 2}) != LoHaConfig(rank_pattern={"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"r": 4.0}, "`r` should be a positive integer"),
        ({"r": True}, "`r` should be a positive integer"),
        ({"alpha": float("nan")}, "`alpha` should be a finite number"),
        ({"alpha": "16"}, "`alpha` should be a finite number"),
        ({"rank_dropout": 1.0}, r"`rank_dropout` should be a probability in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"`module_dropout` should be a probability in \[0, 1\)"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` should be a positive integer"),
        ({"alpha_pattern": {"q": float("inf")}}, "finite number"),
        ({"alpha_pattern": {"q(": 1}}, "not a regular expression"),
        ({"rank_pattern": ["q"]}, "should be a dict"),
        ({"target_modules": "q("}, "not a regular expression"),
        ({"target_modules": [1]}, "list of strings"),
        ({"modules_to_save": "head"}, r"write \['head'\]"),
        (
            {"layers_pattern": "h"},
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
        ),
        ({"layers_to_transform": ["0"]}, "should hold integers"),
        (
            {"task_type": "FOO"},
            "Invalid task type: 'FOO'. Must be one of the following task types: SEQ_CLS,",
        ),
        *(
            ({"init_weights": value}, "`init_weights` should be True, False or one of")
            for value in ("gaussian", None, 2, 2.5, b"abba", ("abba",), ["abba"], {})
        ),
    ],
)
def test_invalid_fields_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LoHaConfig(**kwargs)


def test_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="lora_alpha"):
        LoHaConfig(lora_alpha=32)  # pyright: ignore[reportCallIssue]


def test_layer_zero_may_have_a_pattern():
    assert LoHaConfig(layers_pattern="h", layers_to_transform=0).layers_to_transform == 0


def test_unknown_keys_of_a_file_are_reported_and_left_out():
    with pytest.warns(UserWarning, match="use_khatri_rao"):
        config = LoHaConfig.from_dict({"peft_type": "LOHA", "r": 2, "use_khatri_rao": True})
    assert config == LoHaConfig(r=2)


def test_what_peft_reads_is_read():
    assert LoHaConfig.from_dict({"peft_type": "LOHA", "rank_pattern": None}).rank_pattern == {}
    for value, truth in ((1, True), ("foo", True), (np.True_, True), (None, False), ([], False)):
        assert LoHaConfig.from_dict({"init_weights": value}).init_weights is truth
    assert LoHaConfig(init_weights=np.False_).init_weights is False
    with pytest.raises(ValueError, match="'LORA' adapter"):
        LoHaConfig.from_dict({"peft_type": "LORA"})
    with pytest.raises(ValueError, match="JSON object"):
        LoHaConfig.from_json("[]")


def test_a_folder_without_a_config_or_with_a_broken_one_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Can't find 'adapter_config\.json' at"):
        LoHaConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 0}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: `r` should be"):
        LoHaConfig.from_pretrained(tmp_path)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "r": st.integers(1, 64),
            "alpha": st.one_of(st.integers(-8, 64), st.floats(0.01, 99)),
            "task_type": st.sampled_from(TASK_TYPES),
            "rank_pattern": st.dictionaries(
                st.text("abq.", min_size=1, max_size=5), st.integers(1, 9), max_size=3
            ),
            "target_modules": st.lists(
                st.text("abq.", min_size=1, max_size=5), min_size=1, max_size=3
            ),
            "init_weights": st.sampled_from([True, False, "lycoris", "calibrated", "abba"]),
        },
    )
)
def test_any_config_survives_json(kwargs):
    config = LoHaConfig(**kwargs)
    assert LoHaConfig.from_json(config.to_json()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("task_type", "heads"),
    [("SEQ_CLS", ("classifier", "score")), ("QUESTION_ANS", ("qa_outputs",)), ("CAUSAL_LM", ())],
)
def test_task_types_add_their_heads_once(task_type, heads):
    config = LoHaConfig(task_type=task_type, modules_to_save=[*heads[:1], "norm"])
    assert sorted(config.all_modules_to_save) == sorted({*heads, "norm"})
