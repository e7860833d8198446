# What doubleweave-run and its tokenizer need beyond ExecuTorch: PCRE2 and nlohmann's JSON. The package index has the sources of both in
# the source distribution of pytorch-tokenizers, and pip fetches that.
#
# Sets DOUBLEWEAVE_HAS_THIRD_PARTY; gives the targets pcre2-8-static and doubleweave_json.
set(DOUBLEWEAVE_THIRD_PARTY "" CACHE PATH "An unpacked source distribution of pytorch-tokenizers; pip fetches one otherwise")
set(DOUBLEWEAVE_THIRD_PARTY_SHA256 19938c0efd5348fb0589610094c1c6bf6e055b20889f6250068d2b552a0b137b)
set(DOUBLEWEAVE_HAS_THIRD_PARTY FALSE)

set(sources "${DOUBLEWEAVE_THIRD_PARTY}")
if(NOT sources)
  set(folder "${CMAKE_BINARY_DIR}/third_party")
  set(sources "${folder}/pytorch_tokenizers-1.0.1")
  if(NOT EXISTS "${sources}/third-party")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps
              --no-binary pytorch-tokenizers --dest "${folder}" pytorch-tokenizers==1.0.1
      OUTPUT_QUIET ERROR_VARIABLE problem)
    set(archive "${folder}/pytorch_tokenizers-1.0.1.tar.gz")
    set(digest "")
    if(EXISTS "${archive}")
      file(SHA256 "${archive}" digest)
    endif()
    if(digest STREQUAL DOUBLEWEAVE_THIRD_PARTY_SHA256)
      file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${folder}")
    endif()
  endif()
endif()
if(NOT EXISTS "${sources}/third-party/pcre2" OR NOT EXISTS "${sources}/third-party/json/single_include")
  message(WARNING "doubleweave-run is left out: no sources of PCRE2 and JSON in '${sources}' ${problem}")
  return()
endif()

add_library(doubleweave_json INTERFACE)
target_include_directories(doubleweave_json SYSTEM INTERFACE "${sources}/third-party/json/single_include")
block()
  foreach(option IN ITEMS PCRE2_BUILD_PCRE2_16 PCRE2_BUILD_PCRE2_32 PCRE2_BUILD_TESTS PCRE2_BUILD_PCRE2GREP PCRE2_SUPPORT_JIT
                          BUILD_SHARED_LIBS)
    set(${option} OFF)
  endforeach()
  set(PCRE2_BUILD_PCRE2_8 ON)
  set(BUILD_STATIC_LIBS ON)
  set(CMAKE_POLICY_DEFAULT_CMP0077 NEW) # the options above hold in a project of an older CMake
  add_subdirectory("${sources}/third-party/pcre2" "${CMAKE_BINARY_DIR}/pcre2" EXCLUDE_FROM_ALL SYSTEM)
endblock()
set(DOUBLEWEAVE_HAS_THIRD_PARTY TRUE)
