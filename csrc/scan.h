// A whole tree's names and numbers, as fast as the kernel tells them.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace ckptstore {

/// One name in a folder, as lstat sees it: links are not followed.
struct Entry {
  std::string name;
  std::uint64_t bytes;
  std::int64_t mtime_ns;
  std::uint64_t inode;
  std::uint32_t mode;
  std::uint32_t uid;
};

struct Folder {
  std::string path;                    ///< relative to the root; "" is the root
  int error = 0;                       ///< errno if it could not be read, or not to its end
  std::vector<Entry> entries;          ///< in the order of the file system, without . and ..
  std::optional<std::string> content;  ///< of the file that the caller wants to see
};

/// A file to be read in every folder that has it: one descriptor more while the folder is open
/// anyway.
struct Wanted {
  std::string name;              ///< "": none
  std::uint64_t most_bytes = 0;  ///< a larger file is left alone
};

/// Reads `root` and the folders below it, down to `max_depth` levels (0: the root alone), never
/// through a link. Names that vanish meanwhile are left out. Throws IoError only for the root
/// itself. The folders come in no order. What is `wanted` and cannot be read has no content:
/// opening it by its path will say why.
std::vector<Folder> scan_tree(const std::string& root, int max_depth, const Wanted& wanted,
                              unsigned threads, const std::function<void()>& tick);

}  // namespace ckptstore
