#include "gti/two_form.h"

#include "inner_products.h"

namespace gti {
namespace {

void one(const Item* items, int64_t n_items, int64_t m, double* omega, double* bound,
         double* metric, int threads) {
  constexpr Form kForms[] = {Form::skew, Form::metric};
  InnerProducts products(items, n_items, m, m, std::span(kForms, metric ? 2 : 1), true, false);
  products.run(threads);
  const auto square = [&](int64_t i) { return products.square_of_x(i) + products.square_of_y(i); };
  for (int64_t i = 0; i < m; ++i) {
    // 0 · NaN: a row with a NaN has no zero on the diagonal either.
    omega[i * m + i] = bound[i * m + i] = std::isnan(square(i)) ? square(i) : 0.0;
    for (int64_t j = i + 1; j < m; ++j) {
      const double value = products.sum(0, i, j);
      omega[i * m + j] = value;
      omega[j * m + i] = -value;
      // Σ|q_i p_j| + |p_i q_j| ≤ ‖z_i‖‖z_j‖
      const double size = products.size(square(i), square(j));
      bound[i * m + j] = bound[j * m + i] = products.bound(value, size);
    }
    for (int64_t j = i; metric && j < m; ++j)
      metric[i * m + j] = metric[j * m + i] = products.sum(1, i, j);
  }
}

}  // namespace

void two_form(const TwoFormItem* items, int64_t n_items, int64_t batch, int64_t m, double* omega,
              double* bound, double* metric, int threads) {
  int64_t columns = 0;
  for (int64_t i = 0; i < n_items; ++i) columns += items[i].count;
  for_each_problem(batch, columns, threads, [&](int64_t b, int inner) {
    std::vector<Item> of_b(n_items);
    for (int64_t i = 0; i < n_items; ++i) {
      const TwoFormItem& t = items[i];
      of_b[i] = {t.dtype, t.count, at_batch(t.dq, t.dtype, m * t.count, b),
                 at_batch(t.dp, t.dtype, m * t.count, b)};
    }
    const int64_t at = b * m * m;
    one(of_b.data(), n_items, m, omega + at, bound + at, metric ? metric + at : nullptr, inner);
  });
}

}  // namespace gti
