/* The words of a refusal: a small printf, because there is no libc, that also knows shapes. */
#include "abi.h"

struct text {
    char *characters;
    size_t capacity, length;
};

static void put_char(struct text *text, char c) {
    if (text->length + 1 < text->capacity) text->characters[text->length++] = c;
}

static void put_string(struct text *text, const char *s) {
    while (*s) put_char(text, *s++);
}

static void put_int(struct text *text, int64_t value) {
    char digits[20];
    size_t count = 0;
    uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    do digits[count++] = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0) put_char(text, '-');
    while (count) put_char(text, digits[--count]);
}

/* Three decimals. */
static void put_double(struct text *text, double value) {
    if (!(value > -1e15 && value < 1e15)) {
        put_string(text, value != value ? "NaN" : value > 0 ? "over 1e15" : "under -1e15");
        return;
    }
    if (value < 0) put_char(text, '-');
    uint64_t thousandths = (uint64_t)((value < 0 ? -value : value) * 1000.0 + 0.5);
    put_int(text, (int64_t)(thousandths / 1000));
    put_char(text, '.');
    for (uint64_t unit = 100; unit; unit /= 10) put_char(text, (char)('0' + thousandths / unit % 10));
}

/* [5,30], with ? for any extent. */
static void put_shape(struct text *text, const struct mr_tensor *tensor) {
    put_char(text, '[');
    for (size_t i = 0; i < tensor->rank; ++i) {
        if (i) put_char(text, ',');
        if (tensor->dims[i] < 0) put_char(text, '?');
        else put_int(text, tensor->dims[i]);
    }
    put_char(text, ']');
}

void mr_format(char *out, size_t capacity, const char *format, va_list values) {
    struct text text = {out, capacity, 0};
    for (; *format; ++format) {
        if (*format != '%') {
            put_char(&text, *format);
            continue;
        }
        switch (*++format) {
        case 's': put_string(&text, va_arg(values, const char *)); break;
        case 'd': put_int(&text, va_arg(values, int64_t)); break;
        case 'f': put_double(&text, va_arg(values, double)); break;
        case 't': put_shape(&text, va_arg(values, const struct mr_tensor *)); break;
        default: put_char(&text, *format);
        }
    }
    text.characters[text.length] = 0;
}
