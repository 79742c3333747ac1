// Scalar reference of appending rows to the KV pages of a layer. Pages belong to the caller.
#include "src/ops/ops.h"

namespace fq::ops {

void kv_append_reference(const KvAppendArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t token = args.begin + row;
    quant::kv_write_reference(*args.kv.layout, args.kv.pages[token / quant::kPageTokens],
                              static_cast<int>(token % quant::kPageTokens),
                              args.k + row * args.k_stride, args.v + row * args.v_stride);
  }
}

}  // namespace fq::ops
