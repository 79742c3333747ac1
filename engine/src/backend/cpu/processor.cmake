# Flags that the kernels need on some processors, and kernels that not every assembler knows; included
# by whatever compiles them.
#
# 64-bit Arm with GCC: Highway compiles its NEON functions with the AES and SHA extensions on, and GCC
# compiles the constructors that it makes for a struct of vectors without; one cannot be inlined
# into the other then. With the flag the whole file has what those functions have. No kernel uses
# such an instruction, and Highway chooses NEON only where the processor has them.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU"
   AND NOT CMAKE_CXX_FLAGS MATCHES "-m(arch|cpu)=")
  file(GLOB framequilt_arm_kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cc)
  set_property(SOURCE ${framequilt_arm_kernels} APPEND PROPERTY COMPILE_OPTIONS
               -march=armv8-a+crypto)
endif()

# x86-64: the kernels of AVX2 with a dot product (AVX-VNNI) are assembly that names the encoding,
# which assemblers know since GNU binutils 2.36 and LLVM 12. With an older one everything
# else is built, and machines with that extension run the kernels of AVX2.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  include(CheckCXXSourceCompiles)
  check_cxx_source_compiles([[
    #ifndef __x86_64__
    #error
    #endif
    #include <immintrin.h>
    __attribute__((target("avx2"))) void twice(__m256i* x) {
      __m256i sum = x[0];
      __asm__("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum) : "x"(x[1]));
      __asm__("%{evex%} vpdpwssd %1, %1, %0" : "+x"(sum) : "x"(x[1]));
      x[0] = sum;
    }
    int main() { return 0; }
  ]] FRAMEQUILT_AVX2_VNNI)
  if(FRAMEQUILT_AVX2_VNNI)
    file(GLOB framequilt_avx2_vnni_kernels CONFIGURE_DEPENDS
         ${CMAKE_CURRENT_LIST_DIR}/*_avx_vnni.cc ${CMAKE_CURRENT_LIST_DIR}/*_avx512_vnni.cc)
    set_property(SOURCE ${CMAKE_CURRENT_LIST_DIR}/targets.cc ${framequilt_avx2_vnni_kernels}
                 APPEND PROPERTY COMPILE_DEFINITIONS FRAMEQUILT_AVX2_VNNI=1)
  else()
    message(STATUS "Target avx2_vnni: not built, the assembler does not know {vex} vpdpbusd")
  endif()

  # Matrix registers, in assembly as well: GNU binutils 2.35, LLVM 12. Linux gives them to a process
  # that asks.
  check_cxx_source_compiles([[
    #if !defined(__x86_64__) || !defined(__linux__)
    #error
    #endif
    int main() {
      __asm__ volatile("tdpbsud %tmm2, %tmm1, %tmm0");
      __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
      return 0;
    }
  ]] FRAMEQUILT_AMX)
  if(FRAMEQUILT_AMX)
    set_property(SOURCE ${CMAKE_CURRENT_LIST_DIR}/targets.cc APPEND PROPERTY
                 COMPILE_DEFINITIONS FRAMEQUILT_HAVE_AMX_FILES=1)
    file(GLOB framequilt_amx_kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*_amx.cc)
    set_property(SOURCE ${framequilt_amx_kernels}
                 APPEND PROPERTY COMPILE_DEFINITIONS FRAMEQUILT_AMX=1)
  else()
    message(STATUS "Target avx3_amx: not built, the assembler does not know tdpbsud")
  endif()
endif()
