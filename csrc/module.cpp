// The bindings of ckptstore._native, and nothing else. ckptstore/native.py is the only one that
// imports it.
//
// Errors become NativeError(kind, what, path, number), which native.py turns into ckptstore.errors.
// Paths are bytes.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "archive.h"
#include "bind_weights.h"
#include "copy.h"
#include "crc.h"
#include "digest.h"
#include "error.h"
#include "file.h"
#include "gil.h"
#include "pool.h"
#include "probe.h"
#include "scan.h"

namespace py = pybind11;

namespace ckptstore {
namespace {

PyObject* native_error = nullptr;  // owned by the module, for ever

/// (kind, what, path, number) of an error that error.h declares; rethrows any other.
py::tuple describe(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const IoError& io) {
    return py::make_tuple("io", io.operation, py::bytes(io.path), io.code);
  } catch (const ChunkMismatch& bad) {
    return py::make_tuple(bad.read_back ? "read back" : "mismatch", "", py::bytes(bad.name),
                          bad.offset);
  } catch (const SumMismatch& bad) {
    return py::make_tuple("sum", "", py::bytes(bad.name), bad.offset);
  } catch (const SourceChanged& changed) {
    return py::make_tuple("changed", changed.reason, py::bytes(changed.name), 0);
  } catch (const Refused& refused) {
    return py::make_tuple("refused", refused.reason, py::bytes(refused.path), 0);
  }
}

void translate(std::exception_ptr error) {
  if (!error) return;
  PyErr_SetObject(native_error, describe(error).ptr());
}

/// Wakes the interpreter from the waiting loop: signals first (Ctrl-C), then the caller's own
/// function.
class Waker {
 public:
  explicit Waker(py::object progress) : progress_(std::move(progress)) {}
  void operator()(std::uint64_t done, std::uint64_t total) const {
    const GilHeld gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress_.is_none()) progress_(done, total);
  }

 private:
  py::object progress_;
};

/// A borrowed view of contiguous bytes.
class BufferView {
 public:
  explicit BufferView(const py::object& object, int flags = PyBUF_SIMPLE) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;
  const void* data() const { return view_.buf; }
  void* writable() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

/// The files of a job, and the memory that some of them are in: held until this goes.
struct Files {
  explicit Files(const py::iterable& files) {
    for (const auto& item : files) {
      const auto fields = py::reinterpret_borrow<py::tuple>(item);
      DigestSpec& spec = specs.emplace_back();
      spec.name = fields[0].cast<std::string>();
      spec.bytes = fields[1].cast<std::uint64_t>();
      spec.mtime_ns = fields[2].cast<std::int64_t>();
      spec.inode = fields[3].cast<std::uint64_t>();
      if (!fields[4].is_none()) spec.expected = fields[4].cast<std::vector<std::uint64_t>>();
      if (fields.size() < 6) continue;
      Gather& gather = gathers.emplace_back();
      for (const auto& buffer : fields[5].cast<py::tuple>()) {
        const BufferView& view = views.emplace_back(py::reinterpret_borrow<py::object>(buffer));
        gather.add(static_cast<const std::byte*>(view.data()), view.size());
      }
      spec.bytes = gather.bytes();
      spec.memory = &gather;
    }
  }

  std::vector<DigestSpec> specs;
  std::deque<Gather> gathers;  // a deque: the specs point into it
  std::deque<BufferView> views;
};

py::tuple to_python(const FileDigest& digest) {
  py::tuple chunks(digest.chunks.size());
  for (std::size_t i = 0; i < digest.chunks.size(); ++i) chunks[i] = py::int_(digest.chunks[i]);
  return py::make_tuple(digest.crc, chunks);
}

py::tuple copy_binding(const std::string& source, const std::string& destination,
                       const py::iterable& files, unsigned threads, std::uint64_t block_bytes,
                       std::uint64_t chunk_bytes, unsigned strategy, bool durable,
                       bool verify_after_write, int nice, bool resume, py::object progress) {
  const Files named(files);
  CopyOptions options;
  options.threads = threads;
  options.block_bytes = block_bytes;
  options.chunk_bytes = chunk_bytes;
  options.strategy = static_cast<Strategy>(strategy);
  options.durable = durable;
  options.verify_after_write = verify_after_write;
  options.nice = nice;
  options.resume = resume;
  const Waker waker(std::move(progress));
  CopyResult result;
  {
    const GilReleased released;
    result = copy_files(source, destination, named.specs, options, std::cref(waker));
  }
  py::list digests;
  for (const auto& digest : result.digests) digests.append(to_python(digest));
  return py::make_tuple(digests, result.bytes_copied, result.bytes_reused,
                        py::cast(result.bytes_by_strategy));
}

py::list digests_of(const std::string& root, const Files& named, const DigestOptions& options,
                    py::object progress) {
  const Waker waker(std::move(progress));
  std::vector<DigestOutcome> outcomes;
  {
    const GilReleased released;
    outcomes = digest_files(Root(root), named.specs, options, std::cref(waker));
  }
  py::list result;
  for (const auto& outcome : outcomes) {
    result.append(outcome.error ? describe(outcome.error) : to_python(outcome.digest));
  }
  return result;
}

py::list digest_binding(const std::string& root, const py::iterable& files,
                        const py::iterable& sums, unsigned threads, std::uint64_t chunk_bytes,
                        bool direct, int nice, py::object progress) {
  Files named(files);
  std::size_t number = 0;
  for (const auto& of_file : sums) {
    for (const auto& item : of_file) {
      const auto fields = py::reinterpret_borrow<py::tuple>(item);
      named.specs.at(number).sums.push_back({fields[0].cast<std::uint64_t>(),
                                             fields[1].cast<std::uint64_t>(),
                                             fields[2].cast<std::uint32_t>()});
    }
    ++number;
  }
  DigestOptions options;
  options.threads = threads;
  options.chunk_bytes = chunk_bytes;
  options.mode = direct ? ReadMode::kDirect : ReadMode::kAuto;
  options.nice = nice;
  return digests_of(root, named, options, std::move(progress));
}

/// As digest_binding, and fills memory: `wanted` has for each file a list of (offset, writable
/// buffer).
py::list read_binding(const std::string& root, const py::iterable& files,
                      const py::iterable& wanted, unsigned threads, std::uint64_t chunk_bytes,
                      py::object progress) {
  Files named(files);
  std::deque<BufferView> views;
  std::deque<Scatter> scatters;  // a deque: the specs point into it
  std::size_t number = 0;
  for (const auto& parts : wanted) {
    Scatter& scatter = scatters.emplace_back();
    for (const auto& item : parts) {
      const auto fields = py::reinterpret_borrow<py::tuple>(item);
      const BufferView& view = views.emplace_back(fields[1], PyBUF_WRITABLE);
      scatter.add(fields[0].cast<std::uint64_t>(), static_cast<std::byte*>(view.writable()),
                  view.size());
    }
    named.specs.at(number++).target = &scatter;
  }
  // Some wait for the disk while others wait for the kernel to hand out memory.
  constexpr unsigned kFewestThreads = 8;
  DigestOptions options;
  options.threads = threads != 0 ? threads : std::max(kFewestThreads, default_threads());
  options.chunk_bytes = chunk_bytes;
  return digests_of(root, named, options, std::move(progress));
}

py::object text(const std::string& name) {
  PyObject* decoded =
      PyUnicode_DecodeUTF8(name.data(), static_cast<Py_ssize_t>(name.size()), "surrogateescape");
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(decoded);
}

/// An instance of `type`, a NamedTuple class, without the detour through its Python constructor. It
/// is not tracked by the cycle collector: it holds text and numbers only, and there are hundreds of
/// thousands.
py::object entry_to_python(PyTypeObject* type, const Entry& entry) {
  const auto made = py::reinterpret_steal<py::object>(type->tp_alloc(type, 6));
  if (!made) throw py::error_already_set();
  PyTuple_SET_ITEM(made.ptr(), 0, text(entry.name).release().ptr());
  PyTuple_SET_ITEM(made.ptr(), 1, PyLong_FromUnsignedLongLong(entry.bytes));
  PyTuple_SET_ITEM(made.ptr(), 2, PyLong_FromLongLong(entry.mtime_ns));
  PyTuple_SET_ITEM(made.ptr(), 3, PyLong_FromUnsignedLongLong(entry.inode));
  PyTuple_SET_ITEM(made.ptr(), 4, PyLong_FromUnsignedLong(entry.mode));
  PyTuple_SET_ITEM(made.ptr(), 5, PyLong_FromUnsignedLong(entry.uid));
  for (Py_ssize_t i = 0; i < 6; ++i) {
    if (PyTuple_GET_ITEM(made.ptr(), i) == nullptr) throw py::error_already_set();
  }
  PyObject_GC_UnTrack(made.ptr());
  return made;
}

/// Keeps the cycle collector from walking a large result again and again while it is being made.
class CollectorPaused {
 public:
  CollectorPaused() : was_enabled_(PyGC_Disable() != 0) {}
  ~CollectorPaused() {
    if (was_enabled_) PyGC_Enable();
  }
  CollectorPaused(const CollectorPaused&) = delete;
  CollectorPaused& operator=(const CollectorPaused&) = delete;

 private:
  bool was_enabled_;
};

py::dict scan_binding(const std::string& root, int max_depth, const std::string& wanted,
                      std::uint64_t wanted_bytes, unsigned threads, const py::type& folder_type,
                      const py::type& entry_type) {
  const Waker waker{py::none()};
  std::vector<Folder> folders;
  {
    const GilReleased released;
    folders = scan_tree(root, max_depth, {wanted, wanted_bytes}, threads, [&] { waker(0, 0); });
  }
  const CollectorPaused paused;
  auto* const type = reinterpret_cast<PyTypeObject*>(entry_type.ptr());
  py::dict result;
  for (const auto& folder : folders) {
    py::list entries(folder.entries.size());
    for (std::size_t i = 0; i < folder.entries.size(); ++i) {
      PyList_SET_ITEM(entries.ptr(), static_cast<Py_ssize_t>(i),
                      entry_to_python(type, folder.entries[i]).release().ptr());
    }
    const py::object content = folder.content ? py::object(py::bytes(*folder.content)) : py::none();
    result[text(folder.path)] = folder_type(folder.error, entries, content);
  }
  return result;
}

/// For each (name, offset, bytes) a list of (name, offset, bytes, CRC-32), or None.
py::list records_binding(const std::string& root, const py::iterable& items) {
  std::vector<Window> windows;
  for (const auto& item : items) {
    const auto fields = py::reinterpret_borrow<py::tuple>(item);
    windows.push_back({fields[0].cast<std::string>(), fields[1].cast<std::uint64_t>(),
                       fields[2].cast<std::uint64_t>()});
  }
  const Waker waker{py::none()};
  std::vector<std::optional<std::vector<Record>>> found;
  {
    const GilReleased released;
    found = find_records(root, windows, [&] { waker(0, 0); });
  }
  const CollectorPaused paused;
  py::list result(found.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!found[i]) {
      result[i] = py::none();
      continue;
    }
    py::list records(found[i]->size());
    for (std::size_t k = 0; k < found[i]->size(); ++k) {
      const Record& record = (*found[i])[k];
      records[k] = py::make_tuple(text(record.name), record.offset, record.bytes, record.crc32);
    }
    result[i] = records;
  }
  return result;
}

CrcImplementation implementation_called(const std::string& name) {
  for (const auto& usable : usable_implementations()) {
    if (usable.name == name) return usable;
  }
  throw py::value_error("no such implementation on this processor: " + name);
}

template <typename Function, typename Value>
Value crc_of(Function function, const py::object& data, Value value) {
  const BufferView view(data);
  constexpr std::size_t kWorthReleasing =
      4096;  // bytes; below it the lock costs more than the digest
  if (view.size() < kWorthReleasing) {
    return static_cast<Value>(function(value, view.data(), view.size()));
  }
  const GilReleased released;
  return static_cast<Value>(function(value, view.data(), view.size()));
}

std::uint64_t crc64_binding(const py::object& data, std::uint64_t value, const std::string& name) {
  return crc_of(name == "auto" ? crc64 : implementation_called(name).crc64, data, value);
}

std::uint32_t crc32_binding(const py::object& data, std::uint32_t value, const std::string& name) {
  if (name == "auto") return crc_of(crc32, data, value);
  return crc_of(implementation_called(name).crc32, data, value);
}

void write_range_binding(const std::string& folder, const std::string& name, const py::object& data,
                         std::uint64_t offset) {
  const BufferView view(data);
  const GilReleased released;
  write_range(folder, name, view.data(), view.size(), offset);
}

}  // namespace
}  // namespace ckptstore

PYBIND11_MODULE(_native, module) {
  using namespace ckptstore;  // NOLINT: the module's own names

  module.doc() = "The C++ engine of ckptstore. Private: use ckptstore.native.";
  native_error = PyErr_NewException("ckptstore._native.NativeError", PyExc_Exception, nullptr);
  if (native_error == nullptr) throw py::error_already_set();
  module.add_object("NativeError", py::reinterpret_borrow<py::object>(native_error));
  py::register_local_exception_translator(translate);

  module.def("copy_files", copy_binding, py::arg("source"), py::arg("destination"),
             py::arg("files"), py::kw_only(), py::arg("threads"), py::arg("block_bytes"),
             py::arg("chunk_bytes"), py::arg("strategy"), py::arg("durable"),
             py::arg("verify_after_write"), py::arg("nice"), py::arg("resume"),
             py::arg("progress"));
  module.def("digest_files", digest_binding, py::arg("root"), py::arg("files"), py::kw_only(),
             py::arg("sums"), py::arg("threads"), py::arg("chunk_bytes"), py::arg("direct"),
             py::arg("nice"), py::arg("progress"));
  module.def("read_files", read_binding, py::arg("root"), py::arg("files"), py::arg("wanted"),
             py::kw_only(), py::arg("threads"), py::arg("chunk_bytes"), py::arg("progress"));
  module.def("scan_tree", scan_binding, py::arg("root"), py::kw_only(), py::arg("max_depth"),
             py::arg("wanted"), py::arg("wanted_bytes"), py::arg("threads"), py::arg("folder_type"),
             py::arg("entry_type"));
  module.def("find_records", records_binding, py::arg("root"), py::arg("windows"));
  module.def("crc64", crc64_binding, py::arg("data"), py::arg("value"), py::arg("implementation"));
  module.def("crc64_combine", crc64_combine, py::arg("a"), py::arg("b"), py::arg("b_bytes"));
  module.def("crc32", crc32_binding, py::arg("data"), py::arg("value"), py::arg("implementation"));
  module.def("crc32_combine", crc32_combine, py::arg("a"), py::arg("b"), py::arg("b_bytes"));
  module.def("implementations", [] {
    std::vector<std::string> names;
    for (const auto& usable : usable_implementations()) names.emplace_back(usable.name);
    return names;
  });
  module.def("rename_with", rename_with, py::arg("a"), py::arg("b"), py::arg("flags"),
             py::call_guard<GilReleased>());
  module.def("write_range", write_range_binding, py::arg("folder"), py::arg("name"),
             py::arg("data"), py::arg("offset"));
  module.def("allocate", allocate, py::arg("fd"), py::arg("bytes"), py::arg("path"),
             py::call_guard<GilReleased>());
  module.def("be_nice", be_nice, py::arg("nice"));
  module.def("sync_path", sync_path, py::arg("path"), py::call_guard<GilReleased>());
  module.def("supports_direct", supports_direct, py::arg("folder"), py::call_guard<GilReleased>());
  bind_weights(module);
  module.attr("STRATEGIES") = py::make_tuple("clone", "direct", "warm", "buffered", "auto");
}
