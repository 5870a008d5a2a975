/* SPDX-License-Identifier: MIT */
/*
 * backend.h - memory that processes share, of one kind.
 *
 * worker.c is compiled twice, with libmshare and with plain POSIX shared memory,
 * so that both are measured by the same code, and so that the peer's mmap() is
 * the C library's own.  Every function returns 0, or -1 with errno.
 */
#ifndef BACKEND_H
#define BACKEND_H

#include <stddef.h>

/* New shared memory of zeros, mapped at [start, start + size). */
int backend_create(const char *name, void *start, size_t size);
/* Map what another process has created. */
int backend_attach(const char *name, void *start, size_t size);
/* Unmap it and keep the name. */
int backend_detach(const char *name, void *start, size_t size);

#endif
