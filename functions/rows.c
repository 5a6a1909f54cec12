/* What is computed of one row of floats at a time. A row's result depends on it alone.
 *
 * Compiled once for each kind of processor, like the other kernels: GCC's target_clones would ask for the very processor
 * that is named and not for what it can do. */

#include <math.h>

#include "kernels.h"

#define NAME(name) name##_any
#include "rows.h"
#undef NAME

#if PROCESSORS
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define NAME(name) name##_avx2
#include "rows.h"
#undef NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#define NAME(name) name##_avx512
#include "rows.h"
#undef NAME
#pragma GCC pop_options
#endif

const Rows *best_rows(void)
{
#if PROCESSORS
    if (processor() == AVX512) return &rows_avx512;
    if (processor() == AVX2) return &rows_avx2;
#endif
    return &rows_any;
}

void rms_norm(const float *x, const float *factors, float *y, int64_t rows, int64_t size, int64_t x_row, float eps)
{
    const Rows *best = best_rows();
    for (int64_t row = 0; row < rows; row++) best->rms_norm(x + row * x_row, factors, y + row * size, size, eps);
}
