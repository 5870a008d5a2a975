/* SPDX-License-Identifier: MIT */
/*
 * The consumer of the letter that proposed mshare() (April 2022).  What stands
 * between the two rules is printed there as it stands here; around it is a main().
 * It opens "testregion" by a relative name: run it from within the mount.
 */
#include <fcntl.h>
#include <mshare.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(void)
{
	char *addr;
	int err, fd;
	ssize_t count;

/* ----------------- */
struct mshare_info minfo;

fd = open("testregion", O_RDONLY);
if (fd < 0) {
perror("open failed");
exit(1);
}

if ((count = read(fd, &minfo, sizeof(struct mshare_info)) > 0))
printf("INFO: %ld bytes shared at addr 0x%lx \n",
minfo.size, minfo.start);
else
perror("read failed");

close(fd);

addr = (void *)minfo.start;
err = syscall(MSHARE_SYSCALL, "testregion", addr, minfo.size,
O_RDWR, 600);
if (err < 0) {
perror("mshare() syscall failed");
exit(1);
}

printf("Guest mmap at %px:\n", addr);
printf("%s\n", addr);
printf("\nDone\n");

err = syscall(MSHARE_UNLINK_SYSCALL, "testregion");
if (err < 0) {
perror("mshare_unlink() failed");
exit(1);
}
/* ----------------- */

	return 0;
}
