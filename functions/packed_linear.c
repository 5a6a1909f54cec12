/* y = x W^T in float32 on a CPU, for few rows as well as for many, with W packed in panels.
 *
 * A panel holds 32 outputs, input by input, so that the inner loop reads it from front to back, whatever the number of
 * rows: a single row is as fast as memory, and some dozens are near what the processor can multiply. Each result is
 * summed up over the inputs in one order, so a row's results do not depend on the rows beside it, to the last bit.
 */

#include <stdint.h>
#include <string.h>

#define PANEL 32
#define LANES 16
#define INLINE static inline __attribute__((always_inline))

/* Sixteen floats at a time; the compiler makes of it what the processor has. */
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

typedef struct {
    const float *x, *panels;
    float *y;
    int64_t rows, inputs, outputs, x_row, y_row; /* x_row, y_row: floats from one row to the next */
    int32_t threads;
} Linear;

typedef void Panel(const Linear *l, int index);

#define NAME(name) name##_any
#define ROWS_MAX 2
#include "packed_linear_rows.h"
#undef NAME
#undef ROWS_MAX

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define NAME(name) name##_avx2
#define ROWS_MAX 3
#include "packed_linear_rows.h"
#undef NAME
#undef ROWS_MAX
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#define NAME(name) name##_avx512
#define ROWS_MAX 12
#include "packed_linear_rows.h"
#undef NAME
#undef ROWS_MAX
#pragma GCC pop_options

static Panel *best(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
        return panel_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? panel_avx2 : panel_any;
}
#else
static Panel *best(void) { return panel_any; }
#endif

void packed_linear(const Linear *l)
{
    Panel *panel = best();
    int panels = (l->outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(l->threads) if (l->threads > 1)
    for (int index = 0; index < panels; index++) panel(l, index);
}

/* Writes `outputs` rows of weights [outputs, inputs], which become the outputs from `first` on, into the panels. Panels
 * are zero where nothing is written. */
void pack_linear(const float *weights, float *panels, int64_t inputs, int64_t outputs, int64_t first, int32_t threads)
{
    int64_t from = first / PANEL, to = (first + outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t index = from; index < to; index++) {
        float *panel = panels + index * inputs * PANEL;
        int64_t low = index * PANEL > first ? 0 : first - index * PANEL;
        int64_t high = first + outputs - index * PANEL < PANEL ? first + outputs - index * PANEL : PANEL;
        const float *rows = weights + (index * PANEL - first) * inputs;
        for (int64_t i = 0; i < inputs; i += LANES)
            for (int64_t column = low; column < high; column++)
                for (int64_t j = i; j < i + LANES && j < inputs; j++)
                    panel[j * PANEL + column] = rows[column * inputs + j];
    }
}
