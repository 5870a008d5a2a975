/* SPDX-License-Identifier: MIT */
/*
 * A program that knows nothing of libmshare: its headers, its library.  It runs with
 * the preload library, creates a region by system call, and maps into it as everywhere.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	char *start = (char *)strtoul(argv[2], NULL, 0);
	unsigned long size = strtoul(argv[3], NULL, 0);

	if (syscall(0x2d730001L, argv[1], start, size, O_CREAT | O_EXCL | O_RDWR, 0600) != 0) {
		perror("mshare");
		return 1;
	}
	char *got = mmap(start + 4096, 8192, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (got != start + 4096) {
		perror("mmap");
		return 1;
	}
	got[0] = 'x';
	if (mprotect(start + 8192, 4096, PROT_READ) != 0) {
		perror("mprotect");
		return 1;
	}
	return got[0] == 'x' ? 42 : 1;
}
