"""When this process will be ended by whoever runs it.

Convention: seconds since the epoch in the environment, of the end: EMDVOL_DEADLINE (which the package's own job
scripts set) or SLURM_JOB_END_TIME, and of the begin: EMDVOL_BEGIN or SLURM_JOB_START_TIME. SLURM before 23.02 sets
neither, and is asked. A task that cannot finish before the end is not started: it raises :class:`OutOfTime`, which is
no failure; another process takes the task.
"""

from __future__ import annotations

import os
import subprocess
import time
from functools import cache

from emdiffuse_vol.errors import ClusterError, ConfigError

END = ("EMDVOL_DEADLINE", "SLURM_JOB_END_TIME")
BEGIN = ("EMDVOL_BEGIN", "SLURM_JOB_START_TIME")
RESERVE = 10.0  # seconds to say goodbye in
SAFETY = 1.5  # blocks differ


class OutOfTime(Exception):
    """The process ends before a task would."""


def seconds_left() -> float | None:
    """None where nothing is known of an end."""
    end = _moment(END)
    if end is None and (job := os.environ.get("SLURM_JOB_ID")):
        end = _end_of_job(job)
    return None if end is None else end - time.time()


def check_time(expected: float) -> None:
    """expected: seconds that a task has been seen to take.

    Raises OutOfTime; ClusterError where a process that has just begun says so, as all that replace it would.
    """
    left, needed = seconds_left(), SAFETY * expected + RESERVE
    if left is None or left >= needed:
        return
    begin = _moment(BEGIN)
    if begin is not None and (passed := time.time() - begin) < left / 3:
        raise ClusterError(
            f"a block takes {expected:.0f} s, which needs {needed:.0f} s, and jobs last {passed + left:.0f} s; "
            f"give them a longer walltime, or the run smaller blocks"
        )
    raise OutOfTime(f"{max(left, 0):.0f} s are left, and a block takes {expected:.0f} s")


def _moment(names: tuple[str, ...]) -> float | None:
    for name in names:
        if value := os.environ.get(name, ""):
            try:
                return float(value)
            except ValueError:
                raise ConfigError(f"{name} is {value!r}, expected seconds since 1970, as `date +%s` gives") from None
    return None


@cache
def _end_of_job(job: str) -> float | None:
    """As SLURM says it now; None where it does not answer, or the job has no limit."""
    try:
        command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return time.mktime(time.strptime(asked.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
