"""Tiny checkpoints that are quantized already, in the published layouts, packed word by word.

Each writer takes a transformers model, quantizes the linears of its decoder layers, writes a
directory, puts the dequantized weights into the model, and returns them by name. Everything is done
in plain loops from the layouts' descriptions and shares nothing with the code under test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Coded:
    """codes and zeros are unsigned; scales are float16 values unless said otherwise."""

    codes: NDArray[np.int64]  # [out, in]
    zeros: NDArray[np.int64]  # [out, groups]
    scales: NDArray[np.float32]  # [out, groups]
    owner: NDArray[np.int64]  # [in]: group of each input

    def weight(self) -> NDArray[np.float32]:
        steps = (self.codes - self.zeros[:, self.owner]).astype(np.float32)
        return steps * self.scales[:, self.owner]


def quantized(
    weight: NDArray[np.float32],
    bits: int,
    group: int,
    symmetric: bool,
    owner: NDArray[np.int64] | None = None,
    scale: Any = np.float16,
) -> Coded:
    out, inputs = weight.shape
    size = group or inputs
    if owner is None:
        owner = np.arange(inputs) // size
    groups = -(-inputs // size)
    levels = 2**bits - 1
    codes = np.zeros((out, inputs), np.int64)
    zeros = np.zeros((out, groups), np.int64)
    scales = np.zeros((out, groups), np.float32)
    for k in range(groups):
        part = weight[:, owner == k]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            step = 2 * np.maximum(-low, high) / levels
        else:
            step = (high - low) / levels
        step = step.astype(scale).astype(np.float32)
        zero = np.full(out, 2 ** (bits - 1)) if symmetric else np.rint(-low / step).astype(int)
        scales[:, k], zeros[:, k] = step, zero
        codes[:, owner == k] = np.clip(np.rint(part / step[:, None]) + zero[:, None], 0, levels)
    return Coded(codes, zeros, scales, owner)


def words(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint32).view(np.int32).copy())


def awq_words(matrix: NDArray[np.int64]) -> torch.Tensor:
    """[n, out] -> [n, out / 8]."""
    lines, out = matrix.shape
    packed = np.zeros((lines, out // 8), np.int64)
    for line in range(lines):
        for word in range(out // 8):
            for k in range(8):
                packed[line, word] |= int(matrix[line, 8 * word + AWQ_ORDER[k]]) << (4 * k)
    return words(packed)


def stream(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Values [n] -> 32-bit words; least bits first, no gaps."""
    number = 0
    for k, value in enumerate(values):
        number |= int(value) << (bits * k)
    count = -(-len(values) * bits // 32)
    return np.array([number >> (32 * k) & 0xFFFFFFFF for k in range(count)], np.int64)


def stream_rows(matrix: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    return np.stack([stream(row, bits) for row in matrix])


def layer_linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def write(
    path: Path, model: Any, settings: dict[str, Any], parts: dict[str, dict[str, Any]], values: Any
) -> dict[str, NDArray[np.float32]]:
    """Writes the files anew with `parts` in the place of weights, and changes the model."""
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for module, stored in parts.items():
        del state[f"{module}.weight"]
        state |= {f"{module}.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))
    linears = layer_linears(model)
    with torch.no_grad():
        for module, weight in values.items():
            linears[module].weight.copy_(torch.from_numpy(weight))
    return {f"{module}.weight": weight for module, weight in values.items()}


def half(values: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float16))


def write_awq(path: Path, model: Any, group: int = 32) -> dict[str, NDArray[np.float32]]:
    parts, values = {}, {}
    for name, module in layer_linears(model).items():
        coded = quantized(module.weight.detach().numpy(), 4, group, False)
        parts[name] = {
            "qweight": awq_words(coded.codes.T),
            "qzeros": awq_words(coded.zeros.T),
            "scales": half(coded.scales.T),
        }
        values[name] = coded.weight()
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    return write(path, model, settings, parts, values)


def write_gptq(
    path: Path,
    model: Any,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    act_order: int | None = None,
    **changes: Any,
) -> dict[str, NDArray[np.float32]]:
    """With `act_order` groups are those of inputs in a random order (of this seed)."""
    parts, values = {}, {}
    for number, (name, module) in enumerate(layer_linears(model).items()):
        weight = module.weight.detach().numpy()
        inputs = weight.shape[1]
        owner = np.arange(inputs) // (group or inputs)
        if act_order is not None:
            owner = owner[np.random.default_rng(act_order + number).permutation(inputs)]
        coded = quantized(weight, bits, group, symmetric, owner)
        shown = coded.zeros - 1 if version == 1 else coded.zeros
        parts[name] = {
            "qweight": words(stream_rows(coded.codes, bits).T),
            "qzeros": words(stream_rows(shown.T % 2**bits, bits)),
            "scales": half(coded.scales.T),
            "g_idx": torch.from_numpy(owner.astype(np.int32)),
        }
        values[name] = coded.weight()
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "sym": symmetric,
        "desc_act": act_order is not None,
        "damp_percent": 0.01,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **changes,
    }
    return write(path, model, settings, parts, values)


def write_compressed(
    path: Path,
    model: Any,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    form: str = "pack-quantized",
    inputs: dict[str, Any] | None = None,
    scale: Any = np.float16,
    **changes: Any,
) -> dict[str, NDArray[np.float32]]:
    parts, values = {}, {}
    middle = 2 ** (bits - 1)
    for name, module in layer_linears(model).items():
        coded = quantized(module.weight.detach().numpy(), bits, group, symmetric, scale=scale)
        stored: dict[str, Any] = {"weight_scale": torch.from_numpy(coded.scales.astype(scale))}
        if form == "pack-quantized":
            stored["weight_packed"] = words(stream_rows(coded.codes, bits))
            stored["weight_shape"] = torch.tensor(coded.codes.shape)
            if not symmetric:
                stored["weight_zero_point"] = words(stream_rows(coded.zeros.T, bits).T)
        else:
            stored["weight"] = torch.from_numpy((coded.codes - middle).astype(np.int8))
            if not symmetric:
                stored["weight_zero_point"] = torch.from_numpy(
                    (coded.zeros - middle).astype(np.int8)
                )
        parts[name] = stored
        values[name] = coded.weight()
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "group" if group else "channel",
                    "group_size": group or None,
                    "dynamic": False,
                },
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }
    return write(path, model, settings, parts, values)
