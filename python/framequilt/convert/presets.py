"""Presets of the converter: weights, activations and KV cache that go together.

They follow findings of "Evaluating Quantized Large Language Models" (arXiv 2402.18158), means over
its published results: 8-bit weights and KV caches cost nothing; 4-bit weights a point on knowledge
tasks and 2 to 4 on arithmetic; 8-bit inputs at most a point more. Those are asymmetric, as in the
paper: what they add to the divergence is about half of what symmetric ones add, and they are as
fast (quantize/METHODS.md, "Inputs of 8 bits"). Queries and keys of a vision tower in 8 bits add
nothing to that which stands out from noise ("Attention of the vision tower in 8 bits"). Three bits
everywhere lose 5 points on knowledge and 13 on arithmetic, and the smaller a model is, the more: so
they are for the MLPs only, which are most of a model, and neither its first nor its last layers.

Pure data: no memory, any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from framequilt.errors import InvalidArgument


@dataclass(frozen=True)
class Preset:
    """What a preset stands for; patterns of parts that a model lacks are passed over."""

    name: str
    weights: str
    activations: str
    kv: str
    about: str  # one or two sentences for people

    @property
    def summary(self) -> str:
        """What is recorded in a model."""
        return f"{self.name}: {self.weights}, {self.activations}, {self.kv}; {self.about}"


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "fast",
            "w4g128",
            "a8-asym,attention=a8",
            "kv8",
            "integer products of 4-bit weights and 8-bit inputs, whose range need not be "
            "symmetric, and in the attention of a vision tower: the quickest prompts and answers",
        ),
        Preset(
            "small",
            "w4g64,layers.*.mlp.*=w3g64,layers.0.*=w4g64,layers.1.*=w4g64,layers.-2.*=w4g64,"
            "layers.-1.*=w4g64,embedding=w6g64,lm_head=w6g64",
            "a16",
            "k8v4",
            "3 bits for the MLPs, 4 for attention and the outer layers, the least memory: for "
            "models of many parameters, which lose little by it",
        ),
        Preset(
            "exact",
            "w8g128",
            "a16",
            "kv16",
            "8-bit weights, nothing else quantized: what differs from the original is noise",
        ),
    )
}


def find(name: str) -> Preset:
    """Errors: InvalidArgument, which lists what there is."""
    if name not in PRESETS:
        raise InvalidArgument(f"{name!r} is no preset", f"known: {', '.join(PRESETS)}")
    return PRESETS[name]
