// engine.ops._host: what runs on the host without torch. Arrays in, arrays out; the GIL is released in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host operations of the engine that need no torch.";
  m.def("plan", &plan, py::arg("costs"), py::arg("work"), py::arg("budget"), py::arg("ranks"));
}
