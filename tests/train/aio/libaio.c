#define _GNU_SOURCE
#include "libaio.h"
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

static int told(long result) { return result < 0 ? -errno : (int)result; }

int io_queue_init(int depth, io_context_t *context) {
    *context = 0;
    return told(syscall(SYS_io_setup, depth, context));
}

int io_queue_release(io_context_t context) { return told(syscall(SYS_io_destroy, context)); }

int io_submit(io_context_t context, long count, struct iocb **requests) {
    return told(syscall(SYS_io_submit, context, count, requests));
}

int io_pgetevents(io_context_t context, long least, long most, struct io_event *events, struct timespec *timeout, sigset_t *mask) {
    return mask ? -EINVAL : told(syscall(SYS_io_getevents, context, least, most, events, timeout));
}
