# Flags that the kernels need on some processors; included by whatever compiles them.
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
