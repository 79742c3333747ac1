"""Samples of benchmarks are taken in turn, stored, merged, and rows are judged from them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
STORED = BENCH / "results" / "avx512.json"
sys.path.insert(0, str(BENCH))
import merging  # noqa: E402
import report  # noqa: E402
from benches import Bench, Target  # noqa: E402
from measure import HOPELESS, QUIET, Runner, Series, alternate, last_json  # noqa: E402

sys.path.remove(str(BENCH))


def _series(name: str, values: list[float], others: float = 0.0, **detail: float) -> Series:
    series = Series(name, values=values, others=[others] * len(values))
    series.detail = dict(detail)
    return series


def _call(series: dict[str, list[Series]], **fields: Any) -> dict[str, Any]:
    """A document of one call."""
    rows = [{"bench": name, "workload": name} for name in series]
    machine = json.loads(STORED.read_text())["machine"]
    document = {"machine": machine, "threads": 2, "clock": "wall", "samples": 1, "rows": rows}
    document |= {"date": "today", "revision": "new", "versions": {}, "limits": {}, "budget": []}
    listed = {name: [one.to_json() for one in of] for name, of in series.items()}
    return document | {"series": listed} | fields


def test_rows_of_stored_results_say_which_call_they_are_from() -> None:
    stored = json.loads(STORED.read_text())
    merged = merging.merge(stored, _call({"load": [_series("w4g128", [0.1])]}))
    for row in merged["rows"]:
        assert row["bench"] in merged["runs"][row["run"] - 1]["benches"]
    assert len(merged["rows"]) == len(stored["rows"])
    assert merged["runs"][-1]["benches"] == ["load"]
    assert merged["runs"][-1]["revision"] == "new"
    assert not any("load" in run["benches"] for run in merged["runs"][:-1])
    of_load = next(row for row in merged["rows"] if row["bench"] == "load")
    assert of_load["workload"] == "load"  # the new one


def test_results_of_another_number_of_threads_are_not_merged() -> None:
    old = _call({"a": [_series("x", [1.0])]})
    with pytest.raises(merging.Mismatch, match="threads 2 and 4"):
        merging.merge(old, _call({"b": [_series("x", [1.0])]}, threads=4))


def test_results_of_processors_with_other_instructions_are_not_merged() -> None:
    stored = {path.stem: json.loads(path.read_text()) for path in STORED.parent.glob("*.json")}
    assert stored.keys() == {"amx", "avx2", "avx512", "zen1", "zen4-avx2", "zen5"}
    with pytest.raises(merging.Mismatch, match="avx512_vnni"):
        merging.merge(stored["avx512"], stored["avx2"])
    with pytest.raises(merging.Mismatch, match="family 23"):  # the same name and instructions
        merging.merge(stored["avx2"], stored["zen1"])
    with pytest.raises(merging.Mismatch, match="model 17"):
        merging.merge(stored["avx2"], stored["zen4-avx2"])


def test_merged_benches_are_in_the_order_of_the_list() -> None:
    old = _call({"c": [_series("x", [1.0])], "gone": [], "a": []})
    merged = merging.merge(old, _call({"b": []}, samples=3), ["a", "b", "c"])
    assert merged["samples"] == "1 to 3"
    assert list(merged["series"]) == ["a", "b", "c", "gone"]
    assert [row["run"] for row in merged["rows"]] == [1, 2, 1, 1]


def test_samples_survive_being_stored() -> None:
    series = _series("w4 a8", [9.0, 1.0, 2.0], others=0.5, batch=8)
    series.others[0] = 0.0
    again = Series.from_json(json.loads(json.dumps(series.to_json())))
    assert again == series
    assert again.median == 9.0
    skipped = Series("x", skipped="not here")
    assert Series.from_json(skipped.to_json()) == skipped


def test_the_budget_takes_from_earlier_calls_what_is_missing_and_says_so() -> None:
    plain = _series("cost 1", [90.0], prefill_s=80.0, decode_s=10.0, prompt_rows=6760)
    reduced = _series("cost 0.3", [9.0], prefill_s=7.0, decode_s=2.0)
    peers = [_series("llama.cpp prefill", [67.6]), _series("llama.cpp decode", [3.2])]
    first = _call(
        {
            "tower": [_series("w4g128 a8 attention a8", [2.0]), _series("onnxruntime int8", [3.0])],
            "video-tower": [_series("llama.cpp f16", [6.0]), _series("llama.cpp q8_0", [5.0])],
            "video-llm-28l": [plain, reduced, *peers],
        },
        date="the first day",
        revision="old",
    )
    parts = {
        "video-frames": [_series("PyAV", [0.25])],
        "video-projector": [_series("w4g128 a8", [0.5])],
    }
    merged = merging.merge(first, _call(parts))
    *listed, total = report.budget(merging.series_of(merged), merging.earlier(merged))
    shallower = pytest.approx(2.0 * 32 * 26 / 27)
    assert [[stage[side] for side in report.SIDES] for stage in listed] == [
        [0.25] * 4,
        [shallower, shallower, 5.0 * 32, pytest.approx(3.0 * 32 * 26 / 27)],
        [16.0] * 4,
        [80.0, 7.0, pytest.approx(100.0), pytest.approx(100.0)],
        [10.0, 2.0, pytest.approx(20.0), pytest.approx(20.0)],
    ]
    assert total["reduced"] == pytest.approx(sum(stage["reduced"] for stage in listed))
    text = report.markdown(merged | {"rows": [], "budget": [*listed, total]})
    sums = total["llama"] / total["ours"], total["llama"] / total["reduced"]
    assert f"{sums[0]:.2f}x llama.cpp's parts without reduction, {sums[1]:.2f}x " in text
    assert "(target 8x: **missed**)" in text
    quick = [{"stage": "sum", "how": "", "ours": 60, "reduced": 10, "llama": 80, "peer": 70}]
    text = report.markdown(merged | {"rows": [], "budget": quick})
    assert "1.33x llama.cpp's parts without" in text
    assert "8.00x llama.cpp's parts with reduction (target 8x: reached), 7.00x with" in text
    stages = {stage["stage"]: stage["how"] for stage in listed}
    assert "from the run" not in stages["decode and resize frames"] + stages["projector"]
    for name in ("vision tower", "prompt", "64 tokens"):
        assert "from the run of the first day, revision old" in stages[name]


def _judged(bench: Bench, *series: Series, read: float | None = None) -> dict[str, Any]:
    (row,) = report.rows(bench, {s.name: s for s in series}, read)
    return row


def test_a_row_takes_the_best_of_each_side() -> None:
    target = Target("x", ("w4",), ("peer",), 2.0)
    ours = _series("w4 a8", [90.0, 100.0, 110.0]), _series("w4 a16", [10.0])
    peers = _series("peer one", [49.0]), _series("peer two", [20.0]), _series("other", [1000.0])
    row = _judged(Bench("b", "b", "tok/s", [target]), *ours, *peers)
    assert row["ours"]["name"] == "w4 a8"
    assert row["peer"]["name"] == "peer one"
    assert row["ratio"] == pytest.approx(100 / 49)
    assert row["reached"] is True


def test_fewer_seconds_are_better() -> None:
    target = Target("x", ("w4",), ("peer",), 2.0)
    bench = Bench("b", "b", "s", [target], higher_is_better=False)
    row = _judged(bench, _series("w4", [3.0]), _series("peer", [5.0]), _series("peer 2", [6.0]))
    assert row["ratio"] == pytest.approx(5 / 3)
    assert row["reached"] is False


def test_share_of_the_bandwidth_counts_a_step_of_a_batch_once() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), limit_share=0.85)])
    # 80 tokens per second of 8 sequences are 10 steps per second of 2 GB each: 20 GB/s.
    ours = _series("w4", [80.0], bytes_per_step=2e9, batch=8)
    row = _judged(bench, ours, read=25.0)
    assert row["ratio"] == pytest.approx(0.8)
    assert row["reached"] is False


def test_a_part_of_the_time_has_to_stay_below_its_share() -> None:
    target = Target("x", ("w4",), part="stage_s", most_share=0.01)
    bench = Bench("b", "b", "s", [target], higher_is_better=False)
    below = _judged(bench, _series("w4", [9.0], seconds=10.0, stage_s=0.09))
    assert below["ratio"] == pytest.approx(0.009)
    assert below["reached"] is True
    assert _judged(bench, _series("w4", [9.0], seconds=10.0, stage_s=0.11))["reached"] is False
    document = {
        "machine": "m", "threads": 1, "date": "d", "revision": "r", "samples": 1,
        "clock": "wall time", "versions": {}, "limits": {}, "runs": [{}], "budget": [],
        "rows": [below],
    }  # fmt: skip
    assert "| 0.90% | under 1% | yes |" in report.markdown(document)


def test_a_read_bandwidth_that_changed_around_a_bench_is_said() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), limit_share=0.85)])
    ours = _series("w4", [10.0], bytes_per_step=2e9, batch=1)
    (steady,) = report.rows(bench, {"w4": ours}, 36.0, 35.0)
    (moved,) = report.rows(bench, {"w4": ours}, 60.0, 35.0)
    assert steady["notes"] == []
    assert moved["ratio"] == pytest.approx(20 / 60)
    assert len(moved["notes"]) == 1
    assert "35.0 to 60.0 GB/s" in moved["notes"][0]


def test_each_sample_is_judged_by_the_bandwidth_around_it() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), limit_share=0.85)])
    ours = _series("w4", [10.0, 20.0, 30.0, 15.0, 40.0], bytes_per_step=2e9, batch=1)
    # Shares 20/40 and 40/50 and 60/80; one during which the rate changed, and a disturbed one.
    ours.reads = [(40.0, 39.0), (48.0, 50.0), (80.0, 79.0), (30.0, 60.0), (10.0, 10.0)]
    ours.others[4] = QUIET + 1
    row = _judged(bench, ours, read=1000.0)
    assert row["ratio"] == pytest.approx(60 / 80)
    assert row["peer"]["median"] == 80.0
    assert row["peer"]["used_gbytes_per_s"] == pytest.approx(60.0)
    assert any("30.0 to 80.0 GB/s; 1 of 4 samples" in note for note in row["notes"])
    stored = Series.from_json(ours.to_json())
    assert stored.reads == ours.reads
    # Nothing but changes: judged by the greater rate.
    ours = _series("w4", [10.0], bytes_per_step=2e9, batch=1)
    ours.reads = [(30.0, 60.0)]
    row = _judged(bench, ours)
    assert row["ratio"] == pytest.approx(20 / 60)
    assert any("by the greater" in note for note in row["notes"])


def test_a_disturbed_sample_is_said_and_does_not_count() -> None:
    series = _series("w4", [10.0, 100.0])
    series.others = [QUIET + 1, 0.0]
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",))])
    row = _judged(bench, series)
    assert row["ours"]["median"] == 100.0
    assert any("1 of 2 disturbed" in note for note in row["notes"])


def test_a_row_whose_samples_were_all_disturbed_is_not_judged() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), ("peer",), 2.0)])
    row = _judged(bench, _series("w4", [9.0]), _series("peer", [1.0], others=2 * HOPELESS))
    assert row["ratio"] == pytest.approx(9.0)
    assert row["reached"] is None
    assert "too disturbed to judge" in row["notes"]


def test_a_missing_side_leaves_the_row_open() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), ("peer",), 2.0)])
    bench.missing.append("no folder of peers was given")
    row = _judged(bench, _series("w4", [1.0]))
    assert row["reached"] is None
    assert row["notes"] == ["no folder of peers was given"]


def _python(name: str, text: str) -> Runner:
    return Runner(name, (sys.executable, "-c", text), last_json)


def test_samples_alternate_and_a_program_may_decline(tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write"
    text = "{note}('{name}'); print('noise'); print('{{\"value\": 2}}')"
    runners = [_python(name, text.format(note=note, name=name)) for name in "ab"]
    runners.append(_python("c", "import sys; sys.exit('broken')"))
    runners.append(_python("d", "import sys; print('not here', file=sys.stderr); sys.exit(3)"))
    asked = []

    def read(name: str) -> float | None:
        asked.append(name)
        return float(len(asked)) if name == "a" else None

    result = alternate(runners, 3, 0.0, read=read)
    assert log.read_text() == "ababab"
    # Not after those that have no share, nor of those that declined.
    assert result["a"].reads == [(1.0, 2.0), (6.0, 7.0), (9.0, 10.0)]
    assert result["b"].reads == []
    assert result["a"].values == [2.0, 2.0, 2.0]
    assert result["c"].skipped == "exit 1: broken"
    assert result["d"].skipped == "not here"


def test_the_time_of_a_deep_model_is_told_by_two_of_fewer_layers() -> None:
    """A last layer of 2 s, others of 10 s, and 5 s for the rest of the model."""
    text = 'print(\'{{"value": {value}, "prefill_s": {seconds}, "rows": {rows}}}\')'

    def runner(name: str, rate: bool, broken: bool = False) -> Runner:
        def of(layers: int) -> Runner:
            seconds = 5 + 2 + 10 * (layers - 1)
            value = 700 / seconds if rate else seconds
            one = text.format(value=value, seconds=seconds, rows=layers)
            return _python(name, "import sys; sys.exit('no')" if broken and layers == 1 else one)

        return replace(of(4), rate=rate, shallow=of(1), layers=(1, 4, 28))

    runners = [runner("rate", True), runner("time", False), runner("broken", True, True)]
    result = alternate(runners, 1, 0.0)
    seconds = 5 + 2 + 10 * 27
    assert result["rate"].values == [pytest.approx(700 / seconds)]
    assert result["time"].values == [pytest.approx(seconds)]
    assert result["time"].detail == {"value": 37, "prefill_s": pytest.approx(seconds), "rows": 4}
    assert result["broken"].skipped == "exit 1: no"


def test_cpu_time_is_that_of_the_work_that_the_long_run_does_more() -> None:
    """Both runs load for the same time; what is counted is the difference."""
    text = """
import json, time
start = time.process_time()
while time.process_time() - start < {seconds}: pass
print(json.dumps({{"value": 1}}))
"""
    command = {s: (sys.executable, "-c", text.format(seconds=s)) for s in (0.3, 0.9)}
    rate = Runner("rate", command[0.9], last_json, (), command[0.3], 60.0)
    time_ = Runner("time", command[0.9], last_json, (), command[0.3], 2.0, rate=False)
    without = Runner("without", command[0.3], last_json)
    result = alternate([rate, time_, without], 1, 0.0, cpu=True)
    # 0.6 CPU seconds by construction; starting Python varies by far less than half of that.
    assert result["rate"].values[0] == pytest.approx(100, rel=0.5)
    assert result["time"].values[0] == pytest.approx(0.3, rel=0.5)
    assert result["without"].skipped
