/* Attention of sequences whose keys and values lie in pages, float32, on a CPU.
 *
 * One call files the new keys and values of all sequences of a pass in one block's pages, and computes the attention of
 * those sequences that bring few tokens (decode). Nothing is gathered, padded or copied: each page is read once, from
 * front to back, for all heads. Scores are summed up in chunks with a running maximum ("online softmax", Milakov and
 * Gimelshein 2018), so the scratch memory does not grow with the length. What a sequence gets depends on it alone, to
 * the last bit, whatever else is in the pass.
 *
 * A row of a block's pages is one token: [kv heads, size], page p holds the rows p * page .. (p + 1) * page - 1.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 128    /* tokens whose scores are held at once */
#define HEADS_MAX 16 /* query heads of a kv head that are computed at once; more go in several rounds */
#define SIZE_MAX_ 512 /* of a head; checked by the caller */
#define LOWEST -1e30f /* below every score; no infinity, which -ffast-math does not know */

#define INLINE static inline __attribute__((always_inline))

/* Sixteen floats at a time; the compiler makes of it what the processor has. */
typedef float Lanes __attribute__((vector_size(16 * sizeof(float)), aligned(sizeof(float)), may_alias));
#define LANES 16

/* The slices of a pass. Slice i brings `lengths[i]` tokens from position `starts[i]` on; its pages are
 * pages[page_starts[i]] .. pages[page_starts[i + 1] - 1], its tokens the rows from rows[i] on. */
typedef struct {
    const int32_t *pages, *page_starts, *starts, *lengths, *rows;
    int32_t slices, page, short_max; /* slices of up to short_max tokens are computed here */
    int32_t threads;
} Pass;

/* One block. Strides count floats. key and value are the new tokens' [kv heads, n, size], query [heads, n, size],
 * out [n, heads, value size]. */
typedef struct {
    const float *query, *key, *value;
    float *out, *keys, *values;
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;
    int32_t heads, kv_heads, key_size, value_size;
    int32_t window; /* 0: none */
    float scale, softcap; /* softcap 0: none */
    const float *sinks; /* [heads], or NULL */
} Block;

typedef void Attend(const Pass *pass, const Block *b, int slice, int position, int row, int group, int first,
                    int count);

static void file(const Pass *pass, const Block *b, int slice)
{
    const int32_t *pages = pass->pages + pass->page_starts[slice];
    for (int t = 0; t < pass->lengths[slice]; t++) {
        int position = pass->starts[slice] + t, row = pass->rows[slice] + t;
        int64_t at = (int64_t)pages[position / pass->page] * pass->page + position % pass->page;
        for (int h = 0; h < b->kv_heads; h++) {
            memcpy(b->keys + (at * b->kv_heads + h) * b->key_size, b->key + h * b->key_head + row * b->key_token,
                   b->key_size * sizeof(float));
            memcpy(b->values + (at * b->kv_heads + h) * b->value_size,
                   b->value + h * b->value_head + row * b->value_token, b->value_size * sizeof(float));
        }
    }
}

#define NAME(name) name##_any
#include "paged_attention_row.h"
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define NAME(name) name##_avx2
#include "paged_attention_row.h"
#undef NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#define NAME(name) name##_avx512
#include "paged_attention_row.h"
#undef NAME
#pragma GCC pop_options

static Attend *best(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
        return attend_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? attend_avx2 : attend_any;
}
#else
static Attend *best(void) { return attend_any; }
#endif

/* All heads of one slice that share kv head `group`. */
static void attend_group(Attend *attend, const Pass *pass, const Block *b, int slice, int group)
{
    int shared = b->heads / b->kv_heads;
    for (int t = 0; t < pass->lengths[slice]; t++)
        for (int h = 0; h < shared; h += HEADS_MAX) {
            int count = shared - h < HEADS_MAX ? shared - h : HEADS_MAX;
            attend(pass, b, slice, pass->starts[slice] + t, pass->rows[slice] + t, group, group * shared + h, count);
        }
}

void paged_attention(const Pass *pass, const Block *b)
{
    Attend *attend = best();
    int tasks = pass->slices * b->kv_heads;
#pragma omp parallel for schedule(static) num_threads(pass->threads) if (pass->threads > 1 && pass->slices > 1)
    for (int slice = 0; slice < pass->slices; slice++) file(pass, b, slice);
#pragma omp parallel for schedule(dynamic, 1) num_threads(pass->threads) if (pass->threads > 1 && tasks > 1)
    for (int task = 0; task < tasks; task++)
        if (pass->lengths[task / b->kv_heads] <= pass->short_max)
            attend_group(attend, pass, b, task / b->kv_heads, task % b->kv_heads);
}
