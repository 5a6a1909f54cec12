/* The part of paged_attention.c that computes token by token; compiled once for each kind of processor (see kernels.h). */

LANES_TYPE(NAME(lanes));
#define Lanes NAME(lanes)

INLINE float NAME(dot)(const float *a, const float *b, const int n)
{
    Lanes sums = {0};
    int d = 0;
    for (; d + LANES <= n; d += LANES) sums += *(const Lanes *)(a + d) * *(const Lanes *)(b + d);
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    for (; d < n; d++) sum += a[d] * b[d];
    return sum;
}

/* out += the sum of weights[i] * rows[i] over `count` rows of n floats, which begin at `at` */
INLINE void NAME(add_rows)(float *out, const float *const *rows, int at, const float *weights, const int count,
                           const int n)
{
    int d = 0;
    for (; d + LANES <= n; d += LANES) {
        Lanes sums = *(Lanes *)(out + d);
        for (int i = 0; i < count; i++) sums += weights[i] * *(const Lanes *)(rows[i] + at + d);
        *(Lanes *)(out + d) = sums;
    }
    for (; d < n; d++)
        for (int i = 0; i < count; i++) out[d] += weights[i] * rows[i][at + d];
}

/* Query heads first .. first + count - 1 of the token at `position` in row `row`. The heads of all their kv heads are
 * computed side by side, so that memory is read from front to back. */
INLINE void NAME(attend_sized)(const Pass *pass, const Attention *a, int slice, int position, int row, int first,
                               int count, const int key_size, const int value_size)
{
    const int32_t *pages = pass->pages + pass->page_starts[slice];
    const int page = pass->page, shared = a->heads / a->kv_heads, group = first / shared;
    const int groups = (first + count - 1) / shared + 1 - group; /* kv heads that take part */
    const int64_t key_row = (int64_t)a->kv_heads * key_size, value_row = (int64_t)a->kv_heads * value_size;
    float scores[HEADS_MAX][CHUNK], sums[HEADS_MAX], peaks[HEADS_MAX], acc[HEADS_MAX][SIZE_MAX_];
    const float *keys[CHUNK + AHEAD], *values[CHUNK], *queries[HEADS_MAX];
    int key_at[HEADS_MAX], value_at[HEADS_MAX]; /* of a head's kv head, in a token's row from `group` on */
    int begin = a->window && position + 1 > a->window ? position + 1 - a->window : 0;

    for (int h = 0; h < count; h++) {
        queries[h] = a->query + (first + h) * a->query_head + row * a->query_token;
        key_at[h] = ((first + h) / shared - group) * key_size;
        value_at[h] = ((first + h) / shared - group) * value_size;
        /* a sink is a score of its own, whose value is nothing */
        peaks[h] = a->sinks ? a->sinks[first + h] : LOWEST;
        sums[h] = a->sinks ? 1.0f : 0.0f;
        memset(acc[h], 0, value_size * sizeof(float));
    }
    for (int from = begin; from <= position; from += CHUNK) {
        int n = position + 1 - from < CHUNK ? position + 1 - from : CHUNK;
        for (int t = 0; t < n; t++) {
            int64_t at = (int64_t)pages[(from + t) / page] * page + (from + t) % page;
            keys[t] = a->keys + at * key_row + group * key_size;
            values[t] = a->values + at * value_row + group * value_size;
        }
        for (int t = n; t < n + AHEAD; t++) keys[t] = keys[n - 1];
        for (int t = 0; t < n; t++) {
            for (int d = 0; d < groups * key_size; d += LINE) __builtin_prefetch(keys[t + AHEAD] + d, 0, 2);
            for (int d = 0; d < groups * value_size; d += LINE) __builtin_prefetch(values[t] + d, 0, 2);
            for (int h = 0; h < count; h++)
                scores[h][t] = NAME(dot)(queries[h], keys[t] + key_at[h], key_size) * a->scale;
        }
        for (int h = 0; h < count; h++) {
            float *s = scores[h], peak = peaks[h], sum = 0.0f;
            if (a->softcap != 0.0f)
                for (int t = 0; t < n; t++) s[t] = tanhf(s[t] / a->softcap) * a->softcap;
            for (int t = 0; t < n; t++) peak = s[t] > peak ? s[t] : peak;
            for (int t = 0; t < n; t++) s[t] = expf(s[t] - peak);
            for (int t = 0; t < n; t++) sum += s[t];
            float shrink = sums[h] == 0.0f ? 0.0f : expf(peaks[h] - peak); /* of what came before */
            sums[h] = sums[h] * shrink + sum;
            if (from > begin)
                for (int d = 0; d < value_size; d++) acc[h][d] *= shrink;
            peaks[h] = peak;
        }
        int t = 0;
        for (; t + 8 <= n; t += 8)
            for (int h = 0; h < count; h++)
                NAME(add_rows)(acc[h], values + t, value_at[h], scores[h] + t, 8, value_size);
        for (; t < n; t++)
            for (int h = 0; h < count; h++)
                NAME(add_rows)(acc[h], values + t, value_at[h], scores[h] + t, 1, value_size);
    }
    for (int h = 0; h < count; h++) {
        float *out = a->out + row * a->out_token + (first + h) * value_size, part = 1.0f / sums[h];
        for (int d = 0; d < value_size; d++) out[d] = acc[h][d] * part;
    }
}

/* The usual sizes as constants, which is twice as fast. */
static void NAME(attend)(const Pass *pass, const Attention *a, int slice, int position, int row, int first, int count)
{
    if (a->key_size == 64 && a->value_size == 64)
        NAME(attend_sized)(pass, a, slice, position, row, first, count, 64, 64);
    else if (a->key_size == 128 && a->value_size == 128)
        NAME(attend_sized)(pass, a, slice, position, row, first, count, 128, 128);
    else
        NAME(attend_sized)(pass, a, slice, position, row, first, count, a->key_size, a->value_size);
}

#undef Lanes
