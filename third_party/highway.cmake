# Highway: SIMD with dispatch at run time. Defines framequilt_deps::highway.
if(TARGET framequilt_deps::highway)
  return()
endif()
find_package(hwy 1.0.3 CONFIG QUIET)
if(hwy_FOUND)
  framequilt_dependency_found(highway hwy::hwy "system package ${hwy_VERSION}")
  return()
endif()

# Some packages carry the header and the library but no CMake files.
find_path(framequilt_hwy_include hwy/highway.h)
find_library(framequilt_hwy_library hwy)
if(framequilt_hwy_include AND framequilt_hwy_library)
  add_library(framequilt_hwy UNKNOWN IMPORTED GLOBAL)
  set_target_properties(framequilt_hwy PROPERTIES
    IMPORTED_LOCATION "${framequilt_hwy_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${framequilt_hwy_include}")
  if(framequilt_hwy_library MATCHES "\\.so")
    target_compile_definitions(framequilt_hwy INTERFACE HWY_SHARED_DEFINE)
  endif()
  framequilt_dependency_found(highway framequilt_hwy "${framequilt_hwy_library}")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(highway https://github.com/google/highway.git 457c891775a7397bdb0376bb1031e6e027af1c48
    HWY_ENABLE_TESTS=OFF HWY_ENABLE_EXAMPLES=OFF HWY_ENABLE_CONTRIB=OFF HWY_ENABLE_INSTALL=OFF)
  framequilt_dependency_found(highway hwy "downloaded, 1.2.0")
else()
  framequilt_dependency_missing(highway libhwy-dev)
endif()
