// The interpreter's lock, let go of and taken back. pybind11's own scopes end the process with
// SIGABRT where the interpreter ends while a daemon thread is within: up to Python 3.13 the lock
// then answers with pthread_exit(), which unwinds through destructors and catch (...) blocks. Such
// a thread sleeps here until the process is gone, as Python does itself from 3.14 on.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace ckptstore {

template <typename Take>
auto take_or_sleep(Take take) noexcept {
  try {
    return take();
  } catch (...) {  // Python throws nothing: it is pthread_exit(), which must not be swallowed
    while (true) ::pause();
  }
}

/// Lets others run Python while it lives.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) { innermost = state_; }
  ~GilReleased() {
    innermost = outer_;
    take_or_sleep([this] { PyEval_RestoreThread(state_); });
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

  static inline thread_local PyThreadState* innermost =
      nullptr;  // of those that live in this thread

 private:
  PyThreadState* const outer_ = innermost;
  PyThreadState* const state_;
};

/// Lets this thread run Python while it lives, within a GilReleased. Not by PyGILState_Ensure(),
/// which dies where the interpreter has ended already.
class GilHeld {
 public:
  GilHeld() {
    take_or_sleep([] { PyEval_RestoreThread(GilReleased::innermost); });
  }
  ~GilHeld() { PyEval_SaveThread(); }
  GilHeld(const GilHeld&) = delete;
  GilHeld& operator=(const GilHeld&) = delete;
};

}  // namespace ckptstore
