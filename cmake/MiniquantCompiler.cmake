# Compile options of every target in this project. `miniquant_compiler` is linked PRIVATE and never exported.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

add_library(miniquant_compiler INTERFACE)
# Fused multiply-adds move rounding ties, so the compiler makes none; the code asks for them explicitly.
target_compile_options(miniquant_compiler INTERFACE -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion
                                                    -ffp-contract=off)
if(MINIQUANT_WERROR)
  target_compile_options(miniquant_compiler INTERFACE -Werror)
endif()
# TensorOperators.h includes the headers of the operators that it calls, not those of all operators.
target_compile_definitions(miniquant_compiler INTERFACE AT_PER_OPERATOR_HEADERS)
if(MINIQUANT_SANITIZE)
  # libtorch carries no type information for the vptr check.
  set(_sanitize -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
  target_compile_options(miniquant_compiler INTERFACE ${_sanitize} -fno-omit-frame-pointer)
  target_link_options(miniquant_compiler INTERFACE ${_sanitize})
endif()
