#include "bind_weights.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "gil.h"
#include "weights.h"

namespace py = pybind11;

namespace ckptstore {
namespace {

/// (kind, what, path, number), as native.py takes errors.
py::tuple describe(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const IoError& io) {
    return py::make_tuple("io", io.operation, py::bytes(io.path), io.code);
  } catch (const SourceChanged& changed) {
    return py::make_tuple("changed", changed.reason, py::bytes(changed.name), 0);
  } catch (const Refused& refused) {
    return py::make_tuple("refused", refused.reason, py::bytes(refused.path), 0);
  }
}

std::vector<Region> regions_from(const py::iterable& items) {
  std::vector<Region> regions;
  for (const auto& item : items) {
    const auto fields = py::reinterpret_borrow<py::tuple>(item);
    Region& region = regions.emplace_back();
    region.name = fields[0].cast<std::string>();
    region.offset = fields[1].cast<std::uint64_t>();
    region.bytes = fields[2].cast<std::uint64_t>();
    const auto dtype = fields[3].cast<unsigned>();
    if (dtype >= kDtypes) throw py::value_error("no such dtype");
    region.dtype = static_cast<Dtype>(dtype);
    if (region.bytes % item_bytes(region.dtype) != 0) throw py::value_error("half a number");
  }
  return regions;
}

py::object position(std::uint64_t value) {
  if (value == WeightStats::kNone) return py::int_(-1);
  return py::int_(value);
}

py::list scan_binding(const std::string& root, const py::iterable& items, unsigned threads,
                      const py::object& progress) {
  const auto regions = regions_from(items);
  const auto wake = [&](std::uint64_t done, std::uint64_t total) {
    const GilHeld gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, total);
  };
  std::vector<WeightOutcome> outcomes;
  {
    const GilReleased released;
    outcomes = scan_weights(root, regions, threads, wake);
  }
  py::list result;
  for (const auto& outcome : outcomes) {
    if (outcome.error) {
      result.append(describe(outcome.error));
      continue;
    }
    const WeightStats& stats = outcome.stats;
    result.append(py::make_tuple(
        stats.count, stats.nan, stats.infinite, position(stats.first_nonfinite), stats.zero_blocks,
        position(stats.first_zero_block), stats.sum_squares, stats.min, stats.max, stats.crc));
  }
  return result;
}

}  // namespace

void bind_weights(py::module_& module) {
  module.def("scan_weights", scan_binding, py::arg("root"), py::arg("regions"), py::kw_only(),
             py::arg("threads"), py::arg("progress"));
}

}  // namespace ckptstore
