// Compares the CRC implementations with a bit-at-a-time one. Stand-alone, so that it can be
// cross-compiled and run under an emulator: g++ -std=c++20 -O2 -static -I csrc
// tests/native/crc_selftest.cpp -o selftest Usage: selftest [NAME]   without a name: those that the
// processor says it has, and the text of the AVX-512 one with a stand-in for each instruction; with
// one: that one, whatever the processor says (QEMU has VPCLMULQDQ on 256 bits but does not say so).
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

#include "crc.cpp"  // NOLINT: to reach what it keeps to itself

namespace ckptstore {
namespace {

// The operations of Intel's manual on eight words, in plain C++: what vpclmul_avx512 means where no
// processor has it.
namespace stand_in {
struct Eight {
  std::uint64_t word[8];
};
inline Eight load_unaligned(const void* from) {
  Eight v;
  std::memcpy(v.word, from, sizeof v);
  return v;
}
inline void store_aligned(void* to, const Eight& v) {
  if (reinterpret_cast<std::uintptr_t>(to) % 64 != 0) __builtin_trap();  // as VMOVDQA64 does
  std::memcpy(to, v.word, sizeof v);
}
inline Eight set(long long e7, long long e6, long long e5, long long e4, long long e3, long long e2,
                 long long e1, long long e0) {
  Eight v;
  const long long from_low[8] = {e0, e1, e2, e3, e4, e5, e6, e7};
  std::memcpy(v.word, from_low, sizeof v);
  return v;
}
inline Eight sum(const Eight& a, const Eight& b) {
  Eight v;
  for (int i = 0; i < 8; ++i) v.word[i] = a.word[i] ^ b.word[i];
  return v;
}
inline Eight carry_less_multiply(const Eight& a, const Eight& b, int chosen) {
  Eight v{};
  for (int lane = 0; lane < 8; lane += 2) {
    const std::uint64_t x = a.word[lane + (chosen & 1)];
    const std::uint64_t y = b.word[lane + (chosen >> 4 & 1)];
    for (int bit = 0; bit < 64; ++bit) {
      if ((y >> bit & 1) == 0) continue;
      v.word[lane] ^= x << bit;
      if (bit != 0) v.word[lane + 1] ^= x >> (64 - bit);
    }
  }
  return v;
}
inline Eight by_truth_table(const Eight& a, const Eight& b, const Eight& c, int table) {
  Eight v{};
  for (int i = 0; i < 8; ++i) {
    for (int bit = 0; bit < 64; ++bit) {
      const auto of = [&](const Eight& from) { return from.word[i] >> bit & 1; };
      const std::uint64_t row = of(a) << 2 | of(b) << 1 | of(c);
      v.word[i] |= (static_cast<std::uint64_t>(table) >> row & 1) << bit;
    }
  }
  return v;
}
#define __m512i Eight
#define _mm512_loadu_si512 load_unaligned
#define _mm512_store_si512 store_aligned
#define _mm512_set_epi64 set
#define _mm512_xor_si512 sum
#define _mm512_clmulepi64_epi128 carry_less_multiply
#define _mm512_ternarylogic_epi64 by_truth_table
namespace vpclmul_avx512 {
#include "crc_avx512.inc"
}  // namespace vpclmul_avx512
#undef __m512i
#undef _mm512_loadu_si512
#undef _mm512_store_si512
#undef _mm512_set_epi64
#undef _mm512_xor_si512
#undef _mm512_clmulepi64_epi128
#undef _mm512_ternarylogic_epi64
}  // namespace stand_in

std::vector<CrcImplementation> all_implementations() {
  return {
#if defined(__x86_64__)
      {"vpclmulqdq-avx512", vpclmul_avx512::compute<Crc64>, vpclmul_avx512::compute<Crc32>},
      {"vpclmulqdq-avx2", vpclmul_avx2::compute<Crc64>, vpclmul_avx2::compute<Crc32>},
      {"pclmulqdq", pclmul::compute<Crc64>, pclmul::compute<Crc32>},
#elif defined(__aarch64__)
      {"pmull", pmull::compute<Crc64>, pmull::compute<Crc32>},
#endif
      {"portable", portable<Crc64>, portable<Crc32>}};
}

template <std::uint64_t kPolynomial, std::uint64_t kOnes>
std::uint64_t by_bit(std::uint64_t value, const void* data, std::size_t bytes) {
  std::uint64_t state = value ^ kOnes;
  for (std::size_t i = 0; i < bytes; ++i) {
    state ^= static_cast<const unsigned char*>(data)[i];
    for (int bit = 0; bit < 8; ++bit) state = state >> 1 ^ (state & 1 ? kPolynomial : 0);
  }
  return state ^ kOnes;
}
constexpr CrcFunction crc64_by_bit = by_bit<0x9A6C9329AC4BC9B5, 0xFFFFFFFFFFFFFFFF>;
constexpr CrcFunction crc32_by_bit = by_bit<0xEDB88320, 0xFFFFFFFF>;

std::vector<unsigned char> made_up_data(std::size_t bytes) {
  std::vector<unsigned char> data(bytes);
  std::uint64_t seed = 1;
  for (auto& byte : data) {
    seed = seed * 6364136223846793005 + 1442695040888963407;
    byte = static_cast<unsigned char>(seed >> 56);
  }
  return data;
}

int failures_of(const CrcImplementation& implementation, const std::vector<unsigned char>& data) {
  int failures = 0;
  const auto same = [&](bool right, const char* what, std::size_t bytes) {
    if (!right && ++failures < 10) std::printf("%s differs at %zu bytes\n", what, bytes);
  };
  const auto compare = [&](std::uint64_t before, const unsigned char* from, std::size_t bytes) {
    same(implementation.crc64(before, from, bytes) == crc64_by_bit(before, from, bytes), "crc64",
         bytes);
    before >>= 32;
    same(implementation.crc32(before, from, bytes) == crc32_by_bit(before, from, bytes), "crc32",
         bytes);
  };
  same(implementation.crc64(0, "123456789", 9) == 0xAE8B14860A799888, "crc64", 9);
  same(implementation.crc32(0, "123456789", 9) == 0xCBF43926, "crc32", 9);
  for (std::size_t bytes = 0; bytes < 2600; bytes += bytes < 1100 ? 1 : 13) {
    compare(bytes * 0x9E3779B97F4A7C15, data.data() + bytes % 61, bytes);
  }
  compare(0x700000000000007, data.data(), data.size());
  std::printf("%.*s: %d failures\n", static_cast<int>(implementation.name.size()),
              implementation.name.data(), failures);
  return failures;
}

int failures_of_combine(const std::vector<unsigned char>& data) {
  int failures = 0;
  const std::size_t all = data.size();
  for (std::size_t cut = 0; cut <= all; cut += 97) {
    const unsigned char* const rest = data.data() + cut;
    failures += crc64_combine(crc64(0, data.data(), cut), crc64(0, rest, all - cut), all - cut) !=
                crc64_by_bit(0, data.data(), all);
    failures += crc32_combine(crc32(0, data.data(), cut), crc32(0, rest, all - cut), all - cut) !=
                crc32_by_bit(0, data.data(), all);
  }
  std::printf("combining: %d failures\n", failures);
  return failures;
}

/// Wrong in one part of the loops at a time: with `kFrom` bytes and more, and only in the last
/// byte, the first, or the CRC that came before.
enum class Part { kFirst, kLast, kBefore };
template <CrcFunction kRight, std::size_t kFrom, Part kWrong>
std::uint64_t wrong(std::uint64_t value, const void* data, std::size_t bytes) {
  if (bytes < kFrom) return kRight(value, data, bytes);
  if (kWrong == Part::kBefore) return kRight(0, data, bytes);
  std::vector<unsigned char> changed(bytes);
  std::memcpy(changed.data(), data, bytes);
  changed[kWrong == Part::kFirst ? 0 : bytes - 1] ^= 0x10;
  return kRight(value, changed.data(), bytes);
}

/// A wrong implementation is passed over, whatever is wrong; a right one is taken.
int failures_of_choice() {
  int failures = 0;
  const CrcImplementation right{"right", portable<Crc64>, portable<Crc32>};
  const auto expect = [&](const char* name, CrcFunction made64, CrcFunction made32) {
    const CrcImplementation tried{"tried", made64, made32};
    const CrcImplementation next{"next", right.crc64, right.crc32};
    if (first_correct({tried, next, right}).name == name) return;
    ++failures;
    std::printf("the choice: not %s\n", name);
  };
  expect("tried", right.crc64, right.crc32);
  expect("next", wrong<portable<Crc64>, 1024, Part::kFirst>, right.crc32);
  expect("next", wrong<portable<Crc64>, 1024, Part::kLast>, right.crc32);
  expect("next", wrong<portable<Crc64>, 1024, Part::kBefore>, right.crc32);
  expect("next", wrong<portable<Crc64>, 16, Part::kFirst>, right.crc32);
  expect("next", right.crc64, wrong<portable<Crc32>, 1024, Part::kFirst>);
  expect("next", right.crc64, wrong<portable<Crc32>, 1024, Part::kLast>);
  expect("next", right.crc64, wrong<portable<Crc32>, 128, Part::kBefore>);
  expect("next", right.crc64, wrong<portable<Crc32>, 16, Part::kLast>);
  expect("next", right.crc32, right.crc64);  // mixed up
  const CrcImplementation bad{"bad", crc32_by_bit, right.crc32};
  failures += first_correct({bad, bad, right}).name != "right";
  failures += first_correct({right}).name != "right";
  std::printf("the choice: %d failures\n", failures);
  return failures;
}

}  // namespace
}  // namespace ckptstore

int main(int count, char** arguments) {
  using namespace ckptstore;  // NOLINT: a test
  const auto data = made_up_data(20000);
  if (count > 1) {
    for (const auto& implementation : all_implementations()) {
      if (implementation.name == arguments[1]) return failures_of(implementation, data) != 0;
    }
    return 2;
  }
  int failures = failures_of_combine(data) + failures_of_choice();
  for (const auto& implementation : usable_implementations()) {
    failures += failures_of(implementation, data);
  }
  using namespace stand_in::vpclmul_avx512;
  failures += failures_of({"the text of AVX-512", compute<Crc64>, compute<Crc32>}, data);
  return failures != 0;
}
