"""What loha-jax asks for beside a trainer, and what it imports."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements", reason="pip's own, not everywhere")

ROOT = Path(__file__).parents[1]
# What pip chose for EasyDeL 0.3.0, whose own pin is flax==0.12.3.
EASYDEL = {
    "jax": "0.9.2",
    "flax": "0.12.3",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "jaxtyping": "0.3.11",
    "safetensors": "0.8.0",
    "regex": "2026.11.19",
    "typer": "0.29.2",
    "rich": "15.0.0",
}


def test_what_easydel_brings_is_enough():
    """loha-jax asks for nothing else and for nothing newer."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [packaging.Requirement(line) for line in project["dependencies"]]
    assert {requirement.name for requirement in needed} == set(EASYDEL)
    for requirement in needed:
        assert requirement.specifier.contains(EASYDEL[requirement.name]), requirement


@pytest.mark.slow
def test_pip_keeps_the_versions_that_easydel_brings():
    """pip's dry run with these versions. It needs a package index."""
    pins = [f"{name}=={version}" for name, version in EASYDEL.items()]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    result = subprocess.run(
        [*pip, "--report", "-", str(ROOT), *pins], capture_output=True, text=True, check=False
    )
    if any(word in result.stderr for word in ("NewConnectionError", "No module named pip")):
        pytest.skip("there is no package index, or no pip")
    assert result.returncode == 0, result.stderr
    chosen = {x["metadata"]["name"]: x for x in json.loads(result.stdout)["install"]}
    assert "loha-jax" in chosen
    for name, version in EASYDEL.items():
        assert chosen[name]["metadata"]["version"] == version


PLAIN_TREE = """
import sys, jax, jax.numpy as jnp, loha_jax
from loha_jax import interop
config = loha_jax.LoHaConfig(r=2, target_modules=["dense"])
tree = {"dense": {"kernel": jnp.ones((4, 3))}}
tree = loha_jax.inject(tree, config, key=jax.random.key(0))
loha_jax.adapt(lambda p, x: x @ p["dense"]["kernel"])(tree, jnp.ones((2, 4)))
interop.save_peft(sys.argv[1], tree)
lazy = {"flax", "optax", "orbax", "jax.experimental.pallas"}
print(sorted(lazy & {*sys.modules, *(name.split(".")[0] for name in sys.modules)}))
"""


def test_a_plain_tree_imports_no_flax_optax_orbax_or_pallas(tmp_path):
    """They are imported where they are used."""
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_TREE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
