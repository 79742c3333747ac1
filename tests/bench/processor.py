"""What this machine's processor is, as results name it and benches choose by."""

from __future__ import annotations

import platform
from pathlib import Path

# Instructions that kernels and peers choose by; names as Linux prints them.
EXTENSIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")


def _described(info: Path) -> tuple[str, set[str]]:
    name = platform.processor() or platform.machine()
    family = model = ""
    flags: set[str] = set()
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "cpu family":
                family = f", family {value.strip()}"
            elif key.strip() == "model":
                model = f", model {value.strip()}"
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return name + family + model, flags


def processor_name(info: Path = CPUINFO) -> str:
    """Names, numbers and instructions: virtual machines of one model name can differ in these."""
    name, flags = _described(info)
    found = [extension for extension in EXTENSIONS if extension in flags]
    return f"{name} ({', '.join(found)})" if found else name


def multiplies_bfloat16(info: Path = CPUINFO) -> bool:
    """Whether there are such products; without them torch takes a minute for a frame."""
    return bool({"avx512_bf16", "bf16"} & _described(info)[1])
