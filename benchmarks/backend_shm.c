/* SPDX-License-Identifier: MIT */
/* A POSIX shared memory object, as shm_overview(7) tells to use it. */
#include "backend.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* At the address that the region would have, so that page tables compare. */
static int map(int fd, void *start, size_t size)
{
	void *got = mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd,
			 0);

	close(fd);
	return got == MAP_FAILED ? -1 : 0;
}

int backend_create(const char *name, void *start, size_t size)
{
	int fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR, 0600);

	if (fd < 0)
		return -1;
	if (ftruncate(fd, (off_t)size) < 0) {
		close(fd);
		return -1;
	}
	return map(fd, start, size);
}

int backend_attach(const char *name, void *start, size_t size)
{
	int fd = shm_open(name, O_RDWR, 0);
	struct stat status;

	if (fd < 0)
		return -1;
	/* mshare() checks the size, and so does everyone who cares for SIGBUS. */
	if (fstat(fd, &status) < 0 || (size_t)status.st_size != size) {
		close(fd);
		return -1;
	}
	return map(fd, start, size);
}

int backend_detach(const char *name, void *start, size_t size)
{
	(void)name;
	return munmap(start, size);
}
