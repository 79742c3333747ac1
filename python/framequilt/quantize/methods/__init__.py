"""Methods on top of round-to-nearest: RTN, AWQ, SmoothQuant, GPTQ (METHODS.md has the figures).

    from framequilt.quantize.methods import calibrate
    result = calibrate(checkpoint, samples, method="awq", weights="w3g128", work="work/awq")

`runner` goes through the layers of a checkpoint; `awq`, `smoothquant` and `gptq` decide what
becomes of one half of a layer; `grids` is the quantizer in torch, `rescale` the application of
factors and clips, `result` what is kept, `evaluation` the measurement. Needs torch (the extra
`convert`).
"""

from framequilt.quantize.methods.result import LayerResult, MethodResult
from framequilt.quantize.methods.runner import METHODS, Step, calibrate

__all__ = ["METHODS", "LayerResult", "MethodResult", "Step", "calibrate"]
