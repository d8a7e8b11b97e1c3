// Attention of a packed row, forward and backward: prompts see themselves, completions their prompt and themselves.
//
// Scores of a few tokens with all keys that they see are computed at a time, in float32. Keys of 16 tokens are
// packed as in a sampling step; sums over keys or queries are products with the packed rows.

namespace {

constexpr int64_t MOST_SCORES = 1 << 16;  // scores that are in memory at a time, for the heads of a key head

inline int64_t blocks_of(int64_t size) { return (size + BLOCK - 1) / BLOCK; }

// Packs the vectors of a head in blocks of 16 tokens, (blocks, SIZE, BLOCK), padded with zeros.
void pack(const Number* from, int64_t heads, int64_t head, int64_t start, int64_t size, float* to) {
    std::fill(to, to + blocks_of(size) * SIZE * BLOCK, 0.0f);
    for (int64_t t = 0; t < size; t++) {
        const Number* x = from + ((start + t) * heads + head) * SIZE;
        float* place = to + t / BLOCK * SIZE * BLOCK + t % BLOCK;
        for (int d = 0; d < SIZE; d++) place[d * BLOCK] = wide(x[d]);
    }
}

// Copies the vectors of a head as rows, (tokens, PADDED), times a factor.
void copy(
    const Number* from, int64_t heads, int64_t head, int64_t start, int64_t size, float* to, int64_t step = PADDED,
    float factor = 1) {
    for (int64_t t = 0; t < size; t++) {
        const Number* x = from + ((start + t) * heads + head) * SIZE;
        for (int d = 0; d < SIZE; d++) to[t * step + d] = wide(x[d]) * factor;
        for (int d = SIZE; d < PADDED; d++) to[t * step + d] = 0;
    }
}

void write(const float* rows, int64_t heads, int64_t head, int64_t start, int64_t size, Number* to) {
    for (int64_t t = 0; t < size; t++)
        for (int d = 0; d < SIZE; d++) put(to + ((start + t) * heads + head) * SIZE + d, rows[t * PADDED + d]);
}

// Keys of some tokens for the queries of a head.
struct Keys {
    int64_t size;
    float *blocks = nullptr, *values = nullptr;                  // keys in blocks, values as rows
    float *value_blocks = nullptr, *rows = nullptr;              // for backward: the other way round
    float *d_keys = nullptr, *d_values = nullptr;                // gradients, as rows
};

// The tokens of a segment that are computed together: few enough for the scores to stay in the cache.
int64_t together(const Segment& segment) {
    const int64_t keys = segment.prompt_size + segment.size;
    return std::clamp<int64_t>(MOST_SCORES / (GROUP * std::max<int64_t>(keys, 1)), 4, 32);
}

// Scores of some tokens of a segment with the keys that they see.
struct Scores {
    float *of_prompt, *of_own;  // (tokens * GROUP, stride), (tokens * GROUP, own_stride)
    int64_t stride, own_stride;

    Scores(Memory& memory, int64_t queries, int64_t prompt, int64_t own)
        : stride(blocks_of(prompt) * BLOCK), own_stride(blocks_of(own) * BLOCK) {
        of_prompt = memory.take(queries * stride);
        of_own = memory.take(queries * own_stride);
    }

    void compute(const float* queries, int64_t count, const float* prompt, const float* own, int64_t own_end) {
        if (stride) in_groups(count, Scoring<float>{queries, prompt, stride / BLOCK, of_prompt, stride});
        in_groups(count, Scoring<float>{queries, own, blocks_of(own_end), of_own, own_stride});
    }
};

void attend_segment(
    const Segment& segment, int64_t head, const Number* query, const Number* key, const Number* value, float scaling,
    int64_t window, Number* out, float* normalisers) {
    const int64_t most_tokens = together(segment), most_queries = most_tokens * GROUP;
    const int64_t keys = (blocks_of(segment.prompt_size) + blocks_of(segment.size)) * BLOCK;
    Memory memory(keys * (SIZE + PADDED) + most_queries * (keys + 2 * PADDED));
    float *prompt = memory.take(blocks_of(segment.prompt_size) * BLOCK * SIZE),
          *own = memory.take(blocks_of(segment.size) * BLOCK * SIZE),
          *prompt_values = memory.take(segment.prompt_size * PADDED), *own_values = memory.take(segment.size * PADDED),
          *queries = memory.take(most_queries * PADDED), *outputs = memory.take(most_queries * PADDED);
    Scores scores(memory, most_queries, segment.prompt_size, segment.size);
    pack(key, KEY_HEADS, head, segment.prompt, segment.prompt_size, prompt);
    pack(key, KEY_HEADS, head, segment.start, segment.size, own);
    copy(value, KEY_HEADS, head, segment.prompt, segment.prompt_size, prompt_values);
    copy(value, KEY_HEADS, head, segment.start, segment.size, own_values);
    for (int64_t first = 0; first < segment.size; first += most_tokens) {
        const int64_t end = std::min(first + most_tokens, segment.size), count = (end - first) * GROUP;
        for (int g = 0; g < GROUP; g++)
            copy(query, QUERY_HEADS, head * GROUP + g, segment.start + first, end - first, queries + g * PADDED,
                 GROUP * PADDED, scaling);
        scores.compute(queries, count, prompt, own, end);
        std::fill(outputs, outputs + count * PADDED, 0.0f);
        std::vector<float> totals(count);
        for (int64_t q = 0; q < count; q++) {
            const int64_t token = first + q / GROUP;
            const Seen seen(segment, token, window);
            float *shared = scores.of_prompt + q * scores.stride, *alone = scores.of_own + q * scores.own_stride;
            const float top = std::max(
                largest(shared, seen.from, segment.prompt_size), largest(alone, seen.own_from, seen.own_end));
            totals[q] = exponentiate(shared, seen.from, segment.prompt_size, top) +
                        exponentiate(alone, seen.own_from, seen.own_end, top);
            std::fill(alone + seen.own_end, alone + end, 0.0f);
            normalisers[(segment.start + token) * QUERY_HEADS + head * GROUP + q % GROUP] = top + std::log(totals[q]);
        }
        if (segment.prompt_size)
            in_groups(count, Weighing<float>{
                scores.of_prompt, scores.stride, 1, prompt_values, 0, segment.prompt_size, outputs});
        in_groups(count, Weighing<float>{scores.of_own, scores.own_stride, 1, own_values, 0, end, outputs});
        for (int64_t q = 0; q < count; q++) {
            const int64_t place = (segment.start + first + q / GROUP) * QUERY_HEADS + head * GROUP + q % GROUP;
            for (int d = 0; d < SIZE; d++) put(out + place * SIZE + d, outputs[q * PADDED + d] / totals[q]);
        }
    }
}

// Turns scores into weights, and products with the values into gradients of scores.
void differentiate(
    float* scores, float* products, int64_t first, int64_t seen_end, int64_t end, float normaliser, float delta) {
    std::fill(scores, scores + first, 0.0f);
    std::fill(products, products + first, 0.0f);
    int64_t s = first;
    for (; s + LANES <= seen_end; s += LANES) {
        Floats weight = exponential(load(scores + s) - normaliser);
        store(scores + s, weight);
        store(products + s, weight * (load(products + s) - delta));
    }
    for (; s < seen_end; s++) {
        scores[s] = std::exp(scores[s] - normaliser);
        products[s] = scores[s] * (products[s] - delta);
    }
    if (seen_end < end) {
        std::fill(scores + seen_end, scores + end, 0.0f);
        std::fill(products + seen_end, products + end, 0.0f);
    }
}

// Adds the gradients of `size` keys and values from those of `count` queries' scores.
void collect(
    const float* weights, const float* slopes, int64_t stride, int64_t count, int64_t size, const float* queries,
    const float* d_out, const Keys& keys) {
    in_groups(size, Weighing<float>{weights, 1, stride, d_out, 0, count, keys.d_values});
    in_groups(size, Weighing<float>{slopes, 1, stride, queries, 0, count, keys.d_keys});
}

struct Backward {
    const Number *query, *key, *value, *out, *d_out;
    const float* normalisers;
    float scaling;
    int64_t window;
    Number *d_query, *d_key, *d_value;

    Keys keys(Memory& memory, int64_t head, int64_t start, int64_t size) const {
        const int64_t blocks = blocks_of(size) * BLOCK * SIZE;
        Keys made{size, memory.take(blocks), nullptr, memory.take(blocks), memory.take(size * PADDED),
                  memory.take(size * PADDED), memory.take(size * PADDED)};
        pack(key, KEY_HEADS, head, start, size, made.blocks);
        pack(value, KEY_HEADS, head, start, size, made.value_blocks);
        copy(key, KEY_HEADS, head, start, size, made.rows);
        std::fill(made.d_keys, made.d_keys + size * PADDED, 0.0f);
        std::fill(made.d_values, made.d_values + size * PADDED, 0.0f);
        return made;
    }

    void segment(const Segment& segment, int64_t head, const Keys& prompt, const Keys& own, Memory memory) const {
        const int64_t most_tokens = together(segment), most_queries = most_tokens * GROUP;
        float *queries = memory.take(most_queries * PADDED), *d_outputs = memory.take(most_queries * PADDED),
              *d_queries = memory.take(most_queries * PADDED);
        Scores scores(memory, most_queries, segment.prompt_size, segment.size);
        Scores products(memory, most_queries, segment.prompt_size, segment.size);
        for (int64_t first = 0; first < segment.size; first += most_tokens) {
            const int64_t end = std::min(first + most_tokens, segment.size), count = (end - first) * GROUP;
            for (int g = 0; g < GROUP; g++) {
                const int64_t of = head * GROUP + g, start = segment.start + first;
                copy(query, QUERY_HEADS, of, start, end - first, queries + g * PADDED, GROUP * PADDED, scaling);
                copy(d_out, QUERY_HEADS, of, start, end - first, d_outputs + g * PADDED, GROUP * PADDED);
            }
            scores.compute(queries, count, prompt.blocks, own.blocks, end);
            products.compute(d_outputs, count, prompt.value_blocks, own.value_blocks, end);
            for (int64_t q = 0; q < count; q++) {
                const int64_t token = first + q / GROUP;
                const int64_t place = (segment.start + token) * QUERY_HEADS + head * GROUP + q % GROUP;
                float delta = 0;
                for (int d = 0; d < SIZE; d++) delta += d_outputs[q * PADDED + d] * wide(out[place * SIZE + d]);
                const Seen seen(segment, token, window);
                const float normaliser = normalisers[place];
                differentiate(scores.of_prompt + q * scores.stride, products.of_prompt + q * scores.stride, seen.from,
                              segment.prompt_size, segment.prompt_size, normaliser, delta);
                differentiate(scores.of_own + q * scores.own_stride, products.of_own + q * scores.own_stride,
                              seen.own_from, seen.own_end, end, normaliser, delta);
            }
            std::fill(d_queries, d_queries + count * PADDED, 0.0f);
            if (segment.prompt_size) {
                in_groups(count, Weighing<float>{
                    products.of_prompt, scores.stride, 1, prompt.rows, 0, segment.prompt_size, d_queries});
                collect(scores.of_prompt, products.of_prompt, scores.stride, count, segment.prompt_size, queries,
                        d_outputs, prompt);
            }
            in_groups(count, Weighing<float>{products.of_own, scores.own_stride, 1, own.rows, 0, end, d_queries});
            collect(scores.of_own, products.of_own, scores.own_stride, count, end, queries, d_outputs, own);
            for (int64_t q = 0; q < count; q++) {
                const int64_t place = (segment.start + first + q / GROUP) * QUERY_HEADS + head * GROUP + q % GROUP;
                for (int d = 0; d < SIZE; d++)
                    put(d_query + place * SIZE + d, d_queries[q * PADDED + d] * scaling);
            }
        }
        write(own.d_keys, KEY_HEADS, head, segment.start, segment.size, d_key);
        write(own.d_values, KEY_HEADS, head, segment.start, segment.size, d_value);
    }

    static int64_t size_of_keys(int64_t size) { return 2 * blocks_of(size) * BLOCK * SIZE + 3 * size * PADDED; }

    void record(const std::vector<Segment>& segments, int64_t head) const {
        int64_t most = 0;
        for (const Segment& s : segments) {
            const int64_t queries = together(s) * GROUP;
            const int64_t scores = 2 * queries * (blocks_of(s.prompt_size) + blocks_of(s.size)) * BLOCK;
            most = std::max(most, size_of_keys(s.size) + 3 * queries * PADDED + scores);
        }
        const Segment& first = segments[0];
        Memory memory(size_of_keys(first.size) + most);
        const Keys prompt = keys(memory, head, first.start, first.size);
        for (const Segment& s : segments) {
            Memory rest = memory;
            const Keys own = &s == &first ? prompt : keys(rest, head, s.start, s.size);
            segment(s, head, prompt, own, rest);
        }
        // Completions have added to the prompt's gradients.
        write(prompt.d_keys, KEY_HEADS, head, first.start, first.size, d_key);
        write(prompt.d_values, KEY_HEADS, head, first.start, first.size, d_value);
    }
};

}  // namespace
