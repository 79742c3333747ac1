# PCRE2 (8-bit, UTF): the pre-tokenizer patterns of byte-level BPE. Defines framequilt_deps::pcre2.
if(TARGET framequilt_deps::pcre2)
  return()
endif()
find_path(framequilt_pcre2_include pcre2.h)
find_library(framequilt_pcre2_library pcre2-8)
if(framequilt_pcre2_include AND framequilt_pcre2_library)
  add_library(framequilt_pcre2 UNKNOWN IMPORTED GLOBAL)
  set_target_properties(framequilt_pcre2 PROPERTIES
    IMPORTED_LOCATION "${framequilt_pcre2_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${framequilt_pcre2_include}"
    INTERFACE_COMPILE_DEFINITIONS PCRE2_CODE_UNIT_WIDTH=8)
  framequilt_dependency_found(pcre2 framequilt_pcre2 "${framequilt_pcre2_library}")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(pcre2 https://github.com/PCRE2Project/pcre2.git 6ae58beca071f13ccfed31d03b3f479ab520639b
    PCRE2_BUILD_PCRE2_8=ON PCRE2_SUPPORT_JIT=ON PCRE2_SUPPORT_UNICODE=ON
    PCRE2_BUILD_PCRE2GREP=OFF PCRE2_BUILD_TESTS=OFF PCRE2_STATIC_PIC=ON)
  target_compile_definitions(pcre2-8-static INTERFACE PCRE2_CODE_UNIT_WIDTH=8 PCRE2_STATIC)
  framequilt_dependency_found(pcre2 pcre2-8-static "downloaded, 10.44")
else()
  framequilt_dependency_missing(pcre2 libpcre2-dev)
endif()
