"""Compares kernels of several builds on a machine whose speed changes from second to second.

    race.py FILTER PROGRAM PROGRAM... [--seconds 5] [--cpu 0]
    race.py --engine "MODEL vision --frames 6 --activations a8" PROGRAM PROGRAM...

All PROGRAMs (bench_kernels of different builds) run at once on one core, one thread each. The
scheduler gives them turns of a few milliseconds, so that whatever else slows the core down slows
all of them alike; what each did per second of CPU time is compared. The same build twice differs
by 1 to 2 %, where samples in turn, each by itself, differ by 15. With --engine they are
bench_engine, all with these arguments, and their CPU seconds are compared; reading the model is in
them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from typing import Any

RATE = "mean_gflops_per_cpu_second"


def race(programs: list[str], kernels: str, seconds: float, cpu: int) -> list[list[dict[str, Any]]]:
    """The lines that each program prints; errors: RuntimeError, when one fails."""
    options = ["--filter", kernels, "--threads", "1", "--seconds", str(seconds)]
    running = [
        subprocess.Popen(
            ["taskset", "-c", str(cpu), program, *options], stdout=subprocess.PIPE, text=True
        )
        for program in programs
    ]
    results = []
    for program, process in zip(programs, running, strict=True):
        printed, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{program} ended with status {process.returncode}")
        results.append([json.loads(line) for line in printed.splitlines()])
    return results


def race_engines(programs: list[str], arguments: list[str], cpu: int) -> list[float]:
    """CPU seconds of each program; errors: RuntimeError, when one fails."""
    running = [
        subprocess.Popen(
            ["taskset", "-c", str(cpu), program, *arguments, "--threads", "1"],
            stdout=subprocess.DEVNULL,
        )
        for program in programs
    ]
    # Each is waited for, also when another one has failed.
    ended = [os.wait4(process.pid, 0) for process in running]
    for program, process, (_, status, _) in zip(programs, running, ended, strict=True):
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{program} ended with status {process.returncode}")
    return [usage.ru_utime + usage.ru_stime for _, _, usage in ended]


def main() -> int:
    """Prints, for every kernel, each program's rate and its ratio to the first one's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("filter", help="kernels whose name contains this, or --engine's arguments")
    parser.add_argument("programs", nargs="+", help="bench_kernels of several builds")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kernel")
    parser.add_argument("--engine", action="store_true", help="programs are bench_engine")
    parser.add_argument("--cpu", type=int, default=0, help="number of the core")
    options = parser.parse_args()
    try:
        if options.engine:
            seconds = race_engines(options.programs, shlex.split(options.filter), options.cpu)
            for program, of_program in zip(options.programs, seconds, strict=True):
                print(f"  {of_program:8.3f} CPU seconds  {of_program / seconds[0]:.3f}  {program}")
            return 0
        results = race(options.programs, options.filter, options.seconds, options.cpu)
    except (OSError, RuntimeError) as error:
        print(f"race.py: {error}", file=sys.stderr)
        return 1
    if not results[0]:
        print(f"race.py: no kernel's name contains {options.filter!r}", file=sys.stderr)
        return 1
    for of_kernel in zip(*results, strict=True):
        print(of_kernel[0]["name"])
        for program, result in zip(options.programs, of_kernel, strict=True):
            ratio = result[RATE] / of_kernel[0][RATE]
            print(f"  {result[RATE]:8.1f} GFLOP per CPU second  {ratio:.3f}  {program}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
