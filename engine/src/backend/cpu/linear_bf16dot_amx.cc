// The linears with inputs in bfloat16 once more, for processors with AMX: all rows are multiplied
// in matrix registers. targets.cc chooses.
#if FRAMEQUILT_AMX                            // processor.cmake
#include "src/backend/cpu/linear_bf16dot.cc"  // NOLINT(bugprone-suspicious-include)
#endif
