/* Counts how often it was run, in a region that outlives it.  See the README. */
#define _GNU_SOURCE
#include <errno.h>
#include <mshare.h>
#include <stdio.h>
#include <sys/mman.h>

int main(void)
{
	char *start = (char *)(1UL << 40);
	size_t size = 512UL << 30;
	void *page;

	if (mshare("counter", start, size, O_CREAT | O_RDWR, 0600) < 0) {
		perror("mshare");
		return 1;
	}
	/* A plain mmap() in the range: it is the region's, and so every sharer's. */
	page = mmap(start, 4096, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (page == MAP_FAILED && errno != EEXIST) {
		perror("mmap");
		return 1;
	}
	printf("run %ld at %p\n", __atomic_add_fetch((long *)start, 1, __ATOMIC_RELAXED), start);
	return 0;
}
