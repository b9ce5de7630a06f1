"""The way out: the adapter in PyTorch's twin of the model, opened by PEFT.

This needs torch and peft, which nothing else of the example does.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when peft is imported: the adapter is a local folder

import numpy as np
from minilm import EVALUATION_BATCH, Params
from movie_sentences import Tokenized

REQUIREMENTS = ("torch==2.13.0", "peft==0.21.2")


def missing_requirements() -> list[str]:
    """The ones of torch and peft that are not installed."""
    return [
        wanted for wanted in REQUIREMENTS if importlib.util.find_spec(wanted.split("==")[0]) is None
    ]


def logits_with_peft(
    adapter: Path, model_folder: Path, classifier: Params, data: Tokenized
) -> np.ndarray:
    """The logits of all sentences by PyTorch, with the adapter that PEFT read from its folder.

    Args:
        adapter: the folder that `interop.save_peft` wrote.
        model_folder: the folder of the pretrained model, which PyTorch reads by itself.
        classifier: the classifier as it was before training; PEFT puts the trained one in its
            place.
        data: the sentences.
    """
    import torch
    from peft import PeftModel
    from transformers import BertModel

    class SentenceClassifier(torch.nn.Module):
        """Module by module what the JAX side calls {"bert": ..., "classifier": ...}."""

        def __init__(self):
            super().__init__()
            self.bert = BertModel.from_pretrained(model_folder)
            self.classifier = torch.nn.Linear(*classifier["kernel"].shape)
            self.classifier.weight.data = torch.tensor(np.asarray(classifier["kernel"]).T)
            self.classifier.bias.data = torch.tensor(np.asarray(classifier["bias"]))

        def forward(self, ids, mask):
            hidden = self.bert(ids, mask).last_hidden_state
            weights = mask[..., None].to(hidden.dtype)
            return self.classifier((hidden * weights).sum(1) / weights.sum(1))

    model = PeftModel.from_pretrained(SentenceClassifier(), adapter).eval()
    logits = np.empty((len(data), classifier["bias"].shape[0]), np.float32)
    with torch.inference_mode():
        for rows, batch in data.in_order(EVALUATION_BATCH):
            scores = model(torch.tensor(batch["ids"]), torch.tensor(batch["mask"]))
            logits[rows] = scores[: len(rows)].numpy()
    return logits
