// Runs a tokenizer for the Python tests, which compare it with reference implementations.
//
//   tokenizer_cli MODEL_DIRECTORY
//
// reads one JSON request a line and answers each with one JSON line:
//   {"encode": "text", "special": true}  ->  {"ids": [1, 2]}
//   {"decode": [1, 2]}                   ->  {"text": "..."}
//   {"bytes": 7}                         ->  {"hex": "e282"}
//   {"size": true}                       ->  {"size": 100}
// Errors are {"error": code, "message": text}; one that opening gave answers every request.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "framequilt/tokenizer.h"

namespace {

using Json = nlohmann::json;

Json error_json(const fq::Error& error) {
  return {{"error", fq::code_name(error.code)}, {"message", error.to_string()}};
}

Json answer(const fq::Tokenizer& tokenizer, const Json& request) {
  if (request.contains("encode")) {
    const auto ids = tokenizer.encode(request["encode"].get_ref<const std::string&>(),
                                      request.value("special", true));
    if (!ids) return error_json(ids.error());
    return {{"ids", *ids}};
  }
  if (request.contains("decode")) {
    return {{"text", tokenizer.decode(request["decode"].get<std::vector<fq::TokenId>>())}};
  }
  if (request.contains("bytes")) {
    static constexpr char kHex[] = "0123456789abcdef";
    std::string hex;
    for (const char c : tokenizer.token_bytes(request["bytes"].get<fq::TokenId>())) {
      hex += kHex[static_cast<unsigned char>(c) >> 4];
      hex += kHex[c & 15];
    }
    return {{"hex", hex}};
  }
  return {{"size", tokenizer.vocab_size()}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: tokenizer_cli MODEL_DIRECTORY\n";
    return 2;
  }
  const auto tokenizer = fq::Tokenizer::open(argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    const Json request = Json::parse(line, nullptr, false);
    if (request.is_discarded()) {
      std::cerr << "a request that is not JSON\n";
      return 2;
    }
    const Json reply = tokenizer ? answer(**tokenizer, request) : error_json(tokenizer.error());
    std::cout << reply.dump() << std::endl;
  }
  return 0;
}
