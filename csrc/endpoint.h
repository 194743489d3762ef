// The two ends of a copy: one file that is read, one that is written. Both choose by themselves
// between the page cache and O_DIRECT, and fall back where the file system refuses it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "file.h"

namespace ckptstore {

/// A folder that files are named below.
struct Root {
  explicit Root(const std::string& path_) : path(path_), fd(open_folder(path_)) {}
  std::string shown(const std::string& name) const { return path + "/" + name; }

  std::string path;
  UniqueFd fd;
};

/// Bytes that lie in several places of the caller's memory, as if they followed one another.
class Gather {
 public:
  void add(const std::byte* begin, std::size_t bytes);
  std::uint64_t bytes() const { return ends_.empty() ? 0 : ends_.back(); }
  /// Copies `bytes` at `offset`, all of which must be there.
  void read(std::byte* to, std::size_t bytes, std::uint64_t offset) const;

 private:
  std::vector<const std::byte*> begins_;
  std::vector<std::uint64_t> ends_;  // of each place, counted from the first byte of all
};

/// Places in the caller's memory for parts of a file.
class Scatter {
 public:
  /// In the order of the offsets; no part may overlap another.
  void add(std::uint64_t offset, std::byte* memory, std::size_t bytes);
  /// Whether anything of this range is wanted.
  bool wants(std::uint64_t offset, std::uint64_t bytes) const;
  /// The memory for all of this range, if it lies in one piece there; else null.
  std::byte* whole(std::uint64_t offset, std::size_t bytes) const;
  /// Copies what is wanted of `bytes` at `offset`.
  void write(const std::byte* from, std::size_t bytes, std::uint64_t offset) const;

 private:
  struct Part {
    std::uint64_t begin, end;  // in the file
    std::byte* memory;
  };
  /// The first part that ends behind `offset`.
  std::vector<Part>::const_iterator after(std::uint64_t offset) const;
  std::vector<Part> parts_;
};

/// One file to read, and what the caller knows of it.
struct FileSpec {
  std::string name;           ///< below the root; neither absolute nor with . or .. in it
  std::uint64_t bytes = 0;    ///< its size
  std::int64_t mtime_ns = 0;  ///< 0: not known
  std::uint64_t inode = 0;    ///< 0: not known
  const Gather* memory =
      nullptr;  ///< where its bytes are, if it is no file: only its name and size count then
};

enum class ReadMode {
  kAuto,    ///< by range: from the page cache what is there, the rest past it
  kCached,  ///< through the page cache
  kDirect,  ///< past the page cache, after clean pages are let go of: reads the disk
};

/// A regular file open for reading, or bytes in memory. read() is thread-safe; the rest is not.
class Source {
 public:
  Source() = default;
  /// Throws Refused for anything but a regular file, SourceChanged where it is not the file of
  /// `spec`. `root` and `spec` must outlive this.
  void open(const Root& root, const FileSpec& spec, ReadMode mode);

  /// Reads exactly `bytes` at `offset` (a multiple of kAlignmentBytes) into `to` (aligned, with
  /// room for round_up(bytes)). `direct`: past the page cache where possible; returns whether it
  /// was. Throws SourceChanged at an early end.
  bool read(std::byte* to, std::size_t bytes, std::uint64_t offset, bool direct);

  /// Whether reading this range past the page cache is the better way.
  bool prefers_direct(std::uint64_t offset, std::uint64_t bytes) const;

  /// Throws SourceChanged if the file was touched since open().
  void check_unchanged() const;

  /// What the copy's time of change is to be; for memory it says "now", as utimensat understands
  /// it.
  struct timespec mtime() const;
  /// -1 for memory.
  int fd() const { return cached_.get(); }
  void close() noexcept;

 private:
  std::string shown() const { return root_->shown(spec_->name); }

  const Root* root_ = nullptr;
  const FileSpec* spec_ = nullptr;
  ReadMode mode_ = ReadMode::kAuto;
  struct stat before_{};
  UniqueFd cached_;
  UniqueFd direct_;  // none: refused, or not wanted
  std::atomic<bool> direct_works_{false};
};

enum class WriteMode { kBuffered, kDirect };

/// A regular file open for writing. write(), read() and write_back are thread-safe; the rest is
/// not.
class Destination {
 public:
  Destination() = default;
  /// Creates the file, which must not be there unless `reuse`; 0600. `root` and `name` must outlive
  /// this.
  void open(const Root& root, const std::string& name, WriteMode mode, bool reuse);

  /// Takes over all blocks of `source`; false where the file systems cannot.
  bool clone_from(const Source& source);

  /// Room for `bytes`, so that a full disk shows before the work is done and parallel writes don't
  /// fragment.
  void allocate(std::uint64_t bytes);

  /// How much an earlier attempt left; 0 for a new file.
  std::uint64_t bytes_before() const { return bytes_before_; }

  /// Reads what an earlier attempt left, from the disk. Returns how many bytes were there.
  std::size_t read(std::byte* to, std::size_t bytes, std::uint64_t offset);

  /// Writes `bytes` at `offset` (a multiple of kAlignmentBytes). `from` is aligned, with room for
  /// round_up(bytes): what lies behind `bytes` is overwritten. Returns whether all went past the
  /// page cache.
  bool write(std::byte* from, std::size_t bytes, std::uint64_t offset);

  /// Sends a buffered range on its way to the disk; with `wait`, waits for it and lets go of its
  /// pages.
  void write_back(std::uint64_t offset, std::uint64_t bytes, bool wait);

  /// Cuts the file to its size and sets its time.
  void finish(std::uint64_t bytes, const struct timespec& mtime);
  void sync();
  void let_go() noexcept;  // of its pages in the cache
  void close();

 private:
  std::string shown() const { return root_->shown(*name_); }

  const Root* root_ = nullptr;
  const std::string* name_ = nullptr;
  std::uint64_t bytes_before_ = 0;
  UniqueFd buffered_;
  UniqueFd direct_;  // none: refused, or not wanted
  std::atomic<bool> direct_works_{false};
};

/// Writes `bytes` at `offset` into the regular file `name` below `folder`, which must be there;
/// past the page cache as far as that goes. Not durable before a sync. Several may write to one
/// file.
void write_range(const std::string& folder, const std::string& name, const void* data,
                 std::size_t bytes, std::uint64_t offset);

}  // namespace ckptstore
