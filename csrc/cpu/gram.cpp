#include "gti/gram.h"

#include "inner_products.h"

namespace gti {

void gram(const GramItem* items, int64_t n_items, int64_t batch, int64_t m, int64_t l, double* gram,
          double* bound, int threads) {
  const bool symmetric = items[0].b == nullptr, weighted = items[0].weight != nullptr;
  constexpr Form kForms[] = {Form::gram};
  int64_t columns = 0;
  for (int64_t i = 0; i < n_items; ++i) columns += items[i].count;
  for_each_problem(batch, columns, threads, [&](int64_t problem, int inner) {
    std::vector<Item> of_problem(n_items);
    for (int64_t i = 0; i < n_items; ++i) {
      const GramItem& t = items[i];
      of_problem[i] = {t.dtype,
                       t.count,
                       at_batch(t.a, t.dtype, m * t.count, problem),
                       at_batch(t.b, t.dtype, l * t.count, problem),
                       t.weight_dtype,
                       t.weight};
    }
    InnerProducts products(of_problem.data(), n_items, m, l, kForms, symmetric, weighted);
    products.run(inner);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = symmetric ? i : 0; j < l; ++j) {
        const int64_t at = problem * m * l + i * l + j;
        const int64_t mirror = symmetric ? problem * m * l + j * l + i : at;
        const double size = products.size(products.square_of_x(i), products.square_of_y(j));
        gram[at] = gram[mirror] = products.sum(0, i, j);
        bound[at] = bound[mirror] = products.bound(gram[at], size);
      }
  });
}

}  // namespace gti
