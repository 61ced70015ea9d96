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
// addresses of the parameters and of their gradients and compares the rest with what it was.
class Plan {
 public:
  // params: the positions. owned: tensors of the plan, by address; a step refuses to run when one
  // of them has moved. momenta: of the plan, one for each of params, or empty.
  Plan(py::list params, py::list owned)
      : params_(std::move(params)), owned_(std::move(owned)), views_(py::len(params_)) {
    shapes_.resize(views_.size());
    grads_.resize(views_.size());
    seen_.resize(views_.size());
    skipped_.resize(views_.size());
    held_.reserve(views_.size());
    if (!views_of(owned_, owned_views_)) throw py::value_error("owned: not plain CPU tensors");
    for (size_t i = 0; i < views_.size(); ++i) {
      if (!view_of(params_[i], views_[i]) || !is_dense(views_[i]))
        throw py::value_error("params: not plain, dense CPU tensors");
      shapes_[i].assign(views_[i].shape, views_[i].shape + views_[i].ndim);
      shapes_[i].insert(shapes_[i].end(), views_[i].strides, views_[i].strides + views_[i].ndim);
      held_.emplace_back(params_[i]);
    }
    fill_written();
  }

  size_t size() const { return views_.size(); }
  const View& q(size_t i) const { return views_[i]; }
  const void* grad(size_t i) const { return grads_[i]; }
  bool skipped(size_t i) const { return skipped_[i]; }

  // Places of the parameters that took no part in the last step.
  py::tuple skipped() const {
    py::list places;
    if (any_skipped_)
      for (size_t i = 0; i < size(); ++i)
        if (skipped_[i]) places.append(i);
    return py::tuple(places);
  }

  // Reads the addresses anew. grads: a list of tensors or None, or None for the .grad of each
  // parameter; a parameter without one is skipped. Unread unless `kicks`: then those are skipped
  // whose places `skipped` has. False where anything is not what it was, or not what the
  // kernel takes: then nothing has been touched.
  bool refresh(py::handle grads, const py::tuple& skipped, bool kicks) {
    View view;
    if (any_skipped_) std::fill(skipped_.begin(), skipped_.end(), 0);
    any_skipped_ = false;
    for (size_t i = 0; i < owned_views_.size(); ++i)
      if (!plain_view_of(PyList_GET_ITEM(owned_.ptr(), i), view) ||
          view.data != owned_views_[i].data || view.bytes != owned_views_[i].bytes)
        return false;
    if (PyList_GET_SIZE(params_.ptr()) != static_cast<Py_ssize_t>(size())) return false;
    for (size_t i = 0; i < size(); ++i) {
      PyObject* param = PyList_GET_ITEM(params_.ptr(), i);
      if (!plain_view_of(param, view) || view.dtype != views_[i].dtype ||
          !has_shape(view, shapes_[i]))
        return false;
      if (view.data == views_[i].data) continue;
      if (!view_of(param, view)) return false;
      views_[i].data = view.data;
      moved_ = true;  // until the ranges are those of all views
    }
    if (moved_) fill_written();
    if (overlap_) return false;
    if (!kicks) {
      for (const auto& place : skipped) skipped_.at(place.cast<size_t>()) = any_skipped_ = true;
      return true;
    }
    const bool given = !grads.is_none();
    if (given && (!PyList_Check(grads.ptr()) ||
                  PyList_GET_SIZE(grads.ptr()) != static_cast<Py_ssize_t>(size())))
      return false;
    for (size_t i = 0; i < size(); ++i) {
      const py::object grad =
          given ? py::reinterpret_borrow<py::object>(PyList_GET_ITEM(grads.ptr(), i))
                : grad_of(PyList_GET_ITEM(params_.ptr(), i));
      if (grad.is_none()) {
        skipped_[i] = any_skipped_ = true;
        continue;
      }
      // A lazily negated view is the imaginary part of a conjugate: its stride of 2 is no layout of
      // a parameter, unless there is but one element.
      const bool seen =
          given || views_[i].count == 1 ? view_of(grad, view) : plain_view_of(grad, view);
      if (!seen || view.dtype != views_[i].dtype || !has_shape(view, shapes_[i])) return false;
      if (view.data != seen_[i]) {
        if (view.count && is_written(view)) return false;
        seen_[i] = view.data;
      }
      grads_[i] = view.data;
    }
    return true;
  }

 private:
  using Range = std::pair<const char*, const char*>;

  // Sizes must be equal, strides only where they matter.
  static bool has_shape(const View& view, const std::vector<int64_t>& shape) {
    const size_t n = view.ndim;
    if (shape.size() != 2 * n) return false;
    for (size_t d = 0; d < n; ++d)
      if (view.shape[d] != shape[d] || (shape[d] != 1 && view.strides[d] != shape[n + d]))
        return false;
    return true;
  }

  void fill_written() {
    written_.clear();
    for (const auto* views : {&views_, &owned_views_})
      for (const View& v : *views)
        if (v.count) written_.emplace_back(v.data, v.data + v.bytes);
    std::sort(written_.begin(), written_.end());
    moved_ = overlap_ = false;
    std::fill(seen_.begin(), seen_.end(), nullptr);
    for (size_t i = 1; i < written_.size(); ++i)
      overlap_ |= written_[i].first < written_[i - 1].second;
  }

  bool is_written(const View& view) const {
    const auto next =
        std::lower_bound(written_.begin(), written_.end(), Range(view.data + view.bytes, nullptr));
    return next != written_.begin() && std::prev(next)->second > view.data;
  }

  py::list params_, owned_;
  std::vector<Held> held_;
  std::vector<View> views_, owned_views_;  // of owned_: data, bytes and count only
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<const void*> grads_;
  std::vector<const void*> seen_;  // the last gradients that were found outside of written_
  std::vector<char> skipped_;
  bool any_skipped_ = false;
  std::vector<Range> written_;
  bool moved_ = false, overlap_ = false;
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
      : plan_(std::move(params), std::move(owned)), items_(plan_.size()) {
    for (size_t i = 0; i < items_.size(); ++i) {
      View p;
      if (!view_of(momenta[i], p)) throw py::value_error("momenta: not plain CPU tensors");
      items_[i] = {plan_.q(i).dtype,
                   p.dtype,
                   plan_.q(i).count,
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
      items_[i].q = plan_.q(i).data;
      items_[i].grad = plan_.grad(i);
      items_[i].skipped = plan_.skipped(i);
    }
    const PhaseStep step{kicks, drifts, kick, damp, drift, key};
    return scalar_tensor(
        released(items_, [&] { return phase_step(items_.data(), items_.size(), step, threads); }));
  }

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
      : plan_(std::move(params), std::move(owned)), items_(plan_.size()) {
    for (size_t i = 0; i < items_.size(); ++i)
      items_[i] = {plan_.q(i).dtype,
                   plan_.q(i).count,
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
      items_[i].q = plan_.q(i).data;
      items_[i].grad = plan_.grad(i);
      items_[i].scale = scale;
      items_[i].skipped = plan_.skipped(i);
    }
    for (const auto& [place, s] : own) items_.at(place.cast<size_t>()).scale = s.cast<double>();
    const GridStep step{kicks, drifts, back, kick, drift};
    const GridResult result =
        released(items_, [&] { return grid_step(items_.data(), items_.size(), step, threads); });
    return py::make_tuple(result.checksum, result.inside, scalar_tensor(result.energy));
  }

 private:
  Plan plan_;
  std::vector<GridItem> items_;
};

}  // namespace

void bind_phase_space(py::module_& module) {
  py::class_<PhasePlan>(module, "PhasePlan")
      .def(py::init<py::list, py::list, py::list, py::list>())
      .def("step", &PhasePlan::step)
      .def("skipped", &PhasePlan::skipped);
  py::class_<GridPlan>(module, "GridPlan")
      .def(py::init<py::list, py::list, py::list, py::list, py::list, py::list,
                    const std::vector<double>&, const std::vector<double>&>())
      .def("step", &GridPlan::step);
}

}  // namespace gti
