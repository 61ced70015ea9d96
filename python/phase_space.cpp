#include "gti/phase_space.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "bindings.h"
#include "tensors.h"

namespace gti {
namespace {

// The memory of a parameter list and of its plan, looked at once and then kept: a step reads the
// addresses of the parameters and of their gradients and compares the rest with what it was. Which
// kernel runs the step, and on which device, is not known here.
class Plan {
 public:
  // params: the positions. owned: tensors of the plan, by address; a step refuses to run when one
  // of them has moved.
  Plan(py::list params, py::list owned, Device device)
      : params_(std::move(params)),
        owned_(std::move(owned)),
        device_(device),
        known_(py::len(params_)) {
    held_.reserve(size());
    if (!views_of(owned_, owned_views_, false, device_))
      throw py::value_error("owned: not plain tensors of the device");
    for (size_t i = 0; i < size(); ++i) {
      View view;
      if (!view_of(params_[i], view, false, device_) || !is_dense(view))
        throw py::value_error("params: not plain, dense tensors of the device");
      known_[i] = {view.data, view.count, view.bytes, shapes_.size(), view.ndim, view.dtype};
      shapes_.insert(shapes_.end(), view.shape, view.shape + view.ndim);
      shapes_.insert(shapes_.end(), view.strides, view.strides + view.ndim);
      held_.emplace_back(params_[i]);
    }
    fill_written();
  }

  // What a plan knows of a parameter.
  struct Known {
    char* q;
    int64_t count, bytes;
    size_t shape;  // where its sizes, then its strides begin in shapes_
    int32_t ndim;
    DType dtype;
    bool skipped = false;        // takes no part in the last step
    const char* grad = nullptr;  // of the last kick, where it took part
    const char* safe = nullptr;  // the last gradient that was found outside of written_
  };

  size_t size() const { return known_.size(); }
  const Known& operator[](size_t i) const { return known_[i]; }

  // Places of the parameters that took no part in the last step.
  py::tuple skipped() const {
    py::list places;
    if (any_skipped_)
      for (size_t i = 0; i < size(); ++i)
        if (known_[i].skipped) places.append(i);
    return py::tuple(places);
  }

  // Whether a kick with the .grad of each parameter can be.
  bool ready() { return refresh(py::none(), py::tuple(), true); }

  // Reads the addresses anew. grads: a list of tensors or None, or None for the .grad of each
  // parameter; a parameter without one is skipped. Unread unless `kicks`: then those are skipped
  // whose places `skipped` has. False where anything is not what it was, or not what the kernel
  // takes: then nothing has been touched.
  bool refresh(py::handle grads, const py::tuple& skipped, bool kicks) {
    const auto n = static_cast<Py_ssize_t>(size());
    const bool given = kicks && !grads.is_none();
    if (PyList_GET_SIZE(params_.ptr()) != n ||
        (given && (!PyList_Check(grads.ptr()) || PyList_GET_SIZE(grads.ptr()) != n)))
      return false;
    if (any_skipped_)
      for (Known& known : known_) known.skipped = false;
    any_skipped_ = false;
    View view;
    for (size_t i = 0; i < owned_views_.size(); ++i)
      if (!plain_view_of(PyList_GET_ITEM(owned_.ptr(), i), view, device_) ||
          view.data != owned_views_[i].data || view.bytes != owned_views_[i].bytes)
        return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
      Known& known = known_[i];
      PyObject* param = PyList_GET_ITEM(params_.ptr(), i);
      if (!plain_view_of(param, view, device_) || !is_like(view, known)) return false;
      if (view.data != known.q) {
        if (!view_of(param, view, false, device_)) return false;
        known.q = view.data;
        moved_ = true;  // until the ranges are those of all parameters
      }
      if (!kicks) continue;
      const py::object grad =
          given ? py::reinterpret_borrow<py::object>(PyList_GET_ITEM(grads.ptr(), i))
                : grad_of(param);
      if (grad.is_none()) {
        known.skipped = any_skipped_ = true;
        continue;
      }
      // A lazily negated view is the imaginary part of a conjugate: its stride of 2 is no layout of
      // a parameter, unless there is but one element.
      const bool plain = given || known.count == 1 ? view_of(grad, view, false, device_)
                                                   : plain_view_of(grad, view, device_);
      if (!plain || !is_like(view, known)) return false;
      known.grad = view.data;
    }
    if (moved_) fill_written();
    if (overlap_) return false;
    if (!kicks)
      for (const auto& place : skipped)
        known_.at(place.cast<size_t>()).skipped = any_skipped_ = true;
    else
      for (Known& known : known_) {
        if (known.grad == known.safe || known.skipped || !known.count) continue;
        if (is_written(known.grad, known.bytes)) return false;
        known.safe = known.grad;
      }
    return true;
  }

 private:
  using Range = std::pair<const char*, const char*>;

  // Dtype and sizes must be equal, strides only where they matter.
  bool is_like(const View& view, const Known& known) const {
    if (view.dtype != known.dtype || view.ndim != known.ndim) return false;
    const int64_t *shape = shapes_.data() + known.shape, *strides = shape + known.ndim;
    for (int32_t d = 0; d < known.ndim; ++d)
      if (view.shape[d] != shape[d] || (shape[d] != 1 && view.strides[d] != strides[d]))
        return false;
    return true;
  }

  void fill_written() {
    written_.clear();
    for (Known& known : known_) {
      if (known.count) written_.emplace_back(known.q, known.q + known.bytes);
      known.safe = nullptr;
    }
    for (const View& v : owned_views_)
      if (v.count) written_.emplace_back(v.data, v.data + v.bytes);
    std::sort(written_.begin(), written_.end());
    moved_ = overlap_ = false;
    for (size_t i = 1; i < written_.size(); ++i)
      overlap_ |= written_[i].first < written_[i - 1].second;
  }

  bool is_written(const char* data, int64_t bytes) const {
    const auto next =
        std::lower_bound(written_.begin(), written_.end(), Range(data + bytes, nullptr));
    return next != written_.begin() && std::prev(next)->second > data;
  }

  py::list params_, owned_;
  Device device_;
  std::vector<Known> known_;
  std::vector<Held> held_;
  std::vector<View> owned_views_;  // data, bytes and count only
  std::vector<int64_t> shapes_;
  std::vector<Range> written_;
  bool any_skipped_ = false, moved_ = false, overlap_ = false;
};

template <class Item, class F>
auto released(const std::vector<Item>& items, F&& f) {
  int64_t elements = 0;
  for (const Item& item : items) elements += item.count;
  if (elements < 65536) return f();
  py::gil_scoped_release release;
  return f();
}

char* address(py::handle tensor) {
  View view;
  if (!view_of(tensor, view)) throw py::value_error("not a plain CPU tensor");
  return view.data;
}

double scalar_mass(py::handle mass) {
  return PyFloat_Check(mass.ptr()) ? PyFloat_AS_DOUBLE(mass.ptr()) : 1.0;
}
const void* mass_address(py::handle mass) {
  return PyFloat_Check(mass.ptr()) ? nullptr : address(mass);
}

class PhasePlan {
 public:
  PhasePlan(py::list params, py::list momenta, py::list inv_mass, py::list owned)
      : plan_(std::move(params), std::move(owned), kCpu), items_(plan_.size()) {
    for (size_t i = 0; i < items_.size(); ++i) {
      View p;
      if (!view_of(momenta[i], p)) throw py::value_error("momenta: not plain CPU tensors");
      items_[i] = {plan_[i].dtype,
                   p.dtype,
                   plan_[i].count,
                   nullptr,
                   p.data,
                   nullptr,
                   mass_address(inv_mass[i]),
                   scalar_mass(inv_mass[i]),
                   false};
    }
  }

  // The kinetic energy, or None where the plan is not what it was or a gradient is odd.
  py::object step(py::handle grads, const py::tuple& skipped, bool kicks, bool drifts, double kick,
                  double damp, double drift, uint64_t key, int threads) {
    if (!(std::isfinite(kick) && std::isfinite(damp) && std::isfinite(drift)) ||
        !plan_.refresh(grads, skipped, kicks))
      return py::none();
    for (size_t i = 0; i < items_.size(); ++i) {
      items_[i].q = plan_[i].q;
      items_[i].grad = plan_[i].grad;
      items_[i].skipped = plan_[i].skipped;
    }
    const PhaseStep step{kicks, drifts, kick, damp, drift, key};
    return scalar_tensor(
        released(items_, [&] { return phase_step(items_.data(), items_.size(), step, threads); }));
  }

  bool ready() { return plan_.ready(); }
  py::tuple skipped() const { return plan_.skipped(); }

 private:
  Plan plan_;
  std::vector<PhaseItem> items_;
};

class GridPlan {
 public:
  // Q, P: the integers, each as the fp64 tensor of the same bits. remainders: tensors or None.
  GridPlan(py::list params, py::list Q, py::list P, py::list remainders, py::list inv_mass,
           py::list owned, const std::vector<double>& unit_q, const std::vector<double>& unit_p)
      : plan_(std::move(params), std::move(owned), kCpu), items_(plan_.size()) {
    for (size_t i = 0; i < items_.size(); ++i)
      items_[i] = {plan_[i].dtype,
                   plan_[i].count,
                   nullptr,
                   remainders[i].is_none() ? nullptr : address(remainders[i]),
                   reinterpret_cast<int64_t*>(address(Q[i])),
                   reinterpret_cast<int64_t*>(address(P[i])),
                   nullptr,
                   static_cast<const double*>(mass_address(inv_mass[i])),
                   scalar_mass(inv_mass[i]),
                   unit_q[i],
                   unit_p[i],
                   1.0,
                   false};
  }

  // (checksum, inside, kinetic energy), or None where the plan is not what it was or a gradient is
  // odd.
  // scale: s of all tensors but those in `own`, a dict of place and s.
  py::object step(py::handle grads, const py::tuple& skipped, bool kicks, bool drifts, bool back,
                  double kick, double drift, double scale, const py::dict& own, int threads) {
    if (!plan_.refresh(grads, skipped, kicks)) return py::none();
    for (size_t i = 0; i < items_.size(); ++i) {
      items_[i].q = plan_[i].q;
      items_[i].grad = plan_[i].grad;
      items_[i].scale = scale;
      items_[i].skipped = plan_[i].skipped;
    }
    for (const auto& [place, s] : own) items_.at(place.cast<size_t>()).scale = s.cast<double>();
    const GridStep step{kicks, drifts, back, kick, drift};
    const GridResult result =
        released(items_, [&] { return grid_step(items_.data(), items_.size(), step, threads); });
    return py::make_tuple(result.checksum, result.inside, scalar_tensor(result.energy));
  }

  bool ready() { return plan_.ready(); }

 private:
  Plan plan_;
  std::vector<GridItem> items_;
};

// What a plan knows, for kernels of any device: the addresses of a step as rows of a table, which
// is uploaded where `version` is another than it was.
class Addresses {
 public:
  Addresses(py::list params, py::list owned)
      : plan_(params, std::move(owned), py::len(params) ? device_of(params[0]) : kCpu),
        rows_(2 * plan_.size()) {}

  // As Plan::refresh; then the row of q is that of a step that drifts, the row of gradients that of
  // one that kicks.
  bool refresh(py::handle grads, const py::tuple& skipped, bool kicks, bool drifts) {
    if (!plan_.refresh(grads, skipped, kicks)) return false;
    const auto take = [&](size_t at, const char* address) {
      const auto number = static_cast<int64_t>(reinterpret_cast<intptr_t>(address));
      version_ += rows_[at] != number;
      rows_[at] = number;
    };
    const size_t n = plan_.size();
    for (size_t i = 0; i < n; ++i) {
      if (drifts) take(i, plan_[i].skipped ? nullptr : plan_[i].q);
      if (kicks) take(n + i, plan_[i].skipped ? nullptr : plan_[i].grad);
    }
    return true;
  }

  // [2, L] int64: the addresses of the parameters and of their gradients, 0 where one is skipped.
  py::object rows() const {
    int64_t* data;
    py::object out = new_tensor({2, static_cast<int64_t>(plan_.size())}, &data);
    std::copy(rows_.begin(), rows_.end(), data);
    return out;
  }

  int64_t version() const { return version_; }
  bool ready() { return plan_.ready(); }
  py::tuple skipped() const { return plan_.skipped(); }

 private:
  Plan plan_;
  std::vector<int64_t> rows_;
  int64_t version_ = 0;  // raised by every address that changes
};

}  // namespace

void bind_phase_space(py::module_& module) {
  py::class_<PhasePlan>(module, "PhasePlan")
      .def(py::init<py::list, py::list, py::list, py::list>())
      .def("step", &PhasePlan::step)
      .def("ready", &PhasePlan::ready)
      .def("skipped", &PhasePlan::skipped);
  py::class_<GridPlan>(module, "GridPlan")
      .def(py::init<py::list, py::list, py::list, py::list, py::list, py::list,
                    const std::vector<double>&, const std::vector<double>&>())
      .def("step", &GridPlan::step)
      .def("ready", &GridPlan::ready);
  py::class_<Addresses>(module, "Addresses")
      .def(py::init<py::list, py::list>())
      .def("refresh", &Addresses::refresh)
      .def("rows", &Addresses::rows)
      .def("version", &Addresses::version)
      .def("ready", &Addresses::ready)
      .def("skipped", &Addresses::skipped);
}

}  // namespace gti
