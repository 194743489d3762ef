#include "probe.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "error.h"
#include "file.h"

namespace ckptstore {

bool sync_file_system_is_durable(int fd) {
  struct statfs system{};
  if (::fstatfs(fd, &system) < 0) return false;
  constexpr unsigned long kExt = 0xEF53, kXfs = 0x58465342, kBtrfs = 0x9123683E,
                          kTmpfs = 0x01021994;
  const auto type = static_cast<unsigned long>(system.f_type);
  if (type != kExt && type != kXfs && type != kBtrfs && type != kTmpfs) return false;
  struct utsname kernel{};
  int major = 0, minor = 0;
  if (::uname(&kernel) < 0 || std::sscanf(kernel.release, "%d.%d", &major, &minor) != 2)
    return false;
  return major > 5 || (major == 5 && minor >= 8);
}

bool is_cached(int fd, std::uint64_t offset, std::uint64_t bytes) noexcept {
  if (bytes == 0) return true;
  // cachestat (Linux 6.5) counts the pages. It is denied for files of others.
  constexpr long kCachestat = 451;
  struct {
    std::uint64_t offset, bytes;
  } range{offset, bytes};
  struct {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } counts{};
  if (::syscall(kCachestat, fd, &range, &counts, 0U) == 0) {
    return counts.cached * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)) >= bytes / 2;
  }
  // Else ask for single bytes that must not wait for the disk.
  int hits = 0;
  constexpr int kProbes = 4;
  for (int i = 0; i < kProbes; ++i) {
    char byte;
    struct iovec vector{&byte, 1};
    const std::uint64_t at = offset + (bytes - 1) / kProbes * static_cast<std::uint64_t>(i);
    hits += ::preadv64v2(fd, &vector, 1, static_cast<off64_t>(at), RWF_NOWAIT) == 1;
  }
  return hits * 2 > kProbes;
}

bool supports_direct(const std::string& folder) {
  UniqueFd root = open_folder(folder);
  const std::string name = ".ckptstore-direct-" + std::to_string(::getpid()) + "-" +
                           std::to_string(reinterpret_cast<std::uintptr_t>(&root));
  const int flags = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  UniqueFd plain(::openat64(root.get(), name.c_str(), flags, 0600));
  if (!plain) throw IoError("make", folder, errno);
  bool works = false;
  {
    UniqueFd direct(
        ::openat64(root.get(), name.c_str(), O_RDWR | O_DIRECT | O_NOFOLLOW | O_CLOEXEC, 0));
    std::unique_ptr<void, decltype(&std::free)> block(
        std::aligned_alloc(kAlignmentBytes, kAlignmentBytes), std::free);
    if (direct && block) {
      std::memset(block.get(), 0xA5, kAlignmentBytes);
      const auto size = static_cast<ssize_t>(kAlignmentBytes);
      works = ::pwrite64(direct.get(), block.get(), kAlignmentBytes, 0) == size;
      std::memset(block.get(), 0, kAlignmentBytes);
      works = works && ::pread64(direct.get(), block.get(), kAlignmentBytes, 0) == size &&
              static_cast<unsigned char*>(block.get())[kAlignmentBytes - 1] == 0xA5;
    }
  }
  ::unlinkat(root.get(), name.c_str(), 0);
  return works;
}

}  // namespace ckptstore
