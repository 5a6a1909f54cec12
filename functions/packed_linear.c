/* y = x W^T + bias in float32 on a CPU, for few rows as well as for many, with W packed in panels, of floats or of int8.
 *
 * A panel holds 32 outputs, input by input, so that the inner loop reads it from front to back, whatever the number of
 * rows: a single row is as fast as memory, and some dozens are near what the processor can multiply. Each result is
 * summed up over the inputs in one order, so a row's results do not depend on the rows beside it, to the last bit.
 *
 * Weights of int8 have a scale for each output. They become floats on their way into the registers, the sums are
 * multiplied by the scale at the end. Inputs are not rounded.
 */

#include <string.h>

#include "kernels.h"

#define PANEL 32
#define CACHE_LINE 64 /* bytes */
#define INPUT_BYTES (512 << 10) /* of the rows that go through all panels together: they stay in a core's own cache */
#define ROWS_EVEN 12 /* a multiple of each ROWS_MAX: blocks of rows are whole wherever they begin */

/* Has the compiler keep a pointer as it is, and not put others in its place. */
#define KEEP(pointer) __asm__("" : "+r"(pointer))

/* The results of the rows from `first` to before `end` for one panel. */
typedef void Panel(const Linear *l, int index, int64_t first, int64_t end);

#define NAME(name) name##_any
#define LANES 4
#define ROWS_MAX 2
#include "packed_linear_rows.h"
#undef NAME
#undef LANES
#undef ROWS_MAX

#if PROCESSORS
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define NAME(name) name##_avx2
#define LANES 8
#define ROWS_MAX 3
#include "packed_linear_rows.h"
#undef NAME
#undef LANES
#undef ROWS_MAX
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#include <immintrin.h> /* here, so that its functions are compiled for the same processor */
#define NAME(name) name##_avx512
#define LANES 16
#define ROWS_MAX 12
/* in two instructions, which GCC does not find */
#define FLOATS(at) (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at))))
#include "packed_linear_rows.h"
#undef NAME
#undef LANES
#undef ROWS_MAX
#pragma GCC pop_options

static Panel *best(int whole)
{
    if (processor() == AVX512) return whole ? whole_avx512 : floats_avx512;
    if (processor() == AVX2) return whole ? whole_avx2 : floats_avx2;
    return whole ? whole_any : floats_any;
}
#else
static Panel *best(int whole) { return whole ? whole_any : floats_any; }
#endif

void packed_linear_team(const Linear *l)
{
    Panel *panel = best(l->scale != NULL);
    int panels = (l->outputs + PANEL - 1) / PANEL;
    int64_t fitting = INPUT_BYTES / (l->inputs * (int64_t)sizeof(float)), least = 8 * ROWS_EVEN;
    int64_t together = fitting < least ? least : fitting / ROWS_EVEN * ROWS_EVEN;
    for (int64_t first = 0; first < l->rows; first += together) {
        int64_t end = l->rows - first < together ? l->rows : first + together;
#pragma omp for schedule(static) nowait
        for (int index = 0; index < panels; index++) panel(l, index, first, end);
    }
}

void packed_linear(const Linear *l)
{
#pragma omp parallel num_threads(l->threads) if (l->threads > 1)
    packed_linear_team(l);
}

/* Writes `outputs` rows of weights [outputs, inputs], of `item` bytes each, which become the outputs from `first` on,
 * into the panels. Panels are zero where nothing is written. */
INLINE void pack(const char *weights, char *panels, int64_t inputs, int64_t outputs, int64_t first, int threads,
                 const int item)
{
    int64_t from = first / PANEL, to = (first + outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t index = from; index < to; index++) {
        char *panel = panels + index * inputs * PANEL * item;
        int64_t low = index * PANEL > first ? 0 : first - index * PANEL;
        int64_t high = first + outputs - index * PANEL < PANEL ? first + outputs - index * PANEL : PANEL;
        const char *rows = weights + (index * PANEL - first) * inputs * item;
        for (int64_t i = 0; i < inputs; i += LINE)
            for (int64_t column = low; column < high; column++)
                for (int64_t j = i; j < i + LINE && j < inputs; j++)
                    memcpy(panel + (j * PANEL + column) * item, rows + (column * inputs + j) * item, item);
    }
}

void pack_linear(const float *weights, float *panels, int64_t inputs, int64_t outputs, int64_t first, int32_t threads)
{
    pack((const char *)weights, (char *)panels, inputs, outputs, first, threads, sizeof(float));
}

void pack_linear_int8(const int8_t *weights, int8_t *panels, int64_t inputs, int64_t outputs, int64_t first,
                      int32_t threads)
{
    pack((const char *)weights, (char *)panels, inputs, outputs, first, threads, 1);
}
