/* The kernels as plain C functions, for tests and benchmarks that do without ONNX Runtime. Arguments are not checked. */
#include "embed.h"
#include "linear.h"

MR_EXPORT void millrace_qlinear(const struct mr_qlinear *args, const struct mr_parallel *parallel);
MR_EXPORT void millrace_linear(const struct mr_linear *args, const struct mr_parallel *parallel);
MR_EXPORT void millrace_qembed(const struct mr_qembed *args, const struct mr_parallel *parallel);
MR_EXPORT void millrace_embed(const struct mr_embed *args, const struct mr_parallel *parallel);
MR_EXPORT size_t millrace_qlinear_scratch_bytes(size_t rows, size_t K);
MR_EXPORT size_t millrace_linear_scratch_bytes(size_t rows, size_t K);
MR_EXPORT uint64_t millrace_peak_int8(uint64_t rounds);
MR_EXPORT uint64_t millrace_peak_f32(uint64_t rounds);
MR_EXPORT void millrace_probe(uint32_t function, const float *a, const float *b, const float *c, float *out, size_t count);
MR_EXPORT uint64_t millrace_read(const uint64_t *words, size_t count);

static void run_serial(void *context, mr_task task, size_t count, void *user) {
    (void)context;
    for (size_t index = 0; index < count; ++index) task(user, index);
}

static const struct mr_parallel serial = {run_serial, NULL, 1};

static const struct mr_parallel *or_serial(const struct mr_parallel *parallel) { return parallel ? parallel : &serial; }

/* Run a kernel; without `parallel` on the calling thread. */
void millrace_qlinear(const struct mr_qlinear *args, const struct mr_parallel *parallel) {
    mr_active()->qlinear(args, or_serial(parallel));
}

void millrace_linear(const struct mr_linear *args, const struct mr_parallel *parallel) {
    mr_active()->linear(args, or_serial(parallel));
}

void millrace_qembed(const struct mr_qembed *args, const struct mr_parallel *parallel) {
    mr_active()->qembed(args, or_serial(parallel));
}

void millrace_embed(const struct mr_embed *args, const struct mr_parallel *parallel) {
    mr_active()->embed(args, or_serial(parallel));
}

size_t millrace_qlinear_scratch_bytes(size_t rows, size_t K) { return mr_qlinear_scratch_bytes(rows, K); }

size_t millrace_linear_scratch_bytes(size_t rows, size_t K) { return mr_linear_scratch_bytes(rows, K); }

/* Limits of the processor, on the calling thread: multiply-adds done in `rounds` of a loop over registers only. */
uint64_t millrace_peak_int8(uint64_t rounds) { return mr_active()->peak_int8(rounds); }

uint64_t millrace_peak_f32(uint64_t rounds) { return mr_active()->peak_f32(rounds); }

void millrace_probe(uint32_t function, const float *a, const float *b, const float *c, float *out, size_t count) {
    mr_active()->probe(function, a, b, c, out, count);
}

/* Read `count` words of memory once, in order; the result only keeps the compiler from skipping it. */
uint64_t millrace_read(const uint64_t *words, size_t count) {
    uint64_t sums[8] = {0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t j = 0; j < 8; ++j) sums[j] ^= words[i + j];
    for (; i < count; ++i) sums[0] ^= words[i];
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}
