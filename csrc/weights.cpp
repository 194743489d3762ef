#include "weights.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <limits>

#include "crc.h"
#include "error.h"
#include "file.h"
#include "pool.h"

namespace ckptstore {
namespace {

constexpr std::size_t kPieceBytes = 4 << 20;     // of one read
constexpr std::size_t kStrideBytes = 128 << 10;  // digested, then judged, while it is in the cache
static_assert(kPieceBytes % kStrideBytes == 0 && kStrideBytes % kZeroBlockBytes == 0);

/// One read: a part of a region.
struct Piece {
  std::size_t region;
  std::uint64_t before;  // bytes of the region before it
  std::size_t bytes;
};

WeightStats empty_stats() {
  WeightStats stats;
  stats.min = std::numeric_limits<double>::infinity();
  stats.max = -std::numeric_limits<double>::infinity();
  return stats;
}

class WeightScan {
 public:
  WeightScan(const std::string& root, const std::vector<Region>& regions)
      : root_(root), folder_(open_folder(root)), regions_(regions), outcomes_(regions.size()) {
    const std::string* name = nullptr;
    std::uint64_t size = 0;
    for (std::size_t i = 0; i < regions.size(); ++i) {
      if (name == nullptr || *name != regions[i].name) size = size_of(regions[i]);
      name = &regions[i].name;
      if (regions[i].bytes > size || regions[i].offset > size - regions[i].bytes) {
        // Before a plan is made for exabytes that a damaged header names.
        if (size != kUnknown) outcomes_[i].error = too_short(regions[i]);
        if (outcomes_[i].error) continue;
      }
      for (std::uint64_t at = 0; at < regions[i].bytes; at += kPieceBytes) {
        if (size == kUnknown && at != 0) break;  // one piece tells why it cannot be opened
        const std::uint64_t left = regions[i].bytes - at;
        pieces_.push_back(
            {i, at, static_cast<std::size_t>(std::min<std::uint64_t>(kPieceBytes, left))});
        total_ += pieces_.back().bytes;
      }
    }
    found_.resize(pieces_.size());
    errors_.resize(pieces_.size());
  }

  std::vector<WeightOutcome> run(
      unsigned threads, const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
    const auto useful = static_cast<unsigned>(
        std::min<std::size_t>(std::max<std::size_t>(pieces_.size(), 1), 1024));
    run_workers(
        std::min(threads != 0 ? threads : default_threads(), useful), cancelled_,
        [this] { work(); }, [&] { progress(done_, total_); });
    combine();
    return std::move(outcomes_);
  }

 private:
  void work() {
    const AlignedBlock block(kPieceBytes);
    UniqueFd fd;
    std::size_t open_region = 0;
    while (!cancelled_) {
      const std::size_t number = next_++;
      if (number >= pieces_.size()) return;
      const Piece& piece = pieces_[number];
      const Region& region = regions_[piece.region];
      try {
        if (!fd || regions_[open_region].name != region.name) {
          fd = open(region);
          open_region = piece.region;
        }
        found_[number] = scan(fd.get(), region, piece, block.data());
      } catch (const std::bad_alloc&) {
        throw;
      } catch (const std::exception&) {
        errors_[number] = std::current_exception();
        fd.reset();
      }
      done_ += piece.bytes;
    }
  }

  UniqueFd open(const Region& region) const {
    const std::string shown = root_ + "/" + region.name;
    // O_NONBLOCK: opening a pipe must not wait for its other end.
    UniqueFd fd = open_beneath(folder_.get(), region.name, O_RDONLY | O_NONBLOCK, 0, shown);
    if (!S_ISREG(status_of(fd.get(), shown).st_mode)) throw Refused(shown, "is not a regular file");
    expect_sequential(fd.get());
    return fd;
  }

  /// Of the region's file; kUnknown where it cannot be opened.
  std::uint64_t size_of(const Region& region) const {
    try {
      return static_cast<std::uint64_t>(status_of(open(region).get(), region.name).st_size);
    } catch (const IoError&) {
      return kUnknown;
    } catch (const Refused&) {
      return kUnknown;
    }
  }

  static std::exception_ptr too_short(const Region& region) {
    return std::make_exception_ptr(SourceChanged(region.name, "is shorter than its tensors need"));
  }

  WeightStats scan(int fd, const Region& region, const Piece& piece, std::byte* buffer) const {
    const std::string shown = root_ + "/" + region.name;
    if (read_at(fd, buffer, piece.bytes, region.offset + piece.before, shown) < piece.bytes) {
      std::rethrow_exception(too_short(region));
    }
    WeightStats stats = empty_stats();
    for (std::size_t at = 0; at < piece.bytes; at += kStrideBytes) {
      const std::size_t here = std::min(kStrideBytes, piece.bytes - at);
      stats.crc = crc64(stats.crc, buffer + at, here);
      add_numbers(stats, region.dtype, buffer + at, here, piece.before + at);
    }
    return stats;
  }

  /// In order, so that equal bytes give equal sums whatever the threads did.
  void combine() {
    for (auto& outcome : outcomes_) outcome.stats = empty_stats();
    for (std::size_t number = 0; number < pieces_.size(); ++number) {
      const WeightStats& part = found_[number];
      WeightOutcome& whole = outcomes_[pieces_[number].region];
      if (errors_[number] && !whole.error) whole.error = errors_[number];
      WeightStats& stats = whole.stats;
      stats.count += part.count;
      stats.nan += part.nan;
      stats.infinite += part.infinite;
      stats.first_nonfinite = std::min(stats.first_nonfinite, part.first_nonfinite);
      stats.zero_blocks += part.zero_blocks;
      stats.first_zero_block = std::min(stats.first_zero_block, part.first_zero_block);
      stats.sum_squares += part.sum_squares;
      stats.min = std::min(stats.min, part.min);
      stats.max = std::max(stats.max, part.max);
      stats.crc = crc64_combine(stats.crc, part.crc, pieces_[number].bytes);
    }
    for (auto& outcome : outcomes_) {
      if (outcome.stats.count == outcome.stats.nan + outcome.stats.infinite) {
        outcome.stats.min = outcome.stats.max = 0;
      }
    }
  }

  static constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();

  const std::string root_;
  const UniqueFd folder_;
  const std::vector<Region>& regions_;
  std::vector<WeightOutcome> outcomes_;
  std::vector<Piece> pieces_;
  std::vector<WeightStats> found_;          // of each piece; written by the worker that took it
  std::vector<std::exception_ptr> errors_;  // likewise
  std::uint64_t total_ = 0;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> cancelled_{false};
};

}  // namespace

std::vector<WeightOutcome> scan_weights(
    const std::string& root, const std::vector<Region>& regions, unsigned threads,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  return WeightScan(root, regions).run(threads, progress);
}

}  // namespace ckptstore
