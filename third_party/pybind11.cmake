# pybind11: the Python module. Defines pybind11_add_module.
# Debian's 2.10 is older than we need, so pip's comes into play first: scikit-build-core puts it on
# CMAKE_PREFIX_PATH, and without scikit-build-core the interpreter is asked where it lies.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 2.13 CONFIG QUIET)
if(NOT pybind11_FOUND)
  framequilt_pip_package_dir(pybind11 framequilt_pybind11_dir)
  if(framequilt_pybind11_dir)
    find_package(pybind11 2.13 CONFIG QUIET
                 PATHS "${framequilt_pybind11_dir}/share/cmake/pybind11" NO_DEFAULT_PATH)
  endif()
endif()
if(pybind11_FOUND)
  message(STATUS "pybind11: ${pybind11_VERSION}, ${pybind11_DIR}")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(pybind11 https://github.com/pybind/pybind11.git f5fbe867d2d26e4a0a9177a51f6e568868ad3dc8
    PYBIND11_INSTALL=OFF PYBIND11_TEST=OFF)
  message(STATUS "pybind11: downloaded, 3.0.1")
else()
  message(FATAL_ERROR "pybind11 >= 2.13 was not found. Install it with `pip install pybind11` "
                      "(Debian 12's pybind11-dev is too old) or configure with "
                      "-DFRAMEQUILT_FETCH_DEPS=ON.")
endif()
