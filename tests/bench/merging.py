"""Joins results of several calls of run.py in one document that says what is from which call.

A document has `runs`, one for each call that still has benches in it: its benches, date, number of
samples, revision, peers' versions and limits. `run` of a row is the number of its run, from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from measure import Series

# Without these in common, rows beside each other would not be comparable.
COMMON = ("machine", "threads", "clock")
OF_A_RUN = ("date", "samples", "revision", "versions", "limits")


class Mismatch(Exception):
    """Two documents that do not belong together; the text says why."""


def check(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Errors: Mismatch, when rows of both must not be in one table."""
    differ = [f"{key} {old[key]!r} and {new[key]!r}" for key in COMMON if old[key] != new[key]]
    if differ:
        raise Mismatch(f"results of {', '.join(differ)} do not belong together")


def _runs(document: dict[str, Any]) -> list[dict[str, Any]]:
    if "runs" in document:
        return [dict(run) for run in document["runs"]]
    run = {key: document[key] for key in OF_A_RUN if key in document}
    return [{"benches": list(document["series"]), **run}]


def merge(
    old: dict[str, Any] | None, new: dict[str, Any], order: Sequence[str] = ()
) -> dict[str, Any]:
    """`new`, a document of one call, after the benches of `old` that it did not run again.

    Benches are in the order of `order`, others behind. The budget is left to the caller.
    """
    fresh = _runs(new)
    runs, rows, series = fresh, list(new["rows"]), dict(new["series"])
    if old is not None:
        check(old, new)
        kept = [
            {**run, "benches": [bench for bench in run["benches"] if bench not in new["series"]]}
            for run in _runs(old)
        ]
        runs = [run for run in kept if run["benches"]] + fresh
        rows = [row for row in old["rows"] if row["bench"] not in new["series"]] + rows
        series = {name: of for name, of in old["series"].items() if name not in series} | series
    place = {name: i for i, name in enumerate(order)}
    names = sorted(series, key=lambda name: place.get(name, len(place)))
    number = {bench: i for i, run in enumerate(runs, 1) for bench in run["benches"]}
    at = {name: i for i, name in enumerate(names)}
    return {
        **new,
        "samples": _samples(runs),
        "versions": (old or {}).get("versions", {}) | new["versions"],
        "runs": runs,
        "rows": sorted(
            ({**row, "run": number[row["bench"]]} for row in rows), key=lambda row: at[row["bench"]]
        ),
        "series": {name: series[name] for name in names},
    }


def _samples(runs: list[dict[str, Any]]) -> int | str:
    counts = sorted({int(run["samples"]) for run in runs})
    return counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def series_of(document: dict[str, Any]) -> dict[str, dict[str, Series]]:
    """The samples of a document by bench and by runner."""
    return {
        bench: {one["name"]: Series.from_json(one) for one in listed}
        for bench, listed in document["series"].items()
    }


def earlier(document: dict[str, Any]) -> dict[str, str]:
    """Of each bench that the last call did not run: when and at which revision it ran."""
    return {
        bench: f"{run['date']}, revision {run['revision']}"
        for run in document["runs"][:-1]
        for bench in run["benches"]
    }
