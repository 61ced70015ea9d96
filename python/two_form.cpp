#include "gti/two_form.h"

#include <algorithm>

#include "bindings.h"
#include "tensors.h"

namespace gti {

namespace {

// What the kernel wrote, made into tensors where they are asked for.
struct TwoFormResult {
  int64_t m;
  bool with_metric;
  std::vector<double> numbers;  // omega, error_bound, metric: [m, m] each

  double* matrix(int64_t i) { return numbers.data() + i * m * m; }
  py::object tensor(int64_t i) {
    double* to;
    py::object out = new_tensor({m, m}, &to);
    std::copy_n(matrix(i), m * m, to);
    return out;
  }
};

// dq, dp: tensors [m, ...] or lists of them. A TwoFormResult, or None where an argument is not what
// the kernel takes.
py::object run(py::handle dq, py::handle dp, bool metric, bool recording, int threads) {
  std::vector<View> qs, ps;
  if (!views_of(dq, qs, recording) || !views_of(dp, ps, recording) || qs.size() != ps.size() ||
      qs.empty() || qs[0].ndim < 2)
    return py::none();
  const int64_t m = qs[0].shape[0];
  std::vector<TwoFormItem> items(qs.size());
  int64_t coordinates = 0;
  for (size_t i = 0; i < qs.size(); ++i) {
    const View &q = qs[i], &p = ps[i];
    if (q.ndim < 2 || q.shape[0] != m || m == 0 || !is_contiguous(q) || !is_contiguous(p) ||
        !same_layout(q, p))
      return py::none();
    items[i] = {q.dtype, q.count / m, q.data, p.data};
    coordinates += q.count / m;
  }
  if (coordinates == 0) return py::none();
  TwoFormResult result{m, metric, std::vector<double>((metric ? 3 : 2) * m * m)};
  without_gil(qs, static_cast<double>(m), [&] {
    two_form(items.data(), items.size(), m, result.matrix(0), result.matrix(1),
             metric ? result.matrix(2) : nullptr, threads);
  });
  return py::cast(std::move(result));
}

}  // namespace

void bind_two_form(py::module_& module) {
  py::class_<TwoFormResult>(module, "TwoForm")
      .def_property_readonly("omega", [](TwoFormResult& r) { return r.tensor(0); })
      .def_property_readonly("error_bound", [](TwoFormResult& r) { return r.tensor(1); })
      .def_property_readonly("metric", [](TwoFormResult& r) {
        return r.with_metric ? r.tensor(2) : py::object(py::none());
      });
  module.def("two_form", &run);
}

}  // namespace gti
