// Attention of requests that compute few tokens each, over blocks wherever they lie.
//
// A KV head's keys and values are read once for all of its query heads.

#include "numbers.h"

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
               Scratch &memory) const {
        const long heads = group(), begin = window > 0 && end > window ? end - window : 0;
        const long count = end - begin, padded = (count + WIDTH - 1) / WIDTH * WIDTH;
        float *wide = memory.of(heads * (size * 2 + padded)), *sums = wide + heads * size, *scores = sums + heads * size;
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
            for (long i = 0; i < count; ++i) scores[i] = soft_cap * __builtin_tanhf(scores[i] / soft_cap);
        const float none = -__builtin_inff();
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
        static thread_local Scratch memory;
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

struct Arguments {
    int threads;
    long requests, tokens, queries, kv_heads, size, block_size, num_blocks, max_blocks;
    const void *query, *keys, *values;
    long block_stride, slot_stride, head_stride;
    const std::int32_t *tables;
    long table_stride;
    const std::int32_t *seq_lens, *begins;
    void *out;
    long window;
    float scale, soft_cap;
};

// 1 where a request is longer than its table, 2 where a block is beyond the cache, 3 where a
// request's tokens are not among those of the step.
int wrong(const Arguments &a) {
    for (long request = 0; request < a.requests; ++request) {
        const long begin = a.begins[request], end = a.seq_lens[request];
        const long new_tokens = a.begins[request + 1] - begin;
        if (begin < 0 || new_tokens < 0 || begin + new_tokens > a.tokens) return 3;
        if (end <= 0 || new_tokens == 0) continue;
        if (end > a.max_blocks * a.block_size) return 1;
        long token = end - new_tokens + 1 - a.window;
        if (a.window <= 0 || token < 0) token = 0;
        for (long block = token / a.block_size; block * a.block_size < end; ++block) {
            const long number = a.tables[request * a.table_stride + block];
            if (number < 0 || number >= a.num_blocks) return 2;
        }
    }
    return 0;
}

template <class T> void compute(const Arguments &a) {
    T *out = static_cast<T *>(a.out);
    Call<T>{a.requests, a.queries, a.kv_heads, a.size, a.block_size,
            static_cast<const T *>(a.query), static_cast<const T *>(a.keys),
            static_cast<const T *>(a.values), a.block_stride, a.slot_stride, a.head_stride,
            a.tables, a.table_stride, a.seq_lens, a.begins, out, a.scale, a.soft_cap, a.window}
        .run(a.threads);
    const long end = a.requests ? a.begins[a.requests] : 0, width = a.queries * a.size;
    std::memset(out + end * width, 0, (a.tokens - end) * width * sizeof(T));
}

} // namespace

extern "C" int few_tokens(const Arguments *arguments) {
    const int found = wrong(*arguments);
    if (found) return found;
    compute<Number>(*arguments);
    return 0;
}
