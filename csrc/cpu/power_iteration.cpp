// One pass over W yields z = Wᵀ(W x): a panel of rows stays in cache between y = W_r x and
// z += W_rᵀ y. Small matrices run one per thread, from a packed copy; large ones one after the
// other, their rows shared out among all threads.
#include "gti/power_iteration.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "power_iteration_gram.h"
#include "power_iteration_pass.h"
#include "power_iteration_step.h"
#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kSmallBytes = 768 * 1024;  // of a packed matrix: it stays in a core's L2
constexpr int64_t kPanelBytes = 128 * 1024;  // of a packed panel of a large matrix
constexpr int64_t kBlockBytes = 256 * 1024;  // of a block of rows with a z of its own, at least
constexpr int64_t kMaxBlocks = 64;

// ---- functions of each level -------------------------------------------------------------------

// Small functions: the compiler's time grows faster than their size.
#define GTI_PASSES(T)                                                                          \
  GTI_LEVELS(void, one_vector,                                                                 \
             (const T* w, int64_t rows, Strides at, const compute_t<T>* x, compute_t<T>* y,    \
              compute_t<T>* z, const compute_t<T>* ahead),                                     \
             one_vector_any<B, false, T, compute_t<T>>(w, rows, at, x, y, z, nullptr, ahead);) \
  GTI_LEVELS(void, one_vector_measured,                                                        \
             (const T* w, int64_t rows, Strides at, const compute_t<T>* x, compute_t<T>* y,    \
              compute_t<T>* z, const compute_t<T>* ahead, Sizes<compute_t<T>>* sizes),         \
             one_vector_any<B, true, T, compute_t<T>>(w, rows, at, x, y, z, sizes, ahead);)    \
  GTI_LEVELS(void, two_vectors,                                                                \
             (const T* w, int64_t rows, Strides at, const compute_t<T>* x, compute_t<T>* y,    \
              compute_t<T>* z),                                                                \
             all_rows<B, 2, false, T, compute_t<T>>(w, rows, at, x, y, z, nullptr, nullptr);)
GTI_PASSES(double)
GTI_PASSES(float)
GTI_PASSES(bf16)
#undef GTI_PASSES

// y [k, rows] = w x and z += wᵀ y for a panel w of rows, which stays in cache for all k vectors.
// sizes: nullptr, or where to add the sizes of the panel.
template <class T, class C>
void panel_pass(const T* w, int64_t rows, int k, Strides at, const C* x, C* y, C* z,
                Sizes<C>* sizes, const C* ahead = nullptr) {
  int c = 0;
  if (sizes) {
    one_vector_measured(w, rows, at, x, y, z, ahead, sizes);
    c = 1;
  }
  for (; c + 1 < k; c += 2) two_vectors(w, rows, at, x + c * at.np, y + c * at.mp, z + c * at.np);
  if (c < k) one_vector(w, rows, at, x + c * at.np, y + c * at.mp, z + c * at.np, ahead);
}

#define GTI_GRAM(T)                                                                             \
  GTI_LEVELS(void, gram_panel,                                                                  \
             (const T* w, int64_t n, bool tall, int64_t s, int64_t at, int64_t count,           \
              compute_t<T>* panel, double* g),                                                  \
             tall ? gram_of_rows<B>(w, s, at, count, panel, g)                                  \
                  : gram_of_columns<B>(w, n, s, at, count, panel, g);)                          \
  GTI_LEVELS(void, combine_rows,                                                                \
             (const T* w, int64_t m, int64_t n, const double* c, int64_t stride, int64_t begin, \
              int64_t end, double* out),                                                        \
             combine_rows_any<B>(w, m, n, c, stride, begin, end, out);)                         \
  GTI_LEVELS(void, pack,                                                                        \
             (const T* w, int64_t rows, int64_t n, compute_t<T> scale, compute_t<T>* out),      \
             pack_any<B>(w, rows, n, scale, out);)
GTI_GRAM(double)
GTI_GRAM(float)
GTI_GRAM(bf16)
GTI_GRAM(f16)
#undef GTI_GRAM

#define GTI_POWER_ITERATION(C)                                                              \
  GTI_LEVELS(void, start_vector, (uint64_t seed, uint64_t matrix, Iteration<C>& it, int c), \
             for (int64_t j = 0; j < it.n; ++j) it.v[c * it.np + j] =                       \
                 start_element(seed, matrix, static_cast<uint64_t>(j * it.k + c));)         \
  GTI_LEVELS(void, make_basis,                                                              \
             (C * x, const C* b, int64_t stride, int count, int64_t n, int64_t np),         \
             complete<B>(x, b, stride, count, n, np);)                                      \
  GTI_LEVELS(double, norm, (const C* x, int64_t np), return norm_any<B>(x, np);)            \
  GTI_LEVELS(C, largest, (const C* x, int64_t np), return largest_any<B>(x, np);)           \
  GTI_LEVELS(bool, update_one, (Iteration<C> & it, const Settings& set),                    \
             return update_any<B, 1>(it, set);)                                             \
  GTI_LEVELS(bool, update_several, (Iteration<C> & it, const Settings& set),                \
             return update_any<B, 0>(it, set);)                                             \
  bool update(Iteration<C>& it, const Settings& set) {                                      \
    return it.k == 1 ? update_one(it, set) : update_several(it, set);                       \
  }
GTI_POWER_ITERATION(double)
GTI_POWER_ITERATION(float)
#undef GTI_POWER_ITERATION

// ---- one matrix --------------------------------------------------------------------------------

template <class T>
struct Matrix {
  using C = compute_t<T>;
  const PowerIterationItem& item;
  int64_t index;   // within the item
  int64_t number;  // through the list
  C scale = 1;

  const T* w() const { return static_cast<const T*>(item.w) + index * item.m * item.n; }

  // True where a pass can read W as it lies in memory. fp16 costs more to widen twice than to pack.
  bool direct() const {
    return scale == C(1) &&
           (std::is_same_v<T, C> ? item.n == padded<C>(item.n) : in_pairs<T>(item.n));
  }

  // Rows [begin, end), np columns each, of the compute type and scaled.
  const C* panel(int64_t begin, int64_t end, Buffer<C>& buffer) const {
    if constexpr (std::is_same_v<T, C>)
      if (direct()) return w() + begin * item.n;
    const int64_t needed = (end - begin) * padded<C>(item.n);
    if (buffer.size() < needed) buffer.resize(needed);
    pack(w() + begin * item.n, end - begin, item.n, scale, buffer.data());
    return buffer.data();
  }

  const C* given_start(int k) const {
    return item.start ? static_cast<const C*>(item.start) + index * item.n * k : nullptr;
  }

  // given: [n, k], or nullptr where the start is to be random.
  template <class G>
  void start(Iteration<C>& it, const Settings& set, const G* given) const {
    const int64_t n = item.n, np = it.np, k = it.k;
    for (int c = 0; c < k; ++c) {
      C* v = it.v + c * np;
      for (int64_t j = 0; given && j < n; ++j) v[j] = static_cast<C>(given[j * k + c]);
      const double length = given ? norm(v, np) : 0.0;
      if (!(length > 0.0 && std::isfinite(length)))
        start_vector(set.seed, static_cast<uint64_t>(number), it, c);
      make_basis(v, it.v, np, c, n, np);
    }
    if (!in_pairs<T>(n)) return;
    std::copy(it.v, it.v + k * np, it.r);
    for (int c = 0; c < k; ++c)
      for (int64_t j = 0; j < n; ++j) it.v[c * np + place_in_pairs(j)] = it.r[c * np + j];
  }

  // Looks at every entry: true where all are finite; the largest magnitude.
  bool scan(double& largest) const {
    bool finite = true;
    largest = 0.0;
    for (int64_t i = 0; i < item.m * item.n; ++i) {
      const double x = std::abs(static_cast<double>(load<1>(w() + i)[0]));
      finite &= std::isfinite(x);
      largest = std::max(largest, x);
    }
    return finite;
  }

  // After the first look at W, taken at scale 1: true where its squares might leave the range of C.
  // Then `scale` brings the largest entry near 1 and `sizes` belong to the scaled matrix, which is
  // to be measured again; sizes.finite is false where W holds a NaN or an infinity.
  bool rescale(Sizes<C>& sizes) {
    const int safe = sizeof(C) == 8 ? 200 : 40;  // sums of z² are sums of σ⁴, in fp64
    const bool in_range = sizes.row == 0.0 || std::abs(std::ilogb(sizes.row)) <= safe;
    if (sizes.finite && (in_range || scale != C(1))) return false;
    double largest = sizes.row;
    sizes.finite = scan(largest);
    if (!sizes.finite || largest == 0.0 || scale != C(1)) return false;
    const int most = std::numeric_limits<C>::max_exponent - 2;  // 2^most is finite
    scale = static_cast<C>(std::ldexp(1.0, std::clamp(-std::ilogb(largest), -most, most)));
    sizes = Sizes<C>{sizes.column};
    std::fill(sizes.column, sizes.column + padded<C>(item.n), C(0));
    return true;
  }

  void finish(Iteration<C>& it, const Sizes<C>& sizes, const Settings& set,
              int64_t passes_before = 0) const {
    const int64_t m = item.m, n = item.n, mp = it.mp, np = it.np, k = it.k;
    C* u = static_cast<C*>(item.u) + index * m * k;
    C* v = static_cast<C*>(item.v) + index * n * k;
    double* sigma = item.sigma + index * k;
    double* residual = item.residual + index * k;
    if (!sizes.finite) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill(sigma, sigma + k, nan);
      std::fill(residual, residual + k, nan);
      item.upper[index] = nan;
      std::fill(u, u + m * k, static_cast<C>(nan));
      std::fill(v, v + n * k, static_cast<C>(nan));
      item.steps[index] = 0;
      item.converged[index] = false;
      return;
    }
    const double inverse = 1.0 / static_cast<double>(scale);
    // Below this share of the largest σ, W v is rounding: u is then any direction left.
    const double least = std::min<double>(std::numeric_limits<C>::epsilon() * std::max(m, n), 0.01);
    bool converged = true;
    double largest_y = 0.0;
    for (int c = 0; c < k; ++c) {
      C *v_c = it.v + c * np, *y_c = it.yv + c * mp;
      const double wv = norm(y_c, mp), length = norm(v_c, np);
      sigma[c] = wv / length * inverse;
      residual[c] = it.residual[c];
      converged &= residual[c] <= set.tol;
      largest_y = std::max(largest_y, wv);
      if (!(wv > least * largest_y)) std::fill(y_c, y_c + mp, C(0));
      make_basis(y_c, it.yv, mp, c, m, mp);
      const C unit = static_cast<C>(1.0 / length);
      for (int64_t j = 0; j < n; ++j)
        v[j * k + c] = unit * v_c[in_pairs<T>(n) ? place_in_pairs(j) : j];
      for (int64_t i = 0; i < m; ++i) u[i * k + c] = y_c[i];
    }
    item.steps[index] = it.steps + passes_before;
    item.converged[index] = converged;
    const double one = largest(sizes.column, np);
    const double bound =
        std::min(std::sqrt(one) * std::sqrt(sizes.row), std::sqrt(sizes.frobenius2));
    const double rounding = (m + np + 8) * std::numeric_limits<C>::epsilon();
    item.upper[index] = bound * (1.0 + rounding) * inverse;
  }
};

// What a thread keeps from one small matrix to the next.
template <class C>
struct Workspace {
  Buffer<C> vectors, packed;
};

// next: the matrix that this thread takes next, to be asked for, or W itself.
template <class T>
void run_small(Matrix<T> matrix, const Settings& set, const void* next,
               Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  const int64_t m = matrix.item.m, np = padded<C>(matrix.item.n);
  Iteration<C> it(m, matrix.item.n, set.k, work.vectors);
  const Strides at{np, it.mp};
  Sizes<C> sizes{it.column};
  matrix.start(it, set, matrix.given_start(set.k));
  const C* w = matrix.panel(0, m, work.packed);
  const auto pass = [&](Sizes<C>* measured) {
    std::fill(it.z(set), it.z(set) + set.k * np, C(0));
    // A large one would push this one out of the cache.
    const bool little = m * np * static_cast<int64_t>(sizeof(C)) <= kPanelBytes;
    const C* ahead = static_cast<const C*>(next) + it.steps % 8 * kBlock<C>;
    panel_pass(w, m, set.k, at, it.x(set), it.y(set), it.z(set), measured,
               little ? ahead : nullptr);
  };
  pass(&sizes);
  if (matrix.rescale(sizes)) {
    w = matrix.panel(0, m, work.packed);
    pass(&sizes);
  }
  while (sizes.finite && !update(it, set)) pass(nullptr);
  matrix.finish(it, sizes, set);
}

// The k top right singular vectors [n, k] by way of the Gram matrix of the short side, WᵀW or WWᵀ:
// one pass over W for it, and one for v = Wᵀu where the rows are the short side. Not finite where W
// is not, or where its squares leave the range of the compute type. Only a start: what rounding in
// the compute type leaves of an error, the iteration removes.
template <class T>
std::vector<double> start_from_gram(const Matrix<T>& matrix, const Settings& set, int threads) {
  const int64_t m = matrix.item.m, n = matrix.item.n, k = set.k;
  const bool tall = n <= m;
  const int64_t s = std::min(m, n), sp = gram_stride(s), length = std::max(m, n);
  const int64_t segments = (length + kGramSegment - 1) / kGramSegment;
  std::vector<double> parts(segments * sp * sp), gram(s * s), top(s * k), spare(s * k + 2 * k + 1);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < segments; ++b) {
    Buffer<compute_t<T>> panel(gram_panel_size(s));
    const int64_t end = std::min(length, (b + 1) * kGramSegment);
    for (int64_t at = b * kGramSegment; at < end; at += kGramPanel)
      gram_panel(matrix.w(), n, tall, s, at, std::min(kGramPanel, end - at), panel.data(),
                 parts.data() + b * sp * sp);
  }
  for (int64_t b = 0; b < segments; ++b)
    for (int64_t i = 0; i < s; ++i)
      for (int64_t j = i; j < s; ++j)
        gram[j * s + i] = gram[i * s + j] += parts[(b * sp + i) * sp + j];
  // Its singular vectors are those of W: WᵀW squares σ, so few steps do.
  int64_t steps;
  bool converged;
  PowerIterationItem item{};
  item.dtype = DType::f64;
  item.batch = 1;
  item.m = item.n = s;
  item.w = gram.data();
  item.u = spare.data();
  item.v = top.data();
  item.sigma = spare.data() + s * k;
  item.residual = item.sigma + k;
  item.upper = item.residual + k;
  item.steps = &steps;
  item.converged = &converged;
  Workspace<double> work;
  run_small(Matrix<double>{item, 0, matrix.number},
            Settings{set.k, PowerMethod::cg, 1000, 1e-10, set.seed}, gram.data(), work);
  if (tall) return top;
  std::vector<double> v(n * k), columns(k * n);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < segments; ++b) {
    const int64_t end = std::min(n, (b + 1) * kGramSegment);
    for (int64_t at = b * kGramSegment; at < end; at += kGramPanel)  // in cache for all vectors
      for (int64_t c = 0; c < k; ++c)
        combine_rows(matrix.w(), m, n, top.data() + c, k, at, std::min(end, at + kGramPanel),
                     columns.data() + c * n);
  }
  for (int64_t c = 0; c < k; ++c)
    for (int64_t j = 0; j < n; ++j) v[j * k + c] = columns[c * n + j];
  return v;
}

template <class T>
void run_large(Matrix<T> matrix, Settings set, int threads) {
  using C = compute_t<T>;
  const int64_t m = matrix.item.m, n = matrix.item.n, np = padded<C>(n);
  const int64_t row_bytes = np * static_cast<int64_t>(sizeof(C));
  const int64_t panel_rows = std::max<int64_t>(8, kPanelBytes / row_bytes / 8 * 8);
  const int64_t most_blocks = std::max((m + 63) / 64, std::min<int64_t>(4, (m + 15) / 16));
  // A power of two, so that any usual number of threads shares them evenly.
  const auto blocks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(
      m * row_bytes / kBlockBytes, 1, std::min<int64_t>(kMaxBlocks, most_blocks)))));
  const auto first_row = [=](int64_t b) { return std::min(m, (m + 7) / 8 * b / blocks * 8); };

  const int64_t z_size = set.k * np;
  Buffer<C> memory, partial_z(blocks * z_size), partial_column(blocks * np);
  Iteration<C> it(m, n, set.k, memory);
  const Strides at{np, it.mp};
  Sizes<C> sizes{it.column};
  std::vector<Sizes<C>> partial_sizes(blocks);
  bool measured = false, done = false;
  int64_t passes_before = 0;
  if (power_iteration_uses_gram(matrix.item, set.k, set.method, set.max_steps, set.tol)) {
    matrix.start(it, set, start_from_gram(matrix, set, threads).data());
    passes_before = n <= m ? 1 : 2;
    set.max_steps -= passes_before;
  } else {
    matrix.start(it, set, matrix.given_start(set.k));
  }

#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int64_t thread = 0, team = 1;
#endif
    Buffer<C> buffer;
    while (!done) {
      const C* x = it.x(set);
      C *y = it.y(set), *z = it.z(set);
      // Odd passes go backwards: what the last pass left in cache comes first.
      const bool backwards = it.steps % 2;
      const int64_t low = blocks * thread / team, high = blocks * (thread + 1) / team;
      for (int64_t c = 0; c < high - low; ++c) {
        const int64_t b = backwards ? high - 1 - c : low + c;
        const int64_t begin = first_row(b), end = first_row(b + 1);
        C* z_b = partial_z.data() + b * z_size;
        std::fill(z_b, z_b + z_size, C(0));
        if (!measured) {
          partial_sizes[b] = Sizes<C>{partial_column.data() + b * np};
          std::fill(partial_sizes[b].column, partial_sizes[b].column + np, C(0));
        }
        Sizes<C>* sizes_b = measured ? nullptr : &partial_sizes[b];
        // Two vectors at a time: more of them want the rows again while they are in cache.
        const int64_t most = matrix.direct() && set.k <= 2 ? end - begin : panel_rows;
        for (int64_t r = begin; r < end; r += most) {
          const int64_t rows = std::min(most, end - r);
          if constexpr (!std::is_same_v<T, f16>)
            if (matrix.direct()) {
              panel_pass(matrix.w() + r * n, rows, set.k, at, x, y + r, z_b, sizes_b);
              continue;
            }
          panel_pass(matrix.panel(r, r + rows, buffer), rows, set.k, at, x, y + r, z_b, sizes_b);
        }
      }
#pragma omp barrier
      const int64_t from = z_size * thread / team, to = z_size * (thread + 1) / team;
      const C* part = partial_z.data();
      for (int64_t j = from; j < to; ++j) z[j] = part[j];
      for (int64_t b = 1; b < blocks; ++b)
        for (int64_t j = from; j < to; ++j) z[j] += part[b * z_size + j];
#pragma omp barrier
#pragma omp single
      {
        if (!measured) {
          for (const Sizes<C>& part_sizes : partial_sizes) {
            sizes.row = std::max(sizes.row, part_sizes.row);
            sizes.frobenius2 += part_sizes.frobenius2;
            sizes.finite &= part_sizes.finite;
            for (int64_t j = 0; j < np; ++j) sizes.column[j] += part_sizes.column[j];
          }
          measured = !matrix.rescale(sizes);
          done = !sizes.finite;
        }
        if (measured && !done) done = update(it, set);
      }
    }
  }
  matrix.finish(it, sizes, set, passes_before);
}

}  // namespace

// A step of the iteration costs one pass, s·length·itemsize bytes at about 10 per ns and core from
// beyond L2; a matrix that two cores hold there iterates faster than that. The Gram matrix costs a
// pass or two and s²·length/2 multiply-adds at about 16 (fp64) or 32 per ns and core; an iteration
// with no start of its own takes about 20 steps.
bool power_iteration_uses_gram(const PowerIterationItem& item, int k, PowerMethod method,
                               int64_t max_steps, double tol) {
  const int64_t s = std::min(item.m, item.n), length = std::max(item.m, item.n);
  const double compute = item.dtype == DType::f64 ? 8.0 : 4.0;
  const double itemsize = item.dtype == DType::f64 ? 8 : item.dtype == DType::f32 ? 4 : 2;
  const double size = static_cast<double>(s) * static_cast<double>(length);
  if (method != PowerMethod::cg || tol == 0.0 || item.start || s > kShort ||
      size * compute <= 2 * kSmallBytes || 2 * k > s)
    return false;
  const double pass = size * itemsize / 10.0,
               gram = size * static_cast<double>(s) / 2.0 / (128.0 / compute);
  return gram + 3.0 * pass < std::min<double>(20.0, static_cast<double>(max_steps)) * pass;
}

void power_iteration(const PowerIterationItem* items, int64_t n_items, int k, PowerMethod method,
                     int64_t max_steps, double tol, uint64_t seed, int threads) {
  const Settings set{k, method, max_steps, tol, seed};
  struct Task {
    int64_t item, index, number, bytes;
  };
  std::vector<Task> tasks;
  int64_t number = 0, total = 0;
  for (int64_t i = 0; i < n_items; ++i) {
    const int64_t bytes =
        items[i].m * (items[i].dtype == DType::f64 ? padded<double>(items[i].n) * 8
                                                   : padded<float>(items[i].n) * 4);
    for (int64_t b = 0; b < items[i].batch; ++b) tasks.push_back({i, b, number++, bytes});
    total += items[i].batch * bytes;
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.bytes > b.bytes; });
  using Workspaces = std::tuple<Workspace<float>, Workspace<double>>;
  const auto run = [&](int64_t i, int team, Workspaces& workspaces) {
    const Task &task = tasks[i], &next = tasks[std::min<int64_t>(i + 1, tasks.size() - 1)];
    with_dtype(items[task.item].dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      Matrix<T> matrix{items[task.item], task.index, task.number};
      if (task.bytes > kSmallBytes) return run_large(matrix, set, team);
      const bool alike = next.item == task.item;
      const Matrix<T> after{items[task.item], alike ? next.index : task.index, 0};
      run_small(matrix, set, after.w(), std::get<Workspace<compute_t<T>>>(workspaces));
    });
  };
  // A thread a matrix needs no barriers; matrices too large to be balanced that way come first,
  // with all threads at each.
  const int64_t count = static_cast<int64_t>(tasks.size());
  int64_t first = 0;
  Workspaces none;
  while (threads > 1 && first < count &&
         tasks[first].bytes > std::max(kSmallBytes, total / threads)) {
    total -= tasks[first].bytes;
    run(first++, threads, none);
  }
  // So little work that a team would cost more than it saves.
  const bool little = total * std::min<int64_t>(max_steps, 16) <= kSmallBytes / 4;
  if (count - first == 1 || little) {
    while (first < count) run(first++, 1, none);
    return;
  }
  const int64_t at_once = std::clamp<int64_t>((count - first) / (16 * threads), 1, 64);
#pragma omp parallel num_threads(threads)
  {
    Workspaces workspaces;
#pragma omp for schedule(dynamic, at_once)
    for (int64_t i = first; i < count; ++i) run(i, 1, workspaces);
  }
}

}  // namespace gti
