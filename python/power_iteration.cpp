#include "gti/power_iteration.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "bindings.h"
#include "tensors.h"

namespace gti {

// weights: a tensor [..., m, n], or a list of tensors [out, ...], each one matrix [out, −1]; start:
// None, or right vectors for them, a tensor or a list. The tuple (sigma, u, v, residual, steps,
// converged, upper) in the shapes of the public result, or None where an argument is not what the
// kernel takes.
static py::object py_power_iteration(py::handle weights, py::handle start, int k,
                                     std::string_view method, int64_t max_steps, double tol,
                                     uint64_t seed, int threads) {
  const bool list = PyList_Check(weights.ptr());
  std::vector<View> ws, starts;
  if (!views_of(weights, ws) || ws.empty() || (!start.is_none() && !views_of(start, starts)) ||
      (!starts.empty() && starts.size() != ws.size()) || max_steps < 1 || k < 1 ||
      k > kMaxTriples || !(tol >= 0.0 && std::isfinite(tol)) ||
      (method != "cg" && method != "power"))
    return py::none();
  std::vector<PowerIterationItem> items(ws.size());
  std::vector<int64_t> all;  // the axes of the matrices
  int64_t total = 0;
  bool any_double = false;
  for (size_t i = 0; i < ws.size(); ++i) {
    const View& w = ws[i];
    if (w.ndim < 2 || !is_contiguous(w)) return py::none();
    const DType compute = w.dtype == DType::f64 ? DType::f64 : DType::f32;
    const int64_t m = list ? w.shape[0] : w.shape[w.ndim - 2];
    if (m == 0 || (list ? w.count : w.shape[w.ndim - 1]) == 0) return py::none();
    const int64_t n = list ? w.count / m : w.shape[w.ndim - 1], batch = w.count / (m * n);
    if (k > std::min(m, n)) return py::none();
    items[i] = {w.dtype, batch, m, n, w.data, nullptr};
    if (!starts.empty()) {
      const View& v = starts[i];
      if (v.dtype != compute || v.count != batch * n * k || !is_contiguous(v)) return py::none();
      items[i].start = v.data;
    }
    total += batch;
    any_double |= compute == DType::f64;
    if (!list) all.assign(w.shape, w.shape + w.ndim - 2);
  }
  if (list) all = {total};
  const auto with = [](std::vector<int64_t> shape, std::initializer_list<int64_t> more) {
    shape.insert(shape.end(), more);
    return shape;
  };
  py::list us, vs;
  for (auto& item : items) {
    const auto vectors = [&](int64_t length, void*& data) -> py::object {
      const auto shape = with(list ? std::vector<int64_t>{} : all, {length, k});
      if (item.dtype == DType::f64) return new_tensor(shape, reinterpret_cast<double**>(&data));
      return new_tensor(shape, reinterpret_cast<float**>(&data));
    };
    us.append(vectors(item.m, item.u));
    vs.append(vectors(item.n, item.v));
  }
  int64_t* steps;
  bool* converged;
  py::object steps_tensor = new_tensor(all, &steps), flags_tensor = new_tensor(all, &converged);
  std::vector<double> numbers((2 * k + 1) * total);  // σ, residual, upper
  int64_t at = 0;
  for (auto& item : items) {
    item.sigma = numbers.data() + k * at;
    item.residual = numbers.data() + k * (total + at);
    item.upper = numbers.data() + 2 * k * total + at;
    item.steps = steps + at;
    item.converged = converged + at;
    at += item.batch;
  }
  const auto how = method == "power" ? PowerMethod::power : PowerMethod::cg;
  without_gil(ws, static_cast<double>(k) * static_cast<double>(max_steps), [&] {
    power_iteration(items.data(), items.size(), k, how, max_steps, tol, seed, threads);
  });
  const auto copy = [&](int64_t from, std::initializer_list<int64_t> more) -> py::object {
    const auto shape = with(all, more);
    const int64_t count = more.size() ? k * total : total;
    const auto fill = [&](auto* to) {
      py::object tensor = new_tensor(shape, &to);
      std::copy_n(numbers.data() + from, count, to);
      return tensor;
    };
    return any_double ? fill(static_cast<double*>(nullptr)) : fill(static_cast<float*>(nullptr));
  };
  const auto sigma = copy(0, {k}), residual = copy(k * total, {k}), upper = copy(2 * k * total, {});
  const py::object u = list ? py::object(us) : py::object(us[0]);
  const py::object v = list ? py::object(vs) : py::object(vs[0]);
  return py::make_tuple(sigma, u, v, residual, steps_tensor, flags_tensor, upper);
}

static bool py_uses_gram(int itemsize, int64_t m, int64_t n, int k, std::string_view method,
                         int64_t max_steps, double tol, bool started) {
  PowerIterationItem item{itemsize == 8   ? DType::f64
                          : itemsize == 4 ? DType::f32
                                          : DType::bf16,
                          1,
                          m,
                          n,
                          nullptr,
                          started ? &item : nullptr};
  const auto how = method == "power" ? PowerMethod::power : PowerMethod::cg;
  return power_iteration_uses_gram(item, k, how, max_steps, tol);
}

void bind_power_iteration(py::module_& module) {
  module.def("power_iteration", &py_power_iteration);
  module.def("power_iteration_uses_gram", &py_uses_gram);
}

}  // namespace gti
