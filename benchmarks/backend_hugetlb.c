/* SPDX-License-Identifier: MIT */
/* A file of huge pages, mapped as hugetlbfs(5) users do; the name is its path. */
#include "backend.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static int map(const char *name, int flags, void *start, size_t size)
{
	int fd = open(name, flags | O_RDWR | O_CLOEXEC, 0600);
	void *got;

	if (fd < 0)
		return -1;
	if (flags & O_CREAT && ftruncate(fd, (off_t)size) < 0) {
		close(fd);
		return -1;
	}
	got = mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
	close(fd);
	return got == MAP_FAILED ? -1 : 0;
}

int backend_create(const char *name, void *start, size_t size)
{
	return map(name, O_CREAT | O_EXCL, start, size);
}

int backend_attach(const char *name, void *start, size_t size)
{
	return map(name, 0, start, size);
}

int backend_detach(const char *name, void *start, size_t size)
{
	(void)name;
	return munmap(start, size);
}
