// Extensions of processors that Highway has no targets for. A file of kernels that one of them
// speeds up is compiled once more for it: by a file that defines one of these and includes it.
//
// FRAMEQUILT_NEON_DOT: 1 for SDOT (signed bytes), 2 for USDOT as well;
// FRAMEQUILT_AVX2_DOT: 1 for AVX-VNNI, 2 for the same instructions as AVX-512 encodes them: but for
//   that, what processors with VNNI for AVX-512 only test is what the others run;
// FRAMEQUILT_AMX: 1 for AVX-512 with VNNI and the matrix registers of AMX (amx-inl.h);
// FRAMEQUILT_FOLD: 1 for AVX-512 with VNNI where adding is cheaper than multiplying
//   (winograd-inl.h).
#pragma once

// Whatever differs between the files of one Highway target lives in a namespace of its own: inline
// inside of that target's, and in fq::backend::cpu for the functions that fill the table
// (kernels.h).
#if FRAMEQUILT_NEON_DOT == 2
#define FRAMEQUILT_DOT_NAMESPACE neon_i8mm
#elif FRAMEQUILT_NEON_DOT == 1
#define FRAMEQUILT_DOT_NAMESPACE neon_dot
#elif FRAMEQUILT_AMX
#define FRAMEQUILT_DOT_NAMESPACE amx
#elif FRAMEQUILT_FOLD
#define FRAMEQUILT_DOT_NAMESPACE fold
#elif FRAMEQUILT_AVX2_DOT == 2
#define FRAMEQUILT_DOT_NAMESPACE avx512_vnni
#elif FRAMEQUILT_AVX2_DOT == 1
#define FRAMEQUILT_DOT_NAMESPACE avx_vnni
#else
#define FRAMEQUILT_DOT_NAMESPACE any_processor
#endif

// An instruction of the dot product of 256 bits, in assembly. The assembler would take AVX-512's
// encoding if it were not told; the registers are the 16 that both encodings reach.
#if FRAMEQUILT_AVX2_DOT == 2
#define FRAMEQUILT_AVX2_DOT_CODE(instruction) "%{evex%} " instruction
#elif FRAMEQUILT_AVX2_DOT == 1
#define FRAMEQUILT_AVX2_DOT_CODE(instruction) "%{vex%} " instruction
#endif
