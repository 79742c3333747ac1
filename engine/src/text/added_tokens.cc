// Reads the added tokens and finds them in text.
#include "src/text/added_tokens.h"

#include <algorithm>
#include <set>
#include <utility>

#include "src/text/unicode.h"

namespace fq::text {
namespace {

// Longer contents would let a hostile file make the search quadratic.
constexpr size_t kMaxContentBytes = 1024;
constexpr size_t kMaxAddedTokens = size_t{1} << 18;

Result<AddedToken> read_token(const Json& value, const std::string& where) {
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(value, where));
  FQ_RETURN_IF_ERROR(object.allow_only(
      {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}));
  AddedToken token;
  FQ_ASSIGN_OR_RETURN(token.id, object.integer("id", 0, kMaxVocab - 1));
  FQ_ASSIGN_OR_RETURN(token.content, object.string("content"));
  FQ_ASSIGN_OR_RETURN(token.special, object.boolean("special"));
  FQ_ASSIGN_OR_RETURN(token.left_strip, object.boolean("lstrip"));
  FQ_ASSIGN_OR_RETURN(token.right_strip, object.boolean("rstrip"));
  FQ_ASSIGN_OR_RETURN(token.normalized, object.boolean("normalized"));
  FQ_ASSIGN_OR_RETURN(const bool single_word, object.boolean("single_word"));
  if (single_word) return unsupported(where + ": single_word is true");
  if (token.content.size() > kMaxContentBytes) {
    return unsupported(where + ": content of " + std::to_string(token.content.size()) + " bytes");
  }
  return token;
}

}  // namespace

void TokenTrie::add(std::string_view text, int value) {
  int32_t node = 0;
  for (const char c : text) {
    const auto [it, added] =
        nodes_[static_cast<size_t>(node)].next.try_emplace(c, static_cast<int32_t>(nodes_.size()));
    node = it->second;
    if (added) nodes_.emplace_back();
  }
  nodes_[static_cast<size_t>(node)].value = value;
}

size_t TokenTrie::longest(std::string_view text, size_t position, int& value) const {
  size_t length = 0;
  const Node* node = nodes_.data();
  for (size_t i = position; i < text.size(); ++i) {
    const auto it = node->next.find(text[i]);
    if (it == node->next.end()) break;
    node = &nodes_[static_cast<size_t>(it->second)];
    if (node->value >= 0) {
      value = node->value;
      length = i + 1 - position;
    }
  }
  return length;
}

Result<AddedTokens> AddedTokens::read(const Json* value, const BpeModel& model,
                                      const Normalizer& normalizer) {
  AddedTokens added;
  if (value == nullptr) return added;
  if (!value->is_array()) return corrupt("added_tokens: expected an array");
  if (value->size() > kMaxAddedTokens) {
    return corrupt("added_tokens: " + std::to_string(value->size()) + " of them");
  }
  std::set<TokenId> ids;
  std::set<std::string> contents;
  for (size_t i = 0; i < value->size(); ++i) {
    const std::string where = "added_tokens[" + std::to_string(i) + "]";
    FQ_ASSIGN_OR_RETURN(AddedToken token, read_token((*value)[i], where));
    if (token.content.empty()) continue;  // nothing to find
    const std::string id = std::to_string(token.id);
    if (!ids.insert(token.id).second || !contents.insert(token.content).second) {
      return corrupt(where + ": a second token \"" + token.content + "\", id " + id);
    }
    const auto known = model.find(token.content);
    const auto holder = model.token(token.id);
    if ((known && *known != token.id) || (holder && *holder != token.content)) {
      return corrupt(where + ": \"" + token.content + "\" has id " + id +
                     ", which contradicts the vocab");
    }
    const int place = static_cast<int>(added.tokens_.size());
    if (token.normalized) {
      FQ_ASSIGN_OR_RETURN(std::string text, normalizer.apply(token.content));
      if (!text.empty()) added.normalized_.add(text, place);
      token.decoded = std::move(text);
    } else {
      token.decoded = token.content;
      added.raw_.add(token.content, place);
    }
    added.tokens_.push_back(std::move(token));
  }
  return added;
}

std::vector<Segment> AddedTokens::split(std::string_view text, bool normalized,
                                        bool parse_special) const {
  const TokenTrie& trie = normalized ? normalized_ : raw_;
  std::vector<Segment> segments;
  size_t covered = 0;
  for (size_t i = 0; !trie.empty() && i < text.size();) {
    int place = 0;
    const size_t length = trie.longest(text, i, place);
    if (length == 0) {
      ++i;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(place)];
    size_t begin = i, end = i + length;
    i = end;
    if (token.special && !parse_special) continue;
    if (token.left_strip) {
      begin = std::max(covered, begin - trailing_white_space(text.substr(0, begin)));
    }
    if (token.right_strip) end += leading_white_space(text.substr(end));
    if (covered < begin) segments.push_back({covered, begin, -1});
    segments.push_back({begin, end, token.id});
    covered = end;
  }
  if (covered < text.size()) segments.push_back({covered, text.size(), -1});
  return segments;
}

}  // namespace fq::text
