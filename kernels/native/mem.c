/* memcpy, memmove and memset: the three functions that clang calls on its own. Ours and hidden, so the library needs no libc
   and loads on any Linux. Compiled with -fno-builtin, or the loops below would be turned into calls of themselves. */
#include "millrace.h"

void *memcpy(void *restrict to, const void *restrict from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);

void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    unsigned char *t = to;
    const unsigned char *f = from;
    for (; n >= 16; n -= 16, t += 16, f += 16) {
        uint64_t a, b;
        __builtin_memcpy_inline(&a, f, 8);
        __builtin_memcpy_inline(&b, f + 8, 8);
        __builtin_memcpy_inline(t, &a, 8);
        __builtin_memcpy_inline(t + 8, &b, 8);
    }
    for (; n; --n) *t++ = *f++;
    return to;
}

void *memmove(void *to, const void *from, size_t n) {
    unsigned char *t = to;
    const unsigned char *f = from;
    if ((uintptr_t)t - (uintptr_t)f >= n) return memcpy(to, from, n);
    while (n--) t[n] = f[n];
    return to;
}

void *memset(void *to, int value, size_t n) {
    unsigned char *t = to;
    uint64_t wide = 0x0101010101010101ull * (unsigned char)value;
    for (; n >= 8; n -= 8, t += 8) __builtin_memcpy_inline(t, &wide, 8);
    for (; n; --n) *t++ = (unsigned char)value;
    return to;
}
