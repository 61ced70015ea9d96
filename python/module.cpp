// The module gti_kernels._compiled: one binding per op, in the file of the op's
// name.
#include <cmath>

#include "bindings.h"

namespace gti {

static py::object field_of(const py::capsule& result, std::string_view name) {
  return result.get_pointer<KernelResult>()->field(name);
}

bool inv_mass_of(py::handle inv_mass, const std::vector<View>& like, InvMass& out, bool recording) {
  const auto read = [](PyObject* x, double& value) {
    if (!PyFloat_CheckExact(x)) return false;
    value = PyFloat_AS_DOUBLE(x);
    return std::isfinite(value) && value >= 0.0;
  };
  PyObject* list = inv_mass.ptr();
  if (read(list, out.all)) return true;
  const bool floats = PyList_Check(list) && PyList_GET_SIZE(list) > 0 &&
                      PyFloat_CheckExact(PyList_GET_ITEM(list, 0));
  if (!floats) {
    if (!views_of(inv_mass, out.tensors, recording) || out.tensors.size() != like.size())
      return false;
    for (size_t i = 0; i < like.size(); ++i)
      if (!same_layout(out.tensors[i], like[i])) return false;
    return true;
  }
  if (static_cast<size_t>(PyList_GET_SIZE(list)) != like.size()) return false;
  out.each.resize(like.size());
  for (size_t i = 0; i < like.size(); ++i)
    if (!read(PyList_GET_ITEM(list, i), out.each[i])) return false;
  return true;
}

}  // namespace gti

PYBIND11_MODULE(_compiled, module) {
  module.doc() =
      "Compiled CPU kernels of gti_kernels: pointers, sizes and strides; knows "
      "no torch.";
  module.def("set_tensor_types", &gti::set_tensor_types);
  module.def("field", &gti::field_of);
  gti::bind_kinetic_energy(module);
  gti::bind_leapfrog(module);
  gti::bind_phase_space(module);
  gti::bind_two_form(module);
  gti::bind_gram(module);
  gti::bind_power_iteration(module);
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.attr("compiler") = __VERSION__;
}
