"""Names of KV cache formats, the same grammar as the engine's (engine/src/quant/kv_format.h).

    ("kv" bits | "k" bits "v" bits) ["g" group] {"+ends16" | "+rotate" | "+scale32"}

with bits of 32, 16, 8, 6, 4, 3, 2 and groups of 16, 32, 64, 128 along the head dimension: `kv8`,
`k8v4`, `kv4g32+ends16+rotate`. A test keeps both readers alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from framequilt.errors import InvalidArgument

BITS = (32, 16, 8, 6, 4, 3, 2)
GROUPS = (16, 32, 64, 128)
DEFAULT_GROUP = 128
PAGE_TOKENS = 64
_NAME = re.compile(
    r"(?:kv(?P<both>\d+)|k(?P<k>\d+)v(?P<v>\d+))(?:g(?P<group>\d+))?(?P<options>(?:\+[a-z0-9]+)*)",
    re.ASCII,
)
_OPTIONS = ("ends16", "rotate", "scale32")


@dataclass(frozen=True)
class KvFormat:
    """How a KV cache stores K and V.

    `k_bits`, `v_bits`: 32 and 16 are floats, the others codes. `group`: dims of a head that share
    scale and zero; 0 is the default, 128. `ends16`: the first and the last layer keep at least 16
    bits. `rotate`: K and V are rotated by a Hadamard matrix first. `scale32`: float32 scales.
    """

    k_bits: int = 16
    v_bits: int = 16
    group: int = 0
    ends16: bool = False
    rotate: bool = False
    scale32: bool = False

    @property
    def name(self) -> str:
        """The one name of this format."""
        same = self.k_bits == self.v_bits
        text = f"kv{self.k_bits}" if same else f"k{self.k_bits}v{self.v_bits}"
        text += f"g{self.group}" if self.group else ""
        return text + "".join(f"+{option}" for option in _OPTIONS if getattr(self, option))

    def of_layer(self, layer: int, layers: int) -> KvFormat:
        """The format of one layer of `layers`."""
        if not self.ends16:
            return self
        inner = replace(self, ends16=False)
        if layer not in (0, layers - 1):
            return inner
        k, v = max(self.k_bits, 16), max(self.v_bits, 16)
        return replace(inner, k_bits=k, v_bits=v, group=0, scale32=False)

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of K and V of one head of one token of one layer, scales and zeros included.

        Padding of a page to 64 bytes is left out: head dimensions of multiples of 8 have none.
        """
        wanted = min(self.group or DEFAULT_GROUP, head_dim)
        groups = head_dim // wanted if head_dim % wanted == 0 else 1
        size = 0.0
        for bits in (self.k_bits, self.v_bits):
            size += head_dim * bits / 8
            if bits <= 8:
                size += groups * ((4 if self.scale32 else 2) + 1)
        return size


def parse_kv_format(text: str) -> KvFormat:
    """The format of a name. Errors: InvalidArgument, which says what there is."""
    match = _NAME.fullmatch(text)
    if match is not None:
        k, v = match["both"] or match["k"], match["both"] or match["v"]
        options = match["options"].split("+")[1:]
        bits = {str(b): b for b in BITS}
        groups = {str(g): g for g in GROUPS}
        known = k in bits and v in bits and (match["group"] is None or match["group"] in groups)
        if known and set(options) <= set(_OPTIONS) and len(set(options)) == len(options):
            group = groups.get(match["group"] or "", 0)
            found = KvFormat(bits[k], bits[v], group, **dict.fromkeys(options, True))
            codes = min(found.k_bits, found.v_bits) <= 8
            if codes or not (found.group or found.ends16 or found.scale32):
                return found
    raise InvalidArgument(
        f"unknown KV cache format {text!r}",
        "use kv32, kv16, kv8, kv6, kv4, kv3, kv2, or K and V apart as in k8v4; with codes a group "
        "may follow (g16, g32, g64, g128) and +ends16, +scale32; with any +rotate: "
        "kv4g32+ends16+rotate",
    )
