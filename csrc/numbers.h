// Floating-point formats, and what many numbers of one are like: NaN, infinities, zeros, size.
// Packs of them at once, with the same result on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptstore {

/// Little-endian floating-point formats; the order is that of native.WEIGHT_DTYPES.
enum class Dtype : unsigned { kF64, kF32, kF16, kBf16, kF8E4M3, kF8E5M2 };
inline constexpr unsigned kDtypes = 6;
std::uint64_t item_bytes(Dtype dtype);

/// Zeros are counted in whole blocks of so many bytes, from a region's start: a page that never
/// reached the disk.
inline constexpr std::uint64_t kZeroBlockBytes = 4096;

struct WeightStats {
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};

  std::uint64_t count = 0;
  std::uint64_t nan = 0;
  std::uint64_t infinite = 0;
  std::uint64_t first_nonfinite = kNone;  ///< index of the first NaN or infinity
  std::uint64_t zero_blocks = 0;
  std::uint64_t first_zero_block = kNone;  ///< byte offset within the region
  double sum_squares = 0;                  ///< of the finite ones
  double min = 0;                          ///< of the finite ones; 0 where there are none
  double max = 0;
  std::uint64_t crc = 0;  ///< CRC-64/NVME of the bytes
};

/// Adds `bytes` bytes that begin `before` bytes into a region, a multiple of the zero block. `crc`
/// is the caller's.
void add_numbers(WeightStats& stats, Dtype dtype, const std::byte* data, std::size_t bytes,
                 std::uint64_t before);

}  // namespace ckptstore
