// Included before csrc/cuda/register.cpp: what it asks torch of a GPU is answered by torch_host.cpp, tensors on the CPU
// pass for those of a device, and the operators get a name of their own.
#pragma once

#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_get_current_cuda_stream cuda_host_current_stream
#define aoti_torch_create_device_guard cuda_host_create_device_guard
#define aoti_torch_delete_device_guard cuda_host_delete_device_guard

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define cem_fast_cuda cem_fast_cuda_host
#define CUDA CPU
