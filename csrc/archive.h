// The zip archives that torch.save makes, many in one file: where their records lie, and their
// CRC-32s.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace ckptstore {

/// A range of a file below the root that may be one archive.
struct Window {
  std::string name;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// A record with any bytes, which lie as they are.
struct Record {
  std::string name;          ///< ASCII; with the archive's own in front
  std::uint64_t offset = 0;  ///< of its first byte, in the file
  std::uint64_t bytes = 0;
  std::uint32_t crc32 = 0;
};

/// The records of each window, in the order of its directory. None where anything is not exactly as
/// torch writes it: whether that is an archive all the same is for zipfile to say, which this
/// agrees with wherever it answers. Reads a few KiB a window, in parallel. `tick` is called in the
/// calling thread about ten times a second; what it throws cancels. Throws IoError and Refused for
/// a file that cannot be read.
std::vector<std::optional<std::vector<Record>>> find_records(const std::string& root,
                                                             const std::vector<Window>& windows,
                                                             const std::function<void()>& tick);

}  // namespace ckptstore
