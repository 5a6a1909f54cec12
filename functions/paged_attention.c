/* Attention of sequences whose keys and values lie in pages, float32, on a CPU.
 *
 * One call files the new keys and values of all sequences of a pass in one block's pages, and computes the attention of
 * all of them. Nothing is gathered or padded. Sequences that bring few tokens (decode) read each page once, from front to
 * back, for all heads; of the others a tile of tokens and heads is computed at a time, over keys that are turned into
 * columns for it. Scores are summed up in chunks with a running maximum ("online softmax", Milakov and Gimelshein 2018;
 * in tiles: FlashAttention, Dao et al. 2022), so the scratch memory does not grow with the length. What a sequence gets
 * depends on it alone, to the last bit, whatever else is in the pass.
 *
 * A row of a block's pages is one token: [kv heads, size], page p holds the rows p * page .. (p + 1) * page - 1.
 */

#include <math.h>
#include <string.h>

#include "kernels.h"

#define SHORT_MAX 4  /* slices of so few tokens are computed token by token */
#define CHUNK 128    /* tokens whose scores are held at once, there */
#define HEADS_MAX 16 /* query heads that are computed at once; more go in several rounds */
#define AHEAD 8      /* tokens whose keys are fetched before their turn */
#define SIZE_MAX_ 512 /* of a head; checked by the caller */
#define LOWEST -1e30f /* below every score; no infinity, which -ffast-math does not know */
#define TILE_KEYS 64 /* tokens whose scores are held at once in a tile */
#define TASKS_PER_THREAD 8 /* so that they end at about the same time */
#define TILE_ROWS 96 /* of a tile, a row for each token and head */

typedef void Attend(const Pass *pass, const Attention *a, int slice, int position, int row, int first, int count);
/* Tokens first .. first + tokens - 1 of a slice, heads head .. head + heads - 1 of kv head `group`. */
typedef void AttendTile(const Pass *pass, const Attention *a, int slice, int first, int tokens, int group, int head,
                        int heads);

/* For one kind of processor. */
typedef struct {
    Attend *attend;
    AttendTile *attend_tile;
} Kind;

static int tile_tokens(const Pass *pass, int tile)
{
    int left = pass->lengths[pass->tile_slices[tile]] - pass->tile_firsts[tile];
    return left < TILE_TOKENS ? left : TILE_TOKENS;
}

void file_tile(const Pass *pass, const Attention *a, int tile)
{
    const int slice = pass->tile_slices[tile], first = pass->tile_firsts[tile], tokens = tile_tokens(pass, tile);
    const int32_t *pages = pass->pages + pass->page_starts[slice];
    for (int t = first; t < first + tokens; t++) {
        int position = pass->starts[slice] + t, row = pass->rows[slice] + t;
        int64_t at = (int64_t)pages[position / pass->page] * pass->page + position % pass->page;
        for (int h = 0; h < a->kv_heads; h++) {
            memcpy(a->keys + (at * a->kv_heads + h) * a->key_size, a->key + h * a->key_head + row * a->key_token,
                   a->key_size * sizeof(float));
            memcpy(a->values + (at * a->kv_heads + h) * a->value_size,
                   a->value + h * a->value_head + row * a->value_token, a->value_size * sizeof(float));
        }
    }
}

#define NAME(name) name##_any
#define LANES 4
#define TILE_STEP 2 /* rows of a tile whose sums fit into the registers */
#include "paged_attention_row.h"
#include "paged_attention_tile.h"
#undef NAME
#undef LANES
#undef TILE_STEP

#if PROCESSORS
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define NAME(name) name##_avx2
#define LANES 8
#define TILE_STEP 3
#include "paged_attention_row.h"
#include "paged_attention_tile.h"
#undef NAME
#undef LANES
#undef TILE_STEP
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#define NAME(name) name##_avx512
#define LANES 16
#define TILE_STEP 6
#include "paged_attention_row.h"
#include "paged_attention_tile.h"
#undef NAME
#undef LANES
#undef TILE_STEP
#pragma GCC pop_options
#endif

static Kind best(void)
{
#if PROCESSORS
    if (processor() == AVX512) return (Kind){attend_avx512, attend_tile_avx512};
    if (processor() == AVX2) return (Kind){attend_avx2, attend_tile_avx2};
#endif
    return (Kind){attend_any, attend_tile_any};
}

/* Heads first .. first + count - 1 of one tile, whole kv heads. */
static void attend_heads(Kind kind, const Pass *pass, const Attention *a, int tile, int first, int count)
{
    const int shared = a->heads / a->kv_heads, slice = pass->tile_slices[tile], tokens = tile_tokens(pass, tile);
    if (pass->lengths[slice] <= SHORT_MAX) {
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < count; h += HEADS_MAX)
                kind.attend(pass, a, slice, pass->starts[slice] + t, pass->rows[slice] + t, first + h,
                            count - h < HEADS_MAX ? count - h : HEADS_MAX);
        return;
    }
    const int most = TILE_ROWS / tokens;
    for (int head = first; head < first + count; head += shared)
        for (int h = 0; h < shared; h += most)
            kind.attend_tile(pass, a, slice, pass->tile_firsts[tile], tokens, head / shared, head + h,
                             shared - h < most ? shared - h : most);
}

void paged_attention_team(const Pass *pass, const Attention *a)
{
    const Kind kind = best();
    /* a task has all heads where there are tasks enough without cutting them up, else those of a kv head */
    const int parts = pass->tiles >= TASKS_PER_THREAD * pass->threads ? 1 : a->kv_heads, count = a->heads / parts;
#pragma omp for schedule(dynamic, 1) nowait
    for (int task = 0; task < pass->tiles * parts; task++)
        attend_heads(kind, pass, a, task / parts, task % parts * count, count);
}

void paged_attention(const Pass *pass, const Attention *a)
{
#pragma omp parallel num_threads(pass->threads) if (pass->threads > 1 && pass->tiles * a->kv_heads > 1)
    {
#pragma omp for schedule(static)
        for (int tile = 0; tile < pass->tiles; tile++) file_tile(pass, a, tile);
        paged_attention_team(pass, a);
    }
}
