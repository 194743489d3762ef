// What a job can fail with. module.cpp turns each into a description that native.py maps to
// errors.py.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace ckptstore {

/// A system call failed for good. EINTR and short transfers are dealt with in file.cpp and never
/// get here.
struct IoError : std::exception {
  IoError(std::string operation_, std::string path_, int code_)
      : operation(std::move(operation_)), path(std::move(path_)), code(code_) {}
  const char* what() const noexcept override { return operation.c_str(); }

  std::string operation;  ///< the system call, in plain words: "open", "write", "sync"
  std::string path;       ///< bytes as the kernel takes them, not necessarily UTF-8
  int code;               ///< errno, > 0
};

/// Bytes read are not those that the caller said they would be.
struct ChunkMismatch : std::exception {
  ChunkMismatch(std::string name_, std::uint64_t offset_, bool read_back_)
      : name(std::move(name_)), offset(offset_), read_back(read_back_) {}
  const char* what() const noexcept override { return "digest mismatch"; }

  std::string name;      ///< relative to the root
  std::uint64_t offset;  ///< first byte of the chunk
  bool read_back;  ///< true: the destination, read again after it was written; false: the source
};

/// A range of a file does not have the CRC-32 that was left of it.
struct SumMismatch : std::exception {
  SumMismatch(std::string name_, std::uint64_t offset_) : name(std::move(name_)), offset(offset_) {}
  const char* what() const noexcept override { return "CRC-32 mismatch"; }

  std::string name;      ///< relative to the root
  std::uint64_t offset;  ///< first byte of the range
};

/// The source is not, or no longer, the file that was planned.
struct SourceChanged : std::exception {
  SourceChanged(std::string name_, std::string reason_)
      : name(std::move(name_)), reason(std::move(reason_)) {}
  const char* what() const noexcept override { return reason.c_str(); }

  std::string name;    ///< relative to the root
  std::string reason;  ///< completes the sentence "NAME …"
};

/// Something that is never read or written: a link, a pipe, a device, a name that leaves the root.
struct Refused : std::exception {
  Refused(std::string path_, std::string reason_)
      : path(std::move(path_)), reason(std::move(reason_)) {}
  const char* what() const noexcept override { return reason.c_str(); }

  std::string path;
  std::string reason;  ///< completes the sentence "PATH …"
};

/// Thrown in a worker that finds the job cancelled; never the error that is reported.
struct Cancelled : std::exception {
  const char* what() const noexcept override { return "cancelled"; }
};

}  // namespace ckptstore
