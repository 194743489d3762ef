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

#include "crc.h"
#include "error.h"
#include "file.h"
#include "pool.h"

namespace ckptstore {
namespace {

constexpr std::size_t kPieceBytes = 4 << 20;     // of one read
constexpr std::size_t kStrideBytes = 128 << 10;  // digested, then judged, while it is in the cache
static_assert(kPieceBytes % kStrideBytes == 0 && kStrideBytes % kZeroBlockBytes == 0);

/// A vector register's worth of numbers. GCC and Clang do with one what they do with a number, in
/// whatever registers the target has.
template <class Number, std::size_t kCount>
using Pack [[gnu::vector_size(sizeof(Number) * kCount)]] = Number;

// A format: its stored integer, the integer and the number that one computes with, and the
// magnitude of infinity (all above are NaN). to_value() takes one or a pack, by reference since
// packs have no stable calling convention, and need not be right for what is not finite.
struct F64 {
  using Stored = std::uint64_t;
  using Raw = std::uint64_t;
  using Value = double;
  static constexpr Raw kInfinity = 0x7FF0'0000'0000'0000;
  static constexpr bool kHasInfinity = true;
  template <class ValueOrPack, class RawOrPack>
  [[gnu::always_inline]] static void to_value(const RawOrPack& raw, ValueOrPack& value) {
    value = __builtin_bit_cast(ValueOrPack, raw);
  }
};

struct F32 {
  using Stored = std::uint32_t;
  using Raw = std::uint32_t;
  using Value = float;
  static constexpr Raw kInfinity = 0x7F80'0000;
  static constexpr bool kHasInfinity = true;
  template <class ValueOrPack, class RawOrPack>
  [[gnu::always_inline]] static void to_value(const RawOrPack& raw, ValueOrPack& value) {
    value = __builtin_bit_cast(ValueOrPack, raw);
  }
};

struct Bf16 {
  using Stored = std::uint16_t;
  using Raw = std::uint32_t;
  using Value = float;
  static constexpr Raw kInfinity = 0x7F80;
  static constexpr bool kHasInfinity = true;
  template <class ValueOrPack, class RawOrPack>
  [[gnu::always_inline]] static void to_value(const RawOrPack& raw, ValueOrPack& value) {
    value = __builtin_bit_cast(ValueOrPack, raw << 16);
  }
};

/// A small format with `kMantissa` bits of mantissa: its bits are moved to a float's places, and
/// the difference of the biases is multiplied away, which makes subnormal numbers right as well.
template <class StoredType, unsigned kMantissa, unsigned kBias, std::uint32_t kInf, bool kInfs>
struct Small {
  using Stored = StoredType;
  using Raw = std::uint32_t;
  using Value = float;
  static constexpr Raw kInfinity = kInf;
  static constexpr bool kHasInfinity = kInfs;
  template <class ValueOrPack, class RawOrPack>
  [[gnu::always_inline]] static void to_value(const RawOrPack& raw, ValueOrPack& value) {
    constexpr unsigned kBits = 8 * sizeof(Stored);
    constexpr Raw kSign = Raw{1} << (kBits - 1);
    const RawOrPack bits = (raw & (kSign - 1)) << (23 - kMantissa) | (raw & kSign) << (32 - kBits);
    value = __builtin_bit_cast(ValueOrPack, bits) * std::bit_cast<float>((127 + 127 - kBias) << 23);
  }
};

using F16 = Small<std::uint16_t, 10, 15, 0x7C00, true>;
using F8E5M2 = Small<std::uint8_t, 2, 15, 0x7C, true>;
using F8E4M3 = Small<std::uint8_t, 3, 7, 0x7F, false>;  // no infinity: that place is NaN

template <class Format>
constexpr typename Format::Raw kMagnitude =
    std::numeric_limits<typename Format::Stored>::max() >> 1;

/// Numbers looked at together: a register of words, each of which holds one number or several.
/// Their sums stay apart, and are added in the end: one order on every machine.
template <class Format>
constexpr std::size_t kWords = 32 / sizeof(typename Format::Raw);
template <class Format>
constexpr std::size_t kLanes = 32 / sizeof(typename Format::Stored);

/// What the fast look at some numbers finds.
struct Look {
  bool finite;
  bool zero;
  double sum_squares;  // only if finite
  double min, max;     // only if finite
};

/// `count` is a multiple of the lanes, and not 0.
template <class Format>
[[gnu::always_inline]] inline Look look_body(const std::byte* data, std::size_t count) {
  using Raws = Pack<typename Format::Raw, kWords<Format>>;
  using Values = Pack<typename Format::Value, kWords<Format>>;
  constexpr unsigned kBits = 8 * sizeof(typename Format::Stored);
  constexpr unsigned kWordBits = 8 * sizeof(typename Format::Raw);
  Raws largest{};
  Values sum{}, low = Values{} + std::numeric_limits<typename Format::Value>::infinity(),
                high = -low;
  for (std::size_t i = 0; i < count; i += kLanes<Format>) {
    Raws words;
    std::memcpy(&words, data + i * sizeof(typename Format::Stored), sizeof words);
    for (unsigned shift = 0; shift < kWordBits; shift += kBits) {
      const Raws raw = (words >> shift) & (~typename Format::Raw{0} >> (kWordBits - kBits));
      const Raws size = raw & kMagnitude<Format>;
      Values value;
      Format::to_value(raw, value);
      largest = size > largest ? size : largest;
      sum += value * value;
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
  }
  Look look{true, true, 0, std::numeric_limits<double>::infinity(),
            -std::numeric_limits<double>::infinity()};
  for (std::size_t lane = 0; lane < kWords<Format>; ++lane) {
    look.finite = look.finite && largest[lane] < Format::kInfinity;
    look.zero = look.zero && largest[lane] == 0;
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

/// The slow way, number by number: for what is not finite, for squares out of a float's range, and
/// for the few numbers at a region's end.
template <class Format>
void add_exactly(WeightStats& stats, const std::byte* data, std::size_t count,
                 std::uint64_t first) {
  for (std::size_t i = 0; i < count; ++i) {
    typename Format::Stored stored;
    std::memcpy(&stored, data + i * sizeof stored, sizeof stored);
    const typename Format::Raw raw = stored, size = raw & kMagnitude<Format>;
    if (size >= Format::kInfinity) {
      const bool infinite = Format::kHasInfinity && size == Format::kInfinity;
      ++(infinite ? stats.infinite : stats.nan);
      stats.first_nonfinite = std::min(stats.first_nonfinite, first + i);
      continue;
    }
    typename Format::Value narrow;
    Format::to_value(raw, narrow);
    const double value = narrow;
    stats.sum_squares += value * value;
    stats.min = std::min(stats.min, value);
    stats.max = std::max(stats.max, value);
  }
}

/// Adds `bytes` bytes that begin `before` bytes into the region, a multiple of the zero block.
template <class Format>
void add(WeightStats& stats, const std::byte* data, std::size_t bytes, std::uint64_t before) {
  constexpr std::size_t kItem = sizeof(typename Format::Stored);
  constexpr bool kNarrow = sizeof(typename Format::Value) == sizeof(float);
  stats.count += bytes / kItem;
  for (std::size_t at = 0; at < bytes; at += kZeroBlockBytes) {
    const std::size_t here = std::min<std::size_t>(kZeroBlockBytes, bytes - at);
    const std::size_t count = here / kItem / kLanes<Format> * kLanes<Format>;
    const std::uint64_t first = (before + at) / kItem;
    add_exactly<Format>(stats, data + at + count * kItem, here / kItem - count, first + count);
    if (count == 0) continue;
    const Look seen = look<Format>(data + at, count);
    if (seen.zero && here == kZeroBlockBytes) {
      ++stats.zero_blocks;
      stats.first_zero_block = std::min(stats.first_zero_block, before + at);
    }
    const bool in_range =
        !kNarrow || seen.zero || (seen.sum_squares > 1e-30 && seen.sum_squares < 1e37);
    if (!seen.finite || !in_range) {
      add_exactly<Format>(stats, data + at, count, first);
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

std::uint64_t item_bytes(Dtype dtype) { return kind_of(dtype).item_bytes; }

std::vector<WeightOutcome> scan_weights(
    const std::string& root, const std::vector<Region>& regions, unsigned threads,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  return WeightScan(root, regions).run(threads, progress);
}

}  // namespace ckptstore
