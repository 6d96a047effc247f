// engine.ops._host: what runs on the host without torch. Arrays in, arrays out; the GIL is released in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "../api/pack.h"
#include "../pack/planner.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

py::array_t<int32_t> to_array(const std::vector<int32_t>& values) {
  return py::array_t<int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple plan(const Array<int64_t>& costs, const Array<double>& work, int64_t budget, int32_t ranks) {
  leeway::Plan result;
  {
    py::gil_scoped_release release;
    result = leeway::plan(view(costs), view(work), budget, ranks);
  }
  return py::make_tuple(result.num_micro, to_array(result.rank), to_array(result.micro));
}

void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

// The runs [starts[i], starts[i] + bounds[i + 1] - bounds[i]) of `size` elements, one behind the other.
std::vector<int32_t> check_runs(std::span<const int64_t> starts, std::span<const int64_t> bounds, int64_t size) {
  require(bounds.size() == starts.size() + 1 && bounds[0] == 0, "bounds: must be one more than starts, from 0 on");
  require(bounds.back() <= std::numeric_limits<int32_t>::max(), "bounds: pass 2^31");
  for (size_t i = 0; i < starts.size(); ++i) {
    require(bounds[i] <= bounds[i + 1], "bounds: fall at run " + std::to_string(i));
    require(starts[i] >= 0 && starts[i] <= size - (bounds[i + 1] - bounds[i]),
            "starts: run " + std::to_string(i) + " does not lie within the columns");
  }
  return {bounds.begin(), bounds.end()};
}

std::vector<py::array> gather(const std::vector<py::array>& columns, const Array<int64_t>& starts,
                              const Array<int64_t>& bounds) {
  const int64_t size = columns.empty() ? 0 : columns[0].size();
  const std::vector<int32_t> runs = check_runs(view(starts), view(bounds), size);
  LeewayMove move{{runs.back(), static_cast<int64_t>(runs.size()) - 1, runs.data()}, starts.data(), size, nullptr, 0, {}};
  require(columns.size() <= LEEWAY_MOST_STREAMS, "columns: more than " + std::to_string(LEEWAY_MOST_STREAMS));
  std::vector<py::array> gathered;
  for (const py::array& column : columns) {
    const auto width = static_cast<int32_t>(column.itemsize());
    require(column.ndim() == 1 && column.size() == size && (column.flags() & py::array::c_style),
            "columns: must be contiguous, of one dimension and one length");
    require(column.dtype().kind() != 'O', "columns: objects cannot be copied");
    require(width == 1 || width == 2 || width == 4 || width == 8, "columns: elements of 1, 2, 4 or 8 bytes are needed");
    gathered.emplace_back(column.dtype(), py::ssize_t{runs.back()});
    move.streams[move.num_streams++] = {column.data(), gathered.back().mutable_data(), width, 0};
  }
  py::gil_scoped_release release;
  leeway_pack_cpu(&move, 0, runs.back());
  return gathered;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host operations of the engine that need no torch.";
  m.def("plan", &plan, py::arg("costs"), py::arg("work"), py::arg("budget"), py::arg("ranks"));
  m.def("gather", &gather, py::arg("columns"), py::arg("starts"), py::arg("bounds"),
        "Runs of each column, one behind the other: run i begins at starts[i] and comes to lie at bounds[i].");
}
