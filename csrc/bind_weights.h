// Adds scan_weights to the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace ckptstore {

void bind_weights(pybind11::module_& module);

}  // namespace ckptstore
