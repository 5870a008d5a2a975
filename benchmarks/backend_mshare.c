/* SPDX-License-Identifier: MIT */
/* A region of msharefs. */
#include "backend.h"

#include <fcntl.h>
#include <mshare.h>
#include <sys/mman.h>

int backend_create(const char *name, void *start, size_t size)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;

	/* The donor's memory, not yet touched, is the region's one object. */
	if (mmap(start, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
		return -1;
	return mshare(name, start, size, O_CREAT | O_EXCL | O_RDWR, 0600);
}

int backend_attach(const char *name, void *start, size_t size)
{
	return mshare(name, start, size, O_RDWR, 0);
}

int backend_detach(const char *name, void *start, size_t size)
{
	(void)start;
	(void)size;
	return mshare_detach(name);
}
