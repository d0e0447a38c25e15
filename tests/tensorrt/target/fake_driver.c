/* FakeDriver: a libcuda.so.1 whose GPU is the host's memory, for tests on machines without a GPU.

   Environment: FAKE_CUDA_INIT (what cuInit gives), FAKE_CUDA_DEVICES, FAKE_CUDA_FREE (bytes of free memory). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { void *to; const void *from; size_t size; } Copy;
typedef struct { int capturing, count; Copy copies[64]; } Stream;
typedef struct { double ms; } Event;

static void *current;
static int context, foreign, references;
static int live;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}
static size_t free_memory(void) { return setting("FAKE_CUDA_FREE", 1L << 30); }

int fakeLive(void) { return live; }
int fakeReferences(void) { return references; }
void fakeForeignContext(int on) { current = on ? &foreign : 0; }

int cuInit(unsigned flags) { return setting("FAKE_CUDA_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = 12020; return 0; }
int cuDeviceGetCount(int *count) { *count = setting("FAKE_CUDA_DEVICES", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "FakeDriver T4", length); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 16L << 30; return 0; }
int cuDeviceGetPCIBusId(char *text, int length, int device) { strncpy(text, "0000:00:04.0", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 7 : attribute == 76 ? 5 : 0;
    return 0;
}
int cuGetErrorName(int status, const char **name) {
    *name = status == 100 ? "CUDA_ERROR_NO_DEVICE" : status == 1 ? "CUDA_ERROR_INVALID_VALUE" : 0;
    return *name ? 0 : 1;
}

int cuCtxGetCurrent(void **handle) { *handle = current; return 0; }
int cuCtxSetCurrent(void *handle) { current = handle; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return current ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }
int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { return 0; }
int cuDevicePrimaryCtxRetain(void **handle, int device) { *handle = &context; references++; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { references--; return 0; }
int cuMemGetInfo_v2(size_t *available, size_t *total) { *available = free_memory(); *total = 16L << 30; return 0; }

static int take(void **address, size_t size) {
    if (size > free_memory()) return 2;
    *address = calloc(size, 1);
    live++;
    return 0;
}
static int give(void *address) { free(address); live--; return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t size) { return take((void **)address, size); }
int cuMemFree_v2(uint64_t address) { return give((void *)address); }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { return take(address, size); }
int cuMemFreeHost(void *address) { return give(address); }

int cuStreamCreate(void **stream, unsigned flags) { return take(stream, sizeof(Stream)); }
int cuStreamDestroy_v2(void *stream) { return give(stream); }
int cuStreamSynchronize(void *stream) { return 0; }
static int copy(void *to, const void *from, size_t size, Stream *stream) {
    if (!stream->capturing) memcpy(to, from, size);
    else stream->copies[stream->count++] = (Copy){to, from, size};
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
    return copy((void *)to, from, size, stream);
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    return copy(to, (void *)from, size, stream);
}

int cuEventCreate(void **event, unsigned flags) { return take(event, sizeof(Event)); }
int cuEventDestroy_v2(void *event) { return give(event); }
int cuEventSynchronize(void *event) { return 0; }
int cuEventRecord(void *event, void *stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    ((Event *)event)->ms = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    return 0;
}
int cuEventElapsedTime(float *ms, void *begin, void *end) {
    *ms = (float)(((Event *)end)->ms - ((Event *)begin)->ms);
    return 0;
}

int cuStreamBeginCapture_v2(Stream *stream, int mode) { stream->capturing = 1; stream->count = 0; return 0; }
int cuStreamEndCapture(Stream *stream, void **graph) {
    int status = take(graph, sizeof(Stream));
    stream->capturing = 0;
    if (!status) memcpy(*graph, stream, sizeof(Stream));
    return status;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
    int status = take(executable, sizeof(Stream));
    if (!status) memcpy(*executable, graph, sizeof(Stream));
    return status;
}
int cuGraphDestroy(void *graph) { return give(graph); }
int cuGraphExecDestroy(void *executable) { return give(executable); }
int cuGraphLaunch(Stream *executable, Stream *stream) {
    for (int i = 0; i < executable->count; i++)
        copy(executable->copies[i].to, executable->copies[i].from, executable->copies[i].size, stream);
    return 0;
}
