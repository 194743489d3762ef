// Copies files below one folder to another: one read, the digest on the way, one write, durable at
// the end.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "digest.h"

namespace ckptstore {

/// How the bytes of a range travelled. kAuto only as a wish.
enum class Strategy : unsigned char {
  kClone,     ///< blocks shared by the file system, read once for their digests
  kDirect,    ///< read and written past the page cache: cold data
  kWarm,      ///< read from the page cache, written past it
  kBuffered,  ///< written through the page cache, with write-behind
  kAuto,
};
inline constexpr std::size_t kStrategies = 4;

struct CopyOptions {
  unsigned threads = 0;                 ///< 0: chosen here
  std::uint64_t block_bytes = 0;        ///< of one write; 0: chosen here
  std::uint64_t chunk_bytes = 0;        ///< a multiple of kAlignmentBytes
  Strategy strategy = Strategy::kAuto;  ///< tried first; what the file system refuses falls back,
                                        ///< as the result tells
  bool durable = true;                  ///< everything on the disk before the return
  bool verify_after_write =
      false;            ///< read everything again, from the disk (makes it durable first)
  int nice = 0;         ///< 0 to 19, for the worker threads alone
  bool resume = false;  ///< destination files may be there; what is right in them is kept
};

struct CopyResult {
  std::vector<FileDigest> digests;  ///< in the order of the files
  std::uint64_t bytes_copied = 0;
  std::uint64_t bytes_reused = 0;
  std::array<std::uint64_t, kStrategies> bytes_by_strategy{};
};

/// Copies each of `files` from below `source` to below `destination`, both of which must be
/// folders. Names must be relative and without . or .. components, and unique. Files are made 0600,
/// folders 0700, times of change are kept. Throws the first error of error.h, std::bad_alloc, or
/// what `progress` threw; what was written then stays. Files in memory must not be written to
/// meanwhile; what ends up on the disk has the digests returned even so.
CopyResult copy_files(const std::string& source, const std::string& destination,
                      const std::vector<DigestSpec>& files, const CopyOptions& options,
                      const Progress& progress);

}  // namespace ckptstore
