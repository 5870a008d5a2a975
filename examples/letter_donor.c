/* SPDX-License-Identifier: MIT */
/*
 * The donor of the letter that proposed mshare() (April 2022).  What stands between
 * the two rules is printed there as it stands here; around it is a main().
 */
#include <fcntl.h>
#include <mshare.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GB(n) ((size_t)(n) << 30)
#define TB(n) ((size_t)(n) << 40)

int main(void)
{
	char *addr;
	int err;

/* ----------------- */
addr = mmap((void *)TB(2), GB(512), PROT_READ | PROT_WRITE,
MAP_SHARED | MAP_ANONYMOUS, 0, 0);
if (addr == MAP_FAILED)
perror("ERROR: mmap failed");

err = syscall(MSHARE_SYSCALL, "testregion", (void *)TB(2),
GB(512), O_CREAT|O_RDWR|O_EXCL, 600);
if (err < 0) {
perror("mshare() syscall failed");
exit(1);
}

strncpy(addr, "Some random shared text",
sizeof("Some random shared text"));
/* ----------------- */

	return 0;
}
