"""The tasks by name. A task's model is loaded when a run needs it."""

from __future__ import annotations

from benchmarks.learning.task import Facts, Task


def _text(quick: bool) -> Task:
    from benchmarks.learning import text  # it reads the weights of a model

    return text.task(quick)


def _image(quick: bool) -> Task:
    from benchmarks.learning import image

    return image.task(quick)


def _language(quick: bool) -> Task:
    from benchmarks.learning import language  # it reads the weights of a model

    return language.task(quick)


TASKS = {
    "text": Facts(
        load=_text,
        score="accuracy",
        higher_is_better=True,
        r=8,
        choice_seeds=2,
        test_seeds=5,
        goal=0.5,
        shared_rate=4e-3,
        ranks=(2, 8, 32, 64),
    ),
    "image": Facts(
        load=_image,
        score="accuracy",
        higher_is_better=True,
        r=2,
        choice_seeds=5,
        test_seeds=30,
        goal=0.3,
        shared_rate=4e-3,
        ranks=(1, 2, 4, 8, 16, 32),
    ),
    "language": Facts(
        load=_language,
        score="loss",
        higher_is_better=False,
        r=8,
        choice_seeds=2,
        test_seeds=5,
        goal=4.3,
        shared_rate=4e-3,
        ranks=(2, 8, 32),
    ),
}
