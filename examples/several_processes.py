"""Training in several processes; one is killed, and other numbers of processes resume it.

    python examples/several_processes.py            the demonstration: all processes on this machine
    python examples/several_processes.py train ...  one process; on a cluster, JAX finds the others

It takes 2 minutes on two cores. It needs nothing besides loha-jax.

The base's kernels, the factors and the optimizer's state are split over all devices (fsdp); each
process reads its own rows of the data, and writes its own part of the checkpoints. A run of two
processes is interrupted by SIGKILL; four processes, and one, restore what it left and go on. Every
loss is compared with those of a run that nobody interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEVICES = 4  # of all processes together, where they run on one machine
STEPS, SAVED_EVERY, KILLED_AFTER = 30, 5, 12
ROWS, WIDTH = 64, 128
GRACE_S = 20


def train(options: argparse.Namespace) -> None:
    """One process of a run: trains until `--steps`, from the newest checkpoint if there is one."""
    import jax

    if options.coordinator:  # on this machine; on a cluster JAX asks its scheduler
        jax.config.update("jax_num_cpu_devices", DEVICES // options.processes)
        if options.processes > 1:
            jax.distributed.initialize(options.coordinator, options.processes, options.process)
    else:
        jax.distributed.initialize()

    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from sklearn.datasets import load_digits

    import loha_jax
    from loha_jax import interop
    from loha_jax.train import fit

    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))

    def init(key):
        sizes = {"up": (64, WIDTH), "middle": (WIDTH, WIDTH), "down": (WIDTH, 12)}
        keys = jax.random.split(key, len(sizes))
        return {
            name: {"kernel": jax.random.normal(k, size) / size[0] ** 0.5}
            for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def model(params, x):
        x = jax.nn.gelu(x @ params["up"]["kernel"])
        x = jax.nn.gelu(x @ params["middle"]["kernel"])
        return x @ params["down"]["kernel"]

    # Each device makes its own part of the base: no process ever holds all of it.
    base = jax.jit(init, out_shardings=NamedSharding(mesh, P("fsdp")))(jax.random.key(0))
    config = loha_jax.LoHaConfig(
        r=4, alpha=4, target_modules=["up", "middle", "down"], rank_dropout=0.1
    )
    params = loha_jax.inject(base, config, key=jax.random.key(1))

    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))

    def batches(used: int):
        """This process' rows of each batch, from the first one that was not used yet."""
        own = ROWS // jax.process_count()
        for n in range(used, options.steps):
            rows = np.take(order, range(n * ROWS, (n + 1) * ROWS), mode="wrap")[
                jax.process_index() * own :
            ][:own]
            yield {"x": pixels[rows].astype(np.float32) / 16, "y": digits[rows].astype(np.int32)}

    run = loha_jax.adapt(model)

    def loss_fn(params, batch, key):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            run(params, batch["x"]), batch["y"]
        )
        return jnp.mean(losses)

    def report(step: int, metrics: dict[str, float]) -> None:
        if jax.process_index() == 0:
            with open(options.log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": metrics["loss"]}) + "\n")
        if options.pause:
            time.sleep(options.pause)

    result = fit(
        loss_fn,
        params,
        optax.adamw(1e-2),
        batches,
        key=jax.random.key(2),
        steps=options.steps,
        sharding=NamedSharding(mesh, P("fsdp")),
        checkpoints=options.folder,
        checkpoint_every=SAVED_EVERY,
        on_metrics=report,
        progress=False,
    )
    interop.save_peft(Path(options.folder) / "adapter", result.params)


class Run:
    """The processes of one run on this machine."""

    def __init__(self, processes: int, folder: Path, log: Path, pause: float = 0.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [
            sys.executable,
            __file__,
            "train",
            "--coordinator",
            address,
            "--processes",
            str(processes),
        ]
        command += ["--folder", str(folder), "--log", str(log), "--pause", str(pause)]
        self.log = log
        self.outputs = [log.with_suffix(f".{n}") for n in range(processes)]
        self.processes = []
        for n, path in enumerate(self.outputs):
            with path.open("w") as output:
                process = subprocess.Popen(
                    [*command, "--process", str(n)], stdout=output, stderr=subprocess.STDOUT
                )
            self.processes.append(process)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def losses(self) -> dict[int, float]:
        """The losses that the run has reported, by step."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}

    def wait_for(self, step: int) -> None:
        """Waits until a step has been reported."""
        while step not in self.losses():
            self._check()
            time.sleep(0.05)

    def finish(self) -> dict[int, float]:
        """Waits for the end of all processes, and returns the losses."""
        while any(process.poll() is None for process in self.processes):
            self._check()
            time.sleep(0.1)
        self._check()
        return self.losses()

    def _check(self) -> None:
        for number, process in enumerate(self.processes):
            if process.poll():
                raise SystemExit(
                    f"process {number} failed: "
                    f"{process.returncode}\n{self.outputs[number].read_text()}"
                )

    def kill_one(self) -> None:
        """Kills the last process, and the others when they have noticed, as schedulers do."""
        self.processes[-1].send_signal(signal.SIGKILL)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(
            process.poll() is None for process in self.processes
        ):
            time.sleep(0.1)
        self.kill()

    def kill(self) -> None:
        """Kills all processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def demonstrate(options: argparse.Namespace) -> None:
    """Runs, kills, restores on other numbers of processes, and compares the losses."""
    import shutil

    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from safetensors.numpy import load_file

    console = Console()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        console.print(f"Training {STEPS} steps in one process with {DEVICES} devices, undisturbed")
        with Run(1, folder / "whole", folder / "whole.log") as run:
            whole = run.finish()

        first, *others = options.processes
        console.print(f"The same in {first} processes; one is killed after step {KILLED_AFTER}")
        with Run(first, folder / "run", folder / "run.log", pause=0.2) as run:
            run.wait_for(KILLED_AFTER)
            run.kill_one()
            killed = run.losses()
        columns: dict[str, dict[int, float]] = {f"{first} processes, killed": killed}
        for count in others:
            console.print(f"Restoring in {count} process{'es' if count > 1 else ''}")
            shutil.copytree(folder / "run", folder / f"run{count}")
            with Run(count, folder / f"run{count}", folder / f"run{count}.log") as run:
                columns[f"resumed in {count}"] = run.finish()
        adapters = {
            count: load_file(folder / f"run{count}" / "adapter" / "adapter_model.safetensors")
            for count in others
        }
        expected = load_file(folder / "whole" / "adapter" / "adapter_model.safetensors")

    table = Table("step", "one process", *columns, title="Losses")
    shown = [1, SAVED_EVERY, SAVED_EVERY + 1, *range(2 * SAVED_EVERY, STEPS + 1, SAVED_EVERY)]
    for step in shown:
        cells = [
            f"{losses[step]:.6f}" if step in losses else "" for losses in (whole, *columns.values())
        ]
        table.add_row(str(step), *cells)
    console.print(table)
    problems = [f"the undisturbed run has {len(whole)} losses"] if len(whole) != STEPS else []
    for name, losses in columns.items():
        worst = max(abs(loss - whole[step]) / abs(whole[step]) for step, loss in losses.items())
        console.print(
            f"{name}: steps {min(losses)} to {max(losses)}, largest relative difference {worst:.1e}"
        )
        if not worst < 1e-4:
            problems.append(f"{name}: losses differ by {worst:.1e}")
    for name, losses in list(columns.items())[1:]:
        if not 1 < min(losses) <= max(killed) + 1 or max(losses) != STEPS:
            problems.append(f"{name}: it went from step {min(losses)} to {max(losses)}")
    for count, tensors in adapters.items():
        worst = max(float(np.abs(tensors[name] - expected[name]).max()) for name in expected)
        console.print(
            f"PEFT's file of the run resumed in {count}: largest difference of a factor {worst:.1e}"
        )
        if not worst < 1e-4:
            problems.append(f"the adapter of the run resumed in {count} differs by {worst:.1e}")
    if not np.isfinite(list(whole.values())).all() or not whole[STEPS] < 0.8 * whole[1]:
        problems.append("the model did not learn")
    if max(killed) == STEPS:
        problems.append("the run that was to be killed came to its end")
    if problems:
        raise SystemExit("; ".join(problems))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[2, 4, 1],
        help="at first, and of each resumption",
    )
    parser.set_defaults(run=demonstrate)
    one = parser.add_subparsers().add_parser("train", help="one process of a run")
    one.add_argument("--folder", default="run", help="of the checkpoints; all processes see it")
    one.add_argument("--log", default="losses.jsonl", help="file for the losses")
    one.add_argument("--steps", type=int, default=STEPS)
    one.add_argument(
        "--coordinator", help="address of the first process, where all run on one machine"
    )
    one.add_argument("--processes", type=int, default=1)
    one.add_argument("--process", type=int, default=0)
    one.add_argument("--pause", type=float, default=0.0, help="seconds to wait after each step")
    one.set_defaults(run=train)
    options: Any = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
