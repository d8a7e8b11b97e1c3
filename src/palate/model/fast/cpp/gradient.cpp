// Gradients of weights with matrix units, for bfloat16.
//
// The gradient of a map's weight is D^T X, for gradients D (tokens, outputs) and arguments X (tokens, inputs). Both
// are first copied into panels: 32 columns of all tokens, as the tiles that a unit multiplies. A library that does
// the same for one factor leaves the other transposed, and uses one thread where weights are small. Maps of the same
// arguments are computed together, as one with all their outputs.

#if TILES
#include <omp.h>

namespace {

constexpr int64_t WIDTH = 2 * SIDE;   // columns of a panel
constexpr int64_t STEP = 2 * TILE;    // numbers of a panel for 32 tokens
constexpr int64_t NEAR = 7;           // steps whose tiles stay in the nearest cache
constexpr int64_t MOST_GROUPED = 64;  // panels of the factor with more columns that are in memory at a time

// A map of which the gradient is wanted: D (tokens, outputs), and the gradient (outputs, inputs).
struct Part {
    const Half* d_out;
    Half* out;
    int64_t outputs;
};

// The first number of a panel's columns in a matrix, and the matrix's columns.
struct Columns { const Half* start; int64_t step; };

// Columns of one or several matrices, as panels.
struct Panels {
    std::vector<Columns> columns;
    int64_t tokens, steps;
    Half* to;

    int64_t count() const { return columns.size(); }

    void add(const Half* matrix, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH) columns.push_back({matrix + i, size});
    }

    // Copies 32 tokens of the panels [first, end); the first is written to the beginning. The columns become the
    // rows of a factor if `turned`, and otherwise its columns.
    void copy(int64_t step, int64_t first, int64_t end, bool turned) const {
        for (int64_t panel = first; panel < end; panel++) {
            Half* tiles = to + ((panel - first) * steps + step) * STEP;
            const auto [start, size] = columns[panel];
            const Half* rows = start + step * DEPTH * size;
            const auto row = [&, size = size](int64_t i) {
                return step * DEPTH + i < tokens ? _mm512_loadu_si512(rows + i * size) : _mm512_setzero_si512();
            };
            turned ? turn(row, tiles) : interleave(row, tiles);
        }
    }

    const Half* at(int64_t panel, int64_t step) const { return to + (panel * steps + step) * STEP; }

  private:
    template <typename F>
    static void turn(F row, Half* tiles) {
        const __m512i even = _mm512_set_epi16(
            62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10,
            8, 6, 4, 2, 0);
        const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
        __m512i first[16], second[16];  // 16 tokens each
        for (int i = 0; i < 16; i++) {
            first[i] = row(i);
            second[i] = row(16 + i);
        }
        transpose(first);
        transpose(second);
        for (int i = 0; i < 16; i++) {  // a number of 32 bits has those of two columns
            _mm512_store_si512(tiles + 2 * i * DEPTH, _mm512_permutex2var_epi16(first[i], even, second[i]));
            _mm512_store_si512(tiles + (2 * i + 1) * DEPTH, _mm512_permutex2var_epi16(first[i], odd, second[i]));
        }
    }
    template <typename F>
    static void interleave(F row, Half* tiles) {
        const __m512i low = interleaving(0), high = interleaving(16);
        for (int i = 0; i < 16; i++) {
            const __m512i a = row(2 * i), b = row(2 * i + 1);
            _mm512_store_si512(tiles + i * DEPTH, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(tiles + TILE + i * DEPTH, _mm512_permutex2var_epi16(a, high, b));
        }
    }
};

// Computes the product of two panels of some steps, 2 x 2 tiles one after another in `c`; adds it unless `first`.
inline void multiply_panels(const Half* a, const Half* b, int64_t steps, float* c, bool first) {
    constexpr int64_t NUMBERS = SIDE * SIDE, BYTES = 4 * SIDE;
    asm volatile("" ::: "memory");  // loads of tiles do not say what they read
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, BYTES);
        _tile_loadd(1, c + NUMBERS, BYTES);
        _tile_loadd(2, c + 2 * NUMBERS, BYTES);
        _tile_loadd(3, c + 3 * NUMBERS, BYTES);
    }
    for (int64_t s = 0; s < steps; s++, a += STEP, b += STEP) {
        _tile_loadd(4, a, 2 * DEPTH);
        _tile_loadd(6, b, 2 * DEPTH);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE, 2 * DEPTH);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE, 2 * DEPTH);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, BYTES);
    _tile_stored(1, c + NUMBERS, BYTES);
    _tile_stored(2, c + 2 * NUMBERS, BYTES);
    _tile_stored(3, c + 3 * NUMBERS, BYTES);
    asm volatile("" ::: "memory");
}

// Returns the place of a row in such a product; its second half is one tile further.
inline int64_t in_block(int64_t row) { return (row / SIDE * 2 * SIDE + row % SIDE) * SIDE; }

// Writes such a product as 32 x 32 numbers, with `step` numbers from row to row, past the caches: their lines would
// have to be read first, and panels stay in them.
inline void write_block(const float* c, Half* out, int64_t step) {
    for (int64_t i = 0; i < WIDTH; i++) {
        const float* left = c + in_block(i);
        const __m512i row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(left + SIDE * SIDE), _mm512_load_ps(left));
        _mm512_stream_si512((__m512i*)(out + i * step), row);
    }
}

// Gradients of weights, whose panels are divided among threads.
struct WeightGradients {
    const Panels &more, &fewer;      // the factors with more and fewer columns
    bool swapped;                    // the outputs are fewer than the inputs
    const std::vector<Half*>& rows;  // 32 rows of a gradient for each panel of outputs
    int64_t inputs;
    float* memory;  // for the sums of a thread: `fewer` x 32 x 32 numbers each

    // Computes the blocks of one panel of `more`, the n-th in memory.
    void compute(int64_t first, int64_t n, float* sums) const {
        for (int64_t step = 0; step < more.steps; step += NEAR) {
            const int64_t count = std::min(NEAR, more.steps - step);
            for (int64_t i = 0; i < fewer.count(); i++) {
                const Half *own = more.at(n, step), *other = fewer.at(i, step);
                float* c = sums + i * WIDTH * WIDTH;
                multiply_panels(swapped ? other : own, swapped ? own : other, count, c, step == 0);
                if (step + count == more.steps) {
                    const int64_t output = swapped ? i : first + n, input = swapped ? first + n : i;
                    write_block(c, rows[output] + input * WIDTH, inputs);
                }
            }
        }
    }

    void run() const {
        const int64_t panels = more.count(), steps = more.steps;
#pragma omp parallel
        {
            const Tiles used;
            float* sums = memory + omp_get_thread_num() * fewer.count() * WIDTH * WIDTH;
#pragma omp for schedule(static) nowait
            for (int64_t step = 0; step < steps; step++) fewer.copy(step, 0, fewer.count(), swapped);
            for (int64_t first = 0; first < panels; first += MOST_GROUPED) {
                const int64_t count = std::min(MOST_GROUPED, panels - first);
#pragma omp for schedule(static)
                for (int64_t step = 0; step < steps; step++) more.copy(step, first, first + count, !swapped);
#pragma omp for schedule(static)
                for (int64_t n = 0; n < count; n++) compute(first, n, sums);
                _mm_sfence();
            }
        }
    }
};

}  // namespace
#endif

extern "C" {

// Returns whether `weight_gradients` and the functions of few.cpp can be used.
int64_t has_tiles() {
#if TILES
    return tiles_allowed();
#else
    return 0;
#endif
}

// Computes d_out^T x for maps of the same arguments, with outputs and inputs that are multiples of 32.
//
// parts: `count` times a `Part`; x (tokens, inputs)
void weight_gradients(const int64_t* parts, int64_t count, const Number* x, int64_t tokens, int64_t inputs) {
#if TILES
    const int64_t steps = padded(tokens, DEPTH) / DEPTH, numbers = steps * STEP;
    Panels slopes{{}, tokens, steps, nullptr}, arguments{{}, tokens, steps, nullptr};
    std::vector<Half*> rows;
    for (const Part* part = (const Part*)parts; part < (const Part*)parts + count; part++) {
        slopes.add(part->d_out, part->outputs);
        for (int64_t i = 0; i < part->outputs; i += WIDTH) rows.push_back(part->out + i * inputs);
    }
    arguments.add(x, inputs);
    const bool swapped = slopes.count() < arguments.count();
    Panels &more = swapped ? arguments : slopes, &fewer = swapped ? slopes : arguments;
    const int64_t together = std::min(more.count(), MOST_GROUPED);
    const int64_t sums = omp_get_max_threads() * fewer.count() * WIDTH * WIDTH;
    Memory memory((fewer.count() + together) * numbers / 2 + sums);
    more.to = memory.take_halves(together * numbers);
    fewer.to = memory.take_halves(fewer.count() * numbers);
    WeightGradients{more, fewer, swapped, rows, inputs, memory.take(sums)}.run();
#endif
}

}  // extern "C"
