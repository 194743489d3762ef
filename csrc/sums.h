// CRC-32s that others left of ranges of a file, compared while its chunks are read in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace ckptstore {

/// What the CRC-32 of a range is to be.
struct Sum {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;  ///< > 0
  std::uint32_t crc32 = 0;
};

/// The sums of one file, cut where its chunks end. Ranges may overlap.
class SumCheck {
 public:
  /// `sums` must outlive this.
  void begin(const std::vector<Sum>& sums, std::uint64_t chunk_bytes);

  /// Takes the bytes of one chunk in order. Several chunks may be at work at once.
  class OfChunk {
   public:
    OfChunk(SumCheck& check, std::uint64_t offset, std::uint64_t bytes);
    void add(const std::byte* data, std::size_t bytes, std::uint64_t offset);

   private:
    SumCheck& check_;
    std::size_t next_, end_;           // pieces that have not begun
    std::vector<std::size_t> active_;  // pieces that have, and have not ended
  };

  /// When all chunks have been read: where the first range that differs begins.
  std::optional<std::uint64_t> first_wrong() const;

 private:
  struct Piece {
    std::uint64_t begin, end;  // in the file
    std::size_t sum;
    std::uint32_t crc32;
  };
  const std::vector<Sum>* sums_ = nullptr;
  std::vector<Piece> pieces_;  // by begin
};

}  // namespace ckptstore
