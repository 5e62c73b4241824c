# 64-bit ARM Linux with Debian's cross-compiler; programs run under QEMU's emulation of one process.
# MINIQUANT_ARM_ROOT: a folder with more libraries of such a system, among them those that the compiler's programs load.

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES MINIQUANT_ARM_ROOT)
if(MINIQUANT_ARM_ROOT)
  list(PREPEND CMAKE_FIND_ROOT_PATH "${MINIQUANT_ARM_ROOT}")
  set(CMAKE_CXX_FLAGS_INIT "-isystem ${MINIQUANT_ARM_ROOT}/usr/include/aarch64-linux-gnu")
  # Programs find libraries of the system there without being told, and so does the linker those that libraries need.
  set(CMAKE_PLATFORM_IMPLICIT_LINK_DIRECTORIES "${MINIQUANT_ARM_ROOT}/usr/lib/aarch64-linux-gnu")
  set(CMAKE_EXE_LINKER_FLAGS_INIT "-Wl,-rpath-link,${MINIQUANT_ARM_ROOT}/lib/aarch64-linux-gnu")
endif()
# Without SVE: with the longest vectors, which QEMU takes, OpenBLAS computes wrong factorizations.
list(GET CMAKE_FIND_ROOT_PATH 0 _libraries)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;${_libraries};-cpu;max,sve=off)
