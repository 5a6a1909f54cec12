/* Which code is for this processor. */

#include "kernels.h"

static enum Processor newest_allowed = AVX512;

static enum Processor found(void)
{
#if PROCESSORS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return ANY;
}

enum Processor processor(void)
{
    enum Processor this = found();
    return this < newest_allowed ? this : newest_allowed;
}

void use_at_most(enum Processor newest) { newest_allowed = newest; }
