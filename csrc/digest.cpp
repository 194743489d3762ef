#include "digest.h"

#include <algorithm>
#include <limits>
#include <mutex>

#include "crc.h"
#include "error.h"

namespace ckptstore {
namespace {

constexpr std::uint64_t kPieceBytes = 128 << 10;  // with its source fits the second-level cache
constexpr std::uint64_t kDefaultBlockBytes = 1 << 20;  // of one read past the page cache

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

/// One file being digested by several workers.
struct Task {
  std::mutex mutex;  // guards opening and `error`
  bool opened = false;
  Source source;
  SumCheck sums;
  std::exception_ptr error;
  std::atomic<std::size_t> first_bad{kNone};  // chunk, or 0 on an error
  std::atomic<std::size_t> chunks_left{0};

  bool failed() const { return first_bad != kNone; }
};

class Digester {
 public:
  Digester(const Root& root, const std::vector<DigestSpec>& files, const DigestOptions& options)
      : root_(root),
        files_(files),
        options_(options),
        queue_(files, options.chunk_bytes),
        tasks_(files.size()),
        outcomes_(files.size()) {
    for (std::size_t i = 0; i < files.size(); ++i) {
      tasks_[i].chunks_left = queue_.chunks_of(i);
      outcomes_[i].digest.chunks.resize(files[i].bytes == 0 ? 0 : queue_.chunks_of(i));
      total_bytes_ += files[i].bytes;
    }
  }

  std::vector<DigestOutcome> run(const Progress& progress) {
    const unsigned wanted = options_.threads != 0 ? options_.threads : default_threads();
    const auto threads = static_cast<unsigned>(std::min<std::size_t>(wanted, queue_.total()));
    if (threads != 0) {
      run_workers(threads, cancelled_, [this] { work(); }, [&] { progress(done_, total_bytes_); });
    }
    for (std::size_t i = 0; i < files_.size(); ++i) conclude(i);
    progress(done_, total_bytes_);
    return std::move(outcomes_);
  }

 private:
  void work() {
    be_nice(options_.nice);
    const std::uint64_t block =
        options_.block_bytes != 0 ? options_.block_bytes : kDefaultBlockBytes;
    const AlignedBlock buffer(std::min(block, options_.chunk_bytes));
    while (const auto chunk = queue_.next()) {
      if (cancelled_ || stopped_) return;
      Task& task = tasks_[chunk->file];
      try {
        if (chunk->index <= task.first_bad) digest(task, *chunk, buffer);
      } catch (const IoError&) {
        note(task);
      } catch (const Refused&) {
        note(task);
      } catch (const SourceChanged&) {
        note(task);
      }
      if (files_[chunk->file].target != nullptr && task.failed()) stopped_ = true;
      if (task.chunks_left.fetch_sub(1) == 1) finish(task, files_[chunk->file]);
    }
  }

  void finish(Task& task, const DigestSpec& spec) {
    // What went into memory has the right digests, whatever becomes of the file.
    if (!task.error && spec.target == nullptr) {
      try {
        task.source.check_unchanged();
      } catch (const IoError&) {
        note(task);
      } catch (const SourceChanged&) {
        note(task);
      }
    }
    task.source.close();
  }

  void note(Task& task) {
    const std::lock_guard lock(task.mutex);
    if (!task.error) task.error = std::current_exception();
    task.first_bad = 0;
  }

  void digest(Task& task, const Chunk& chunk, const AlignedBlock& buffer) {
    const DigestSpec& spec = files_[chunk.file];
    {
      const std::lock_guard lock(task.mutex);
      if (task.error) return;
      if (!task.opened) {
        task.opened = true;
        task.source.open(root_, spec, options_.mode);
        if (!spec.sums.empty()) task.sums.begin(spec.sums, options_.chunk_bytes);
      }
    }
    if (chunk.bytes == 0) return;
    const Scatter* const target = spec.target;
    if (target != nullptr && !target->wants(chunk.offset, chunk.bytes)) return;
    const bool direct = task.source.prefers_direct(chunk.offset, chunk.bytes);
    std::uint64_t crc = 0;
    SumCheck::OfChunk sums(task.sums, chunk.offset, chunk.bytes);
    // From the page cache, one small piece of memory is used over and over: it stays in the
    // processor's cache.
    const std::uint64_t step =
        direct ? buffer.size() : std::min<std::uint64_t>(kPieceBytes, buffer.size());
    for (std::uint64_t at = 0; at < chunk.bytes; at += step) {
      if (cancelled_) throw Cancelled();
      const std::uint64_t bytes = std::min(step, chunk.bytes - at);
      const std::uint64_t offset = chunk.offset + at;
      std::byte* const place =
          target != nullptr && !direct ? target->whole(offset, bytes) : nullptr;
      std::byte* const to = place != nullptr ? place : buffer.data();
      read_and_digest(task.source, to, bytes, offset, direct, crc);
      sums.add(to, bytes, offset);
      if (target != nullptr && place == nullptr) target->write(to, bytes, offset);
      done_.fetch_add(bytes, std::memory_order_relaxed);
    }
    outcomes_[chunk.file].digest.chunks[chunk.index] = crc;
    if (spec.expected && (*spec.expected)[chunk.index] != crc) {
      std::size_t before = task.first_bad;
      while (chunk.index < before && !task.first_bad.compare_exchange_weak(before, chunk.index)) {
      }
    }
  }

  void conclude(std::size_t i) {
    const Task& task = tasks_[i];
    DigestOutcome& outcome = outcomes_[i];
    if (task.error) {
      outcome.error = task.error;
    } else if (task.failed()) {
      outcome.error = std::make_exception_ptr(
          ChunkMismatch(files_[i].name, task.first_bad * options_.chunk_bytes, options_.read_back));
    } else if (const auto wrong = task.sums.first_wrong()) {
      outcome.error = std::make_exception_ptr(SumMismatch(files_[i].name, *wrong));
    } else if (files_[i].target == nullptr) {
      outcome.digest.crc =
          combine_chunks(outcome.digest.chunks, files_[i].bytes, options_.chunk_bytes);
    }
  }

  const Root& root_;
  const std::vector<DigestSpec>& files_;
  const DigestOptions& options_;
  ChunkQueue queue_;
  std::vector<Task> tasks_;
  std::vector<DigestOutcome> outcomes_;
  std::uint64_t total_bytes_ = 0;
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> stopped_{false};  // by an error, where that ends all
};

}  // namespace

ChunkQueue::ChunkQueue(const std::vector<DigestSpec>& files, std::uint64_t chunk_bytes)
    : files_(files), chunk_bytes_(chunk_bytes) {
  first_.reserve(files.size() + 1);
  first_.push_back(0);
  for (const auto& file : files) {
    const std::uint64_t chunks = file.bytes / chunk_bytes + (file.bytes % chunk_bytes != 0);
    first_.push_back(first_.back() + std::max<std::size_t>(chunks, 1));
  }
}

std::optional<Chunk> ChunkQueue::next() {
  const std::size_t number = next_.fetch_add(1, std::memory_order_relaxed);
  if (number >= total()) return std::nullopt;
  const auto after = std::upper_bound(first_.begin(), first_.end(), number);
  const auto file = static_cast<std::size_t>(after - first_.begin()) - 1;
  const std::size_t index = number - first_[file];
  const std::uint64_t offset = index * chunk_bytes_;
  return Chunk{file, index, offset, std::min(chunk_bytes_, files_[file].bytes - offset)};
}

std::uint64_t combine_chunks(const std::vector<std::uint64_t>& chunks, std::uint64_t bytes,
                             std::uint64_t chunk_bytes) {
  std::uint64_t crc = 0;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    crc = crc64_combine(crc, chunks[i], std::min(chunk_bytes, bytes - i * chunk_bytes));
  }
  return crc;
}

bool read_and_digest(Source& source, std::byte* to, std::size_t bytes, std::uint64_t offset,
                     bool direct, std::uint64_t& crc) {
  bool all_direct = direct;
  const std::size_t piece = direct ? bytes : kPieceBytes;
  for (std::size_t at = 0; at < bytes; at += piece) {
    const std::size_t now = std::min<std::size_t>(piece, bytes - at);
    all_direct &= source.read(to + at, now, offset + at, direct);
    crc = crc64(crc, to + at, now);
  }
  return all_direct;
}

std::vector<DigestOutcome> digest_files(const Root& root, const std::vector<DigestSpec>& files,
                                        const DigestOptions& options, const Progress& progress) {
  return Digester(root, files, options).run(progress);
}

}  // namespace ckptstore
