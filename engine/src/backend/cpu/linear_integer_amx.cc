// The integer linears once more, for processors with AMX: many rows are multiplied in matrix
// registers. targets.cc chooses.
#if FRAMEQUILT_AMX                            // processor.cmake
#include "src/backend/cpu/linear_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
