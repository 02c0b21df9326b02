// Vectors of float, and memory in the dtypes of weights and caches that are computed with them.
//
// A kernel is written once for all processors: GCC and Clang make of a vector what the processor has.
// NUMBER is what it computes with, float or bf16: each gets a library of its own. A first start waits
// for the compiler, so no header of containers or of mathematics is read, and what is worth a call is
// APART, one function however many call it.
#pragma once

#include <cfenv>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define REPRISE_BYTES 64
#elif defined(__AVX__)
#define REPRISE_BYTES 32
#else
#define REPRISE_BYTES 16
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(REPRISE_BYTES)));
typedef std::int32_t ints __attribute__((vector_size(REPRISE_BYTES)));
typedef std::uint32_t bits __attribute__((vector_size(REPRISE_BYTES)));
typedef std::uint16_t halves __attribute__((vector_size(REPRISE_BYTES / 2)));
typedef float quarter __attribute__((vector_size(16)));
constexpr long WIDTH = REPRISE_BYTES / sizeof(float);

// How a thread computes with numbers, for those that compute for it: whether denormal ones are zeros
// is each thread's own setting, and bits must not depend on which of them comes first.
class Settings {
    std::fenv_t of_caller;
    bool shared;

  public:
    explicit Settings(bool shared) : shared(shared) {
        if (shared) std::fegetenv(&of_caller);
    }

    class Taken {
        std::fenv_t before;
        bool shared;

      public:
        explicit Taken(const Settings &from) : shared(from.shared) {
            if (!shared) return;
            std::fegetenv(&before);
            std::fesetenv(&from.of_caller);
        }
        ~Taken() {
            if (shared) std::fesetenv(&before);
        }
    };
};

#define APART __attribute__((noinline))

// Numbers of a thread, kept from call to call.
class Scratch {
    float *memory = nullptr;
    long size = 0;

  public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch() { delete[] memory; }

    // At least so many, which may hold anything.
    float *of(long count) {
        if (count > size) {
            delete[] memory;
            size = 0;
            memory = nullptr;
            memory = new float[count];
            size = count;
        }
        return memory;
    }
};

enum Kind { FLOAT32 = 0, BFLOAT16 = 1 };

struct bf16 {
    std::uint16_t code;
};

typedef NUMBER Number;

inline float number(float x) { return x; }

inline float number(bf16 x) {
    const std::uint32_t wide = std::uint32_t(x.code) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline void put(float *to, float x) { *to = x; }

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
inline void put(bf16 *to, float x) {
    std::uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    to->code = x != x ? 0x7fc0 : std::uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

template <class T> inline float rounded(float x) {
    T kept;
    put(&kept, x);
    return number(kept);
}

inline vec load(const float *from) {
    vec result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline vec load(const bf16 *from) {
    halves codes;
    std::memcpy(&codes, from, sizeof codes);
    return (vec)(__builtin_convertvector(codes, bits) << 16);
}

inline void store(float *to, vec x) { std::memcpy(to, &x, sizeof x); }

// The sum of a vector, in an order that is always the same.
inline float total(vec x) {
    quarter parts[WIDTH / 4];
    std::memcpy(parts, &x, sizeof parts);
    for (long count = WIDTH / 8; count > 0; count /= 2)
        for (long each = 0; each < count; ++each) parts[each] += parts[each + count];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

template <class T> inline float dot(const float *a, const T *b, long count) {
    vec sum = {};
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) sum += load(a + i) * load(b + i);
    float result = total(sum);
    for (; i < count; ++i) result += a[i] * number(b[i]);
    return result;
}

// e ** x, within two units of the last place; 0 where it is no normal number. (Cody and Waite's reduction, and the
// Taylor series of what is left.)
inline vec exponential(vec x) {
    const vec low = vec{} - 87.0f, high = vec{} + 88.72f;
    vec inside = x < low ? low : x;
    inside = inside > high ? high : inside;
    const vec magic = vec{} + 12582912.0f; // 1.5 * 2 ** 23: adding it rounds to a whole number
    const vec shifted = inside * 1.44269504f + magic;
    const vec whole = shifted - magic;
    const vec rest = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec sum = vec{} + 1.0f / 5040;
    sum = sum * rest + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    const ints exponent = __builtin_convertvector(whole, ints) << 23;
    vec result = (vec)((ints)sum + exponent);
    result = x < low ? vec{} : result;
    result = x > high ? vec{} + __builtin_inff() : result;
    return x == x ? result : x;
}

// Root mean square norm of a row, as ops.rms_norm has it: a gain of the row's own dtype multiplies
// what was rounded to it. T: of the row; G: of the gain.
template <class T, class G>
APART void rms_norm(const T *row, const G *gain, float eps, long count, float *out) {
    vec squares = {};
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        const vec x = load(row + i);
        squares += x * x;
    }
    float sum = total(squares);
    for (; i < count; ++i) sum += number(row[i]) * number(row[i]);
    const float scale = 1.0f / __builtin_sqrtf(sum / float(count) + eps);
    for (i = 0; i < count; ++i) {
        float x = number(row[i]) * scale;
        if (sizeof(G) == sizeof(T)) x = rounded<T>(x);
        out[i] = rounded<T>(x * number(gain[i]));
    }
}
