// The transpose of a matrix of bfloat16, for products that read it faster so.

extern "C" {

// Returns whether `transpose_matrix` is worth its time: with matrix units, torch multiplies a transposed copy faster.
int64_t transposes() {
#if TILES
    return tiles_allowed();
#else
    return 0;
#endif
}

// x (rows, columns), out (columns, rows)
void transpose_matrix(const Number* x, Number* out, int64_t rows, int64_t columns) {
#if TILES
    const __m512i even = _mm512_set_epi16(
        62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6,
        4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    const auto first = [](int64_t count) { return __mmask32(count >= 32 ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1); };
#pragma omp parallel for if (rows * columns > FEW)
    for (int64_t c = 0; c < columns; c += DEPTH)
        for (int64_t r = 0; r < rows; r += DEPTH) {
            __m512i x0[16], x1[16];  // 16 rows each, of 32 columns
            for (int i = 0; i < 16; i++) {
                const auto part = [&](int64_t row) {
                    return _mm512_maskz_loadu_epi16(first(row < rows ? columns - c : 0), x + row * columns + c);
                };
                x0[i] = part(r + i);
                x1[i] = part(r + 16 + i);
            }
            transpose(x0);
            transpose(x1);
            const __mmask32 there = first(rows - r);
            for (int64_t i = 0; i < 16; i++) {  // pair i of 16 rows, twice
                Number* to = out + (c + 2 * i) * rows + r;
                if (c + 2 * i < columns)
                    _mm512_mask_storeu_epi16(to, there, _mm512_permutex2var_epi16(x0[i], even, x1[i]));
                if (c + 2 * i + 1 < columns)
                    _mm512_mask_storeu_epi16(to + rows, there, _mm512_permutex2var_epi16(x0[i], odd, x1[i]));
            }
        }
#else
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) out[c * rows + r] = x[r * columns + c];
#endif
}

}  // extern "C"
