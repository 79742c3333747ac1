# find_package(framequilt): defines framequilt::framequilt and, where the library is static, finds what
# it links with the files that its own build used.
include("${CMAKE_CURRENT_LIST_DIR}/dependency.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/threads.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/highway.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/nlohmann_json.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/sentencepiece.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/pcre2.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/utf8proc.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/framequilt-targets.cmake")
