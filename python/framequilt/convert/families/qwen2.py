"""Qwen2 and Qwen2.5: the LLaMA shape with biases on q, k and v."""

from __future__ import annotations

from framequilt.convert.config_reader import ConfigReader
from framequilt.convert.families.base import (
    Description,
    Family,
    decoder_left_out,
    decoder_rules,
    read_decoder,
)
from framequilt.convert.sources import Source
from framequilt.convert.spec import Decoder, Model

_WINDOW = "attention with a sliding window is not supported; without it answers would differ"


def read(cfg: ConfigReader, tied: bool | None = None) -> Decoder:
    """The decoder; `tied` is what an enclosing config says. Errors: those of `ConfigReader`."""
    decoder = read_decoder(cfg, qkv_bias=True, output_bias=False, mlp_bias=False, tied=tied)
    cfg.require("use_sliding_window", False, reason=_WINDOW)
    # Their values mean nothing while use_sliding_window is false.
    cfg.ignore("sliding_window", "max_window_layers")
    kinds = cfg.raw("layer_types")
    if kinds is not None:
        for kind in kinds:
            ConfigReader({"layer_types": kind}, cfg.where).require(
                "layer_types", "full_attention", reason=_WINDOW
            )
    return decoder


def describe(source: Source) -> Description:
    """Reads the config. Errors: those of `ConfigReader`."""
    cfg = ConfigReader(source.config, f"{source.path.name}: config.json")
    decoder = read(cfg)
    cfg.finish()
    return Description(
        Model(decoder),
        decoder_rules("model.", "lm_head"),
        decoder_left_out("model.", "lm_head", decoder.tied_embedding),
        text_config=source.config,
    )


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), describe)
