#include "endpoint.h"

#include <fcntl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "error.h"
#include "pool.h"
#include "probe.h"

namespace ckptstore {
namespace {

/// A second descriptor with O_DIRECT for the file that `plain` is; none where that is refused.
UniqueFd reopen_direct(const Root& root, const std::string& name, int access,
                       const struct stat& plain) {
  try {
    UniqueFd fd = open_beneath(root.fd.get(), name, access | O_DIRECT | O_NONBLOCK, 0, name);
    const struct stat status = status_of(fd.get(), name);
    if (status.st_dev == plain.st_dev && status.st_ino == plain.st_ino) return fd;
  } catch (const IoError&) {
    // Refused here; the plain descriptor does the work, and the result says so.
  } catch (const Refused&) {
    // Swapped for a link meanwhile: the plain descriptor still has the file.
  }
  return UniqueFd();
}

bool same_time(const struct timespec& a, const struct timespec& b) {
  return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

std::string size_difference(std::uint64_t now, std::uint64_t planned) {
  return "has " + std::to_string(now) + " bytes now, " + std::to_string(planned) +
         " when it was looked at";
}

}  // namespace

// --- Gather
// --------------------------------------------------------------------------------------------------------

void Gather::add(const std::byte* begin, std::size_t bytes) {
  if (bytes == 0) return;
  ends_.push_back(this->bytes() + bytes);
  begins_.push_back(begin);
}

void Gather::read(std::byte* to, std::size_t bytes, std::uint64_t offset) const {
  auto place = static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), offset) -
                                        ends_.begin());
  while (bytes > 0) {
    const std::uint64_t before = place == 0 ? 0 : ends_[place - 1];
    const std::size_t some = std::min<std::uint64_t>(bytes, ends_[place] - offset);
    std::memcpy(to, begins_[place] + (offset - before), some);
    to += some;
    bytes -= some;
    offset += some;
    ++place;
  }
}

// --- Scatter
// -------------------------------------------------------------------------------------------------------

void Scatter::add(std::uint64_t offset, std::byte* memory, std::size_t bytes) {
  if (bytes != 0) parts_.push_back({offset, offset + bytes, memory});
}

std::vector<Scatter::Part>::const_iterator Scatter::after(std::uint64_t offset) const {
  return std::upper_bound(parts_.begin(), parts_.end(), offset,
                          [](std::uint64_t at, const Part& part) { return at < part.end; });
}

bool Scatter::wants(std::uint64_t offset, std::uint64_t bytes) const {
  const auto part = after(offset);
  return part != parts_.end() && part->begin < offset + bytes;
}

std::byte* Scatter::whole(std::uint64_t offset, std::size_t bytes) const {
  const auto part = after(offset);
  if (part == parts_.end() || offset < part->begin || part->end < offset + bytes) return nullptr;
  return part->memory + (offset - part->begin);
}

void Scatter::write(const std::byte* from, std::size_t bytes, std::uint64_t offset) const {
  const std::uint64_t end = offset + bytes;
  for (auto part = after(offset); part != parts_.end() && part->begin < end; ++part) {
    const std::uint64_t first = std::max(offset, part->begin);
    std::memcpy(part->memory + (first - part->begin), from + (first - offset),
                std::min(end, part->end) - first);
  }
}

// --- Source
// --------------------------------------------------------------------------------------------------------

void Source::open(const Root& root, const FileSpec& spec, ReadMode mode) {
  root_ = &root;
  spec_ = &spec;
  mode_ = mode;
  if (spec.memory != nullptr) return;
  // O_NONBLOCK: a pipe without a writer must not hang the job.
  cached_ = open_beneath(root.fd.get(), spec.name, O_RDONLY | O_NONBLOCK, 0, shown());
  before_ = status_of(cached_.get(), shown());
  if (!S_ISREG(before_.st_mode)) throw Refused(shown(), "is not a regular file");
  const auto bytes = static_cast<std::uint64_t>(before_.st_size);
  if (bytes != spec.bytes) throw SourceChanged(spec.name, size_difference(bytes, spec.bytes));
  if (spec.mtime_ns != 0 && nanoseconds(before_.st_mtim) != spec.mtime_ns) {
    throw SourceChanged(spec.name, "was written since it was looked at");
  }
  if (spec.inode != 0 && before_.st_ino != spec.inode) {
    throw SourceChanged(spec.name, "was replaced since it was looked at");
  }
  constexpr std::uint64_t kWorthASecondDescriptor = 256 << 10;
  if (mode == ReadMode::kDirect || (mode == ReadMode::kAuto && bytes >= kWorthASecondDescriptor)) {
    if (mode == ReadMode::kDirect) drop_cache(cached_.get(), 0, 0);
    direct_ = reopen_direct(root, spec.name, O_RDONLY, before_);
    direct_works_ = static_cast<bool>(direct_);
  }
}

bool Source::prefers_direct(std::uint64_t offset, std::uint64_t bytes) const {
  if (!direct_works_.load(std::memory_order_relaxed)) return false;
  return mode_ == ReadMode::kDirect || !is_cached(cached_.get(), offset, bytes);
}

bool Source::read(std::byte* to, std::size_t bytes, std::uint64_t offset, bool direct) {
  if (spec_->memory != nullptr) {
    spec_->memory->read(to, bytes, offset);
    return false;
  }
  std::size_t done = 0;
  if (direct && direct_works_.load(std::memory_order_relaxed)) {
    bool refused = false;
    done = read_direct(direct_.get(), to, round_up(bytes), offset, refused, shown());
    if (refused) direct_works_ = false;
    if (done >= bytes) return true;
  }
  done += read_at(cached_.get(), to + done, bytes - done, offset + done, shown());
  if (done < bytes) {
    throw SourceChanged(spec_->name, size_difference(offset + done, spec_->bytes));
  }
  return false;
}

void Source::check_unchanged() const {
  if (spec_->memory != nullptr) return;
  const struct stat now = status_of(cached_.get(), shown());
  if (now.st_size != before_.st_size) {
    throw SourceChanged(spec_->name,
                        size_difference(static_cast<std::uint64_t>(now.st_size), spec_->bytes));
  }
  if (!same_time(now.st_mtim, before_.st_mtim) || !same_time(now.st_ctim, before_.st_ctim)) {
    throw SourceChanged(spec_->name, "was written or replaced while it was read");
  }
}

struct timespec Source::mtime() const {
  return spec_->memory != nullptr ? timespec{0, UTIME_NOW} : before_.st_mtim;
}

void Source::close() noexcept {
  cached_.reset();
  direct_.reset();
}

// --- Destination
// ---------------------------------------------------------------------------------------------------

void Destination::open(const Root& root, const std::string& name, WriteMode mode, bool reuse) {
  root_ = &root;
  name_ = &name;
  const int flags = O_RDWR | O_CREAT | O_NONBLOCK | (reuse ? 0 : O_EXCL);
  buffered_ = open_beneath(root.fd.get(), name, flags, 0600, shown());
  if (mode == WriteMode::kBuffered && !reuse) return;
  const struct stat status = status_of(buffered_.get(), shown());
  if (!S_ISREG(status.st_mode)) throw Refused(shown(), "is not a regular file");
  bytes_before_ = static_cast<std::uint64_t>(status.st_size);
  if (reuse && bytes_before_ > 0) {
    // What counts is what reached the disk.
    ckptstore::sync(buffered_.get(), shown());
    drop_cache(buffered_.get(), 0, 0);
  }
  if (mode == WriteMode::kDirect) {
    direct_ = reopen_direct(root, name, O_RDWR, status);
    direct_works_ = static_cast<bool>(direct_);
  }
}

bool Destination::clone_from(const Source& source) {
  return ckptstore::clone(buffered_.get(), source.fd(), shown());
}

void Destination::allocate(std::uint64_t bytes) {
  ckptstore::allocate(buffered_.get(), direct_ ? round_up(bytes) : bytes, shown());
}

std::size_t Destination::read(std::byte* to, std::size_t bytes, std::uint64_t offset) {
  std::size_t done = 0;
  if (direct_works_.load(std::memory_order_relaxed)) {
    bool refused = false;
    done = read_direct(direct_.get(), to, round_up(bytes), offset, refused, shown());
    if (refused) direct_works_ = false;
    if (done >= bytes) return bytes;
  }
  return done + read_at(buffered_.get(), to + done, bytes - done, offset + done, shown());
}

bool Destination::write(std::byte* from, std::size_t bytes, std::uint64_t offset) {
  std::size_t done = 0;
  if (direct_works_.load(std::memory_order_relaxed)) {
    const std::size_t padded = round_up(bytes);
    std::memset(from + bytes, 0, padded - bytes);
    bool refused = false;
    done = write_direct(direct_.get(), from, padded, offset, refused, shown());
    if (refused) direct_works_ = false;
    if (done >= bytes) return true;
  }
  write_at(buffered_.get(), from + done, bytes - done, offset + done, shown());
  return false;
}

void Destination::write_back(std::uint64_t offset, std::uint64_t bytes, bool wait) {
  ckptstore::write_back(buffered_.get(), offset, bytes, wait, shown());
  if (wait) drop_cache(buffered_.get(), offset, bytes);
}

void Destination::finish(std::uint64_t bytes, const struct timespec& mtime) {
  const bool padded = direct_ && bytes != round_up(bytes);
  if (padded || bytes_before_ > bytes) truncate(buffered_.get(), bytes, shown());
  set_mtime(buffered_.get(), mtime, shown());
  direct_.close(
      shown());  // many finished files may wait for their sync: one descriptor each is enough
}

void Destination::sync() { ckptstore::sync(buffered_.get(), shown()); }

void Destination::let_go() noexcept { drop_cache(buffered_.get(), 0, 0); }

void Destination::close() {
  direct_.close(shown());
  buffered_.close(shown());
}

// --- A range that arrives
// ------------------------------------------------------------------------------------------

void write_range(const std::string& folder, const std::string& name, const void* data,
                 std::size_t bytes, std::uint64_t offset) {
  constexpr std::size_t kBlockBytes = 8 << 20;
  constexpr std::size_t kWorthPassingTheCache = 1 << 20;
  const Root root(folder);
  const std::string shown = root.shown(name);
  // Opened for each range: who is late after a cancel never has another file's descriptor.
  UniqueFd plain = open_beneath(root.fd.get(), name, O_WRONLY | O_NONBLOCK, 0, shown);
  const struct stat status = status_of(plain.get(), shown);
  if (!S_ISREG(status.st_mode)) throw Refused(shown, "is not a regular file");
  const auto* from = static_cast<const std::byte*>(data);
  std::size_t done = 0;
  // The end of a file that fills no page goes through the cache: padding would change the size.
  const std::size_t whole = bytes / kAlignmentBytes * kAlignmentBytes;
  if (bytes >= kWorthPassingTheCache && offset % kAlignmentBytes == 0) {
    UniqueFd direct = reopen_direct(root, name, O_WRONLY, status);
    if (direct) {
      std::optional<AlignedBlock> block;  // what is aligned goes as it is
      if (reinterpret_cast<std::uintptr_t>(from) % kAlignmentBytes != 0) {
        block.emplace(std::min(whole, kBlockBytes));
      }
      for (bool refused = false, all = true; all && done < whole;) {
        const std::size_t now = std::min(kBlockBytes, whole - done);
        const std::byte* source = from + done;
        if (block) {
          std::memcpy(block->data(), source, now);
          source = block->data();
        }
        const std::size_t put =
            write_direct(direct.get(), source, now, offset + done, refused, shown);
        done += put;
        all = put == now;  // what it does not take, the cache does
      }
      direct.close(shown);
    }
  }
  write_at(plain.get(), from + done, bytes - done, offset + done, shown);
  plain.close(shown);
}

}  // namespace ckptstore
