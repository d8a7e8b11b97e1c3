// A sampling step: the attention of one new token per row, and the draw of the next.

namespace {

constexpr int JOINED = (QUERY_HEADS + 2 * KEY_HEADS) * SIZE;
constexpr int CHUNK = std::max(1, 24 / GROUP);  // rows of a prompt that one task computes

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

}  // namespace

extern "C" {

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
    int64_t rows, int64_t per_slot, const Number* prompt_keys, const Number* prompt_values, int64_t longest,
    Number* keys, Number* values, int64_t most_tokens, const Number* query_norm, const Number* key_norm, float eps,
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
        memory.resize(all * (2 * PADDED + stride + own + 1));
        float *queries = memory.data(), *shared = queries + all * PADDED, *alone = shared + all * stride,
              *outputs = alone + all * own;
        std::fill(outputs, outputs + all * PADDED, 0.0f);
        for (int64_t r = first; r < end; r++) {
            const Number* of_row = joined + r * JOINED;
            const float* turned = turns + r * (QUERY_HEADS + KEY_HEADS) * SIZE;
            for (int g = 0; g < GROUP; g++) {
                const int64_t at = (head * GROUP + g) * SIZE;
                turn(of_row + at, turned + at, query_norm, eps, queries + ((r - first) * GROUP + g) * PADDED);
            }
            const int64_t at = (QUERY_HEADS + head) * SIZE, token = depth[r];
            float key[SIZE];
            turn(of_row + at, turned + at, key_norm, eps, key);
            const int64_t kept = places[r] * KEY_HEADS + head;
            Number* to = keys + (kept * most_tokens + token / BLOCK * BLOCK) * SIZE + token % BLOCK;
            for (int d = 0; d < SIZE; d++) put(to + d * BLOCK, key[d]);
            std::memcpy(
                values + (kept * most_tokens + token) * PADDED, of_row + (QUERY_HEADS + KEY_HEADS + head) * SIZE,
                SIZE * sizeof(Number));
        }
        const int64_t place = slot * KEY_HEADS + head;
        in_groups(all, Scoring<Number>{queries, prompt_keys + place * longest * SIZE, prompt_blocks, shared, stride});
        int64_t begin = length;  // the first key of the prompt that some row sees
        for (int64_t r = first; r < end; r++) {
            const int64_t kept = places[r] * KEY_HEADS + head, tokens = depth[r] + 1, i = (r - first) * GROUP;
            const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
            in_groups(GROUP, Scoring<Number>{queries + i * PADDED, keys + kept * most_tokens * SIZE, blocks, alone + i * own, own});
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
            in_groups(GROUP, Weighing<Number>{
                alone + i * own, own, 1, values + kept * most_tokens * PADDED, own_from, tokens, outputs + i * PADDED});
        }
        in_groups(all, Weighing<Number>{
            shared, stride, 1, prompt_values + place * longest * PADDED, begin, length, outputs});
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
            for (int64_t e = 0; e < end_count; e++)
                if (ends[e] < size) x[ends[e]] = none;
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
