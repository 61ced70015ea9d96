// What the binding of an op shares: its entry in the module, and the reading of
// inv_mass.
#pragma once

#include "tensors.h"

namespace gti {

void bind_kinetic_energy(py::module_& module);
void bind_leapfrog(py::module_& module);
void bind_two_form(py::module_& module);
void bind_power_iteration(py::module_& module);

// inv_mass of a list of L tensors: L floats, or L tensors laid out like them.
struct InvMass {
  std::vector<double> scalars;
  std::vector<View> tensors;
  double scalar(size_t i) const { return scalars.empty() ? 1.0 : scalars[i]; }
  const void* pointer(size_t i) const {
    return tensors.empty() ? nullptr : tensors[i].data;
  }
};
bool inv_mass_of(const py::list& inv_mass, const std::vector<View>& like,
                 InvMass& out);

}  // namespace gti
