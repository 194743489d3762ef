#include "numbers.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

namespace ckptstore {
namespace {

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

}  // namespace

std::uint64_t item_bytes(Dtype dtype) { return kind_of(dtype).item_bytes; }

void add_numbers(WeightStats& stats, Dtype dtype, const std::byte* data, std::size_t bytes,
                 std::uint64_t before) {
  kind_of(dtype).add(stats, data, bytes, before);
}

}  // namespace ckptstore
