// runtime/kernels.cu for the processor: the same source, its threads run one after another.

#include <cstddef>
#include <utility>

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

#include "kernels.cu"

template <typename... Parameters, std::size_t... places>
static void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<places...>)
{
    kernel(*static_cast<Parameters*>(arguments[places])...);
}

// As cuLaunchKernel: `arguments` holds the address of each argument. The threads run last to first, since a GPU promises
// no order.
template <typename... Parameters>
static void launch(void (*kernel)(Parameters...), Index grid, unsigned threads, void** arguments)
{
    blockDim = {threads, 1};
    for (blockIdx.y = grid.y; blockIdx.y-- > 0;)
        for (blockIdx.x = grid.x; blockIdx.x-- > 0;)
            for (threadIdx.x = threads; threadIdx.x-- > 0;)
                call(kernel, arguments, std::index_sequence_for<Parameters...>());
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
