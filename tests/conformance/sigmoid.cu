// The largest error of FlashInfer's sigmoid_accurate (RoutingKernel.cuh) over every float32 in
// [-30, 30], against float64. With FlashInfer's flags, and without fast arithmetic:
//
//   nvcc -O3 -use_fast_math -gencode=arch=compute_90a,code=sm_90a tests/conformance/sigmoid.cu -o s && ./s
//   nvcc -O3 -gencode=arch=compute_90a,code=sm_90a tests/conformance/sigmoid.cu -o s && ./s
#include <cmath>
#include <cstdint>
#include <cstdio>

__device__ float sigmoid_accurate(float x) { return 0.5f * tanhf(0.5f * x) + 0.5f; }

__global__ void search(double* errors, float* places) {
  double worst = 0.0;
  float place = 0.0f;
  uint32_t const thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint64_t bits = thread; bits < (1ull << 32); bits += gridDim.x * blockDim.x) {
    float const x = __uint_as_float(static_cast<uint32_t>(bits));
    if (!(x >= -30.0f && x <= 30.0f)) continue;
    double const exact = 1.0 / (1.0 + exp(-static_cast<double>(x)));
    double const error = fabs(static_cast<double>(sigmoid_accurate(x)) - exact);
    if (error > worst) {
      worst = error;
      place = x;
    }
  }
  errors[thread] = worst;
  places[thread] = place;
}

int main() {
  int const blocks = 2112, threads = 256, count = blocks * threads;
  double* errors;
  float* places;
  cudaMallocManaged(&errors, count * sizeof(double));
  cudaMallocManaged(&places, count * sizeof(float));
  search<<<blocks, threads>>>(errors, places);
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;
  int worst = 0;
  for (int i = 0; i < count; ++i) {
    if (errors[i] > errors[worst]) worst = i;
  }
  std::printf("%.3g, at %.9g\n", errors[worst], places[worst]);
  return 0;
}
