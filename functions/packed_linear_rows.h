/* The part of packed_linear.c that is compiled once for each kind of processor (see kernels.h); ROWS_MAX says how many rows
 * of results fit into its registers. */

LANES_TYPE(NAME(lanes));
#define Lanes NAME(lanes)
#define PARTS (PANEL / LANES)

#ifndef FLOATS
/* LANES int8 as floats, step by step: GCC takes a longer one for each number by itself. */
typedef int8_t NAME(bytes) __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int16_t NAME(words) __attribute__((vector_size(LANES * sizeof(int16_t))));
typedef int32_t NAME(longs) __attribute__((vector_size(LANES * sizeof(int32_t))));
#define FLOATS(at) \
    __builtin_convertvector(__builtin_convertvector( \
        __builtin_convertvector(*(const NAME(bytes) *)(at), NAME(words)), NAME(longs)), Lanes)
#endif

/* `rows` rows of results, PANEL columns: acc += x[r][i] * panel[i]. A weight has `item` bytes: 4 (float) or 1 (int8).
 * Meanwhile memory from `next` on is fetched, `pace` bytes for each input: it is read while the processor multiplies. */
INLINE void NAME(tile)(const Linear *l, const float *x, const char *panel, float *y, const float *scale,
                       const float *bias, int columns, const char *next, int64_t pace, const int rows, const int item)
{
    Lanes acc[ROWS_MAX][PARTS];
    /* The inputs of three rows are reached from one pointer: with a pointer for each row they do not fit into the
     * registers, and fetching them from elsewhere takes the time of a multiplication. */
    const int64_t row = l->x_row;
    const float *three[(ROWS_MAX + 2) / 3];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int p = 0; p < PARTS; p++) acc[r][p] = (Lanes){0};
#pragma GCC unroll 4
    for (int r = 0; r < rows; r += 3) three[r / 3] = x + r * row;
    for (int64_t i = 0; i < l->inputs; i++) {
        const char *at = panel + i * PANEL * item;
        Lanes weights[PARTS];
#pragma GCC unroll 8
        for (int p = 0; p < PARTS; p++) {
            if (item == 1)
                weights[p] = FLOATS(at + p * LANES);
            else
                weights[p] = *(const Lanes *)(at + p * LANES * sizeof(float));
        }
        __builtin_prefetch(next + i * pace, 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const float factor = three[r / 3][r % 3 * row];
#pragma GCC unroll 8
            for (int p = 0; p < PARTS; p++) acc[r][p] += weights[p] * factor;
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r += 3) {
            three[r / 3]++;
            KEEP(three[r / 3]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *to = y + r * l->y_row, last[PANEL], *first = columns == PANEL ? to : last;
#pragma GCC unroll 8
        for (int p = 0; p < PARTS; p++) {
            if (item == 1) acc[r][p] *= *(const Lanes *)(scale + p * LANES);
            *(Lanes *)(first + p * LANES) = acc[r][p];
        }
        if (columns < PANEL) memcpy(to, last, columns * sizeof(float));
        if (bias) {
            /* read again, so that it is an addition for any number of rows: one that is part of a multiplication, as the
             * compiler might make it here and not there, is rounded differently */
            __asm__("" : : : "memory");
            for (int i = 0; i < columns; i++) to[i] += bias[i];
        }
    }
}

#define CASE(n) \
    case n: NAME(tile)(l, x, panel, y, scale, bias, columns, next, pace, n < ROWS_MAX ? n : ROWS_MAX, item); break;

INLINE void NAME(panel)(const Linear *l, int index, int64_t first, int64_t end, const int item)
{
    const char *panel = (const char *)l->panels + (int64_t)index * l->inputs * PANEL * item;
    const float *scale = item == 1 ? l->scale + index * PANEL : NULL;
    const float *bias = l->bias ? l->bias + index * PANEL : NULL;
    int columns = l->outputs - index * PANEL < PANEL ? l->outputs - index * PANEL : PANEL;
    /* the next panel, shared out to the blocks of rows; of the last one it is harmless to fetch what is not there */
    int64_t blocks = (end - first + ROWS_MAX - 1) / ROWS_MAX, share = (PANEL * item + blocks - 1) / blocks;
    int64_t pace = share < CACHE_LINE ? share : CACHE_LINE;
    for (int64_t row = first; row < end; row += ROWS_MAX) {
        const char *next = panel + l->inputs * (PANEL * item + (row - first) / ROWS_MAX * pace);
        const float *x = l->x + row * l->x_row;
        float *y = l->y + row * l->y_row + index * PANEL;
        switch (end - row < ROWS_MAX ? end - row : ROWS_MAX) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
    }
}
#undef CASE

static void NAME(floats)(const Linear *l, int index, int64_t first, int64_t end)
{
    NAME(panel)(l, index, first, end, sizeof(float));
}

static void NAME(whole)(const Linear *l, int index, int64_t first, int64_t end)
{
    NAME(panel)(l, index, first, end, 1);
}

#undef FLOATS
#undef PARTS
#undef Lanes
