# The files of `cmake --install`, by component:
#   by default           headers, library, driver and CMake package: for C++
#   --component python   the library and build.json, for the folder that the Python package loads it from

option(MINIQUANT_INSTALL "Define the install rules" ${PROJECT_IS_TOP_LEVEL})
if(NOT MINIQUANT_INSTALL)
  return()
endif()

include(CMakePackageConfigHelpers)

get_filename_component(_torch_lib "${MINIQUANT_TORCH_LIB}" REALPATH)

# A wheel keeps the first two entries, which are valid wherever it is installed; the python rule below drops the third.
set(_python_rpath "$ORIGIN:$ORIGIN/../../torch/lib")
set_target_properties(miniquant PROPERTIES INSTALL_RPATH "$ORIGIN;$ORIGIN/../../torch/lib;${_torch_lib}")

install(TARGETS miniquant EXPORT miniquantTargets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/csrc/include/miniquant" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.h")
if(TARGET gptq_toy)
  set_target_properties(gptq_toy PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR};${_torch_lib}")
  install(TARGETS gptq_toy RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()

set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/miniquant")
install(EXPORT miniquantTargets NAMESPACE miniquant:: DESTINATION "${_package_dir}")
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/miniquantConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/miniquantConfig.cmake" INSTALL_DESTINATION "${_package_dir}")
# Before 1.0 a minor version may break compatibility.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/miniquantConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/miniquantConfig.cmake" "${PROJECT_BINARY_DIR}/miniquantConfigVersion.cmake"
              "${CMAKE_CURRENT_LIST_DIR}/MiniquantTorch.cmake"
        DESTINATION "${_package_dir}")

# The build's torch version, beside the library: the Python package compares it with the installed torch.
miniquant_torch_served("${MINIQUANT_TORCH_VERSION}" _torch_min _torch_below)
file(CONFIGURE OUTPUT "${PROJECT_BINARY_DIR}/build.json" @ONLY CONTENT
"{\"torch\": \"@MINIQUANT_TORCH_VERSION@\", \"torch_min\": \"@_torch_min@\", \"torch_below\": \"@_torch_below@\"}
")

# Renamed into place, so a program that has loaded the old library keeps a complete file.
install(CODE "
  set(_folder \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${MINIQUANT_PYTHON_DIR}\")
  set(_new \"\${_folder}/new\")
  file(INSTALL \"$<TARGET_FILE:miniquant>\" DESTINATION \"\${_new}\")
  file(RPATH_SET FILE \"\${_new}/$<TARGET_FILE_NAME:miniquant>\" NEW_RPATH [[${_python_rpath}]])
  file(RENAME \"\${_new}/$<TARGET_FILE_NAME:miniquant>\" \"\${_folder}/$<TARGET_FILE_NAME:miniquant>\")
  file(REMOVE_RECURSE \"\${_new}\")
  file(INSTALL \"${PROJECT_BINARY_DIR}/build.json\" DESTINATION \"\${_folder}\")
" COMPONENT python EXCLUDE_FROM_ALL)
