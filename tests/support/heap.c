/* SPDX-License-Identifier: MIT */
/* A malloc() whose heap lies where regions do ($HEAP_AT); nothing is ever given back. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIZE ((size_t)1 << 20)

static char *next, *end;

static void *take(size_t alignment, size_t length)
{
	size_t *header;

	if (!next) {
		const char *at = getenv("HEAP_AT");

		next = (char *)syscall(SYS_mmap, at ? strtoul(at, NULL, 0) : 0, SIZE,
				       PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);
		end = next + SIZE;
	}
	next = (char *)(((uintptr_t)next + sizeof *header + alignment - 1) & ~(alignment - 1));
	if (next + length > end)
		return NULL;
	header = (size_t *)next - 1;
	*header = length;
	next += length;
	return header + 1;
}

void *malloc(size_t length)
{
	return take(16, length);
}

void *calloc(size_t count, size_t length)
{
	return take(16, count * length);
}

void *realloc(void *old, size_t length)
{
	void *new = take(16, length);
	size_t had = old ? ((size_t *)old)[-1] : 0;

	if (new && had)
		memcpy(new, old, had < length ? had : length);
	return new;
}

void *aligned_alloc(size_t alignment, size_t length)
{
	return take(alignment, length);
}

void *memalign(size_t alignment, size_t length)
{
	return take(alignment, length);
}

int posix_memalign(void **got, size_t alignment, size_t length)
{
	*got = take(alignment, length);
	return *got ? 0 : 12;
}

void free(void *old)
{
	(void)old;
}
