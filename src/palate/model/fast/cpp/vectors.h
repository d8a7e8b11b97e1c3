// Vectors, and the products of attention, for one kind of layer of a Llama-like model.
//
// `native.py` compiles the files of this directory as one, with four definitions before them: HALF (1: bfloat16,
// 0: float32), QUERY_HEADS, KEY_HEADS and SIZE (numbers in a head). All arithmetic is in float32, and a result is
// rounded once; only tiled.cpp rounds weights before their products.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

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
#ifdef __AVX512BF16__
    const auto half = _mm512_cvtneps_pbh((__m512)x);
#else
    Bits bits = (Bits)x;
    Bits rounded = bits + (0x7fff + ((bits >> 16) & 1));
    Bits kept = (Bits)(x == x);  // all ones, or zero for a NaN, which stays one
    rounded = (rounded & kept) | (0x7fc00000 & ~kept);
    Halves half = __builtin_convertvector(rounded >> 16, Halves);
#endif
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

// Returns 1 / x to a unit in the last place, for numbers far from the ends of the format.
inline Floats reciprocal(Floats x) {
#ifdef __AVX512F__
    const Floats y = (Floats)_mm512_rcp14_ps((__m512)x);  // to 14 bits; a step of Newton's method doubles them
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

inline float most(Floats x) {
    float high = x[0];
    for (int i = 1; i < LANES; i++) high = std::max(high, x[i]);
    return high;
}

// Scores of Q queries with B blocks of keys. queries (Q, PADDED), keys (B, SIZE, BLOCK), scores (Q, stride)
template <int Q, int B, typename K>
inline void score(const float* queries, const K* keys, float* scores, int64_t stride) {
    Floats total[Q][B * PER_BLOCK] = {};
    for (int d = 0; d < SIZE; d++) {
        Floats key[B * PER_BLOCK];
        for (int b = 0; b < B; b++)
            for (int p = 0; p < PER_BLOCK; p++)
                key[b * PER_BLOCK + p] = load(keys + (b * SIZE + d) * BLOCK + p * LANES);
        for (int q = 0; q < Q; q++)
            for (int i = 0; i < B * PER_BLOCK; i++) total[q][i] += key[i] * queries[q * PADDED + d];
    }
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < B * PER_BLOCK; i++) store(scores + q * stride + i * LANES, total[q][i]);
}

template <int Q, typename K>
void score_all(const float* queries, const K* keys, int64_t blocks, float* scores, int64_t stride) {
    int64_t b = 0;
    for (; b + MOST_BLOCKS <= blocks; b += MOST_BLOCKS)
        score<Q, MOST_BLOCKS>(queries, keys + b * SIZE * BLOCK, scores + b * BLOCK, stride);
    for (; b < blocks; b++) score<Q, 1>(queries, keys + b * SIZE * BLOCK, scores + b * BLOCK, stride);
}

// Adds weighted sums of values to Q outputs.
// weights (Q, values) with any steps; values (end, PADDED); outputs (Q, PADDED)
template <int Q, int P, typename V>
inline void weigh(
    const float* weights, int64_t row, int64_t column, const V* values, int64_t first, int64_t end,
    float* outputs) {
    Floats total[Q][P];
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < P; p++) total[q][p] = load(outputs + q * PADDED + p * LANES);
    for (int64_t s = first; s < end; s++) {
        Floats value[P];
        for (int p = 0; p < P; p++) value[p] = load(values + s * PADDED + p * LANES);
        for (int q = 0; q < Q; q++)
            for (int p = 0; p < P; p++) total[q][p] += value[p] * weights[q * row + s * column];
    }
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < P; p++) store(outputs + q * PADDED + p * LANES, total[q][p]);
}

template <int Q, typename V>
void weigh_all(
    const float* weights, int64_t row, int64_t column, const V* values, int64_t first, int64_t end,
    float* outputs) {
    int p = 0;
    for (; p + MOST_PARTS <= PADDED / LANES; p += MOST_PARTS)
        weigh<Q, MOST_PARTS>(weights, row, column, values + p * LANES, first, end, outputs + p * LANES);
    for (; p < PADDED / LANES; p++)
        weigh<Q, 1>(weights, row, column, values + p * LANES, first, end, outputs + p * LANES);
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

template <typename K>
struct Scoring {
    const float* queries; const K* keys; int64_t blocks; float* scores; int64_t stride;
    template <int Q> void operator()(int64_t first) const {
        score_all<Q>(queries + first * PADDED, keys, blocks, scores + first * stride, stride);
    }
};

template <typename V>
struct Weighing {
    const float* weights; int64_t row, column; const V* values; int64_t first_value, end; float* outputs;
    template <int Q> void operator()(int64_t first) const {
        weigh_all<Q>(weights + first * row, row, column, values, first_value, end, outputs + first * PADDED);
    }
};

// Returns the largest of the scores in [first, end); minus infinity without any.
inline float largest(const float* scores, int64_t first, int64_t end) {
    float high = -std::numeric_limits<float>::infinity();
    Floats many = Floats{} + high;
    int64_t s = first;
    for (; s + LANES <= end; s += LANES) {
        Floats x = load(scores + s);
        many = x > many ? x : many;
    }
    for (; s < end; s++) high = std::max(high, scores[s]);
    return std::max(high, most(many));
}

// Replaces scores in [first, end) by e^(score - largest), and those before by zero; returns the sum.
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
