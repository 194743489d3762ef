#include "weights.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "crc64.h"
#include "error.h"
#include "file.h"
#include "pool.h"

namespace ckptstore {
namespace {

constexpr std::size_t kPieceBytes = 4 << 20;     // of one read
constexpr std::size_t kStrideBytes = 128 << 10;  // digested, then judged, while it is in the cache
constexpr std::size_t kLanes = 16;               // sums kept apart, so that they can be vectorised
static_assert(kPieceBytes % kStrideBytes == 0 && kStrideBytes % kZeroBlockBytes == 0);

// A format: its raw integer, the magnitude of infinity (all above are NaN), and its value, which
// need not be right for what is not finite.
struct F64 {
  using Raw = std::uint64_t;
  using Value = double;
  static constexpr Raw kInfinity = 0x7FF0'0000'0000'0000;
  static constexpr bool kHasInfinity = true;
  static Value value(Raw raw) { return std::bit_cast<double>(raw); }
};

struct F32 {
  using Raw = std::uint32_t;
  using Value = float;
  static constexpr Raw kInfinity = 0x7F80'0000;
  static constexpr bool kHasInfinity = true;
  static Value value(Raw raw) { return std::bit_cast<float>(raw); }
};

struct Bf16 {
  using Raw = std::uint16_t;
  using Value = float;
  static constexpr Raw kInfinity = 0x7F80;
  static constexpr bool kHasInfinity = true;
  static Value value(Raw raw) { return std::bit_cast<float>(std::uint32_t{raw} << 16); }
};

/// A small format with `kMantissa` bits of mantissa: its bits are moved to a float's places, and
/// the difference of the biases is multiplied away, which makes subnormal numbers right as well.
template <class RawType, unsigned kBits, unsigned kMantissa, unsigned kBias, RawType kInf,
          bool kInfs>
struct Small {
  using Raw = RawType;
  using Value = float;
  static constexpr Raw kInfinity = kInf;
  static constexpr bool kHasInfinity = kInfs;
  static Value value(Raw raw) {
    constexpr std::uint32_t kSign = std::uint32_t{1} << (kBits - 1);
    const std::uint32_t bits = (raw & (kSign - 1)) << (23 - kMantissa) | (raw & kSign)
                                                                             << (32 - kBits);
    return std::bit_cast<float>(bits) * std::bit_cast<float>((127 + 127 - kBias) << 23);
  }
};

using F16 = Small<std::uint16_t, 16, 10, 15, 0x7C00, true>;
using F8E5M2 = Small<std::uint8_t, 8, 2, 15, 0x7C, true>;
using F8E4M3 = Small<std::uint8_t, 8, 3, 7, 0x7F, false>;  // no infinity: that place is NaN

template <class Format>
constexpr typename Format::Raw magnitude(typename Format::Raw raw) {
  using Raw = typename Format::Raw;
  return static_cast<Raw>(raw & (std::numeric_limits<Raw>::max() >> 1));
}

template <class Format>
typename Format::Raw load(const std::byte* data, std::size_t index) {
  typename Format::Raw raw;
  std::memcpy(&raw, data + index * sizeof raw, sizeof raw);
  return raw;
}

/// What the fast look at a block finds.
struct Look {
  bool finite;
  bool zero;
  double sum_squares;  // only if finite
  double min, max;     // only if finite
};

template <class Format>
[[gnu::always_inline]] inline Look look_body(const std::byte* data, std::size_t count) {
  using Value = typename Format::Value;
  using Raw = typename Format::Raw;
  Raw nonfinite[kLanes] = {}, nonzero[kLanes] = {};
  Value sum[kLanes] = {}, low[kLanes], high[kLanes];
  std::fill_n(low, kLanes, std::numeric_limits<Value>::infinity());
  std::fill_n(high, kLanes, -std::numeric_limits<Value>::infinity());
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const Raw raw = load<Format>(data, i + lane);
      const Raw size = magnitude<Format>(raw);
      const Value value = Format::value(raw);
      nonfinite[lane] = static_cast<Raw>(nonfinite[lane] | (size >= Format::kInfinity ? 1 : 0));
      nonzero[lane] = static_cast<Raw>(nonzero[lane] | size);
      sum[lane] += value * value;
      low[lane] = value < low[lane] ? value : low[lane];
      high[lane] = value > high[lane] ? value : high[lane];
    }
  }
  Look look{true, true, 0, std::numeric_limits<double>::infinity(),
            -std::numeric_limits<double>::infinity()};
  for (; i < count; ++i) {
    const Raw raw = load<Format>(data, i);
    const Value value = Format::value(raw);
    nonfinite[0] = static_cast<Raw>(nonfinite[0] | (magnitude<Format>(raw) >= Format::kInfinity));
    nonzero[0] = static_cast<Raw>(nonzero[0] | magnitude<Format>(raw));
    sum[0] += value * value;
    low[0] = value < low[0] ? value : low[0];
    high[0] = value > high[0] ? value : high[0];
  }
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    look.finite = look.finite && nonfinite[lane] == 0;
    look.zero = look.zero && nonzero[lane] == 0;
    look.sum_squares += static_cast<double>(sum[lane]);
    look.min = std::min(look.min, static_cast<double>(low[lane]));
    look.max = std::max(look.max, static_cast<double>(high[lane]));
  }
  return look;
}

template <class Format>
Look look_portable(const std::byte* data, std::size_t count) {
  return look_body<Format>(data, count);
}

#if defined(__x86_64__)
template <class Format>
[[gnu::target("avx2,fma")]] Look look_avx2(const std::byte* data, std::size_t count) {
  return look_body<Format>(data, count);
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

template <class Format>
Look look(const std::byte* data, std::size_t count) {
#if defined(__x86_64__)
  if (has_avx2()) return look_avx2<Format>(data, count);
#endif
  return look_portable<Format>(data, count);
}

/// The slow way, number by number: for blocks with something that is not finite, and for those
/// whose squares are out of a float's range.
template <class Format>
void add_exactly(WeightStats& stats, const std::byte* data, std::size_t count,
                 std::uint64_t first) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto raw = load<Format>(data, i);
    const auto size = magnitude<Format>(raw);
    if (size >= Format::kInfinity) {
      const bool infinite = Format::kHasInfinity && size == Format::kInfinity;
      ++(infinite ? stats.infinite : stats.nan);
      stats.first_nonfinite = std::min(stats.first_nonfinite, first + i);
      continue;
    }
    const double value = Format::value(raw);
    stats.sum_squares += value * value;
    stats.min = std::min(stats.min, value);
    stats.max = std::max(stats.max, value);
  }
}

/// Adds `bytes` bytes that begin `before` bytes into the region, a multiple of the zero block.
template <class Format>
void add(WeightStats& stats, const std::byte* data, std::size_t bytes, std::uint64_t before) {
  constexpr std::size_t kItem = sizeof(typename Format::Raw);
  constexpr bool kNarrow = sizeof(typename Format::Value) == sizeof(float);
  for (std::size_t at = 0; at < bytes; at += kZeroBlockBytes) {
    const std::size_t here = std::min<std::size_t>(kZeroBlockBytes, bytes - at);
    const std::size_t count = here / kItem;
    const Look seen = look<Format>(data + at, count);
    stats.count += count;
    if (seen.zero && here == kZeroBlockBytes) {
      ++stats.zero_blocks;
      stats.first_zero_block = std::min(stats.first_zero_block, before + at);
    }
    const bool in_range =
        !kNarrow || seen.zero || (seen.sum_squares > 1e-30 && seen.sum_squares < 1e37);
    if (!seen.finite || !in_range) {
      add_exactly<Format>(stats, data + at, count, (before + at) / kItem);
      continue;
    }
    stats.sum_squares += seen.sum_squares;
    stats.min = std::min(stats.min, seen.min);
    stats.max = std::max(stats.max, seen.max);
  }
}

using Adder = void (*)(WeightStats&, const std::byte*, std::size_t, std::uint64_t);

struct Kind {
  std::uint64_t item_bytes;
  Adder add;
};

constexpr Kind kKinds[kDtypes] = {
    {8, add<F64>}, {4, add<F32>}, {2, add<F16>}, {2, add<Bf16>}, {1, add<F8E4M3>}, {1, add<F8E5M2>},
};

const Kind& kind_of(Dtype dtype) { return kKinds[static_cast<unsigned>(dtype)]; }

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
    for (std::size_t i = 0; i < regions.size(); ++i) {
      for (std::uint64_t at = 0; at < regions[i].bytes; at += kPieceBytes) {
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

  WeightStats scan(int fd, const Region& region, const Piece& piece, std::byte* buffer) const {
    const std::string shown = root_ + "/" + region.name;
    if (read_at(fd, buffer, piece.bytes, region.offset + piece.before, shown) < piece.bytes) {
      throw SourceChanged(region.name, "is shorter than its tensors need");
    }
    WeightStats stats = empty_stats();
    for (std::size_t at = 0; at < piece.bytes; at += kStrideBytes) {
      const std::size_t here = std::min(kStrideBytes, piece.bytes - at);
      stats.crc = crc64(stats.crc, buffer + at, here);
      kind_of(region.dtype).add(stats, buffer + at, here, piece.before + at);
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

std::uint64_t item_bytes(Dtype dtype) { return kind_of(dtype).item_bytes; }

std::vector<WeightOutcome> scan_weights(
    const std::string& root, const std::vector<Region>& regions, unsigned threads,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  return WeightScan(root, regions).run(threads, progress);
}

}  // namespace ckptstore
