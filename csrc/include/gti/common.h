// What every entry point shares: element types and the meaning of `threads`.
#pragma once

#include <cstdint>

namespace gti {

// Element type of a buffer. The numbers are part of the contract with the bindings.
enum class DType : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// Every entry point takes `threads`, the largest number of OpenMP threads it may use. It never
// changes a bit of a result: work is cut into pieces and sums are combined in an order that
// depends on the sizes alone.

}  // namespace gti
