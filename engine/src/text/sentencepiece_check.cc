// A reader for the few protocol buffer fields of sentencepiece_model.proto that can harm, and a
// walk over the character map's trie (a double array as Darts writes it).
#include "src/text/sentencepiece_check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "src/text/json_file.h"

namespace fq::text {
namespace {

// sentencepiece_model.proto: ModelProto
constexpr uint32_t kPieces = 1, kNormalizerSpec = 3, kDenormalizerSpec = 5;
// SentencePiece
constexpr uint32_t kPieceScore = 2;
// NormalizerSpec
constexpr uint32_t kCharsMap = 2;

constexpr size_t kMaxPieces = kMaxVocab;

struct Field {
  uint32_t number = 0;
  uint32_t wire_type = 0;
  std::string_view data;  // content (wire type 2) or the bytes of the value
};

// Takes the next field off `message`; false when it is malformed.
bool take_varint(std::string_view& message, uint64_t& value) {
  value = 0;
  for (int shift = 0; shift < 70 && !message.empty(); shift += 7) {
    const auto byte = static_cast<unsigned char>(message[0]);
    message.remove_prefix(1);
    if (shift < 64) value |= static_cast<uint64_t>(byte & 0x7F) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

bool take_field(std::string_view& message, Field& field) {
  uint64_t key = 0;
  if (!take_varint(message, key) || key > UINT32_MAX) return false;
  field.number = static_cast<uint32_t>(key >> 3);
  field.wire_type = static_cast<uint32_t>(key & 7);
  uint64_t size = 0;
  switch (field.wire_type) {
    case 0: {
      const std::string_view before = message;
      if (!take_varint(message, size)) return false;
      field.data = before.substr(0, before.size() - message.size());
      return true;
    }
    case 1:
      size = 8;
      break;
    case 2:
      if (!take_varint(message, size)) return false;
      break;
    case 5:
      size = 4;
      break;
    default:
      return false;
  }
  if (size > message.size()) return false;
  field.data = message.substr(0, size);
  message.remove_prefix(size);
  return true;
}

Error malformed() {
  return corrupt("tokenizer.model is not a SentencePiece model (truncated or damaged)");
}

Status check_piece(std::string_view piece) {
  Field field;
  while (!piece.empty()) {
    if (!take_field(piece, field)) return malformed();
    if (field.number == kPieceScore && field.wire_type == 5) {
      float score = 0;
      std::memcpy(&score, field.data.data(), sizeof(score));
      if (!std::isfinite(score)) return corrupt("tokenizer.model: a score that is not finite");
    }
  }
  return {};
}

// Walks a character map the way the library does, along every path, and checks each step.
class CharsMap {
 public:
  Status check(std::string_view map) {
    const auto broken = [] { return corrupt("tokenizer.model: damaged character map"); };
    uint32_t trie_bytes = 0;
    if (map.size() <= sizeof(trie_bytes)) return broken();
    std::memcpy(&trie_bytes, map.data(), sizeof(trie_bytes));
    map.remove_prefix(sizeof(trie_bytes));
    if (trie_bytes >= map.size() || trie_bytes < sizeof(uint32_t)) return broken();
    units_.resize(trie_bytes / sizeof(uint32_t));
    std::memcpy(units_.data(), map.data(), units_.size() * sizeof(uint32_t));
    text_ = map.substr(trie_bytes);
    // The library reads a replacement up to its zero byte.
    if (text_.back() != '\0') return broken();
    return walk() ? Status() : broken();
  }

 private:
  // The library keeps the matches of one walk in an array of this size.
  static constexpr int kMaxMatches = 32;
  static constexpr int kUnknown = -2, kOpen = -1;

  static bool has_leaf(uint32_t unit) { return ((unit >> 8) & 1) != 0; }
  static uint32_t label(uint32_t unit) { return unit & 0x800000FFu; }
  static uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 0x200u) >> 6); }
  static uint32_t value(uint32_t unit) { return unit & 0x7FFFFFFFu; }

  // Where the children of unit `index` start; the whole block of 256 must exist.
  bool children(size_t index, size_t& base) const {
    base = index ^ offset(units_[index]);
    return (base | 0xFF) < units_.size();
  }

  // Depth-first, without recursion: a path is as long as the file allows.
  bool walk() {
    struct Frame {
      size_t index;
      size_t base;
      int next;  // character to try next
      int best;  // most matches below
    };
    std::vector<int> matches(units_.size(), kUnknown);  // most matches from this unit on
    std::vector<Frame> stack;
    const auto enter = [&](size_t index) {
      Frame frame{index, 0, 0, 0};
      if (!children(index, frame.base)) return false;
      if (index != 0 && has_leaf(units_[index]) && value(units_[frame.base]) >= text_.size()) {
        return false;
      }
      matches[index] = kOpen;
      stack.push_back(frame);
      return true;
    };
    if (!enter(0)) return false;
    while (!stack.empty()) {
      Frame& frame = stack.back();
      if (frame.next == 256) {
        const bool leaf = frame.index != 0 && has_leaf(units_[frame.index]);
        const int best = frame.best + (leaf ? 1 : 0);
        if (best > kMaxMatches) return false;
        matches[frame.index] = best;
        stack.pop_back();
        if (!stack.empty()) stack.back().best = std::max(stack.back().best, best);
        continue;
      }
      const auto character = static_cast<uint32_t>(frame.next++);
      const size_t child = frame.base ^ character;
      if (label(units_[child]) != character) continue;
      if (matches[child] == kOpen) return false;  // a cycle
      if (matches[child] == kUnknown) {
        if (!enter(child)) return false;
      } else {
        frame.best = std::max(frame.best, matches[child]);
      }
    }
    return true;
  }

  std::vector<uint32_t> units_;
  std::string_view text_;
};

Status check_normalizer(std::string_view spec) {
  Field field;
  while (!spec.empty()) {
    if (!take_field(spec, field)) return malformed();
    if (field.number == kCharsMap && field.wire_type == 2 && !field.data.empty()) {
      FQ_RETURN_IF_ERROR(CharsMap().check(field.data));
    }
  }
  return {};
}

}  // namespace

Status check_sentencepiece_model(std::string_view model) {
  if (model.empty()) return malformed();
  size_t pieces = 0;
  Field field;
  while (!model.empty()) {
    if (!take_field(model, field)) return malformed();
    if (field.wire_type != 2) continue;
    if (field.number == kPieces) {
      if (++pieces > kMaxPieces) {
        return corrupt("tokenizer.model: more than " + std::to_string(kMaxPieces) + " pieces");
      }
      FQ_RETURN_IF_ERROR(check_piece(field.data));
    } else if (field.number == kNormalizerSpec || field.number == kDenormalizerSpec) {
      FQ_RETURN_IF_ERROR(check_normalizer(field.data));
    }
  }
  if (pieces == 0) return malformed();
  return {};
}

}  // namespace fq::text
