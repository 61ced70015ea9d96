// The module gti_kernels._compiled: one binding per op, in the file of the op's
// name.
#include "bindings.h"

namespace gti {

bool inv_mass_of(const py::list& inv_mass, const std::vector<View>& like,
                 InvMass& out) {
  if (inv_mass.size() != like.size()) return false;
  if (like.empty()) return true;
  if (py::isinstance<py::float_>(inv_mass[0])) {
    out.scalars.resize(like.size());
    for (size_t i = 0; i < like.size(); ++i) {
      if (!py::isinstance<py::float_>(inv_mass[i])) return false;
      out.scalars[i] = PyFloat_AS_DOUBLE(py::object(inv_mass[i]).ptr());
    }
    return true;
  }
  if (!views_of(inv_mass, out.tensors)) return false;
  for (size_t i = 0; i < like.size(); ++i)
    if (!same_layout(out.tensors[i], like[i])) return false;
  return true;
}

}  // namespace gti

PYBIND11_MODULE(_compiled, module) {
  module.doc() =
      "Compiled CPU kernels of gti_kernels: pointers, sizes and strides; knows "
      "no torch.";
  module.def("set_tensor_types", &gti::set_tensor_types);
  gti::bind_kinetic_energy(module);
  gti::bind_leapfrog(module);
  gti::bind_two_form(module);
  gti::bind_power_iteration(module);
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.attr("compiler") = __VERSION__;
}
