// The attention of a packed row, divided among threads.

extern "C" {

// Computes the attention of a packed row of `count` records.
//
// query, out (L, QUERY_HEADS, SIZE); key, value (L, KEY_HEADS, SIZE); normalisers (L, QUERY_HEADS)
// shape: for each record, the prompt's tokens, the number of completions, and the tokens of each
void attend_row(
    const Number* query, const Number* key, const Number* value, const int64_t* shape, int64_t count, float scaling,
    int64_t window, Number* out, float* normalisers) {
    auto attend = attend_segment;
#if TILED
    if (tiles_allowed()) attend = attend_tiled;
#endif
    std::vector<Segment> segments;
    for (const auto& record : read(shape, count)) segments.insert(segments.end(), record.begin(), record.end());
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < segments.size() * KEY_HEADS; i++)
        attend(segments[i / KEY_HEADS], i % KEY_HEADS, query, key, value, scaling, window, out, normalisers);
}

// Computes the gradients of query, key and value from that of `out`.
void attend_row_back(
    const Number* query, const Number* key, const Number* value, const Number* out, const Number* d_out,
    const float* normalisers, const int64_t* shape, int64_t count, float scaling, int64_t window, Number* d_query,
    Number* d_key, Number* d_value) {
    const auto records = read(shape, count);
    const auto through = [&](const auto& way) {
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < records.size() * KEY_HEADS; i++) way.record(records[i / KEY_HEADS], i % KEY_HEADS);
    };
#if TILED
    if (tiles_allowed())
        return through(TiledBackward{
            query, key, value, out, d_out, normalisers, scaling, window, d_query, d_key, d_value});
#endif
    through(Backward{query, key, value, out, d_out, normalisers, scaling, window, d_query, d_key, d_value});
}

}  // extern "C"
