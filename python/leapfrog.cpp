#include "gti/leapfrog.h"

#include "bindings.h"
#include "tensors.h"

namespace gti {
namespace {

// The items of a call. Lists that the call does not use are empty. False where
// the tensors are not what the kernel takes: then nothing has been touched.
struct Call {
  std::vector<View> q, p, grad;
  InvMass mass;
  std::vector<LeapfrogItem> items;

  bool read(const py::list* q_list, const py::list& p_list,
            const py::list* grad_list, const py::list* inv_mass) {
    if (!views_of(p_list, p)) return false;
    if (q_list && !(views_of(*q_list, q) && q.size() == p.size())) return false;
    if (grad_list && !(views_of(*grad_list, grad) && grad.size() == p.size()))
      return false;
    if (inv_mass && !inv_mass_of(*inv_mass, p, mass)) return false;
    items.resize(p.size());
    for (size_t i = 0; i < p.size(); ++i) {
      if (!is_dense(p[i]) || (q_list && !same_layout(q[i], p[i])) ||
          (grad_list && !same_layout(grad[i], p[i])))
        return false;
      items[i] = {p[i].dtype,
                  p[i].count,
                  q_list ? q[i].data : nullptr,
                  p[i].data,
                  grad_list ? grad[i].data : nullptr,
                  mass.pointer(i),
                  mass.scalar(i)};
    }
    return true;
  }
};

bool py_kick(const py::list& p, const py::list& grad, double step, double damp,
             int threads) {
  Call call;
  if (!call.read(nullptr, p, &grad, nullptr) ||
      !disjoint({&call.p}, {&call.grad}))
    return false;
  py::gil_scoped_release release;
  kick(call.items.data(), call.items.size(), step, damp, threads);
  return true;
}

bool py_drift(const py::list& q, const py::list& p, double step,
              const py::list& inv_mass, int threads) {
  Call call;
  if (!call.read(&q, p, nullptr, &inv_mass) ||
      !disjoint({&call.q}, {&call.p, &call.mass.tensors}))
    return false;
  py::gil_scoped_release release;
  drift(call.items.data(), call.items.size(), step, threads);
  return true;
}

py::object py_kick_drift(const py::list& q, const py::list& p,
                         const py::list& grad, double kick, double drift,
                         const py::list& inv_mass, double damp, int threads) {
  Call call;
  if (!call.read(&q, p, &grad, &inv_mass) ||
      !disjoint({&call.q, &call.p}, {&call.grad, &call.mass.tensors}))
    return py::none();
  double energy;
  {
    py::gil_scoped_release release;
    energy = kick_drift(call.items.data(), call.items.size(), kick, drift, damp,
                        threads);
  }
  return py::float_(energy);
}

}  // namespace

void bind_leapfrog(py::module_& module) {
  module.def("kick_", &py_kick);
  module.def("drift_", &py_drift);
  module.def("kick_drift_", &py_kick_drift);
}

}  // namespace gti
