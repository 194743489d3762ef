// Digests of files: one CRC a chunk, and their combination.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "endpoint.h"
#include "pool.h"
#include "sums.h"

namespace ckptstore {

struct FileDigest {
  std::uint64_t crc = 0;  ///< of the whole file; 0 for an empty one
  std::vector<std::uint64_t>
      chunks;  ///< of each chunk in order, the last maybe short; none for an empty file
};

/// Called in the calling thread about ten times a second with the bytes done and those to do. What
/// it throws cancels.
using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

/// A file to digest, and optionally the chunk CRCs that it should have.
struct DigestSpec : FileSpec {
  std::optional<std::vector<std::uint64_t>> expected;
  /// Compared in the same read.
  std::vector<Sum> sums;
  /// Where what is read goes as well, or null. Chunks of which nothing is wanted are not read then,
  /// the outcome has no digest, and the first error ends the work on all files.
  const Scatter* target = nullptr;
};

struct Chunk {
  std::size_t file;
  std::size_t index;
  std::uint64_t offset;
  std::uint64_t bytes;  ///< 0 only for the one chunk that stands for an empty file
};

/// Deals out the chunks of many files in order. next() is thread-safe.
class ChunkQueue {
 public:
  ChunkQueue(const std::vector<DigestSpec>& files, std::uint64_t chunk_bytes);
  std::optional<Chunk> next();
  std::size_t chunks_of(std::size_t file) const { return first_[file + 1] - first_[file]; }
  std::size_t total() const { return first_.back(); }

 private:
  const std::vector<DigestSpec>& files_;
  std::uint64_t chunk_bytes_;
  std::vector<std::size_t> first_;  // of each file, and the end
  std::atomic<std::size_t> next_{0};
};

/// Combines the CRCs of the chunks of a file of `bytes` bytes.
std::uint64_t combine_chunks(const std::vector<std::uint64_t>& chunks, std::uint64_t bytes,
                             std::uint64_t chunk_bytes);

/// Reads `bytes` at `offset` into `to` and extends `crc` over them, piece by piece, so that each is
/// digested while it is still in the processor's cache. The conditions are those of Source::read.
bool read_and_digest(Source& source, std::byte* to, std::size_t bytes, std::uint64_t offset,
                     bool direct, std::uint64_t& crc);

struct DigestOptions {
  unsigned threads = 0;           ///< 0: chosen here
  std::uint64_t block_bytes = 0;  ///< 0: chosen here
  std::uint64_t chunk_bytes = 0;  ///< > 0
  ReadMode mode = ReadMode::kAuto;
  int nice = 0;
  bool read_back = false;  ///< these are files that we wrote: says so in a mismatch
};

/// What became of one file: its digest, or why there is none.
struct DigestOutcome {
  FileDigest digest;
  std::exception_ptr error;  ///< IoError, Refused, SourceChanged, ChunkMismatch (of the first bad
                             ///< chunk) or SumMismatch
};

/// Digests every file, and fills the memory that is wanted of it; what fails for one does not stop
/// the others. Throws only what is not about one file.
std::vector<DigestOutcome> digest_files(const Root& root, const std::vector<DigestSpec>& files,
                                        const DigestOptions& options, const Progress& progress);

}  // namespace ckptstore
