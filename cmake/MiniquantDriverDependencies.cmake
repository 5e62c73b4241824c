# Libraries that the driver needs beyond LibTorch: the installed package first, then, for some, a pinned and hashed
# download.

include(FetchContent)
if(POLICY CMP0135)
  # Files from a downloaded archive get the time of unpacking, so targets that depend on them are rebuilt.
  cmake_policy(SET CMP0135 NEW)
endif()

find_package(nlohmann_json 3.10 QUIET)
if(NOT nlohmann_json_FOUND)
  FetchContent_Declare(nlohmann_json
    URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
    URL_HASH SHA256=d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)
  set(JSON_BuildTests OFF CACHE INTERNAL "")
  set(JSON_Install OFF CACHE INTERNAL "")
  FetchContent_MakeAvailable(nlohmann_json)
endif()

find_package(CLI11 2.1 QUIET)
if(NOT CLI11_FOUND)
  FetchContent_Declare(CLI11
    URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.4.2.tar.gz
    URL_HASH SHA256=f2d893a65c3b1324c50d4e682c0cdc021dd0477ae2c048544f39eed6654b699a)
  set(CLI11_BUILD_DOCS OFF CACHE INTERNAL "")
  set(CLI11_BUILD_EXAMPLES OFF CACHE INTERNAL "")
  set(CLI11_BUILD_TESTS OFF CACHE INTERNAL "")
  set(CLI11_INSTALL OFF CACHE INTERNAL "")
  FetchContent_MakeAvailable(CLI11)
endif()

find_package(OpenSSL 1.1 QUIET COMPONENTS Crypto)
if(NOT TARGET OpenSSL::Crypto)
  message(FATAL_ERROR "The gptq_toy driver needs the headers of OpenSSL's libcrypto: `apt-get install libssl-dev` "
                      "(elsewhere: openssl-devel), or configure with -DMINIQUANT_BUILD_DRIVER=OFF.")
endif()
