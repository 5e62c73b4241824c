# cmake -DGIT_EXECUTABLE=... -DSOURCE_DIR=... -DOUTPUT=... -P git_revision.cmake
# Writes a header with the commit checked out in SOURCE_DIR, or an empty string if SOURCE_DIR is not the top of a
# checkout.

set(revision "")
if(GIT_EXECUTABLE AND EXISTS "${SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" rev-parse --verify HEAD
    WORKING_DIRECTORY "${SOURCE_DIR}"
    OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
file(WRITE "${OUTPUT}" "#pragma once\n\n#define MINIQUANT_GIT_REVISION \"${revision}\"\n")
