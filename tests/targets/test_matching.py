import json
from functools import cache

import pytest
from peft_samples import ROOT

from loha_jax import LoHaConfig
from loha_jax.targets.matching import (
    Match,
    find_minimal_target_modules,
    match_pattern_key,
    match_target,
    near_misses,
    no_match_message,
    resolve_target_modules,
)

FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
MATCHES = {True: Match.TARGETED, False: Match.UNTARGETED, "excluded": Match.EXCLUDED}


@cache
def cases():
    return json.loads((ROOT / "matching_cases.json").read_text())


def test_every_case_of_pefts_target_matching():
    keys, wrong = cases()["keys"], []
    for case in cases()["target"]:
        config = LoHaConfig(**{field: case[field] for field in FIELDS})
        wrong += [
            (case, key, got)
            for key in keys
            if (got := match_target(key, config)) is not MATCHES[case["matches"].get(key, False)]
        ]
    assert not wrong
    assert len(cases()["target"]) * len(keys) > 6000


def test_every_case_of_pefts_rank_and_alpha_patterns():
    for case in cases()["pattern_key"]:
        for key in cases()["keys"]:
            assert (match_pattern_key(key, case["patterns"]) or key) == case["result"].get(
                key, key
            ), (case, key)


def test_every_case_of_pefts_minimal_target_modules():
    for case in cases()["minimal_target_modules"]:
        assert find_minimal_target_modules(case["targets"], case["others"]) == set(case["result"])


MODULES = [f"model.layers.{n}.{part}" for n in range(12) for part in ("q", "k", "mlp.up")]


def test_all_linear_leaves_out_the_output_head_and_condenses():
    config = LoHaConfig(target_modules="All-Linear")
    assert resolve_target_modules(config, MODULES, [*MODULES, "lm_head"], None) == {"q", "k", "up"}
    assert resolve_target_modules(config, ["a", "b", "lm_head"], ["a", "b", "lm_head"], None) == {
        "a",
        "b",
    }
    classify = LoHaConfig(target_modules="all-linear", task_type="SEQ_CLS")
    assert resolve_target_modules(classify, ["a", "score"], ["a", "score"], None) == {"a"}


def test_all_linear_in_a_list_is_an_ordinary_name():
    config = LoHaConfig(target_modules=["all-linear"])
    assert resolve_target_modules(config, MODULES, MODULES, None) == {"all-linear"}


@pytest.mark.parametrize(
    ("targets", "model_type", "message"),
    [
        (None, None, "Please specify `target_modules`"),
        (None, "lama", "did you mean 'llama'"),
        ([], None, "No `target_modules` passed"),
        ("", None, "No `target_modules` passed"),
    ],
)
def test_missing_targets_are_errors(targets, model_type, message):
    with pytest.raises(ValueError, match=message):
        resolve_target_modules(LoHaConfig(target_modules=targets), MODULES, MODULES, model_type)


def test_no_match_is_explained_in_pefts_words_with_near_misses():
    names = ["encoder.query", "encoder.value"]
    message = no_match_message(LoHaConfig(target_modules=["quary"]), names, [])
    assert message.startswith(
        "Target modules {'quary'} not found in the base model. Please check the target modules"
    )
    assert "'query'" in message
    message = no_match_message(
        LoHaConfig(target_modules=["zzz"], layers_to_transform=[1], layers_pattern=["foo"]),
        names,
        [],
    )
    assert (
        "Note: You specified 'layers_to_transform': [1]. You also specified 'layers_pattern': "
        "('foo',)." in message
    )
    assert no_match_message(LoHaConfig(target_modules=["q"]), names, names).startswith(
        "All modules were excluded."
    )
    assert no_match_message(LoHaConfig(target_modules=["q"]), names, names[:1]).startswith(
        "No modules were targeted"
    )
    everything = LoHaConfig(target_modules=frozenset())  # "all-linear", resolved
    assert no_match_message(everything, names, []).startswith("'all-linear' finds no kernel here")


def test_of_a_module_of_modules_those_in_it_are_named():
    names = ["embed", "embed.embeddings", "mlp.up", *(f"mlp.layers.{n}.q" for n in range(11))]
    held = near_misses(["embed", "upp"], names)
    assert held == (
        " 'embed' has no kernel of its own; the modules in it are 'embed.embeddings'."
        " The nearest module names are: 'up'."
    )
    assert near_misses(["layers"], names).endswith("'mlp.layers.8.q', ….")
