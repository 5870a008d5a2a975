/* SPDX-License-Identifier: MIT */
/*
 * The least that a page server in another process can do: read an event, populate, read the
 * next one.  It keeps nothing, checks nothing and limits nothing; see paths.py.
 *
 *     least USERFAULTFD START END CHUNK
 *
 * The userfaultfd is inherited; START and END are the addresses that it is registered for.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void populate(int uffd, unsigned long long start, unsigned long long end)
{
	struct uffdio_zeropage zeros = { .range = { start, end - start } };
	struct uffdio_range range = { start, end - start };

	if (ioctl(uffd, UFFDIO_ZEROPAGE, &zeros) == 0)
		return;
	if (errno != EEXIST || ioctl(uffd, UFFDIO_WAKE, &range) < 0) {
		perror("least");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	unsigned long long start, end, chunk, at;
	struct uffd_msg message;
	int uffd;

	if (argc != 5)
		return 2;
	uffd = atoi(argv[1]);
	start = strtoull(argv[2], NULL, 10);
	end = strtoull(argv[3], NULL, 10);
	chunk = strtoull(argv[4], NULL, 10);
	/* Until its process has gone, or we are killed. */
	while (read(uffd, &message, sizeof message) == sizeof message) {
		if (message.event != UFFD_EVENT_PAGEFAULT)
			continue;
		at = message.arg.pagefault.address & ~(chunk - 1);
		populate(uffd, at < start ? start : at, at + chunk > end ? end : at + chunk);
	}
	return 0;
}
