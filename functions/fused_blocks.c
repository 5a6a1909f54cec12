/* The blocks of a span in one call, float32, on a CPU: pre-norm blocks with rotary positions and a gated MLP, as most
 * models of today have them (see fused_blocks.py, which finds out whether a model's blocks are such).
 *
 *     x += post(out(attention(rotary(norm(qkv(norm(x)))))))        norm of q and k, post norms: where there are any
 *     x += post(down(activation(gate(norm(x))) * up(norm(x))))
 *
 * All threads go through all blocks together and meet where one part needs the whole result of the part before. Between
 * modules of Python one thread would work and the others wait: a quarter of a step of 64 sequences, and a third of a
 * step of one.
 */


#include "kernels.h"

enum { SILU, GELU_TANH };

typedef struct {
    Linear qkv, out, gate_up, down;
    Attention attention;
    const float *norm, *middle_norm;            /* before attention and before the MLP */
    const float *attention_post, *down_post;    /* after them; or NULL */
    const float *query_norm, *key_norm;         /* of each head, before the rotation; or NULL */
    float norm_eps, middle_norm_eps, attention_post_eps, down_post_eps, query_norm_eps, key_norm_eps;
} Block;

typedef struct {
    const Block *blocks;
    const Pass *pass;
    const float *cosines, *sines; /* [rows, rotary] */
    float *hidden;                /* [rows, width], in and out */
    float *normed;                /* [rows, normed_row], scratch */
    float *wide;                  /* [rows, wide_row], for what qkv and gate_up give, scratch */
    int64_t rows, width, middle, normed_row, wide_row;
    int32_t count, rotary, activation, threads;
    const Rows *row;              /* set here */
} Span;

/* Norm and rotation of `heads` heads that lie one after another. */
static void turn(float *x, int heads, int size, const float *factors, float eps, const Span *s, int64_t row)
{
    for (int h = 0; h < heads; h++, x += size) {
        if (factors) s->row->rms_norm(x, factors, x, size, eps);
        s->row->rotate(x, s->cosines + row * s->rotary, s->sines + row * s->rotary, s->rotary / 2);
    }
}

/* Queries and keys of a tile's tokens are turned where they lie, keys and values filed in the pages. */
static void turn_tile(const Span *s, const Block *b, int tile)
{
    const Attention *a = &b->attention;
    const int slice = s->pass->tile_slices[tile], first = s->pass->tile_firsts[tile];
    const int left = s->pass->lengths[slice] - first, tokens = left < TILE_TOKENS ? left : TILE_TOKENS;
    for (int64_t row = s->pass->rows[slice] + first, end = row + tokens; row < end; row++) {
        float *x = s->wide + row * s->wide_row;
        turn(x, a->heads, a->key_size, b->query_norm, b->query_norm_eps, s, row);
        turn(x + a->heads * a->key_size, a->kv_heads, a->key_size, b->key_norm, b->key_norm_eps, s, row);
    }
    file_tile(s->pass, a, tile);
}

/* What a part has computed is added to the hidden states; then comes the norm of the next part, if there is one. */
static void add_and_norm(const Span *s, const float *post, float post_eps, const float *norm, float eps, int added)
{
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s->rows; row++) {
        float *hidden = s->hidden + row * s->width, *normed = s->normed + row * s->normed_row;
        if (added && post) s->row->rms_norm(normed, post, normed, s->width, post_eps);
        if (added) s->row->add(hidden, normed, s->width);
        if (norm) s->row->rms_norm(hidden, norm, normed, s->width, eps);
    }
}

static void linear(const Span *s, const Linear *layer, const float *x, int64_t x_row, float *y, int64_t y_row)
{
    Linear l = *layer;
    l.x = x, l.x_row = x_row, l.y = y, l.y_row = y_row, l.rows = s->rows;
    packed_linear_team(&l);
#pragma omp barrier
}

static void run_block(const Span *s, const Block *b, const Block *next)
{
    Block here = *b; /* with the addresses of this pass */
    Attention *a = &here.attention;

    linear(s, &b->qkv, s->normed, s->normed_row, s->wide, s->wide_row);
    a->query = a->out = s->wide; /* what a head gets takes the place of its query */
    a->key = s->wide + a->heads * a->key_size;
    a->value = a->key + a->kv_heads * a->key_size;
    a->query_head = a->key_head = a->key_size, a->value_head = a->value_size;
    a->query_token = a->key_token = a->value_token = a->out_token = s->wide_row;
#pragma omp for schedule(static)
    for (int tile = 0; tile < s->pass->tiles; tile++) turn_tile(s, &here, tile);
    paged_attention_team(s->pass, a);
#pragma omp barrier
    linear(s, &b->out, s->wide, s->wide_row, s->normed, s->normed_row);
    add_and_norm(s, b->attention_post, b->attention_post_eps, b->middle_norm, b->middle_norm_eps, 1);

    linear(s, &b->gate_up, s->normed, s->normed_row, s->wide, s->wide_row);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s->rows; row++) {
        float *gate = s->wide + row * s->wide_row;
        if (s->activation == SILU)
            s->row->silu_gate(gate, gate + s->middle, s->middle);
        else
            s->row->gelu_tanh_gate(gate, gate + s->middle, s->middle);
    }
    linear(s, &b->down, s->wide, s->wide_row, s->normed, s->normed_row);
    add_and_norm(s, b->down_post, b->down_post_eps, next ? next->norm : NULL, next ? next->norm_eps : 0.0f, 1);
}

void fused_blocks(Span *s)
{
    if (s->rows < 1) return;
    s->row = best_rows();
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
        add_and_norm(s, NULL, 0.0f, s->blocks->norm, s->blocks->norm_eps, 0);
        for (const Block *b = s->blocks, *end = b + s->count; b < end; b++) run_block(s, b, b + 1 < end ? b + 1 : NULL);
    }
}
