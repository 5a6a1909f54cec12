/* RMS norm of rows in float32: y = x / sqrt(mean(x^2) + eps) * factors. A row's result depends on it alone. */

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES
#endif

CLONES void rms_norm(const float *x, const float *factors, float *y, int64_t rows, int64_t size, int64_t x_row,
                     float eps)
{
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * x_row;
        float *to = y + row * size, sum = 0.0f;
        for (int64_t i = 0; i < size; i++) sum += from[i] * from[i];
        const float scale = 1.0f / sqrtf(sum / size + eps);
        for (int64_t i = 0; i < size; i++) to[i] = from[i] * scale * factors[i];
    }
}
