"""Which runs a task needs, in which order, given the runs that are there.

A method's learning rate is the one with the best mean validation score. All methods have the same
grid of rates. Where the best one is at an end of the grid, the grid goes on there. Then the method
runs with other seeds at that rate, and the test is read once for each seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.learning.methods import METHODS
from benchmarks.learning.records import Records
from benchmarks.learning.task import Facts, Run

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MIDDLE = 3
"""The rates in the middle of the grid, which are run first."""
FURTHER = 4
"""The most rates that the grid goes on by, at one end."""

GROUPS = (
    ("loha-calibrated", "lora", "loha-abba", "loha-peft"),
    ("loha-lycoris", "hira"),
    ("full",),
    ("loha-calibrated-plus", "lora-plus"),
    ("loha-calibrated-decay", "loha-calibrated-clip", "lora-clip"),
)
"""Methods in the order in which they are done: if all is cut short, a comparison is there."""

RANKED = ("loha-calibrated", "lora", "loha-peft", "loha-lycoris", "loha-abba")


def middle_out(rates: Sequence[float]) -> list[float]:
    """Return the rates, the middle ones first."""
    middle = (len(rates) - 1) / 2
    return [rates[n] for n in sorted(range(len(rates)), key=lambda n: abs(n - middle))]


def grid(method: str) -> list[float]:
    """Return the method's rates from the lowest to the highest."""
    return [rate * METHODS[method].rates for rate in RATES]


def validation(facts: Facts, name: str, method: str, done: Records) -> dict[float, float]:
    """Return the mean validation score of each rate that all seeds of the choice have run with."""
    runs = {
        run: run.rate
        for run in done
        if run[:4] == (name, "validation", method, facts.r) and run.seed < facts.choice_seeds
    }
    return _means(facts, runs, done, facts.choice_seeds)


def rank_scores(facts: Facts, name: str, method: str, done: Records) -> dict[float, float]:
    """Return the mean validation score at the shared rate of each rank that all seeds have."""
    runs = {
        run: run.r
        for run in done
        if run[:3] == (name, "validation", method)
        and run.rate == facts.shared_rate
        and run.seed < facts.choice_seeds
    }
    return _means(facts, runs, done, facts.choice_seeds)


def _means(
    facts: Facts, settings: Mapping[Run, float], done: Records, seeds: int
) -> dict[float, float]:
    """Return the mean score of each setting that has so many runs.

    A score that is not finite is the worst that there is.
    """
    worst = -float("inf") if facts.higher_is_better else float("inf")
    scores: dict[float, list[float]] = {}
    for run, setting in settings.items():
        score = done[run]["score"]
        scores.setdefault(setting, []).append(worst if score is None else score)
    return {
        setting: sum(found) / len(found)
        for setting, found in sorted(scores.items())
        if len(found) == seeds
    }


def best_rate(facts: Facts, scores: dict[float, float]) -> float:
    """Return the rate of the best score; of equal ones the lowest."""
    sign = 1 if facts.higher_is_better else -1
    return max(scores, key=lambda rate: (sign * scores[rate], -rate))


def is_settled(facts: Facts, name: str, method: str, done: Records) -> bool:
    """Return whether no run is missing before the choice of the rate."""
    scores = validation(facts, name, method, done)
    return set(grid(method)) <= set(scores) and not _next_rate(facts, method, scores)


def comparison(
    facts: Facts, name: str, methods: Iterable[str], seeds: int, done: Records
) -> Iterator[Run]:
    """Yield the missing runs of a task's comparison; the first of them is right for now.

    Call it anew after each run: the later ones depend on its score. The test follows already the
    middle of the grid. It is read anew if the rest of the grid moves the choice.
    """

    def missing(stage: str, settings: Iterable[tuple[str, float]], count: int) -> Iterator[Run]:
        runs = [
            Run(name, stage, method, facts.r, rate, seed)
            for seed in range(count)
            for method, rate in settings
        ]
        return (run for run in runs if run not in done)

    for group in [[method for method in group if method in methods] for group in GROUPS]:
        for rates in (middle_out(RATES)[:MIDDLE], middle_out(RATES)):
            wanted = [(m, rate * METHODS[m].rates) for rate in rates for m in group]
            yield from missing("validation", wanted, facts.choice_seeds)
            scores = {method: validation(facts, name, method, done) for method in group}
            if not all(scores.values()):
                return
            further = {method: _next_rate(facts, method, scores[method]) for method in group}
            if len(rates) == len(RATES):
                wanted = [(method, rate) for method, rate in further.items() if rate]
                yield from missing("validation", wanted, facts.choice_seeds)
            best = [(method, best_rate(facts, found)) for method, found in scores.items()]
            yield from missing("test", best, seeds)


def ranks(facts: Facts, name: str, methods: Iterable[str], done: Records) -> Iterator[Run]:
    """Yield the missing runs over ranks at one shared rate, scored on the validation part."""
    for r in facts.ranks:
        for seed in range(facts.choice_seeds):
            for method in RANKED:
                run = Run(name, "validation", method, r, facts.shared_rate, seed)
                if method in methods and run not in done:
                    yield run


def _next_rate(facts: Facts, method: str, scores: dict[float, float]) -> float | None:
    """Return the rate with which the grid goes on where its best one is at an end."""
    lowest, highest = grid(method)[0], grid(method)[-1]
    best = best_rate(facts, scores)
    if best == min(scores) and lowest / 2**FURTHER < best <= lowest:
        return best / 2
    if best == max(scores) and highest <= best < highest * 2**FURTHER:
        return best * 2
    return None
