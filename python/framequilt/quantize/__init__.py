"""Weight quantization: formats and schemes, round-to-nearest groups, and the tiled layouts of the
engine (engine/CONTRACT.md, 1.3). numpy only."""

from framequilt.quantize.formats import (
    ActivationFormat,
    WeightFormat,
    parse_activations,
    parse_format,
)
from framequilt.quantize.rtn import (
    Quantized,
    dequantize,
    quantize,
    quantize_activations,
    quantize_as,
    row_sums,
)
from framequilt.quantize.schemes import (
    ActivationScheme,
    Scheme,
    parse_activation_scheme,
    parse_scheme,
)
from framequilt.quantize.tiles import (
    from_bf16,
    pack_bf16,
    pack_codes,
    pack_f32,
    pack_quantized,
    pack_rows,
    pack_table,
    pad_rows,
    to_bf16,
    unpack_bf16,
    unpack_codes,
    unpack_f32,
    unpack_linear,
    unpack_quantized,
    unpack_table,
)

__all__ = [
    "ActivationFormat",
    "ActivationScheme",
    "Quantized",
    "Scheme",
    "WeightFormat",
    "dequantize",
    "from_bf16",
    "pack_bf16",
    "pack_codes",
    "pack_f32",
    "pack_quantized",
    "pack_rows",
    "pack_table",
    "pad_rows",
    "parse_activation_scheme",
    "parse_activations",
    "parse_format",
    "parse_scheme",
    "quantize",
    "quantize_activations",
    "quantize_as",
    "row_sums",
    "to_bf16",
    "unpack_bf16",
    "unpack_codes",
    "unpack_f32",
    "unpack_linear",
    "unpack_quantized",
    "unpack_table",
]
