"""Teaches all-MiniLM-L6-v2 to tell praise from blame in film reviews, with LoHa, in minutes.

A real pretrained model, in a third-party Flax implementation that is used as it is, and sentences
that people rated. LoHa trains 1.3 % of the parameters and is compared with a linear probe on the
frozen encoder. The adapter is saved as PyTorch PEFT saves it; where torch and peft are installed,
PEFT opens it and repeats the test.

It takes 4 minutes on two cores; with `--quick`, on a slice, less than a minute. It needs what
`python3 run.py example` in the repository installs before it runs this. Where that is installed
already: `python examples/finetune_minilm.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

try:
    import jax
    import numpy as np
    import optax
    from minilm import (
        Encoder,
        Params,
        classify,
        embed,
        init_classifier,
        load_minilm,
        load_tokenizer,
        model_folder,
    )
    from movie_sentences import CLASSES, JobError, Tokenized, load, split
    from peft_check import logits_with_peft, missing_requirements
    from report import (
        History,
        Outcome,
        Stopwatch,
        console,
        peak_memory,
        plot_curves,
        show_comparison,
        write_results,
    )
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from threadpoolctl import threadpool_limits

    import loha_jax
    from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone
    from loha_jax.train import fit
except ImportError as error:
    sys.exit(
        f"{error}\nThe example needs more than this Python has; `python3 run.py example` installs "
        "it and runs it."
    )

INTRODUCTION = """
[bold]all-MiniLM-L6-v2[/bold] turns sentences into vectors; it was not trained for sentiment. \
Here it learns to tell whether a sentence from a film review is praise or blame, in two ways:
 • [bold]probe[/bold]: the encoder stays as it is, and a logistic regression reads its vectors;
 • [bold]LoHa[/bold]: each attention matrix W becomes W + (w1_a·w1_b) ⊙ (w2_a·w2_b) · alpha/r. \
W is frozen; the four thin factors, and a linear classifier, are trained.
All choices are made on the validation sentences; the test sentences are read once, at the end."""

LOHA = loha_jax.LoHaConfig(
    r=8,
    alpha=16,
    target_modules=["query", "key", "value", "attention.output.dense"],
    modules_to_save=["classifier"],
)
LARGEST_DIFFERENCE = 1e-4  # that the logits of PEFT may have from ours
QUICK = (480, 160, 320)  # training, validation and test sentences of --quick


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run. Learning rate and batch size are the best after one epoch."""

    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = (
        4e-3  # of the factors, at the end of the warm-up; then linearly down to 0
    )
    head_learning_rate: float = 5e-3
    warmup: float = 0.1
    validations: int = 4
    seed: int = 0


def train(
    logits: Callable[[Params, Any], jax.Array],
    params: Params,
    data: Tokenized,
    validate: Callable[[Params], float],
    settings: Settings,
) -> tuple[Params, History, dict[str, float]]:
    """Trains the adapter in `params`.

    Args:
        logits: the model: a function of parameters and batch.
        params: a tree that `loha_jax.inject` made.
        data: the training sentences.
        validate: a function of parameters: the accuracy on the validation sentences.
        settings: how to train.

    Returns:
        The tree as it was at its best validation, the course of the training, and the seconds it
        took.
    """
    rng = np.random.default_rng(settings.seed)
    batches = [
        batch for _ in range(settings.epochs) for batch in data.epoch(settings.batch_size, rng)
    ]
    adapted_logits = loha_jax.adapt(logits)  # the same function; no ΔW is built
    best: tuple[float, Params] = (-1.0, params)

    def loss_fn(params: Params, batch: Any, key: jax.Array) -> jax.Array:
        scores = adapted_logits(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["labels"]).mean()

    def evaluate(params: Params) -> dict[str, float]:
        nonlocal best
        best = max(best, (accuracy := validate(params), params), key=lambda pair: pair[0])
        return {"accuracy": accuracy}

    result = fit(
        loss_fn,
        params,
        make_optimizer(settings, steps=len(batches)),
        batches,
        key=jax.random.key(settings.seed),
        evaluate=evaluate,
        eval_every=-(-len(batches) // settings.validations),
        on_metrics=say_validation,
    )
    losses = [row["loss"] for row in result.history if "loss" in row]
    validations = [
        (int(row["step"]), row["eval_accuracy"]) for row in result.history if "eval_accuracy" in row
    ]
    return best[1], History(losses, validations), result.seconds


def say_validation(step: int, metrics: dict[str, float]) -> None:
    """Prints the outcome of a validation."""
    if "eval_accuracy" in metrics:
        console.print(f"  step {step}: validation accuracy {metrics['eval_accuracy']:.4f}")


def make_optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and decay, and a learning rate of its own for the classifier."""

    def adamw(peak: float) -> optax.GradientTransformation:
        warmup = round(settings.warmup * steps)
        ramps = [
            optax.linear_schedule(0, peak, warmup),
            optax.linear_schedule(peak, 0, steps - warmup),
        ]
        return optax.adamw(optax.join_schedules(ramps, [warmup]), weight_decay=0.0)

    def label(path: tuple[Any, ...], _: Any) -> str:
        return "classifier" if path[0].key == "classifier" else "factors"

    return optax.multi_transform(
        {
            "factors": adamw(settings.learning_rate),
            "classifier": adamw(settings.head_learning_rate),
        },
        partial(jax.tree_util.tree_map_with_path, label),
    )


def fit_probe(vectors: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """Logistic regression on frozen vectors, regularised by 5-fold cross-validation on them."""
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": np.logspace(-3, 1, 9)}, cv=5)
    with threadpool_limits(
        1
    ):  # dozens of small fits: more threads would mostly wait for each other
        return search.fit(vectors, labels).best_estimator_  # type: ignore[return-value]


def run(settings: Settings, out: Path, quick: bool) -> None:
    """The whole job: data, baseline, training, test, export, PEFT.

    Raises:
        JobError: the data or the model could not be had, or PEFT does not agree.
    """
    out.mkdir(parents=True, exist_ok=True)

    headline("Data and model")
    folder = model_folder()
    sentences = split(load())
    if quick:
        sentences = [part.take(range(count)) for part, count in zip(sentences, QUICK, strict=True)]
    tokenizer = load_tokenizer(folder)
    train_data, validation_data, test_data = (Tokenized(part, tokenizer) for part in sentences)
    model, bert = load_minilm(folder)
    console.print(
        f"{len(train_data):,} sentences to train with, {len(validation_data):,} to validate, "
        f"{len(test_data):,} to test. The first of them:\n  “{sentences[0].texts[0]}” "
        f"({CLASSES[sentences[0].labels[0]]})"
    )

    headline("Baseline: a linear probe on the frozen encoder")
    probe_clock = Stopwatch()
    with probe_clock.measure("compile"):
        encode = Encoder(model, bert)
    with probe_clock.measure("train"):
        probe = fit_probe(encode(bert, train_data), train_data.labels)
    probe_memory = peak_memory()
    probe_accuracy = accuracy(
        np.asarray(probe.predict(encode(bert, validation_data))), validation_data
    )
    console.print(
        f"C = {probe.C:.2g} by cross-validation; validation accuracy {probe_accuracy:.4f}"
    )

    headline("LoHa")
    classifier_key, loha_key = jax.random.split(jax.random.key(settings.seed))
    base_params = {
        "bert": bert,
        "classifier": init_classifier(encode.features, len(CLASSES), classifier_key),
    }
    params = loha_jax.inject(base_params, LOHA, key=loha_key)
    summary = loha_jax.summary(params)
    console.print(summary.totals)

    def logits(params: Params, batch: Any) -> jax.Array:
        return classify(
            params["classifier"], embed(model, params["bert"], batch["ids"], batch["mask"])
        )

    def predict(params: Params, data: Tokenized) -> np.ndarray:
        merged = loha_jax.merge(
            params
        )  # plain arrays, hence the encoder that was compiled for the probe
        return np.asarray(classify(merged["classifier"], encode(merged["bert"], data)))

    def validate(params: Params) -> float:
        return accuracy(predict(params, validation_data).argmax(1), validation_data)

    params, history, seconds = train(logits, params, train_data, validate, settings)
    loha_memory = peak_memory()
    plot_curves(history, probe_accuracy, out / "curves.png")
    interop.save_peft(out / "adapter", params)
    console.print(
        f"Kept the state after step {history.best[0]}, of validation accuracy "
        f"{history.best[1]:.4f}.\nLearning curves: {out / 'curves.png'}. Adapter, as PEFT reads "
        f"it: {out / 'adapter'}"
    )

    headline("Test")
    test_logits = predict(params, test_data)
    probe_outcome = Outcome(
        right=np.asarray(probe.predict(encode(bert, test_data))) == test_data.labels,
        parameters=encode.features + 1,
        compile_seconds=probe_clock.seconds["compile"],
        train_seconds=probe_clock.seconds["train"],
        peak_memory=probe_memory,
    )
    loha_outcome = Outcome(
        right=test_logits.argmax(1) == test_data.labels,
        parameters=summary.trainable_params,
        compile_seconds=seconds["compile"],
        train_seconds=seconds["train"],
        peak_memory=loha_memory,
    )
    show_comparison(probe_outcome, loha_outcome)

    headline("The same adapter in PyTorch")
    largest_difference = None
    if missing := missing_requirements():
        console.print(
            f"Left out. To have PEFT open the adapter too: pip install {' '.join(missing)}"
        )
    else:
        peft_logits = logits_with_peft(
            out / "adapter", folder, base_params["classifier"], test_data
        )
        largest_difference = check_agreement(test_logits, peft_logits, test_data)
    write_results(
        out / "results.json",
        probe_outcome,
        loha_outcome,
        settings=dataclasses.asdict(settings),
        validations=history.validations,
        validate_seconds=seconds["evaluate"],
        largest_logit_difference_to_peft=largest_difference,
    )


def check_agreement(ours: np.ndarray, theirs: np.ndarray, data: Tokenized) -> float:
    """Compares the logits of JAX and of PEFT and returns their largest difference.

    Raises:
        JobError: they differ by more than rounding, or in accuracy.
    """
    difference = float(np.abs(ours - theirs).max())
    our_accuracy, their_accuracy = accuracy(ours.argmax(1), data), accuracy(theirs.argmax(1), data)
    console.print(
        f"PEFT opened the adapter. The largest difference of a logit is {difference:.1e}; test "
        f"accuracy: {their_accuracy:.4f} in PyTorch, {our_accuracy:.4f} in JAX."
    )
    if not difference < LARGEST_DIFFERENCE or our_accuracy != their_accuracy:
        raise JobError(
            f"JAX and PEFT should agree to {LARGEST_DIFFERENCE:g} and in accuracy. This is a "
            "defect."
        )
    return difference


def accuracy(predicted: np.ndarray, data: Tokenized) -> float:
    """The share of sentences whose label was found."""
    return float((predicted == data.labels).mean())


def headline(text: str) -> None:
    """Starts a part of the output."""
    console.print()
    console.rule(f"[bold]{text}", align="left")


def main() -> int:
    """Reads the command line and runs the job."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes all-MiniLM-L6-v2 with LoHa on rated film reviews and opens the "
        "result in PyTorch PEFT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a slice of the data, less than a minute"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/minilm"), help="folder for the results"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=Settings.seed,
        help="of the factors and the order of the batches",
    )
    parser.add_argument(
        "--epochs", type=int, default=Settings.epochs, help="times through the data"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=Settings.learning_rate, help="of the factors"
    )
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs should be 1 or more")
    console.print(INTRODUCTION)
    try:
        settings = Settings(
            epochs=options.epochs, learning_rate=options.learning_rate, seed=options.seed
        )
        if options.quick:
            settings = dataclasses.replace(settings, validations=2)
        run(settings, options.out, options.quick)
    except (JobError, OSError) as error:
        console.print(f"\n{error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
