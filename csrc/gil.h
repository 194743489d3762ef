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
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    take_or_sleep([this] { PyEval_RestoreThread(state_); });
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

/// Lets this thread run Python while it lives.
class GilHeld {
 public:
  GilHeld() : state_(take_or_sleep([] { return PyGILState_Ensure(); })) {}
  ~GilHeld() { PyGILState_Release(state_); }
  GilHeld(const GilHeld&) = delete;
  GilHeld& operator=(const GilHeld&) = delete;

 private:
  PyGILState_STATE state_;
};

}  // namespace ckptstore
