# LibTorch as imported targets made from its folders and its version file. find_package(Torch) is not used: with a CUDA
# build it fails without the CUDA toolkit, which this project does not need.
#   miniquant::torch     headers, libtorch_cpu, libc10
#   miniquant::libtorch  libtorch.so, for programs that load AOTInductor packages, which need it
# The build includes this file, and so does the installed CMake package.

# The oldest version that the source compiles with, and the first version that it was not tested with.
set(MINIQUANT_TORCH_MIN 2.9)
set(MINIQUANT_TORCH_BELOW 2.16)

# Versions, from the first to before the second, for which one binary works whichever of them it was built against.
# Found by testing (scripts/torch_matrix.py). A binary for any other version works with that version's patch releases
# only.
set(MINIQUANT_TORCH_BINARIES 2.13-2.16)

# miniquant_torch_served(<version> <min> <below>): the versions, from min to before below, that a library built against
# <version> works with. setup.py has the same rule.
function(miniquant_torch_served version min_variable below_variable)
  string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" min "${version}")
  math(EXPR next "${CMAKE_MATCH_2} + 1")
  set(below "${CMAKE_MATCH_1}.${next}")
  foreach(binary IN LISTS MINIQUANT_TORCH_BINARIES)
    string(REPLACE "-" ";" bounds "${binary}")
    list(GET bounds 0 first)
    list(GET bounds 1 end)
    if(min VERSION_GREATER_EQUAL first AND min VERSION_LESS end)
      set(min "${first}")
      set(below "${end}")
      break()
    endif()
  endforeach()
  set(${min_variable} "${min}" PARENT_SCOPE)
  set(${below_variable} "${below}" PARENT_SCOPE)
endfunction()

# miniquant_torch_of_python(<folder> <python>): the folder of the CMake package of the torch that a Python finds, or an
# empty string. torch is not imported, because that takes seconds.
function(miniquant_torch_of_python folder_variable python)
  string(CONCAT code
    "import importlib.util, os\n"
    "spec = importlib.util.find_spec('torch')\n"
    "if spec is not None and spec.submodule_search_locations:\n"
    "    print(os.path.join(spec.submodule_search_locations[0], 'share', 'cmake', 'Torch'), end='')\n")
  execute_process(COMMAND "${python}" -c "${code}" OUTPUT_VARIABLE folder ERROR_QUIET)
  set(${folder_variable} "${folder}" PARENT_SCOPE)
endfunction()

# miniquant_import_torch(<error> [HINTS <folder>...])
# Defines the targets from Torch_DIR, otherwise from the first folder with LibTorch among CMAKE_PREFIX_PATH and the
# hints (folders of TorchConfig.cmake). Sets MINIQUANT_TORCH_VERSION, MINIQUANT_TORCH_PREFIX and MINIQUANT_TORCH_LIB,
# and <error> to what is missing, or to an empty string.
function(miniquant_import_torch error_variable)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "HINTS")
  set(${error_variable} "" PARENT_SCOPE)

  if(NOT Torch_DIR)
    set(prefixes ${Torch_ROOT} $ENV{Torch_ROOT} ${CMAKE_PREFIX_PATH})
    if(DEFINED ENV{CMAKE_PREFIX_PATH})
      string(REPLACE ":" ";" environment_prefixes "$ENV{CMAKE_PREFIX_PATH}")
      list(APPEND prefixes ${environment_prefixes})
    endif()
    find_path(Torch_DIR TorchConfig.cmake
      PATHS ${prefixes} ${CMAKE_SYSTEM_PREFIX_PATH}
      PATH_SUFFIXES Torch share/cmake/Torch lib/cmake/Torch "lib/${CMAKE_LIBRARY_ARCHITECTURE}/cmake/Torch"
      NO_DEFAULT_PATH
      DOC "The folder of LibTorch's TorchConfig.cmake")
    if(NOT Torch_DIR)
      find_path(Torch_DIR TorchConfig.cmake PATHS ${arg_HINTS} NO_DEFAULT_PATH)
    endif()
  endif()
  if(NOT Torch_DIR)
    set(${error_variable} "no LibTorch was found: set Torch_DIR to the folder of its TorchConfig.cmake" PARENT_SCOPE)
    return()
  endif()

  set(version_file "${Torch_DIR}/TorchConfigVersion.cmake")
  if(NOT EXISTS "${version_file}")
    set(${error_variable} "Torch_DIR is ${Torch_DIR}, which holds no TorchConfigVersion.cmake" PARENT_SCOPE)
    return()
  endif()
  unset(PACKAGE_FIND_VERSION)
  include("${version_file}")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${version_file}")

  get_filename_component(prefix "${Torch_DIR}/../../.." ABSOLUTE)
  foreach(name torch_cpu c10 torch)
    find_library(lib${name} ${name} NO_CACHE NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH
      PATHS "${prefix}" "${prefix}/.."
      PATH_SUFFIXES lib lib64 "lib/${CMAKE_LIBRARY_ARCHITECTURE}" "${CMAKE_LIBRARY_ARCHITECTURE}")
    if(NOT lib${name})
      set(${error_variable} "Torch_DIR is ${Torch_DIR}, and there is no lib${name} in ${prefix}/lib" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  find_path(include ATen/ATen.h NO_CACHE NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH
    PATHS "${prefix}" "${prefix}/.."
    PATH_SUFFIXES include)
  if(NOT include)
    set(${error_variable} "Torch_DIR is ${Torch_DIR}, and there are no headers in ${prefix}/include" PARENT_SCOPE)
    return()
  endif()
  get_filename_component(lib "${libtorch_cpu}" DIRECTORY)
  set(MINIQUANT_TORCH_VERSION "${PACKAGE_VERSION}" PARENT_SCOPE)
  set(MINIQUANT_TORCH_PREFIX "${prefix}" PARENT_SCOPE)
  set(MINIQUANT_TORCH_LIB "${lib}" PARENT_SCOPE)

  if(NOT TARGET miniquant::torch)
    add_library(miniquant::torch SHARED IMPORTED)
    set_target_properties(miniquant::torch PROPERTIES
      IMPORTED_LOCATION "${libtorch_cpu}"
      INTERFACE_LINK_LIBRARIES "${libc10}"
      INTERFACE_INCLUDE_DIRECTORIES "${include};${include}/torch/csrc/api/include"
      INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${include};${include}/torch/csrc/api/include"
      INTERFACE_COMPILE_FEATURES cxx_std_20)
    add_library(miniquant::libtorch INTERFACE IMPORTED)
    # The library defines no symbol, so a linker with --as-needed would drop it.
    set_target_properties(miniquant::libtorch PROPERTIES
      INTERFACE_LINK_OPTIONS "LINKER:--push-state,--no-as-needed,${libtorch},--pop-state")
  endif()
endfunction()
