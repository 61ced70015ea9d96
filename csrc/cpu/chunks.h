// A list of tensors cut into chunks of a fixed length: the unit of work and of summation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gti {

// Elements of a chunk. Part of the definition of a result: sums are formed per chunk, then over
// chunks in order.
constexpr int64_t kChunk = 16384;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerial = 65536;

// Sum over items i and chunks c of f(i, first element, length), the chunks shared out among
// threads.
template <class Item, class F>
double sum_over_chunks(const Item* items, int64_t n_items, int threads, F&& f) {
  int64_t elements = 0;
  for (int64_t i = 0; i < n_items; ++i) elements += items[i].count;
  if (threads <= 1 || elements <= kSerial) {
    double sum = 0.0;
    for (int64_t i = 0; i < n_items; ++i)
      for (int64_t at = 0; at < items[i].count; at += kChunk)
        sum += f(items[i], at, std::min(kChunk, items[i].count - at));
    return sum;
  }
  std::vector<int64_t> first(n_items + 1, 0);  // number of the first chunk of each item
  for (int64_t i = 0; i < n_items; ++i)
    first[i + 1] = first[i] + (items[i].count + kChunk - 1) / kChunk;
  const int64_t chunks = first[n_items];
  std::vector<double> partial(chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t i = std::upper_bound(first.begin(), first.end(), c) - first.begin() - 1;
    const int64_t at = (c - first[i]) * kChunk;
    partial[c] = f(items[i], at, std::min(kChunk, items[i].count - at));
  }
  double sum = 0.0;
  for (double x : partial) sum += x;
  return sum;
}

}  // namespace gti
