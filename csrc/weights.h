// What the numbers in tensors are like: NaN, infinities, dead blocks, size. Without torch, at the
// speed of the disk, in memory that does not grow with the tensors.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <vector>

namespace ckptstore {

/// Little-endian floating-point formats; the order is that of native.WEIGHT_DTYPES.
enum class Dtype : unsigned { kF64, kF32, kF16, kBf16, kF8E4M3, kF8E5M2 };
inline constexpr unsigned kDtypes = 6;
std::uint64_t item_bytes(Dtype dtype);

/// Zeros are counted in whole blocks of so many bytes, from a region's start: a page that never
/// reached the disk.
inline constexpr std::uint64_t kZeroBlockBytes = 4096;

/// A run of numbers in a file below the root; `bytes` is a multiple of the item's size.
struct Region {
  std::string name;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  Dtype dtype = Dtype::kF32;
};

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

/// What became of one region: its numbers, or why there are none (IoError, Refused, SourceChanged).
struct WeightOutcome {
  WeightStats stats;
  std::exception_ptr error;
};

/// Reads every region once, in parallel; what fails for one does not stop the others. `progress` is
/// called in the calling thread about ten times a second with the bytes done and those to do; what
/// it throws cancels. Needs threads × 4 MiB. Throws only what is not about one region.
std::vector<WeightOutcome> scan_weights(
    const std::string& root, const std::vector<Region>& regions, unsigned threads,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress);

}  // namespace ckptstore
