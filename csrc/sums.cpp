#include "sums.h"

#include <algorithm>

#include "crc.h"

namespace ckptstore {

void SumCheck::begin(const std::vector<Sum>& sums, std::uint64_t chunk_bytes) {
  sums_ = &sums;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const std::uint64_t end = sums[i].offset + sums[i].bytes;
    for (std::uint64_t at = sums[i].offset; at < end;) {
      const std::uint64_t to = std::min(end, (at / chunk_bytes + 1) * chunk_bytes);
      pieces_.push_back({at, to, i, 0});
      at = to;
    }
  }
  const auto earlier = [](const Piece& a, const Piece& b) { return a.begin < b.begin; };
  std::stable_sort(pieces_.begin(), pieces_.end(), earlier);
}

SumCheck::OfChunk::OfChunk(SumCheck& check, std::uint64_t offset, std::uint64_t bytes)
    : check_(check) {
  const auto& pieces = check.pieces_;
  const auto before = [](const Piece& piece, std::uint64_t at) { return piece.begin < at; };
  const auto first = std::lower_bound(pieces.begin(), pieces.end(), offset, before);
  const auto last = std::lower_bound(first, pieces.end(), offset + bytes, before);
  next_ = static_cast<std::size_t>(first - pieces.begin());
  end_ = static_cast<std::size_t>(last - pieces.begin());
}

void SumCheck::OfChunk::add(const std::byte* data, std::size_t bytes, std::uint64_t offset) {
  const std::uint64_t end = offset + bytes;
  while (next_ < end_ && check_.pieces_[next_].begin < end) active_.push_back(next_++);
  for (const std::size_t number : active_) {
    Piece& piece = check_.pieces_[number];
    const std::uint64_t from = std::max(piece.begin, offset), to = std::min(piece.end, end);
    piece.crc32 = crc32(piece.crc32, data + (from - offset), to - from);
  }
  std::erase_if(active_, [&](std::size_t number) { return check_.pieces_[number].end <= end; });
}

std::optional<std::uint64_t> SumCheck::first_wrong() const {
  if (sums_ == nullptr) return std::nullopt;
  std::vector<std::uint32_t> found(sums_->size());
  for (const Piece& piece : pieces_) {  // those of one range are in order
    std::uint32_t& crc = found[piece.sum];
    crc = crc32_combine(crc, piece.crc32, piece.end - piece.begin);
  }
  std::optional<std::uint64_t> first;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const Sum& sum = (*sums_)[i];
    if (found[i] != sum.crc32) first = std::min(first.value_or(sum.offset), sum.offset);
  }
  return first;
}

}  // namespace ckptstore
