"""Mistral without a sliding window (v0.2 and later): the LLaMA shape without biases."""

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
from framequilt.convert.spec import Model


def describe(source: Source) -> Description:
    """Reads the config. Errors: those of `ConfigReader`."""
    cfg = ConfigReader(source.config, f"{source.path.name}: config.json")
    decoder = read_decoder(cfg, qkv_bias=False, output_bias=False, mlp_bias=False)
    window = cfg.integer("sliding_window", None)
    if window is not None and window < decoder.context:
        cfg.require("sliding_window", reason="attention with a sliding window is not supported")
    cfg.finish()
    return Description(
        Model(decoder),
        decoder_rules("model.", "lm_head"),
        decoder_left_out("model.", "lm_head", decoder.tied_embedding),
        text_config=source.config,
    )


FAMILY = Family("mistral", ("MistralForCausalLM",), ("mistral",), describe)
