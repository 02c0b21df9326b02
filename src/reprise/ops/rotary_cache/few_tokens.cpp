// Norm of heads, rotary embedding and the cache write for a few tokens, one head after the other.

#include "numbers.h"

namespace {

template <class T> struct Call {
    long tokens, queries, kv_heads, size, rotary;
    const T *qkv;
    long qkv_stride;
    const std::int64_t *positions;
    const float *cos_sin;
    const std::int64_t *slots;
    T *keys, *values;
    const void *query_norm, *key_norm;
    int gain_kind;
    float eps;
    T *out;

    APART void rotate(const T *from, const float *table, const void *gain, float *head, T *to) const {
        if (!gain)
            for (long i = 0; i < size; ++i) head[i] = number(from[i]);
        else if (gain_kind == FLOAT32)
            rms_norm(from, static_cast<const float *>(gain), eps, size, head);
        else
            rms_norm(from, static_cast<const bf16 *>(gain), eps, size, head);
        const long half = rotary / 2;
        const float *cosines = table, *sines = table + half;
        for (long i = 0; i < half; ++i) {
            put(to + i, head[i] * cosines[i] - head[half + i] * sines[i]);
            put(to + half + i, head[half + i] * cosines[i] + head[i] * sines[i]);
        }
        for (long i = rotary; i < size; ++i) put(to + i, head[i]);
    }

    void run() const {
        static thread_local Scratch memory;
        float *const head = memory.of(size);
        for (long token = 0; token < tokens; ++token) {
            const T *row = qkv + token * qkv_stride;
            const float *table = cos_sin + positions[token] * rotary;
            T *query = out + token * queries * size;
            for (long each = 0; each < queries; ++each)
                rotate(row + each * size, table, query_norm, head, query + each * size);
            const T *key = row + queries * size, *value = key + kv_heads * size;
            const long slot = slots[token] * kv_heads * size;
            for (long each = 0; each < kv_heads; ++each)
                rotate(key + each * size, table, key_norm, head, keys + slot + each * size);
            std::memcpy(values + slot, value, kv_heads * size * sizeof(T));
        }
    }
};

struct Arguments {
    int gain_kind;
    long tokens, queries, kv_heads, size, rotary, num_positions, num_slots;
    const void *qkv;
    long qkv_stride;
    const std::int64_t *positions;
    const float *cos_sin;
    const std::int64_t *slots;
    void *keys, *values;
    const void *query_norm, *key_norm;
    void *out;
    float eps;
};

template <class T> void compute(const Arguments &a) {
    Call<T>{a.tokens, a.queries, a.kv_heads, a.size, a.rotary, static_cast<const T *>(a.qkv),
            a.qkv_stride, a.positions, a.cos_sin, a.slots, static_cast<T *>(a.keys),
            static_cast<T *>(a.values), a.query_norm, a.key_norm, a.gain_kind, a.eps,
            static_cast<T *>(a.out)}
        .run();
}

} // namespace

// Returns 0; 1 where a position is beyond the table, 2 where a slot is beyond the cache.
extern "C" int few_tokens(const Arguments *arguments) {
    const Arguments &a = *arguments;
    for (long token = 0; token < a.tokens; ++token) {
        if (a.positions[token] < 0 || a.positions[token] >= a.num_positions) return 1;
        if (a.slots[token] < 0 || a.slots[token] >= a.num_slots) return 2;
    }
    compute<Number>(a);
    return 0;
}
