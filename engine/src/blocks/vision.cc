#include "src/blocks/vision.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "src/ops/visual.h"

namespace fq::blocks {
namespace {

Result<const float*> find_f32(const Binder& binder, const std::string& name, int64_t elements) {
  const model::TensorView* tensor = binder.directory.find(name);
  if (tensor == nullptr || tensor->dtype != DType::kF32 || tensor->elements() != elements) {
    return Error{Code::kCorruptModel,
                 "tensor '" + name + "' is missing or not F32 with " + std::to_string(elements) +
                     " elements",
                 "convert the model again"};
  }
  return tensor->f32();
}

bool uses_newline(const model::VisualSpec& visual) {
  return visual.newline != model::NewlineMode::kNone || visual.image_newline;
}

}  // namespace

Result<std::unique_ptr<const Vision>> Vision::bind(const Binder& binder) {
  const model::ModelSpec& spec = binder.directory.spec();
  auto vision = std::unique_ptr<Vision>(new Vision());
  vision->spec_ = *spec.vision;
  vision->projector_spec_ = *spec.projector;
  vision->visual_ = *spec.visual;
  const model::VisionSpec& v = vision->spec_;

  FQ_ASSIGN_OR_RETURN(vision->patch_embedding_,
                      Linear::bind(binder, "vision.patch_embedding", v.patch_bias));
  FQ_ASSIGN_OR_RETURN(vision->positions_,
                      find_f32(binder, "vision.position", int64_t{v.grid()} * v.grid() * v.hidden));
  vision->layers_.reserve(static_cast<size_t>(v.layers));
  for (int i = 0; i < v.layers; ++i) {
    const std::string prefix = "vision.layers." + std::to_string(i);
    FQ_ASSIGN_OR_RETURN(auto attention, EncoderAttention::bind(binder, prefix, v));
    FQ_ASSIGN_OR_RETURN(auto mlp, Mlp::bind(binder, prefix, v.mlp, v.norm, v.hidden));
    vision->layers_.push_back({std::move(attention), std::move(mlp)});
  }
  if (v.post_norm) {
    FQ_ASSIGN_OR_RETURN(vision->post_norm_,
                        Norm::bind(binder, "vision.post_norm", v.norm, v.hidden));
  }
  FQ_ASSIGN_OR_RETURN(vision->projector_in_, Linear::bind(binder, "projector.layers.0", true));
  FQ_ASSIGN_OR_RETURN(vision->projector_out_, Linear::bind(binder, "projector.layers.1", true));
  FQ_ASSIGN_OR_RETURN(vision->projector_activation_,
                      binder.backend.activation(vision->projector_spec_.activation));
  if (uses_newline(vision->visual_)) {
    FQ_ASSIGN_OR_RETURN(vision->newline_,
                        find_f32(binder, "visual.newline", vision->projector_spec_.output));
  }
  return std::unique_ptr<const Vision>(std::move(vision));
}

int64_t Vision::scratch_floats(int64_t frames) const {
  const int64_t rows = frames * patches();
  int64_t floats = rows * spec_.channels * spec_.patch * spec_.patch;
  floats = std::max(floats, rows * (spec_.hidden + int64_t{projector_spec_.hidden}));
  if (!layers_.empty()) {
    floats = std::max({floats, layers_.front().attention.scratch_floats(rows),
                       layers_.front().mlp.scratch_floats(rows)});
  }
  return floats;
}

void Vision::embed(const float* images, int64_t frames, float* x, float* scratch,
                   ThreadPool& pool) const {
  const int64_t n = patches();
  const int64_t image_floats = int64_t{spec_.channels} * spec_.image_size * spec_.image_size;
  const int64_t columns = int64_t{spec_.channels} * spec_.patch * spec_.patch;
  pool.parallel_for(frames, [&](int64_t f, int) {
    ops::patchify(images + f * image_floats, spec_.channels, spec_.image_size, spec_.patch,
                  scratch + f * n * columns);
  });
  patch_embedding_->run(scratch, columns, frames * n, x, spec_.hidden, false, pool);
  for (int64_t f = 0; f < frames; ++f) {
    float* frame = x + f * n * spec_.hidden;
    for (int64_t i = 0; i < n * spec_.hidden; ++i) frame[i] += positions_[i];
  }
}

void Vision::layer(int index, float* x, int64_t frames, float* scratch, ThreadPool& pool) const {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  layer.attention.forward(x, frames, patches(), scratch, pool);
  layer.mlp.forward(x, frames * patches(), scratch, pool);
}

void Vision::project(const float* x, int64_t frames, float* projected, float* scratch,
                     ThreadPool& pool) const {
  const int64_t rows = frames * patches();
  const float* input = x;
  float* hidden = scratch + rows * spec_.hidden;
  if (post_norm_) {
    post_norm_->run(x, scratch, rows, pool);
    input = scratch;
  }
  projector_in_->run(input, spec_.hidden, rows, hidden, projector_spec_.hidden, false, pool);
  projector_activation_({.kind = projector_spec_.activation,
                         .x = hidden,
                         .gate = nullptr,
                         .y = hidden,
                         .count = rows * projector_spec_.hidden},
                        pool);
  projector_out_->run(hidden, projector_spec_.hidden, rows, projected, projector_spec_.output,
                      false, pool);
}

Vision::ImageGrid Vision::image_grid(const ImageTiles& tiles) const {
  ImageGrid grid{tiles.crop_height, tiles.crop_width, false};
  if (visual_.image_max_tiles > 0) {
    const double area = double(grid.height) * grid.width;
    const double ratio = std::sqrt(area / (double(visual_.image_max_tiles) * patches()));
    if (ratio > 1.1) {  // the published rule leaves slightly larger grids alone
      grid = {int(std::floor(grid.height / ratio)), int(std::floor(grid.width / ratio)), true};
    }
  }
  return grid;
}

Result<MediaRows> Vision::layout(const Media& media, bool merge_separators) const {
  const auto invalid = [](std::string message, std::string hint) {
    return Error{Code::kInvalidArgument, std::move(message), std::move(hint)};
  };
  if (media.frames < 1) return invalid("media item has no frames", "decode at least one frame");
  if (media.height != spec_.image_size || media.width != spec_.image_size) {
    return invalid("frames are " + std::to_string(media.width) + "x" +
                       std::to_string(media.height) + ", the vision tower takes " +
                       std::to_string(spec_.image_size) + "x" + std::to_string(spec_.image_size),
                   "resize with the model's preprocessor");
  }
  const int64_t frame_floats = int64_t{spec_.channels} * media.height * media.width;
  if (static_cast<int64_t>(media.data.size()) != media.frames * frame_floats) {
    return invalid("media data has " + std::to_string(media.data.size()) + " values, " +
                       std::to_string(media.frames * frame_floats) + " expected",
                   "layout is [frames, channels, height, width]");
  }

  MediaRows out;
  if (media.kind == MediaKind::kVideo) {
    if (media.tiles) return invalid("a video has no tiles", "");
    const int side = ops::pooled_side(spec_.grid(), visual_.pool, visual_.pool_stride);
    const bool grid = visual_.newline == model::NewlineMode::kGrid;
    const bool frame = visual_.newline == model::NewlineMode::kFrame;
    const int row_width = side + (grid ? 1 : 0);
    out.period = side * row_width + (frame ? 1 : 0);
    out.rows = int64_t{out.period} * media.frames +
               (visual_.newline == model::NewlineMode::kOneToken ? 1 : 0);
    out.slots.assign(static_cast<size_t>(out.rows),
                     -1);  // a single closing newline belongs to no frame: text
    for (int64_t i = 0; i < int64_t{out.period} * media.frames; ++i) {
      const int slot = static_cast<int>(i % out.period);
      const bool separator =
          (grid && slot % row_width == side) || (frame && slot == out.period - 1);
      if (!separator || merge_separators) out.slots[static_cast<size_t>(i)] = slot;
    }
    return out;
  }

  const bool tiled = media.tiles.has_value();
  if (media.frames != (tiled ? 1 + media.tiles->rows * media.tiles->cols : 1)) {
    return invalid(
        "an image of " + std::to_string(media.frames) + " frames does not match its tiles",
        "frames = 1 overview + rows * cols tiles");
  }
  out.rows = patches();
  if (tiled) {
    const ImageTiles& t = *media.tiles;
    const int64_t height = int64_t{t.rows} * spec_.grid(), width = int64_t{t.cols} * spec_.grid();
    if (t.rows < 1 || t.cols < 1 || t.crop_top < 0 || t.crop_left < 0 || t.crop_height < 1 ||
        t.crop_width < 1 || int64_t{t.crop_top} + t.crop_height > height ||
        int64_t{t.crop_left} + t.crop_width > width) {
      return invalid("the crop of the image tiles lies outside their grid", "see fq::ImageTiles");
    }
    const ImageGrid grid = image_grid(t);
    if (grid.height < 1 || grid.width < 1)
      return invalid("the image is too narrow for the tile limit", "resize it");
    out.rows += int64_t{grid.height} * (grid.width + (visual_.image_newline ? 1 : 0));
  } else if (visual_.image_newline) {
    out.rows += 1;
  }
  // Rows of one image never merge with each other: every row has a slot of its own.
  out.period = static_cast<int>(out.rows);
  out.slots.resize(static_cast<size_t>(out.rows));
  for (size_t i = 0; i < out.slots.size(); ++i) out.slots[i] = static_cast<int32_t>(i);
  return out;
}

void Vision::arrange_video(const Media& media, int first, int count, const float* projected,
                           float* out) const {
  const int64_t width = projector_spec_.output;
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(float);
  const int side = ops::pooled_side(spec_.grid(), visual_.pool, visual_.pool_stride);
  std::vector<float> pooled(static_cast<size_t>(side) * side * width);
  const bool grid = visual_.newline == model::NewlineMode::kGrid;
  const bool frame = visual_.newline == model::NewlineMode::kFrame;
  const int64_t period = int64_t{side} * (side + (grid ? 1 : 0)) + (frame ? 1 : 0);
  float* cursor = out + first * period * width;
  const auto put = [&](const float* rows, int64_t count) {
    std::memcpy(cursor, rows, static_cast<size_t>(count) * row_bytes);
    cursor += count * width;
  };
  for (int f = 0; f < count; ++f) {
    ops::pool_grid(projected + int64_t{f} * patches() * width, spec_.grid(),
                   static_cast<int>(width), visual_.pool, visual_.pool_stride, pooled.data());
    if (grid) {
      for (int y = 0; y < side; ++y) {
        put(pooled.data() + int64_t{y} * side * width, side);
        put(newline_, 1);
      }
    } else {
      put(pooled.data(), int64_t{side} * side);
      if (frame) put(newline_, 1);
    }
  }
  const bool last = first + count == media.frames;
  if (last && visual_.newline == model::NewlineMode::kOneToken) put(newline_, 1);
}

void Vision::arrange_image(const Media& media, const float* projected, float* out) const {
  const int64_t width = projector_spec_.output;
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(float);
  const int grid = spec_.grid();
  std::memcpy(out, projected, static_cast<size_t>(patches()) * row_bytes);
  float* cursor = out + int64_t{patches()} * width;
  if (!media.tiles) {
    if (visual_.image_newline) std::memcpy(cursor, newline_, row_bytes);
    return;
  }
  const ImageTiles& t = *media.tiles;
  // The crop of the tile grid, row by row, from tile-major to raster order.
  std::vector<float> raster(static_cast<size_t>(t.crop_height) * t.crop_width * width);
  for (int y = 0; y < t.crop_height; ++y) {
    for (int x = 0; x < t.crop_width; ++x) {
      const int gy = y + t.crop_top, gx = x + t.crop_left;
      const int64_t tile = 1 + int64_t{gy / grid} * t.cols + gx / grid;
      const int64_t patch = int64_t{gy % grid} * grid + gx % grid;
      std::memcpy(raster.data() + (int64_t{y} * t.crop_width + x) * width,
                  projected + (tile * patches() + patch) * width, row_bytes);
    }
  }
  const ImageGrid shape = image_grid(t);
  if (shape.resized) {
    std::vector<float> resized(static_cast<size_t>(shape.height) * shape.width * width);
    ops::resize_bilinear(raster.data(), t.crop_height, t.crop_width, static_cast<int>(width),
                         shape.height, shape.width, resized.data());
    raster.swap(resized);
  }
  for (int y = 0; y < shape.height; ++y) {
    std::memcpy(cursor, raster.data() + int64_t{y} * shape.width * width,
                static_cast<size_t>(shape.width) * row_bytes);
    cursor += int64_t{shape.width} * width;
    if (visual_.image_newline) {
      std::memcpy(cursor, newline_, row_bytes);
      cursor += width;
    }
  }
}

}  // namespace fq::blocks
