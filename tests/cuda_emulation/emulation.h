// Runs a CUDA kernel on the CPU, thread by thread, to test its logic: what a source of csrc/cuda
// needs of CUDA, for g++. A thread is a fiber with a stack of its own; at a barrier, a shuffle or
// in a wait loop it hands over to the next. Finds wrong results, accesses outside of shared memory,
// misaligned vectors, copies read too early, shared memory of a block that has ended, deadlocks;
// and, since the order of the fibers can be chosen, barriers that are missing, where the order
// shows. It does not know the memory model: no proof against races.
#pragma once

#include <string.h>
#include <sys/mman.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define GTI_EMULATION
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Not <cmath>: it takes as long to compile as a kernel.
extern "C" {
double sqrt(double) noexcept;
double fabs(double) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Barrier {
  unsigned expected = 0, count = 0, generation = 0;
  void wait();
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];
  double operands[2][2][32];  // of mma
};

struct Block {
  Index index;
  unsigned char* shared = nullptr;
  std::vector<unsigned char> memory;
  Barrier barrier;
  int yes[2] = {};       // of __syncthreads_count, this one and the one before
  unsigned running = 0;  // threads that have not come to their end
  Barrier* cluster = nullptr;
  Block* first_of_cluster = nullptr;
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;
  Index thread;
  Block* block = nullptr;
  const unsigned* waits_for = nullptr;  // to differ from `seen`
  unsigned seen = 0, shuffles = 0;
  bool done = false;
  std::vector<Copy> copies;                  // since the last commit
  std::vector<std::vector<Copy>> committed;  // done at the last moment a wait allows
};

inline Fiber* current = nullptr;
inline Fiber scheduler;
inline Index grid, block_size;
inline uint64_t progress = 0;  // what a waiting loop may be waiting for
inline const char* error = nullptr;
inline constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 256;

inline void fail(const char* what) {
  if (!error) error = what;
}

#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void switch_fibers(Fiber& from, Fiber& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}
inline void prepare(Fiber& fiber, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(fiber.stack) + kStackBytes) - 2;
  *top = reinterpret_cast<uint64_t>(entry);  // where the first switch returns to
  fiber.stack_pointer = top - 6;
}
#else
inline void switch_fibers(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, entry, 0);
}
#endif

inline void yield() {
  Fiber* self = current;
  switch_fibers(*self, scheduler);
}

inline void Barrier::wait() {
  if (++count == expected) {
    count = 0;
    ++generation;
    ++progress;
    return;
  }
  current->seen = generation;
  current->waits_for = &generation;
  yield();
}

template <class T>
T exchange(T value, int with) {
  const unsigned thread = current->thread.x, lane = thread % 32;
  Warp& warp = current->block->warps[thread / 32];
  auto& slots = warp.slots[current->shuffles++ % 2];
  memcpy(&slots[lane], &value, sizeof(T));
  warp.barrier.wait();
  memcpy(&value, &slots[with], sizeof(T));
  return value;
}

inline void* kernel_call = nullptr;
inline void (*kernel_entry)(void*) = nullptr;
inline void fiber_main() {
  kernel_entry(kernel_call);
  current->done = true;
  --current->block->running;
  ++progress;
  yield();
}

// Fibers in the order of their numbers (0), the other way round (1), or shuffled anew each round;
// or block by block (−1), each as far as it gets without the others.
inline void run(std::vector<Fiber>& fibers, int order) {
  std::vector<size_t> turn(fibers.size());
  for (size_t i = 0; i < turn.size(); ++i) turn[i] = order == 1 ? turn.size() - 1 - i : i;
  uint64_t random = static_cast<uint64_t>(order);
  size_t left = fibers.size();
  const size_t group = order < 0 ? block_size.x : left;
  for (int idle = 0; left > 0 && idle < 100;) {
    const uint64_t before = progress;
    for (size_t i = turn.size() - 1; order > 1 && i > 0; --i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::swap(turn[i], turn[(random >> 33) % (i + 1)]);
    }
    for (size_t first = 0; first < turn.size(); first += group) {
      uint64_t came_to;
      do {
        came_to = progress;
        for (size_t i = first; i < first + group; ++i) {
          Fiber& fiber = fibers[turn[i]];
          if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
          fiber.waits_for = nullptr;
          current = &fiber;
          switch_fibers(scheduler, fiber);
          left -= fiber.done;
        }
      } while (order < 0 && progress != came_to);
    }
    idle = progress == before ? idle + 1 : 0;
  }
  if (left > 0) fail("deadlock: threads wait for what never comes");
}

// One launch; `resident` blocks run at once, the others after them. Null or what went wrong.
template <class... Args>
const char* launch(void (*kernel)(Args...), unsigned blocks, unsigned threads, unsigned cluster,
                   size_t shared_bytes, unsigned resident, int order, const uint64_t* words) {
  error = nullptr;
  grid = {blocks, 1, 1};
  block_size = {threads, 1, 1};
  const auto call = [&]<size_t... I>(std::index_sequence<I...>) {
    const auto as = [&]<class T>(uint64_t word, T* out) {
      static_assert(sizeof(T) == 8, "parameters are 8 bytes each");
      memcpy(out, &word, 8);
      return *out;
    };
    std::tuple<Args...> args;
    ((std::get<I>(args) = as(words[I], &std::get<I>(args))), ...);
    std::apply(kernel, args);
  };
  auto bound = [&] { call(std::index_sequence_for<Args...>{}); };
  kernel_call = &bound;
  kernel_entry = [](void* f) { (*static_cast<decltype(bound)*>(f))(); };

  const size_t stacks = static_cast<size_t>(resident) * threads * kStackBytes;
  void* stack = mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (unsigned first = 0; first < blocks && !error; first += resident) {
    const unsigned here = blocks - first < resident ? blocks - first : resident;
    std::vector<Block> all(here);
    std::vector<Barrier> clusters(here);
    std::vector<Fiber> fibers(static_cast<size_t>(here) * threads);
    for (unsigned b = 0; b < here; ++b) {
      Block& block = all[b];
      block.index = {first + b, 0, 0};
      block.memory.assign(shared_bytes + 2 * kGuardBytes + 16, 0xff);  // NaN to whoever reads it
      const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
      block.shared = block.memory.data() + kGuardBytes + (16 - address % 16) % 16;
      block.barrier.expected = block.running = threads;
      block.cluster = &clusters[b / cluster];
      block.cluster->expected = threads * cluster;
      block.first_of_cluster = &all[b / cluster * cluster];
      block.warps.resize(threads / 32);
      for (Warp& warp : block.warps) warp.barrier.expected = 32;
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[b * threads + t];
        fiber.thread = {t, 0, 0};
        fiber.block = &block;
        fiber.stack = static_cast<char*>(stack) + (b * threads + t) * kStackBytes;
        prepare(fiber, fiber_main);
      }
    }
    run(fibers, order);
    for (const Block& block : all)
      for (const unsigned char& x : block.memory)
        if ((&x < block.shared || &x >= block.shared + shared_bytes) && x != 0xff)
          fail("a write outside of shared memory");
  }
  munmap(stack, stacks);
  return error;
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block->index)
#define gridDim (emulation::grid)
#define blockDim (emulation::block_size)

inline void __syncthreads() { emulation::current->block->barrier.wait(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, static_cast<int>(emulation::current->thread.x % 32) ^ mask);
}
// How many threads of the block say yes.
inline int __syncthreads_count(int predicate) {
  emulation::Block* block = emulation::current->block;
  const unsigned turn = block->barrier.generation % 2;
  if (block->barrier.count == 0) block->yes[turn] = 0;
  block->yes[turn] += predicate != 0;
  block->barrier.wait();
  return block->yes[turn];
}
template <class To, class From>
To emulation_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &x, sizeof(out));
  return out;
}
inline float __uint_as_float(unsigned x) { return emulation_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulation_bits<unsigned>(x); }
inline long long __double_as_longlong(double x) { return emulation_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation_bits<double>(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __hiloint2double(int high, int low) {
  return emulation_bits<double>(static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 |
                                static_cast<unsigned>(low));
}

// What a source wraps in functions of its own, in place of PTX.
inline unsigned char* shared_memory() { return emulation::current->block->shared; }
inline float half_to_float(unsigned short bits) {
  const unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? __builtin_nanf("") : __builtin_inff())
                     : exponent == 0 ? __builtin_ldexpf(static_cast<float>(fraction), -24)
                                     : __builtin_ldexpf(static_cast<float>(fraction + 1024),
                                                        static_cast<int>(exponent) - 25);
  return bits >> 15 ? -size : size;
}
inline unsigned short float_to_half(float x) {
  return emulation_bits<unsigned short>(static_cast<_Float16>(x));
}
inline unsigned short float_to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void mma(double (&c)[2], double a, double b) {
  using namespace emulation;
  const unsigned thread = current->thread.x, lane = thread % 32;
  Warp& warp = current->block->warps[thread / 32];
  auto& operands = warp.operands[current->shuffles++ % 2];
  operands[0][lane] = a;
  operands[1][lane] = b;
  warp.barrier.wait();
  for (int e = 0; e < 2; ++e)
    for (int k = 0; k < 4; ++k)
      c[e] = fma(operands[0][lane / 4 * 4 + k], operands[1][(lane % 4 * 2 + e) * 4 + k], c[e]);
}
inline void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulation::fail("an asynchronous copy that is not aligned to 16 bytes");
  emulation::current->copies.push_back({to, from});
}
inline void commit_copies() {
  emulation::current->committed.push_back(std::exchange(emulation::current->copies, {}));
}
template <int kPending>
void wait_for_copies() {
  auto& groups = emulation::current->committed;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}
inline void arrive(unsigned* counter) {
  ++*counter;
  ++emulation::progress;
}
inline bool arrived(const unsigned* counter, unsigned target) {
  if (static_cast<int>(*counter - target) >= 0) return true;
  emulation::yield();
  return false;
}
inline void cluster_sync() { emulation::current->block->cluster->wait(); }
inline unsigned char* cluster_map(unsigned char* place, int rank) {
  const emulation::Block *block = emulation::current->block,
                         *other = block->first_of_cluster + rank;
  if (other->running == 0) emulation::fail("shared memory of a block that has ended");
  return other->shared + (place - block->shared);
}

// With -fsanitize=alignment, in place of its library.
extern "C" inline void __attribute__((used)) __ubsan_handle_type_mismatch_v1(void*, void*) {
  emulation::fail("a vector that is not aligned");
}
