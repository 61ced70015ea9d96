// Largest singular triples (σ, u, v) of every matrix of a list: one launch for all of a dtype and
// for all steps. Each matrix stops on its own; the host is never asked. Here stand the classes and
// the kernel; the rest is in
//
//   power_iteration_numbers.cuh   copies, arrivals and numbers of the machine
//   power_iteration_team.cuh      what a block knows of its matrix; barriers and sums of a team
//   power_iteration_pass.cuh      the pass over W, k = 1; the norms of W
//   power_iteration_step.cuh      k = 1: what happens between two passes
//   power_iteration_subspace.cuh  k > 1: what happens between two passes
//   power_iteration_subspace_pass.cuh  its pass
//   power_iteration_dense.cuh     its small matrices in shared memory
//
// A matrix W [m, n] is owned by a team of `size` blocks: each has a range of rows, and of all
// vectors of length n a slice of columns. For k = 1 a step is
//
//   pass     y = W_r x, z += W_rᵀ y: every row is read once; z is the block's share of Wᵀ W x
//   reduce   dot products of the images; with it, the shares of z become readable
//   update   the block's slice of z and of every vector: Rayleigh–Ritz, residual
//   reduce   |r|², r·v, r·s; with it, the slices of the next direction become readable
//
// so a step needs two barriers of the team (one or two more where the residual has drowned in
// rounding). Every sum has a fixed order and nothing is added atomically: same input, same bits.
//
// Classes, by the kind of team and the mode of an item; bytes that a step must move and what bounds
// it:
//
//   block, on chip    a block a matrix. W and all vectors in shared memory, nothing in device
//                     memory. Bound by two sweeps over the W in shared memory at 128 bytes a clock
//                     and multiprocessor, and by the latency of about six block barriers.
//   cluster, on chip  a cluster a matrix (sm_90 and later), the same per block; shares of z and
//                     slices of x go through distributed shared memory: 2·n·sizeof(C) bytes a
//                     block. Bound by the latency of two cluster barriers for small slices.
//   grid, on chip     many blocks a matrix, W in their shared memory; shares and slices go through
//                     L2: 3·n·sizeof(C) a block. Bound by two barriers in L2 (a few µs).
//   grid, staged      W streams through a ring in shared memory: m·n·sizeof(T) bytes from L2 where
//                     the matrix stays there, else from device memory, whose bandwidth is the
//                     bound.
//   grid, wide        not even a row fits: a panel of rows is read twice, the second time from L1
//                     or L2. Bound by L2, about half the bandwidth of the staged mode.
//
// What kind a team is, is known at run time and the same for all of its blocks: it decides where
// the memory is that a team shares, and what a barrier is. The passes over W do not ask.
//
// Once per matrix comes a sweep that measures W (its norms, whether it is finite, its scale): as
// many bytes as a step. On chip, the only read of device memory is that W is loaded once.
//
// k > 1 has a block on chip, with all vectors in shared memory too, and a grid on chip and wide,
// with the vectors in device memory, where L2 keeps them.
//
// Macros: ELEMENT, see elements.cuh; SUBSPACE 0 for k = 1, 1 for k > 1; THREADS.

#ifndef THREADS
#define THREADS 256
#endif

#include "power_iteration_pass.cuh"
#if SUBSPACE
#include "power_iteration_subspace.cuh"
#else
#include "power_iteration_step.cuh"
#endif

// All blocks go through the sections in order, the largest teams first. A section cuts the blocks,
// from its first on, into teams; team t takes the items t, t + teams, …; who is in no team goes on
// to the next section. A block waits for its own team alone, and the order is the same for all, so
// that no wait is in a circle; and the blocks of a team run at once: those of a cluster always do,
// and where a section is of kind kGrid the launch is cooperative. A cluster of a section is one of
// the launch.
//
// The barrier after an item is the end of all reading of what others have: after it a block may
// overwrite its memory, or end. Teams of a grid have memory and counters of their own in each
// section.
//
// k = 1. Shared memory of a block: Control; slice [width] (unless kGrid); and unless wide: v, r, s
// and images, x [np], z [groups, np], W. Device memory, kGrid: for each team x [width · blocks],
// then for each block its slots, its share [np], and if wide: z [groups, np] in place of the share,
// vectors.
//
// k > 1. Shared memory of a block: Control, Dense; kBlock: x, zx [side, np], z [k, groups, np], y
// [side, m]; W, if it is on chip. Device memory, kGrid: for each team sums, x, zx, y, then for
// each block its slots and sums, z.
//
// counters: zero; in each section of kind kGrid one for each team, then one for each item.
extern "C" __global__ void __launch_bounds__(THREADS, SUBSPACE ? 1 : 2)
    power_iteration(const Section* sections, int64 section_count, const Item* items, int64 k,
                    int64 power, int64 max_steps, double tol, int64 seed, const C* start,
                    unsigned char* memory, unsigned* counters, C* u, C* v, double* sigma,
                    double* residual, double* upper, int64* steps, unsigned char* converged) {
  const Settings set = {static_cast<int>(k),       power != 0, max_steps, tol,
                        static_cast<uint64>(seed), start};
  const Results out = {u, v, sigma, residual, upper, steps, converged};
  Work& p = control()->work;

#pragma unroll 1
  for (const Section* section = sections; section < sections + section_count; ++section) {
    const int size = static_cast<int>(section->size), blocks = static_cast<int>(gridDim.x);
    const int block =
        (static_cast<int>(blockIdx.x) + blocks - static_cast<int>(section->first)) % blocks;
    const int64 number = block / size, teams = section->teams;
    if (number >= teams) continue;
    unsigned* arrivals = counters + section->counters;
    unsigned target = 0;
#pragma unroll 1
    for (int64 index = number; index < section->items; index += teams) {
      if (threadIdx.x == 0) {
        p.kind = static_cast<int>(section->kind);
        p.rank = block % size;
        p.x_bytes = section->x_bytes;
        p.region_bytes = section->region_bytes;
        p.memory = memory + section->memory + number * (p.x_bytes + size * p.region_bytes);
        p.counter = arrivals + teams + index;
        p.target = 0;
        lay_out(items[section->begin + index], set, p);
      }
      __syncthreads();
      if (p.rank < p.size) {
        if (p.item.mode == kOnChip) {
          copy_rows(p, 0, p.rows, p.ring(0));
          commit_copies();
          wait_for_copies<0>();
          __syncthreads();
        }
        run(p, set, out);
      }
      barrier(static_cast<int>(section->kind), size, arrivals + number, target);
    }
  }
}
