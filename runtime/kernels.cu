// What runtime/noise.py and runtime/onnx_device.py do in numpy around the engines, bit for bit, on a GPU: counted noise,
// the slots that hold states, and the classifier's labels.
//
// Plain C++ without headers: NVRTC compiles it when a device opens, g++ when the tests compare it with numpy. Every
// rounding is IEEE's, in one order: compile with --fmad=false (g++: -ffp-contract=off) and without fast math. A thread
// owns one element and shares nothing, so that neither order nor grid can reach a result; in argmax a warp does.
//
// A slot holds a state: mean and std [size], with size = channels * height * width, and a byte that says whether it is
// finite. In every kernel but argmax, x counts the elements of an image and y the items of the batch.

typedef unsigned long long Word;

constexpr int WARP = 32;  // threads that run in step
constexpr unsigned ALL_LANES = 0xFFFFFFFF;
constexpr int NOT_FINITE = -1;       // runtime/device.py
constexpr float PIXEL_LEVELS = 255;  // a pixel is k / 255
constexpr float UNIT_GRID = 4096;    // vote noise is k / 4096

struct Key {
    Word low, high;
};

// An open image [size], the law of its smoothing noise, and the chain's scale. Python packs it as "<4Q2if4x".
struct Image {
    const unsigned char* pixels;
    const Word* thresholds;
    Key key;
    int count, lowest;
    float scale;
    int pad;
};
static_assert(sizeof(Image) == 48, "Python packs an image as <4Q2if4x");

// One item of a batch: the int64 columns of runtime/device.py. A target of -1 is padding: its source is there to be
// read, and nothing is written.
struct Item {
    long long image, sample, vote, step, source, target;
};
static_assert(sizeof(Item) == 48, "Python packs an item as six int64");

struct Words {
    Word at[4];
};

// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3. The multipliers and the Weyl
// increments of the key are those of Random123's philox.h, as in numpy.random.Philox.
__device__ Words philox4x64_10(Words counter, Key key)
{
    for (int round = 0; round < 10; ++round) {
        const Words c = counter;
        const Word high0 = __umul64hi(0xD2E7470EE14C6C93, c.at[0]), low0 = 0xD2E7470EE14C6C93 * c.at[0];
        const Word high1 = __umul64hi(0xCA5A826395121157, c.at[2]), low1 = 0xCA5A826395121157 * c.at[2];
        counter = {{high1 ^ c.at[1] ^ key.low, low1, high0 ^ c.at[3] ^ key.high, low0}};
        key.low += 0x9E3779B97F4A7C15;
        key.high += 0xBB67AE8584CAA73B;
    }
    return counter;
}

// The word of one pixel in one draw. numpy increments the counter before it generates, so the first block is 1. Four
// threads compute the same block; in return their searches, which wait for memory, run side by side.
__device__ Word random_word(Key key, Word sample, Word vote, Word step, Word pixel)
{
    const Words counter = {{1 + pixel / 4, step, vote, sample}};
    return philox4x64_10(counter, key).at[pixel % 4];
}

// numpy.searchsorted(thresholds, word, side="right") + lowest
__device__ int rounded_normal(const Word* thresholds, int count, int lowest, Word word)
{
    int reached = 0, end = count;
    while (reached < end) {
        const int middle = reached + (end - reached) / 2;
        if (thresholds[middle] <= word)
            reached = middle + 1;
        else
            end = middle;
    }
    return lowest + reached;
}

__device__ float first_state(int level, float scale)
{
    return ((float)level * 2 / PIXEL_LEVELS - 1) * scale;
}

__device__ bool is_finite(float x)
{
    return x - x == 0;  // Inf - Inf and NaN - NaN are NaN
}

__device__ int this_thread()
{
    return blockIdx.x * blockDim.x + threadIdx.x;
}

// Where an element lies in an array [rows, size]: many slots of large images pass 2^31.
__device__ long long place(long long row, int size, int element)
{
    return row * size + element;
}

// Noise copy `sample` of `image` into slot `target`.
extern "C" __global__ void smooth(const Item* items, const Image* images, float* mean_slots, float* std_slots,
                                  unsigned char* finite_slots, int size)
{
    const int e = this_thread();
    const Item item = items[blockIdx.y];
    if (e >= size || item.target < 0) return;

    const Image image = images[item.image];
    const Word word = random_word(image.key, item.sample, 0, 0, e);
    const int level = image.pixels[e] + rounded_normal(image.thresholds, image.count, image.lowest, word);
    mean_slots[place(item.target, size, e)] = first_state(level, image.scale);
    std_slots[place(item.target, size, e)] = 0;
    if (e == 0) finite_slots[item.target] = 1;
}

// The states and the noise that a step engine takes, [batch, size] each. At step 0, and in padding, nothing is drawn.
extern "C" __global__ void gather(const Item* items, const Image* images, const float* mean_slots,
                                  const float* std_slots, const Word* vote_thresholds, int vote_count, int vote_lowest,
                                  float* mean, float* std, float* noise, int size)
{
    const int e = this_thread();
    const Item item = items[blockIdx.y];
    if (e >= size) return;

    const long long from = place(item.source, size, e), to = place(blockIdx.y, size, e);
    mean[to] = mean_slots[from];
    std[to] = std_slots[from];
    noise[to] = 0;
    if (item.step > 0 && item.target >= 0) {
        const Word word = random_word(images[item.image].key, item.sample, item.vote, item.step, e);
        noise[to] = (float)rounded_normal(vote_thresholds, vote_count, vote_lowest, word) / UNIT_GRID;
    }
}

// What a step engine gave, into the target slots. An item may write its own source and none writes another's: the
// reverse loop sees to that.
extern "C" __global__ void scatter(const Item* items, const float* mean_next, const float* std_next,
                                   const float* finite, float* mean_slots, float* std_slots,
                                   unsigned char* finite_slots, int size)
{
    const int e = this_thread();
    const Item item = items[blockIdx.y];
    if (e >= size || item.target < 0) return;

    const long long from = place(blockIdx.y, size, e), to = place(item.target, size, e);
    mean_slots[to] = mean_next[from];
    std_slots[to] = std_next[from];
    if (e == 0) finite_slots[item.target] = finite_slots[item.source] && finite[blockIdx.y] > 0;  // NaN is not
}

// The means that a classifier takes, [batch, size].
extern "C" __global__ void gather_means(const Item* items, const float* mean_slots, float* mean, int size)
{
    const int e = this_thread();
    if (e < size) mean[place(blockIdx.y, size, e)] = mean_slots[place(items[blockIdx.y].source, size, e)];
}

// The first of the largest logits [batch, classes]; or NOT_FINITE, if a logit or the state is not. A warp an item, so that
// blocks are whole warps: its lanes take the classes in turns, each from the first class on, and then agree in pairs.
extern "C" __global__ void argmax(const Item* items, const float* logits, const unsigned char* finite_slots,
                                  int* labels, int classes, int batch)
{
    const int i = this_thread() / WARP, lane = this_thread() % WARP;
    if (i >= batch) return;  // all lanes at once

    const float* row = logits + place(i, classes, 0);
    float most = row[0];
    int best = 0, finite = finite_slots[items[i].source];
    for (int c = lane; c < classes; c += WARP) {
        finite = finite && is_finite(row[c]);
        if (row[c] > most) {
            most = row[c];
            best = c;
        }
    }
    for (int away = WARP / 2; away > 0; away /= 2) {
        const float other_most = __shfl_down_sync(ALL_LANES, most, away);
        const int other = __shfl_down_sync(ALL_LANES, best, away);
        if (other_most > most || (other_most == most && other < best)) {
            most = other_most;
            best = other;
        }
    }
    finite = __all_sync(ALL_LANES, finite);
    if (lane == 0) labels[i] = finite ? best : NOT_FINITE;
}
