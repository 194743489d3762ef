#include "archive.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string_view>
#include <utility>

#include "error.h"
#include "file.h"
#include "pool.h"

namespace ckptstore {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers in a zip are taken as they lie");

constexpr std::uint64_t kEndBytes = 4096;               // read of each end of a window, at first
constexpr std::uint64_t kMostDirectoryBytes = 1 << 20;  // beyond, zipfile reads it
constexpr std::size_t kWindowsAtOnce = 64;              // that a worker takes
constexpr std::uint32_t kWide = 0xFFFFFFFF;             // the number stands in 64 bits elsewhere

/// Something that torch does not write.
struct Unusual {};

void demand(bool usual) {
  if (!usual) throw Unusual();
}

/// Bytes that somebody else has written: every look is within them, or Unusual.
class Bytes {
 public:
  explicit Bytes(std::string_view data) : data_(data) {}
  std::size_t size() const { return data_.size(); }
  std::string_view part(std::size_t at, std::size_t bytes) const {
    demand(at <= data_.size() && bytes <= data_.size() - at);
    return data_.substr(at, bytes);
  }
  template <typename Number>
  Number number(std::size_t at) const {
    Number found;
    std::memcpy(&found, part(at, sizeof found).data(), sizeof found);
    return found;
  }
  bool begins(std::string_view mark) const { return data_.starts_with(mark); }

 private:
  std::string_view data_;
};

/// One window of an open file; both its ends are read at once, since all but the data lies there.
class Reader {
 public:
  Reader(int fd, const Window& window, const std::string& shown)
      : fd_(fd), window_(window), shown_(shown) {
    tail_ =
        read(window.bytes - std::min(window.bytes, kEndBytes), std::min(window.bytes, kEndBytes));
    head_ = window.bytes > kEndBytes ? read(0, std::min(window.bytes - kEndBytes, kEndBytes)) : "";
  }

  /// Exactly these bytes of the window. Valid until the next call.
  Bytes at(std::uint64_t offset, std::uint64_t bytes) {
    demand(offset <= window_.bytes && bytes <= window_.bytes - offset);
    const std::uint64_t tail = window_.bytes - tail_.size();
    if (offset >= tail) return Bytes(std::string_view(tail_).substr(offset - tail, bytes));
    if (offset + bytes <= head_.size()) return Bytes(std::string_view(head_).substr(offset, bytes));
    other_ = read(offset, bytes);
    return Bytes(other_);
  }

 private:
  std::string read(std::uint64_t offset, std::uint64_t bytes) const {
    std::string data(bytes, '\0');
    demand(read_at(fd_, data.data(), bytes, window_.offset + offset, shown_) == bytes);
    return data;
  }

  const int fd_;
  const Window& window_;
  const std::string& shown_;
  std::string head_, tail_, other_;
};

/// An entry of the directory.
struct Entry {
  std::string_view name;
  std::uint64_t offset, bytes, stored;  // of the record's header; of what is in it
  std::uint32_t crc32;
  bool compressed;
  std::size_t length;  // of the entry
};

Entry entry_at(const Bytes& directory, std::size_t at) {
  constexpr std::size_t kBytes = 46;
  constexpr std::uint16_t kNewestVersion = 45;
  demand(directory.part(at, 4) == "PK\1\2" &&
         directory.number<std::uint16_t>(at + 6) <= kNewestVersion);
  const std::size_t name_bytes = directory.number<std::uint16_t>(at + 28);
  const std::size_t extra_bytes = directory.number<std::uint16_t>(at + 30);
  demand(directory.number<std::uint16_t>(at + 32) == 0);  // a comment
  Entry entry{};
  entry.name = directory.part(at + kBytes, name_bytes);
  demand(std::all_of(entry.name.begin(), entry.name.end(),
                     [](char c) { return c >= ' ' && c <= '~'; }));
  entry.compressed = directory.number<std::uint16_t>(at + 10) != 0;
  entry.crc32 = directory.number<std::uint32_t>(at + 16);
  entry.stored = directory.number<std::uint32_t>(at + 20);
  entry.bytes = directory.number<std::uint32_t>(at + 24);
  entry.offset = directory.number<std::uint32_t>(at + 42);
  entry.length = kBytes + name_bytes + extra_bytes;
  const Bytes extra(directory.part(at + kBytes + name_bytes, extra_bytes));
  if (extra.size() !=
      0) {  // the wide numbers, in this order, of those that are too large for 32 bits
    demand(extra.number<std::uint16_t>(0) == 1 &&
           extra.number<std::uint16_t>(2) + 4U == extra.size());
    std::size_t from = 4;
    for (std::uint64_t* const value : {&entry.bytes, &entry.stored, &entry.offset}) {
      if (*value != kWide) continue;
      *value = extra.number<std::uint64_t>(from);
      from += sizeof *value;
    }
  }
  return entry;
}

std::vector<Record> records_of(int fd, const Window& window, const std::string& shown) {
  constexpr std::uint64_t kEnd = 22, kLocator = 20, kWideEnd = 56, kHeader = 30;
  demand(window.bytes >= kEnd);
  Reader reader(fd, window, shown);
  std::uint64_t end = window.bytes - kEnd;  // of the directory
  const Bytes last = reader.at(end, kEnd);
  demand(last.begins("PK\5\6") && last.number<std::uint16_t>(20) == 0);
  std::uint64_t size = last.number<std::uint32_t>(12), begin = last.number<std::uint32_t>(16);
  if (end >= kLocator && reader.at(end - kLocator, kLocator).begins("PK\6\7")) {
    const Bytes locator = reader.at(end - kLocator, kLocator);
    demand(locator.number<std::uint32_t>(4) == 0 && locator.number<std::uint32_t>(16) <= 1);
    demand(end >= kLocator + kWideEnd);
    end -= kLocator + kWideEnd;
    const Bytes wide = reader.at(end, kWideEnd);
    // Both as torch writes them: newer zipfiles refuse others, older ones do not look.
    demand(wide.begins("PK\6\6") && wide.number<std::uint64_t>(4) + 12 == kWideEnd &&
           locator.number<std::uint64_t>(8) == end);
    size = wide.number<std::uint64_t>(40);
    begin = wide.number<std::uint64_t>(48);
  }
  demand(size <= std::min(end, kMostDirectoryBytes) && begin == end - size);
  const std::string copy(reader.at(begin, size).part(0, size));
  const Bytes directory(copy);
  std::vector<Record> found;
  for (std::size_t at = 0; at < size;) {
    const Entry entry = entry_at(directory, at);
    at += entry.length;
    if (entry.bytes == 0) continue;
    demand(!entry.compressed && entry.stored == entry.bytes);
    const Bytes header = reader.at(entry.offset, kHeader);
    demand(header.begins("PK\3\4"));
    const std::uint64_t data = entry.offset + kHeader + header.number<std::uint16_t>(26) +
                               header.number<std::uint16_t>(28);
    demand(data <= window.bytes && entry.bytes <= window.bytes - data);
    found.push_back({std::string(entry.name), window.offset + data, entry.bytes, entry.crc32});
  }
  return found;
}

}  // namespace

std::vector<std::optional<std::vector<Record>>> find_records(const std::string& root,
                                                             const std::vector<Window>& windows,
                                                             const std::function<void()>& tick) {
  const UniqueFd folder = open_folder(root);
  std::vector<std::optional<std::vector<Record>>> found(windows.size());
  std::atomic<std::size_t> next{0};
  std::atomic<bool> cancelled{false};
  const auto work = [&] {
    UniqueFd fd;
    const std::string* opened = nullptr;
    while (!cancelled) {
      const std::size_t first = next.fetch_add(kWindowsAtOnce);
      for (std::size_t i = first; i < std::min(first + kWindowsAtOnce, windows.size()); ++i) {
        const Window& window = windows[i];
        const std::string shown = root + "/" + window.name;
        if (opened == nullptr || *opened != window.name) {
          // O_NONBLOCK: opening a pipe must not wait for its other end.
          fd = open_beneath(folder.get(), window.name, O_RDONLY | O_NONBLOCK, 0, shown);
          if (!S_ISREG(status_of(fd.get(), shown).st_mode)) {
            throw Refused(shown, "is not a regular file");
          }
          opened = &window.name;
        }
        try {
          found[i] = records_of(fd.get(), window, shown);
        } catch (const Unusual&) {
          found[i] = std::nullopt;
        }
      }
      if (first >= windows.size()) return;
    }
  };
  const std::size_t useful = windows.size() / kWindowsAtOnce + 1;
  run_workers(static_cast<unsigned>(std::min<std::size_t>(default_threads(), useful)), cancelled,
              work, tick);
  return found;
}

}  // namespace ckptstore
