// What a request carries besides text: preprocessed video frames, an image, or ready-made rows.
// Owned by the request. Frames are decoded, resized and normalised by the caller (Python:
// framequilt.vision).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace fq {

enum class MediaKind : uint8_t {
  kVideo,  // frames pooled and laid out in time, as the model's visual layout says for video
  kImage,  // one overview (frame 0), then tiles of one larger grid, as the layout says for images
  kEmbedding,  // rows that already live in the decoder's input space
};

// The tiles of one image, in raster order after the overview frame. rows*cols == frames - 1.
struct ImageTiles {
  int rows = 0;
  int cols = 0;
  // Part of the (rows*grid) x (cols*grid) feature map that shows the image; the rest is padding.
  int crop_top = 0, crop_left = 0, crop_height = 0, crop_width = 0;
};

struct Media {
  MediaKind kind = MediaKind::kVideo;
  // kVideo, kImage: [frames, channels, height, width] float32, normalised as the model wants.
  // kEmbedding: [rows, hidden] float32.
  std::vector<float> data;
  int frames = 0;
  int height = 0;
  int width = 0;
  std::optional<ImageTiles> tiles;
  // kEmbedding only: slot of each row (-1: not subject to token reduction), see specs of the stage.
  // Slots run over 0..period-1; `slots` may be empty: every row is then text-like.
  std::vector<int32_t> slots;
  int rows = 0;
};

}  // namespace fq
