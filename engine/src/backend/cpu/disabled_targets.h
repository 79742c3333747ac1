// The targets that this backend does not compile for: SSSE3 (its machines have SSE4 in practice)
// and SVE (NEON serves those). Every file that uses Highway includes this first.
#pragma once

#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif
