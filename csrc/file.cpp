#include "file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "error.h"

namespace ckptstore {
namespace {

// --- The seam: every system call that can fail a job, once
// --------------------------------------------------------- Names are resolved by the dynamic
// linker, so that tests/native/faults.c can stand in front of each of them.

int call_openat(int root, const char* path, int flags, mode_t mode) {
  return ::openat64(root, path, flags, mode);
}
int call_openat2(int root, const char* path, int flags, mode_t mode) {
  struct open_how how{};
  how.flags = static_cast<std::uint64_t>(flags);
  how.mode = mode;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  return static_cast<int>(::syscall(SYS_openat2, root, path, &how, sizeof how));
}
int call_clone(int destination, int source) { return ::ioctl(destination, FICLONE, source); }

struct Syscalls {
  int (*openat)(int, const char*, int, mode_t) = call_openat;
  int (*openat2)(int, const char*, int, mode_t) = call_openat2;
  int (*close)(int) = ::close;
  ssize_t (*pread)(int, void*, std::size_t, off64_t) = ::pread64;
  ssize_t (*pwrite)(int, const void*, std::size_t, off64_t) = ::pwrite64;
  int (*fsync)(int) = ::fsync;
  int (*syncfs)(int) = ::syncfs;
  int (*sync_file_range)(int, off64_t, off64_t, unsigned) = ::sync_file_range;
  int (*fstat)(int, struct stat*) = ::fstat;
  int (*fallocate)(int, int, off64_t, off64_t) = ::fallocate64;
  int (*ftruncate)(int, off64_t) = ::ftruncate64;
  int (*futimens)(int, const struct timespec*) = ::futimens;
  int (*mkdirat)(int, const char*, mode_t) = ::mkdirat;
  int (*renameat2)(int, const char*, int, const char*, unsigned) = ::renameat2;
  int (*fadvise)(int, off64_t, off64_t, int) = ::posix_fadvise64;
  int (*clone)(int, int) = call_clone;
};
constexpr Syscalls kSystem;

template <typename Call>
auto retry_interrupted(Call call) {
  while (true) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

[[noreturn]] void fail(const char* operation, const std::string& path) {
  throw IoError(operation, path, errno);
}

template <typename Result>
Result check(Result result, const char* operation, const std::string& path) {
  if (result < 0) fail(operation, path);
  return result;
}

constexpr off64_t signed_offset(std::uint64_t offset) { return static_cast<off64_t>(offset); }

/// openat2 for kernels and containers without it: one component at a time, no link at any of them.
UniqueFd walk_beneath(int root, const std::string& relative, int flags, mode_t mode) {
  UniqueFd folder;
  std::size_t start = 0;
  while (true) {
    const std::size_t slash = relative.find('/', start);
    const bool last = slash == std::string::npos;
    const std::string component = relative.substr(start, last ? slash : slash - start);
    if (component == "..") {
      errno = EXDEV;
      return UniqueFd();
    }
    const int wanted = last ? flags : O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    const int from = folder ? folder.get() : root;
    UniqueFd next(retry_interrupted(
        [&] { return kSystem.openat(from, component.c_str(), wanted, last ? mode : 0); }));
    if (!next || last) return next;
    folder = std::move(next);
    start = slash + 1;
  }
}

/// Whether a component of the path is a link: tells ENOTDIR for one from ENOTDIR for a file.
bool has_link(int root, const std::string& relative) {
  for (std::size_t end = 0; end != std::string::npos;) {
    end = relative.find('/', end + 1);
    struct stat status{};
    if (::fstatat(root, relative.substr(0, end).c_str(), &status, AT_SYMLINK_NOFOLLOW) < 0) {
      return false;
    }
    if (S_ISLNK(status.st_mode)) return true;
  }
  return false;
}

std::atomic<bool> openat2_works{true};

// EFAULT: memory of a device driver, which the kernel may not hand to a disk.
bool is_refusal(int code) { return code == EINVAL || code == EOPNOTSUPP || code == EFAULT; }

}  // namespace

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = other.release();
  }
  return *this;
}

int UniqueFd::release() noexcept { return std::exchange(fd_, -1); }

void UniqueFd::reset() noexcept {
  if (fd_ >= 0) kSystem.close(release());
}

void UniqueFd::close(const std::string& path) {
  // On Linux the descriptor is gone even when close fails or is interrupted.
  if (fd_ >= 0 && kSystem.close(release()) < 0 && errno != EINTR) fail("close", path);
}

UniqueFd open_folder(const std::string& path) {
  return UniqueFd(check(retry_interrupted([&] {
                          return kSystem.openat(AT_FDCWD, path.c_str(),
                                                O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
                        }),
                        "open folder", path));
}

UniqueFd open_beneath(int root, const std::string& relative, int flags, mode_t mode,
                      const std::string& shown) {
  flags |= O_CLOEXEC | O_NOFOLLOW;
  UniqueFd fd;
  bool walk = !openat2_works.load(std::memory_order_relaxed);
  if (!walk) {
    fd = UniqueFd(
        retry_interrupted([&] { return kSystem.openat2(root, relative.c_str(), flags, mode); }));
    // ENOSYS: an old kernel. EPERM: a container's seccomp filter, or truly forbidden; the walk will
    // tell. EAGAIN: a rename elsewhere raced with the look-up; the walk does not mind.
    if (!fd && errno == ENOSYS) openat2_works = false;
    walk = !fd && (errno == ENOSYS || errno == EPERM || errno == EAGAIN);
  }
  if (walk) fd = walk_beneath(root, relative, flags, mode);
  if (!fd) {
    const int code = errno;
    if (code == ELOOP || (code == ENOTDIR && has_link(root, relative))) {
      throw Refused(shown, "is or lies behind a symbolic link, which is never followed");
    }
    throw IoError("open", shown, code);
  }
  return fd;
}

std::int64_t nanoseconds(const struct timespec& time) noexcept {
  std::int64_t result = 0;
  if (__builtin_mul_overflow(std::int64_t{time.tv_sec}, 1'000'000'000, &result) ||
      __builtin_add_overflow(result, std::int64_t{time.tv_nsec}, &result)) {
    using Limits = std::numeric_limits<std::int64_t>;
    return time.tv_sec < 0 ? Limits::min() : Limits::max();
  }
  return result;
}

struct stat status_of(int fd, const std::string& path) {
  struct stat status{};
  check(kSystem.fstat(fd, &status), "stat", path);
  return status;
}

void make_folder(int root, const std::string& relative, const std::string& shown) {
  const std::size_t slash = relative.rfind('/');
  UniqueFd parent;
  std::string name = relative;
  if (slash != std::string::npos) {
    parent = open_beneath(root, relative.substr(0, slash), O_PATH | O_DIRECTORY, 0, shown);
    name = relative.substr(slash + 1);
  }
  const int result = kSystem.mkdirat(parent ? parent.get() : root, name.c_str(), 0700);
  if (result < 0 && errno != EEXIST) fail("make folder", shown);
  // One that is there must be a folder and no link: opening it proves both.
  if (result < 0) open_beneath(root, relative, O_PATH | O_DIRECTORY, 0, shown);
}

std::size_t read_at(int fd, void* to, std::size_t bytes, std::uint64_t offset,
                    const std::string& path) {
  auto* cursor = static_cast<char*>(to);
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t got =
        check(retry_interrupted([&] {
                return kSystem.pread(fd, cursor + done, bytes - done, signed_offset(offset + done));
              }),
              "read", path);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::size_t read_direct(int fd, void* to, std::size_t bytes, std::uint64_t offset, bool& refused,
                        const std::string& path) {
  auto* cursor = static_cast<char*>(to);
  std::size_t done = 0;
  refused = false;
  while (done < bytes && done % kAlignmentBytes == 0) {
    const ssize_t got = retry_interrupted([&] {
      return kSystem.pread(fd, cursor + done, bytes - done, signed_offset(offset + done));
    });
    if (got < 0 && is_refusal(errno)) {
      refused = true;
      break;
    }
    check(got, "read", path);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

void write_at(int fd, const void* from, std::size_t bytes, std::uint64_t offset,
              const std::string& path) {
  const auto* cursor = static_cast<const char*>(from);
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t put = check(retry_interrupted([&] {
                                return kSystem.pwrite(fd, cursor + done, bytes - done,
                                                      signed_offset(offset + done));
                              }),
                              "write", path);
    if (put == 0) {  // not an error by POSIX, but no progress either
      errno = EIO;
      fail("write", path);
    }
    done += static_cast<std::size_t>(put);
  }
}

std::size_t write_direct(int fd, const void* from, std::size_t bytes, std::uint64_t offset,
                         bool& refused, const std::string& path) {
  const auto* cursor = static_cast<const char*>(from);
  std::size_t done = 0;
  refused = false;
  while (done < bytes && done % kAlignmentBytes == 0) {
    const ssize_t put = retry_interrupted([&] {
      return kSystem.pwrite(fd, cursor + done, bytes - done, signed_offset(offset + done));
    });
    if (put < 0 && is_refusal(errno)) {
      refused = true;
      break;
    }
    check(put, "write", path);
    if (put == 0) break;
    done += static_cast<std::size_t>(put);
  }
  return done;
}

bool allocate(int fd, std::uint64_t bytes, const std::string& path) {
  if (bytes == 0) return true;
  if (retry_interrupted([&] { return kSystem.fallocate(fd, 0, 0, signed_offset(bytes)); }) == 0) {
    return true;
  }
  if (!is_refusal(errno) && errno != ENOSYS) fail("allocate", path);
  truncate(fd, bytes, path);
  return false;
}

void truncate(int fd, std::uint64_t bytes, const std::string& path) {
  check(retry_interrupted([&] { return kSystem.ftruncate(fd, signed_offset(bytes)); }),
        "set the size of", path);
}

void set_mtime(int fd, const struct timespec& mtime, const std::string& path) {
  const struct timespec times[2] = {{0, UTIME_OMIT}, mtime};
  check(kSystem.futimens(fd, times), "set the time of", path);
}

void sync(int fd, const std::string& path) { check(kSystem.fsync(fd), "sync", path); }

void sync_folder(int fd, const std::string& path) {
  if (kSystem.fsync(fd) == 0) return;
  if (errno == EINVAL || errno == ENOTSUP || errno == ENOSYS) return;
  fail("sync", path);
}

void sync_file_system(int fd, const std::string& path) {
  check(kSystem.syncfs(fd), "sync the file system of", path);
}

void write_back(int fd, std::uint64_t offset, std::uint64_t bytes, bool wait,
                const std::string& path) {
  unsigned flags = SYNC_FILE_RANGE_WRITE;
  if (wait) flags |= SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
  const int result =
      kSystem.sync_file_range(fd, signed_offset(offset), signed_offset(bytes), flags);
  // Waiting takes the error away from the fsync to come, so it must be raised here.
  if (result < 0 && !is_refusal(errno) && errno != ENOSYS && errno != ESPIPE && errno != EINTR) {
    fail("write back", path);
  }
}

void drop_cache(int fd, std::uint64_t offset, std::uint64_t bytes) noexcept {
  kSystem.fadvise(fd, signed_offset(offset), signed_offset(bytes), POSIX_FADV_DONTNEED);
}

void expect_sequential(int fd) noexcept { kSystem.fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL); }

bool clone(int destination, int source, const std::string& path) {
  if (retry_interrupted([&] { return kSystem.clone(destination, source); }) == 0) return true;
  if (is_refusal(errno) || errno == EXDEV || errno == ENOTTY || errno == ENOSYS || errno == EPERM ||
      errno == ETXTBSY || errno == EBADF) {
    return false;
  }
  fail("clone", path);
}

void rename_with(const std::string& from, const std::string& to, unsigned flags) {
  check(kSystem.renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags), "rename", from);
}

void sync_path(const std::string& path) {
  UniqueFd fd(check(retry_interrupted([&] {
                      return kSystem.openat(AT_FDCWD, path.c_str(),
                                            O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
                    }),
                    "open", path));
  sync(fd.get(), path);
}

void be_nice(int nice) noexcept {
  const auto thread = static_cast<id_t>(::gettid());
  if (nice > ::getpriority(PRIO_PROCESS, thread)) ::setpriority(PRIO_PROCESS, thread, nice);
}

}  // namespace ckptstore
