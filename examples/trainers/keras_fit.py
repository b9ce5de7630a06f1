"""Keras' own `fit` on an adapted model; the base does not change, and the file fits PEFT.

    KERAS_BACKEND=jax python examples/trainers/keras_fit.py [--steps N] [--out DIR]

It takes half a minute. It needs `pip install -e ".[keras]"`.
"""

import argparse
from pathlib import Path

import jax
import keras
import numpy as np

import loha_jax
from loha_jax import interop

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path("out/keras_fit"))
args = parser.parse_args()

keras.utils.set_random_seed(0)
up = keras.layers.Dense(32, "relu", name="up")
model = keras.Sequential([keras.Input((8,)), up, keras.layers.Dense(1, name="down")])
config = loha_jax.LoHaConfig(r=4, target_modules=["up", "down"], init_weights="calibrated")
loha_jax.keras.inject(model, config, key=jax.random.key(0))

x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
y = np.sin(x[:, :1])
model.compile(keras.optimizers.Adam(1e-2), "mse")
losses = model.fit(x, y, batch_size=64, epochs=args.steps, verbose=0).history["loss"]
print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}, trained: {len(model.trainable_variables)}")
interop.save_peft(args.out / "adapter", model)
