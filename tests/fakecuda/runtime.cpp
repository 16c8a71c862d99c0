// A CUDA runtime without a device: control flow only. Kernels do nothing and everything asynchronous is done at once.
// Memory is host memory, counted against a limit; the rules of stream capture are enforced, breaches of them recorded.
#include "fakecuda.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

typedef std::map<Stream *, long> Clock;  // how much of every stream's captured work precedes a point

struct Capture {  // a graph, once it has ended
  int id, mode;
  Stream *origin;
  std::thread::id thread;
  bool invalid = false, destroyed = false;
  size_t nodes = 0;
  std::set<Stream *> streams;
  std::vector<const void *> memory;  // device addresses that its copies touch
};
struct Stream {
  int id;
  bool nonblocking, destroyed = false;
  Capture *capture = nullptr;
  Clock clock;
};
struct Event {
  bool recorded = false, destroyed = false;
  Capture *capture = nullptr;
  Clock clock;
};
struct Block {
  size_t bytes;
  int device, type;
};

static std::recursive_mutex mutex;
#define LOCKED std::lock_guard<std::recursive_mutex> lock(mutex)

static const int MAX_DEVICES = 16;
static Stream legacy{0, false};
static int last_stream = 0, last_capture = 0;
static std::set<Capture *> active;
static std::map<const char *, Block> blocks;
static std::map<const void *, const char *> kernel_names;
static char symbols[1 << 20];  // what cudaGetSymbolAddress points to

static thread_local cudaError_t last_error = cudaSuccess;
static thread_local int device = 0, thread_mode = cudaStreamCaptureModeGlobal;

// Settings.

static int devices() {
  static const char *text = getenv("FAKECUDA_DEVICES");
  return text ? std::min(atoi(text), MAX_DEVICES) : 1;
}
static const size_t limit = (size_t)8 << 30;  // bytes of each device
static int capability() {  // 90 for 9.0
  static const char *text = getenv("FAKECUDA_CC") ? getenv("FAKECUDA_CC") : "9.0";
  static const char *point = strchr(text, '.');
  static int n = 10 * atoi(text) + (point ? atoi(point + 1) : 0);
  return n;
}

// Records.

static struct Counts {
  long launches, graph_launches, h2d, d2h;
} counts;
static size_t bytes[MAX_DEVICES], peak[MAX_DEVICES];
static std::map<std::string, long> outside;  // launched outside while a capture is under way
static std::vector<std::string> violations, nccl;

static cudaError_t fail(cudaError_t error) { return last_error = error; }

static void violation(const std::string &what) {
  violations.push_back(what);
  fprintf(stderr, "[fakecuda] VIOLATION %s\n", what.c_str());
}

void record_nccl(const std::string &call) {
  LOCKED;
  if (nccl.size() < 100000) nccl.push_back(call);
}

extern "C" int fakecuda_stub(const char *name, int result) {
  if (!strncmp(name, "nccl", 4)) record_nccl(name);
  return result ? fail(result) : cudaSuccess;
}

static std::string quoted(const std::string &text) {  // as JSON; kernels' names readable
  int status;
  char *readable = abi::__cxa_demangle(text.c_str(), nullptr, nullptr, &status);
  std::string result = "\"";
  for (const char *c = readable ? readable : text.c_str(); *c; c++) {
    if (*c == '"' || *c == '\\') result += '\\';
    result += (unsigned char)*c < 32 ? ' ' : *c;
  }
  free(readable);
  return result + '"';
}

static std::string json(const std::vector<std::string> &texts) {
  std::string result;
  for (auto &text : texts) result += (result.empty() ? "" : ", ") + quoted(text);
  return "[" + result + "]";
}

static std::string json(const std::map<std::string, long> &numbers) {
  std::string result;
  for (auto &[name, n] : numbers) result += (result.empty() ? "" : ", ") + quoted(name) + ": " + std::to_string(n);
  return "{" + result + "}";
}

static std::string json(const size_t *numbers) {  // one per device
  std::string result;
  for (int i = 0; i < devices(); i++) result += (i ? ", " : "") + std::to_string(numbers[i]);
  return "[" + result + "]";
}

API const char *fakecuda_stats() {
  LOCKED;
  static std::string result;
  std::map<std::string, long> numbers = {{"launches", counts.launches},
                                         {"graph_launches", counts.graph_launches},
                                         {"h2d", counts.h2d},
                                         {"d2h", counts.d2h}};
  result = json(numbers);
  result.pop_back();
  result += ", \"bytes\": " + json(bytes) + ", \"peak\": " + json(peak) + ", \"violations\": " + json(violations) +
            ", \"outside\": " + json(outside) + ", \"nccl\": " + json(nccl) + "}";
  return result.c_str();
}

API void fakecuda_reset() {
  LOCKED;
  counts = {};
  violations.clear(), nccl.clear(), outside.clear();
  memcpy(peak, bytes, sizeof peak);
}

// What a capture forbids.

static Stream *resolve(Stream *stream, const char *call) {
  if ((size_t)stream <= 2) return &legacy;  // null, cudaStreamLegacy, cudaStreamPerThread
  if (stream->destroyed) violation(std::string(call) + " of a destroyed stream");
  return stream;
}

static cudaError_t invalidate(Capture *capture, cudaError_t error, const std::string &what) {
  capture->invalid = true;
  violation(what);
  return fail(error);
}

static cudaError_t check_unsafe(const char *call) {  // a call that may not be made while a capture is under way
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto capture : active) {
    bool own = capture->thread == std::this_thread::get_id(), global = capture->mode == cudaStreamCaptureModeGlobal;
    if (own ? capture->mode != cudaStreamCaptureModeRelaxed : global && thread_mode == cudaStreamCaptureModeGlobal)
      return invalidate(capture, cudaErrorStreamCaptureUnsupported, std::string("unsafe call in a capture: ") + call);
  }
  return cudaSuccess;
}
#define UNSAFE(call) \
  if (cudaError_t error = check_unsafe(call)) return error

void launch(Stream *handle, const char *kernel) {
  LOCKED;
  Stream *stream = resolve(handle, kernel);
  counts.launches++;
  if (stream->capture) {
    stream->capture->nodes++, stream->clock[stream]++;
  } else if (!active.empty()) {
    outside[kernel]++;
  }
}

// Devices.

API cudaError_t cudaGetDeviceCount(int *n) {
  return (*n = devices()) ? cudaSuccess : fail(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int *n) { return set(n, device); }
API cudaError_t cudaSetDevice(int n) {
  if (n < 0 || n >= devices()) return fail(cudaErrorInvalidDevice);
  device = n;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *n) { return set(n, fakecuda_cuda_version); }
API cudaError_t cudaRuntimeGetVersion(int *n) { return set(n, fakecuda_cuda_version); }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "fakecuda");
  p->totalGlobalMem = limit, p->major = capability() / 10, p->minor = capability() % 10;
  p->multiProcessorCount = 132, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64, p->maxThreadsPerMultiProcessor = 2048;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->l2CacheSize = 50 << 20, p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int) {
  // clang-format off
  static const std::map<int, int> values = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},           // threads of a block
      {5, 2147483647}, {6, 65535}, {7, 65535},            // blocks of a grid
      {8, 49152}, {81, 233472}, {97, 232448},             // shared memory
      {12, 65536},                                        // registers of a block
      {10, 32}, {16, 132}, {39, 2048},                    // warp, multiprocessors and their threads
      {75, capability() / 10}, {76, capability() % 10}};  // all by the numbers of cudaDevAttr...
  // clang-format on
  auto found = values.find(attribute);
  *value = found == values.end() ? 1 : found->second;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int n) {
  snprintf(text, size, "0000:%02x:00.0", n + 1);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *greatest = -5;
  return set(least, 0);
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return set(can, 0); }
API cudaError_t cudaDeviceSynchronize() {
  LOCKED;
  for (auto capture : active)
    return invalidate(capture, cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize in a capture");
  return cudaSuccess;
}

// Errors.

API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char *cudaGetErrorString(cudaError_t error) {
  static const std::map<int, const char *> texts = {
      {cudaSuccess, "no error"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorNoDevice, "no CUDA-capable device is detected"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
      {cudaErrorNotSupported, "operation not supported (by fakecuda)"},
      {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"}};
  auto found = texts.find(error);
  return found == texts.end() ? "another error, see the violations" : found->second;
}
API const char *cudaGetErrorName(cudaError_t error) {
  static thread_local char text[32];
  snprintf(text, 32, "cudaError%d", error);
  return text;
}

// Memory.

static const Block *find_block(const void *address) {
  auto next = blocks.upper_bound((const char *)address);
  if (next == blocks.begin()) return nullptr;
  auto &[start, block] = *--next;
  return (const char *)address < start + block.bytes ? &block : nullptr;
}
static bool on_device(const void *p) {
  const Block *block = find_block(p);
  return (block && block->type == cudaMemoryTypeDevice) || (p >= symbols && p < symbols + sizeof symbols);
}

static cudaError_t take(void **p, size_t size, int type, const char *call) {
  LOCKED;
  UNSAFE(call);
  bool counted = type == cudaMemoryTypeDevice;
  *p = nullptr;
  if (counted && bytes[device] + size > limit) return fail(cudaErrorMemoryAllocation);
  size = std::max<size_t>(size, 1);
  void *got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  blocks[(const char *)(*p = got)] = {size, device, type};
  if (counted) peak[device] = std::max(peak[device], bytes[device] += size);
  return cudaSuccess;
}
static cudaError_t give_back(void *p, const char *call) {
  LOCKED;
  UNSAFE(call);
  auto found = blocks.find((const char *)p);
  if (!p || found == blocks.end()) return p ? fail(cudaErrorInvalidValue) : cudaSuccess;
  if (found->second.type == cudaMemoryTypeDevice) bytes[found->second.device] -= found->second.bytes;
  munmap(p, found->second.bytes);
  blocks.erase(found);
  return cudaSuccess;
}
API cudaError_t cudaMalloc(void **p, size_t size) { return take(p, size, cudaMemoryTypeDevice, __func__); }
API cudaError_t cudaFree(void *p) { return p ? give_back(p, __func__) : cudaSuccess; }
API cudaError_t cudaMallocHost(void **p, size_t size) { return take(p, size, cudaMemoryTypeHost, __func__); }
API cudaError_t cudaHostAlloc(void **p, size_t size, unsigned) { return take(p, size, cudaMemoryTypeHost, __func__); }
API cudaError_t cudaFreeHost(void *p) { return give_back(p, __func__); }
API cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  LOCKED;
  *total = limit, *unused = limit - bytes[device];
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
  LOCKED;
  const Block *block = find_block(p);
  *a = {cudaMemoryTypeUnregistered, -1, nullptr, nullptr};
  if (!block) return cudaSuccess;
  a->type = block->type, a->device = block->device, a->devicePointer = (void *)p;
  if (block->type == cudaMemoryTypeHost) a->hostPointer = (void *)p;
  return cudaSuccess;
}

// A copy or a memset: whether it is to be done now; in a capture it becomes a node.
static bool touch(Stream *handle, const char *call, std::initializer_list<const void *> addresses, cudaError_t *error) {
  Stream *stream = resolve(handle, call);
  launch(handle, call);
  for (auto p : addresses)
    if (!on_device(p)) {
      violation(std::string(call) + " touches device memory that is not allocated");
      *error = fail(cudaErrorIllegalAddress);
      return false;
    }
  if (stream->capture) stream->capture->memory.insert(stream->capture->memory.end(), addresses);
  return !stream->capture;
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream *handle) {
  LOCKED;
  cudaError_t error = cudaSuccess;
  counts.h2d += kind == cudaMemcpyHostToDevice, counts.d2h += kind == cudaMemcpyDeviceToHost;
  bool now = kind == cudaMemcpyHostToDevice     ? touch(handle, "memcpyH2D", {to}, &error)
             : kind == cudaMemcpyDeviceToHost   ? touch(handle, "memcpyD2H", {from}, &error)
             : kind == cudaMemcpyDeviceToDevice ? touch(handle, "memcpyD2D", {to, from}, &error)
                                                : touch(handle, "memcpy", {}, &error);
  if (now)
    memmove(to, from, size);
  else if (!error && on_device(to) != on_device(from))  // legal, but the graph reads or writes this very host memory
    violation(std::string("captured copy ") + (on_device(to) ? "from" : "to") + " the host" +
              (find_block(to) && find_block(from) ? ", pinned" : ", pageable"));
  return error;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, int) {
  LOCKED;
  UNSAFE(__func__);
  memmove(to, from, size);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                  size_t height, int, Stream *handle) {
  LOCKED;
  cudaError_t error = cudaSuccess;
  if (touch(handle, "memcpy2D", {}, &error))
    for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
  return error;
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, Stream *stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
API cudaError_t cudaMemsetAsync(void *p, int value, size_t size, Stream *handle) {
  LOCKED;
  cudaError_t error = cudaSuccess;
  if (touch(handle, "memset", {p}, &error)) memset(p, value, size);
  return error;
}
API cudaError_t cudaMemset(void *p, int value, size_t size) {
  LOCKED;
  UNSAFE(__func__);
  memset(p, value, size);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, int) { return cudaSuccess; }
API cudaError_t cudaGetSymbolAddress(void **p, const void *) { return set(p, symbols); }

// Streams and events.

static cudaError_t make_stream(Stream **stream, unsigned flags) {
  LOCKED;
  *stream = new Stream{++last_stream, (flags & cudaStreamNonBlocking) != 0};
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(Stream **stream) { return make_stream(stream, 0); }
API cudaError_t cudaStreamCreateWithFlags(Stream **stream, unsigned flags) { return make_stream(stream, flags); }
API cudaError_t cudaStreamCreateWithPriority(Stream **stream, unsigned flags, int) {
  return make_stream(stream, flags);
}
API cudaError_t cudaStreamGetPriority(Stream *, int *priority) { return set(priority, 0); }
API cudaError_t cudaStreamDestroy(Stream *handle) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  stream->destroyed = stream != &legacy;
  return stream->capture
             ? invalidate(stream->capture, cudaErrorStreamCaptureUnsupported, "a capturing stream is destroyed")
             : cudaSuccess;
}
API cudaError_t cudaStreamQuery(Stream *handle) {
  LOCKED;
  if (auto capture = resolve(handle, __func__)->capture)
    return invalidate(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a capturing stream");
  UNSAFE(__func__);
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(Stream *handle) {
  LOCKED;
  auto capture = resolve(handle, __func__)->capture;
  return capture ? invalidate(capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a capturing stream")
                 : cudaSuccess;
}

static Capture *capture_of(Event *event, const char *call) {  // the one under way in which it was recorded
  if (event->destroyed) violation(std::string(call) + " of a destroyed event");
  return active.count(event->capture) ? event->capture : nullptr;
}
API cudaError_t cudaEventCreateWithFlags(Event **event, unsigned) { return set(event, new Event); }
API cudaError_t cudaEventCreate(Event **event) { return set(event, new Event); }
API cudaError_t cudaEventDestroy(Event *event) {
  LOCKED;
  event->destroyed = true;
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(Event *event, Stream *handle) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  capture_of(event, __func__);
  event->recorded = true, event->capture = stream->capture, event->clock = stream->clock;
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(Event *event, Stream *stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(Event *event) {
  LOCKED;
  if (auto capture = capture_of(event, __func__))
    return invalidate(capture, cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
  UNSAFE(__func__);
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(Event *event) {
  LOCKED;
  auto capture = capture_of(event, __func__);
  return capture ? invalidate(capture, cudaErrorCapturedEvent, "cudaEventSynchronize of a captured event")
                 : cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *milliseconds, Event *, Event *) { return set(milliseconds, 1); }
API cudaError_t cudaStreamWaitEvent(Stream *handle, Event *event, unsigned) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  Capture *capture = capture_of(event, __func__);
  if (!event->recorded) return cudaSuccess;
  if (stream->capture && !capture)
    return invalidate(stream->capture, cudaErrorStreamCaptureIsolation, "a capturing stream waits for uncaptured work");
  if (!capture) return cudaSuccess;
  if (stream == &legacy)
    return invalidate(capture, cudaErrorStreamCaptureImplicit, "the legacy stream waits for a captured event");
  if (stream->capture && stream->capture != capture)
    return invalidate(capture, cudaErrorStreamCaptureMerge, "one capture waits for another");
  if (!stream->capture) {
    stream->capture = capture, stream->clock.clear();
    capture->streams.insert(stream);
  }
  for (auto &[other, time] : event->clock) stream->clock[other] = std::max(stream->clock[other], time);
  return cudaSuccess;
}

// Captures and graphs.

static int status_of(const Stream *stream) {
  return !stream->capture           ? cudaStreamCaptureStatusNone
         : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(int *mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(Stream *handle, int mode) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  active.insert(stream->capture = new Capture{++last_capture, mode, stream, std::this_thread::get_id()});
  stream->capture->streams.insert(stream), stream->clock.clear();
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(Stream *handle, int *status) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  *status = status_of(stream);
  if (stream == &legacy)
    for (auto capture : active)
      if (!capture->origin->nonblocking) return fail(cudaErrorStreamCaptureImplicit);
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(Stream *handle, int *status, unsigned long long *id, Capture **graph,
                                         const void **dependencies, const void **edges, size_t *n) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  *status = status_of(stream);
  if (id) *id = stream->capture ? stream->capture->id : 0;
  if (graph) *graph = stream->capture;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(Stream *handle, Capture **graph) {
  LOCKED;
  Stream *stream = resolve(handle, __func__);
  Capture *capture = stream->capture;
  *graph = nullptr;
  if (!capture) return fail(cudaErrorIllegalState);
  if (stream != capture->origin)
    return invalidate(capture, cudaErrorStreamCaptureUnmatched, "a capture is ended on another stream");
  Clock seen = stream->clock;
  for (auto other : capture->streams) {
    if (other->clock[other] > seen[other] && !capture->invalid)
      invalidate(capture, cudaErrorStreamCaptureUnjoined,
                 "stream " + std::to_string(other->id) + " has captured work that the first stream never waits for");
    other->capture = nullptr, other->clock.clear();
  }
  active.erase(capture);
  if (capture->thread != std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed)
    return fail(cudaErrorStreamCaptureWrongThread);
  if (capture->invalid)
    return fail(last_error == cudaErrorStreamCaptureUnjoined ? last_error : cudaErrorStreamCaptureInvalidated);
  *graph = capture;
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(Capture *graph, void **, size_t *n) { return set(n, graph->nodes); }
API cudaError_t cudaGraphInstantiate(Capture **executable, Capture *graph, unsigned long long) {
  return set(executable, graph);
}
API cudaError_t cudaGraphInstantiateWithFlags(Capture **executable, Capture *graph, unsigned long long) {
  return set(executable, graph);
}
API cudaError_t cudaGraphExecDestroy(Capture *graph) {
  LOCKED;
  graph->destroyed = true;
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(Capture *graph, Stream *handle) {
  LOCKED;
  counts.graph_launches++;
  if (resolve(handle, __func__)->capture) violation("a graph is launched into a capture");
  if (graph->destroyed) violation("a destroyed graph is launched");
  for (auto p : graph->memory)
    if (!on_device(p)) {
      violation("a graph is launched whose memory is freed");
      break;
    }
  return cudaSuccess;
}

// Kernels, which the compiler registers by name and starts by way of a stack of configurations.

struct Configuration {
  dim3 grid, block;
  size_t shared;
  Stream *stream;
};
static thread_local std::vector<Configuration> configurations;

static cudaError_t launch_kernel(const void *function, Stream *stream) {
  LOCKED;
  auto found = kernel_names.find(function);
  launch(stream, found == kernel_names.end() ? "?" : found->second);
  return cudaSuccess;
}
API void **__cudaRegisterFatBinary(void *) {
  static void *handle[4];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, void *, void *, void *,
                                void *, int *) {
  LOCKED;
  kernel_names[function] = name;
}
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, Stream *stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, Stream **stream) {
  auto top = configurations.back();
  configurations.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *stream = top.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(const void **kernel, const void *function) { return set(kernel, function); }
API cudaError_t __cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, Stream *stream) {
  return launch_kernel(kernel, stream);
}
API cudaError_t cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, Stream *stream) {
  return launch_kernel(kernel, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3, dim3, void **, size_t, Stream *stream) {
  return launch_kernel(kernel, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **) {
  return launch_kernel(kernel, config->stream);
}
API cudaError_t cudaLaunchHostFunc(Stream *handle, void (*function)(void *), void *data) {
  launch(handle, "host function");
  if (!resolve(handle, __func__)->capture) function(data);
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  return set(a, {0, 0, 0, 1024, 32, capability(), capability(), 0, 49152});
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t) { return set(n, 2); }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int, size_t, unsigned) {
  return set(n, 2);
}

// The driver: what PyTorch asks for by name, and what its NVRTC library is linked with.

API int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *is_active) {
  if (flags) *flags = 0;
  if (is_active) *is_active = 1;
  return 0;
}
API int cuCtxGetCurrent(void **context) { return set(context, symbols); }
API int cuDeviceGet(int *handle, int n) { return set(handle, n); }
API int cuGetErrorString(int error, const char **text) { return set(text, cudaGetErrorString(error)); }
static int refuse(...) { return cudaErrorNotSupported; }
static int accept(...) { return cudaSuccess; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                                 int *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = strncmp(name, "cuMem", 5) ? (void *)accept : (void *)refuse;  // no virtual memory
  if (result) *result = 0;
  return cudaSuccess;
}
