/* The part of packed_linear.c that is compiled once for each kind of processor; NAME gives each its own names, ROWS_MAX
 * says how many rows of results fit into its registers. */

/* `rows` rows of results, PANEL columns: acc += x[r][i] * panel[i]. Meanwhile floats from `next` on are fetched, `pace`
 * of them for each input: memory is read while the processor multiplies. */
INLINE void NAME(tile)(const Linear *l, const float *x, const float *panel, float *y, int columns, const float *next,
                       int64_t pace, const int rows)
{
    Lanes acc[ROWS_MAX][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = (Lanes){0};
    for (int64_t i = 0; i < l->inputs; i++) {
        const Lanes w0 = *(const Lanes *)(panel + i * PANEL), w1 = *(const Lanes *)(panel + i * PANEL + LANES);
        __builtin_prefetch(next + i * pace, 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const float factor = x[r * l->x_row + i];
            acc[r][0] += w0 * factor;
            acc[r][1] += w1 * factor;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *to = y + r * l->y_row;
        if (columns == PANEL) {
            *(Lanes *)to = acc[r][0];
            *(Lanes *)(to + LANES) = acc[r][1];
        } else {
            float last[PANEL];
            *(Lanes *)last = acc[r][0];
            *(Lanes *)(last + LANES) = acc[r][1];
            memcpy(to, last, columns * sizeof(float));
        }
    }
}

#define CASE(n) case n: NAME(tile)(l, x, panel, y, columns, next, pace, n < ROWS_MAX ? n : ROWS_MAX); break;

static void NAME(panel)(const Linear *l, int index)
{
    const float *panel = l->panels + (int64_t)index * l->inputs * PANEL;
    int columns = l->outputs - index * PANEL < PANEL ? l->outputs - index * PANEL : PANEL;
    /* the next panel, shared out to the blocks of rows; of the last one it is harmless to fetch what is not there */
    int64_t blocks = (l->rows + ROWS_MAX - 1) / ROWS_MAX, pace = PANEL / blocks > 16 ? 16 : (PANEL + blocks - 1) / blocks;
    for (int64_t row = 0; row < l->rows; row += ROWS_MAX) {
        const float *next = panel + l->inputs * PANEL + row / ROWS_MAX * l->inputs * pace;
        const float *x = l->x + row * l->x_row;
        float *y = l->y + row * l->y_row + index * PANEL;
        switch (l->rows - row < ROWS_MAX ? l->rows - row : ROWS_MAX) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
    }
}
#undef CASE
