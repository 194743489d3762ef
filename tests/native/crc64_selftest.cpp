// Compares the CRC implementations with a bit-at-a-time one. Stand-alone, so that it can be
// cross-compiled and run under an emulator: g++ -std=c++20 -O2 -static -I csrc
// tests/native/crc64_selftest.cpp -o selftest Usage: selftest [NAME]   without a name: those that
// the processor says it has, and the folding loop at the width of AVX-512 with its vector made of
// four; with one: that one, whatever the processor says (QEMU has VPCLMULQDQ on 256 bits but does
// not say so).
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

#include "crc64.cpp"  // NOLINT: to reach what it keeps to itself

namespace ckptstore {
namespace {

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("sse4.1,pclmul")
namespace four_in_one {  // the loop and the constants of vpclmul_avx512, with instructions that
                         // every processor has
struct Vector {
  pclmul::Vector part[4];
};
inline constexpr std::size_t kVectorBytes = 64;
template <typename Function>
Vector each(Function function) {
  return {function(0), function(1), function(2), function(3)};
}
inline Vector load(const unsigned char* from) {
  return each([&](int i) { return pclmul::load(from + 16 * i); });
}
inline void store(unsigned char* to, const Vector& v) {
  for (int i = 0; i < 4; ++i) pclmul::store(to + 16 * i, v.part[i]);
}
inline Vector zero_extend(std::uint64_t word) {
  return each([&](int i) { return pclmul::zero_extend(i == 0 ? word : 0); });
}
inline Vector exclusive_or(const Vector& a, const Vector& b) {
  return each([&](int i) { return pclmul::exclusive_or(a.part[i], b.part[i]); });
}
inline Vector multipliers(std::size_t distance_bytes) {
  return each([&](int) { return pclmul::multipliers(distance_bytes); });
}
inline Vector fold(const Vector& a, const Vector& m, const Vector& b) {
  return each([&](int i) { return pclmul::fold(a.part[i], m.part[i], b.part[i]); });
}
#include "crc64_fold.inc"
}  // namespace four_in_one
#pragma GCC pop_options
#endif

std::vector<Crc64Implementation> all_implementations() {
  return {
#if defined(__x86_64__)
      {"vpclmulqdq-avx512", vpclmul_avx512::compute},
      {"vpclmulqdq-avx2", vpclmul_avx2::compute},
      {"pclmulqdq", pclmul::compute},
#elif defined(__aarch64__)
      {"pmull", pmull::compute},
#endif
      {"portable", portable}};
}

std::uint64_t by_bit(std::uint64_t value, const unsigned char* data, std::size_t bytes) {
  std::uint64_t state = ~value;
  for (std::size_t i = 0; i < bytes; ++i) {
    state ^= data[i];
    for (int bit = 0; bit < 8; ++bit) state = state >> 1 ^ (state & 1 ? 0x9A6C9329AC4BC9B5 : 0);
  }
  return ~state;
}

std::vector<unsigned char> made_up_data(std::size_t bytes) {
  std::vector<unsigned char> data(bytes);
  std::uint64_t seed = 1;
  for (auto& byte : data) {
    seed = seed * 6364136223846793005 + 1442695040888963407;
    byte = static_cast<unsigned char>(seed >> 56);
  }
  return data;
}

int failures_of(const Crc64Implementation& implementation, const std::vector<unsigned char>& data) {
  int failures = 0;
  const auto compare = [&](std::uint64_t before, const unsigned char* from, std::size_t bytes) {
    if (implementation.function(before, from, bytes) == by_bit(before, from, bytes)) return;
    if (++failures < 10) std::printf("differs at %zu bytes\n", bytes);
  };
  if (implementation.function(0, "123456789", 9) != 0xAE8B14860A799888) ++failures;
  for (std::size_t bytes = 0; bytes < 2600; bytes += bytes < 1100 ? 1 : 13) {
    compare(bytes * 0x9E3779B97F4A7C15, data.data() + bytes % 61, bytes);
  }
  compare(7, data.data(), data.size());
  std::printf("%.*s: %d failures\n", static_cast<int>(implementation.name.size()),
              implementation.name.data(), failures);
  return failures;
}

int failures_of_combine(const std::vector<unsigned char>& data) {
  int failures = 0;
  for (std::size_t cut = 0; cut <= data.size(); cut += 97) {
    const auto a = portable(0, data.data(), cut);
    const auto b = portable(0, data.data() + cut, data.size() - cut);
    const auto whole = crc64_combine(a, b, data.size() - cut);
    failures += whole != by_bit(0, data.data(), data.size());
  }
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
  int failures = failures_of_combine(data);
  for (const auto& implementation : usable_implementations()) {
    failures += failures_of(implementation, data);
  }
#if defined(__x86_64__)
  if (__builtin_cpu_supports("pclmul")) {
    failures += failures_of({"folding at the width of AVX-512", four_in_one::compute}, data);
  }
#endif
  return failures != 0;
}
