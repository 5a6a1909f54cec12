/* The part of paged_attention.c that computes a tile of tokens and heads; compiled once for each kind of processor (see
 * kernels.h). TILE_STEP says how many rows of PARTS vectors fit into its registers. */

LANES_TYPE(NAME(lanes));
#define Lanes NAME(lanes)
#define PARTS 4

/* out[r][..] = the sum over i < count of factors[r][i] * rows[i][..], of TILE_STEP rows and `vectors` * LANES columns; added
 * to what is there unless it is to be a `fresh` one. The counts are floats from one row to the next. */
INLINE void NAME(sum_rows)(float *out, const int out_row, const float *factors, const int factors_row, const float *rows,
                           const int rows_row, const int count, const int vectors, const int fresh)
{
    Lanes sums[TILE_STEP][PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_STEP; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[r][v] = fresh ? (Lanes){0} : *(const Lanes *)(out + r * out_row + v * LANES);
    for (int i = 0; i < count; i++) {
        Lanes row[PARTS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) row[v] = *(const Lanes *)(rows + i * rows_row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_STEP; r++) {
            const float factor = factors[r * factors_row + i];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += row[v] * factor;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_STEP; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(Lanes *)(out + r * out_row + v * LANES) = sums[r][v];
}

/* Scores of one row become weights, and what was summed up before is scaled to the new maximum. Of the keys only those
 * from `low` to `high` are seen. */
INLINE void NAME(weigh)(float *scores, float *acc, float *peak, float *sum, int low, int high, const int width,
                        float softcap)
{
    if (softcap != 0.0f)
        for (int j = 0; j < TILE_KEYS; j++) scores[j] = tanhf(scores[j] / softcap) * softcap;
    for (int j = 0; j < low; j++) scores[j] = LOWEST;
    for (int j = high + 1; j < TILE_KEYS; j++) scores[j] = LOWEST;
    float most = *peak, added = 0.0f;
    for (int j = 0; j < TILE_KEYS; j++) most = scores[j] > most ? scores[j] : most;
    for (int j = 0; j < TILE_KEYS; j++) scores[j] = expf(scores[j] - most);
    for (int j = 0; j < TILE_KEYS; j++) added += scores[j];
    if (most > *peak) {
        const float shrink = *sum == 0.0f ? 0.0f : expf(*peak - most);
        *sum *= shrink;
        for (int d = 0; d < width; d++) acc[d] *= shrink;
        *peak = most;
    }
    *sum += added;
}

INLINE void NAME(attend_tile_sized)(const Pass *pass, const Attention *a, int slice, int first, int tokens, int group,
                                    int head, int heads, const int key_size, const int value_size)
{
    const int32_t *pages = pass->pages + pass->page_starts[slice];
    const int page = pass->page, start = pass->starts[slice] + first, row = pass->rows[slice] + first;
    const int64_t key_row = (int64_t)a->kv_heads * key_size, value_row = (int64_t)a->kv_heads * value_size;
    const int width = (value_size + LANES - 1) / LANES * LANES, rows = heads * tokens;
    /* more rows than there are, so that each step has TILE_STEP of them */
    float query[(TILE_ROWS + TILE_STEP) * key_size], acc[(TILE_ROWS + TILE_STEP) * width];
    float scores[(TILE_ROWS + TILE_STEP) * TILE_KEYS], columns[TILE_KEYS * key_size], values[TILE_KEYS * width];
    float peaks[TILE_ROWS], sums[TILE_ROWS];

    for (int h = 0; h < heads; h++)
        for (int t = 0; t < tokens; t++) {
            const float *from = a->query + (head + h) * a->query_head + (row + t) * a->query_token;
            for (int d = 0; d < key_size; d++) query[(h * tokens + t) * key_size + d] = from[d] * a->scale;
            peaks[h * tokens + t] = a->sinks ? a->sinks[head + h] : LOWEST;
            sums[h * tokens + t] = a->sinks ? 1.0f : 0.0f;
        }
    memset(query + rows * key_size, 0, TILE_STEP * key_size * sizeof(float));
    memset(acc, 0, (rows + TILE_STEP) * width * sizeof(float));
    memset(scores + rows * TILE_KEYS, 0, TILE_STEP * TILE_KEYS * sizeof(float));
    memset(columns, 0, sizeof(columns));
    memset(values, 0, sizeof(values));

    for (int from = a->window && start + 1 > a->window ? start + 1 - a->window : 0; from < start + tokens;
         from += TILE_KEYS) {
        const int count = start + tokens - from < TILE_KEYS ? start + tokens - from : TILE_KEYS;
        for (int j = 0; j < count; j++) {
            int64_t at = (int64_t)pages[(from + j) / page] * page + (from + j) % page;
            const float *key = a->keys + at * key_row + group * key_size;
            for (int d = 0; d < key_size; d++) columns[d * TILE_KEYS + j] = key[d];
            memcpy(values + j * width, a->values + at * value_row + group * value_size, value_size * sizeof(float));
        }
        for (int r = 0; r < rows; r += TILE_STEP)
            for (int j = 0; j < TILE_KEYS; j += PARTS * LANES)
                NAME(sum_rows)(scores + r * TILE_KEYS + j, TILE_KEYS, query + r * key_size, key_size, columns + j, TILE_KEYS,
                               key_size, PARTS, 1);
        for (int r = 0; r < rows; r++) {
            const int position = start + r % tokens, high = position - from < count ? position - from : count - 1;
            const int low = a->window && position + 1 - a->window > from ? position + 1 - a->window - from : 0;
            if (low > high) /* nothing of it is seen by this row */
                memset(scores + r * TILE_KEYS, 0, TILE_KEYS * sizeof(float));
            else
                NAME(weigh)(scores + r * TILE_KEYS, acc + r * width, peaks + r, sums + r, low, high, width, a->softcap);
        }
        for (int r = 0; r < rows; r += TILE_STEP) {
            int d = 0;
            for (; d + PARTS * LANES <= width; d += PARTS * LANES)
                NAME(sum_rows)(acc + r * width + d, width, scores + r * TILE_KEYS, TILE_KEYS, values + d, width, count, PARTS,
                               0);
            for (; d < width; d += LANES)
                NAME(sum_rows)(acc + r * width + d, width, scores + r * TILE_KEYS, TILE_KEYS, values + d, width, count, 1,
                               0);
        }
    }
    for (int r = 0; r < rows; r++) {
        float *out = a->out + (row + r % tokens) * a->out_token + (head + r / tokens) * value_size;
        const float part = 1.0f / sums[r];
        for (int d = 0; d < value_size; d++) out[d] = acc[r * width + d] * part;
    }
}

/* The usual sizes as constants, as in `attend`. */
static void NAME(attend_tile)(const Pass *pass, const Attention *a, int slice, int first, int tokens, int group,
                              int head, int heads)
{
    if (a->key_size == 64 && a->value_size == 64)
        NAME(attend_tile_sized)(pass, a, slice, first, tokens, group, head, heads, 64, 64);
    else if (a->key_size == 128 && a->value_size == 128)
        NAME(attend_tile_sized)(pass, a, slice, first, tokens, group, head, heads, 128, 128);
    else
        NAME(attend_tile_sized)(pass, a, slice, first, tokens, group, head, heads, a->key_size, a->value_size);
}

#undef PARTS
#undef Lanes
