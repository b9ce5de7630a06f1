import math

import numpy as np
import pytest
from merge_inputs import normal

from loha_jax.interop.updates.low_rank_update import LowRankUpdate
from loha_jax.interop.updates.norms import difference_norm, update_norm


@pytest.mark.parametrize("ranks", [(4, 4), (16, 16), (3,), (1, 1)])
@pytest.mark.parametrize("shape", [(50, 30), (7, 90)])
def test_norms_and_differences_without_the_matrix(ranks, shape):
    def update(scale):
        pairs = tuple((normal(shape[0], r), normal(r, shape[1])) for r in ranks)
        return LowRankUpdate(pairs, scale)

    def dense(u):
        product = math.prod(
            (a.astype(np.float64) @ b.astype(np.float64) for a, b in u.pairs), start=np.float64(1)
        )
        return u.scale * product

    a, b = update(0.5), update(-1.5)
    np.testing.assert_allclose(update_norm(a), np.linalg.norm(dense(a)), rtol=1e-12)
    np.testing.assert_allclose(
        difference_norm(a, b), np.linalg.norm(dense(a) - dense(b)), rtol=1e-12
    )
    (left, right), *others = a.pairs
    near = LowRankUpdate(((left * np.float32(1 + 2**-20), right), *others), a.scale)
    np.testing.assert_allclose(
        difference_norm(a, near), np.linalg.norm(dense(a) - dense(near)), rtol=1e-6
    )
    assert difference_norm(a, a) == 0
