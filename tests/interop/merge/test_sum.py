import numpy as np
from merge_inputs import delta, loha, normal, read_all, write_adapter, write_base

from loha_jax.interop.merge import shard as merge_shard
from loha_jax.interop.merge.files import merge_checkpoint


def test_compiled_sums_match_numpy_whatever_the_block(tmp_path, monkeypatch):
    base = {"q.weight": normal(67, 33)}
    path = write_base(tmp_path / "base", base)
    factors = loha(67, 33, r=12)  # above what is unrolled
    adapter = write_adapter(tmp_path / "adapter", {"q": factors})
    for block in (1, 133 * 4, 1 << 20):
        monkeypatch.setattr(merge_shard, "_BLOCK", block)
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / f"{block}")
        wanted = base["q.weight"] + delta(factors, 0.5)
        merged = read_all(tmp_path / f"{block}")["q.weight"]
        np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
