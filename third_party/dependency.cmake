# What the files of this folder share. Each of them defines one target, framequilt_deps::<name>, and
# looks in the same order: the system's package, then one that pip installed (where there is one),
# then a pinned download if FRAMEQUILT_FETCH_DEPS is ON, else an error that names the package to install.

# Makes framequilt_deps::<name> another name for TARGET and says where it came from.
function(framequilt_dependency_found name target where)
  add_library(framequilt_deps::${name} INTERFACE IMPORTED GLOBAL)
  target_link_libraries(framequilt_deps::${name} INTERFACE ${target})
  message(STATUS "${name}: ${where}")
endfunction()

function(framequilt_dependency_missing name apt_package)
  message(FATAL_ERROR
    "${name} was not found. Install it (Debian, Ubuntu: apt-get install ${apt_package}) or, with a "
    "network, configure with -DFRAMEQUILT_FETCH_DEPS=ON. `make setup` installs all that is needed.")
endfunction()

# Downloads one commit, named by its hash, and sets the given OPTION=VALUE pairs for its build.
# A macro, so that <name>_SOURCE_DIR and the targets reach the caller.
macro(framequilt_dependency_fetch name repository commit)
  include(FetchContent)
  foreach(framequilt_pair ${ARGN})
    string(REPLACE "=" ";" framequilt_pair "${framequilt_pair}")
    list(GET framequilt_pair 0 framequilt_key)
    list(GET framequilt_pair 1 framequilt_value)
    set(${framequilt_key} ${framequilt_value} CACHE STRING "Set for ${name}" FORCE)
  endforeach()
  FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${commit})
  FetchContent_MakeAvailable(${name})
endmacro()

# Where pip put a package, or an empty string. Asks the interpreter of the build, else python3.
function(framequilt_pip_package_dir package result)
  set(${result} "" PARENT_SCOPE)
  if(Python_EXECUTABLE)
    set(interpreter "${Python_EXECUTABLE}")
  else()
    find_program(framequilt_python_program NAMES python3 python)
    set(interpreter "${framequilt_python_program}")
  endif()
  if(NOT interpreter)
    return()
  endif()
  execute_process(
    COMMAND "${interpreter}" -c
      "import importlib.util as u; s = u.find_spec('${package}'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE directory OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${directory}" PARENT_SCOPE)
endfunction()
