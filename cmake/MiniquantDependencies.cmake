# Each dependency: the installed package first, then (where there is one) a pinned and hashed download.

include(FetchContent)

# LibTorch: an explicit CMAKE_PREFIX_PATH or Torch_DIR wins; else the torch of the Python that is found.
find_package(Torch 2.13 QUIET)
if(NOT Torch_FOUND)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c "import torch; print(torch.utils.cmake_prefix_path, end='')"
    OUTPUT_VARIABLE _torch_prefix
    ERROR_VARIABLE _torch_error
    RESULT_VARIABLE _torch_result)
  if(NOT _torch_result EQUAL 0)
    message(FATAL_ERROR "miniquant needs LibTorch 2.13: set CMAKE_PREFIX_PATH to its folder, or install "
                        "torch==2.13.0 for ${Python3_EXECUTABLE}, which said:\n${_torch_error}")
  endif()
  list(APPEND CMAKE_PREFIX_PATH "${_torch_prefix}")
  find_package(Torch 2.13 REQUIRED)
endif()
find_package(OpenMP REQUIRED COMPONENTS CXX)
