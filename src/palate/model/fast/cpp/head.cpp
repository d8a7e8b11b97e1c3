// Log-probabilities from logits, and the gradients of logits.

extern "C" {

// Computes the log-probability of each row's target, and what else is asked for.
//
// logits (rows, size); targets, logps, chosen (the target's logit), normalisers (log sum exp) (rows)
// entropy, top1 (rows), if given: the distribution's entropy, and whether its likeliest token is the target
void score_targets(
    const Number* logits, const int64_t* targets, float* logps, float* chosen, float* normalisers, float* entropy,
    float* top1, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t r = 0; r < rows; r++) {
        const Number* x = logits + r * size;
        const int64_t whole = size / LANES * LANES;
        Floats high = Floats{} - std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < whole; i += LANES) {
            Floats y = load(x + i);
            high = y > high ? y : high;
        }
        float top = most(high);
        for (int64_t i = whole; i < size; i++) top = std::max(top, wide(x[i]));
        Floats many = {}, products = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            Floats below = load(x + i) - top, weight = exponential(below);
            many += weight;
            products += weight * below;
        }
        float total = sum(many), product = sum(products);
        for (int64_t i = whole; i < size; i++) {
            const float below = wide(x[i]) - top, weight = std::exp(below);
            total += weight;
            product += weight * below;
        }
        const float target = wide(x[targets[r]]);
        normalisers[r] = top + std::log(total);
        chosen[r] = target;
        logps[r] = target - top - std::log(total);
        if (entropy) entropy[r] = std::log(total) - product / total;
        if (top1) {
            int64_t first = 0;
            if (target == top)
                while (wide(x[first]) != top) first++;
            top1[r] = target == top && first == targets[r];
        }
    }
}

// Overwrites logits with the gradients of a sum: by_logp * log-probability + by_chosen * logit of the targets.
//
// logits (rows, size); targets, normalisers, by_logp (rows); by_chosen (rows) may be missing
void slope(
    Number* logits, const int64_t* targets, const float* normalisers, const float* by_logp, const float* by_chosen,
    int64_t rows, int64_t size) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t r = 0; r < rows; r++) {
        Number* x = logits + r * size;
        const float target = wide(x[targets[r]]), normaliser = normalisers[r], by = by_logp[r];
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(x + i, exponential(load(x + i) - normaliser) * -by);
        for (; i < size; i++) put(x + i, std::exp(wide(x[i]) - normaliser) * -by);
        const float own = by * (1 - std::exp(target - normaliser));
        put(x + targets[r], by_chosen ? own + by_chosen[r] : own);
    }
}

}  // extern "C"
