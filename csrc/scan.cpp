#include "scan.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

#include "error.h"
#include "file.h"
#include "pool.h"

namespace ckptstore {
namespace {

constexpr std::size_t kListingBytes = 32 << 10;

struct Pending {
  std::string path;
  int depth;
};

/// The folders still to be read. Workers take from it and add to it until none is left and none is
/// at work.
class Frontier {
 public:
  explicit Frontier(Pending root) { waiting_.push_back(std::move(root)); }

  bool take(Pending& next) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_ || !waiting_.empty() || at_work_ == 0; });
    if (ended_ || waiting_.empty()) return false;
    next = std::move(waiting_.back());
    waiting_.pop_back();
    ++at_work_;
    return true;
  }

  void add(std::vector<Pending>& found) {
    if (found.empty()) return;
    const std::lock_guard lock(mutex_);
    for (auto& folder : found) waiting_.push_back(std::move(folder));
    found.clear();
    changed_.notify_all();
  }

  void done() {
    const std::lock_guard lock(mutex_);
    if (--at_work_ == 0) changed_.notify_all();
  }

  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Pending> waiting_;
  unsigned at_work_ = 0;
  bool ended_ = false;
};

class Scanner {
 public:
  Scanner(const std::string& root, int max_depth, const Wanted& wanted)
      : root_(open_folder(root)),
        max_depth_(max_depth),
        wanted_(wanted),
        frontier_(Pending{"", 0}) {}

  std::vector<Folder> run(unsigned threads, const std::function<void()>& tick) {
    const auto guarded = [&] {
      try {
        tick();
      } catch (...) {
        frontier_.end();  // the workers sleep in it
        throw;
      }
    };
    run_workers(threads, cancelled_, [this] { work(); }, guarded);
    return std::move(folders_);
  }

 private:
  void work() {
    std::vector<Folder> mine;
    std::vector<Pending> found;
    Pending next;
    try {
      while (frontier_.take(next)) {
        mine.push_back(read_folder(next, found));
        frontier_.add(found);
        frontier_.done();
      }
    } catch (...) {
      frontier_.end();
      throw;
    }
    const std::lock_guard lock(mutex_);
    std::move(mine.begin(), mine.end(), std::back_inserter(folders_));
  }

  Folder read_folder(const Pending& folder, std::vector<Pending>& found) {
    Folder result{folder.path, 0, {}, {}};
    UniqueFd fd;
    try {
      fd = open_beneath(root_.get(), folder.path.empty() ? "." : folder.path,
                        O_RDONLY | O_DIRECTORY, 0, folder.path);
    } catch (const IoError& error) {
      result.error = error.code;
      return result;
    } catch (const Refused&) {
      result.error = ELOOP;  // swapped for a link since it was listed
      return result;
    }
    alignas(struct dirent64) char listing[kListingBytes];
    while (!cancelled_) {
      const ssize_t bytes = ::getdents64(fd.get(), listing, sizeof listing);
      if (bytes < 0) result.error = errno;
      if (bytes <= 0) break;
      frontier_.add(found);  // of a large folder, so that the others need not wait for its end
      for (ssize_t at = 0; at < bytes;) {
        const auto* entry = reinterpret_cast<const struct dirent64*>(listing + at);
        at += entry->d_reclen;
        const char* name = entry->d_name;
        if (std::strcmp(name, ".") == 0 || std::strcmp(name, "..") == 0) continue;
        struct stat status{};
        if (::fstatat(fd.get(), name, &status, AT_SYMLINK_NOFOLLOW) < 0) {
          if (errno != ENOENT) result.error = errno;
          continue;
        }
        result.entries.push_back({name, static_cast<std::uint64_t>(status.st_size),
                                  nanoseconds(status.st_mtim), status.st_ino, status.st_mode,
                                  status.st_uid});
        if (S_ISREG(status.st_mode) && name == wanted_.name) result.content = read_file(fd, status);
        if (S_ISDIR(status.st_mode) && folder.depth < max_depth_) {
          found.push_back({folder.path.empty() ? std::string(name) : folder.path + "/" + name,
                           folder.depth + 1});
        }
      }
    }
    return result;
  }

  std::optional<std::string> read_file(const UniqueFd& folder, const struct stat& seen) const {
    const auto bytes = static_cast<std::uint64_t>(seen.st_size);
    if (bytes > wanted_.most_bytes) return std::nullopt;
    try {
      const UniqueFd fd =
          open_beneath(folder.get(), wanted_.name, O_RDONLY | O_NONBLOCK, 0, wanted_.name);
      struct stat status{};
      if (::fstat(fd.get(), &status) < 0 || status.st_ino != seen.st_ino) return std::nullopt;
      std::string content(bytes, '\0');
      content.resize(read_at(fd.get(), content.data(), bytes, 0, wanted_.name));
      return content;
    } catch (const IoError&) {
      return std::nullopt;
    } catch (const Refused&) {
      return std::nullopt;
    }
  }

  const UniqueFd root_;
  const int max_depth_;
  const Wanted wanted_;
  Frontier frontier_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::vector<Folder> folders_;  // under mutex_
};

}  // namespace

std::vector<Folder> scan_tree(const std::string& root, int max_depth, const Wanted& wanted,
                              unsigned threads, const std::function<void()>& tick) {
  return Scanner(root, max_depth, wanted).run(threads != 0 ? threads : default_threads(), tick);
}

}  // namespace ckptstore
