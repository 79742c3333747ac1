// Reads vocabulary and merges with every id and rule checked, and merges words with a priority
// queue over a linked list. The order of merges (and the test for stale candidates) is that of the
// reference.
#include "src/text/bpe_model.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "src/text/unicode.h"

namespace fq::text {
namespace {

constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr size_t kMaxMerges = size_t{1} << 22;

uint64_t pair_of(TokenId left, TokenId right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

// Orders a heap whose front is the candidate of the smallest rank, then the leftmost.
bool later(const BpeModel::Candidate& a, const BpeModel::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.place > b.place;
}

}  // namespace

MergeTable::MergeTable(size_t rules)
    : slots_(std::bit_ceil(std::max<size_t>(2 * rules, 2)), Slot{kEmpty, {0, 0}}) {}

size_t MergeTable::slot_of(uint64_t pair) const {
  // Fibonacci hashing: the upper bits of the product are well mixed.
  uint64_t hash = (pair ^ (pair >> 29)) * 0x9E3779B97F4A7C15u;
  hash ^= hash >> 32;
  const size_t mask = slots_.size() - 1;
  size_t slot = static_cast<size_t>(hash) & mask;
  while (slots_[slot].pair != kEmpty && slots_[slot].pair != pair) slot = (slot + 1) & mask;
  return slot;
}

void MergeTable::set(TokenId left, TokenId right, Rule rule) {
  const uint64_t pair = pair_of(left, right);
  slots_[slot_of(pair)] = {pair, rule};
}

const MergeTable::Rule* MergeTable::find(TokenId left, TokenId right) const {
  const Slot& slot = slots_[slot_of(pair_of(left, right))];
  return slot.pair == kEmpty ? nullptr : &slot.rule;
}

Result<BpeModel> BpeModel::read(const Json& json) {
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(json, "model"));
  // Files from before the models had a type are BPE when they have merges.
  FQ_ASSIGN_OR_RETURN(const std::string type, object.string_or("type", "BPE"));
  if (type != "BPE") return unsupported("model.type \"" + type + "\"; this reads \"BPE\"");
  FQ_RETURN_IF_ERROR(object.allow_only({"type", "dropout", "unk_token", "continuing_subword_prefix",
                                        "end_of_word_suffix", "fuse_unk", "byte_fallback",
                                        "ignore_merges", "vocab", "merges"}));
  if (const Json* dropout = object.find("dropout")) {
    if (!dropout->is_number() || dropout->get<double>() != 0.0) {
      return unsupported("model.dropout: encoding would be random");
    }
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    FQ_ASSIGN_OR_RETURN(const std::string affix, object.string_or(key, ""));
    if (!affix.empty()) return unsupported(object.path(key) + " \"" + affix + "\"");
  }
  BpeModel model;
  FQ_ASSIGN_OR_RETURN(const Json* vocab, object.member("vocab"));
  FQ_RETURN_IF_ERROR(model.read_vocab(*vocab));
  FQ_ASSIGN_OR_RETURN(const Json* merges, object.member("merges"));
  FQ_RETURN_IF_ERROR(model.read_merges(*merges));
  FQ_ASSIGN_OR_RETURN(model.fuse_unknown_, object.boolean_or("fuse_unk", false));
  FQ_ASSIGN_OR_RETURN(model.ignore_merges_, object.boolean_or("ignore_merges", false));
  if (object.find("unk_token") != nullptr) {
    FQ_ASSIGN_OR_RETURN(const std::string unknown, object.string("unk_token"));
    model.unknown_ = model.find(unknown);
    if (!model.unknown_) return corrupt("model.unk_token \"" + unknown + "\" is not in the vocab");
  }
  FQ_ASSIGN_OR_RETURN(const bool byte_fallback, object.boolean_or("byte_fallback", false));
  if (byte_fallback) {
    static constexpr std::string_view kHex = "0123456789ABCDEF";
    for (int byte = 0; byte < 256; ++byte) {
      model.byte_tokens_.push_back(
          model.find(std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">"));
    }
  }
  return model;
}

Status BpeModel::read_vocab(const Json& vocab) {
  if (!vocab.is_object()) return corrupt("model.vocab: expected an object");
  if (vocab.empty()) return corrupt("model.vocab is empty");
  // A file has hundreds of thousands of entries: names for errors are made when there is one.
  TokenId largest = -1;
  for (const auto& [token, id] : vocab.items()) {
    const auto value = integer_in(id, 0, kMaxVocab - 1);
    if (!value) {
      return json_integer(id, 0, kMaxVocab - 1, "model.vocab[\"" + token + "\"]").status();
    }
    largest = std::max(largest, *value);
  }
  tokens_.resize(static_cast<size_t>(largest) + 1);
  used_.resize(tokens_.size());
  for (const auto& [token, id] : vocab.items()) {
    const auto value = id.get<size_t>();
    if (used_[value]) {
      return corrupt("model.vocab: id " + std::to_string(value) + " stands for \"" +
                     tokens_[value] + "\" and \"" + token + "\"");
    }
    used_[value] = true;
    tokens_[value] = token;
  }
  ids_.reserve(vocab.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (used_[id]) ids_.emplace(tokens_[id], static_cast<TokenId>(id));
  }
  return {};
}

Status BpeModel::read_merges(const Json& merges) {
  if (!merges.is_array()) return corrupt("model.merges: expected an array");
  if (merges.size() > kMaxMerges) {
    return corrupt("model.merges: more than " + std::to_string(kMaxMerges) + " rules");
  }
  merges_ = MergeTable(merges.size());
  int32_t rank = 0;
  std::string joined;
  for (size_t index = 0; index < merges.size(); ++index) {
    const Json& merge = merges[index];
    const auto broken = [&](const std::string& what) {
      return corrupt("model.merges[" + std::to_string(index) + "]: " + what);
    };
    std::string_view left, right;
    if (merge.is_string()) {
      const std::string_view rule = merge.get_ref<const std::string&>();
      if (rule.starts_with("#version")) continue;
      const size_t space = rule.find(' ');
      if (space == std::string_view::npos || rule.find(' ', space + 1) != std::string_view::npos) {
        return broken("expected two tokens and a space between them");
      }
      left = rule.substr(0, space);
      right = rule.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else {
      return broken("expected \"a b\" or [\"a\", \"b\"]");
    }
    joined.assign(left);
    joined += right;
    const auto left_id = find(left), right_id = find(right), merged_id = find(joined);
    if (!left_id || !right_id || !merged_id) {
      const std::string_view unknown = !left_id ? left : !right_id ? right : joined;
      return broken("\"" + std::string(unknown) + "\" is not in the vocab");
    }
    merges_.set(*left_id, *right_id, {rank++, *merged_id});
  }
  return {};
}

std::optional<TokenId> BpeModel::find(std::string_view token) const {
  const auto it = ids_.find(token);
  return it == ids_.end() ? std::nullopt : std::optional<TokenId>(it->second);
}

std::optional<std::string_view> BpeModel::token(TokenId id) const {
  if (id < 0 || id >= size() || !used_[static_cast<size_t>(id)]) return std::nullopt;
  return tokens_[static_cast<size_t>(id)];
}

void BpeModel::find_symbols(std::string_view word, std::vector<Symbol>& symbols) const {
  symbols.clear();
  const auto add = [&](TokenId token) { symbols.push_back({token, -1, -1, true}); };
  bool pending = false;  // an unknown token that later unknown characters may join
  for (size_t i = 0; i < word.size();) {
    const std::string_view character = word.substr(i, utf8_length(word[i]));
    i += character.size();
    if (const auto id = find(character)) {
      if (pending) add(*unknown_);
      pending = false;
      add(*id);
      continue;
    }
    if (!byte_tokens_.empty() && std::all_of(character.begin(), character.end(), [&](char c) {
          return byte_tokens_[static_cast<unsigned char>(c)].has_value();
        })) {
      for (const char c : character) add(*byte_tokens_[static_cast<unsigned char>(c)]);
      continue;
    }
    if (unknown_) {
      if (pending && !fuse_unknown_) add(*unknown_);
      pending = true;
    }
  }
  if (pending) add(*unknown_);
}

void BpeModel::merge(Workspace& workspace) const {
  std::vector<Symbol>& symbols = workspace.symbols;
  std::vector<Candidate>& queue = workspace.queue;
  queue.clear();
  const auto count = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[i].previous = i - 1;
    symbols[i].next = i + 1 < count ? i + 1 : -1;
    if (i + 1 == count) break;
    if (const auto* rule = merges_.find(symbols[i].token, symbols[i + 1].token)) {
      queue.push_back({rule->rank, i, rule->token});
    }
  }
  std::make_heap(queue.begin(), queue.end(), later);
  const auto push = [&](int32_t place, TokenId left, TokenId right) {
    if (const auto* rule = merges_.find(left, right)) {
      queue.push_back({rule->rank, place, rule->token});
      std::push_heap(queue.begin(), queue.end(), later);
    }
  };
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), later);
    const Candidate top = queue.back();
    queue.pop_back();
    Symbol& symbol = symbols[top.place];
    if (!symbol.alive || symbol.next < 0) continue;
    Symbol& right = symbols[symbol.next];
    // One of the two may have been merged since; what counts is that the pair still gives this
    // token.
    const auto* rule = merges_.find(symbol.token, right.token);
    if (rule == nullptr || rule->token != top.token) continue;
    symbol.token = top.token;
    symbol.next = right.next;
    right.alive = false;
    if (symbol.next >= 0) symbols[symbol.next].previous = top.place;
    if (symbol.previous >= 0) {
      push(symbol.previous, symbols[symbol.previous].token, symbol.token);
    }
    if (symbol.next >= 0) push(top.place, symbol.token, symbols[symbol.next].token);
  }
}

void BpeModel::encode(std::string_view word, Workspace& workspace,
                      std::vector<TokenId>& out) const {
  if (ignore_merges_) {
    if (const auto id = find(word)) {
      out.push_back(*id);
      return;
    }
  }
  find_symbols(word, workspace.symbols);
  if (workspace.symbols.empty()) return;
  if (workspace.symbols.size() > 1) merge(workspace);
  for (const Symbol& symbol : workspace.symbols) {
    if (symbol.alive) out.push_back(symbol.token);
  }
}

}  // namespace fq::text
