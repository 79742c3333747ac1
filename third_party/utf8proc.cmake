# utf8proc: the Unicode normal forms that some tokenizers apply. Defines framequilt_deps::utf8proc.
if(TARGET framequilt_deps::utf8proc)
  return()
endif()
find_path(framequilt_utf8proc_include utf8proc.h)
find_library(framequilt_utf8proc_library utf8proc)
if(framequilt_utf8proc_include AND framequilt_utf8proc_library)
  add_library(framequilt_utf8proc UNKNOWN IMPORTED GLOBAL)
  set_target_properties(framequilt_utf8proc PROPERTIES
    IMPORTED_LOCATION "${framequilt_utf8proc_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${framequilt_utf8proc_include}")
  framequilt_dependency_found(utf8proc framequilt_utf8proc "${framequilt_utf8proc_library}")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(utf8proc https://github.com/JuliaStrings/utf8proc.git e5e799221b45bbb90f5fdc5c69b6b8dfbf017e78
    UTF8PROC_INSTALL=OFF UTF8PROC_ENABLE_TESTING=OFF)
  framequilt_dependency_found(utf8proc utf8proc "downloaded, 2.11.3")
else()
  framequilt_dependency_missing(utf8proc libutf8proc-dev)
endif()
