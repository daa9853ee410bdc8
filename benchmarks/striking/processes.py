"""Commands in processes of their own, and what they have started."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

LIMIT = 240.0  # seconds after which a process is taken to hang


class Failed(Exception):
    """Something that must not happen, in words."""


class Process:
    """A command in a session of its own; what it prints goes to files, so that a full pipe stops nobody."""

    def __init__(self, command: list[str], folder: Path, name: str) -> None:
        self.command, self.name = command, name
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True, cwd=folder)
        self.pid = self._process.pid
        self.started = time.monotonic()

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)  # not to another that has its number by now

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float = LIMIT) -> int:
        """Exit status. Raises Failed where it hangs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"{self.name} hung: no end in {seconds:.0f} s; {self.said()}") from None

    def said(self) -> str:
        """The end of what it had to complain of."""
        return self.err.read_text(errors="replace").strip()[-600:]

    @property
    def showed_traceback(self) -> bool:
        return "Traceback" in self.err.read_text(errors="replace")

    def family(self) -> list[int]:
        """Other processes of its session that still run."""
        return [pid for pid in processes(self.pid) if pid != self.pid]


def processes(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def dask_workers(process: Process) -> list[int]:
    """Processes that nannies of this process have started."""
    found = []
    for pid in process.family():
        with suppress(OSError):
            said = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"spawn_main" in said and b"resource_tracker" not in said:
                found.append(pid)
    return found


def one_line(process: Process) -> bool:
    """Whether a command that failed said why, and no more."""
    return len(process.said().splitlines()) == 1 and process.said().startswith("Error: ")


def run_quietly(*command: str, check: bool = True) -> int:
    return subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
