"""Learning of LoHa beside LoRA, HiRA and full fine-tuning: `python -m benchmarks.learning`.

README.md says how, and has the results.
"""

import sys
from pathlib import Path

# The tasks take their models and data from the examples.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
