"""All cases, and each by its name."""

from benchmarks import convnet, linear, transformers
from benchmarks.case import Case, Settings

SUBJECTS = {"linear": linear.cases, "transformers": transformers.cases, "convnet": convnet.cases}


def cases(settings: Settings) -> list[Case]:
    """The cases of all subjects."""
    return [case for of_subject in SUBJECTS.values() for case in of_subject(settings)]


def find(name: str, settings: Settings) -> Case:
    """The case of that name.

    Raises:
        ValueError: there is none.
    """
    named = {case.name: case for case in cases(settings)}
    if name not in named:
        raise ValueError(f"There is no case {name!r}, but {', '.join(named)}")
    return named[name]
