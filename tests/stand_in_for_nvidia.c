/* What jaxrl/rollout/nccl.py, cuda.py and vLLM's pynccl call of libnccl and of CUDA's driver, for processes of one host and
 * without a GPU: numbers in their memory travel over sockets, or through a file that both map.
 *
 * Rank 0 keeps the rules of a non-blocking communicator: its calls return ncclInProgress, a thread does the work, and a
 * call before the one ahead of it has settled is refused. The other ranks block, as those of vLLM do. A rank that is gone
 * shows as an asynchronous error, and leaves the stream busy until the communicator is aborted.
 *
 * STAND_IN_FAULT "die 3 FILE" or "stall 3 FILE": a rank other than 0 removes FILE and does so at the third broadcast for
 * which it is there (0: as it joins). STAND_IN_VERSION: what ncclGetVersion says.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { NOT_READY = 600, MOST_RANKS = 16, ALL_REDUCE = 0, BROADCAST = 1 };

typedef struct { char internal[128]; } Id;
typedef struct { char reserved[64]; } Handle;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;
typedef struct { atomic_int busy; } Stream;
typedef struct {
  int rank, num, listener, peers[MOST_RANKS];
  atomic_int state, is_aborted;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int has_work, kind;
  char *data;
  size_t bytes;
  Stream *stream;
} Comm;

static const size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1};
static void maybe_fail(int joins) {
  static int seen;
  char what[16], file[4096];
  int when;
  const char *fault = getenv("STAND_IN_FAULT");
  if (!fault || sscanf(fault, "%15s %d %4095s", what, &when, file) != 3 || access(file, F_OK)) return;
  if (joins ? when : ++seen != when) return;
  unlink(file);
  if (!strcmp(what, "die")) _exit(9);
  for (;;) pause();
}

static int move(int fd, char *data, size_t bytes, int out) {
  while (bytes) {
    ssize_t n = out ? send(fd, data, bytes, MSG_NOSIGNAL) : recv(fd, data, bytes, 0);
    if (n <= 0) return REMOTE_ERROR;
    data += n, bytes -= n;
  }
  return SUCCESS;
}

/* Rank 0 */

static int accept_all(Comm *c) {
  for (int i = 1; i < c->num; i++) {
    struct pollfd ready = {c->listener, POLLIN, 0};
    while (poll(&ready, 1, 10) == 0)
      if (c->is_aborted) return SYSTEM_ERROR;
    int fd = accept(c->listener, NULL, NULL), rank, on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (move(fd, (char *)&rank, sizeof rank, 0) || rank < 1 || rank >= c->num || c->peers[rank]) return REMOTE_ERROR;
    c->peers[rank] = fd;
  }
  for (int i = 1; i < c->num; i++)
    if (move(c->peers[i], "!", 1, 1)) return REMOTE_ERROR;
  return SUCCESS;
}

static int carry_out(Comm *c) {
  float *sum = (float *)c->data;
  for (int i = 1; c->kind == ALL_REDUCE && i < c->num; i++) {
    float theirs;
    if (move(c->peers[i], (char *)&theirs, sizeof theirs, 0)) return REMOTE_ERROR;
    *sum += theirs;
  }
  for (int i = 1; i < c->num; i++)
    if (move(c->peers[i], c->data, c->bytes, 1)) return REMOTE_ERROR;
  return SUCCESS;
}

static void *work(void *given) {
  Comm *c = given;
  c->state = accept_all(c);
  while (!c->is_aborted && c->state == SUCCESS) {
    pthread_mutex_lock(&c->lock);
    while (!c->has_work && !c->is_aborted) pthread_cond_wait(&c->changed, &c->lock);
    c->has_work = 0;
    pthread_mutex_unlock(&c->lock);
    if (c->is_aborted) break;
    usleep(1000);
    c->state = SUCCESS; /* settled: from here on the stream alone tells */
    int result = carry_out(c);
    if (result) c->state = result;
    else c->stream->busy = 0;
  }
  return NULL;
}

static int begin(Comm *c, int kind, void *data, size_t bytes, Stream *stream) {
  if (c->state != SUCCESS) return c->state == IN_PROGRESS ? INVALID_USAGE : c->state;
  if (stream->busy) return INVALID_USAGE; /* more than real ones ask for: here is no queue */
  pthread_mutex_lock(&c->lock);
  c->kind = kind, c->data = data, c->bytes = bytes, c->stream = stream, c->has_work = 1;
  stream->busy = 1;
  c->state = IN_PROGRESS;
  pthread_cond_signal(&c->changed);
  pthread_mutex_unlock(&c->lock);
  return IN_PROGRESS;
}

int ncclGetUniqueId(Id *id) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t size = sizeof at;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (bind(fd, (void *)&at, size) || listen(fd, MOST_RANKS) || getsockname(fd, (void *)&at, &size)) return SYSTEM_ERROR;
  memset(id, 0, sizeof *id);
  id->internal[0] = -1; /* not all ids are text */
  snprintf(id->internal + 1, 100, "%d %d", fd, ntohs(at.sin_port));
  return SUCCESS;
}

int ncclCommInitRankConfig(Comm **comm, int num, Id id, int rank, Config *config) {
  if (config->magic != 0xcafebeef || config->size != sizeof *config || config->blocking || rank) return INVALID_ARGUMENT;
  Comm *c = *comm = calloc(1, sizeof **comm);
  c->num = num, c->state = IN_PROGRESS;
  sscanf(id.internal + 1, "%d", &c->listener);
  pthread_mutex_init(&c->lock, NULL), pthread_cond_init(&c->changed, NULL);
  pthread_create(&c->thread, NULL, work, c);
  return IN_PROGRESS;
}

int ncclCommGetAsyncError(Comm *c, int *state) { return *state = c->state, SUCCESS; }

int ncclCommAbort(Comm *c) {
  pthread_mutex_lock(&c->lock);
  c->is_aborted = 1;
  pthread_cond_signal(&c->changed);
  pthread_mutex_unlock(&c->lock);
  for (int i = 0; i < MOST_RANKS; i++)
    if (c->peers[i]) shutdown(c->peers[i], SHUT_RDWR);
  if (c->rank == 0) pthread_join(c->thread, NULL), close(c->listener);
  for (int i = 0; i < MOST_RANKS; i++)
    if (c->peers[i]) close(c->peers[i]);
  free(c);
  return SUCCESS;
}

/* The others; peers[0] is rank 0. */

int ncclCommInitRank(Comm **comm, int num, Id id, int rank) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), port;
  char go;
  maybe_fail(1);
  sscanf(id.internal + 1, "%*d %d", &port);
  at.sin_port = htons(port);
  if (rank == 0 || connect(fd, (void *)&at, sizeof at) || move(fd, (char *)&rank, sizeof rank, 1)) return SYSTEM_ERROR;
  if (move(fd, &go, 1, 0)) return REMOTE_ERROR;
  Comm *c = *comm = calloc(1, sizeof **comm);
  c->rank = rank, c->num = num, c->peers[0] = fd;
  pthread_mutex_init(&c->lock, NULL), pthread_cond_init(&c->changed, NULL);
  return SUCCESS;
}

int ncclAllReduce(void *in, void *out, size_t count, int dtype, int op, Comm *c, Stream *stream) {
  if (count != 1 || SIZES[dtype] != 4 || op) return INVALID_ARGUMENT; /* all that is asked for */
  if (c->rank == 0) return begin(c, ALL_REDUCE, out, 4, stream);
  if (move(c->peers[0], in, 4, 1)) return REMOTE_ERROR;
  return move(c->peers[0], out, 4, 0);
}

int ncclBroadcast(void *in, void *out, size_t count, int dtype, int root, Comm *c, Stream *stream) {
  if (root) return INVALID_ARGUMENT;
  if (c->rank == 0) return begin(c, BROADCAST, in, count * SIZES[dtype], stream);
  maybe_fail(0);
  return move(c->peers[0], out, count * SIZES[dtype], 0);
}

int ncclGetVersion(int *version) {
  const char *named = getenv("STAND_IN_VERSION");
  return *version = named ? atoi(named) : 23000, SUCCESS;
}

const char *ncclGetErrorString(int result) {
  return result == REMOTE_ERROR ? "remote process exited or there was a network error" : "an error";
}

/* What vLLM looks up and never calls here. */
#define UNUSED(name) int name(void) { return INVALID_USAGE; }
UNUSED(ncclReduce) UNUSED(ncclAllGather) UNUSED(ncclReduceScatter) UNUSED(ncclSend) UNUSED(ncclRecv)
UNUSED(ncclCommDestroy) UNUSED(ncclCommSuspend) UNUSED(ncclCommResume) UNUSED(ncclGroupStart) UNUSED(ncclGroupEnd)
UNUSED(ncclCommWindowRegister) UNUSED(ncclCommWindowDeregister)

/* CUDA's driver, of which there is one device. */

static __thread void *current;

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &current, device; }
int cuCtxSetCurrent(void *context) { return current = context, 0; }
int cuStreamCreate(Stream **stream, unsigned flags) {
  return *stream = calloc(1, sizeof **stream), current && flags == 1 ? 0 : 201;
}
int cuStreamQuery(Stream *stream) { return stream->busy ? NOT_READY : 0; }
int cuStreamDestroy_v2(Stream *stream) { return free(stream), 0; }
int cuStreamSynchronize(Stream *stream) { return stream ? 201 : 0; }

/* Memory that two processes share is a file; a handle is its name. */

static struct { char name[64]; void *at; size_t size; } shared[64];

static void *map(const char *name, size_t *size) {
  int fd = open(name, O_RDWR | O_CREAT, 0600);
  if (*size ? ftruncate(fd, *size) : (*size = lseek(fd, 0, SEEK_END)) == 0) return MAP_FAILED;
  void *at = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return at;
}

int cuMemAlloc_v2(void **address, size_t size) {
  static int num;
  int i = num++ % 64;
  snprintf(shared[i].name, 64, P_tmpdir "/jaxrl-stand-in-%d-%d", getpid(), num);
  *address = shared[i].at = map(shared[i].name, &size);
  shared[i].size = size;
  return current && *address != MAP_FAILED ? 0 : 2;
}

int cuMemFree_v2(void *address) {
  for (int i = 0; i < 64; i++)
    if (shared[i].at == address) return shared[i].at = NULL, munmap(address, shared[i].size), unlink(shared[i].name);
  return 1;
}

int cuIpcGetMemHandle(Handle *handle, void *address) {
  for (int i = 0; i < 64; i++)
    if (shared[i].at == address) return memcpy(handle, shared[i].name, 64), 0;
  return 1;
}

int cuIpcOpenMemHandle_v2(void **address, Handle handle, unsigned flags) {
  size_t size = 0;
  *address = map(handle.reserved, &size);
  return flags == 1 && *address != MAP_FAILED ? 0 : 1;
}

int cuMemcpyDtoD_v2(void *to, const void *from, size_t size) { return memcpy(to, from, size), 0; }
