/* The part of rows.c that is compiled once for each kind of processor (see kernels.h). */

static void NAME(rms_norm)(const float *x, const float *factors, float *y, int64_t size, float eps)
{
    float sum = 0.0f;
    for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
    const float scale = 1.0f / sqrtf(sum / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * factors[i];
}

static void NAME(add)(float *to, const float *what, int64_t size)
{
    for (int64_t i = 0; i < size; i++) to[i] += what[i];
}

static void NAME(silu_gate)(float *gate, const float *up, int64_t size)
{
    for (int64_t i = 0; i < size; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

static void NAME(gelu_tanh_gate)(float *gate, const float *up, int64_t size)
{
    for (int64_t i = 0; i < size; i++) { /* x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) */
        const float x = gate[i], u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        gate[i] = x / (1.0f + expf(-2.0f * u)) * up[i];
    }
}

static void NAME(rotate)(float *x, const float *cosines, const float *sines, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

static const Rows NAME(rows) = {NAME(rms_norm), NAME(add), NAME(silu_gate), NAME(gelu_tanh_gate), NAME(rotate)};
