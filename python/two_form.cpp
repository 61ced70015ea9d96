#include "gti/two_form.h"

#include "bindings.h"
#include "tensors.h"

namespace gti {

// dq, dp: lists of [m, N_t]; omega, bound and, unless None, metric: fp64 [m,
// m], written. False where the tensors are not what the kernel takes: then
// nothing has been touched.
static bool py_two_form(const py::list& dq, const py::list& dp, const py::object& omega,
                        const py::object& bound, const py::object& metric, int threads) {
  std::vector<View> qs, ps;
  View out[3];
  if (!views_of(dq, qs) || !views_of(dp, ps) || qs.size() != ps.size() || qs.empty()) return false;
  const bool with_metric = !metric.is_none();
  if (qs[0].ndim != 2 || !view_of(omega, out[0]) || !view_of(bound, out[1]) ||
      (with_metric && !view_of(metric, out[2])))
    return false;
  const int64_t m = qs[0].shape[0];
  for (int i = 0; i < (with_metric ? 3 : 2); ++i)
    if (out[i].dtype != DType::f64 || out[i].count != m * m || !is_contiguous(out[i])) return false;
  std::vector<TwoFormItem> items(qs.size());
  for (size_t i = 0; i < qs.size(); ++i) {
    if (qs[i].ndim != 2 || qs[i].shape[0] != m || !is_contiguous(qs[i]) || !is_contiguous(ps[i]) ||
        ps[i].ndim != 2 || ps[i].shape[0] != m || ps[i].shape[1] != qs[i].shape[1] ||
        ps[i].dtype != qs[i].dtype)
      return false;
    items[i] = {qs[i].dtype, qs[i].shape[1], qs[i].data, ps[i].data};
  }
  py::gil_scoped_release release;
  two_form(items.data(), items.size(), m, reinterpret_cast<double*>(out[0].data),
           reinterpret_cast<double*>(out[1].data),
           with_metric ? reinterpret_cast<double*>(out[2].data) : nullptr, threads);
  return true;
}

void bind_two_form(py::module_& module) { module.def("two_form", &py_two_form); }

}  // namespace gti
