# nlohmann/json: JSON for config files and safetensors headers. Defines framequilt_deps::nlohmann_json.
if(TARGET framequilt_deps::nlohmann_json)
  return()
endif()
find_package(nlohmann_json 3.11 CONFIG QUIET)
if(nlohmann_json_FOUND)
  framequilt_dependency_found(nlohmann_json nlohmann_json::nlohmann_json
    "system package ${nlohmann_json_VERSION}")
  return()
endif()

framequilt_pip_package_dir(nlohmann_json framequilt_nlohmann_json_dir)
if(EXISTS "${framequilt_nlohmann_json_dir}/include/nlohmann/json.hpp")
  add_library(framequilt_nlohmann_json INTERFACE IMPORTED GLOBAL)
  target_include_directories(framequilt_nlohmann_json
    INTERFACE "${framequilt_nlohmann_json_dir}/include")
  framequilt_dependency_found(nlohmann_json framequilt_nlohmann_json "pip package")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(nlohmann_json https://github.com/nlohmann/json.git 9cca280a4d0ccf0c08f47a99aa71d1b0e52f8d03
    JSON_BuildTests=OFF JSON_Install=OFF)
  framequilt_dependency_found(nlohmann_json nlohmann_json::nlohmann_json "downloaded, 3.11.3")
else()
  framequilt_dependency_missing(nlohmann_json nlohmann-json3-dev)
endif()
