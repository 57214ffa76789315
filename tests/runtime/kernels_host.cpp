// runtime/kernels.cu for the processor: the same source, its threads run one after another.
//
// What lanes of a warp tell each other is found by running the warp again and again. Whoever comes to an exchange that is
// not known yet leaves its value there and is stopped; once all lanes have, the exchange is known, and they start again.
// So a kernel must write nothing before its last exchange.

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#define __global__
#define __device__ static

struct Index {
    unsigned x, y;
};

static Index blockIdx, blockDim, threadIdx;

static unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

constexpr unsigned LANES = 32;
union Told {
    float real;
    int integer;
};
struct Stopped {};

static std::vector<std::vector<Told>> exchanges;  // of the warp that runs, [exchange][lane]
static std::size_t known, reached;                // exchanges that all lanes have made; those that this lane has

static const std::vector<Told>& exchange(Told own)
{
    if (reached < known) return exchanges[reached++];
    exchanges.resize(known + 1, std::vector<Told>(LANES));
    exchanges[known][threadIdx.x % LANES] = own;
    throw Stopped();
}

// What lane + away gives; beyond the last lane, one's own.
static const Told& from_below(Told own, unsigned away)
{
    const unsigned lane = threadIdx.x % LANES;
    return exchange(own)[lane + away < LANES ? lane + away : lane];
}

static float __shfl_down_sync(unsigned, float own, unsigned away)
{
    Told told;
    told.real = own;
    return from_below(told, away).real;
}

static int __shfl_down_sync(unsigned, int own, unsigned away)
{
    Told told;
    told.integer = own;
    return from_below(told, away).integer;
}

static int __all_sync(unsigned, int own)
{
    Told told;
    told.integer = own;
    for (const Told& each : exchange(told))
        if (!each.integer) return 0;
    return 1;
}

#include "kernels.cu"

template <typename... Parameters, std::size_t... places>
static void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<places...>)
{
    kernel(*static_cast<Parameters*>(arguments[places])...);
}

// The lanes of the warp that ends before thread `end`.
template <typename... Parameters>
static void run_warp(void (*kernel)(Parameters...), unsigned end, void** arguments)
{
    const unsigned begin = (end - 1) / LANES * LANES;
    exchanges.clear();
    known = 0;
    for (unsigned stopped = 1; stopped > 0; ++known) {
        stopped = 0;
        for (threadIdx.x = end; threadIdx.x-- > begin;) {
            reached = 0;
            try {
                call(kernel, arguments, std::index_sequence_for<Parameters...>());
            } catch (const Stopped&) {
                ++stopped;
            }
        }
        if (stopped % LANES != 0) {
            std::fputs("some lanes of a warp wait for others that do not come\n", stderr);
            std::abort();
        }
    }
}

// As cuLaunchKernel: `arguments` holds the address of each argument. The threads run last to first, since a GPU promises
// no order.
template <typename... Parameters>
static void launch(void (*kernel)(Parameters...), Index grid, unsigned threads, void** arguments)
{
    blockDim = {threads, 1};
    for (blockIdx.y = grid.y; blockIdx.y-- > 0;)
        for (blockIdx.x = grid.x; blockIdx.x-- > 0;)
            for (unsigned end = threads; end > 0; end = (end - 1) / LANES * LANES)
                run_warp(kernel, end, arguments);
}

#define EXPORT(kernel) \
    extern "C" void launch_##kernel(unsigned x, unsigned y, unsigned threads, void** arguments) \
    { \
        launch(kernel, {x, y}, threads, arguments); \
    }
EXPORT(smooth)
EXPORT(gather)
EXPORT(scatter)
EXPORT(gather_means)
EXPORT(argmax)

extern "C" Word random_word_of(Word low, Word high, Word sample, Word vote, Word step, Word pixel)
{
    return random_word({low, high}, sample, vote, step, pixel);
}

extern "C" std::size_t size_of_image()
{
    return sizeof(Image);
}

extern "C" std::size_t size_of_item()
{
    return sizeof(Item);
}
