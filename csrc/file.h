// Files by descriptor: everything the engine asks of the kernel, but what probe.h finds out. EINTR
// and short transfers are handled in file.cpp and nowhere else. Every function that can fail throws
// IoError with the operation, the path given, and errno.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace ckptstore {

/// What O_DIRECT asks of offsets, lengths and memory: a multiple of every sector and page size in
/// use.
inline constexpr std::size_t kAlignmentBytes = 4096;

inline constexpr std::uint64_t round_up(std::uint64_t bytes) {
  return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

/// Owns one file descriptor, or none.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() noexcept;
  /// Closes, and ignores what close says: for descriptors that were only read.
  void reset() noexcept;
  /// Closes, and throws what close says: for descriptors that were written.
  void close(const std::string& path);

 private:
  int fd_ = -1;  // -1: none
};

/// Opens a folder by any path, links followed: for the roots that a caller names.
UniqueFd open_folder(const std::string& path);

/// Opens `relative` below the folder `root`, following no link anywhere and never leaving it.
/// O_CLOEXEC is added. Throws Refused where a component is a link. `shown` is the path for
/// messages.
UniqueFd open_beneath(int root, const std::string& relative, int flags, mode_t mode,
                      const std::string& shown);

/// Since 1970. A time that 64 bits cannot hold, before 1678 or after 2262, is the nearest that they
/// can: some file systems keep such.
std::int64_t nanoseconds(const struct timespec& time) noexcept;

struct stat status_of(int fd, const std::string& path);

/// Makes the folder `relative` below `root`, 0700; one that is there already is fine. Its parents
/// must be there.
void make_folder(int root, const std::string& relative, const std::string& shown);

/// Reads until `bytes` or the end of the file; returns how many. Positioned: no descriptor's offset
/// moves.
std::size_t read_at(int fd, void* to, std::size_t bytes, std::uint64_t offset,
                    const std::string& path);

/// As read_at with a descriptor opened O_DIRECT: `to`, `bytes`, `offset` aligned. Returns what came
/// before the end, the first misaligned short read or a refusal (EINVAL, EFAULT); sets `refused` in
/// that last case.
std::size_t read_direct(int fd, void* to, std::size_t bytes, std::uint64_t offset, bool& refused,
                        const std::string& path);

void write_at(int fd, const void* from, std::size_t bytes, std::uint64_t offset,
              const std::string& path);

/// As write_at with a descriptor opened O_DIRECT, and with the returns of read_direct.
std::size_t write_direct(int fd, const void* from, std::size_t bytes, std::uint64_t offset,
                         bool& refused, const std::string& path);

/// Asks the file system for room, and sets the size; false where it cannot (the size is then set,
/// sparse).
bool allocate(int fd, std::uint64_t bytes, const std::string& path);
void truncate(int fd, std::uint64_t bytes, const std::string& path);
void set_mtime(int fd, const struct timespec& mtime, const std::string& path);

/// fsync of a file or folder. Never retried: after an error the kernel may call lost pages clean.
void sync(int fd, const std::string& path);

/// fsync of a folder. File systems that have no such thing answer EINVAL, ENOTSUP or ENOSYS: not an
/// error here, the caller's probe tells people what durability that gives. Any other error is one.
void sync_folder(int fd, const std::string& path);

/// syncfs: everything dirty on the file system of `fd`. Reports errors since `fd` was opened.
void sync_file_system(int fd, const std::string& path);

/// Starts writing a range back; waits for it too if `wait`. An error is as final as one of sync().
void write_back(int fd, std::uint64_t offset, std::uint64_t bytes, bool wait,
                const std::string& path);

/// Advice, never an error: let go of the cached pages that are clean; read ahead.
void drop_cache(int fd, std::uint64_t offset, std::uint64_t bytes) noexcept;
void expect_sequential(int fd) noexcept;

/// Shares all blocks of `source` with `destination` (FICLONE). False where the file systems cannot.
bool clone(int destination, int source, const std::string& path);

/// renameat2 on absolute or current-relative paths; `flags` are RENAME_NOREPLACE, RENAME_EXCHANGE.
void rename_with(const std::string& from, const std::string& to, unsigned flags);

/// fsync by path, of a file or a folder.
void sync_path(const std::string& path);

/// Lowers the priority of the calling thread alone to `nice` (0 to 19). Never raises it. Best
/// effort.
void be_nice(int nice) noexcept;

}  // namespace ckptstore
