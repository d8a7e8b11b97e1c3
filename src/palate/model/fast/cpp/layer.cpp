// The small operations of a layer, forward and backward: norm, rotation, gate.

namespace {

constexpr int64_t FEW_ROWS = 64;  // rows whose weight gradients are summed before those of others

inline Floats sigmoid(Floats x) {
    Floats small = exponential(x < 0.0f ? x : -x);  // e^-|x|, which cannot overflow
    return (x < 0.0f ? small : Floats{} + 1.0f) * reciprocal(small + 1.0f);
}

}  // namespace

extern "C" {

// Writes hidden + change, if given, to `sum`, and the RMS norm of it to `out`.
//
// hidden, change, sum, out (rows, size); weight (size); factors (rows), if given: 1 / sqrt(mean(x^2) + eps)
void normalise(
    const Number* hidden, const Number* change, Number* sum_out, const Number* weight, Number* out, float* factors,
    int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > FEW)
    for (int64_t r = 0; r < rows; r++) {
        const Number *x = hidden + r * size, *added = change + r * size;
        float squares = 0;
        Floats many = {};
        int64_t i = 0;
        if (change) {
            Number* total = sum_out + r * size;
            for (; i + LANES <= size; i += LANES) store(total + i, load(x + i) + load(added + i));
            for (; i < size; i++) put(total + i, wide(x[i]) + wide(added[i]));
            x = total;
        }
        for (i = 0; i + LANES <= size; i += LANES) {
            Floats y = load(x + i);
            many += y * y;
        }
        for (; i < size; i++) squares += wide(x[i]) * wide(x[i]);
        const float factor = 1 / std::sqrt((squares + sum(many)) / size + eps);
        if (factors) factors[r] = factor;
        for (i = 0; i + LANES <= size; i += LANES)
            store(out + r * size + i, load(x + i) * factor * load(weight + i));
        for (; i < size; i++) put(out + r * size + i, wide(x[i]) * factor * wide(weight[i]));
    }
}

// Writes the gradient of the sum to `d_x`, and adds that of the weight to `d_weight` if given.
//
// With g = weight * d_out and the factor r: d_x = r g - x r^3 mean(g x) + d_sum.
// x, d_out, d_sum, d_x (rows, size), d_sum may be missing; factors (rows); weight, d_weight (size)
void normalise_back(
    const Number* x, const Number* weight, const float* factors, const Number* d_out, const Number* d_sum,
    Number* d_x, float* d_weight, int64_t rows, int64_t size) {
    const int64_t chunks = (rows + FEW_ROWS - 1) / FEW_ROWS;
    std::vector<float> partial(d_weight ? chunks * size : 0);
#pragma omp parallel for
    for (int64_t c = 0; c < chunks; c++) {
        float* own = d_weight ? partial.data() + c * size : nullptr;
        for (int64_t r = c * FEW_ROWS; r < std::min(rows, (c + 1) * FEW_ROWS); r++) {
            const Number *y = x + r * size, *d = d_out + r * size, *rest = d_sum + r * size;
            const float factor = factors[r];
            Floats many = {};
            float along = 0;
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) many += load(d + i) * load(weight + i) * load(y + i);
            for (; i < size; i++) along += wide(d[i]) * wide(weight[i]) * wide(y[i]);
            along = (along + sum(many)) / size * factor * factor * factor;
            for (i = 0; i + LANES <= size; i += LANES) {
                Floats slope = load(d + i), value = load(y + i);
                Floats result = slope * load(weight + i) * factor - value * along;
                if (d_sum) result += load(rest + i);
                store(d_x + r * size + i, result);
                if (own) store(own + i, load(own + i) + slope * value * factor);
            }
            for (; i < size; i++) {
                float result = wide(d[i]) * wide(weight[i]) * factor - wide(y[i]) * along;
                put(d_x + r * size + i, d_sum ? result + wide(rest[i]) : result);
                if (own) own[i] += wide(d[i]) * wide(y[i]) * factor;
            }
        }
    }
    if (d_weight)
        for (int64_t c = 0; c < chunks; c++)
            for (int64_t i = 0; i < size; i++) d_weight[i] += partial[c * size + i];
}

// Writes silu(first) * second. first, second (rows, size) with `step` numbers between rows; out (rows, size)
void gate(const Number* first, const Number* second, int64_t step, Number* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > FEW)
    for (int64_t r = 0; r < rows; r++) {
        const Number *x = first + r * step, *y = second + r * step;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            Floats value = load(x + i);
            store(out + r * size + i, value * sigmoid(value) * load(y + i));
        }
        for (; i < size; i++) put(out + r * size + i, wide(x[i]) / (1 + std::exp(-wide(x[i]))) * wide(y[i]));
    }
}

// Writes `gate`'s result again, and the gradients of its arguments. All have `count` numbers, and results may be in
// the place of arguments.
void gate_back(
    const Number* first, const Number* second, const Number* d_out, Number* out, Number* d_first, Number* d_second,
    int64_t count) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats x = load(first + i), y = load(second + i), d = load(d_out + i), s = sigmoid(x), act = x * s;
        store(out + i, act * y);
        store(d_second + i, d * act);
        store(d_first + i, d * y * s * (x * (1.0f - s) + 1.0f));
    }
    for (int64_t i = whole; i < count; i++) {
        float x = wide(first[i]), y = wide(second[i]), d = wide(d_out[i]), s = 1 / (1 + std::exp(-x));
        put(out + i, x * s * y);
        put(d_second + i, d * x * s);
        put(d_first + i, d * y * s * (1 + x * (1 - s)));
    }
}

// Rotates each pair (x_i, x_{i + SIZE/2}) of a head by its angle times `sign`.
//
// x (tokens, heads, SIZE) with `step` numbers between tokens; cos, sin (tokens, SIZE); out (tokens, heads, SIZE)
void rotate(
    const Number* x, int64_t step, const float* cos, const float* sin, float sign, Number* out, int64_t tokens,
    int64_t heads) {
    constexpr int HALF_SIZE = SIZE / 2;
#pragma omp parallel for if (tokens * heads * SIZE > FEW)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * SIZE, *s = sin + t * SIZE;
        for (int64_t h = 0; h < heads; h++) {
            const Number *first = x + t * step + h * SIZE, *second = first + HALF_SIZE;
            Number* to = out + (t * heads + h) * SIZE;
            int i = 0;
            for (; i + LANES <= HALF_SIZE; i += LANES) {
                Floats a = load(first + i), b = load(second + i), turn = load(s + i) * sign;
                store(to + i, a * load(c + i) - b * turn);
                store(to + HALF_SIZE + i, b * load(c + HALF_SIZE + i) + a * turn);
            }
            for (; i < HALF_SIZE; i++) {
                float a = wide(first[i]), b = wide(second[i]), turn = s[i] * sign;
                put(to + i, a * c[i] - b * turn);
                put(to + HALF_SIZE + i, b * c[HALF_SIZE + i] + a * turn);
            }
        }
    }
}

}  // extern "C"
