"""Samples of programs, with what other processes took of the machine meanwhile.

A sample is one run of one program that prints a number. Samples of several programs alternate, so
that a change of the machine meets all of them. A sample during which other processes used more than
`QUIET` CPUs is kept, and marked as disturbed: a busy machine is said, not hidden.

On a machine that is never quiet, `cpu` mode compares CPU time instead: a program runs a long and a
short workload on one thread, and the difference of work is divided by that of the CPU seconds.
Loading and warming up cancel; waiting for a core does not count.
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
HOPELESS = 0.50  # CPUs of others from which on a wall time says nothing
SKIPPED = 3  # exit status of a program that cannot do what was asked
LIMIT_S = 1800.0  # of one sample
# A difference of two CPU times is noise where most of both is something else.
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Runner:
    """A program whose samples are numbers; `read` finds the number in what it prints.

    With `shallow`, the same program on a model of fewer layers, the number is that of a model of
    more layers than either: what the layers between both cost, another one costs. A model is not
    `layers` times one of its layers: engines leave out what nothing reads of the last one.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[str], dict[str, Any]]
    environment: tuple[tuple[str, str], ...] = ()
    # For `cpu` mode: the same with less work, and the difference of work in the unit's terms
    # (tokens, frames). Empty: this program is not measured in that mode.
    short: tuple[str, ...] = ()
    work: float = 0.0
    rate: bool = True  # work per second, not seconds per work
    shallow: Runner | None = None
    layers: tuple[int, int, int] = (0, 0, 0)  # of shallow's model, of this one's, of the full one


@dataclass
class Series:
    """The samples of one runner: values, CPUs that others used, and the last sample's details.

    `reads`: the read bandwidth in GB/s right before and right after each sample, or empty.
    """

    name: str
    command: str = ""
    values: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    reads: list[tuple[float, float]] = field(default_factory=list)
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

    @property
    def least_disturbance(self) -> float:
        """CPUs that others used in the quietest sample."""
        return min(self.others, default=0.0)

    def to_json(self) -> dict[str, Any]:
        """For the result file."""
        if self.skipped or not self.values:
            return {"name": self.name, "command": self.command, "skipped": self.skipped}
        reads = {"read_gbytes_per_s": self.reads} if self.reads else {}
        return reads | {
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

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Series:
        """What `to_json` wrote."""
        return cls(
            stored["name"],
            stored["command"],
            list(stored.get("values", [])),
            list(stored.get("other_cpus", [])),
            [(before, after) for before, after in stored.get("read_gbytes_per_s", [])],
            dict(stored.get("detail", {})),
            stored.get("skipped", ""),
        )


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


@dataclass(frozen=True)
class _Done:
    """One process that ran to its end."""

    wall: float
    cpu: float  # seconds of user and system time
    others: float  # CPUs that other processes used meanwhile
    printed: str
    problem: str  # "" when it ended well


def _execute(command: Sequence[str], environment: dict[str, str]) -> _Done:
    own = os.times()
    before, start = _busy_seconds(), time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=environment, stdin=subprocess.DEVNULL
        )
        problem = ""
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problem = f"took more than {LIMIT_S:.0f} s"
        wall = time.monotonic() - start
        total = _busy_seconds() - before
        out.seek(0)
        err.seek(0)
        printed, complaint = out.read(), err.read().strip()
    if process.returncode and not problem:
        reason = complaint.splitlines()[-1] if complaint else "no message"
        skipped = process.returncode == SKIPPED
        problem = reason if skipped else f"exit {process.returncode}: {reason}"
    now = os.times()
    others = max(total - (sum(now[:4]) - sum(own[:4])), 0.0) / wall
    return _Done(wall, sum(now[2:4]) - sum(own[2:4]), others, printed, problem)


@dataclass(frozen=True)
class _Sample:
    value: float = 0.0
    others: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def _sample(runner: Runner, cpu: bool) -> _Sample:
    """One run, or two where the difference of CPU times is wanted."""
    environment = os.environ | dict(runner.environment)
    if cpu and not runner.short:
        return _Sample(problem="not measured by CPU time")
    short = _execute(runner.short, environment) if cpu else None
    done = _execute(runner.command, environment)
    problem = done.problem or (short.problem if short else "")
    if problem:
        return _Sample(problem=problem)
    detail = runner.read(done.printed)
    value = float(detail["value"])
    if short is not None:
        seconds = done.cpu - short.cpu
        if seconds < LEAST_SHARE * done.cpu:
            return _Sample(problem="too little work beside its preparation for a CPU time")
        value = runner.work / seconds if runner.rate else seconds / runner.work
    # Waiting is not in a CPU time: what others did does not disturb it.
    return _Sample(value, 0.0 if cpu else done.others, detail)


def _deeper(runner: Runner, shallow: _Sample, own: _Sample) -> _Sample:
    """What a model of runner.layers[2] layers would have given; also for seconds in details."""
    first, second, full = runner.layers

    def extend(of_shallow: float, of_own: float) -> float:
        return of_shallow + (full - first) / (second - first) * (of_own - of_shallow)

    if runner.rate:
        value = 1.0 / extend(1.0 / shallow.value, 1.0 / own.value)
    else:
        value = extend(shallow.value, own.value)
    detail = own.detail | {
        key: extend(shallow.detail[key], of_own)
        for key, of_own in own.detail.items()
        if key == "seconds" or key.endswith("_s")
    }
    return _Sample(value, max(shallow.others, own.others), detail)


def sample(runner: Runner, series: Series, cpu: bool) -> None:
    """Runs once and adds the value, or the reason why there is none."""
    shallow = _sample(runner.shallow, cpu) if runner.shallow else _Sample()
    own = _sample(runner, cpu)
    series.skipped = shallow.problem or own.problem
    if series.skipped:
        return
    done = _deeper(runner, shallow, own) if runner.shallow else own
    series.values.append(done.value)
    series.others.append(done.others)
    series.detail = done.detail


def _name(part: str) -> str:
    return Path(part).name if part.startswith("/") else part


def alternate(
    runners: Sequence[Runner],
    samples: int,
    patience_s: float,
    step: Callable[[str], None] = lambda _: None,
    cpu: bool = False,
    read: Callable[[str], float | None] = lambda _: None,
) -> dict[str, Series]:
    """`samples` samples of each, taken in turn; `step` is told before each.

    `read(name)`: the read bandwidth, for runners whose share of it is wanted. It is asked before
    and after each sample: a virtual machine's can double from one minute to the next.
    """
    # Folders of this machine say nothing elsewhere: names of programs and models do.
    result = {r.name: Series(r.name, " ".join(_name(part) for part in r.command)) for r in runners}
    for _ in range(samples):
        for runner in runners:
            step(runner.name)
            series = result[runner.name]
            if not series.skipped:
                if not cpu:
                    wait_for_quiet(patience_s)
                before = read(runner.name)
                sample(runner, series, cpu)
                after = None if before is None or series.skipped else read(runner.name)
                if before is not None and after is not None:
                    series.reads.append((before, after))
    return result


def machine(limits: Path | None, runs: int, threads: int) -> dict[str, Any]:
    """What the machine can do right now; empty without the program."""
    if limits is None:
        return {}
    done = subprocess.run(
        [str(limits), str(threads), str(runs)], capture_output=True, text=True, check=True
    )
    return last_json(done.stdout)
