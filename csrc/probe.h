// What can be found out about a file system and its cache. Where it cannot be known, the answer is
// the careful one.
#pragma once

#include <cstdint>
#include <string>

namespace ckptstore {

/// True where syncfs is known to reach the disk and to report lost pages (Linux 5.8 on).
bool sync_file_system_is_durable(int fd);

/// Whether most of a range is in the page cache. `fd` must not be opened O_DIRECT. False where it
/// cannot be known.
bool is_cached(int fd, std::uint64_t offset, std::uint64_t bytes) noexcept;

/// Whether a scratch file in this folder takes an aligned O_DIRECT write and gives it back. Throws
/// IoError where none can be made.
bool supports_direct(const std::string& folder);

}  // namespace ckptstore
