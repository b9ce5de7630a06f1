import numpy as np
import pytest
from merge_inputs import (
    delta,
    files_in,
    loha,
    merge_some_modules,
    normal,
    read_all,
    write_adapter,
    write_base,
)
from safetensors.numpy import save_file

from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.formats.module_lookup import ModuleLookup
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.runtime.untrusted import FileError


@pytest.mark.parametrize(
    ("names", "modules", "found"),
    [
        (["model.a.q", "model.a.k", "head"], ["a.q", "a.k"], "model.a.q"),
        (["a.q", "a.k"], ["base_model.model.a.q", "base_model.model.a.k"], "a.q"),
        (["transformer.a.q", "a.z"], ["a.q"], "transformer.a.q"),
        (["a.q", "model.a.q"], ["a.q"], "a.q"),  # a name as it is comes first
        (["b.q"], ["a.q"], None),
        (["x.a.q", "x.a.k", "y.a.q"], ["a.q", "a.k"], "x.a.q"),  # only one has both
    ],
)
def test_a_prefix_may_be_absent(names, modules, found):
    lookup = ModuleLookup(names, [AdapterModule(name, "loha", 1, 1.0, {}) for name in modules])
    assert lookup.find(modules[0], "") == (found or modules[0])
    assert bool(lookup.notes) == (found not in (None, modules[0]))


def test_two_prefixes_that_would_do_are_an_error():
    with pytest.raises(ValueError, match=r"'decoder\.' or 'encoder\.'"):
        ModuleLookup(["encoder.a.q", "decoder.a.q"], [AdapterModule("a.q", "loha", 1, 1.0, {})])


def test_an_underscored_name_finds_a_prefixed_module():
    lookup = ModuleLookup(
        ["model.a.q_proj"], [AdapterModule("a_q_proj", "loha", 1, 1.0, {}, prefix="lycoris_")]
    )
    assert lookup.find("a_q_proj", "lycoris_") == "model.a.q_proj"


def refused(tmp_path, base, modules, match, config=None, error=ValueError, others=None, **options):
    path = write_base(tmp_path / "base", base, config=config)
    adapter = write_adapter(tmp_path / "adapter", modules, others=others)
    with pytest.raises(error, match=match):
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "out", **options)
    assert files_in(tmp_path) == ["adapter", "base"]


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    """All missing and misshapen tensors are named before anything is written."""
    base = {
        "a.weight": normal(6, 4),
        "b.weight": normal(6, 5),
        "c.weight": np.ones((6, 4), np.int8),
    }
    modules = {name: loha(6, 4) for name in ("a", "b", "c", "x.y", "z")}
    refused(
        tmp_path,
        base,
        modules,
        r"(?s)does not have \(2\): x\.y\.weight; z\.weight.*b\.weight is \[6, 5\].*c\.weight "
        r"holds int8",
    )


def test_a_tied_head_is_said_so(tmp_path):
    base = {"model.embed_tokens.weight": normal(9, 4)}
    refused(
        tmp_path,
        base,
        {"lm_head": loha(9, 4)},
        r"tied: the base has model\.embed_tokens\.weight for both",
    )


def test_a_head_that_loading_would_tie_is_refused(tmp_path):
    base = {"model.embed_tokens.weight": normal(9, 4), "lm_head.weight": normal(9, 4)}
    config = {"tie_word_embeddings": True}
    refused(
        tmp_path,
        base,
        {"lm_head": loha(9, 4)},
        r"tied to the embeddings \(tie_word_embeddings",
        config=config,
    )


def test_a_broken_adapter_is_refused(tmp_path):
    factors = loha(6, 4)
    factors["hada_w1_b"][0, 1] = np.nan
    refused(tmp_path, {"q.weight": normal(6, 4)}, {"q": factors}, r"hada_w1_b", error=FileError)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    factors = {key: 100 * value for key, value in loha(6, 4).items()}
    base = {"q.weight": normal(6, 4, dtype=np.float16)}
    refused(tmp_path, base, {"q": factors}, r"q\.weight has values that float16 cannot hold")


def test_two_adapters_that_replace_one_tensor_differently(tmp_path):
    base = write_base(tmp_path / "base", {"q.weight": normal(6, 4), "head.weight": normal(3, 6)})
    for n in "12":
        head = {"head.weight": normal(3, 6)}
        write_adapter(tmp_path / n, {"q": loha(6, 4)}, others=head, modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"each hold values for head\.weight"):
        merge_checkpoint(base, [(tmp_path / "1", 1.0), (tmp_path / "2", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_norm_layers_of_lycoris_are_added(tmp_path):
    base = {
        "blocks.0.norm.weight": normal(6),
        "blocks.0.norm.bias": normal(6),
        "blocks.0.q.weight": normal(6, 4),
    }
    w_norm, b_norm = normal(6), normal(6)
    factors = loha(6, 4, r=2)
    state = {f"lycoris_blocks_0_q.{key}": value for key, value in factors.items()}
    state |= {"lycoris_blocks_0_q.alpha": np.array(1.0, np.float32)}
    state |= {"lycoris_blocks_0_norm.w_norm": w_norm, "lycoris_blocks_0_norm.b_norm": b_norm}
    save_file(state, tmp_path / "adapter.safetensors")
    path = write_base(tmp_path / "base", base)
    merge_checkpoint(path, [(tmp_path / "adapter.safetensors", 0.5)], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    np.testing.assert_allclose(
        merged["blocks.0.norm.weight"], base["blocks.0.norm.weight"] + 0.5 * w_norm, rtol=1e-6
    )
    np.testing.assert_allclose(
        merged["blocks.0.norm.bias"], base["blocks.0.norm.bias"] + 0.5 * b_norm, rtol=1e-6
    )
    wanted = base["blocks.0.q.weight"] + 0.5 * delta(factors, 0.5)
    np.testing.assert_allclose(
        merged["blocks.0.q.weight"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


def test_only_some_modules(tmp_path):
    merge_some_modules(tmp_path)
