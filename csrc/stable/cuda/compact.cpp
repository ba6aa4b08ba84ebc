// compact_ for CUDA tensors: turns tensors into rows of bytes and launches on the current stream.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../compact.h"
#include "compact_kernel.h"
#include "launch.h"

namespace {

using torch::stable::Tensor;

void compact_(const std::vector<Tensor>& tensors, const Tensor& keep, const Tensor& count) {
  lgvit::check_compact(tensors, keep, count);
  lgvit::check_on_gpu("keep", keep);
  lgvit::check_count_reachable(count, keep);
  const lgvit::Launch launch_on(keep);

  lgvit::CompactArgs args{};
  args.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
  args.keep_stride = keep.stride(0);
  args.batch = int(keep.size(0));
  args.count = count.mutable_data_ptr<int64_t>();
  auto launch = [&] {
    STD_CUDA_CHECK(lgvit::launch_compact(args, launch_on.multiprocessors, launch_on.stream));
    args.num_tensors = 0;
  };
  for (const Tensor& tensor : tensors) {
    if (args.num_tensors == lgvit::kMaxTensors) launch();
    const lgvit::Rows rows = lgvit::as_rows(tensor);
    if (rows.units) args.tensors[args.num_tensors++] = rows;
  }
  launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CUDA, m) { m.impl("compact_", TORCH_BOX(&compact_)); }
