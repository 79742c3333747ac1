// SHA-256 (FIPS 180-4), for the checksums in a model directory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace fq {

// Lower-case hex digest of `bytes`.
std::string sha256_hex(std::span<const std::byte> bytes);

}  // namespace fq
