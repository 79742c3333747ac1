"""Samples of programs, with what other processes took of the machine meanwhile.

A sample is one run of one program that prints a number. Samples of several programs alternate, so
that a change of the machine meets all of them. A sample during which other processes used more than
`QUIET` CPUs is kept, and marked as disturbed: a busy machine is said, not hidden.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUIET = 0.10  # CPUs that others may use in an undisturbed sample
SKIPPED = 3  # exit status of a program that cannot do what was asked
LIMIT_S = 900.0  # of one sample


@dataclass(frozen=True)
class Runner:
    """A program whose samples are numbers; `read` finds the number in what it prints."""

    name: str
    command: tuple[str, ...]
    read: Callable[[str], dict[str, Any]]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Series:
    """The samples of one runner: values, CPUs that others used, and the last sample's details."""

    name: str
    command: str = ""
    values: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    @property
    def median(self) -> float:
        """Of the undisturbed samples if there are any, else of all."""
        return statistics.median(self.undisturbed or self.values)

    @property
    def undisturbed(self) -> list[float]:
        """Samples during which the machine was quiet."""
        return [v for v, o in zip(self.values, self.others, strict=True) if o <= QUIET]

    def to_json(self) -> dict[str, Any]:
        """For the result file."""
        if self.skipped or not self.values:
            return {"name": self.name, "command": self.command, "skipped": self.skipped}
        return {
            "name": self.name,
            "command": self.command,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": self.values,
            "other_cpus": [round(o, 3) for o in self.others],
            "disturbed": len(self.values) - len(self.undisturbed),
            "detail": self.detail,
        }


def last_json(text: str) -> dict[str, Any]:
    """The last line of `text` that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    raise ValueError(f"no result in {text[-500:]!r}")


def _busy_seconds() -> float:
    """CPU seconds that all processes have used since the start: user, nice, system, irq, steal."""
    with open("/proc/stat", encoding="ascii") as stream:
        fields = [int(text) for text in stream.readline().split()[1:]]
    return (fields[0] + fields[1] + fields[2] + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(most_s: float) -> bool:
    """Waits until others use less than `QUIET` CPUs, at most `most_s` seconds."""
    end = time.monotonic() + most_s
    while time.monotonic() < end:
        before, start = _busy_seconds(), time.monotonic()
        time.sleep(0.5)
        if (_busy_seconds() - before) / (time.monotonic() - start) < QUIET:
            return True
    return False


def sample(runner: Runner, series: Series) -> None:
    """Runs once and adds the value, or the reason why there is none."""
    environment = os.environ | dict(runner.environment)
    own = os.times()
    before, start = _busy_seconds(), time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            runner.command, stdout=out, stderr=err, env=environment, stdin=subprocess.DEVNULL
        )
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            series.skipped = f"took more than {LIMIT_S:.0f} s"
            return
        wall = time.monotonic() - start
        total = _busy_seconds() - before
        out.seek(0)
        err.seek(0)
        printed, complaint = out.read(), err.read().strip()
    now = os.times()
    ours = sum(now[:4]) - sum(own[:4])  # this process and its children
    if process.returncode:
        reason = complaint.splitlines()[-1] if complaint else "no message"
        series.skipped = (
            reason if process.returncode == SKIPPED else f"exit {process.returncode}: {reason}"
        )
        return
    detail = runner.read(printed)
    series.values.append(float(detail["value"]))
    series.others.append(max(total - ours, 0.0) / wall)
    series.detail = detail


def alternate(
    runners: Sequence[Runner],
    samples: int,
    patience_s: float,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Series]:
    """`samples` samples of each, taken in turn; `step` is told before each."""
    result = {r.name: Series(r.name, " ".join(r.command)) for r in runners}
    for _ in range(samples):
        for runner in runners:
            step(runner.name)
            series = result[runner.name]
            if not series.skipped:
                wait_for_quiet(patience_s)
                sample(runner, series)
    return result


def machine(limits: Path | None, runs: int, threads: int) -> dict[str, Any]:
    """What the machine can do right now; empty without the program."""
    if limits is None:
        return {}
    done = subprocess.run(
        [str(limits), str(threads), str(runs)], capture_output=True, text=True, check=True
    )
    return last_json(done.stdout)
