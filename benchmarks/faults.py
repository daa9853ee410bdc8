"""Kill anywhere (law 8): runs that are struck at random moments, continued by the same command, and compared.

    python benchmarks/faults.py [--trials 120] [--seed 0] [--kinds driver,work] benchmarks/results/faults.json

Convention: a trial is a kind and a seed, and these alone decide what is struck, how often, and at which *moments*: at a
share of the time that an unbroken run takes, or some milliseconds after the n-th change that is seen in the files of a
stage (creation, shards, ledger, pyramid, seal). Every start of a process is the same command as before. A trial is
passed when that command ends with 0, every file of the image has the bytes of an unbroken run, the ledger says of each
block that it is done, with the checksum of what is stored, nothing lies beside the output, no process is left, and
nobody was shown a traceback. After each strike, blocks that are recorded must be on disk.

A network of two channels with random weights, and 9 blocks with two levels above them: what is tried is the engine.
Starting Python takes most of the time. Disks that fill up and places that become read-only are small file systems in
memory; mounting them needs root. Kills just before the n-th system call of a sort need strace. Where these cannot be
had, their kinds are left out and the report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from striking.bench import Bench
from striking.dask import kill_cluster_worker, kill_dask_driver, kill_dask_worker, kill_scheduler
from striking.disks import fill_disk, no_disks, protect_place
from striking.drivers import (
    kill_at_system_call,
    kill_driver,
    kill_work,
    no_tracing,
    replace_output,
    stop_driver,
    two_drivers,
)
from striking.processes import Failed
from striking.trial import Trial

from emdiffuse_vol import __version__


@dataclass(frozen=True)
class Kind:
    """share: of 22 trials. lacking: why it cannot be tried here, or nothing."""

    run: Callable[[Trial], None]
    share: int
    lacking: Callable[[], str] = lambda: ""


KINDS = {
    "driver": Kind(kill_driver, 4),
    "work": Kind(kill_work, 2),
    "two drivers": Kind(two_drivers, 2),
    "disk full": Kind(fill_disk, 2, no_disks),
    "read-only": Kind(protect_place, 2, no_disks),
    "system call": Kind(kill_at_system_call, 2, no_tracing),
    "signal": Kind(stop_driver, 1),
    "overwrite": Kind(replace_output, 1),
    "dask driver": Kind(kill_dask_driver, 2),
    "dask worker": Kind(kill_dask_worker, 2),
    "scheduler": Kind(kill_scheduler, 1),
    "cluster worker": Kind(kill_cluster_worker, 1),
}


def schedule(kinds: list[str], trials: int, seed: int) -> list[tuple[str, int]]:
    """Kinds in turn, each as often as its share, so that any hundred trials hold all of them."""
    rounds = max(KINDS[kind].share for kind in kinds)
    order = [kind for turn in range(rounds) for kind in kinds if turn < KINDS[kind].share]
    return [(kind, seed * 100_000 + number) for number, kind in enumerate(islice(cycle(order), trials))]


def attempt(bench: Bench, kind: str, seed: int) -> dict[str, Any]:
    """One trial -> what happened. ``problems`` is empty where all is well."""
    folder = bench.folder / f"{kind.replace(' ', '-')}-{seed}"
    trial, started = Trial(bench, kind, seed, folder), time.monotonic()
    trial.out.parent.mkdir(parents=True)
    try:
        KINDS[kind].run(trial)
        if not trial.judged:
            trial.verdict()
    except Failed as failed:
        trial.problems.append(str(failed))
    except Exception:  # of the harness or of a reader: a trial that cannot be judged is not passed
        trial.problems.append(traceback.format_exc())
    finally:
        trial.end()
    if not trial.problems:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "kind": kind,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "strikes": trial.strikes,
        "reruns": trial.reruns,
        **trial.notes,
        "result": "identical" if not trial.problems else "FAILED",
        **({"problems": trial.problems} if trial.problems else {}),
    }


def summarise(rows: list[dict[str, Any]], bench: Bench, left_out: dict[str, str]) -> dict[str, Any]:
    problems = [problem for row in rows for problem in row.get("problems", ())]
    by_kind = {
        kind: {
            "trials": len(own := [row for row in rows if row["kind"] == kind]),
            "identical": sum(row["result"] == "identical" for row in own),
            "strikes": sum(len(row["strikes"]) for row in own),
            "reruns": sum(row["reruns"] for row in own),
            "seconds": round(sum(row["seconds"] for row in own), 1),
        }
        for kind in KINDS
        if any(row["kind"] == kind for row in rows)
    }
    return {
        "made_by": "benchmarks/faults.py",
        "emdiffuse_vol": __version__,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "unbroken_seconds": round(bench.seconds, 1),
        "trials": len(rows),
        "identical": sum(row["result"] == "identical" for row in rows),
        "strikes": sum(len(row["strikes"]) for row in rows),
        "kills": sum("SIGKILL" in s["what"] or "killed" in s["what"] for row in rows for s in row["strikes"]),
        "trials_never_struck": sum(not row["strikes"] for row in rows),
        "lost": sum(problem.startswith("lost") for problem in problems),
        "corrupt": sum(problem.startswith(("corrupt", "recorded")) for problem in problems),
        "manual_steps": sum(not problem.startswith(("lost", "corrupt", "recorded")) for problem in problems),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "stages_struck": dict(Counter(_stage(s["state"]) for row in rows for s in row["strikes"])),
        "left_out": left_out,
        "by_kind": by_kind,
        "runs": rows,
    }


def _stage(state: str) -> str:
    """What was going on: the first stage that was not whole."""
    if ":" not in state:
        return state
    counts = [int(part.rpartition(":")[2]) for part in state.replace("level ", "level").split()]
    totals = (9, 5, 3)
    return next(
        (n for n, c, t in zip(("blocks", "level 1", "level 2"), counts, totals, strict=True) if c < t), "sealing"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--only", type=int, help="number of one trial, to see it again")
    asked = parser.parse_args()
    # Of a command in the background, shells make one that ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kinds = asked.kinds.split(",")
    left_out = {kind: why for kind in kinds if (why := KINDS[kind].lacking())}
    folder = Path(tempfile.mkdtemp(prefix="emdvol-faults-"))
    rows: list[dict[str, Any]] = []
    bench = Bench(folder)
    plan = schedule([kind for kind in kinds if kind not in left_out], asked.trials, asked.seed)
    for number, (kind, seed) in enumerate(plan):
        if asked.only not in (None, seed):
            continue
        rows.append(attempt(bench, kind, seed))
        row = rows[-1]
        hit = "; ".join(f"{s['what']} at {s['moment']} ({s['state']})" for s in row["strikes"])
        print(f"{number + 1}/{len(plan)} {kind} {seed}: {row['result']}, {row['seconds']} s, {hit}", flush=True)
        for problem in row.get("problems", ()):
            print(f"    {problem}", flush=True)
        # After each: what has been seen is kept, whatever becomes of the rest.
        asked.report.write_text(json.dumps(summarise(rows, bench, left_out), indent=2) + "\n")
    failed = [row for row in rows if row["result"] != "identical"]
    if failed:
        print(f"{len(failed)} of {len(rows)} trials failed; their folders are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
