#include "gti/kinetic_energy.h"

#include "bindings.h"
#include "tensors.h"

namespace gti {

// None where the tensors are not what the kernel takes; see inv_mass_of for the
// last two arguments.
static py::object py_kinetic_energy(const py::list& p, const py::list& inv_mass,
                                    int threads) {
  std::vector<View> ps;
  InvMass mass;
  if (!views_of(p, ps) || !inv_mass_of(inv_mass, ps, mass)) return py::none();
  std::vector<KineticEnergyItem> items(ps.size());
  for (size_t i = 0; i < ps.size(); ++i) {
    if (!is_dense(ps[i])) return py::none();
    items[i] = {ps[i].dtype, ps[i].count, ps[i].data, mass.pointer(i),
                mass.scalar(i)};
  }
  double energy;
  {
    py::gil_scoped_release release;
    energy = kinetic_energy(items.data(), items.size(), threads);
  }
  return py::float_(energy);
}

void bind_kinetic_energy(py::module_& module) {
  module.def("kinetic_energy", &py_kinetic_energy);
}

}  // namespace gti
