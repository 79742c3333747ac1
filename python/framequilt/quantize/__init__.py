"""Weight quantization: formats and schemes, round-to-nearest groups, and the tiled layouts of the
engine (engine/CONTRACT.md, 1.3). numpy only."""

from framequilt.quantize.formats import Scheme, WeightFormat, parse_format, parse_scheme
from framequilt.quantize.rtn import Quantized, dequantize, quantize
from framequilt.quantize.tiles import (
    from_bf16,
    pack_bf16,
    pack_codes,
    pack_f32,
    pack_rows,
    pack_table,
    pad_rows,
    to_bf16,
    unpack_bf16,
    unpack_codes,
    unpack_f32,
    unpack_linear,
    unpack_table,
)

__all__ = [
    "Quantized",
    "Scheme",
    "WeightFormat",
    "dequantize",
    "from_bf16",
    "pack_bf16",
    "pack_codes",
    "pack_f32",
    "pack_rows",
    "pack_table",
    "pad_rows",
    "parse_format",
    "parse_scheme",
    "quantize",
    "to_bf16",
    "unpack_bf16",
    "unpack_codes",
    "unpack_f32",
    "unpack_linear",
    "unpack_table",
]
