// What torch's stable ABI cannot express, so that this library serves one version of torch: the
// autograd kernels of every operator, which redispatch, and the operators of the heads. Their
// implementations register themselves: csrc/cpu, compiled once for each instruction set, checks every
// argument (csrc/checks.h). Fake implementations are in Python, beside the reference.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <vector>

namespace {

// Calls f on each tensor argument of a call, also those in lists; `written` says whether it is changed.
template <typename F>
void for_each_tensor(const c10::OperatorHandle& op, const torch::jit::Stack& stack, const F& f) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(stack, i, arguments.size());
    const auto* alias = arguments[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor()) f(value.toTensor(), written);
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) f(tensor, written);
  }
}

// As torch's own operators that write in place: what autograd has kept of the tensor is out of date.
void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  std::vector<at::Tensor> changed;
  for_each_tensor(op, *stack, [&](const at::Tensor& tensor, bool written) {
    if (written && tensor.defined() && !tensor.is_inference()) changed.push_back(tensor);
  });
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : changed) tensor.unsafeGetTensorImpl()->bump_version();
}

void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  if (c10::GradMode::is_enabled())
    for_each_tensor(op, *stack, [&](const at::Tensor& tensor, bool) {
      TORCH_CHECK(!tensor.defined() || !tensor.requires_grad(), op.schema().name(),
                  " has no gradient, and a tensor requires one: call it under torch.no_grad()");
    });
  const at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lgvit_fast, m) {
  // The heads' ops of lgvit_fast/ops, which say what they compute, with their arguments flattened.
  m.def(
      "lph_pool_cpp(Tensor tokens, int height, int width, int num_prefix_tokens, Tensor weight,"
      " Tensor bias, Tensor? scale, Tensor? shift, Tensor? depthwise_weight,"
      " Tensor? depthwise_bias) -> Tensor");
  m.def(
      "gah_pool_cpp(Tensor tokens, int height, int width, int num_prefix_tokens, Tensor qk_weight,"
      " int num_heads, int stride, bool average) -> Tensor");
  m.def(
      "exit_step_cpp(Tensor pooled, Tensor tokens, int num_class_tokens, Tensor weight,"
      " Tensor bias, int rule, float threshold, int patience, Tensor(a!) state)"
      " -> (Tensor logits, Tensor leave, Tensor valid)");

  // Name of the GEMM that linear layers [N, K] of a dtype run on: "linear", "conv" or "packed".
  m.def("linear_choice(int n, int k, ScalarType dtype) -> str");

  // A number that changes with the bytes of a contiguous tensor.
  m.def("checksum(Tensor tensor) -> int");
}

TORCH_LIBRARY_IMPL(lgvit_fast, ADInplaceOrView, m) {
  for (const char* name : {"compact_", "end_exit_", "exit_step_cpp"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&bump_versions>());
}

TORCH_LIBRARY_IMPL(lgvit_fast, Autograd, m) {
  for (const char* name :
       {"compact_", "end_exit_", "lph_tail", "lph_pool_cpp", "gah_pool_cpp", "exit_step_cpp"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
}
