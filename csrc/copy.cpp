#include "copy.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

#include "crc.h"
#include "error.h"
#include "probe.h"

namespace ckptstore {
namespace {

constexpr std::uint64_t kDefaultBlockBytes = 8 << 20;
constexpr std::uint64_t kSmallFileBytes = 1 << 20;  // up to here O_DIRECT costs more than it saves
constexpr std::size_t kFilesWorthASystemSync =
    32;  // from here one syncfs is cheaper than a sync each
// Files are synced together at the end, or when so many wait: every sync empties the disk's own
// cache, which stalls the writes of the next file. Few enough for a process that is short of
// descriptors.
constexpr std::size_t kMostUnsyncedFiles = 64;

/// One file being copied by several workers.
struct Task {
  std::mutex mutex;  // guards opening
  bool begun = false;
  bool opened = false;  // false with `begun`: opening failed
  bool cloned = false;
  Source source;
  Destination destination;
  std::atomic<std::size_t> chunks_left{0};
};

/// What one worker keeps between chunks.
struct Bench {
  explicit Bench(std::size_t bytes) : block(bytes) {}

  AlignedBlock block;
  std::optional<AlignedBlock> other;  // for comparing, made when needed
  // The buffered range written before this one: waited for when the next is on its way.
  std::size_t behind_file = 0;
  std::uint64_t behind_offset = 0;
  std::uint64_t behind_bytes = 0;  // 0: none
};

class Copier {
 public:
  Copier(const std::string& source, const std::string& destination,
         const std::vector<DigestSpec>& files, const CopyOptions& options, const Progress& progress)
      : source_(source),
        destination_(destination),
        files_(files),
        options_(options),
        progress_(progress),
        queue_(files, options.chunk_bytes),
        tasks_(files.size()) {
    result_.digests.resize(files.size());
    std::size_t small = 0;
    for (std::size_t i = 0; i < files.size(); ++i) {
      tasks_[i].chunks_left = queue_.chunks_of(i);
      result_.digests[i].chunks.resize(files[i].bytes == 0 ? 0 : queue_.chunks_of(i));
      total_bytes_ += files[i].bytes;
      small += files[i].bytes <= kSmallFileBytes;
      const std::string& name = files[i].name;
      for (auto slash = name.find('/'); slash != std::string::npos;
           slash = name.find('/', slash + 1)) {
        folders_.insert(name.substr(0, slash));
      }
    }
    sync_whole_system_ = syncs() && small >= kFilesWorthASystemSync &&
                         sync_file_system_is_durable(destination_.fd.get());
  }

  CopyResult run() {
    phase(1, [this] { make_folders(); });
    phase(queue_.total(), [this] { copy_chunks(); });
    if (syncs()) {
      phase(unsynced_.size(), [this] { sync_files(); });
      phase(1, [this] { sync_folders(); });
    }
    for (std::size_t i = 0; i < files_.size(); ++i) {
      FileDigest& digest = result_.digests[i];
      digest.crc = combine_chunks(digest.chunks, files_[i].bytes, options_.chunk_bytes);
    }
    if (options_.verify_after_write) read_back();
    progress_(done_, total_bytes_);
    result_.bytes_reused = reused_;
    for (std::size_t i = 0; i < kStrategies; ++i) {
      result_.bytes_by_strategy[i] = by_strategy_[i];
      result_.bytes_copied += by_strategy_[i];
    }
    return std::move(result_);
  }

 private:
  bool syncs() const { return options_.durable || options_.verify_after_write; }

  void phase(std::size_t most_threads, const std::function<void()>& body) {
    const unsigned wanted = options_.threads != 0 ? options_.threads : default_threads();
    const auto threads = static_cast<unsigned>(std::min<std::size_t>(wanted, most_threads));
    if (threads == 0) return;
    run_workers(
        threads, cancelled_,
        [&] {
          be_nice(options_.nice);
          body();
        },
        [this] { progress_(done_, total_bytes_); });
  }

  void make_folders() {  // parents sort before what they hold
    for (const auto& folder : folders_) {
      make_folder(destination_.fd.get(), folder, destination_.shown(folder));
    }
  }

  void copy_chunks() {
    const std::uint64_t block =
        options_.block_bytes != 0 ? options_.block_bytes : kDefaultBlockBytes;
    Bench bench(std::min(block, options_.chunk_bytes));
    while (const auto chunk = queue_.next()) {
      if (cancelled_) return;
      Task& task = tasks_[chunk->file];
      open_once(task, *chunk);
      if (chunk->bytes != 0) {
        result_.digests[chunk->file].chunks[chunk->index] = copy_chunk(task, *chunk, bench);
      }
      if (task.chunks_left.fetch_sub(1) == 1) {
        bench.behind_bytes = 0;
        finish(task, files_[chunk->file]);
      }
    }
  }

  void open_once(Task& task, const Chunk& chunk) {
    const std::lock_guard lock(task.mutex);
    if (task.opened) return;
    if (task.begun || cancelled_) throw Cancelled();
    task.begun = true;
    const DigestSpec& spec = files_[chunk.file];
    const bool small = spec.bytes <= kSmallFileBytes;
    const bool direct_write = options_.strategy == Strategy::kDirect ||
                              options_.strategy == Strategy::kWarm ||
                              (options_.strategy != Strategy::kBuffered && !small);
    task.source.open(source_, spec, read_mode());
    task.destination.open(destination_, spec.name,
                          direct_write ? WriteMode::kDirect : WriteMode::kBuffered,
                          options_.resume);
    const bool may_clone =
        options_.strategy == Strategy::kClone || options_.strategy == Strategy::kAuto;
    if (may_clone && clone_works_ && spec.memory == nullptr && !options_.resume &&
        spec.bytes != 0) {
      task.cloned = task.destination.clone_from(task.source);
      if (!task.cloned) clone_works_ = false;  // these two roots will not learn it
    }
    if (!task.cloned && (!small || options_.resume)) task.destination.allocate(spec.bytes);
    task.opened = true;
  }

  ReadMode read_mode() const {
    switch (options_.strategy) {
      case Strategy::kDirect:
        return ReadMode::kDirect;
      case Strategy::kWarm:
      case Strategy::kBuffered:
        return ReadMode::kCached;
      default:
        return ReadMode::kAuto;
    }
  }

  /// Returns the CRC of the chunk.
  std::uint64_t copy_chunk(Task& task, const Chunk& chunk, Bench& bench) {
    const DigestSpec& spec = files_[chunk.file];
    const std::uint64_t* expected = spec.expected ? &(*spec.expected)[chunk.index] : nullptr;
    const bool compare = options_.resume && chunk.offset < task.destination.bytes_before();
    if (compare && expected && is_there(task, chunk, bench, *expected)) {
      note_done(chunk.bytes);
      reused_ += chunk.bytes;
      return *expected;
    }
    const bool direct = task.source.prefers_direct(chunk.offset, chunk.bytes);
    std::uint64_t crc = 0;
    bool buffered = false;
    for (std::uint64_t at = 0; at < chunk.bytes; at += bench.block.size()) {
      if (cancelled_) throw Cancelled();
      const std::uint64_t bytes = std::min<std::uint64_t>(bench.block.size(), chunk.bytes - at);
      const std::uint64_t offset = chunk.offset + at;
      std::byte* data = bench.block.data();
      const bool read_direct = read_and_digest(task.source, data, bytes, offset, direct, crc);
      if (task.cloned) {
        note(Strategy::kClone, bytes);
      } else if (compare && !expected && same_there(task, bench, bytes, offset)) {
        reused_ += bytes;
      } else if (!task.destination.write(data, bytes, offset)) {
        buffered = true;
        note(Strategy::kBuffered, bytes);
      } else {
        note(read_direct ? Strategy::kDirect : Strategy::kWarm, bytes);
      }
      note_done(bytes);
    }
    if (expected && *expected != crc) throw ChunkMismatch(spec.name, chunk.offset, false);
    if (buffered && spec.bytes > kSmallFileBytes) write_behind(task, chunk, bench);
    return crc;
  }

  /// Whether an earlier attempt left this chunk whole on the disk.
  bool is_there(Task& task, const Chunk& chunk, Bench& bench, std::uint64_t expected) {
    if (chunk.offset + chunk.bytes > task.destination.bytes_before()) return false;
    std::uint64_t crc = 0;
    for (std::uint64_t at = 0; at < chunk.bytes; at += bench.block.size()) {
      if (cancelled_) throw Cancelled();
      const std::uint64_t bytes = std::min<std::uint64_t>(bench.block.size(), chunk.bytes - at);
      if (task.destination.read(bench.block.data(), bytes, chunk.offset + at) < bytes) return false;
      crc = crc64(crc, bench.block.data(), bytes);
    }
    return crc == expected;
  }

  /// Whether the destination holds the same bytes as the block just read.
  bool same_there(Task& task, Bench& bench, std::uint64_t bytes, std::uint64_t offset) {
    if (offset + bytes > task.destination.bytes_before()) return false;
    if (!bench.other) bench.other.emplace(bench.block.size());
    return task.destination.read(bench.other->data(), bytes, offset) == bytes &&
           std::memcmp(bench.other->data(), bench.block.data(), bytes) == 0;
  }

  /// Keeps the dirty pages of a buffered copy few: sends this range off and waits for the one
  /// before.
  void write_behind(Task& task, const Chunk& chunk, Bench& bench) {
    task.destination.write_back(chunk.offset, chunk.bytes, false);
    if (bench.behind_bytes != 0 && bench.behind_file == chunk.file) {
      task.destination.write_back(bench.behind_offset, bench.behind_bytes, true);
    }
    bench.behind_file = chunk.file;
    bench.behind_offset = chunk.offset;
    bench.behind_bytes = chunk.bytes;
  }

  void finish(Task& task, const DigestSpec& spec) {
    task.source.check_unchanged();
    task.destination.finish(spec.bytes, task.source.mtime());
    task.source.close();
    const bool small = spec.bytes <= kSmallFileBytes;
    if (!syncs() || (small && sync_whole_system_)) {
      task.destination.close();
      return;
    }
    bool full;
    {
      const std::lock_guard lock(unsynced_mutex_);
      unsynced_.push_back(&task);
      full = unsynced_.size() >= kMostUnsyncedFiles;
    }
    if (full) sync_files();
  }

  /// Syncs and closes files until none waits. Any number of workers may do it at once.
  void sync_files() {
    while (!cancelled_) {
      Task* task;
      {
        const std::lock_guard lock(unsynced_mutex_);
        if (unsynced_.empty()) return;
        task = unsynced_.back();
        unsynced_.pop_back();
      }
      task->destination.sync();
      task->destination.let_go();
      task->destination.close();
    }
  }

  /// The folders, and with them many small files.
  void sync_folders() {
    if (sync_whole_system_) {
      sync_file_system(destination_.fd.get(), destination_.path);
      return;
    }
    for (auto folder = folders_.rbegin(); folder != folders_.rend(); ++folder) {
      if (cancelled_) return;
      const std::string shown = destination_.shown(*folder);
      const UniqueFd fd =
          open_beneath(destination_.fd.get(), *folder, O_RDONLY | O_DIRECTORY, 0, shown);
      sync_folder(fd.get(), shown);
    }
    sync_folder(destination_.fd.get(), destination_.path);
  }

  void read_back() {
    std::vector<DigestSpec> written(files_.size());
    for (std::size_t i = 0; i < files_.size(); ++i) {
      written[i].name = files_[i].name;
      written[i].bytes = files_[i].bytes;
      written[i].expected = result_.digests[i].chunks;
    }
    DigestOptions options;
    options.threads = options_.threads;
    options.block_bytes = options_.block_bytes;
    options.chunk_bytes = options_.chunk_bytes;
    options.mode = ReadMode::kDirect;
    options.nice = options_.nice;
    options.read_back = true;
    const auto sampled = [this](std::uint64_t, std::uint64_t) { progress_(done_, total_bytes_); };
    for (const auto& outcome : digest_files(destination_, written, options, sampled)) {
      if (outcome.error) std::rethrow_exception(outcome.error);
    }
  }

  void note_done(std::uint64_t bytes) { done_.fetch_add(bytes, std::memory_order_relaxed); }
  void note(Strategy strategy, std::uint64_t bytes) {
    by_strategy_[static_cast<std::size_t>(strategy)].fetch_add(bytes, std::memory_order_relaxed);
  }

  const Root source_;
  const Root destination_;
  const std::vector<DigestSpec>& files_;
  const CopyOptions& options_;
  const Progress& progress_;
  ChunkQueue queue_;
  std::vector<Task> tasks_;
  std::set<std::string> folders_;  // to make, below the destination
  bool sync_whole_system_ = false;
  std::mutex unsynced_mutex_;
  std::vector<Task*> unsynced_;  // finished, to be synced and closed; under unsynced_mutex_
  std::atomic<bool> clone_works_{true};
  std::uint64_t total_bytes_ = 0;
  std::atomic<std::uint64_t> done_{0};
  std::atomic<std::uint64_t> reused_{0};
  std::array<std::atomic<std::uint64_t>, kStrategies> by_strategy_{};
  std::atomic<bool> cancelled_{false};
  CopyResult result_;
};

}  // namespace

CopyResult copy_files(const std::string& source, const std::string& destination,
                      const std::vector<DigestSpec>& files, const CopyOptions& options,
                      const Progress& progress) {
  return Copier(source, destination, files, options, progress).run();
}

}  // namespace ckptstore
