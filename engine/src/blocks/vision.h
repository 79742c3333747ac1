// The vision side: tower, projector, and the layout of projected patches as rows of a prompt.
// Immutable after bind(); the caller owns all scratch.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "framequilt/media.h"
#include "src/blocks/attention.h"
#include "src/blocks/mlp.h"

namespace fq::blocks {

// Rows that a media item becomes, and the slot of each for token reduction (separators included).
struct MediaRows {
  int64_t rows = 0;
  int period = 0;              // number of slots
  std::vector<int32_t> slots;  // [rows], 0..period-1 or -1
};

class Vision {
 public:
  static Result<std::unique_ptr<const Vision>> bind(const Binder& binder);

  const model::VisionSpec& spec() const { return spec_; }
  int patches() const { return spec_.grid() * spec_.grid(); }
  int layers() const { return spec_.layers; }
  int output_width() const { return projector_spec_.output; }

  // Floats of scratch for `frames` frames in any of the steps below.
  int64_t scratch_floats(int64_t frames) const;

  // image[channels, size, size] x frames -> x[frames * patches, hidden]: patch embedding plus
  // positions.
  void embed(const float* images, int64_t frames, float* x, float* scratch, ThreadPool& pool) const;
  // One encoder layer on x in place.
  void layer(int index, float* x, int64_t frames, float* scratch, ThreadPool& pool) const;
  // x -> projected[frames * patches, output_width]
  void project(const float* x, int64_t frames, float* projected, float* scratch,
               ThreadPool& pool) const;

  // How many rows `media` becomes. Errors: invalid_argument (sizes that the tower cannot take).
  Result<MediaRows> layout(const Media& media, bool merge_separators) const;
  // Pools frames [first, first + count) of a video and puts newlines between. projected: those
  // frames only, [count * patches, output_width]; out: all rows of the item, [layout.rows,
  // output_width].
  void arrange_video(const Media& media, int first, int count, const float* projected,
                     float* out) const;
  // All frames of an image at once: projected [frames * patches, output_width] -> out [layout.rows,
  // output_width].
  void arrange_image(const Media& media, const float* projected, float* out) const;

 private:
  struct ImageGrid {  // tile grid of an image after cropping and shrinking
    int height = 0, width = 0;
    bool resized = false;
  };
  ImageGrid image_grid(const ImageTiles& tiles) const;

  model::VisionSpec spec_;
  model::ProjectorSpec projector_spec_;
  model::VisualSpec visual_;
  std::optional<Linear> patch_embedding_, projector_in_, projector_out_;
  std::optional<Norm> post_norm_;
  const float* positions_ = nullptr;  // [patches, hidden]
  const float* newline_ = nullptr;    // [output_width]
  backend::ActivationFn projector_activation_ = nullptr;
  struct Layer {
    EncoderAttention attention;
    Mlp mlp;
  };
  std::vector<Layer> layers_;
};

}  // namespace fq::blocks
