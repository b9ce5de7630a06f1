"""Measures loha-jax beside PEFT, LyCORIS and the frozen base, all in one run, and prints tables.

    python -m benchmarks [linear|transformers|convnet|lifecycle|lora_conversion|all|CASE]
                         [--json FILE]

A CASE is one of a subject's, like llama or linear-768-8-256; an unknown one lists them all.

Each record is written to FILE as soon as it is there. `python -m benchmarks.report FILE` prints the
tables again. Without torch, peft or lycoris-lora, what needs them is left out. On a GPU, JAX and
PyTorch both use it. `python -m benchmarks accelerators` asks the compilers of TPUs instead.
"""

import argparse
import dataclasses
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import accelerators, catalogue, lifecycle, lora_conversion, report, results, runner
from benchmarks.case import NotInstalled, Settings
from benchmarks.measure import Neighbours, machine
from benchmarks.workers import Record, Workers

OTHERS = {"lifecycle": lifecycle.records, lora_conversion.SUBJECT: lora_conversion.records}
"""What is no case of a model."""

Job = tuple[str, Iterable[Record]]


def main() -> int:
    args = _arguments()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # or the workers would outlive this process
    repeats = args.repeats or (0 if args.quick else Settings.repeats)
    settings = Settings(args.quick, args.dtype, repeats, args.budget)
    about, options = machine(), dataclasses.asdict(settings)
    records: list[Record] = []
    failed = 0
    neighbours = Neighbours()
    for name, job in _jobs(args.subject, settings):
        start = time.perf_counter()
        try:
            for record in job:
                records.append(record | {"others_cores": neighbours.cores()})
                results.write(args.json, about, options, records)
                runner.say(f"{name}, {record['kind']}: {time.perf_counter() - start:.0f} s")
                start = time.perf_counter()
        except NotInstalled as missing:
            runner.say(f"{name}: skipped, not installed: {missing}")
        except Exception:  # one case must not cost the others
            failed += 1
            runner.say(f"{name}: FAILED\n{traceback.format_exc()}")
    print(report.report({"machine": about, "settings": options, "records": records}))
    print(f"\nwritten to {args.json}")
    return 1 if failed else 0


def _jobs(chosen: str, settings: Settings) -> Iterator[Job]:
    """The measurements of a subject or a case, with new processes for each subject."""
    for subject, of_subject in catalogue.SUBJECTS.items():
        cases = [case for case in of_subject(settings) if chosen in (subject, case.name, "all")]
        if cases:
            with Workers(settings) as workers:
                for n, case in enumerate(cases, 1):
                    yield f"[{n}/{len(cases)}] {case.name}", runner.records(case, settings, workers)
    for name, records in OTHERS.items():
        if chosen in (name, "all"):
            yield name, records(settings)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", nargs="?", default="all", help="or a case; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: only to see that everything works"
    )
    parser.add_argument("--repeats", type=int, help=f"at most so many turns ({Settings.repeats})")
    parser.add_argument(
        "--budget",
        type=float,
        default=Settings.budget,
        help="seconds for the turns of a case (%(default)s)",
    )
    parser.add_argument(
        "--dtype", default=Settings.dtype, choices=["float32", "bfloat16"], help="of the base"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("out/benchmarks.json"), help="the results (%(default)s)"
    )
    args = parser.parse_args()
    known = [case.name for case in catalogue.cases(Settings(quick=args.quick))]
    if args.subject not in (*catalogue.SUBJECTS, *OTHERS, "all", *known):
        parser.error(f"no subject or case {args.subject!r}; cases: {', '.join(known)}")
    return args


if __name__ == "__main__":
    if sys.argv[1:2] == ["accelerators"]:
        sys.exit(accelerators.main(sys.argv[2:]))
    sys.exit(main())
