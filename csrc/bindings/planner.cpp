// moe_overlap._planner: the torch-free part of the core for Python. Integers and seconds in, seconds out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <utility>
#include <vector>

#include "core/simulate.h"

namespace py = pybind11;

PYBIND11_MODULE(_planner, module) {
  module.doc() = "Exact event simulation of schedules (C++17, no torch).";
  module.def(
      "simulate",
      [](const std::vector<int64_t>& lane_of_action, const std::vector<double>& duration_s,
         const std::vector<std::vector<int64_t>>& deps, const std::map<int64_t, double>& slowdown) {
        std::vector<std::pair<double, double>> times;
        times.reserve(lane_of_action.size());
        for (const auto& t : moe_overlap::simulate(lane_of_action, duration_s, deps, slowdown)) {
          times.emplace_back(t.start_s, t.end_s);
        }
        return times;
      },
      py::arg("lane_of_action"), py::arg("duration_s"), py::arg("deps"),
      py::arg("slowdown") = std::map<int64_t, double>{},
      "(start_s, end_s) of every action; ValueError names the first action of a deadlock.");
}
