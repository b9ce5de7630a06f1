"""Adapters that PEFT saved after `resize_token_embeddings`.

Merged as in PEFT, refused on a base of the old size.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loha_jax import interop
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.interop.names.resized_vocabulary import with_vocabulary_size

OLD, NEW, WIDTH = 10, 12, 4


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def base(folder, config=None, **more):
    folder.mkdir()
    state = {"q_proj.weight": normal(6, WIDTH), "embed_tokens.weight": normal(OLD, WIDTH), **more}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": OLD} if config is None else config)
    )
    return folder


def adapter(folder, **saved):
    folder.mkdir()
    factors = {
        f"hada_w{n}_{s}": normal(*shape)
        for n in (1, 2)
        for s, shape in (("a", (6, 2)), ("b", (2, WIDTH)))
    }
    state = {f"q_proj.{part}": t for part, t in factors.items()} | saved
    save_file(
        {f"base_model.model.{key}": t for key, t in state.items()},
        folder / "adapter_model.safetensors",
    )
    modules = sorted({key.rpartition(".")[0] for key in saved})
    config = {
        "peft_type": "LOHA",
        "r": 2,
        "alpha": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": modules,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [None, np.float16])
def test_the_new_rows_and_the_new_size_are_written(dtype, tmp_path):
    rows = normal(NEW, WIDTH)
    given = adapter(tmp_path / "a", **{"embed_tokens.weight": rows})
    report = merge_checkpoint(base(tmp_path / "b"), [(given, 1.0)], tmp_path / "o", dtype=dtype)
    merged = load_file(tmp_path / "o" / "model.safetensors")
    np.testing.assert_array_equal(merged["embed_tokens.weight"], rows.astype(dtype or np.float32))
    assert merged["q_proj.weight"].shape == (6, WIDTH)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["vocab_size"] == NEW
    assert "12 rows instead of 10" in report.notes[0]
    assert "tokenizer" in report.notes[0]


@pytest.mark.parametrize(
    ("config", "more", "saved", "match"),
    [
        (
            None,
            {"lm_head.weight": (OLD, WIDTH)},
            {"embed_tokens.weight": (NEW, WIDTH)},
            r"does not hold lm_head\.weight",
        ),
        (
            None,
            {"lm_head.weight": (OLD, WIDTH)},
            {"lm_head.weight": (NEW, WIDTH)},
            r"does not hold embed_tokens\.weight",
        ),
        (
            None,
            {"lm_head.weight": (OLD, WIDTH)},
            {"lm_head.weight": (NEW, WIDTH), "embed_tokens.weight": (NEW + 1, WIDTH)},
            r"different sizes",
        ),
        (
            {"vocab_size": 99},
            {},
            {"embed_tokens.weight": (NEW, WIDTH)},
            r"'vocab_size': 99.*not the base's 10",
        ),
        (
            None,
            {},
            {"embed_tokens.weight": (NEW, WIDTH + 1)},
            r"embed_tokens\.weight is \[10, 4\].* is \[12, 5\]",
        ),
        (
            None,
            {"score.weight": (2, WIDTH)},
            {"score.weight": (3, WIDTH)},
            r"score\.weight is \[2, 4\].* is \[3, 4\]",
        ),
    ],
)
def test_what_makes_no_model_is_refused(config, more, saved, match, tmp_path):
    more, saved = ({key: normal(*shape) for key, shape in given.items()} for given in (more, saved))
    given, folder = adapter(tmp_path / "a", **saved), base(tmp_path / "b", config, **more)
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(folder, [(given, 1.0)], tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_scaled_vocabulary_is_not_resized(tmp_path):
    given, folder = (
        adapter(tmp_path / "a", **{"embed_tokens.weight": normal(NEW, WIDTH)}),
        base(tmp_path / "b"),
    )
    scaled = {"embed_tokens.weight": normal(OLD, WIDTH).astype(ml_dtypes.float8_e4m3fn)}
    scaled["embed_tokens.weight_scale"] = np.ones(1, np.float32)
    save_file({"q_proj.weight": normal(6, WIDTH), **scaled}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has 12 rows, embed_tokens\.weight 10 and a scale.*float base"
    ):
        merge_checkpoint(folder, [(given, 1.0)], tmp_path / "o")


def test_two_adapters_must_agree(tmp_path):
    given = [
        adapter(tmp_path / f"a{n}", **{"embed_tokens.weight": normal(NEW + n, WIDTH)})
        for n in range(2)
    ]
    with pytest.raises(ValueError, match=r"has 12 rows.*13"):
        merge_checkpoint(base(tmp_path / "b"), [(path, 1.0) for path in given], tmp_path / "o")


def test_the_size_in_a_nested_config():
    config = {
        "text_config": {"vocab_size": OLD, "x": 1},
        "vision_config": {"vocab_size": OLD},
        "vocab_size": 7,
    }
    want = {
        "text_config": {"vocab_size": NEW, "x": 1},
        "vision_config": {"vocab_size": OLD},
        "vocab_size": 7,
    }
    assert with_vocabulary_size(config, OLD, NEW) == want


def test_a_base_of_the_old_size_is_refused_with_what_to_do(tmp_path):
    given = adapter(tmp_path / "a", **{"embed_tokens.weight": normal(NEW, WIDTH)})
    tree = {
        "q_proj": {"kernel": normal(WIDTH, 6)},
        "embed_tokens": {"embedding": normal(OLD, WIDTH)},
    }
    with pytest.raises(
        ValueError,
        match=r"vocabulary of 12, the model has 10.*resize_token_embeddings\(12\).*append 2 rows",
    ):
        interop.load_peft(given, tree)
    tree["embed_tokens"]["embedding"] = np.pad(tree["embed_tokens"]["embedding"], ((0, 2), (0, 0)))
    params = interop.load_peft(given, tree)
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"].copies["default"], normal(NEW, WIDTH)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_is_that_of_peft(tied, tmp_path):
    torch = pytest.importorskip(
        "torch", reason="the model is transformers'; the main test run has torch"
    )
    peft = pytest.importorskip("peft", reason="the adapter is PEFT's; the main test run has it")
    transformers = pytest.importorskip(
        "transformers", reason="the model is transformers'; the main test run has it"
    )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=OLD, tie_word_embeddings=tied, **sizes)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(NEW)
    saved = None if tied else ["embed_tokens", "lm_head"]
    given = peft.LoHaConfig(
        r=2, alpha=3, target_modules=["q_proj"], modules_to_save=saved, init_weights=False
    )
    adapted = peft.get_peft_model(model, given)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or (tied and "embed_tokens" in name):
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=tied)
    ids = torch.arange(NEW)[None]
    adapted.eval()
    want = adapted(ids).logits.detach().numpy()
    merge_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == NEW
    np.testing.assert_allclose(merged(ids).logits.detach().numpy(), want, rtol=0, atol=1e-5)
