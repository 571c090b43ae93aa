"""Many tasks: memory of scheduler and client, and tasks per second, for 200 000 that do nothing.

    python scripts/bench/tasks.py [--tasks 200_000] [--toy] [--save FILE]

Scheduler, worker and client are processes of their own. The worker offers the resources GPU and CPU, and half of the
tasks are of each kind, as flows and masks are: Dask's scheduler never queues tasks that need resources, so the
window is all that keeps it small. The client goes through the loop that a run goes through
(`cluster.Executor.work`).

Targets: the scheduler stays under 300 MiB, the client under 200 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from process import high_water
from report import Table, Target, finish, parser, save

TASKS, TOY_TASKS = 200_000, 400
SLOTS = 16
"""Tasks at once of each kind."""
LIMITS_MIB = {"scheduler": 300.0, "client": 200.0}
MIB = 2**20
START_S = 60
COLUMNS = {"tasks": 10, "seconds": 10, "tasks/s": 10, "scheduler MiB": 15, "client MiB": 12, "worker MiB": 12}


def nothing(item: int) -> int:
    """Task: as little as one can do."""
    return item


def run_client(scheduler: str, n_tasks: int) -> dict[str, Any]:
    """Do the tasks by the executor of a run; for a process that does nothing else."""
    from tiledseg.cluster import connect, peak_memory
    from tiledseg.tasks import Tasks

    counts = {"network": 0, "cpu": 0}

    def tasks(kind: str, n: int) -> Tasks:
        def took(_item: int, _result: int) -> None:
            counts[kind] += 1

        return Tasks(kind, nothing, range(n), kind=kind, took=took)

    with connect(scheduler=scheduler) as executor:
        executor.device("cpu")
        start = time.perf_counter()
        executor.work(tasks("network", n_tasks // 2), tasks("cpu", n_tasks - n_tasks // 2))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "done": sum(counts.values()), "peak": peak_memory()[1]}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """A scheduler and a worker in processes of their own; the scheduler's file, and the ids of both."""
    file = folder / "scheduler.json"
    here = ("--host", "127.0.0.1", "--scheduler-file", str(file))
    slots = ("--nthreads", str(2 * SLOTS), "--resources", f"GPU={SLOTS} CPU={SLOTS}", "--no-nanny", "--no-dashboard")
    commands = {
        "scheduler": ("scheduler", *here, "--port", "0", "--dashboard-address", "127.0.0.1:0"),
        "worker": ("worker", *here, *slots, "--memory-limit", "0", "--local-directory", str(folder)),
    }
    with contextlib.ExitStack() as stack:
        pids = {}
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("w"))
            # The folder of this script, so that the worker finds the task.
            running = subprocess.Popen(
                [sys.executable, "-m", "dask", *command], stdout=log, stderr=log, cwd=Path(__file__).parent
            )
            stack.callback(running.wait)
            stack.callback(running.terminate)
            pids[name] = running.pid
            until = time.monotonic() + START_S
            while not file.exists() and time.monotonic() < until:
                time.sleep(0.05)
        yield str(file), pids


def measure(n_tasks: int) -> dict[str, Any]:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="tiledseg-bench-") as folder, cluster(Path(folder)) as (file, pids):
        command = [sys.executable, __file__, "--client", file, "--tasks", str(n_tasks)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parent)
        found = json.loads(ended.stdout)
        peaks = {f"{name} MiB": high_water(pid) / MIB for name, pid in pids.items()}
    rate = found["done"] / found["seconds"]
    return {
        "tasks": found["done"],
        "seconds": found["seconds"],
        "tasks/s": rate,
        "client MiB": found["peak"] / MIB,
        **peaks,
    }


def targets_of(row: dict[str, Any], n_tasks: int) -> list[Target]:
    """What the row is held against."""
    missing = Target("tasks that did not come back", n_tasks - row["tasks"], 0, at_least=False, needs_size=False)
    peaks = [
        Target(f"MiB of the {name}", row[f"{name} MiB"], limit, at_least=False) for name, limit in LIMITS_MIB.items()
    ]
    return [missing, *peaks]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--tasks", type=int, default=TASKS, metavar="N", help="how many")
    made.add_argument("--client", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.client:
        # By its name, and not as the script that was started, workers can import the task.
        from tasks import run_client as run

        print(json.dumps(run(options.client, options.tasks)))
        return 0
    n_tasks = min(options.tasks, TOY_TASKS) if options.toy else options.tasks
    table = Table(COLUMNS)
    table.add(measure(n_tasks))
    save(options.save, table.rows)
    return finish(targets_of(table.rows[0], n_tasks), table.rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
