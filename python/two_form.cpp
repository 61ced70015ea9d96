#include "gti/two_form.h"

#include <algorithm>

#include "bindings.h"
#include "tensors.h"

namespace gti {

namespace {

struct TwoFormResult : KernelResult {
  std::vector<int64_t> shape;
  bool with_metric;
  std::vector<double> numbers;  // omega, error_bound, metric: of `shape` each

  TwoFormResult(std::vector<int64_t> shape, bool with_metric, int64_t size)
      : shape(std::move(shape)), with_metric(with_metric), numbers((with_metric ? 3 : 2) * size) {}

  int64_t size() const { return static_cast<int64_t>(numbers.size()) / (with_metric ? 3 : 2); }
  double* matrix(int64_t i) { return numbers.data() + i * size(); }
  py::object tensor(int64_t i) {
    double* to;
    py::object out = new_tensor(shape, &to);
    std::copy_n(matrix(i), size(), to);
    return out;
  }
  py::object field(std::string_view name) override {
    if (name == "error_bound") return tensor(1);
    return with_metric ? tensor(2) : py::object(py::none());
  }
};

// dq, dp: tensors [m, N] or [batch, m, N], or lists of [m, ...]. The pair (omega, capsule of a
// TwoFormResult), or None where an argument is not what the kernel takes.
py::object run(py::handle dq, py::handle dp, bool metric, bool recording, int threads) {
  std::vector<View> qs, ps;
  if (!views_of(dq, qs, recording) || !views_of(dp, ps, recording) || qs.size() != ps.size() ||
      qs.empty())
    return py::none();
  const bool list = PyList_Check(dq.ptr());
  const int32_t least = list ? 1 : 2;  // axes: [m] of a 0-d parameter, in a list
  if (qs[0].ndim < least) return py::none();
  const bool batched = !list && qs[0].ndim > 2;
  if (batched && qs[0].ndim > 3) return py::none();
  const int64_t batch = batched ? qs[0].shape[0] : 1, m = qs[0].shape[batched];
  std::vector<TwoFormItem> items;
  for (size_t i = 0; i < qs.size(); ++i) {
    const View &q = qs[i], &p = ps[i];
    if (q.ndim < least || q.shape[batched] != m || m == 0 || batch == 0 || !is_contiguous(q) ||
        !is_contiguous(p) || !same_layout(q, p))
      return py::none();
    if (q.count > 0) items.push_back({q.dtype, q.count / (batch * m), q.data, p.data});
  }
  if (items.empty()) return py::none();
  std::vector<int64_t> shape{m, m};
  if (batched) shape.insert(shape.begin(), batch);
  auto result = std::make_unique<TwoFormResult>(std::move(shape), metric, batch * m * m);
  without_gil(qs, static_cast<double>(m), [&] {
    two_form(items.data(), items.size(), batch, m, result->matrix(0), result->matrix(1),
             metric ? result->matrix(2) : nullptr, threads);
  });
  const py::object omega = result->tensor(0);
  return py::make_tuple(omega, in_capsule(std::move(result)));
}

}  // namespace

void bind_two_form(py::module_& module) { module.def("two_form", &run); }

}  // namespace gti
