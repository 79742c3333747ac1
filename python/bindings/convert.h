// Translation between Python objects and the plain structs of the public API. Needs the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include "framequilt/engine.h"

namespace fq::python {

// Raises the framequilt.errors exception that belongs to the code.
[[noreturn]] void raise(const Error& error);

// Keys that Request does not have, and values of the wrong type, raise
// framequilt.errors.InvalidArgument.
Request request_from_dict(const pybind11::dict& request);
pybind11::dict event_to_dict(Event event);
pybind11::dict plan_to_dict(const MemoryPlan& plan);
pybind11::dict stats_to_dict(const EngineStats& stats);

}  // namespace fq::python
