#include "gti/kinetic_energy.h"

#include "bindings.h"
#include "tensors.h"

namespace gti {

// p: a tensor or a list. None where an argument is not what the kernel takes.
static py::object py_kinetic_energy(py::handle p, py::handle inv_mass, bool recording,
                                    int threads) {
  std::vector<View> ps;
  InvMass mass;
  if (!views_of(p, ps, recording) || !inv_mass_of(inv_mass, ps, mass, recording)) return py::none();
  std::vector<KineticEnergyItem> items(ps.size());
  for (size_t i = 0; i < ps.size(); ++i) {
    if (!is_dense(ps[i])) return py::none();
    items[i] = {ps[i].dtype, ps[i].count, ps[i].data, mass.pointer(i), mass.scalar(i)};
  }
  return scalar_tensor(
      without_gil(ps, 1.0, [&] { return kinetic_energy(items.data(), items.size(), threads); }));
}

void bind_kinetic_energy(py::module_& module) { module.def("kinetic_energy", &py_kinetic_energy); }

}  // namespace gti
