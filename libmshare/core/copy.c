/* SPDX-License-Identifier: MIT */
/* Copying a donor's memory into the backing, a range at a time. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define COPY_AT_ONCE (SCRATCH / 2)

/*
 * hugetlbfs has no write(2).  Its pages are made by fallocate(2), which can fail, and
 * then written through a mapping, which cannot any more.
 *
 * A page that is partly the donor's and partly absent is made whole: with zeros, or of a
 * file with what the donor sees there.  So a private file's page is copied as a whole.
 */
static int copy_huge(const struct donation *donation, const struct vma *vma, const char *from,
		     const char *to)
{
	size_t mask = donation->huge - 1;
	uintptr_t first = (uintptr_t)from & ~mask, end = ((uintptr_t)to + mask) & ~mask;

	for (uintptr_t page = first; page < end; page += donation->huge) {
		off_t at = (off_t)(page - (uintptr_t)donation->start);
		const char *start = vma->mapped || (char *)page > from ? (char *)page : from;
		const char *until = vma->mapped || (char *)page + donation->huge < to ?
					    (char *)page + donation->huge :
					    to;
		char *window;
		ssize_t got;

		if (fallocate(donation->backing, 0, at, (off_t)donation->huge) < 0) {
			if (errno == ENOSPC)
				errno = ENOMEM;
			return -1;
		}
		window = raw_mmap(NULL, donation->huge, PROT_READ | PROT_WRITE, MAP_SHARED,
				  donation->backing, at);
		if (window == MAP_FAILED)
			return -1;
		/* It stops, and does not fail, at the end of a file. */
		while (start < until && (got = pread(donation->memory, window + (start - (char *)page),
						     (size_t)(until - start),
						     (off_t)(uintptr_t)start)) > 0)
			start += got;
		raw_munmap(window, donation->huge);
		if (start < until && !vma->mapped) {
			errno = EFAULT;
			return -1;
		}
	}
	return 0;
}

/* Memory that is not readable, by a way that does not mind. */
static int copy_unreadable(const struct donation *donation, const char *from, const char *to)
{
	while (from < to) {
		size_t left = (size_t)(to - from);
		ssize_t got = pread(donation->memory, donation->scratch, left < COPY_AT_ONCE ? left : COPY_AT_ONCE,
				    (off_t)(uintptr_t)from);

		if (got <= 0 || pwrite(donation->backing, donation->scratch, (size_t)got,
				       from - donation->start) != got)
			return -1;
		from += got;
	}
	return 0;
}

static int copy(const struct donation *donation, const struct vma *vma, const char *from,
		const char *to)
{
	if (donation->huge)
		return copy_huge(donation, vma, from, to);
	if (!(vma->prot & PROT_READ))
		return copy_unreadable(donation, from, to);
	while (from < to) {
		size_t left = (size_t)(to - from);
		ssize_t done = pwrite(donation->backing, from, left < COPY_AT_ONCE ? left : COPY_AT_ONCE,
				      from - donation->start);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0) {
			if (errno == EFAULT) /* a guard page (madvise(2)), or broken memory */
				errno = EOPNOTSUPP;
			return -1;
		}
		if (done == 0) {
			errno = ENOSPC;
			return -1;
		}
		from += done;
	}
	return 0;
}

static void count(struct donation *donation, const char *from, const char *to)
{
	for (uintptr_t page = (uintptr_t)from & ~(donation->huge - 1); page < (uintptr_t)to;
	     page += donation->huge) {
		donation->counted += page != donation->last_counted;
		donation->last_counted = page;
	}
}

/* A kernel that cannot write-protect copies anyway. */
int copy_frozen(struct donation *donation, int freezer, const struct vma *vma, char *from, char *to)
{
	if (donation->counting) {
		count(donation, from, to);
		return 0;
	}
	if (!vma->mapped && uffd_write_protect(freezer, from, (size_t)(to - from)) < 0 &&
	    errno != EINVAL && errno != ENOENT)
		return -1;
	return copy(donation, vma, from, to);
}
