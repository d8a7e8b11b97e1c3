// Products of a few rows with matrix units, for bfloat16: their time is that of reading the weight.

#if TILES
namespace {
constexpr int64_t BESIDE = 4;  // most panels that are computed together, so that a row is written in longer parts
}  // namespace
#endif

extern "C" {

// Writes a weight (outputs, inputs) as panels of 32 outputs: for each 32 inputs, the two tiles that are multiplied.
// Outputs and inputs are multiples of 32.
void pack_weight(const Number* weight, Number* out, int64_t outputs, int64_t inputs) {
#if TILES
    const int64_t steps = inputs / DEPTH;
#pragma omp parallel for
    for (int64_t panel = 0; panel < outputs / WIDTH; panel++)
        for (int64_t s = 0; s < steps; s++)
            for (int64_t side = 0; side < 2; side++) {
                __m512i x[16];
                for (int64_t i = 0; i < 16; i++)
                    x[i] = _mm512_loadu_si512(weight + (panel * WIDTH + side * SIDE + i) * inputs + s * DEPTH);
                transpose(x);
                Half* tile = out + (panel * steps + s) * STEP + side * TILE;
                for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(tile + i * DEPTH, x[i]);
            }
#endif
}

// Computes x W^T + bias from a packed weight. x (rows, inputs); bias (outputs), may be missing; out (rows, outputs)
void few_rows(
    const Number* x, const Number* weight, const Number* bias, Number* out, int64_t rows, int64_t outputs,
    int64_t inputs) {
#if TILES
    const int64_t steps = inputs / DEPTH, blocks = padded(rows, WIDTH) / WIDTH, panels = outputs / WIDTH;
    const int64_t threads = omp_get_max_threads();
    const int64_t groups = std::min(panels, padded((panels + BESIDE - 1) / BESIDE, threads));
#pragma omp parallel
    {
        const Tiles used;
        Memory memory(blocks * steps * STEP / 2 + BESIDE * WIDTH * WIDTH);
        Half* tiles = memory.take_halves(blocks * steps * STEP);
        float* sums = memory.take(BESIDE * WIDTH * WIDTH);
        for (int64_t r = 0; r < blocks * WIDTH; r++)
            for (int64_t s = 0; s < steps; s++) {
                const __m512i part = r < rows ? _mm512_loadu_si512(x + r * inputs + s * DEPTH) : _mm512_setzero_si512();
                _mm512_store_si512(tiles + (r / WIDTH * steps + s) * STEP + r % WIDTH * DEPTH, part);
            }
#pragma omp for schedule(static) nowait
        for (int64_t group = 0; group < groups; group++) {
            const int64_t first = panels * group / groups, end = panels * (group + 1) / groups;
            for (int64_t block = 0; block < blocks; block++) {
                for (int64_t panel = first; panel < end; panel++)
                    multiply_panels(
                        tiles + block * steps * STEP, weight + panel * steps * STEP, steps,
                        sums + (panel - first) * WIDTH * WIDTH, true);
                for (int64_t i = 0; i < std::min(WIDTH, rows - block * WIDTH); i++)
                    for (int64_t panel = first; panel < end; panel++) {
                        const float* left = sums + (panel - first) * WIDTH * WIDTH + in_block(i);
                        __m512 one = _mm512_load_ps(left), two = _mm512_load_ps(left + SIDE * SIDE);
                        if (bias) {
                            one += (__m512)load(bias + panel * WIDTH);
                            two += (__m512)load(bias + panel * WIDTH + SIDE);
                        }
                        Half* to = out + (block * WIDTH + i) * outputs + panel * WIDTH;
                        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(two, one));
                    }
            }
        }
    }
#endif
}

}  // extern "C"
