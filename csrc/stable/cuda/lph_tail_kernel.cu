// All that a local perception head does after its GEMM, in one launch: bias, gelu, affine, depthwise 3x3
// and gelu (the light head: bias and gelu), and the means of that and of the tokens.
//
// A thread owns two neighbouring channels of an image and walks down the grid, a strip of columns wide.
// It loads the strip's row, makes u of it, and adds it to the outputs above, at and below; a value and its
// neighbours to the left and right are in registers then, so that no u is made or loaded twice. A warp's
// lanes hold 64 neighbouring channels. Small batches cut an image into runs of rows, one for each warp of
// a block, which make the u of the rows at a cut twice; their sums meet in shared memory, in fixed order.
#include <cuda_fp16.h>

#include <algorithm>

#include "lph_tail_kernel.h"

namespace lgvit {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 4;   // of a block
constexpr int kBlocks = 3;     // of so many warps, of a multiprocessor: 168 registers a thread
constexpr int kWholeRow = 14;  // columns of a strip that is the grid's whole row: ViT at 224 pixels
constexpr int kStrip = 8;      // of any other
constexpr int kTokensInFlight = 8;

struct Two {  // of two channels
  float a = 0.0f, b = 0.0f;
};

__device__ __forceinline__ Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
__device__ __forceinline__ Two fma(Two x, Two y, Two z) { return {fmaf(x.a, y.a, z.a), fmaf(x.b, y.b, z.b)}; }

// How two channels lie in memory, and what Phi, the normal distribution, is to the precision of the type.

struct Float32 {
  using Element = uint32_t;
  using Unit = uint2;
  static __device__ __forceinline__ Unit pack(Element a, Element b) { return {a, b}; }
  static __device__ __forceinline__ Two unpack(Unit unit) { return {__uint_as_float(unit.x), __uint_as_float(unit.y)}; }
  static __device__ __forceinline__ float phi(float x) { return fmaf(0.5f, erff(x * 0.70710678f), 0.5f); }
};

struct Half {
  using Element = uint16_t;
  using Unit = uint32_t;
  static __device__ __forceinline__ Unit pack(Element a, Element b) { return a | uint32_t(b) << 16; }

  // An odd polynomial, clamped where it leaves [0, 1] for good, at |x| > 3.8: x phi(x) is within 1.7e-4 of
  // the exact gelu. kernels/common.py has the same one.
  static __device__ __forceinline__ float phi(float x) {
    const float t = x * x;
    float q = fmaf(2.483462857583163e-08f, t, -1.700766460999148e-06f);
    q = fmaf(q, t, 4.992575850337744e-05f);
    q = fmaf(q, t, -0.0008325065718963742f);
    q = fmaf(q, t, 0.008858961053192616f);
    q = fmaf(q, t, -0.06475630402565002f);
    q = fmaf(q, t, 0.3980095386505127f);
    return __saturatef(fmaf(x, q, 0.5f));
  }
};

struct Bfloat16 : Half {
  static __device__ __forceinline__ Two unpack(Unit unit) {
    return {__uint_as_float(unit << 16), __uint_as_float(unit & 0xffff0000u)};
  }
};

struct Float16 : Half {
  static __device__ __forceinline__ Two unpack(Unit unit) {
    return {__half2float(__ushort_as_half(uint16_t(unit))), __half2float(__ushort_as_half(uint16_t(unit >> 16)))};
  }
};

template <typename Type>
__device__ __forceinline__ Two phi(Two x) {
  return {Type::phi(x.a), Type::phi(x.b)};
}

struct Sums {
  Two hidden, token;
};

// A thread's two channels; `both`: the second exists.
struct Channels {
  int first;
  bool both;
};

// Reads the two channels of tokens. kPaired: both are there, at one aligned address.
template <typename Type, bool kPaired>
struct Reader {
  using Element = typename Type::Element;
  using Unit = typename Type::Unit;
  const Element* data;
  int64_t token;
  bool both;

  __device__ __forceinline__ Reader(const Map& map, int64_t image, Channels channels)
      : data(static_cast<const Element*>(map.data) + image * map.image + channels.first),
        token(map.token),
        both(channels.both) {}

  // A row of tokens from the one at `place` on; none where inside(i) is false. One address is stepped
  // from token to token: offsets kept for each would take registers.
  template <int kFirst, int kLast, typename Inside, typename F>
  __device__ __forceinline__ void row(int64_t place, const Inside& inside, const F& take) const {
    const Element* at = data + (place + kFirst) * token;
#pragma unroll
    for (int i = kFirst; i < kLast; ++i, at += token)
      if (inside(i)) take(i, load(at));
  }

  __device__ __forceinline__ Unit load(const Element* at) const {
    if constexpr (kPaired) return *reinterpret_cast<const Unit*>(at);
    return Type::pack(at[0], both ? at[1] : Element(0));
  }
};

__device__ __forceinline__ Two load(const float* vector, Channels channels, int stride = 1, int at = 0) {
  const float* first = vector + int64_t(channels.first) * stride + at;
  return {first[0], channels.both ? first[stride] : 0.0f};
}

// The full head on one strip: kColumns columns from `x0` on, rows y0 to y1. Unless kWhole, columns beyond
// the strip or the grid may lie to both sides.
template <typename Type, int kColumns, bool kWhole, bool kPaired>
struct Strip {
  static constexpr int kHalo = kWhole ? 0 : 1;

  const LphTailArgs& args;
  const Reader<Type, kPaired> hidden, tokens;
  const int x0, y0, y1;
  Two taps[9], bias, scale, shift, depthwise_bias;
  Two above[kColumns], here[kColumns];  // outputs of the row above the one at hand, and of that one
  Sums sums;

  __device__ __forceinline__ Strip(const LphTailArgs& args, int64_t image, Channels channels, int x0, int y0, int y1)
      : args(args), hidden(args.hidden, image, channels), tokens(args.tokens, image, channels), x0(x0), y0(y0), y1(y1) {
#pragma unroll
    for (int i = 0; i < 9; ++i) taps[i] = load(args.taps, channels, 9, i);
    bias = load(args.bias, channels);
    scale = load(args.scale, channels);
    shift = load(args.shift, channels);
    depthwise_bias = load(args.depthwise_bias, channels);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) above[i] = here[i] = depthwise_bias;
  }

  __device__ __forceinline__ bool inside(int i) const { return kWhole || (x0 + i >= 0 && x0 + i < args.width); }

  __device__ __forceinline__ void finish(Two output) {
    sums.hidden = fma(output, phi<Type>(output), sums.hidden);
  }

  // Row y adds to three rows of outputs. kFinish: that completes the one above, and it counts.
  template <bool kFinish>
  __device__ __forceinline__ void row(int y) {
    const int64_t place = int64_t(y) * args.width + x0;
    const auto in_grid = [&](int i) { return inside(i); };
    typename Type::Unit unit[kColumns + 2 * kHalo] = {};
    hidden.template row<-kHalo, kColumns + kHalo>(place, in_grid, [&](int i, auto read) { unit[i + kHalo] = read; });
    if (y >= y0 && y < y1)
      tokens.template row<0, kColumns>(
          place, in_grid, [&](int, auto read) { sums.token = sums.token + Type::unpack(read); });

    auto u = [&](int i) -> Two {
      if (i < -kHalo || i >= kColumns + kHalo || !inside(i)) return {};
      const Two z = Type::unpack(unit[i + kHalo]) + bias;
      const Two p = phi<Type>(z);
      return fma(Two{z.a * p.a, z.b * p.b}, scale, shift);
    };
    Two left = u(-1), middle = u(0);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const Two right = u(i + 1);
      const Two done = fma(left, taps[6], fma(middle, taps[7], fma(right, taps[8], above[i])));
      above[i] = fma(left, taps[3], fma(middle, taps[4], fma(right, taps[5], here[i])));
      here[i] = fma(left, taps[0], fma(middle, taps[1], fma(right, taps[2], depthwise_bias)));
      if (kFinish && inside(i)) finish(done);
      left = middle;
      middle = right;
    }
  }

  __device__ __forceinline__ Sums run() {
    for (int y = max(y0 - 1, 0); y <= y0; ++y) row<false>(y);
    for (int y = y0 + 1; y <= min(y1, args.height - 1); ++y) row<true>(y);
    if (y1 == args.height)
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (inside(i)) finish(above[i]);
    return sums;
  }
};

// Of a block's warps: adds up their sums and writes the means.
__device__ void write_means(const LphTailArgs& args, int64_t image, Channels channels, bool exists, Sums sums) {
  __shared__ Sums part[kMaxWarps][kLanes];
  if (blockDim.y > 1) {
    part[threadIdx.y][threadIdx.x] = sums;
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (unsigned warp = 1; warp < blockDim.y; ++warp) {
      const Sums& other = part[warp][threadIdx.x];
      sums = {sums.hidden + other.hidden, sums.token + other.token};
    }
  }
  if (!exists) return;
  const float share = 1.0f / (float(args.height) * float(args.width));
  float* pooled = args.pooled + image * 2 * args.channels + channels.first;
  pooled[0] = sums.hidden.a * share;
  pooled[args.channels] = sums.token.a * share;
  if (channels.both) {
    pooled[1] = sums.hidden.b * share;
    pooled[args.channels + 1] = sums.token.b * share;
  }
}

// A block owns one image by 64 channels. Lanes beyond the last channel do its work again and write nothing.
template <typename F>
__device__ __forceinline__ void for_block(const LphTailArgs& args, bool paired, const F& sums_of) {
  const unsigned tiles = (args.channels + 2 * kLanes - 1) / (2 * kLanes);
  const int64_t image = blockIdx.x / tiles;
  const int own = 2 * (blockIdx.x % tiles * kLanes + threadIdx.x);
  const int first = min(own, args.channels - (paired ? 2 : 1));
  const Channels channels{first, first + 1 < args.channels};
  write_means(args, image, channels, own < args.channels, sums_of(image, channels));
}

template <typename Type, int kColumns, bool kWhole, bool kPaired>
__global__ void __launch_bounds__(kMaxWarps* kLanes, kBlocks) full_kernel(const __grid_constant__ LphTailArgs args, int rows) {
  for_block(args, kPaired, [&](int64_t image, Channels channels) {
    const int strips = (args.width + kColumns - 1) / kColumns;
    const int runs = (args.height + rows - 1) / rows;
    Sums sums;
    for (int i = threadIdx.y; i < strips * runs; i += blockDim.y) {
      const int x0 = i % strips * kColumns, y0 = i / strips * rows;
      const Sums part =
          Strip<Type, kColumns, kWhole, kPaired>(args, image, channels, x0, y0, min(y0 + rows, args.height)).run();
      sums = {sums.hidden + part.hidden, sums.token + part.token};
    }
    return sums;
  });
}

template <typename Type, bool kPaired>
__global__ void __launch_bounds__(kMaxWarps* kLanes, kBlocks) light_kernel(const __grid_constant__ LphTailArgs args) {
  for_block(args, kPaired, [&](int64_t image, Channels channels) {
    const Reader<Type, kPaired> hidden(args.hidden, image, channels), tokens(args.tokens, image, channels);
    const Two bias = load(args.bias, channels);
    const int count = args.height * args.width, step = blockDim.y * kTokensInFlight;
    Sums sums;
    for (int start = threadIdx.y * kTokensInFlight; start < count; start += step) {
      typename Type::Unit unit[kTokensInFlight] = {};
      const auto exists = [&](int i) { return start + i < count; };
      hidden.template row<0, kTokensInFlight>(start, exists, [&](int i, auto read) { unit[i] = read; });
      tokens.template row<0, kTokensInFlight>(
          start, exists, [&](int, auto read) { sums.token = sums.token + Type::unpack(read); });
#pragma unroll
      for (int i = 0; i < kTokensInFlight; ++i) {
        const Two z = Type::unpack(unit[i]) + bias;
        if (exists(i)) sums.hidden = fma(z, phi<Type>(z), sums.hidden);
      }
    }
    return sums;
  });
}

// Whether the two channels of a thread may be read at once, everywhere.
template <typename Type>
bool paired(const LphTailArgs& args) {
  const uint64_t elements =
      uint64_t(args.channels) | args.hidden.image | args.hidden.token | args.tokens.image | args.tokens.token;
  const uint64_t address = reinterpret_cast<uint64_t>(args.hidden.data) | reinterpret_cast<uint64_t>(args.tokens.data);
  return elements % 2 == 0 && address % sizeof(typename Type::Unit) == 0;
}

template <typename Type>
cudaError_t launch(const LphTailArgs& args, int num_multiprocessors, cudaStream_t stream) {
  const int64_t tiles = (args.channels + 2 * kLanes - 1) / (2 * kLanes);
  const bool both = paired<Type>(args);
  // Warps of a block: enough to fill the GPU, but no more, as each makes the rows beside its own again.
  const int64_t resident = int64_t(num_multiprocessors) * kBlocks * kMaxWarps;
  const int64_t wanted = std::min<int64_t>((resident - 1) / (args.batch * tiles) + 1, kMaxWarps);
  const unsigned blocks = unsigned(args.batch * tiles);
  if (args.scale == nullptr) {
    const int64_t most = (int64_t(args.height) * args.width + kTokensInFlight - 1) / kTokensInFlight;
    const dim3 block(kLanes, unsigned(std::min(wanted, most)));
    const auto kernel = both ? light_kernel<Type, true> : light_kernel<Type, false>;
    kernel<<<blocks, block, 0, stream>>>(args);
  } else {
    const bool whole = both && args.width == kWholeRow;
    const int strips = whole ? 1 : (args.width + kStrip - 1) / kStrip;
    const int runs = int(std::min<int64_t>((wanted + strips - 1) / strips, args.height));
    const int rows = (args.height + runs - 1) / runs;
    const int64_t most = int64_t(strips) * ((args.height + rows - 1) / rows);
    const dim3 block(kLanes, unsigned(std::min(wanted, most)));
    const auto kernel = whole  ? full_kernel<Type, kWholeRow, true, true>
                        : both ? full_kernel<Type, kStrip, false, true>
                               : full_kernel<Type, kStrip, false, false>;
    kernel<<<blocks, block, 0, stream>>>(args, rows);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_lph_tail(const LphTailArgs& args, int num_multiprocessors, cudaStream_t stream) {
  switch (args.type) {
    case Scalar::bfloat16: return launch<Bfloat16>(args, num_multiprocessors, stream);
    case Scalar::float16: return launch<Float16>(args, num_multiprocessors, stream);
    default: return launch<Float32>(args, num_multiprocessors, stream);
  }
}

}  // namespace lgvit
