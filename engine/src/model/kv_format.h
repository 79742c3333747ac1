// Number formats of the KV cache and their names: what a model recommends and an engine is asked
// for. Values; any thread.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "framequilt/status.h"

namespace fq::model {

// Bits and groups that there are; the first digits of none are another.
inline constexpr std::array kKvBits = {32, 16, 8, 6, 4, 3, 2};
inline constexpr std::array kKvGroups = {16, 32, 64, 128};

struct KvFormat {
  int k_bits = 16, v_bits = 16;  // each 32, 16, 8, 6, 4, 3 or 2
  int group = 0;                 // requested group of codes: 16, 32, 64, 128; 0: 128
  bool ends16 = false;           // parts of the first and the last layer of at least 16 bits
  bool rotate = false;           // Hadamard rotation of K and V (ops/rotate.h)
  bool scale32 = false;          // float32 scales, for comparison with the published quantizer

  // "kv8", "k8v4", "kv4g32", "kv4g32+ends16+rotate+scale32": one name for one format.
  std::string name() const;
  bool has_codes() const { return k_bits <= 8 || v_bits <= 8; }
  // The format of one layer of `layers`.
  KvFormat of_layer(int layer, int layers) const;
  friend bool operator==(const KvFormat&, const KvFormat&) = default;
};

// Grammar: ("kv" bits | "k" bits "v" bits) ["g" group] {"+ends16" | "+rotate" | "+scale32"},
// options in any order, each at most once; group and options that would change nothing are refused
// (no codes, nothing under 16 bits). Errors: invalid_argument that says what there is.
Result<KvFormat> parse_kv_format(std::string_view text);

}  // namespace fq::model
