# SentencePiece: the tokenizer of models that publish a tokenizer.model.
# Defines framequilt_deps::sentencepiece. The pip package has no C++ headers, so it is not looked at.
if(TARGET framequilt_deps::sentencepiece)
  return()
endif()
find_path(framequilt_sentencepiece_include sentencepiece_processor.h)
find_library(framequilt_sentencepiece_library sentencepiece)
if(framequilt_sentencepiece_include AND framequilt_sentencepiece_library)
  add_library(framequilt_sentencepiece UNKNOWN IMPORTED GLOBAL)
  set_target_properties(framequilt_sentencepiece PROPERTIES
    IMPORTED_LOCATION "${framequilt_sentencepiece_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${framequilt_sentencepiece_include}")
  framequilt_dependency_found(sentencepiece framequilt_sentencepiece
    "${framequilt_sentencepiece_library}")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(sentencepiece https://github.com/google/sentencepiece.git 17d7580d6407802f85855d2cc9190634e2c95624
    SPM_ENABLE_SHARED=OFF SPM_ENABLE_TCMALLOC=OFF)
  target_include_directories(sentencepiece-static
    INTERFACE $<BUILD_INTERFACE:${sentencepiece_SOURCE_DIR}/src>)
  framequilt_dependency_found(sentencepiece sentencepiece-static "downloaded, 0.2.0")
else()
  framequilt_dependency_missing(sentencepiece libsentencepiece-dev)
endif()
