// The operations of a sampling step between its products with weights, for one layer of a Llama-like model.
//
// `native.py` compiles this file with four definitions before it: HALF (1: bfloat16, 0: float32), QUERY_HEADS,
// KEY_HEADS and SIZE (numbers in a head). All arithmetic is in float32; results are rounded once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, MOST_QUERIES = 6, MOST_BLOCKS = 4, MOST_PARTS = 4;
#else
constexpr int LANES = 8, MOST_QUERIES = 3, MOST_BLOCKS = 2, MOST_PARTS = 3;
#endif
constexpr int BLOCK = 16;  // keys in a block: the store keeps number d of 16 keys together
constexpr int PER_BLOCK = BLOCK / LANES;
constexpr int GROUP = QUERY_HEADS / KEY_HEADS;
constexpr int PADDED = (SIZE + 15) / 16 * 16;  // numbers in a stored value
constexpr int JOINED = (QUERY_HEADS + 2 * KEY_HEADS) * SIZE;
constexpr int CHUNK = std::max(1, 24 / GROUP);  // rows of a prompt that one task computes
constexpr int64_t FEW = 1 << 14;  // numbers for which a second thread is not worth its start

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
#if HALF
typedef uint16_t Number;
#else
typedef float Number;
#endif

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline Floats load(const uint16_t* from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
}

inline void store(uint16_t* to, Floats x) {
    Bits bits = (Bits)x;
    Bits rounded = bits + (0x7fff + ((bits >> 16) & 1));
    Bits kept = (Bits)(x == x);  // all ones, or zero for a NaN, which stays one
    rounded = (rounded & kept) | (0x7fc00000 & ~kept);
    Halves half = __builtin_convertvector(rounded >> 16, Halves);
    std::memcpy(to, &half, sizeof half);
}

inline float wide(float x) { return x; }

inline float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void put(float* to, float x) { *to = x; }

inline void put(uint16_t* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *to = x != x ? 0x7fc0 : (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
}

// Returns e^x for x <= 0, to two units in the last place; below -87 it returns zero.
inline Floats exponential(Floats x) {
    Floats lowest = Floats{} - 87.0f;
    Floats bounded = x < lowest ? lowest : x;
    Floats scaled = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are an integer
    Floats whole = scaled - 12582912.0f;
    Floats rest = bounded - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Floats y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    Floats power = (Floats)((((Bits)scaled) + 127) << 23);
    Floats result = y * power;
    return x < lowest ? Floats{} : result;
}

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

inline float most(Floats x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = std::max(found, x[i]);
    return found;
}

// Scores of Q queries with B blocks of keys. queries (Q, SIZE), keys (B, SIZE, BLOCK), scores (Q, stride)
template <int Q, int B>
inline void score(const float* queries, const float* keys, float* scores, int64_t stride) {
    Floats total[Q][B * PER_BLOCK] = {};
    for (int d = 0; d < SIZE; d++) {
        Floats key[B * PER_BLOCK];
        for (int b = 0; b < B; b++)
            for (int p = 0; p < PER_BLOCK; p++)
                key[b * PER_BLOCK + p] = load(keys + (b * SIZE + d) * BLOCK + p * LANES);
        for (int q = 0; q < Q; q++)
            for (int i = 0; i < B * PER_BLOCK; i++) total[q][i] += key[i] * queries[q * SIZE + d];
    }
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < B * PER_BLOCK; i++) store(scores + q * stride + i * LANES, total[q][i]);
}

template <int Q>
void score_all(const float* queries, const float* keys, int64_t blocks, float* scores, int64_t stride) {
    int64_t b = 0;
    for (; b + MOST_BLOCKS <= blocks; b += MOST_BLOCKS)
        score<Q, MOST_BLOCKS>(queries, keys + b * SIZE * BLOCK, scores + b * BLOCK, stride);
    for (; b < blocks; b++) score<Q, 1>(queries, keys + b * SIZE * BLOCK, scores + b * BLOCK, stride);
}

// Adds weighted sums of values to Q outputs. weights (Q, stride), values (count, PADDED), outputs (Q, PADDED)
template <int Q, int P>
inline void weigh(
    const float* weights, int64_t stride, const Number* values, int64_t first, int64_t end, float* outputs) {
    Floats total[Q][P];
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < P; p++) total[q][p] = load(outputs + q * PADDED + p * LANES);
    for (int64_t s = first; s < end; s++) {
        Floats value[P];
        for (int p = 0; p < P; p++) value[p] = load(values + s * PADDED + p * LANES);
        for (int q = 0; q < Q; q++)
            for (int p = 0; p < P; p++) total[q][p] += value[p] * weights[q * stride + s];
    }
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < P; p++) store(outputs + q * PADDED + p * LANES, total[q][p]);
}

template <int Q>
void weigh_all(
    const float* weights, int64_t stride, const Number* values, int64_t first, int64_t end, float* outputs) {
    int p = 0;
    for (; p + MOST_PARTS <= PADDED / LANES; p += MOST_PARTS)
        weigh<Q, MOST_PARTS>(weights, stride, values + p * LANES, first, end, outputs + p * LANES);
    for (; p < PADDED / LANES; p++)
        weigh<Q, 1>(weights, stride, values + p * LANES, first, end, outputs + p * LANES);
}

// Calls f<Q>(first) for groups of at most MOST_QUERIES of `count` queries.
template <int Q, typename F>
inline void exactly(int left, F f, int64_t first) {
    if constexpr (Q > 0) {
        if (left == Q) f.template operator()<Q>(first);
        else exactly<Q - 1>(left, f, first);
    }
}

template <typename F>
inline void in_groups(int64_t count, F f) {
    for (int64_t first = 0; first < count; first += MOST_QUERIES)
        exactly<MOST_QUERIES>(int(std::min<int64_t>(MOST_QUERIES, count - first)), f, first);
}

struct Scoring {
    const float* queries; const float* keys; int64_t blocks; float* scores; int64_t stride;
    template <int Q> void operator()(int64_t first) const {
        score_all<Q>(queries + first * SIZE, keys, blocks, scores + first * stride, stride);
    }
};

struct Weighing {
    const float* weights; int64_t stride; const Number* values; int64_t first_value, end; float* outputs;
    template <int Q> void operator()(int64_t first) const {
        weigh_all<Q>(weights + first * stride, stride, values, first_value, end, outputs + first * PADDED);
    }
};

// Rotates neighbours as complex numbers, after the norm of the head if there is one.
inline void turn(const Number* from, const float* turns, const Number* norm, float eps, float* to) {
    float factor = 1;
    if (norm) {
        float squares = 0;
        for (int d = 0; d < SIZE; d++) squares += wide(from[d]) * wide(from[d]);
        factor = 1 / std::sqrt(squares / SIZE + eps);
    }
    for (int d = 0; d < SIZE; d += 2) {
        float x = wide(from[d]), y = wide(from[d + 1]);
        if (norm) x *= factor * wide(norm[d]), y *= factor * wide(norm[d + 1]);
        to[d] = x * turns[d] - y * turns[d + 1];
        to[d + 1] = x * turns[d + 1] + y * turns[d];
    }
}

// Exponentiates scores in [first, end) and clears those before; `most` is their largest, `total` their sum.
inline float largest(const float* scores, int64_t first, int64_t end) {
    float found = -std::numeric_limits<float>::infinity();
    Floats many = Floats{} + found;
    int64_t s = first;
    for (; s + LANES <= end; s += LANES) {
        Floats x = load(scores + s);
        many = x > many ? x : many;
    }
    for (; s < end; s++) found = std::max(found, scores[s]);
    return std::max(found, most(many));
}

inline float exponentiate(float* scores, int64_t first, int64_t end, float largest) {
    std::fill(scores, scores + first, 0.0f);
    Floats many = {};
    float total = 0;
    int64_t s = first;
    for (; s + LANES <= end; s += LANES) {
        Floats x = exponential(load(scores + s) - largest);
        store(scores + s, x);
        many += x;
    }
    if (s < end) {
        float rest[LANES];
        for (int i = 0; i < LANES; i++) rest[i] = s + i < end ? scores[s + i] - largest : -100.0f;
        Floats x = exponential(load(rest));
        store(rest, x);
        for (int i = 0; s + i < end; i++) scores[s + i] = rest[i], total += rest[i];
    }
    return total + sum(many);
}

}  // namespace

extern "C" {

// Adds `change` (rows, size), if given, to `hidden`, and writes the RMS norm of the sum to `out`.
void normalise(
    Number* hidden, const Number* change, const Number* weight, Number* out, int64_t rows, int64_t size,
    float eps) {
#pragma omp parallel for if (rows * size > FEW)
    for (int64_t r = 0; r < rows; r++) {
        Number* x = hidden + r * size;
        float squares = 0;
        Floats many = {};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            if (change) store(x + i, load(x + i) + load(change + r * size + i));
            Floats y = load(x + i);
            many += y * y;
        }
        for (; i < size; i++) {
            if (change) put(x + i, wide(x[i]) + wide(change[r * size + i]));
            squares += wide(x[i]) * wide(x[i]);
        }
        float factor = 1 / std::sqrt((squares + sum(many)) / size + eps);
        for (i = 0; i + LANES <= size; i += LANES)
            store(out + r * size + i, load(x + i) * factor * load(weight + i));
        for (; i < size; i++) put(out + r * size + i, wide(x[i]) * factor * wide(weight[i]));
    }
}

// Writes silu(gate) * up. joined (rows, 2 * size): gate, up; out (rows, size)
void gate(const Number* joined, Number* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > FEW)
    for (int64_t r = 0; r < rows; r++) {
        const Number *first = joined + 2 * r * size, *second = first + size;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            Floats x = load(first + i);
            Floats small = exponential(x < 0 ? x : -x);  // e^-|x|, which cannot overflow
            Floats sigmoid = (x < 0 ? small : Floats{} + 1.0f) / (small + 1.0f);
            store(out + r * size + i, x * sigmoid * load(second + i));
        }
        for (; i < size; i++) {
            float x = wide(first[i]);
            put(out + r * size + i, x / (1 + std::exp(-x)) * wide(second[i]));
        }
    }
}

// Computes the attention of one new token per row, and stores its key and value.
//
// joined (rows, JOINED): queries, keys, values; turns (rows, query and key heads, SIZE): complex rotations
// places, depth (rows): the row's place in the grid of slots x per_slot, ascending, and its own tokens so far
// lengths (slots): prompt tokens
// prompt_keys (slots, KEY_HEADS, longest / BLOCK, SIZE, BLOCK), prompt_values (slots, KEY_HEADS, longest, PADDED)
// keys (slots * per_slot, KEY_HEADS, most / BLOCK, SIZE, BLOCK), values (slots * per_slot, KEY_HEADS, most, PADDED)
// out (rows, QUERY_HEADS * SIZE)
void attend(
    const Number* joined, const float* turns, const int64_t* places, const int64_t* depth, const int64_t* lengths,
    int64_t rows, int64_t per_slot, const float* prompt_keys, const Number* prompt_values, int64_t longest,
    float* keys, Number* values, int64_t most_tokens, const Number* query_norm, const Number* key_norm, float eps,
    int64_t window, Number* out) {
    struct Task { int64_t first, end, head; };
    std::vector<Task> tasks;
    for (int64_t first = 0; first < rows;) {
        int64_t end = first;
        while (end < rows && end < first + CHUNK && places[end] / per_slot == places[first] / per_slot) end++;
        for (int64_t head = 0; head < KEY_HEADS; head++) tasks.push_back({first, end, head});
        first = end;
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t t = 0; t < tasks.size(); t++) {
        const auto [first, end, head] = tasks[t];
        const int64_t slot = places[first] / per_slot, length = lengths[slot], count = end - first;
        int64_t deepest = 0;
        for (int64_t r = first; r < end; r++) deepest = std::max(deepest, depth[r] + 1);
        const int64_t prompt_blocks = (length + BLOCK - 1) / BLOCK, own = (deepest + BLOCK - 1) / BLOCK * BLOCK;
        const int64_t stride = prompt_blocks * BLOCK, all = count * GROUP;
        thread_local std::vector<float> memory;
        memory.resize(all * (SIZE + stride + own + PADDED + 1));
        float *queries = memory.data(), *shared = queries + all * SIZE, *alone = shared + all * stride,
              *outputs = alone + all * own;
        std::fill(outputs, outputs + all * PADDED, 0.0f);
        for (int64_t r = first; r < end; r++) {
            const Number* of_row = joined + r * JOINED;
            const float* turned = turns + r * (QUERY_HEADS + KEY_HEADS) * SIZE;
            for (int g = 0; g < GROUP; g++) {
                const int64_t at = (head * GROUP + g) * SIZE;
                turn(of_row + at, turned + at, query_norm, eps, queries + ((r - first) * GROUP + g) * SIZE);
            }
            const int64_t at = (QUERY_HEADS + head) * SIZE, token = depth[r];
            float key[SIZE];
            turn(of_row + at, turned + at, key_norm, eps, key);
            const int64_t kept = places[r] * KEY_HEADS + head;
            float* to = keys + (kept * most_tokens + token / BLOCK * BLOCK) * SIZE + token % BLOCK;
            for (int d = 0; d < SIZE; d++) to[d * BLOCK] = key[d];
            std::memcpy(
                values + (kept * most_tokens + token) * PADDED, of_row + (QUERY_HEADS + KEY_HEADS + head) * SIZE,
                SIZE * sizeof(Number));
        }
        const int64_t place = slot * KEY_HEADS + head;
        in_groups(all, Scoring{queries, prompt_keys + place * longest * SIZE, prompt_blocks, shared, stride});
        int64_t begin = length;  // the first key of the prompt that some row sees
        for (int64_t r = first; r < end; r++) {
            const int64_t kept = places[r] * KEY_HEADS + head, tokens = depth[r] + 1, i = (r - first) * GROUP;
            const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
            in_groups(GROUP, Scoring{queries + i * SIZE, keys + kept * most_tokens * SIZE, blocks, alone + i * own, own});
            const int64_t seen = window ? std::max<int64_t>(0, length + tokens - window) : 0;
            const int64_t from = std::min(seen, length), own_from = std::max<int64_t>(0, seen - length);
            begin = std::min(begin, from);
            for (int64_t q = i; q < i + GROUP; q++) {
                float *of_prompt = shared + q * stride, *of_own = alone + q * own;
                const float top =
                    std::max(largest(of_prompt, from, length), largest(of_own, own_from, tokens));
                outputs[all * PADDED + q] = exponentiate(of_prompt, from, length, top) +
                                            exponentiate(of_own, own_from, tokens, top);
            }
            in_groups(GROUP, Weighing{
                alone + i * own, own, values + kept * most_tokens * PADDED, own_from, tokens, outputs + i * PADDED});
        }
        in_groups(all, Weighing{
            shared, stride, prompt_values + place * longest * PADDED, begin, length, outputs});
        for (int64_t q = 0; q < all; q++) {
            Number* to = out + (first + q / GROUP) * QUERY_HEADS * SIZE + (head * GROUP + q % GROUP) * SIZE;
            const float factor = 1 / outputs[all * PADDED + q];
            for (int d = 0; d < SIZE; d++) put(to + d, outputs[q * PADDED + d] * factor);
        }
    }
}

// Draws a token per row from softmax(logits / temperature), by the inverse of the cumulative distribution.
//
// logits (rows, size); uniforms (rows) in [0, 1)
// early (rows): 1 if the tokens in `ends` are not allowed in the row
// tokens, logps, drawn (rows): the token, its log-probability under the model, and under the distribution
// Returns the number of rows with logits that are not finite; their results are undefined.
int64_t draw(
    const Number* logits, int64_t rows, int64_t size, float temperature, const double* uniforms,
    const uint8_t* early, const int64_t* ends, int64_t end_count, int64_t* tokens, float* logps, float* drawn) {
    constexpr int64_t PART = 256;  // tokens whose probabilities are summed in float32, before a sum in float64
    const int64_t parts = (size + PART - 1) / PART, padded = parts * PART;
    const float none = -std::numeric_limits<float>::infinity(), factor = 1 / temperature;
    int64_t faults = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : faults)
    for (int64_t r = 0; r < rows; r++) {
        const Number* from = logits + r * size;
        thread_local std::vector<float> memory;
        thread_local std::vector<double> sums;
        memory.resize(padded), sums.resize(parts);
        float* x = memory.data();
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(x + i, load(from + i));
        for (; i < size; i++) x[i] = wide(from[i]);
        for (; i < padded; i++) x[i] = none;
        const float top_of_all = largest(x, 0, padded);
        double all = 0;  // the model's normaliser, where it differs from that of the distribution
        if (temperature != 1 || early[r]) {
            Floats many = {};
            for (i = 0; i < padded; i += LANES) many += exponential(load(x + i) - top_of_all);
            all = sum(many);
        }
        if (early[r])
            for (int64_t e = 0; e < end_count; e++) x[ends[e]] = none;
        const float top = early[r] ? largest(x, 0, padded) : top_of_all;
        double total = 0;
        for (int64_t p = 0; p < parts; p++) {
            Floats many = {};
            for (i = p * PART; i < (p + 1) * PART; i += LANES) {
                Floats weight = exponential((load(x + i) - top) * factor);
                store(x + i, weight);
                many += weight;
            }
            sums[p] = total += double(sum(many));
        }
        if (!(total < std::numeric_limits<double>::infinity()) || !(all == all)) {
            faults++;
            continue;
        }
        const double target = uniforms[r] * total;
        const int64_t part = std::min<int64_t>(std::upper_bound(sums.begin(), sums.end(), target) - sums.begin(), parts - 1);
        double before = part ? sums[part - 1] : 0;
        int64_t token = -1;  // the last allowed token, if rounding leaves none above the target
        for (i = part * PART; i < (part + 1) * PART; i++) {
            before += x[i];
            if (x[i] > 0) token = i;
            if (x[i] > 0 && before > target) break;
        }
        tokens[r] = token;
        drawn[r] = float(std::log(double(x[token]) / total));
        const bool same = temperature == 1 && !early[r];
        logps[r] = same ? drawn[r] : wide(from[token]) - top_of_all - float(std::log(all));
    }
    return faults;
}

}  // extern "C"
