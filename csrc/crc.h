// CRC-64/NVME, the digest of record, and CRC-32, the one of zip archives. Both reflected, all ones
// in, all ones out; polynomials 0xAD93D23594C93659 and 0x04C11DB7. Everything here is thread-safe
// and allocates nothing, except usable_implementations().
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace ckptstore {

/// The CRC of `bytes` bytes at `data` that follow bytes whose CRC is `value` (0: none). `data`
/// needs no alignment.
std::uint64_t crc64(std::uint64_t value, const void* data, std::size_t bytes);
std::uint32_t crc32(std::uint32_t value, const void* data, std::size_t bytes);

/// The CRC of A followed by B, from both their CRCs and the length of B in bytes. O(log b_bytes).
std::uint64_t crc64_combine(std::uint64_t a, std::uint64_t b, std::uint64_t b_bytes);
std::uint32_t crc32_combine(std::uint32_t a, std::uint32_t b, std::uint64_t b_bytes);

/// One way to compute both; a CRC-32 comes in the low half.
using CrcFunction = std::uint64_t (*)(std::uint64_t value, const void* data, std::size_t bytes);
struct CrcImplementation {
  std::string_view name;
  CrcFunction crc64;
  CrcFunction crc32;
};

/// Those that this processor and this operating system can run, fastest first; the last one runs
/// everywhere. crc64() and crc32() take the first that agrees with the last.
std::vector<CrcImplementation> usable_implementations();

}  // namespace ckptstore
