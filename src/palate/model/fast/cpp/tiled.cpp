// Attention of a packed row with matrix units, for bfloat16: weights and gradients of scores are rounded to bfloat16.
//
// Queries of some tokens, of all heads that share keys, are computed together: (head, token), each head padded to
// whole tiles. Backward works on transposed scores, (keys, queries): what belongs to a query is then a vector.

#define TILED (TILES && SIZE % 32 == 0)
#if TILED
namespace {

constexpr int64_t TOKENS = GROUP <= 4 ? 64 : 32;  // most tokens whose queries are computed together
constexpr int64_t MOST_TILED = 1 << 18;           // most scores in memory at a time in forward, unless of 16 tokens
constexpr int64_t KEYS = DEPTH;                   // keys that are computed together in backward

// The queries of some tokens of a segment.
struct Block {
    int64_t first, count, tokens, queries;  // tokens: of each head, and queries: of all, with padding

    Block(const Segment& segment, int64_t from, int64_t together = TOKENS)
        : first(from), count(std::min(together, segment.size - from)), tokens(padded(count, SIDE)),
          queries(padded(GROUP * tokens, DEPTH)) {}

    static int64_t most(int64_t size, int64_t together = TOKENS) {
        return padded(GROUP * std::min<int64_t>(together, padded(size, SIDE)), DEPTH);
    }
    // Calls f with the vectors of each head, and the place of the first; and with none for the padding.
    template <typename F>
    void each(const Half* all, const Segment& segment, int64_t head, F f) const {
        for (int64_t g = 0; g < GROUP; g++)
            f(Vectors(all, QUERY_HEADS, head * GROUP + g, segment.start + first, count), g * tokens, tokens);
        if (queries > GROUP * tokens) f(Vectors(all, 1, 0, 0, 0), GROUP * tokens, queries - GROUP * tokens);
    }
    int64_t place(const Segment& segment, int64_t head, int64_t g, int64_t token) const {
        return (segment.start + first + token) * QUERY_HEADS + head * GROUP + g;
    }
};

// Makes parts of memory, of a type that takes them from a `Memory`.
template <typename Parts, typename... Sizes>
Parts made(Sizes... sizes) {
    Memory counting(nullptr);
    Parts(counting, sizes...);
    Memory memory(counting.taken);
    return Parts(memory, sizes...);
}

// ---- Forward ------------------------------------------------------------------------------------------------------

struct ForwardParts {
    Half *keys, *values, *queries, *weights;
    float *scores, *outputs;

    ForwardParts(Memory& memory, int64_t count, int64_t most)
        : keys(memory.take_halves(count * SIZE)), values(memory.take_halves(count * SIZE)),
          queries(memory.take_halves(most * SIZE)), weights(memory.take_halves(most * count)),
          scores(memory.take(most * count)), outputs(memory.take(most * SIZE)) {}
};

// Writes e^(factor * score - top) of the keys [first, end), and zero for the others of `size`; returns their sum.
inline float weigh(
    const float* scores, Half* weights, int64_t size, int64_t first, int64_t end, float factor, float top) {
    Floats total = {};
    for (int64_t s = 0; s < size; s += SIDE) {
        const int64_t from = std::clamp<int64_t>(first - s, 0, SIDE), to = std::clamp<int64_t>(end - s, 0, SIDE);
        const __mmask16 seen = from < to ? ((1u << to) - 1) & ~((1u << from) - 1) : 0;
        __m512 weight = _mm512_setzero_ps();
        if (seen) {
            weight = _mm512_maskz_mov_ps(seen, (__m512)exponential(load(scores + s) * factor - top));
            total += (Floats)weight;
        }
        _mm256_store_si256((__m256i*)(weights + s), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return sum(total);
}

void attend_tiled(
    const Segment& segment, int64_t head, const Half* query, const Half* key, const Half* value, float scaling,
    int64_t window, Half* out, float* normalisers) {
    const Tiles used;
    const int64_t prompt = padded(segment.prompt_size, DEPTH), stride = prompt + padded(segment.size, DEPTH);
    const int64_t together = std::clamp<int64_t>(MOST_TILED / (GROUP * std::max<int64_t>(stride, 1)) / SIDE * SIDE, SIDE, TOKENS);
    const auto parts = made<ForwardParts>(stride, Block::most(segment.size, together));
    const Vectors of_prompt(key, KEY_HEADS, head, segment.prompt, segment.prompt_size),
        own(key, KEY_HEADS, head, segment.start, segment.size),
        values_of_prompt(value, KEY_HEADS, head, segment.prompt, segment.prompt_size),
        own_values(value, KEY_HEADS, head, segment.start, segment.size);
    write_columns(of_prompt, prompt, parts.keys);
    write_columns(own, stride - prompt, parts.keys + prompt * SIZE);
    write_pairs(values_of_prompt, 0, prompt, parts.values);
    write_pairs(own_values, prompt, stride - prompt, parts.values);
    for (int64_t first = 0; first < segment.size; first += together) {
        const Block block(segment, first, together);
        const int64_t own_keys = padded(first + block.count, DEPTH), keys = prompt + own_keys;
        block.each(query, segment, head, [&](Vectors from, int64_t at, int64_t count) {
            write_rows(from, count, parts.queries + at * SIZE);
        });
        multiply(parts.queries, SIZE, as_columns(parts.keys), parts.scores, stride, block.queries / SIDE, keys / SIDE,
                 SIZE / DEPTH, false);
        std::vector<float> totals(block.queries, 1.0f);
        for (int64_t g = 0; g < GROUP; g++)
            for (int64_t t = 0; t < block.count; t++) {
                const int64_t q = g * block.tokens + t;
                const Seen seen(segment, first + t, window);
                const float *scores = parts.scores + q * stride, *alone = scores + prompt;
                Half* weights = parts.weights + q * stride;
                const float top = scaling * std::max(largest(scores, seen.from, segment.prompt_size),
                                                     largest(alone, seen.own_from, seen.own_end));
                totals[q] = weigh(scores, weights, prompt, seen.from, segment.prompt_size, scaling, top) +
                            weigh(alone, weights + prompt, own_keys, seen.own_from, seen.own_end, scaling, top);
                normalisers[block.place(segment, head, g, t)] = top + std::log(totals[q]);
            }
        multiply(parts.weights, stride, as_rows(parts.values), parts.outputs, SIZE, block.queries / SIDE, SIZE / SIDE,
                 keys / DEPTH, false);
        for (int64_t g = 0; g < GROUP; g++)
            for (int64_t t = 0; t < block.count; t++) {
                const int64_t q = g * block.tokens + t, place = block.place(segment, head, g, t);
                const float factor = 1 / totals[q];
                for (int d = 0; d < SIZE; d += LANES)
                    store(out + place * SIZE + d, load(parts.outputs + q * SIZE + d) * factor);
            }
    }
}

// ---- Backward -----------------------------------------------------------------------------------------------------

// Keys and values of some tokens, and their gradients.
struct TiledKeys {
    int64_t size = 0, stride;
    Half *rows, *values, *columns;  // (stride, SIZE), (stride, SIZE), (SIZE, stride)
    float *d_keys, *d_values;       // (stride, SIZE)

    TiledKeys(Memory& memory, int64_t most)
        : stride(padded(most, KEYS)), rows(memory.take_halves(stride * SIZE)),
          values(memory.take_halves(stride * SIZE)), columns(memory.take_halves(stride * SIZE)),
          d_keys(memory.take(stride * SIZE)), d_values(memory.take(stride * SIZE)) {}

    void read(const Half* key, const Half* value, int64_t head, int64_t start, int64_t count) {
        size = count;
        const int64_t whole = padded(count, KEYS);
        const Vectors keys(key, KEY_HEADS, head, start, count);
        write_rows(keys, whole, rows);
        write_columns(keys, whole, nullptr, columns, stride);
        write_rows(Vectors(value, KEY_HEADS, head, start, count), whole, values);
        std::fill(d_keys, d_keys + whole * SIZE, 0.0f);
        std::fill(d_values, d_values + whole * SIZE, 0.0f);
    }

    void write(Half* d_key, Half* d_value, int64_t head, int64_t start, float scaling) const {
        for (int64_t t = 0; t < size; t++)
            for (int d = 0; d < SIZE; d += LANES) {
                const int64_t place = ((start + t) * KEY_HEADS + head) * SIZE + d;
                store(d_key + place, load(d_keys + t * SIZE + d) * scaling);
                store(d_value + place, load(d_values + t * SIZE + d));
            }
    }
};

// What belongs to the queries of a block, and to their scores with some keys.
struct TiledQueries {
    Half *columns, *d_columns, *pairs, *d_pairs;  // queries and gradients of outputs
    float *normalisers, *deltas, *d_queries;      // (queries), (queries), (SIZE, queries)
    float *scores, *products;                     // (KEYS, queries)
    Half *weights, *slopes, *slope_pairs;         // (KEYS, queries), the last as pairs

    TiledQueries(Memory& memory, int64_t most)
        : columns(memory.take_halves(most * SIZE)), d_columns(memory.take_halves(most * SIZE)),
          pairs(memory.take_halves(most * SIZE)), d_pairs(memory.take_halves(most * SIZE)),
          normalisers(memory.take(most)), deltas(memory.take(most)), d_queries(memory.take(most * SIZE)),
          scores(memory.take(most * KEYS)), products(memory.take(most * KEYS)),
          weights(memory.take_halves(most * KEYS)), slopes(memory.take_halves(most * KEYS)),
          slope_pairs(memory.take_halves(most * KEYS)) {}
};

struct BackwardParts {
    TiledKeys prompt, own;
    TiledQueries queries;
    BackwardParts(Memory& memory, int64_t prompt_size, int64_t most_own, int64_t most_queries)
        : prompt(memory, prompt_size), own(memory, most_own), queries(memory, most_queries) {}
};

struct TiledBackward {
    const Half *query, *key, *value, *out, *d_out;
    const float* normalisers;
    float scaling;
    int64_t window;
    Half *d_query, *d_key, *d_value;

    void read(const Segment& segment, int64_t head, const Block& block, const TiledQueries& to) const {
        for (const bool gradients : {false, true})
            block.each(gradients ? d_out : query, segment, head, [&](Vectors from, int64_t at, int64_t count) {
                write_columns(from, count, (gradients ? to.d_columns : to.columns) + at * SIZE);
                write_pairs(from, at, count, gradients ? to.d_pairs : to.pairs);
            });
        // A query that is padding has no weights.
        std::fill(to.normalisers, to.normalisers + block.queries, std::numeric_limits<float>::infinity());
        std::fill(to.deltas, to.deltas + block.queries, 0.0f);
        std::fill(to.d_queries, to.d_queries + block.queries * SIZE, 0.0f);
        for (int64_t g = 0; g < GROUP; g++)
            for (int64_t t = 0; t < block.count; t++) {
                const int64_t q = g * block.tokens + t, place = block.place(segment, head, g, t);
                Floats delta = {};
                for (int d = 0; d < SIZE; d += LANES) delta += load(d_out + place * SIZE + d) * load(out + place * SIZE + d);
                to.normalisers[q] = normalisers[place];
                to.deltas[q] = sum(delta);
            }
    }

    // Turns the scores of two keys into weights, and the products with their values into gradients of scores.
    //
    // Key r is seen by the tokens [low[r], high[r]) of the segment.
    void differentiate(
        const Block& block, const TiledQueries& q, int64_t row, const int32_t low[2], const int32_t high[2]) const {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i order = interleaving(0);
        for (int64_t i = 0; i < block.queries; i += SIDE) {
            const __m512i token = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(block.first + i % block.tokens)));
            const Floats normaliser = load(q.normalisers + i), delta = load(q.deltas + i);
            __m256i slopes[2];
            for (int r = 0; r < 2; r++) {
                const int64_t place = (row + r) * block.queries + i;
                const __mmask16 seen = _mm512_cmpge_epi32_mask(token, _mm512_set1_epi32(low[r])) &
                                       _mm512_cmplt_epi32_mask(token, _mm512_set1_epi32(high[r]));
                const Floats all = exponential(load(q.scores + place) * scaling - normaliser);
                const Floats weight = (Floats)_mm512_maskz_mov_ps(seen, (__m512)all);
                const Floats slope = weight * (load(q.products + place) - delta);
                slopes[r] = (__m256i)_mm512_cvtneps_pbh((__m512)slope);
                _mm256_store_si256((__m256i*)(q.weights + place), (__m256i)_mm512_cvtneps_pbh((__m512)weight));
                _mm256_store_si256((__m256i*)(q.slopes + place), slopes[r]);
            }
            _mm512_store_si512(
                q.slope_pairs + i / SIDE * TILE + row / 2 * DEPTH,
                _mm512_permutex2var_epi16(
                    _mm512_castsi256_si512(slopes[0]), order, _mm512_castsi256_si512(slopes[1])));
        }
    }

    // Adds the gradients of the queries of a block, and of some keys that they may see.
    //
    // before: the tokens of the record before the first of these keys, less those before the segment's first token
    void through(const Block& block, const TiledQueries& q, const TiledKeys& keys, int64_t before) const {
        const int64_t tiles = block.queries / SIDE, steps = block.queries / DEPTH;
        for (int64_t first = 0; first < keys.size; first += KEYS) {
            const int64_t place = before + first;
            if (place >= block.first + block.count) break;
            if (window && place + KEYS - 1 + window <= block.first) continue;
            const int64_t at = first * SIZE;
            multiply(keys.rows + at, SIZE, as_columns(q.columns), q.scores, block.queries, 2, tiles, SIZE / DEPTH, false);
            multiply(
                keys.values + at, SIZE, as_columns(q.d_columns), q.products, block.queries, 2, tiles, SIZE / DEPTH, false);
            for (int64_t row = 0; row < KEYS; row += 2) {
                int32_t low[2], high[2];
                for (int r = 0; r < 2; r++) {
                    constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();
                    low[r] = first + row + r < keys.size ? int32_t(place + row + r) : NEVER;
                    high[r] = window ? int32_t(std::min<int64_t>(place + row + r + window, NEVER)) : NEVER;
                }
                differentiate(block, q, row, low, high);
            }
            multiply(q.weights, block.queries, as_rows(q.d_pairs), keys.d_values + at, SIZE, 2, SIZE / SIDE, steps, true);
            multiply(q.slopes, block.queries, as_rows(q.pairs), keys.d_keys + at, SIZE, 2, SIZE / SIDE, steps, true);
            multiply(keys.columns + first, keys.stride, Pairs{q.slope_pairs, TILE, 0}, q.d_queries, block.queries,
                     SIZE / SIDE, tiles, 1, true);
        }
    }

    void write(const Segment& segment, int64_t head, const Block& block, const float* d_queries) const {
        for (int64_t i = 0; i < GROUP * block.tokens; i += SIDE)
            for (int d = 0; d < SIZE; d += SIDE) {
                __m512i x[16];
                for (int r = 0; r < 16; r++) x[r] = _mm512_load_si512(d_queries + (d + r) * block.queries + i);
                transpose(x);
                const int64_t t = i % block.tokens;
                for (int64_t r = 0; r < std::min(SIDE, block.count - t); r++)
                    store(d_query + block.place(segment, head, i / block.tokens, t + r) * SIZE + d,
                          (Floats)x[r] * scaling);
            }
    }

    void record(const std::vector<Segment>& segments, int64_t head) const {
        const Tiles used;
        const Segment& first = segments[0];
        int64_t own = 0, most = 0;
        for (const Segment& s : segments) {
            most = std::max(most, Block::most(s.size));
            if (&s != &first) own = std::max(own, s.size);
        }
        auto parts = made<BackwardParts>(first.size, own, most);
        parts.prompt.read(key, value, head, first.start, first.size);
        for (const Segment& s : segments) {
            if (&s != &first) parts.own.read(key, value, head, s.start, s.size);
            for (int64_t start = 0; start < s.size; start += TOKENS) {
                const Block block(s, start);
                read(s, head, block, parts.queries);
                through(block, parts.queries, parts.prompt, -s.prompt_size);
                if (&s != &first) through(block, parts.queries, parts.own, 0);
                write(s, head, block, parts.queries.d_queries);
            }
            if (&s != &first) parts.own.write(d_key, d_value, head, s.start, scaling);
        }
        // Completions have added to the prompt's gradients.
        parts.prompt.write(d_key, d_value, head, first.start, scaling);
    }
};

}  // namespace
#endif
