// Attention of requests that compute few tokens each, over blocks wherever they lie.
//
// A KV head's keys and values are read once for all of its query heads.

#include "numbers.h"

#include <cmath>
#include <limits>
#include <vector>

namespace {

constexpr long LARGE = 1 << 17; // products that are worth waking another thread

template <class T> struct Call {
    long requests, queries, kv_heads, size, block_size;
    const T *query; // [T, queries, size]
    const T *keys, *values;
    long block_stride, slot_stride, head_stride;
    const std::int32_t *tables;
    long table_stride;
    const std::int32_t *seq_lens, *begins;
    T *out;
    float scale, soft_cap;
    long window;

    long group() const { return queries / kv_heads; }

    // One token of a request, one KV head: `end` tokens are there up to it.
    void token(const std::int32_t *table, long row, long head, long end,
               std::vector<float> &memory) const {
        const long heads = group(), begin = window > 0 && end > window ? end - window : 0;
        const long count = end - begin, padded = (count + WIDTH - 1) / WIDTH * WIDTH;
        memory.resize(heads * (size * 2 + padded));
        float *wide = memory.data(), *sums = wide + heads * size, *scores = sums + heads * size;
        const long at = (row * queries + head * heads) * size;
        for (long i = 0; i < heads * size; ++i) wide[i] = number(query[at + i]) * scale;
        for (long i = 0; i < heads * size; ++i) sums[i] = 0.0f;
        for_neighbours(table, begin, end, head, [&](long first, long some, long place) {
            for (long each = 0; each < heads; ++each)
                for (long i = 0; i < some; ++i)
                    scores[each * padded + first + i] =
                        dot(wide + each * size, keys + place + i * slot_stride, size);
        });
        for (long each = 0; each < heads; ++each) softmax(scores + each * padded, count, padded);
        for_neighbours(table, begin, end, head, [&](long first, long some, long place) {
            for (long each = 0; each < heads; ++each)
                add(sums + each * size, scores + each * padded + first, values + place, some);
        });
        for (long i = 0; i < heads * size; ++i) put(out + at + i, sums[i]);
    }

    // Tokens `begin` to `end`, those of each block together: the number of the first, how many,
    // and where its row is.
    template <class Do>
    void for_neighbours(const std::int32_t *table, long begin, long end, long head, Do visit) const {
        for (long token = begin; token < end;) {
            const long offset = token % block_size, left = block_size - offset;
            const long some = end - token < left ? end - token : left;
            visit(token - begin, some,
                  long(table[token / block_size]) * block_stride + offset * slot_stride +
                      head * head_stride);
            token += some;
        }
    }

    // The weighted sum of so many rows.
    void add(float *sums, const float *weights, const T *rows, long count) const {
        constexpr int SOME = 4;
        long i = 0;
        for (; i + SOME * WIDTH <= size; i += SOME * WIDTH)
            add_columns<SOME>(sums + i, weights, rows + i, count);
        for (; i + WIDTH <= size; i += WIDTH) add_columns<1>(sums + i, weights, rows + i, count);
        for (; i < size; ++i)
            for (long row = 0; row < count; ++row)
                sums[i] += number(rows[row * slot_stride + i]) * weights[row];
    }

    template <int SOME>
    void add_columns(float *sums, const float *weights, const T *rows, long count) const {
        vec sum[SOME];
        for (int each = 0; each < SOME; ++each) sum[each] = load(sums + each * WIDTH);
        for (long row = 0; row < count; ++row)
            for (int each = 0; each < SOME; ++each)
                sum[each] += load(rows + row * slot_stride + each * WIDTH) * weights[row];
        for (int each = 0; each < SOME; ++each) store(sums + each * WIDTH, sum[each]);
    }

    void softmax(float *scores, long count, long padded) const {
        if (soft_cap > 0)
            for (long i = 0; i < count; ++i) scores[i] = soft_cap * std::tanh(scores[i] / soft_cap);
        const float none = -std::numeric_limits<float>::infinity();
        for (long i = count; i < padded; ++i) scores[i] = none;
        vec highest = vec{} + none, sums = {};
        for (long i = 0; i < padded; i += WIDTH) {
            const vec each = load(scores + i);
            highest = each > highest ? each : highest;
        }
        float lanes[WIDTH], most = none;
        store(lanes, highest);
        for (const float each : lanes) most = each > most ? each : most;
        for (long i = 0; i < padded; i += WIDTH) {
            const vec each = exponential(load(scores + i) - most);
            store(scores + i, each);
            sums += each;
        }
        const vec inverse = vec{} + 1.0f / total(sums);
        for (long i = 0; i < padded; i += WIDTH) store(scores + i, load(scores + i) * inverse);
    }

    void run(int threads) const {
        long seen = 0;
        for (long request = 0; request < requests; ++request) seen += seq_lens[request];
        const bool large = seen * queries * size >= LARGE;
        const Settings settings(large);
#pragma omp parallel num_threads(threads) if (large)
        {
            const Settings::Taken taken(settings);
#pragma omp for collapse(2) schedule(dynamic)
            for (long request = 0; request < requests; ++request)
                for (long head = 0; head < kv_heads; ++head) head_of(request, head);
        }
    }

    void head_of(long request, long head) const {
        static thread_local std::vector<float> memory;
        const long begin = begins[request], end = begins[request + 1];
        const std::int32_t *table = tables + request * table_stride;
        for (long row = begin; row < end; ++row) {
            const long there = seq_lens[request] ? seq_lens[request] - (end - row) + 1 : 0;
            if (there > 0) {
                token(table, row, head, there, memory);
                continue;
            }
            const long at = (row * queries + head * group()) * size;
            for (long i = 0; i < group() * size; ++i) put(out + at + i, 0.0f);
        }
    }
};

} // namespace

// Returns 0; 1 where a request is longer than its table, 2 where a block is beyond the cache, 3 where
// a request's tokens are not among those of the step.
extern "C" int few_tokens(int kind, int threads, long requests, long tokens, long queries,
                          long kv_heads, long size, long block_size, long num_blocks, long max_blocks,
                          const void *query, const void *keys, const void *values, long block_stride,
                          long slot_stride, long head_stride, const std::int32_t *tables,
                          long table_stride, const std::int32_t *seq_lens,
                          const std::int32_t *begins, void *out, float scale, float soft_cap,
                          long window) {
    for (long request = 0; request < requests; ++request) {
        const long new_tokens = begins[request + 1] - begins[request], end = seq_lens[request];
        if (begins[request] < 0 || new_tokens < 0 || begins[request + 1] > tokens) return 3;
        if (end <= 0 || new_tokens == 0) continue;
        if (end > max_blocks * block_size) return 1;
        long token = end - new_tokens + 1 - window;
        if (window <= 0 || token < 0) token = 0;
        for (long block = token / block_size; block * block_size < end; ++block) {
            const long number = tables[request * table_stride + block];
            if (number < 0 || number >= num_blocks) return 2;
        }
    }
    const long end = requests ? begins[requests] : 0, width = queries * size;
    if (kind == FLOAT32) {
        float *to = static_cast<float *>(out);
        Call<float>{requests, queries, kv_heads, size, block_size, static_cast<const float *>(query),
                    static_cast<const float *>(keys), static_cast<const float *>(values),
                    block_stride, slot_stride, head_stride, tables, table_stride, seq_lens, begins,
                    to, scale, soft_cap, window}
            .run(threads);
        std::memset(to + end * width, 0, (tokens - end) * width * sizeof(float));
    } else {
        bf16 *to = static_cast<bf16 *>(out);
        Call<bf16>{requests, queries, kv_heads, size, block_size, static_cast<const bf16 *>(query),
                   static_cast<const bf16 *>(keys), static_cast<const bf16 *>(values),
                   block_stride, slot_stride, head_stride, tables, table_stride, seq_lens, begins,
                   to, scale, soft_cap, window}
            .run(threads);
        std::memset(to + end * width, 0, (tokens - end) * width * sizeof(bf16));
    }
    return 0;
}
