// Products of few rows and a weight, with what comes right before and behind them.
//
// Such a product waits for the weight: each number of it is read once, and asked for AHEAD bytes
// before it is needed, since the processor itself looks no further than the end of a page. Rows are
// computed in tiles of as many as registers hold; the bits of a row are the same in each of them.

#include "numbers.h"

namespace {

constexpr long AHEAD = 16384;
constexpr int MOST = REGISTERS / 4; // rows of a tile: a sum for each and both rows of the weight

constexpr long LARGE = 1 << 17; // numbers of a weight that are worth waking another thread

enum Mode { WRITE = 0, ADD = 1, GATED = 2 };

// sums[2][MOST]: those of `ROWS` rows of x and two rows of the weight.
template <class T, int ROWS>
APART void tile(const float *x, long x_stride, const T *first, const T *second, long count, float *sums) {
    vec sum[2][ROWS] = {};
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        if (i * long(sizeof(T)) % 64 == 0) {
            __builtin_prefetch(reinterpret_cast<const char *>(first + i) + AHEAD, 0, 2);
            __builtin_prefetch(reinterpret_cast<const char *>(second + i) + AHEAD, 0, 2);
        }
        const vec a = load(first + i), b = load(second + i);
        for (int row = 0; row < ROWS; ++row) {
            const vec each = load(x + row * x_stride + i);
            sum[0][row] += each * a;
            sum[1][row] += each * b;
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        float left[2] = {};
        for (long rest = i; rest < count; ++rest) {
            left[0] += x[row * x_stride + rest] * number(first[rest]);
            left[1] += x[row * x_stride + rest] * number(second[rest]);
        }
        sums[row] = total(sum[0][row]) + left[0];
        sums[MOST + row] = total(sum[1][row]) + left[1];
    }
}

template <class T, int ROWS = MOST>
void any_tile(long rows, const float *x, long x_stride, const T *first, const T *second,
              long count, float *sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return any_tile<T, ROWS - 1>(rows, x, x_stride, first, second, count, sums);
    }
    tile<T, ROWS>(x, x_stride, first, second, count, sums);
}

template <class T> struct Call {
    long rows, outputs, inputs;
    const float *x; // [rows, inputs], behind the norm
    long x_stride;
    const T *weight, *bias;
    long weight_stride;
    T *out;
    long out_stride;
    Mode mode;

    void finish(T *to, float sum, long output) const {
        if (bias) sum += number(bias[output]);
        if (mode == ADD) sum = number(*to) + rounded<T>(sum);
        put(to, sum);
    }

    APART void outputs_of_pair(long first, long second, long begin) const {
        const long here = rows - begin < MOST ? rows - begin : MOST;
        float sums[2 * MOST];
        any_tile<T>(here, x + begin * x_stride, x_stride, weight + first * weight_stride,
                    weight + second * weight_stride, inputs, sums);
        T *to = out + begin * out_stride;
        if (mode != GATED) {
            for (long row = 0; row < here; ++row, to += out_stride) {
                finish(to + first, sums[row], first);
                if (second != first) finish(to + second, sums[MOST + row], second);
            }
            return;
        }
        const float gate_bias = bias ? number(bias[first]) : 0.0f;
        const float up_bias = bias ? number(bias[second]) : 0.0f;
        for (long row = 0; row < here; ++row) {
            sums[row] = rounded<T>(sums[row] + gate_bias);
            sums[MOST + row] = rounded<T>(sums[MOST + row] + up_bias);
        }
        for (long row = 0; row < here; row += WIDTH) {
            float gates[WIDTH] = {}, silu[WIDTH];
            const long lanes = here - row < WIDTH ? here - row : WIDTH;
            for (long lane = 0; lane < lanes; ++lane) gates[lane] = sums[row + lane];
            const vec gate = load(gates);
            store(silu, gate / (1.0f + exponential(-gate)));
            for (long lane = 0; lane < lanes; ++lane) {
                const float up = sums[MOST + row + lane];
                put(to + (row + lane) * out_stride + first, rounded<T>(silu[lane]) * up);
            }
        }
    }

    void run(int threads) const {
        const long pairs = mode == GATED ? outputs / 2 : (outputs + 1) / 2;
        const bool large = outputs * inputs >= LARGE;
        const Settings settings(large);
#pragma omp parallel num_threads(threads) if (large)
        {
            const Settings::Taken taken(settings);
#pragma omp for schedule(static)
            for (long pair = 0; pair < pairs; ++pair) {
                long first = 2 * pair, second = first + 1 < outputs ? first + 1 : first;
                if (mode == GATED) first = pair, second = pair + pairs;
                for (long begin = 0; begin < rows; begin += MOST)
                    outputs_of_pair(first, second, begin);
            }
        }
    }
};

struct Arguments {
    int threads, mode, gain_kind;
    long rows, outputs, inputs;
    const void *x;
    long x_stride;
    const void *gain;
    const void *weight;
    long weight_stride;
    const void *bias;
    void *out;
    long out_stride;
    float eps;
};

template <class T> void product(const Arguments &a) {
    static thread_local Scratch memory;
    const long rows = a.rows, inputs = a.inputs;
    const T *x = static_cast<const T *>(a.x);
    const float *wide = reinterpret_cast<const float *>(x);
    long x_stride = a.x_stride;
    if (a.gain || sizeof(T) != sizeof(float)) {
        float *const normed = memory.of(rows * inputs);
        for (long row = 0; row < rows; ++row) {
            const T *from = x + row * x_stride;
            float *to = normed + row * inputs;
            if (!a.gain)
                for (long i = 0; i < inputs; ++i) to[i] = number(from[i]);
            else if (a.gain_kind == FLOAT32)
                rms_norm(from, static_cast<const float *>(a.gain), a.eps, inputs, to);
            else
                rms_norm(from, static_cast<const bf16 *>(a.gain), a.eps, inputs, to);
        }
        wide = normed;
        x_stride = inputs;
    }
    Call<T>{rows,
            a.outputs,
            inputs,
            wide,
            x_stride,
            static_cast<const T *>(a.weight),
            static_cast<const T *>(a.bias),
            a.weight_stride,
            static_cast<T *>(a.out),
            a.out_stride,
            Mode(a.mode)}
        .run(a.threads);
}

} // namespace

extern "C" int few_rows(const Arguments *arguments) {
    product<Number>(*arguments);
    return 0;
}
