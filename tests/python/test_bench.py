"""The benchmark harness works: models are made and opened, programs run, results are merged.

Nothing here is about speed. The run on toy models needs bench_engine (built with
-DFRAMEQUILT_BENCH=ON) and skips where it is not built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
sys.path.insert(0, str(BENCH))
import instructions  # noqa: E402
import models  # noqa: E402
import processor  # noqa: E402

sys.path.remove(str(BENCH))

from framequilt.convert.sources import open_source  # noqa: E402
from framequilt.model_directory import ModelDirectory  # noqa: E402


def _programs() -> Path:
    found = [path.parent for path in ROOT.glob("build/*/tests/bench/bench_engine")]
    named = os.environ.get("FRAMEQUILT_BENCH_PROGRAMS")
    if named:
        found = [Path(named)]
    if not found:
        pytest.skip("bench_engine is not built: cmake --preset dev -DFRAMEQUILT_BENCH=ON")
    return max(found, key=lambda path: (path / "bench_engine").stat().st_mtime)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "run.py"), "--tiny", "--patience", "0"]
    command += ["--build", str(_programs()), "--out", str(out), "--models", str(out / "models")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads((out / "results.json").read_text())
    document["table"] = (out / "table.md").read_text()
    return document


def test_every_bench_of_a_tiny_run_has_a_value(tiny_run: dict[str, Any]) -> None:
    names = {f"{kind}-tiny" for kind in ("prefill", "decode", "tower", "projector", "load")}
    assert set(tiny_run["series"]) == names
    for listed in tiny_run["series"].values():
        for series in listed:
            assert series.get("median", 0) > 0, series
    for row in tiny_run["rows"]:
        assert row["workload"] in tiny_run["table"]


def _run(*arguments: str | Path) -> str:
    command = [sys.executable, str(BENCH / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _race(what: str, *programs: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "race.py"), what, *map(str, programs)]
    command += ["--seconds", "0.05", "--cpu", str(min(os.sched_getaffinity(0)))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_race_compares_every_program_with_the_first() -> None:
    program = _programs() / "bench_kernels"
    kernel = "linear f32 896x4864 rows 512"
    done = _race(kernel, program, program)
    assert done.returncode == 0, done.stderr
    title, first, second = done.stdout.splitlines()
    assert title == kernel
    assert first.split()[-2:] == ["1.000", str(program)]
    assert 0.3 < float(second.split()[-2]) < 3  # the same program twice


def test_a_race_of_engines_compares_cpu_seconds(tmp_path: Path) -> None:
    programs = []
    for name, steps in (("short", 2_000_000), ("long", 8_000_000)):
        programs.append(tmp_path / name)
        programs[-1].write_text(
            f"#!{sys.executable}\nimport sys\n"
            "assert sys.argv[1:] == ['a model', 'vision', '--threads', '1']\n"
            f"for _ in range({steps}): pass\n"
        )
        programs[-1].chmod(0o755)
    done = _race("'a model' vision", *programs, "--engine")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in lines] == [str(p) for p in programs]
    first, second = (float(line.split()[0]) for line in lines)
    assert float(lines[1].split()[3]) == pytest.approx(second / first, rel=0.05)
    assert second > first
    programs[1].write_text("#!/bin/sh\nexit 7\n")
    done = _race("'a model' vision", *programs, "--engine")
    assert done.returncode == 1
    assert "long ended with status 7" in done.stderr


def test_a_race_without_runners_or_kernels_says_so(tmp_path: Path) -> None:
    program = _programs() / "bench_kernels"
    done = _race("no such kernel", program)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no kernel's name contains" in done.stderr
    done = _race("linear f32", tmp_path / "missing")
    assert done.returncode == 1
    assert "ended with status" in done.stderr


def test_listing_benches_makes_no_models(tmp_path: Path) -> None:
    """They would be made in a folder that cannot be: with 20 GB, trying has to fail at once."""
    (tmp_path / "file").touch()
    listed = _run("--list", "--models", tmp_path / "file" / "models")
    assert {"tower", "load", "video-llm-28l"} <= {line.split()[0] for line in listed.splitlines()}


def test_only_the_models_of_the_benches_that_run_are_made(tmp_path: Path) -> None:
    chosen = ("--tiny", "--patience", "0", "--only", "load", "--build", _programs())
    _run(*chosen, "--out", tmp_path / "out", "--models", tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny-w4g128"]


def test_a_later_call_replaces_its_benches_and_keeps_the_others(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(tiny_run))
    chosen = ("--tiny", "--patience", "0", "--only", "load", "--build", _programs())
    where = ("--out", tmp_path, "--models", tmp_path / "models")
    _run(*chosen, *where, "--merge", tmp_path / "results.json")
    merged = json.loads((tmp_path / "results.json").read_text())
    assert list(merged["series"]) == list(tiny_run["series"])
    assert merged["series"]["tower-tiny"] == tiny_run["series"]["tower-tiny"]
    assert merged["series"]["load-tiny"] != tiny_run["series"]["load-tiny"]
    assert [run["benches"] for run in merged["runs"]] == [
        ["prefill-tiny", "decode-tiny", "tower-tiny", "projector-tiny"],
        ["load-tiny"],
    ]
    assert [row["run"] for row in merged["rows"]] == [1, 1, 1, 2]
    assert merged["runs"][0]["limits"] == tiny_run["limits"]
    table = (tmp_path / "table.md").read_text()
    assert "Run 1: " in table
    assert "Run 2: " in table


def test_limits_of_the_machine_are_measured(tiny_run: dict[str, Any]) -> None:
    for moment in ("before", "after"):
        found = tiny_run["limits"][moment]
        assert found["read_gbytes_per_s"]["median"] > 0
        assert found["float_gflops"]["median"] > 0
        assert found["clock_ghz"]["median"] > 0
        assert found["float_flop_per_cycle"]["median"] > 0
    assert "GHz" in tiny_run["table"]


def test_peaks_of_limits_are_taken_from_registers() -> None:
    """An accumulator in memory makes a peak of the latency of a store and a load."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    command = [objdump, "-d", "--no-show-raw-insn", str(_programs() / "limits")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    counted = re.compile(r"\t(vfmadd231ps|vpdpbusd|vpmaddubsw|vpaddw|fmla|sdot)\b")
    found = [i for i, line in enumerate(code) if counted.search(line)]
    if not found:
        pytest.skip("this processor has none of the instructions")
    for i in found:
        for line in code[i : i + 2]:
            assert not re.search(r"\(%[re][sb]p|\[sp", line), line


def test_bytes_of_a_decode_step_are_those_of_the_model(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Weights: every decoder tensor (the embedding is the head too). KV: all pages' tokens."""
    models.write_ours("tiny", "w4g128", tmp_path / "tiny")
    opened = ModelDirectory(tmp_path / "tiny")
    weights = sum(
        tensor.data.nbytes for name, tensor in opened.tensors.items() if name.startswith("decoder.")
    )
    detail = tiny_run["series"]["decode-tiny"][0]["detail"]
    # Batch 2, 2 layers, 32 prompt tokens and half of the 8 that are timed.
    kv = 2 * 2 * (32 + 4) / 64 * detail["page_bytes"]
    assert detail["bytes_per_step"] == pytest.approx(weights + kv, rel=1e-5)  # printed: 6 digits


def test_a_reduced_video_keeps_fewer_rows(tiny_run: dict[str, Any]) -> None:
    detail = tiny_run["series"]["tower-tiny"][0]["detail"]
    # 4 x 4 patches, pooled by 2, with a newline per row of the grid: 6 rows of each of two frames.
    assert detail["visual_rows"] == 12
    assert 0 < detail["kept_share"] < 1


def test_the_projector_stage_makes_the_rows_of_a_prompt(tiny_run: dict[str, Any]) -> None:
    """And is timed often enough: it is milliseconds beside a tower's seconds."""
    detail = tiny_run["series"]["projector-tiny"][0]["detail"]
    assert detail["visual_rows"] == 12
    assert detail["calls"] >= 5
    assert detail["value"] * 2 * detail["calls"] == pytest.approx(detail["seconds"], rel=1e-4)
    assert 0 < detail["arrange_share"] < 1


@pytest.mark.parametrize(
    ("text", "name", "bfloat16"),
    [
        (
            "model name\t: EPYC\nflags\t: sse2 avx2 avx512f avx512_bf16\n\nmodel name\t: EPYC\n",
            "EPYC (avx2, avx512f, avx512_bf16)",
            True,
        ),
        ("model name\t: EPYC\nflags\t: sse2 avx2\n", "EPYC (avx2)", False),
        (
            "cpu family\t: 23\nmodel\t\t: 1\nmodel name\t: EPYC\nflags\t: avx2\n",
            "EPYC, family 23, model 1 (avx2)",
            False,
        ),
        (
            "model name\t: Xeon\nflags\t: avx512_bf16 amx_bf16 amx_tile amx_int8\n",
            "Xeon (avx512_bf16, amx_int8, amx_bf16)",
            True,
        ),
        ("Features\t: fp asimd asimddp i8mm bf16\n", "(asimd, asimddp, i8mm, bf16)", True),
    ],
)
def test_machines_are_told_apart_by_family_model_and_instructions(
    text: str, name: str, bfloat16: bool, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    assert processor.processor_name(info).endswith(name)
    assert processor.multiplies_bfloat16(info) is bfloat16


@pytest.mark.parametrize("weights", ["f32", "bf16", "w4g128", "w5g32", "w8g128"])
def test_random_models_have_the_mean_and_deviation_they_are_meant_to_have(
    weights: str, tmp_path: Path
) -> None:
    models.write_ours("tiny-video", weights, tmp_path / "model")
    opened = ModelDirectory(tmp_path / "model", verify=True)
    for slot in opened.config["linears"]:
        found = opened.linear(slot)
        # Hundreds of values at least: the deviation of a sample is within a few percent.
        assert np.std(found) == pytest.approx(models.DEVIATION, rel=0.2), slot
        # A mean shows in every activation: with thousands of inputs all get the same sign.
        assert abs(np.mean(found)) < 4 * models.DEVIATION / np.sqrt(found.size), slot


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_checkpoints_hold_the_same_weights_in_one_file_and_in_several(
    dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    models.write_hf("tiny", tmp_path / "one", dtype)
    models.write_hf("tiny", tmp_path / "many", dtype, shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    whole, parts = (open_source(tmp_path / name).tensors for name in ("one", "many"))
    assert list(whole) and sorted(whole) == sorted(parts)
    for name, tensor in whole.items():
        values = tensor.all()
        assert tensor.dtype == dtype
        assert np.array_equal(values, parts[name].all()), name
        if values.ndim == 2:
            assert np.std(values) == pytest.approx(models.DEVIATION, rel=0.2), name


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_gguf_files_of_peers_are_what_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    models.write_gguf("tiny", kind, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    up = tensors["blk.1.ffn_up.weight"]
    values = gguf.quants.dequantize(up.data, up.tensor_type)
    assert values.shape == (128, 64)
    assert np.std(values) == pytest.approx(models.DEVIATION, rel=0.2)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_the_tower_of_a_peer_has_the_layers_of_ours(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tower.gguf"
    # A width that blocks of 32 do not divide, as that of the so400m.
    models.write_mmproj(kind, path, 48, replace(models.SIGLIP_SO400M, layers=2, hidden=64, mlp=80))
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {"v.blk.1.attn_out": (64, 64), "v.blk.1.ffn_up": (80, 64), "mm.2": (48, 48)}
    shapes |= {"v.blk.0.ffn_down": (64, 80), "mm.0": (48, 64)}
    for name, shape in shapes.items():
        tensor = tensors[f"{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == shape
        assert np.std(values) == pytest.approx(models.DEVIATION, rel=0.2)
        assert tensors[f"{name}.bias"].data.shape == shape[:1]
        wanted = kind if shape[1] % 32 == 0 else "f16"
        assert tensor.tensor_type.name.lower() == wanted
    assert tensors["v.position_embd.weight"].data.shape == (27 * 27, 64)
    assert reader.get_field("clip.vision.block_count").contents() == 2


def test_an_instruction_count_may_rise_by_the_tolerance_only() -> None:
    baseline = {"a": 1000, "b": 1000, "c": 1000, "gone": 5}
    counted = {"a": 1000, "b": 1029, "c": 1031, "new": 7}
    wrong = instructions.compare(counted, baseline)
    assert len(wrong) == 3
    assert wrong[0].startswith("c:")
    assert wrong[1].startswith("new:")
    assert wrong[2].startswith("gone:")


def _build(root: Path, name: str, kind: str) -> Path:
    """A build folder of that type with something called count_kernels."""
    folder = root / "build" / name / "tests" / "bench"
    folder.mkdir(parents=True)
    (folder / "count_kernels").touch()
    cache = f"CMAKE_BUILD_PARALLEL:STRING=Release\nCMAKE_BUILD_TYPE:STRING={kind}\nOTHER:BOOL=ON\n"
    (root / "build" / name / "CMakeCache.txt").write_text(cache)
    return folder


def test_instructions_are_counted_in_a_release_build_only(tmp_path: Path) -> None:
    dev = _build(tmp_path, "dev", "RelWithDebInfo")
    for asked in (None, dev):
        with pytest.raises(RuntimeError, match="of build type RelWithDebInfo.*--preset release"):
            instructions.choose(asked, tmp_path)
    release = _build(tmp_path, "release", "Release")
    assert instructions.choose(None, tmp_path) == release / "count_kernels"
    assert instructions.choose(release, tmp_path) == release / "count_kernels"
    with pytest.raises(RuntimeError, match="of build type RelWithDebInfo"):
        instructions.choose(dev, tmp_path)
    (tmp_path / "build" / "release" / "CMakeCache.txt").unlink()
    with pytest.raises(RuntimeError, match="of build type unknown"):
        instructions.choose(release, tmp_path)


def test_without_a_build_the_instruction_gate_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = _build(tmp_path, "dev", "RelWithDebInfo")
    assert instructions.main(["--build", str(dev), "--update"]) == 2
    assert "cmake --preset release -DFRAMEQUILT_BENCH=ON" in capsys.readouterr().out
