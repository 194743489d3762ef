#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"
#include "file.h"

namespace ckptstore {
namespace {

constexpr std::size_t kHugePageBytes = 2 << 20;
constexpr auto kTickInterval = std::chrono::milliseconds(100);

class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

/// What the workers and the waiting thread share.
class Crew {
 public:
  Crew(std::atomic<bool>& cancelled, const std::function<void()>& body)
      : cancelled_(cancelled), body_(body) {}

  void work() noexcept {
    try {
      body_();
    } catch (const Cancelled&) {
      cancelled_ = true;  // whoever cancelled has the error, or is about to hand it in
    } catch (...) {
      fail(std::current_exception());
    }
    const std::lock_guard lock(mutex_);
    --running_;
    ended_.notify_all();
  }

  /// Keeps the first error.
  void fail(std::exception_ptr error) noexcept {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    if (!first_error_) first_error_ = std::move(error);
  }

  void start(unsigned threads) {
    threads_.reserve(threads);
    const SignalsBlocked blocked;
    for (unsigned i = 0; i < threads; ++i) {
      {
        const std::lock_guard lock(mutex_);
        ++running_;
      }
      try {
        threads_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {  // no more threads to be had
        const std::lock_guard lock(mutex_);
        --running_;
        break;
      }
    }
  }

  bool started() const { return !threads_.empty(); }

  /// True when all workers have ended.
  bool wait_a_tick() {
    std::unique_lock lock(mutex_);
    return ended_.wait_until(lock, std::chrono::system_clock::now() + kTickInterval,
                             [this] { return running_ == 0; });
  }

  void join() noexcept {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  std::exception_ptr first_error() const { return first_error_; }  // after join()

 private:
  std::atomic<bool>& cancelled_;
  const std::function<void()>& body_;
  std::mutex mutex_;
  std::condition_variable ended_;
  unsigned running_ = 0;              // under mutex_
  std::exception_ptr first_error_;    // under mutex_
  std::vector<std::thread> threads_;  // of the waiting thread alone
};

}  // namespace

void run_workers(unsigned threads, std::atomic<bool>& cancelled, const std::function<void()>& body,
                 const std::function<void()>& tick) {
  Crew crew(cancelled, body);
  try {
    crew.start(std::max(threads, 1U));
    if (!crew.started()) {
      body();
      return;
    }
    while (!crew.wait_a_tick()) tick();
  } catch (...) {
    crew.fail(std::current_exception());
  }
  crew.join();
  if (crew.first_error()) std::rethrow_exception(crew.first_error());
}

unsigned default_threads() {
  cpu_set_t usable;
  const int cores = ::sched_getaffinity(0, sizeof usable, &usable) == 0 ? CPU_COUNT(&usable) : 4;
  return static_cast<unsigned>(std::clamp(cores, 4, 32));
}

AlignedBlock::AlignedBlock(std::size_t bytes) : bytes_(round_up(bytes)) {
  const bool huge = bytes_ % kHugePageBytes == 0;
  data_.reset(
      static_cast<std::byte*>(std::aligned_alloc(huge ? kHugePageBytes : kAlignmentBytes, bytes_)));
  if (!data_) throw std::bad_alloc();
  // A disk request takes a limited number of memory segments: scattered small pages cut one write
  // into many requests. Only advice: where the kernel declines it, small pages serve.
  if (huge) ::madvise(data_.get(), bytes_, MADV_HUGEPAGE);
}

void AlignedBlock::Free::operator()(std::byte* data) const noexcept { std::free(data); }

}  // namespace ckptstore
