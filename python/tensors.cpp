#include "tensors.h"

#include <algorithm>
#include <utility>

namespace gti {
namespace {

struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

std::vector<PyTypeObject*> tensor_types;  // held for the life of the process
ExchangeTable* table = nullptr;

using Range = std::pair<const char*, const char*>;

}  // namespace

void set_tensor_types(const py::tuple& types) {
  auto capsule = py::reinterpret_borrow<py::capsule>(
      types[0].attr("__dlpack_c_exchange_api__"));
  auto* found = static_cast<ExchangeTable*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->major != kMajor) found = found->previous;
  if (!found || !found->tensor_from_object)
    throw py::import_error("this torch publishes no DLPack 1 exchange table");
  table = found;
  tensor_types.clear();
  for (auto type : types) {
    types.inc_ref();
    tensor_types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  }
}

bool view_of(py::handle object, View& view) {
  const auto* type = Py_TYPE(object.ptr());
  if (std::find(tensor_types.begin(), tensor_types.end(), type) ==
      tensor_types.end())
    return false;
  DLTensor t;
  if (table->tensor_from_object(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device_type != kCpu || t.type_lanes != 1) return false;
  if (t.type_code == kFloat && t.type_bits == 64)
    view.dtype = DType::f64;
  else if (t.type_code == kFloat && t.type_bits == 32)
    view.dtype = DType::f32;
  else if (t.type_code == kFloat && t.type_bits == 16)
    view.dtype = DType::f16;
  else if (t.type_code == kBfloat && t.type_bits == 16)
    view.dtype = DType::bf16;
  else
    return false;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim;
  view.shape = t.shape;
  view.strides = t.strides;
  view.count = 1;
  for (int32_t d = 0; d < t.ndim; ++d) view.count *= t.shape[d];
  view.bytes = view.count * (t.type_bits / 8);
  return t.data != nullptr || view.count == 0;
}

bool views_of(const py::list& objects, std::vector<View>& views) {
  views.resize(objects.size());
  for (size_t i = 0; i < views.size(); ++i)
    if (!view_of(objects[i], views[i])) return false;
  return true;
}

bool is_contiguous(const View& view) {
  int64_t expected = 1;
  for (int32_t d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.strides[d] != expected)
      return view.count == 0;
    expected *= view.shape[d];
  }
  return true;
}

bool is_dense(const View& view) {
  if (is_contiguous(view)) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int32_t d = 0; d < view.ndim; ++d)
    if (view.shape[d] != 1) axes.emplace_back(view.strides[d], view.shape[d]);
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_layout(const View& a, const View& b) {
  if (a.dtype != b.dtype || a.ndim != b.ndim) return false;
  for (int32_t d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d] ||
        (a.shape[d] != 1 && a.strides[d] != b.strides[d]))
      return false;
  return true;
}

bool disjoint(const std::vector<const std::vector<View>*>& written,
              const std::vector<const std::vector<View>*>& read) {
  std::vector<Range> ranges;
  for (const auto* views : written)
    for (const View& v : *views)
      if (v.count) ranges.emplace_back(v.data, v.data + v.bytes);
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return false;
  for (const auto* views : read)
    for (const View& v : *views) {
      if (!v.count) continue;
      const char* end = v.data + v.bytes;
      // The last written range that begins before this one ends.
      auto next =
          std::lower_bound(ranges.begin(), ranges.end(), Range(end, nullptr));
      if (next != ranges.begin() && std::prev(next)->second > v.data)
        return false;
    }
  return true;
}

}  // namespace gti
