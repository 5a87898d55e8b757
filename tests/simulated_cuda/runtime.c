/* A CUDA runtime without a GPU: the memory of a device is that of the host, streams and events do nothing, and kernels
   are refused. What torch calls and is not here goes to NVIDIA's runtime, which answers with an error. */
#include <driver_types.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NOTHING(name) int name(void) { return 0; }
#define A_KERNEL 98 /* cudaErrorInvalidDeviceFunction */

static __thread int current, error;

static int devices(void) { const char *number = getenv("SIMULATED_CUDA_DEVICES"); return number ? atoi(number) : 1; }

int cudaGetDeviceCount(int *number) { *number = devices(); return 0; }
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
  current = device;
  return 0;
}
int cudaDriverGetVersion(int *version) { *version = 99000; return 0; } /* newer than any runtime */
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
int cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 0; return 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 8ull << 30; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "Simulated CUDA device");
  found->totalGlobalMem = 8ull << 30;
  found->major = 9;
  found->warpSize = 32;
  found->multiProcessorCount = 1;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

int cudaMalloc(void **place, size_t size) { return posix_memalign(place, 512, size ? size : 512) ? 2 : 0; }
int cudaHostAlloc(void **place, size_t size, unsigned flags) { return cudaMalloc(place, size); }
int cudaFree(void *place) { free(place); return 0; }
int cudaFreeHost(void *place) { free(place); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memmove(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) {
  return cudaMemcpy(to, from, size, 0);
}
int cudaMemsetAsync(void *place, int value, size_t size, void *stream) { memset(place, value, size); return 0; }
/* Not pinned. */
int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
  memset(found, 0, sizeof *found);
  return 0;
}

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = malloc(1); return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreateWithFlags(struct timespec **event, unsigned flags) { *event = calloc(1, sizeof **event); return 0; }
int cudaEventCreate(struct timespec **event) { return cudaEventCreateWithFlags(event, 0); }
int cudaEventDestroy(void *event) { free(event); return 0; }
int cudaEventRecord(struct timespec *event, void *stream) { clock_gettime(CLOCK_MONOTONIC, event); return 0; }
int cudaEventRecordWithFlags(struct timespec *event, void *stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
int cudaEventElapsedTime(float *milliseconds, struct timespec *from, struct timespec *to) {
  *milliseconds = (to->tv_sec - from->tv_sec) * 1e3 + (to->tv_nsec - from->tv_nsec) / 1e6;
  return 0;
}
NOTHING(cudaEventQuery)
NOTHING(cudaEventSynchronize)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaThreadExchangeStreamCaptureMode)

int cudaLaunchKernel(const void *function, ...) { return error = A_KERNEL; }
int cudaLaunchKernelExC(const void *configuration, ...) { return error = A_KERNEL; }
int cudaPeekAtLastError(void) { return error; }
int cudaGetLastError(void) { int last = error; error = 0; return last; }
const char *cudaGetErrorName(int code) { return "error of the simulated device"; }
const char *cudaGetErrorString(int code) {
  return code == A_KERNEL ? "a kernel was launched on the simulated device" : "no such thing on the simulated device";
}
