#include "tensors.h"

#include <algorithm>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

namespace gti {
namespace {

struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  DLTensor tensor;
};

struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* previous;
  void* allocate;
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** out);
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr uint32_t kMajor = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

std::vector<PyTypeObject*> tensor_types;  // held for the life of the process
ExchangeTable* table = nullptr;

using Range = std::pair<const char*, const char*>;

// Methods and properties of Tensor, called without a search for the name: neither torch.Tensor nor
// torch.nn.Parameter overrides them.
PyMethodDef* is_neg = nullptr;
PyMethodDef* is_view = nullptr;
PyGetSetDef* requires_grad = nullptr;
PyGetSetDef* grad = nullptr;

// Consumes the reference; an error counts as true.
bool is_true(PyObject* object) {
  if (!object) PyErr_Clear();
  const bool result = object != Py_False;
  Py_XDECREF(object);
  return result;
}

// Whether the tensor is a lazily negated view. Such a view comes from a conjugated complex tensor
// and skips every other number in memory, unless it has but one element or is a view of a view.
// is_neg lets go of the GIL and costs more than all other questions here, so tensors of several
// elements that are no view are not asked.
bool is_negated(py::handle tensor, const View& view) {
  if (view.count > 1 && !is_true(is_view->ml_meth(tensor.ptr(), nullptr))) return false;
  return is_true(is_neg->ml_meth(tensor.ptr(), nullptr));
}

}  // namespace

void set_tensor_types(const py::tuple& types) {
  auto capsule = py::reinterpret_borrow<py::capsule>(types[0].attr("__dlpack_c_exchange_api__"));
  auto* found =
      static_cast<ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->major != kMajor) found = found->previous;
  if (!found || !found->tensor_from_object)
    throw py::import_error("this torch publishes no DLPack 1 exchange table");
  const auto getter = [&](const char* name) {
    const py::object property = types[0].attr(name);
    if (Py_TYPE(property.ptr()) != &PyGetSetDescr_Type)
      throw py::import_error(std::string("Tensor.") + name + " of this torch is not native");
    return reinterpret_cast<PyGetSetDescrObject*>(property.ptr())->d_getset;
  };
  const auto question = [&](const char* name) {
    const py::object method = types[0].attr(name);
    PyMethodDef* found = nullptr;
    if (Py_TYPE(method.ptr()) == &PyMethodDescr_Type)
      found = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
    if (!found || found->ml_flags != METH_NOARGS)
      throw py::import_error(std::string("Tensor.") + name + " of this torch is not native");
    return found;
  };
  is_neg = question("is_neg");
  is_view = question("_is_view");
  requires_grad = getter("requires_grad");
  grad = getter("grad");
  table = found;
  tensor_types.clear();
  for (auto type : types) {
    types.inc_ref();
    tensor_types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  }
}

static bool has_plain_type(py::handle object) {
  const auto* type = Py_TYPE(object.ptr());
  return std::find(tensor_types.begin(), tensor_types.end(), type) != tensor_types.end();
}

py::object grad_of(py::handle tensor) {
  if (!has_plain_type(tensor)) throw py::type_error("not a plain tensor");
  PyObject* found = grad->get(tensor.ptr(), grad->closure);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

Held::Held(py::handle tensor) {
  ManagedTensor* managed = nullptr;
  if (!table->managed_from_object || table->managed_from_object(tensor.ptr(), &managed) != 0)
    PyErr_Clear();  // reading it takes longer then
  managed_ = managed;
}

Held::~Held() {
  auto* managed = static_cast<ManagedTensor*>(managed_);
  if (managed && managed->deleter) managed->deleter(managed);
}

bool view_of(py::handle object, View& view, bool recording, Device device) {
  if (!plain_view_of(object, view, device)) return false;
  if (recording && is_true(requires_grad->get(object.ptr(), requires_grad->closure))) return false;
  return !is_negated(object, view);
}

static bool tensor_of(py::handle object, DLTensor& t) {
  if (!has_plain_type(object)) return false;
  if (table->tensor_from_object(object.ptr(), &t) == 0) return true;
  PyErr_Clear();
  return false;
}

Device device_of(py::handle tensor) {
  DLTensor t;
  if (!tensor_of(tensor, t)) throw py::type_error("not a plain tensor");
  return {t.device_type, t.device_id};
}

bool plain_view_of(py::handle object, View& view, Device device) {
  DLTensor t;
  if (!tensor_of(object, t) || Device{t.device_type, t.device_id} != device || t.type_lanes != 1)
    return false;
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

bool views_of(py::handle objects, std::vector<View>& views, bool recording, Device device) {
  if (!PyList_Check(objects.ptr())) {
    views.resize(1);
    return view_of(objects, views[0], recording, device);
  }
  views.resize(PyList_GET_SIZE(objects.ptr()));
  for (size_t i = 0; i < views.size(); ++i)
    if (!view_of(PyList_GET_ITEM(objects.ptr(), i), views[i], recording, device)) return false;
  return true;
}

template <class T>
py::object new_tensor(const std::vector<int64_t>& shape, T** data) {
  constexpr uint8_t kCode = std::is_same_v<T, bool>      ? kBool
                            : std::is_same_v<T, int64_t> ? kInt
                                                         : kFloat;
  // One block of memory: the head, shape and strides, and the elements at a multiple of 64 bytes.
  // (An aligned operator new would miss the allocator's quick lists.)
  const size_t ndim = shape.size();
  size_t count = 1;
  for (int64_t n : shape) count *= n;
  void* block =
      ::operator new(sizeof(ManagedTensor) + 2 * ndim * sizeof(int64_t) + 63 + count * sizeof(T));
  auto* sizes = reinterpret_cast<int64_t*>(static_cast<ManagedTensor*>(block) + 1);
  const auto end = reinterpret_cast<uintptr_t>(sizes + 2 * ndim);
  *data = reinterpret_cast<T*>((end + 63) / 64 * 64);
  int64_t stride = 1;
  for (size_t d = ndim; d-- > 0; stride *= shape[d]) {
    sizes[d] = shape[d];
    sizes[ndim + d] = stride;
  }
  auto* managed = new (block) ManagedTensor{kMajor,
                                            0,
                                            nullptr,
                                            [](ManagedTensor* m) { ::operator delete(m); },
                                            0,
                                            {*data, kCpu.type, kCpu.id, static_cast<int32_t>(ndim),
                                             kCode, sizeof(T) * 8, 1, sizes, sizes + ndim, 0}};
  void* object = nullptr;
  if (table->object_from_managed(managed, &object) != 0) {
    ::operator delete(block);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}
template py::object new_tensor(const std::vector<int64_t>&, double**);
template py::object new_tensor(const std::vector<int64_t>&, float**);
template py::object new_tensor(const std::vector<int64_t>&, int64_t**);
template py::object new_tensor(const std::vector<int64_t>&, bool**);

py::object scalar_tensor(double value) {
  double* data;
  py::object tensor = new_tensor({}, &data);
  *data = value;
  return tensor;
}

bool is_contiguous(const View& view) {
  int64_t expected = 1;
  for (int32_t d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.strides[d] != expected) return view.count == 0;
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
    if (a.shape[d] != b.shape[d] || (a.shape[d] != 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

bool disjoint(std::initializer_list<const std::vector<View>*> written,
              std::initializer_list<const std::vector<View>*> read) {
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
      auto next = std::lower_bound(ranges.begin(), ranges.end(), Range(end, nullptr));
      if (next != ranges.begin() && std::prev(next)->second > v.data) return false;
    }
  return true;
}

}  // namespace gti
