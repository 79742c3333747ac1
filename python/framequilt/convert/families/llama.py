"""LLaMA and its like: RMS norm, rotary grouped-query attention, SwiGLU, optional biases."""

from __future__ import annotations

from dataclasses import replace

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
    bias = cfg.flag("attention_bias", False)
    decoder = read_decoder(
        cfg, qkv_bias=bias, output_bias=bias, mlp_bias=cfg.flag("mlp_bias", False)
    )
    # Fine-tunes for longer contexts keep the base's max_position_embeddings and say theirs here.
    longer = cfg.integer("max_sequence_length", None)
    if longer is not None and longer > decoder.context:
        decoder = replace(decoder, context=longer)
    cfg.require("rope_interleaved", False, reason="rotary pairs have to be halves of a head")
    cfg.ignore("is_llama_config", "transformers.js_config")  # notes to other programs
    cfg.require("is_decoder", False, True, reason="")
    cfg.require("is_encoder_decoder", False, reason="encoders are not part of this family")
    cfg.require("add_cross_attention", False, reason="cross attention is not supported")
    cfg.require("tie_encoder_decoder", False, reason="encoders are not part of this family")
    cfg.ignore("cross_attention_hidden_size")  # without cross attention it means nothing
    cfg.finish()
    return Description(
        Model(decoder),
        decoder_rules("model.", "lm_head"),
        decoder_left_out("model.", "lm_head", decoder.tied_embedding),
        text_config=source.config,
    )


FAMILY = Family("llama", ("LlamaForCausalLM",), ("llama",), describe)
