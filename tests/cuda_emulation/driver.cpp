// One kernel of one source as a shared library. SOURCE: the path in quotes; ENTRY: the kernel.
#include "emulation.h"
#include SOURCE

extern "C" const char* emulate(unsigned blocks, unsigned threads, unsigned cluster,
                               size_t shared_bytes, unsigned resident, int order,
                               const uint64_t* words) {
  return emulation::launch(&ENTRY, blocks, threads, cluster, shared_bytes, resident, order, words);
}
