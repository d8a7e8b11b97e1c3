// Passes over all gradients or weights of an update. They wait for memory alone.

namespace {

constexpr int64_t PIECE = 1 << 14;  // squares that are added up in float32
constexpr int64_t LINE = 32;        // numbers that are rounded together: 64 bytes in bfloat16

// Rounds a line of numbers. Those in bfloat16 go past the caches, whose lines would have to be read first.
inline void round_line(const float* x, float* out) { std::memcpy(out, x, LINE * sizeof *x); }

inline void round_line(const float* x, uint16_t* out) {
#ifdef __AVX512BF16__
    const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
    _mm512_stream_si512((__m512i*)out, line);
#else
    for (int64_t i = 0; i < LINE; i += LANES) store(out + i, load(x + i));
#endif
}

// Rounds fewer numbers, as in a line.
template <typename N>
inline void round_some(const float* x, N* out, int64_t count) {
    float from[LINE] = {};
    alignas(64) N to[LINE];
    std::copy(x, x + count, from);
    round_line(from, to);
    std::copy(to, to + count, out);
}

inline void finish_lines() {
#ifdef __AVX512BF16__
    _mm_sfence();
#endif
}

}  // namespace

extern "C" {

// Returns the sum of the squares of `count` numbers, which does not depend on the number of threads.
double squares(const float* x, int64_t count) {
    const int64_t pieces = (count + PIECE - 1) / PIECE;
    std::vector<double> partial(pieces);
#pragma omp parallel for if (count > FEW)
    for (int64_t p = 0; p < pieces; p++) {
        const int64_t end = std::min(count, (p + 1) * PIECE);
        Floats many[4] = {};
        float rest = 0;
        int64_t i = p * PIECE;
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                const Floats y = load(x + i + j * LANES);
                many[j] += y * y;
            }
        for (; i < end; i++) rest += x[i] * x[i];
        partial[p] = rest + sum(many[0] + many[1] + many[2] + many[3]);
    }
    double total = 0;
    for (double part : partial) total += part;
    return total;
}

// Adds x to `sums`, both (count).
void accumulate(const Number* x, float* sums, int64_t count) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for if (count > FEW)
    for (int64_t i = 0; i < whole; i += LANES) store(sums + i, load(sums + i) + load(x + i));
    for (int64_t i = whole; i < count; i++) sums[i] += wide(x[i]);
}

// Writes `count` numbers in the other format.
void narrow(const float* x, Number* out, int64_t count) {
    constexpr int64_t BYTES = LINE * sizeof *out;
    const int64_t begun = (BYTES - (uintptr_t)out % BYTES) % BYTES / sizeof *out;  // of a line
    const int64_t first = std::min(count, begun), end = first + (count - first) / LINE * LINE;
    round_some(x, out, first);
#pragma omp parallel if (count > FEW)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = first; i < end; i += LINE) round_line(x + i, out + i);
        finish_lines();
    }
    round_some(x + end, out + end, count - end);
}

}  // extern "C"
