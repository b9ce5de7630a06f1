"""Which runs a task needs, in which order, given the runs that are there.

A method's learning rate is the one with the best mean validation score. All methods have the same
grid of rates. Where the best one is at an end of the grid, the grid goes on there. Then the method
runs with other seeds at that rate, and the test is read once for each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.learning.methods import METHODS
from benchmarks.learning.records import Records
from benchmarks.learning.task import Facts, Run

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
FURTHER = 4
"""The most rates that the grid goes on by, at one end."""

GROUPS = (
    ("loha-calibrated", "lora", "loha-peft"),
    ("loha-lycoris", "loha-abba", "hira"),
    ("full",),
)
"""Methods in the order in which they are done: if all is cut short, a comparison is there."""

RANKED = ("loha-calibrated", "lora", "loha-peft", "loha-lycoris", "loha-abba")
RANK_SEEDS = 2


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
        and run.seed < RANK_SEEDS
    }
    return _means(facts, runs, done, RANK_SEEDS)


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


def chosen_rate(facts: Facts, name: str, method: str, done: Records) -> float | None:
    """Return the rate that the validation chooses; None while it needs more runs."""
    scores = validation(facts, name, method, done)
    if not set(grid(method)) <= set(scores):
        return None
    best, ladder = best_rate(facts, scores), sorted(scores)
    return None if _next_rate(method, best, ladder) else best


def comparison(
    facts: Facts, name: str, methods: Iterable[str], seeds: int, done: Records
) -> Iterator[Run]:
    """Yield the missing runs of a task's comparison; the first of them is right for now.

    Call it anew after each run: the later ones depend on its score.
    """
    for group in [[method for method in group if method in methods] for group in GROUPS]:
        of = _maker(facts, name)
        wanted = [
            of(method, "validation", rate * METHODS[method].rates, seed)
            for rate in middle_out(RATES)
            for method in group
            for seed in range(facts.choice_seeds)
        ]
        yield from (run for run in wanted if run not in done)
        rates = {}
        for method in group:
            scores = validation(facts, name, method, done)
            if not scores:
                return
            rates[method] = best_rate(facts, scores)
            if rate := _next_rate(method, rates[method], sorted(scores)):
                further = [
                    of(method, "validation", rate, seed) for seed in range(facts.choice_seeds)
                ]
                yield from (run for run in further if run not in done)
        wanted = [of(m, "test", rate, seed) for seed in range(seeds) for m, rate in rates.items()]
        yield from (run for run in wanted if run not in done)


def ranks(facts: Facts, name: str, methods: Iterable[str], done: Records) -> Iterator[Run]:
    """Yield the missing runs over ranks at one shared rate, scored on the validation part."""
    for r in facts.ranks:
        for seed in range(RANK_SEEDS):
            for method in RANKED:
                run = Run(name, "validation", method, r, facts.shared_rate, seed)
                if method in methods and run not in done:
                    yield run


def _next_rate(method: str, best: float, ladder: Sequence[float]) -> float | None:
    """Return the rate with which the grid goes on where its best one is at an end."""
    lowest, highest = grid(method)[0], grid(method)[-1]
    if best == ladder[0] and best > lowest / 2**FURTHER:
        return best / 2
    if best == ladder[-1] and best < highest * 2**FURTHER:
        return best * 2
    return None


def _maker(facts: Facts, name: str) -> Callable[[str, str, float, int], Run]:
    return lambda method, stage, rate, seed: Run(name, stage, method, facts.r, rate, seed)
