// Writes starting inputs for the fuzzers: `fuzz_seeds DIRECTORY` makes DIRECTORY/spec and
// DIRECTORY/safetensors.
#include <cstdio>
#include <filesystem>
#include <string>

#include "tests/engine/testing/model_builder.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  namespace fs = std::filesystem;
  namespace testing = fq::testing;
  const fs::path target = argv[1];
  fs::create_directories(target / "spec");
  fs::create_directories(target / "safetensors");
  int index = 0;
  for (const auto& format :
       {testing::f32_format(), testing::affine_format(4, 32), testing::affine_format(8, 0, true)}) {
    for (const bool vision : {false, true}) {
      testing::TinyModelOptions options;
      // As small as it gets: fuzzers want inputs of a few kilobytes.
      options.hidden = 4;
      options.layers = 1;
      options.vocab = 4;
      options.heads = options.kv_heads = 1;
      options.head_dim = options.mlp_hidden = 4;
      options.vision_hidden = options.vision_heads = options.vision_mlp_hidden = 4;
      options.vision_layers = 1;
      options.image_size = 4;
      options.patch = 2;
      options.projector_hidden = 4;
      options.format = format;
      options.vision = vision;
      const testing::TempDir directory;
      testing::write_tiny_model(directory.path(), options);
      const std::string name = std::to_string(index++);
      testing::write_file(target / "spec" / name, testing::read_file(directory / "config.json"));
      testing::write_file(target / "safetensors" / name,
                          testing::read_file(directory / "model-00001-of-00001.safetensors"));
    }
  }
  return 0;
}
