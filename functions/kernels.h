/* What the kernels share: which processors they are compiled for, and the parts that other kernels call.
 *
 * What counts is compiled once for each kind of processor, from a file that is included for each. NAME gives each its own
 * names, LANES says how many floats one of its registers holds: GCC takes longer vectors apart, one number at a time.
 *
 * A function whose name ends in `_team` is called by every thread of a parallel region, or by the only one outside of
 * one; it returns to each as soon as that one's share is done. Who needs the results of all waits at a barrier. */

#ifndef STAGECRAFT_KERNELS_H
#define STAGECRAFT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define LINE 16 /* floats of a cache line */

/* As many floats as a register holds, wherever they lie. */
#define LANES_TYPE(name) \
    typedef float name __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias))

/* Whether code for the newer kinds of processors can be compiled. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PROCESSORS 1
#else
#define PROCESSORS 0
#endif

/* Each kind can do what those before it can. */
enum Processor { ANY, AVX2, AVX512 };

enum Processor processor(void);         /* what this one is, as far as `use_at_most` allows */
void use_at_most(enum Processor newest); /* not while a kernel runs */

/* y = x W^T + bias, see packed_linear.c. */
typedef struct {
    const float *x;
    const void *panels;
    const float *scale; /* of each output, to the end of the last panel; NULL: the panels hold floats, else int8 */
    const float *bias;  /* of each output, to the end of the last panel; or NULL */
    float *y;
    int64_t rows, inputs, outputs, x_row, y_row; /* x_row, y_row: floats from one row to the next */
    int32_t threads;
} Linear;

void packed_linear_team(const Linear *l);

/* The slices of a pass, see paged_attention.c. Slice i brings `lengths[i]` tokens from position `starts[i]` on; its
 * pages are pages[page_starts[i]] .. pages[page_starts[i + 1] - 1], its tokens the rows from rows[i] on.
 * Tile j are the tokens from the tile_firsts[j]-th of slice tile_slices[j] on, TILE_TOKENS at most. */
typedef struct {
    const int32_t *pages, *page_starts, *starts, *lengths, *rows, *tile_slices, *tile_firsts;
    int32_t slices, tiles, page, threads;
} Pass;

#define TILE_TOKENS 32

/* One block's attention. Strides count floats. key and value are the new tokens' [kv heads, n, size], query
 * [heads, n, size], out [n, heads, value size]. */
typedef struct {
    const float *query, *key, *value;
    float *out, *keys, *values;
    int64_t query_head, query_token, key_head, key_token, value_head, value_token, out_token;
    int32_t heads, kv_heads, key_size, value_size;
    int32_t window; /* 0: none */
    float scale, softcap; /* softcap 0: none */
    const float *sinks; /* [heads], or NULL */
} Attention;

/* Files key and value of a tile's tokens in the pages. */
void file_tile(const Pass *pass, const Attention *a, int tile);

/* The attention of all tiles, whose keys and values have been filed. */
void paged_attention_team(const Pass *pass, const Attention *a);

/* Of one row of `size` floats each, see rows.c. */
typedef struct {
    void (*rms_norm)(const float *x, const float *factors, float *y, int64_t size, float eps);
    void (*add)(float *to, const float *what, int64_t size);
    void (*silu_gate)(float *gate, const float *up, int64_t size);      /* gate = silu(gate) * up */
    void (*gelu_tanh_gate)(float *gate, const float *up, int64_t size);
    /* the i-th of 2 * half numbers is turned with the one half of them further on */
    void (*rotate)(float *x, const float *cosines, const float *sines, int64_t half);
} Rows;

const Rows *best_rows(void); /* for this processor */

#endif
