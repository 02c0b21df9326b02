// Kernels that were put off, one after the other.

namespace {

struct Launch {
    int (*kernel)(const void *);
    const void *arguments;
};

} // namespace

// Returns 0, or what the first kernel returns that returns something else; `done` is how many were
// called before it.
extern "C" int launches(const Launch *all, long count, long *done) {
    for (*done = 0; *done < count; ++*done)
        if (const int wrong = all[*done].kernel(all[*done].arguments)) return wrong;
    return 0;
}
