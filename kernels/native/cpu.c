/* Which form runs: the widest one that the processor and the operating system support, unless the caller narrows it.

   Also the number of threads to expect. Both are hints about speed: every form and every split gives the same bits. */
#include "millrace.h"

extern const struct mr_kernels mr_kernels_portable;

#if defined(__x86_64__)
#include <cpuid.h>

extern const struct mr_kernels mr_kernels_avx2;
extern const struct mr_kernels mr_kernels_avx512;

#define MR_HAS(word, mask) (((word) & (mask)) == (mask))

/* Feature words of CPUID leaf 1 (ecx), leaf 7 (ebx, ecx), leaf 0x80000001 (ecx), and the register state the system saves. */
struct features {
    uint32_t leaf1_c, leaf7_b, leaf7_c, extended_c, saved;
};

static struct features read_features(void) {
    struct features f = {0};
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &f.leaf1_c, &d) && (f.leaf1_c & bit_OSXSAVE)) {
        uint32_t high;
        __asm__("xgetbv" : "=a"(f.saved), "=d"(high) : "c"(0));
    }
    __get_cpuid_count(7, 0, &a, &f.leaf7_b, &f.leaf7_c, &d);
    __get_cpuid(0x80000001u, &a, &b, &f.extended_c, &d);
    (void)c;
    return f;
}

static int has_avx2(const struct features *f) { /* x86-64-v3 */
    return MR_HAS(f->saved, 0x06u) && MR_HAS(f->leaf1_c, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE | bit_POPCNT | bit_SSE4_2) &&
           MR_HAS(f->leaf7_b, bit_AVX2 | bit_BMI | bit_BMI2) && MR_HAS(f->extended_c, bit_LZCNT);
}

static int has_avx512(const struct features *f) { /* x86-64-v4 and VNNI */
    return has_avx2(f) && MR_HAS(f->saved, 0xe6u) && MR_HAS(f->leaf7_c, bit_AVX512VNNI) &&
           MR_HAS(f->leaf7_b, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL | bit_AVX512CD);
}

/* Form `index` by width, widest first; NULL if this processor lacks it. */
static const struct mr_kernels *form(size_t index) {
    struct features f = read_features();
    switch (index) {
    case 0: return has_avx512(&f) ? &mr_kernels_avx512 : NULL;
    case 1: return has_avx2(&f) ? &mr_kernels_avx2 : NULL;
    default: return &mr_kernels_portable;
    }
}
#define MR_NUM_FORMS 3
#else
extern const struct mr_kernels mr_kernels_dotprod;

/* The instruction-set register that user programs may read: Linux answers for it. */
static int has_dotprod(void) {
    uint64_t features;
    __asm__("mrs %0, ID_AA64ISAR0_EL1" : "=r"(features));
    return (features >> 44 & 15) != 0;
}

static const struct mr_kernels *form(size_t index) {
    if (index == 0) return has_dotprod() ? &mr_kernels_dotprod : NULL;
    return &mr_kernels_portable;
}
#define MR_NUM_FORMS 2
#endif

static const struct mr_kernels *active;
static size_t threads;

/* The form of that name, or the widest for NULL; NULL if it is unknown or cannot run here. */
static const struct mr_kernels *find(const char *name) {
    for (size_t i = 0; i < MR_NUM_FORMS; ++i) {
        const struct mr_kernels *kernels = form(i);
        if (kernels && (!name || mr_same_text(kernels->isa, name))) return kernels;
    }
    return NULL;
}

const struct mr_kernels *mr_active(void) {
    const struct mr_kernels *kernels = __atomic_load_n(&active, __ATOMIC_ACQUIRE);
    if (MR_UNLIKELY(!kernels)) {
        kernels = find(NULL);
        __atomic_store_n(&active, kernels, __ATOMIC_RELEASE);
    }
    return kernels;
}

MR_EXPORT int millrace_isa_available(const char *name);
MR_EXPORT int millrace_set_isa(const char *name);
MR_EXPORT const char *millrace_isa_active(void);
MR_EXPORT void millrace_set_threads(size_t count);
MR_EXPORT size_t millrace_threads(void);

/* 1 if the form exists in this library and runs on this processor. */
int millrace_isa_available(const char *name) { return find(name) != NULL; }

/* Use the form of that name from now on (NULL: the widest); 0, or -1 and no change if it is not available. */
int millrace_set_isa(const char *name) {
    const struct mr_kernels *kernels = find(name);
    if (!kernels) return -1;
    __atomic_store_n(&active, kernels, __ATOMIC_RELEASE);
    return 0;
}

const char *millrace_isa_active(void) { return mr_active()->isa; }

/* ---- threads ---- */

#if defined(__x86_64__)
static long sched_getaffinity_call(size_t bytes, void *mask) {
    long result = 204; /* in: the system call's number */
    __asm__ volatile("syscall" : "+a"(result) : "D"(0L), "S"(bytes), "d"(mask) : "rcx", "r11", "memory");
    return result;
}
#else
static long sched_getaffinity_call(size_t bytes, void *mask) {
    register long number __asm__("x8") = 123;
    register long result __asm__("x0") = 0;
    register size_t size __asm__("x1") = bytes;
    register void *where __asm__("x2") = mask;
    __asm__ volatile("svc 0" : "+r"(result) : "r"(number), "r"(size), "r"(where) : "memory");
    return result;
}
#endif

/* Processors the calling thread may run on. */
static size_t count_processors(void) {
    uint64_t mask[128] = {0};
    long bytes = sched_getaffinity_call(sizeof mask, mask);
    size_t count = 0;
    for (long i = 0; i < bytes / 8; ++i) count += (size_t)__builtin_popcountll(mask[i]);
    return count ? count : 1;
}

size_t mr_threads(void) {
    size_t count = __atomic_load_n(&threads, __ATOMIC_RELAXED);
    if (MR_UNLIKELY(!count)) {
        count = count_processors();
        __atomic_store_n(&threads, count, __ATOMIC_RELAXED);
    }
    return count;
}

/* How many threads the runtime's pool has; 0: count the processors. */
void millrace_set_threads(size_t count) { __atomic_store_n(&threads, count, __ATOMIC_RELAXED); }

size_t millrace_threads(void) { return mr_threads(); }
