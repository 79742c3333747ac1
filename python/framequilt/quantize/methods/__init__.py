"""Methods on top of round-to-nearest: RTN, AWQ, SmoothQuant, GPTQ (METHODS.md has the figures).

    from framequilt.quantize.methods import Calibration
    convert("checkpoint", "model", weights="w3g128", method=Calibration("awq", samples))

`converting` is what the converter takes; `runner` goes through the layers of a checkpoint; `awq`,
`smoothquant` and `gptq` decide what becomes of one half of a layer; `grids` is the quantizer in
torch, `rescale` the application of factors and clips, `result` what is kept, `evaluation` the
measurement. Needs torch (the extra `convert`).
"""

from framequilt.quantize.methods.converting import Calibration
from framequilt.quantize.methods.result import LayerResult, MethodResult
from framequilt.quantize.methods.runner import METHODS, Options, Step, calibrate

__all__ = ["METHODS", "Calibration", "LayerResult", "MethodResult", "Options", "Step", "calibrate"]
