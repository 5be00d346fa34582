/* What DeepSpeed's op for disks needs of libaio, over the kernel's own calls (io_setup(2), io_submit(2), io_getevents(2)): a stand-in for
   machines that lack it. */
#pragma once
#include <linux/aio_abi.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef aio_context_t io_context_t;

/* Each returns what the kernel does, or minus the number of the error. */
int io_queue_init(int depth, io_context_t *context);
int io_queue_release(io_context_t context);
int io_submit(io_context_t context, long count, struct iocb **requests);
/* Without a mask alone. */
int io_pgetevents(io_context_t context, long least, long most, struct io_event *events, struct timespec *timeout, sigset_t *mask);

static inline void prepare(struct iocb *request, int opcode, int file, void *buffer, size_t bytes, long long offset) {
    memset(request, 0, sizeof *request);
    request->aio_lio_opcode = (__u16)opcode;
    request->aio_fildes = (__u32)file;
    request->aio_buf = (__u64)buffer;
    request->aio_nbytes = bytes;
    request->aio_offset = offset;
}

static inline void io_prep_pread(struct iocb *request, int file, void *buffer, size_t bytes, long long offset) {
    prepare(request, IOCB_CMD_PREAD, file, buffer, bytes, offset);
}

static inline void io_prep_pwrite(struct iocb *request, int file, void *buffer, size_t bytes, long long offset) {
    prepare(request, IOCB_CMD_PWRITE, file, buffer, bytes, offset);
}

#ifdef __cplusplus
}
#endif
