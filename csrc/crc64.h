// CRC-64/NVME: the digest of record. Reflected, polynomial 0xAD93D23594C93659, all ones in, all
// ones out. Everything here is thread-safe and allocates nothing, except usable_implementations().
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace ckptstore {

/// The CRC of `bytes` bytes at `data` that follow bytes whose CRC is `value` (0: none). `data`
/// needs no alignment.
using Crc64Function = std::uint64_t (*)(std::uint64_t value, const void* data, std::size_t bytes);

struct Crc64Implementation {
  std::string_view name;
  Crc64Function function;
};

/// Those that this processor and this operating system can run, fastest first; the last one runs
/// everywhere.
std::vector<Crc64Implementation> usable_implementations();

/// The CRC by the fastest usable implementation.
std::uint64_t crc64(std::uint64_t value, const void* data, std::size_t bytes);

/// The CRC of A followed by B, from both their CRCs and the length of B in bytes. O(log b_bytes).
std::uint64_t crc64_combine(std::uint64_t a, std::uint64_t b, std::uint64_t b_bytes);

}  // namespace ckptstore
