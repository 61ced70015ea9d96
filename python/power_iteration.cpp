#include "gti/power_iteration.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string_view>

#include "bindings.h"
#include "tensors.h"

namespace gti {

namespace {

struct PowerIterationResult : KernelResult {
  int k = 0;
  int64_t total = 0;  // matrices
  bool list = false, any_double = false;
  std::vector<int64_t> all;  // the axes of the matrices
  std::vector<PowerIterationItem> items;
  std::vector<double> numbers;  // σ and residual [total, k], upper [total]
  std::vector<int64_t> steps;
  std::unique_ptr<bool[]> converged;
  std::unique_ptr<double[]> vectors;  // u and v of all items

  // Gives every item its place.
  void allocate() {
    size_t bytes = 0;
    for (const auto& item : items) bytes += (item.m + item.n) * item.batch * k * size_of(item);
    numbers.resize((2 * k + 1) * total);
    steps.resize(total);
    converged.reset(new bool[total]);
    vectors.reset(new double[(bytes + 7) / 8]);
    char* to = reinterpret_cast<char*>(vectors.get());
    int64_t at = 0;
    // All of one width before the next, for their alignment.
    for (int width : {8, 4})
      for (auto& item : items) {
        if (size_of(item) != width) continue;
        item.u = to;
        item.v = to += item.m * item.batch * k * width;
        to += item.n * item.batch * k * width;
      }
    for (auto& item : items) {
      item.sigma = numbers.data() + k * at;
      item.residual = numbers.data() + k * (total + at);
      item.upper = numbers.data() + 2 * k * total + at;
      item.steps = steps.data() + at;
      item.converged = converged.get() + at;
      at += item.batch;
    }
  }

  static int size_of(const PowerIterationItem& item) { return item.dtype == DType::f64 ? 8 : 4; }

  template <class T, class From>
  static py::object tensor(std::vector<int64_t> shape, std::initializer_list<int64_t> more,
                           const From* from) {
    shape.insert(shape.end(), more);
    int64_t count = 1;
    for (int64_t n : shape) count *= n;
    T* to;
    py::object out = new_tensor(shape, &to);
    std::copy_n(from, count, to);
    return out;
  }
  py::object number(int64_t from, std::initializer_list<int64_t> more) const {
    const double* x = numbers.data() + from;
    return any_double ? tensor<double>(all, more, x) : tensor<float>(all, more, x);
  }
  // u or v: a tensor, or a list of them.
  py::object vector(int64_t PowerIterationItem::* length, void* PowerIterationItem::* data) const {
    const auto one = [&](const PowerIterationItem& item) -> py::object {
      const auto shape = list ? std::vector<int64_t>{} : all;
      if (size_of(item) == 8)
        return tensor<double>(shape, {item.*length, k}, static_cast<const double*>(item.*data));
      return tensor<float>(shape, {item.*length, k}, static_cast<const float*>(item.*data));
    };
    if (!list) return one(items[0]);
    py::list out(items.size());
    for (size_t i = 0; i < items.size(); ++i) out[i] = one(items[i]);
    return out;
  }
  py::object field(std::string_view name) override {
    if (name == "u") return vector(&PowerIterationItem::m, &PowerIterationItem::u);
    if (name == "v") return vector(&PowerIterationItem::n, &PowerIterationItem::v);
    if (name == "residual") return number(k * total, {k});
    if (name == "steps") return tensor<int64_t>(all, {}, steps.data());
    if (name == "converged") return tensor<bool>(all, {}, converged.get());
    return number(2 * k * total, {});  // upper
  }
};

// weights: a tensor [..., m, n], or a list of tensors [out, ...], each one matrix [out, −1]; start:
// None, or right vectors for them, a tensor or a list. The pair (sigma, capsule of a
// PowerIterationResult), or None where an argument is not what the kernel takes.
py::object run(py::handle weights, py::handle start, int k, std::string_view method,
               int64_t max_steps, double tol, uint64_t seed, int threads) {
  auto result = std::make_unique<PowerIterationResult>();
  PowerIterationResult& out = *result;
  out.k = k;
  out.list = PyList_Check(weights.ptr());
  std::vector<View> ws, starts;
  if (!views_of(weights, ws) || ws.empty() || (!start.is_none() && !views_of(start, starts)) ||
      (!starts.empty() && starts.size() != ws.size()) || max_steps < 1 || k < 1 ||
      k > kMaxTriples || !(tol >= 0.0 && std::isfinite(tol)) ||
      (method != "cg" && method != "power"))
    return py::none();
  out.items.resize(ws.size());
  for (size_t i = 0; i < ws.size(); ++i) {
    const View& w = ws[i];
    if (w.ndim < 2 || !is_contiguous(w)) return py::none();
    const int64_t m = out.list ? w.shape[0] : w.shape[w.ndim - 2];
    if (m == 0 || (out.list ? w.count : w.shape[w.ndim - 1]) == 0) return py::none();
    const int64_t n = out.list ? w.count / m : w.shape[w.ndim - 1], batch = w.count / (m * n);
    if (k > std::min(m, n)) return py::none();
    const DType compute = w.dtype == DType::f64 ? DType::f64 : DType::f32;
    out.items[i] = {w.dtype, batch, m, n, w.data, nullptr};
    if (!starts.empty()) {
      const View& v = starts[i];
      if (v.dtype != compute || v.count != batch * n * k || !is_contiguous(v)) return py::none();
      if (v.ndim > 1 && (v.shape[v.ndim - 2] != n || v.shape[v.ndim - 1] != k)) return py::none();
      out.items[i].start = v.data;
    }
    out.total += batch;
    out.any_double |= compute == DType::f64;
    if (!out.list) out.all.assign(w.shape, w.shape + w.ndim - 2);
  }
  if (out.list) out.all = {out.total};
  out.allocate();
  const auto how = method == "power" ? PowerMethod::power : PowerMethod::cg;
  without_gil(ws, static_cast<double>(k) * static_cast<double>(max_steps), [&] {
    power_iteration(out.items.data(), out.items.size(), k, how, max_steps, tol, seed, threads);
  });
  const py::object sigma = out.number(0, {k});
  return py::make_tuple(sigma, in_capsule(std::move(result)));
}

bool uses_gram(int itemsize, int64_t m, int64_t n, int k, std::string_view method,
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

}  // namespace

void bind_power_iteration(py::module_& module) {
  module.def("power_iteration", &run);
  module.def("power_iteration_uses_gram", &uses_gram);
}

}  // namespace gti
