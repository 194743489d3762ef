// Worker threads and the blocks of memory that they work in.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>

namespace ckptstore {

/// Runs `body` on up to `threads` new threads at once (fewer where the system gives no more; none
/// at all: in the calling thread) and waits for all. `tick` runs in the calling thread about every
/// 100 ms meanwhile. The first exception of a body or of a tick sets `cancelled`, which bodies must
/// look at; when all have ended it is thrown here. No exception leaves a thread. All signals are
/// blocked in the workers.
void run_workers(unsigned threads, std::atomic<bool>& cancelled, const std::function<void()>& body,
                 const std::function<void()>& tick);

/// How many threads to use where the caller does not say: enough requests in flight for a fast
/// disk, and no more than the processors that this process may use, within bounds.
unsigned default_threads();

/// Memory fit for O_DIRECT. Throws std::bad_alloc.
class AlignedBlock {
 public:
  /// `bytes` is rounded up to the alignment.
  explicit AlignedBlock(std::size_t bytes);
  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const noexcept;
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
};

}  // namespace ckptstore
