// How the bindings see a tensor: through the C exchange table of DLPack 1.3,
// which torch >= 2.10 publishes on its tensor type. Pointers, sizes and
// strides; no header and no symbol of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "gti/common.h"

namespace gti {

namespace py = pybind11;

// The part of the DLPack ABI that is used here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

// As DLPack numbers them.
struct Device {
  int32_t type, id;
  bool operator==(const Device&) const = default;
};
constexpr Device kCpu = {1, 0};

struct View {
  char* data;
  int64_t count;  // elements
  int64_t bytes;
  DType dtype;
  int32_t ndim;
  const int64_t *shape, *strides;  // owned by the tensor
};

// The types whose objects are plain tensors: torch.Tensor and
// torch.nn.Parameter. A subclass may keep its values elsewhere and is never
// read here.
void set_tensor_types(const py::tuple& types);

// Fills `view`; false where the object is no plain tensor of fp64, fp32, bf16 or fp16 on the
// device, is a lazily negated view, or (with `recording`) requires grad.
bool view_of(py::handle object, View& view, bool recording = false, Device device = kCpu);

// `view_of` without the question whether the tensor is a lazily negated view, which costs more than
// all else here.
bool plain_view_of(py::handle object, View& view, Device device = kCpu);

// Where a plain tensor is; throws for any other object.
Device device_of(py::handle tensor);

// Holds a tensor as C++ code does, beside the references of Python. torch counts a reference to an
// object of Python whenever the number of the others goes from one to two and back, as each reading
// of a tensor makes it; one more that stays keeps those from being counted.
class Held {
 public:
  explicit Held(py::handle tensor);
  ~Held();
  Held(Held&& other) noexcept : managed_(std::exchange(other.managed_, nullptr)) {}
  Held(const Held&) = delete;

 private:
  void* managed_ = nullptr;
};

// The .grad of a tensor of a plain type, a new reference. Never through an overridden attribute.
py::object grad_of(py::handle tensor);

// One view for each object of a list, or one for a single tensor; false as above.
bool views_of(py::handle objects, std::vector<View>& views, bool recording = false,
              Device device = kCpu);

// A new contiguous tensor with memory of its own, of T = double, float, int64_t or bool; `data` is
// where its elements are to be written.
template <class T>
py::object new_tensor(const std::vector<int64_t>& shape, T** data);
py::object scalar_tensor(double value);

// Every element is visited once by counting through `count` elements from
// `data`.
bool is_dense(const View& view);
bool is_contiguous(const View& view);

// Same dtype, shape and order of elements in memory.
bool same_layout(const View& a, const View& b);

// No two written views overlap, and no read view overlaps a written one.
bool disjoint(std::initializer_list<const std::vector<View>*> written,
              std::initializer_list<const std::vector<View>*> read);

}  // namespace gti
