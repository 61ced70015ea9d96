#include "gti/gram.h"

#include <algorithm>

#include "bindings.h"
#include "tensors.h"

namespace gti {

namespace {

// a, b: tensors [m, N] and [l, N], or [batch, m, N] and [batch, l, N], or lists of [m, ...] and
// [l, ...]; b None: a. weight: None, a tensor [N] or a list of [...]. The matrix and its bound, or
// None where an argument is not what the kernel takes.
py::object run(py::handle a, py::handle b, py::handle weight, bool recording, int threads) {
  std::vector<View> as, bs, ws;
  if (!views_of(a, as, recording) || as.empty()) return py::none();
  const bool list = PyList_Check(a.ptr());
  const int32_t least = list ? 1 : 2;  // axes: [m] of a 0-d parameter, in a list
  if (as[0].ndim < least) return py::none();
  if (!b.is_none() && (!views_of(b, bs, recording) || bs.size() != as.size())) return py::none();
  if (!weight.is_none() && (!views_of(weight, ws, recording) || ws.size() != as.size()))
    return py::none();
  const bool batched = !list && as[0].ndim > 2;
  if (batched && as[0].ndim > 3) return py::none();
  const int64_t batch = batched ? as[0].shape[0] : 1, m = as[0].shape[batched];
  int64_t l = m;
  if (!bs.empty()) {
    if (bs[0].ndim != as[0].ndim) return py::none();
    l = bs[0].shape[batched];
  }
  if (batch == 0 || m == 0 || l == 0) return py::none();
  std::vector<GramItem> items;  // none without coordinates: its addresses may be null
  for (size_t i = 0; i < as.size(); ++i) {
    const View& x = as[i];
    const int32_t first = batched + 1;  // axis of the coordinates
    if (x.ndim < least || x.shape[batched] != m || !is_contiguous(x)) return py::none();
    const int64_t count = x.count / (batch * m);
    GramItem item{x.dtype, count, x.data, nullptr, DType::f64, nullptr};
    const auto same_coordinates = [&](const View& y, int32_t from) {
      if (y.ndim - from != x.ndim - first || !is_contiguous(y)) return false;
      return std::equal(x.shape + first, x.shape + x.ndim, y.shape + from);
    };
    if (!bs.empty()) {
      const View& y = bs[i];
      if (y.dtype != x.dtype || !same_coordinates(y, first) || y.shape[batched] != l ||
          (batched && y.shape[0] != batch))
        return py::none();
      item.b = y.data;
    }
    if (!ws.empty()) {
      if (!same_coordinates(ws[i], 0)) return py::none();
      item.weight_dtype = ws[i].dtype;
      item.weight = ws[i].data;
    }
    if (count > 0) items.push_back(item);
  }
  if (items.empty()) return py::none();
  double *matrix, *bound;
  const std::vector<int64_t> shape =
      batched ? std::vector<int64_t>{batch, m, l} : std::vector<int64_t>{m, l};
  py::object out = new_tensor(shape, &matrix), error_bound = new_tensor(shape, &bound);
  without_gil(as, static_cast<double>(l),
              [&] { gram(items.data(), items.size(), batch, m, l, matrix, bound, threads); });
  return py::make_tuple(out, error_bound);
}

}  // namespace

void bind_gram(py::module_& module) { module.def("gram", &run); }

}  // namespace gti
