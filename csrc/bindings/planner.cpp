// moe_overlap.native._planner: the torch-free part of the core for Python. Integers and seconds in, seconds out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "core/churn.h"
#include "core/placement.h"
#include "core/replication.h"
#include "core/row_split.h"
#include "core/search.h"
#include "core/simulate.h"

namespace py = pybind11;

namespace {

using Ints = std::vector<int64_t>;
using Seconds = std::vector<double>;
using IntArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Of (expert, rank, rows): by hand, as there are hundreds in the decision of every step.
std::vector<moe_overlap::Seat> seats_from(const py::tuple& seats) {
  std::vector<moe_overlap::Seat> found;
  found.reserve(seats.size());
  for (const py::handle seat : seats) {
    std::array<int64_t, 3> numbers{};
    if (!PyTuple_Check(seat.ptr()) || PyTuple_GET_SIZE(seat.ptr()) != 3) throw std::invalid_argument("seats of three");
    for (size_t i = 0; i < 3; ++i) {
      numbers[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(seat.ptr(), static_cast<Py_ssize_t>(i)));
      if (numbers[i] == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    found.push_back({numbers[0], numbers[1], numbers[2]});
  }
  return found;
}

py::tuple seats_to(const std::vector<moe_overlap::Seat>& seats) {
  py::tuple found(seats.size());
  for (size_t i = 0; i < seats.size(); ++i) {
    found[i] = py::make_tuple(seats[i].expert, seats[i].rank, seats[i].rows);
  }
  return found;
}

std::tuple<double, double, bool, py::tuple, bool> decide_replication(const IntArray& counts, int64_t ranks_per_node,
                                                                     const py::tuple& seats, std::vector<int64_t> spare,
                                                                     bool refetched,
                                                                     const std::vector<std::array<double, 16>>& phases,
                                                                     int64_t most_copies, double margin) {
  if (counts.ndim() != 2) throw std::invalid_argument("counts must be [ranks, experts]");
  moe_overlap::Load load{};
  load.ranks = counts.shape(0);
  load.experts = counts.shape(1);
  load.ranks_per_node = ranks_per_node;
  load.counts = counts.data();
  load.seats = seats_from(seats);
  load.spare = std::move(spare);
  load.refetched = refetched;
  for (const auto& p : phases) {
    load.phases.push_back({p[0],
                           p[1],
                           p[2],
                           {{{p[3], p[4]}, {p[5], p[6]}}},
                           {{{p[7], p[8]}, {p[9], p[10]}}},
                           p[11],
                           p[12],
                           p[13] != 0,
                           p[14] != 0,
                           p[15] != 0});
  }
  load.most_copies = most_copies;
  load.margin = margin;
  const moe_overlap::Decision found = moe_overlap::decide(load);
  return {found.left_s, found.predicted_s, found.left, seats_to(found.seats), found.relayed};
}

IntArray split_rows(const IntArray& counts, const py::tuple& seats, int64_t ranks_per_node) {
  if (counts.ndim() != 2) throw std::invalid_argument("counts must be [ranks, experts]");
  const auto found =
      moe_overlap::split_rows(counts.data(), counts.shape(0), counts.shape(1), seats_from(seats), ranks_per_node);
  IntArray rows({static_cast<py::ssize_t>(found.size()), py::ssize_t{3}});
  auto* out = rows.mutable_data();
  for (const auto& one : found) {
    for (const int64_t number : {one.source, one.seat, one.rows}) *out++ = number;
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_planner, module) {
  module.doc() = "Exact event simulation of schedules and the search over them (C++17, no torch).";
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
  py::class_<moe_overlap::Cut>(module, "Cut")
      .def(py::init([](double head_s, double tail_s, double issue_s, double compute_slowdown, double wire_slowdown,
                       Seconds ops_s, Seconds first_s, Seconds experts_s, Seconds second_s, Seconds deferred_s,
                       Seconds ahead_s, Seconds last_s, Seconds fetch_s, Seconds return_s) {
             return moe_overlap::Cut{head_s,
                                     tail_s,
                                     issue_s,
                                     compute_slowdown,
                                     wire_slowdown,
                                     std::move(ops_s),
                                     std::move(first_s),
                                     std::move(experts_s),
                                     std::move(second_s),
                                     std::move(deferred_s),
                                     std::move(ahead_s),
                                     std::move(last_s),
                                     std::move(fetch_s),
                                     std::move(return_s)};
           }),
           py::arg("head_s"), py::arg("tail_s"), py::arg("issue_s"), py::arg("compute_slowdown"),
           py::arg("wire_slowdown"), py::arg("ops_s"), py::arg("first_s"), py::arg("experts_s"), py::arg("second_s"),
           py::arg("deferred_s"), py::arg("ahead_s") = Seconds{}, py::arg("last_s") = Seconds{},
           py::arg("fetch_s") = Seconds{}, py::arg("return_s") = Seconds{},
           "The seconds of one way of cutting the exchange.");
  module.def(
      "search",
      [](const std::vector<std::tuple<moe_overlap::Cut, bool, bool>>& cuts, size_t limit) {
        std::vector<moe_overlap::Asked> asked;
        for (const auto& [cut, joined, overlapped] : cuts) asked.push_back({cut, joined, overlapped});
        std::vector<std::vector<std::tuple<double, bool, Ints, Ints>>> found;
        for (auto& of_cut : moe_overlap::search(asked, limit)) {
          auto& placements = found.emplace_back();
          for (auto& [predicted_s, joined, order] : of_cut) {
            placements.emplace_back(predicted_s, joined, std::move(order.chunk_order), std::move(order.ops_before));
          }
        }
        return found;
      },
      py::arg("cuts"), py::arg("limit") = 0,
      "cuts: (cut, whether its joined placement is asked for, whether its others are). (predicted_s, joined, "
      "chunk_order, ops_before) of the candidates of each; with a limit above 0 without some of those that so many "
      "others are faster than.");
  module.def(
      "makespan_s",
      [](const moe_overlap::Cut& cut, std::vector<int64_t> chunk_order, std::vector<int64_t> ops_before, bool joined) {
        return moe_overlap::makespan_s(cut, {std::move(chunk_order), std::move(ops_before)}, joined);
      },
      py::arg("cut"), py::arg("chunk_order"), py::arg("ops_before"), py::arg("joined"),
      "Seconds of one order of a cut, with its copies of experts.");
  module.def(
      "decide_replication", &decide_replication, py::arg("counts"), py::arg("ranks_per_node"), py::arg("seats"),
      py::arg("spare"), py::arg("refetched"), py::arg("phases"), py::arg("most_copies"), py::arg("margin"),
      "(left_s, predicted_s, left, seats (expert, rank, rows), relayed): leave rows, move them, or copy experts.");
  module.def("split_rows", &split_rows, py::arg("counts"), py::arg("seats"), py::arg("ranks_per_node"),
             "int64 [N, 3] (source, number of the seat, rows) of the experts with several seats.");
  module.def(
      "eplb",
      [](std::vector<std::vector<double>> loads, const Ints& slots, const Ints& homes, int64_t nodes, int64_t groups,
         bool distinct) {
        std::vector<Ints> found;
        for (auto& load : loads)
          found.push_back(moe_overlap::eplb({std::move(load), slots, homes}, nodes, groups, distinct));
        return found;
      },
      py::arg("loads"), py::arg("slots"), py::arg("homes"), py::arg("nodes"), py::arg("groups"), py::arg("distinct"),
      "The experts of all slots, rank by rank, for each of the loads.");
  module.def(
      "proportional",
      [](std::vector<std::vector<double>> loads, const Ints& slots, const Ints& homes, bool contiguous) {
        std::vector<Ints> found;
        for (auto& load : loads)
          found.push_back(moe_overlap::proportional({std::move(load), slots, homes}, contiguous));
        return found;
      },
      py::arg("loads"), py::arg("slots"), py::arg("homes"), py::arg("contiguous"),
      "The experts of all slots, rank by rank, for each of the loads.");
  module.def(
      "kept",
      [](Ints wanted, Ints slots, Ints old, Ints old_slots, const Ints& old_homes, int64_t node_size) {
        auto found = moe_overlap::kept({std::move(wanted), std::move(slots)}, {std::move(old), std::move(old_slots)},
                                       old_homes, node_size);
        return std::make_tuple(std::move(found.experts), std::move(found.homes), std::move(found.slots));
      },
      py::arg("wanted"), py::arg("slots"), py::arg("old"), py::arg("old_slots"), py::arg("old_homes"),
      py::arg("node_size"),
      "(experts of the slots, home slots, slots of the ranks): as wanted, as near to what there was as can be.");
  module.def("assign", &moe_overlap::assign, py::arg("cost"), "The column of each row with the least sum of costs.");
}
