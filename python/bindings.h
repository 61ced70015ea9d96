// What the binding of an op shares: its entry in the module, and the reading of
// inv_mass.
#pragma once

#include <memory>
#include <string_view>

#include "tensors.h"

namespace gti {

// What a kernel wrote, made into tensors where they are asked for.
struct KernelResult {
  virtual ~KernelResult() = default;
  virtual py::object field(std::string_view name) = 0;
};

// In a capsule, which is cheaper to make and to drop than an object of a bound class.
inline py::object in_capsule(std::unique_ptr<KernelResult> result) {
  py::capsule capsule(result.get(), [](void* x) { delete static_cast<KernelResult*>(x); });
  result.release();
  return capsule;
}

void bind_kinetic_energy(py::module_& module);
void bind_leapfrog(py::module_& module);
void bind_phase_space(py::module_& module);
void bind_two_form(py::module_& module);
void bind_gram(py::module_& module);
void bind_power_iteration(py::module_& module);

// Runs f without the GIL where the work is long enough to be worth handing it over.
// `times`: how often each element is used.
template <class F>
auto without_gil(const std::vector<View>& views, double times, F&& f) {
  double work = 0.0;
  for (const View& v : views) work += static_cast<double>(v.count) * times;
  if (work < 65536.0) return f();
  py::gil_scoped_release release;
  return f();
}

// inv_mass of L tensors: a float for all, L floats, or L tensors laid out like them.
struct InvMass {
  double all = 1.0;
  std::vector<double> each;
  std::vector<View> tensors;
  double scalar(size_t i) const { return tensors.empty() ? each.empty() ? all : each[i] : 1.0; }
  const void* pointer(size_t i) const { return tensors.empty() ? nullptr : tensors[i].data; }
};

// False where it is not that, or a float is negative or not finite.
bool inv_mass_of(py::handle inv_mass, const std::vector<View>& like, InvMass& out,
                 bool recording = false);

}  // namespace gti
