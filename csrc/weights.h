// What the numbers in tensors are like: NaN, infinities, dead blocks, size. Without torch, at the
// speed of the disk, in memory that does not grow with the tensors.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "numbers.h"

namespace ckptstore {

/// A run of numbers in a file below the root; `bytes` is a multiple of the item's size.
struct Region {
  std::string name;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  Dtype dtype = Dtype::kF32;
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
