#include "gti/leapfrog.h"

#include <algorithm>
#include <cmath>

#include "bindings.h"
#include "tensors.h"

namespace gti {
namespace {

// The items of a call. False where an argument is not what the kernel takes: then nothing has been
// touched. Arguments that the call does not have are empty handles.
struct Call {
  std::vector<View> q, p, grad;
  InvMass mass;
  std::vector<LeapfrogItem> items;

  bool read(py::handle q_list, py::handle p_list, py::handle grad_list, py::handle inv_mass,
            bool recording) {
    if (!views_of(p_list, p, recording)) return false;
    const auto views_like_p = [&](py::handle objects, std::vector<View>& views) {
      return !objects || (views_of(objects, views, recording) && views.size() == p.size());
    };
    if (!views_like_p(q_list, q) || !views_like_p(grad_list, grad)) return false;
    if (inv_mass && !inv_mass_of(inv_mass, p, mass, recording)) return false;
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

bool py_kick(py::handle p, py::handle grad, double step, double damp, bool recording, int threads) {
  Call call;
  if (!(std::isfinite(step) && std::isfinite(damp)) || !call.read({}, p, grad, {}, recording) ||
      !disjoint({&call.p}, {&call.grad}))
    return false;
  without_gil(call.p, 1.0,
              [&] { kick(call.items.data(), call.items.size(), step, damp, threads); });
  return true;
}

bool py_drift(py::handle q, py::handle p, double step, py::handle inv_mass, bool recording,
              int threads) {
  Call call;
  if (!std::isfinite(step) || !call.read(q, p, {}, inv_mass, recording) ||
      !disjoint({&call.q}, {&call.p, &call.mass.tensors}))
    return false;
  without_gil(call.p, 1.0, [&] { drift(call.items.data(), call.items.size(), step, threads); });
  return true;
}

py::object py_kick_drift(py::handle q, py::handle p, py::handle grad, double kick, double drift,
                         py::handle inv_mass, double damp, bool recording, int threads) {
  Call call;
  if (!(std::isfinite(kick) && std::isfinite(drift) && std::isfinite(damp)) ||
      !call.read(q, p, grad, inv_mass, recording) ||
      !disjoint({&call.q, &call.p}, {&call.grad, &call.mass.tensors}))
    return py::none();
  return scalar_tensor(without_gil(call.p, 1.0, [&] {
    return kick_drift(call.items.data(), call.items.size(), kick, drift, damp, threads);
  }));
}

// Whether a kernel of any device can walk through these lists together, as flat memory: plain,
// dense tensors of one device, laid out alike place by place, of which no written one shares memory
// with another. Where it says no, the checks in Python have the words.
bool py_alike(const py::list& written, const py::list& read) {
  const auto first = written[0].cast<py::list>();
  if (first.empty()) return false;
  std::vector<View> like, views, all[2];
  try {
    const Device device = device_of(first[0]);
    if (!views_of(first, like, false, device)) return false;
    for (const auto& [lists, into] : {std::pair(&written, &all[0]), std::pair(&read, &all[1])})
      for (const auto& list : *lists) {
        if (!views_of(list, views, false, device) || views.size() != like.size()) return false;
        for (size_t i = 0; i < like.size(); ++i)
          if (!same_layout(views[i], like[i])) return false;
        into->insert(into->end(), views.begin(), views.end());
      }
  } catch (const py::type_error&) {
    return false;
  }
  return std::all_of(like.begin(), like.end(), is_dense) && disjoint({&all[0]}, {&all[1]});
}

}  // namespace

// A factor must be a float: a tensor would be read by way of its __float__, and sync.
void bind_leapfrog(py::module_& module) {
  using py::arg;
  module.def("alike", &py_alike, arg("written"), arg("read"));
  module.def("kick_", &py_kick, arg("p"), arg("grad"), arg("step").noconvert(),
             arg("damp").noconvert(), arg("recording"), arg("threads"));
  module.def("drift_", &py_drift, arg("q"), arg("p"), arg("step").noconvert(), arg("inv_mass"),
             arg("recording"), arg("threads"));
  module.def("kick_drift_", &py_kick_drift, arg("q"), arg("p"), arg("grad"),
             arg("kick").noconvert(), arg("drift").noconvert(), arg("inv_mass"),
             arg("damp").noconvert(), arg("recording"), arg("threads"));
}

}  // namespace gti
