import json

import jax.numpy as jnp
import numpy as np
import pytest
from lycoris_trees import same_tensors, written

import loha_jax
from loha_jax import interop
from loha_jax.tree.leaves import SavedWeight

STACKED = {"layers.q": "sio", "layers.conv": "skkio"}


class TestStacks:
    """Kernels that hold several modules, as `nn.scan` and `vmap` make them."""

    @staticmethod
    def base():
        random = np.random.default_rng(0)
        return {
            "layers": {
                "q": {"kernel": jnp.asarray(random.standard_normal((3, 5, 4)), jnp.float32)},
                "conv": {
                    "kernel": jnp.asarray(random.standard_normal((3, 2, 2, 5, 4)), jnp.float32)
                },
            }
        }

    @staticmethod
    def module(name, r, alpha=1.0, cores=False, dora=None):
        random = np.random.default_rng(len(name) + r)
        shapes = {
            "hada_w1_a": (4, r),
            "hada_w1_b": (r, 5),
            "hada_w2_a": (4, r),
            "hada_w2_b": (r, 5),
        }
        if "conv" in name:
            shapes |= dict.fromkeys(("hada_w1_b", "hada_w2_b"), (r, 20))
        if cores:
            shapes = {part: (r, 4 if part[-1] == "a" else 5) for part in shapes}
            shapes |= {"hada_t1": (r, r, 2, 2), "hada_t2": (r, r, 2, 2)}
        if dora is not None:
            shapes["dora_scale"] = dora
        tensors = {
            part: random.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()
        }
        return {
            f"lycoris_{name}.{part}": t
            for part, t in {"alpha": np.float32(alpha), **tensors}.items()
        }

    def load(self, tmp_path, state):
        return interop.load_lycoris(written(tmp_path, state), self.base(), layouts=STACKED)

    def test_modules_that_the_file_lacks_are_not_adapted(self, tmp_path):
        state = {
            **self.module("layers_0_q", 2, dora=(4, 1)),
            **self.module("layers_2_q", 3, alpha=0.5, dora=(4, 1)),
            **self.module("layers_1_conv", 2, cores=True),
        }
        params = self.load(tmp_path, state)
        same_tensors(interop.to_lycoris_state_dict(params), state)
        q, merged = (
            self.base()["layers"]["q"]["kernel"],
            loha_jax.merge(params)["layers"]["q"]["kernel"],
        )
        np.testing.assert_array_equal(merged[1], q[1])
        for index, r, alpha in ((0, 2, 1.0), (2, 3, 0.5)):
            t = {
                k.rpartition(".")[2]: v.astype(np.float64)
                for k, v in state.items()
                if f"layers_{index}_q" in k
            }
            delta = (
                alpha / r * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
            )
            rows = np.asarray(q[index], np.float64).T + delta
            rows *= t["dora_scale"] / np.linalg.norm(rows, axis=1, keepdims=True)
            np.testing.assert_allclose(merged[index], rows.T, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("layers_0_conv", {}), ("layers_1_conv", {"cores": True})),
            (("layers_0_q", {}), ("layers_1_q", {"dora": (4, 1)})),
            (("layers_0_q", {"dora": (1, 5)}), ("layers_1_q", {"dora": (4, 1)})),
        ],
    )
    def test_modules_of_different_forms(self, one, other, tmp_path):
        """Modules of different forms in one kernel are refused by name."""
        state = {
            k: v
            for name, options in (one, other)
            for k, v in self.module(name, 2, **options).items()
        }
        name = one[0].replace("_", ".")
        with pytest.raises(
            ValueError, match=rf"one stacked kernel holds modules of different forms: {name} has"
        ):
            self.load(tmp_path, state)


class TestNorms:
    """`train_norm=True`: differences of LayerNorm's and GroupNorm's parameters."""

    @staticmethod
    def base(dtype=jnp.float32):
        random = np.random.default_rng(3)
        values = iter(jnp.asarray(random.standard_normal(4), dtype) for _ in range(9))

        def norm():
            return {"scale": next(values), "bias": next(values)}

        return {
            "q": {"kernel": jnp.ones((4, 4), dtype)},
            "norm": norm(),
            "block": {"norm": norm(), "q": {"kernel": jnp.ones((4, 4), dtype)}},
        }

    @staticmethod
    def state():
        random = np.random.default_rng(4)
        state = TestStacks.module("q", 2)
        state = {k: v[:, :4] if k.endswith("_b") else v for k, v in state.items()}
        return state | {
            f"lycoris_norm.{part}": random.standard_normal(4).astype(np.float32)
            for part in ("w_norm", "b_norm")
        }

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_they_are_added_to_copies(self, dtype, tmp_path):
        base, state = self.base(dtype), self.state()
        params = interop.load_lycoris(written(tmp_path, state), base)
        merged = loha_jax.merge(params)
        for parameter, part in (("scale", "w_norm"), ("bias", "b_norm")):
            leaf = params["norm"][parameter]
            assert isinstance(leaf, SavedWeight)
            assert leaf.original is base["norm"][parameter]
            want = (
                base["norm"][parameter].astype(jnp.float32) + state[f"lycoris_norm.{part}"]
            ).astype(dtype)
            np.testing.assert_array_equal(merged["norm"][parameter], want)
        assert (
            merged["block"]["norm"]["scale"] is base["block"]["norm"]["scale"]
        )  # "norm" matches its end
        ours = interop.to_lycoris_state_dict(params)
        assert ours.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_allclose(
                ours[key], value, rtol=0, atol=3e-2 if dtype == jnp.bfloat16 else 5e-7
            )

    def test_a_norm_without_a_difference_of_its_bias(self, tmp_path):
        state = {k: v for k, v in self.state().items() if not k.endswith("b_norm")}
        params = interop.load_lycoris(written(tmp_path, state), self.base())
        np.testing.assert_array_equal(params["norm"]["bias"], self.base()["norm"]["bias"])
        assert not interop.to_lycoris_state_dict(params)["lycoris_norm.b_norm"].any()

    def test_a_module_within_one_that_is_called_like_it(self, tmp_path):
        """`modules_to_save=["norm"]` would exclude `block.norm.q`."""
        base = self.base()
        base["block"]["norm"]["q"] = base["block"].pop("q")
        state = self.state()
        state |= {
            key.replace("_q.", "_block_norm_q."): value
            for key, value in state.items()
            if "_q." in key
        }
        params = interop.load_lycoris(written(tmp_path, state), base)
        assert interop.to_lycoris_state_dict(params).keys() == state.keys()

    def test_a_stack_of_norms_is_refused_by_its_path(self, tmp_path):
        base = {
            "layers": {"q": {"kernel": jnp.ones((2, 4, 4))}, "norm": {"scale": jnp.ones((2, 4))}}
        }
        names = {r"layers\.(.*)": [r"layers.0.\1", r"layers.1.\1"]}
        state = {
            key.replace("lycoris_", "lycoris_layers_1_"): t
            for key, t in self.state().items()
            if "b_norm" not in key
        }
        with pytest.raises(
            ValueError, match=r"layers\.norm\.scale of shape \[2, 4\] holds a stack"
        ):
            interop.load_lycoris(
                written(tmp_path, state), base, names=names, layouts={"layers.q": "sio"}
            )

    def test_they_go_through_peft(self, tmp_path):
        base = {name: value for name, value in self.base().items() if name != "block"}
        params = interop.load_lycoris(written(tmp_path, self.state()), base)
        interop.save_peft(tmp_path / "peft", params)
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())[
            "modules_to_save"
        ] == ["norm"]
        again = interop.load_peft(tmp_path / "peft", base)
        same_tensors(interop.to_lycoris_state_dict(again), interop.to_lycoris_state_dict(params))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"lycoris_norm.w_norm": np.ones(5, np.float32)},
                r"norm\.w_norm: \[5\] in the file, \[4\] in the model",
            ),
            (
                {"lycoris_nrom.w_norm": np.ones(4, np.float32)},
                r"the tree lacks \(1\): lycoris_nrom \(the tree has norm\)",
            ),
            ({"lycoris_norm.alpha": np.float32(1)}, r"\blycoris_norm\b.*alpha"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            interop.load_lycoris(written(tmp_path, self.state() | change), self.base())
