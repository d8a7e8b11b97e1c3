// Packed rows: prompts see themselves, completions their prompt and themselves.

namespace {

// Tokens of the row, and the record that they belong to.
struct Segment { int64_t start, size, prompt, prompt_size; };

// Reads records: the prompt's tokens, the number of completions, and the tokens of each.
std::vector<std::vector<Segment>> read(const int64_t* shape, int64_t count) {
    std::vector<std::vector<Segment>> records(count);
    int64_t start = 0;
    for (auto& segments : records) {
        const int64_t prompt = start, size = *shape++, completions = *shape++;
        segments.push_back({start, size, start, 0});
        start += size;
        for (int64_t i = 0; i < completions; i++) {
            segments.push_back({start, *shape, prompt, size});
            start += *shape++;
        }
    }
    return records;
}

// The keys that a token sees: [from, prompt_size) of the prompt, [own_from, own_end) of its segment.
struct Seen {
    int64_t from, own_from, own_end;
    Seen(const Segment& segment, int64_t token, int64_t window) {
        const int64_t first = window ? std::max<int64_t>(0, segment.prompt_size + token + 1 - window) : 0;
        from = std::min(first, segment.prompt_size);
        own_from = std::max<int64_t>(0, first - segment.prompt_size);
        own_end = token + 1;
    }
};

// Memory of a thread, from which a task takes its parts. Each begins at a line of the cache.
struct Memory {
    explicit Memory(std::nullptr_t) {}  // counts what is taken
    explicit Memory(int64_t size) {
        thread_local std::vector<float> all;
        if (int64_t(all.size()) < size + LINE) {
            std::vector<float>().swap(all);  // freed first
            all.resize(size + LINE);
        }
        start = all.data() + (-reinterpret_cast<uintptr_t>(all.data()) % (4 * LINE)) / 4;
    }
    float* take(int64_t size) {
        const int64_t place = std::exchange(taken, taken + (size + LINE - 1) / LINE * LINE);
        return start ? start + place : nullptr;
    }
    uint16_t* take_halves(int64_t size) { return reinterpret_cast<uint16_t*>(take((size + 1) / 2)); }

    int64_t taken = 0;

  private:
    static constexpr int64_t LINE = 16;  // numbers in a line of the cache
    float* start = nullptr;
};

}  // namespace
