#include "gti/two_form.h"

#include "bindings.h"
#include "tensors.h"

namespace gti {

// dq, dp: tensors [m, ...] or lists of them. The tuple (omega, bound, metric or None), or None
// where an argument is not what the kernel takes.
static py::object py_two_form(py::handle dq, py::handle dp, bool metric, bool recording,
                              int threads) {
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
  double *omega, *bound, *gram = nullptr;
  py::object omega_tensor = new_tensor({m, m}, &omega), bound_tensor = new_tensor({m, m}, &bound),
             metric_tensor = py::none();
  if (metric) metric_tensor = new_tensor({m, m}, &gram);
  without_gil(qs, static_cast<double>(m),
              [&] { two_form(items.data(), items.size(), m, omega, bound, gram, threads); });
  return py::make_tuple(omega_tensor, bound_tensor, metric_tensor);
}

void bind_two_form(py::module_& module) { module.def("two_form", &py_two_form); }

}  // namespace gti
