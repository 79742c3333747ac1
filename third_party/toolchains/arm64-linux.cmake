# Toolchain of the preset arm64: 64-bit Arm Linux from another machine, tests through qemu's user mode.
# The C library, the dependencies and their headers come from one folder, build/arm64-sysroot, that
# `.ci/arm` fills from Debian's arm64 packages; the machine's own packages are neither used nor changed.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

cmake_path(SET framequilt_arm64_sysroot NORMALIZE "${CMAKE_CURRENT_LIST_DIR}/../../build/arm64-sysroot")
if(NOT EXISTS "${framequilt_arm64_sysroot}/usr/include")
  message(FATAL_ERROR "${framequilt_arm64_sysroot} has no arm64 packages yet: run `make test-arm`, which "
                      "fetches them.")
endif()
set(CMAKE_SYSROOT "${framequilt_arm64_sysroot}")

set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR "qemu-aarch64;-L;${framequilt_arm64_sysroot}")

# Programs are the machine's, everything else is the folder's.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
