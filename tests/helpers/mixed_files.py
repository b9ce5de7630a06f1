"""Adapter files of several kinds, and their updates by formulas in float64."""

import re

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import interop
from loha_jax.interop.merge.files import merge_checkpoint

SHAPES = {
    "q": (6, 4),
    "k": (6, 4),
    "conv": (6, 4, 3, 3),
    "one": (6, 4, 1, 1),
    "c1": (6, 4, 3),
    "c3": (6, 4, 2, 3, 3),
}
KERNELS = {"conv": "kkio", "one": "kkio", "c1": "kio", "c3": "kkkio"}


def normal(*shape, seed=0):
    random = np.random.default_rng((seed, *shape))
    return (random.normal(size=shape) * 0.5).astype(np.float32)


def weight(name):
    return normal(*SHAPES[name], seed=9)


def loha(name, form="flat", r=2):
    """The factors of a module, as LyCORIS ("flat") or OneTrainer ("conv") write them."""
    out, *into = SHAPES[name]
    ones = (1,) * (len(into) - 1)
    a, b = ((out, r), (r, int(np.prod(into)))) if form == "flat" else ((out, r, *ones), (r, *into))
    return {
        f"hada_w{n}_{s}": normal(*shape, seed=n)
        for n in (1, 2)
        for s, shape in (("a", a), ("b", b))
    }


def lora(name, r=2, names=("lora_up", "lora_down")):
    out, *into = SHAPES[name]
    up, down = normal(out, r, *(1,) * (len(into) - 1), seed=3), normal(r, *into, seed=4)
    return {f"{names[0]}.weight": up, f"{names[1]}.weight": down}


def delta(name, tensors, scale=1.0):
    """ΔW in float64, by the definition of each kind."""
    t = {part: np.asarray(value, np.float64) for part, value in tensors.items()}
    if "hada_w1_a" in t:
        sides = [t[f"hada_w{n}_a"].reshape(SHAPES[name][0], -1) for n in (1, 2)]
        products = [
            side @ t[f"hada_w{n}_b"].reshape(side.shape[1], -1) for n, side in enumerate(sides, 1)
        ]
        return scale * (products[0] * products[1]).reshape(SHAPES[name])
    if "diff" in t:
        return t["diff"].reshape(SHAPES[name])
    (up,) = (v for part, v in t.items() if re.search(r"up|lora_B", part))
    (down,) = (v for part, v in t.items() if re.search(r"down|lora_A", part))
    if "lora_mid.weight" in t:
        r = down.shape[0]
        middle = t["lora_mid.weight"].reshape(r, r, -1)
        product = np.einsum("op,pqk,qi->oik", up.reshape(-1, r), middle, down.reshape(r, -1))
        return scale * product.reshape(SHAPES[name])
    return scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(SHAPES[name])


def write(path, modules, prefix="lora_unet_down_", extra=None, metadata=None):
    state = {
        f"{prefix}{name}.{part}": np.asarray(t)
        for name, parts in modules.items()
        for part, t in parts.items()
    }
    save_file({**state, **(extra or {})}, path, metadata)
    return path


def tree(*names):
    """The base in JAX' layouts: torch's `[out, in, *spatial]` as `[*spatial, in, out]`."""
    kernels = {name: np.moveaxis(weight(name), (0, 1), (-1, -2)) for name in names}
    return {
        "down": {
            name: {"kernel": jnp.asarray(kernel), "bias": jnp.ones(6)}
            for name, kernel in kernels.items()
        }
    }


def loaded(path, names, **options):
    layouts = {f"down.{name}": KERNELS[name] for name in names if name in KERNELS}
    params = loha_jax.merge(interop.load_lycoris(path, tree(*names), layouts=layouts, **options))
    return {
        name: np.moveaxis(np.asarray(params["down"][name]["kernel"]), (-1, -2), (0, 1))
        for name in names
    }


def base(folder, *names):
    folder.mkdir(exist_ok=True)
    save_file({f"down.{name}.weight": weight(name) for name in names}, folder / "model.safetensors")
    return folder


def merged(tmp_path, path, names, **options):
    merge_checkpoint(
        base(tmp_path / "base", *names), [(path, 1.0)], tmp_path / "out", force=True, **options
    )
    return {
        k.split(".")[1]: v for k, v in load_file(tmp_path / "out" / "model.safetensors").items()
    }


def same(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
