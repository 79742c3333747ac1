// SHA-256 against the examples of FIPS 180-4 and against another implementation.
#include "src/core/sha256.h"

#include <gtest/gtest.h>

#include <span>
#include <string>
#include <string_view>

namespace fq {
namespace {

std::string digest(std::string_view text) { return sha256_hex(std::as_bytes(std::span(text))); }

TEST(Sha256, GivesThePublishedDigests) {
  EXPECT_EQ(digest(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(digest("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(digest(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

// Every length from 0 to 299 bytes, so every way the padding can fall. The expected value is
// Python's hashlib:
//   h = hashlib.sha256()
//   for n in range(300):
//       h.update(hashlib.sha256(bytes((i * 7 + n) % 256 for i in range(n))).hexdigest().encode())
TEST(Sha256, AgreesWithHashlibOnEveryPaddingLength) {
  std::string digests;
  for (int n = 0; n < 300; ++n) {
    std::string message;
    for (int i = 0; i < n; ++i) message.push_back(static_cast<char>((i * 7 + n) % 256));
    digests += digest(message);
  }
  EXPECT_EQ(digest(digests), "def85da8f53f8ad58eda585dce61c0d7bfbb3da6924badae49d32d11288c576f");
}

}  // namespace
}  // namespace fq
