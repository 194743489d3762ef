#include "crc.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace ckptstore {
namespace {

// --- Arithmetic modulo the polynomial. Bit i of a word is the coefficient of x^(63 - i).
// --------------------------

// kPolynomial is without its x^64; kOnes is what is added to the register before and after.
struct Crc64 {
  static constexpr std::uint64_t kPolynomial = 0x9A6C9329AC4BC9B5;
  static constexpr std::uint64_t kOnes = ~std::uint64_t{0};
};
// The CRC-32's polynomial times x^32: the remainder is the CRC-32's times x^32, in the low half.
struct Crc32 {
  static constexpr std::uint64_t kPolynomial = 0xEDB88320;
  static constexpr std::uint64_t kOnes = 0xFFFFFFFF;
};

constexpr std::uint64_t kOne = std::uint64_t{1} << 63;  // the polynomial 1

template <typename Crc>
constexpr std::uint64_t times_x(std::uint64_t a) {
  return a >> 1 ^ (a & 1 ? Crc::kPolynomial : 0);
}

template <typename Crc>
constexpr std::uint64_t multiply(std::uint64_t a, std::uint64_t b) {
  std::uint64_t product = 0;
  for (; a != 0; a <<= 1) {  // from the constant term up
    if (a & kOne) product ^= b;
    b = times_x<Crc>(b);
  }
  return product;
}

template <typename Crc>
struct Powers {
  std::array<std::uint64_t, 67> value{};  // value[k] = x^(2^k): enough for 2^64 bytes
  constexpr Powers() {
    value[0] = times_x<Crc>(kOne);
    for (std::size_t k = 1; k < value.size(); ++k) {
      value[k] = multiply<Crc>(value[k - 1], value[k - 1]);
    }
  }
};
template <typename Crc>
constexpr Powers<Crc> kPowers;

template <typename Crc>
constexpr std::uint64_t power_of_x(std::uint64_t exponent) {
  std::uint64_t result = kOne;
  for (std::size_t k = 0; exponent != 0; ++k, exponent >>= 1) {
    if (exponent & 1) result = multiply<Crc>(kPowers<Crc>.value[k], result);
  }
  return result;
}

// --- Portable: eight tables, eight bytes a step, four places at once
// ----------------------------------------------

constexpr std::size_t kTables = 8;

template <typename Crc>
struct Tables {
  std::uint64_t entry[kTables][256]{};  // entry[t][b]: the byte b followed by t zero bytes
  constexpr Tables() {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      std::uint64_t state = byte;
      for (int bit = 0; bit < 8; ++bit) state = times_x<Crc>(state);
      entry[0][byte] = state;
    }
    for (std::size_t t = 1; t < kTables; ++t) {
      for (std::size_t byte = 0; byte < 256; ++byte) {
        const std::uint64_t before = entry[t - 1][byte];
        entry[t][byte] = before >> 8 ^ entry[0][before & 0xFF];
      }
    }
  }
};
template <typename Crc>
constexpr Tables<Crc> kTable;

inline std::uint64_t little_endian(const unsigned char* from) {
  std::uint64_t word;
  std::memcpy(&word, from, sizeof word);
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) word = __builtin_bswap64(word);
  return word;
}

/// The register after eight more bytes, which were added to it. The sums are a tree: a chain would
/// wait for each look-up.
template <typename Crc>
inline std::uint64_t eight_bytes_on(std::uint64_t word) {
  const auto at = [word](std::size_t i) {
    return kTable<Crc>.entry[kTables - 1 - i][word >> (8 * i) & 0xFF];
  };
  return ((at(0) ^ at(1)) ^ (at(2) ^ at(3))) ^ ((at(4) ^ at(5)) ^ (at(6) ^ at(7)));
}

/// The register after `bytes` more bytes; neither inverted before nor after.
template <typename Crc>
std::uint64_t update_by_table(std::uint64_t state, const unsigned char* cursor, std::size_t bytes) {
  for (; bytes >= kTables; bytes -= kTables, cursor += kTables) {
    state = eight_bytes_on<Crc>(state ^ little_endian(cursor));
  }
  for (; bytes != 0; --bytes, ++cursor) {
    state = state >> 8 ^ kTable<Crc>.entry[0][(state ^ *cursor) & 0xFF];
  }
  return state;
}

/// The register, moved on by `bytes` zero bytes. The bits of the length are taken one by one: no
/// exponent overflows.
template <typename Crc>
std::uint64_t zeros_on(std::uint64_t state, std::uint64_t bytes) {
  for (std::size_t k = 3; bytes != 0; ++k, bytes >>= 1) {
    if (bytes & 1) state = multiply<Crc>(kPowers<Crc>.value[k], state);
  }
  return state;
}

/// Four quarters side by side keep the processor busy while each look-up waits for the one before.
template <typename Crc>
std::uint64_t portable(std::uint64_t value, const void* data, std::size_t bytes) {
  const auto* cursor = static_cast<const unsigned char*>(data);
  std::uint64_t state = value ^ Crc::kOnes;
  constexpr std::size_t kStreams = 4;
  constexpr std::size_t kWorthSplittingBytes = 16 << 10;
  if (bytes >= kWorthSplittingBytes) {
    const std::size_t part = bytes / kStreams / kTables * kTables;
    std::uint64_t stream[kStreams] = {state};
    for (std::size_t at = 0; at < part; at += kTables) {
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kStreams; ++i) {
        stream[i] = eight_bytes_on<Crc>(stream[i] ^ little_endian(cursor + i * part + at));
      }
    }
    state = stream[0];
    for (std::size_t i = 1; i < kStreams; ++i) state = zeros_on<Crc>(state, part) ^ stream[i];
    cursor += kStreams * part;
    bytes -= kStreams * part;
  }
  return update_by_table<Crc>(state, cursor, bytes) ^ Crc::kOnes;
}

// --- Folding by carry-less multiplication
// -------------------------------------------------------------------------

// Moving a block of 128 bits d bits on takes x^(d + 64) for its low (earlier) half and x^d for its
// high half. One x less in each: a carry-less product of two reflected words comes out one bit low,
// that is, times x.
struct Multipliers {
  std::uint64_t low, high;
};
template <typename Crc, std::size_t kDistanceBytes>
constexpr Multipliers kMultipliers{power_of_x<Crc>(8 * kDistanceBytes + 63),
                                   power_of_x<Crc>(8 * kDistanceBytes - 1)};

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("sse4.1,pclmul")
namespace pclmul {
using Vector = __m128i;
inline constexpr std::size_t kVectorBytes = 16;
inline Vector load(const unsigned char* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline void store(unsigned char* to, Vector v) {
  _mm_store_si128(reinterpret_cast<__m128i*>(to), v);
}
inline Vector zero_extend(std::uint64_t word) {
  return _mm_cvtsi64_si128(static_cast<long long>(word));
}
inline Vector exclusive_or(Vector a, Vector b) { return _mm_xor_si128(a, b); }
inline Vector pairs(Multipliers m) {
  return _mm_set_epi64x(static_cast<long long>(m.high), static_cast<long long>(m.low));
}
inline Vector fold(Vector a, Vector m, Vector b) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, m, 0x00), b),
                       _mm_clmulepi64_si128(a, m, 0x11));
}
#include "crc_fold.inc"
}  // namespace pclmul
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,vpclmulqdq")
namespace vpclmul_avx2 {
using Vector = __m256i;
inline constexpr std::size_t kVectorBytes = 32;
inline Vector load(const unsigned char* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline void store(unsigned char* to, Vector v) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
}
inline Vector zero_extend(std::uint64_t word) {
  return _mm256_set_epi64x(0, 0, 0, static_cast<long long>(word));
}
inline Vector exclusive_or(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
inline Vector pairs(Multipliers m) {
  return _mm256_broadcastsi128_si256(
      _mm_set_epi64x(static_cast<long long>(m.high), static_cast<long long>(m.low)));
}
inline Vector fold(Vector a, Vector m, Vector b) {
  return _mm256_xor_si256(_mm256_xor_si256(_mm256_clmulepi64_epi128(a, m, 0x00), b),
                          _mm256_clmulepi64_epi128(a, m, 0x11));
}
#include "crc_fold.inc"
}  // namespace vpclmul_avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,vpclmulqdq")
namespace vpclmul_avx512 {
#include "crc_avx512.inc"
}  // namespace vpclmul_avx512
#pragma GCC pop_options

#elif defined(__aarch64__)

#pragma GCC push_options
#pragma GCC target("+crypto")
namespace pmull {
using Vector = poly64x2_t;
inline constexpr std::size_t kVectorBytes = 16;
inline Vector load(const unsigned char* from) { return vreinterpretq_p64_u8(vld1q_u8(from)); }
inline void store(unsigned char* to, Vector v) { vst1q_u8(to, vreinterpretq_u8_p64(v)); }
inline Vector zero_extend(std::uint64_t word) {
  return vreinterpretq_p64_u64(vcombine_u64(vcreate_u64(word), vcreate_u64(0)));
}
inline Vector exclusive_or(Vector a, Vector b) {
  return vreinterpretq_p64_u64(veorq_u64(vreinterpretq_u64_p64(a), vreinterpretq_u64_p64(b)));
}
inline Vector pairs(Multipliers m) {
  return vreinterpretq_p64_u64(vcombine_u64(vcreate_u64(m.low), vcreate_u64(m.high)));
}
inline Vector fold(Vector a, Vector m, Vector b) {
  const auto low = vmull_p64(vgetq_lane_p64(a, 0), vgetq_lane_p64(m, 0));
  const auto high = vmull_high_p64(a, m);
  return exclusive_or(exclusive_or(vreinterpretq_p64_p128(low), b), vreinterpretq_p64_p128(high));
}
#include "crc_fold.inc"
}  // namespace pmull
#pragma GCC pop_options

#endif

/// The first one that agrees with the last on bytes that need every part of its loops. An
/// instruction set that a processor, or its emulator, gets wrong costs speed, not a digest.
CrcImplementation first_correct(const std::vector<CrcImplementation>& implementations) {
  std::array<unsigned char, 2600> data;
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<unsigned char>((i * i * i + i) * 0x9E3779B1 >> 16);
  }
  const auto agree = [&](CrcFunction a, CrcFunction b) {
    for (const std::size_t end : {2600, 1000, 170, 20}) {
      const std::size_t begin = end % 64 / 8 + 1;  // on no boundary of a vector, or of a word
      if (a(end, &data[begin], end - begin) != b(end, &data[begin], end - begin)) return false;
    }
    return true;
  };
  const CrcImplementation& trusted = implementations.back();
  return *std::find_if(implementations.begin(), implementations.end(), [&](const auto& one) {
    return agree(one.crc64, trusted.crc64) && agree(one.crc32, trusted.crc32);
  });
}

const CrcImplementation& best() {
  static const CrcImplementation chosen = first_correct(usable_implementations());
  return chosen;
}

}  // namespace

std::vector<CrcImplementation> usable_implementations() {
  std::vector<CrcImplementation> usable;
#if defined(__x86_64__)
  // These builtins ask cpuid and, for the wide registers, XGETBV: the operating system must save
  // them too.
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("vpclmulqdq") != 0;
  if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    usable.push_back(
        {"vpclmulqdq-avx512", vpclmul_avx512::compute<Crc64>, vpclmul_avx512::compute<Crc32>});
  }
  if (wide && __builtin_cpu_supports("avx2")) {
    usable.push_back(
        {"vpclmulqdq-avx2", vpclmul_avx2::compute<Crc64>, vpclmul_avx2::compute<Crc32>});
  }
  if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
    usable.push_back({"pclmulqdq", pclmul::compute<Crc64>, pclmul::compute<Crc32>});
  }
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_PMULL) {
    usable.push_back({"pmull", pmull::compute<Crc64>, pmull::compute<Crc32>});
  }
#endif
  usable.push_back({"portable", portable<Crc64>, portable<Crc32>});
  return usable;
}

std::uint64_t crc64(std::uint64_t value, const void* data, std::size_t bytes) {
  return best().crc64(value, data, bytes);
}

std::uint32_t crc32(std::uint32_t value, const void* data, std::size_t bytes) {
  return static_cast<std::uint32_t>(best().crc32(value, data, bytes));
}

std::uint64_t crc64_combine(std::uint64_t a, std::uint64_t b, std::uint64_t b_bytes) {
  return zeros_on<Crc64>(a, b_bytes) ^ b;
}

std::uint32_t crc32_combine(std::uint32_t a, std::uint32_t b, std::uint64_t b_bytes) {
  return static_cast<std::uint32_t>(zeros_on<Crc32>(a, b_bytes)) ^ b;
}

}  // namespace ckptstore
