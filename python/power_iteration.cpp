#include "gti/power_iteration.h"

#include "bindings.h"
#include "tensors.h"

namespace gti {

// weights: list of [out, ...], each one matrix [out, −1], or, batched, of [...,
// m, n]; u, v: lists of B·m, B·n elements of the compute type; start: list of
// B·n elements or empty; numbers: fp64 [3, M] for σ, residual, upper of all M
// matrices; counts: address of int64 [M]; flags: address of bool [M]. Written:
// u, v, numbers, counts, flags. False where the tensors are not what the kernel
// takes: then nothing has been touched.
static bool py_power_iteration(const py::list& weights, bool batched, const py::list& u,
                               const py::list& v, const py::list& start, const py::object& numbers,
                               intptr_t counts, intptr_t flags, const std::string& method,
                               int64_t max_steps, double tol, uint64_t seed, int threads) {
  std::vector<View> ws, us, vs, starts;
  View all;
  if (!views_of(weights, ws) || !views_of(u, us) || !views_of(v, vs) || !views_of(start, starts) ||
      !view_of(numbers, all) || all.dtype != DType::f64)
    return false;
  if (us.size() != ws.size() || vs.size() != ws.size() ||
      (!starts.empty() && starts.size() != ws.size()))
    return false;
  struct Size {
    int64_t batch, m, n;
  };
  std::vector<Size> sizes;
  int64_t total = 0;
  for (const View& w : ws) {
    if (w.ndim < 2) return false;
    Size size{1, w.shape[0], 1};
    if (batched) size = {1, w.shape[w.ndim - 2], w.shape[w.ndim - 1]};
    for (int32_t d = batched ? 0 : 1; d < (batched ? w.ndim - 2 : w.ndim); ++d)
      (batched ? size.batch : size.n) *= w.shape[d];
    sizes.push_back(size);
    total += size.batch;
  }
  if (all.count != 3 * total || !is_contiguous(all)) return false;
  auto* sigma = reinterpret_cast<double*>(all.data);
  std::vector<PowerIterationItem> items(ws.size());
  int64_t at = 0;
  for (size_t i = 0; i < ws.size(); ++i) {
    const View& w = ws[i];
    const auto [batch, m, n] = sizes[i];
    const DType compute = w.dtype == DType::f64 ? DType::f64 : DType::f32;
    const auto fits = [compute, count = batch](const View& x, int64_t length) {
      return x.dtype == compute && x.count == count * length && is_contiguous(x);
    };
    if (!is_contiguous(w) || !fits(us[i], m) || !fits(vs[i], n) ||
        (!starts.empty() && !fits(starts[i], n)))
      return false;
    items[i] = {w.dtype,
                batch,
                m,
                n,
                w.data,
                starts.empty() ? nullptr : starts[i].data,
                us[i].data,
                vs[i].data,
                sigma + at,
                sigma + total + at,
                sigma + 2 * total + at,
                reinterpret_cast<int64_t*>(counts) + at,
                reinterpret_cast<bool*>(flags) + at};
    at += batch;
  }
  const auto how = method == "power" ? PowerMethod::power : PowerMethod::cg;
  py::gil_scoped_release release;
  power_iteration(items.data(), items.size(), how, max_steps, tol, seed, threads);
  return true;
}

void bind_power_iteration(py::module_& module) {
  module.def("power_iteration", &py_power_iteration);
}

}  // namespace gti
