# LibTorch and OpenMP. LibTorch: from Torch_DIR or CMAKE_PREFIX_PATH if given, otherwise the torch of the Python that is
# found.

include(MiniquantTorch)

find_package(Python3 QUIET COMPONENTS Interpreter)
set(_torch_of_python "")
if(Python3_FOUND)
  miniquant_torch_of_python(_torch_of_python "${Python3_EXECUTABLE}")
endif()
miniquant_import_torch(_torch_error HINTS ${_torch_of_python})
if(_torch_error)
  message(FATAL_ERROR "miniquant needs LibTorch ${MINIQUANT_TORCH_MIN} or newer: ${_torch_error}, or install torch for "
                      "${Python3_EXECUTABLE}")
elseif(MINIQUANT_TORCH_VERSION VERSION_LESS MINIQUANT_TORCH_MIN)
  message(FATAL_ERROR "miniquant needs LibTorch ${MINIQUANT_TORCH_MIN} or newer, and that of ${Torch_DIR} is "
                      "${MINIQUANT_TORCH_VERSION}")
elseif(MINIQUANT_TORCH_VERSION VERSION_GREATER_EQUAL MINIQUANT_TORCH_BELOW)
  message(WARNING "miniquant is tested with LibTorch from ${MINIQUANT_TORCH_MIN} to before ${MINIQUANT_TORCH_BELOW}, and "
                  "that of ${Torch_DIR} is ${MINIQUANT_TORCH_VERSION}")
endif()
message(STATUS "LibTorch ${MINIQUANT_TORCH_VERSION}: ${MINIQUANT_TORCH_PREFIX}")
find_package(OpenMP REQUIRED COMPONENTS CXX)
