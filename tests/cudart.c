/* As much of the CUDA runtime as engine.blocks calls, over memory of the host: blocks are files without a name, and a
   handle is the way to one through the process that made it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
  char reserved[64];
} Handle;

enum { DONE = 0, INVALID = 1, NO_MEMORY = 2, NOT_MAPPED = 206, MOST = 64 };

static struct {
  void* pointer;
  size_t size;
  int fd;
} blocks[MOST];
static int last;

static int fail(int code) { return last = code; }

static int find(void* pointer) {
  int i = 0;
  while (i < MOST && blocks[i].pointer != pointer) ++i;
  return i;
}

static int map(void** pointer, int fd, size_t size) {
  int i = find(NULL);
  if (i == MOST || size % (2 << 20)) return fail(NO_MEMORY);
  *pointer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (*pointer == MAP_FAILED) return fail(NO_MEMORY);
  blocks[i].pointer = *pointer, blocks[i].size = size, blocks[i].fd = fd;
  return DONE;
}

static int unmap(void* pointer) {
  int i = find(pointer);
  if (!pointer || i == MOST) return fail(INVALID);
  blocks[i].pointer = NULL;
  close(blocks[i].fd);
  return munmap(pointer, blocks[i].size);
}

int cudaMalloc(void** pointer, size_t size) {
  int fd = memfd_create("block", 0);
  return ftruncate(fd, size) ? fail(NO_MEMORY) : map(pointer, fd, size);
}

int cudaFree(void* pointer) { return unmap(pointer); }

int cudaIpcGetMemHandle(Handle* handle, void* pointer) {
  int i = find(pointer);
  if (i == MOST) return fail(INVALID);
  snprintf(handle->reserved, sizeof handle->reserved, "/proc/%d/fd/%d", getpid(), blocks[i].fd);
  return DONE;
}

int cudaIpcOpenMemHandle(void** pointer, Handle handle, unsigned flags) {
  struct stat found;
  int fd = flags == 1 ? open(handle.reserved, O_RDWR) : -1;
  return fd < 0 || fstat(fd, &found) ? fail(NOT_MAPPED) : map(pointer, fd, found.st_size);
}

int cudaIpcCloseMemHandle(void* pointer) { return unmap(pointer); }

int cudaGetLastError(void) {
  int was = last;
  last = DONE;
  return was;
}

int cudaPeekAtLastError(void) { return last; }
