"""Trials of disks that fill up or become read-only: small file systems in memory, which need root."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from striking.bench import TOOL
from striking.moments import choose_moment
from striking.processes import LIMIT, Failed, one_line, run_quietly
from striking.trial import BALLAST, Trial

DISK = 12 << 20  # bytes; the output needs 1.5 MB
IMPATIENT = (
    "import emdiffuse_vol.reconstruct.drive as drive; drive.PLACE_PATIENCE = 3.0; "
    "from emdiffuse_vol.cli.main import run; run()"
)


class Disk:
    """A small file system in memory, at the place of a trial's output."""

    def __init__(self, place: Path) -> None:
        self.place = place
        run_quietly("mount", "-t", "tmpfs", "-o", f"size={DISK}", "emdvol", str(place))

    def fill(self, left: int) -> None:
        """All but ``left`` bytes, rounded down to what the file system counts in."""
        with suppress(OSError), (self.place / BALLAST).open("ab", buffering=0) as file:
            while True:
                free = os.statvfs(self.place)
                size = free.f_bavail * free.f_frsize - left
                if size <= 0 or not file.write(bytes(min(size, 1 << 20))):
                    return

    def free(self) -> None:
        (self.place / BALLAST).unlink(missing_ok=True)

    def read_only(self) -> None:
        """Refused while a file is open for writing, as it is half of the time."""
        deadline = time.monotonic() + LIMIT
        while run_quietly("mount", "-o", "remount,ro", str(self.place), check=False):
            if time.monotonic() > deadline:
                raise Failed("the file system never let itself be made read-only")

    def writable(self) -> None:
        run_quietly("mount", "-o", "remount,rw", str(self.place))

    def close(self) -> None:
        run_quietly("umount", "-l", str(self.place))


@contextmanager
def disk(trial: Trial) -> Iterator[Disk]:
    found = Disk(trial.out.parent)
    try:
        yield found
        trial.verdict()  # before it is gone
    finally:
        trial.end()
        found.close()


def no_disks() -> str:
    """Why file systems cannot be mounted here; empty where they can."""
    if os.geteuid():
        return "mounting a small file system needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            Disk(Path(folder)).close()
        except (OSError, subprocess.CalledProcessError):
            return "file systems cannot be mounted here"
    return ""


def fill_disk(trial: Trial) -> None:
    """The disk is full for a moment, until the driver gives up, or while it is killed."""
    left = trial.dice.choice((0, 0, trial.dice.randrange(1 << 16)))
    with disk(trial) as its:
        _trouble(trial, "disk full", lambda: its.fill(left), its.free)


def protect_place(trial: Trial) -> None:
    """The place of the output is read-only for a moment, until the driver gives up, or while it is killed."""
    with disk(trial) as its:
        _trouble(trial, "read-only", its.read_only, its.writable)


def _trouble(trial: Trial, what: str, begin: Callable[[], None], mend: Callable[[], None]) -> None:
    """Drivers that are to give up do so after 3 s rather than a minute."""
    how = trial.dice.choice(("retried", "retried", "stopped", "killed"))
    tool = (sys.executable, "-c", IMPATIENT, "--quiet") if how == "stopped" else TOOL
    command = trial.command("--workers", str(trial.dice.choice((1, 2))), tool=tool)
    moment = choose_moment(trial.dice, trial.bench.seconds, seen=0.25)
    seconds = trial.dice.uniform(0.2, 6)
    driver = trial.start(command)
    if not trial.reached(driver, moment):
        trial.expect(driver, 0)
        return
    begin()
    trial.struck(f"{what}, {how}", moment, driver)
    if how == "stopped":
        status = trial.expect(driver, 0, 1)  # 0: there was nothing left to write
    else:
        deadline = time.monotonic() + seconds
        while driver.status is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if how == "killed":
            driver.kill()
    trial.inspect()
    mend()
    status = driver.wait() if how == "killed" else trial.expect(driver, 0, 1)
    if status:
        if how == "retried" and moment.event in ("shard", "ledger", "pyramid"):
            trial.problems.append(f"the driver did not wait for a moment: {driver.said()}")
        if status == 1 and not one_line(driver):
            trial.problems.append(f"the driver did not end with one line: {driver.said()}")
        trial.notes["ended"] = driver.said()[:200]
        trial.finish(command)
