/* SPDX-License-Identifier: MIT */
/*
 * Which of a donor's pages exist: those are copied, and all of them.
 *
 * The region may be 512 GiB of which a few pages were touched.  For private memory
 * /proc/self/pagemap tells exactly which pages exist.  For shared anonymous memory it does
 * not: a page populated by a relative, or swapped out, has no entry in our page table.
 * The memory is a file of the kernel's own, and the daemon opens it for us by
 * /proc/PID/map_files (that takes CAP_CHECKPOINT_RESTORE); SEEK_DATA then tells.  A daemon
 * without that right (an ordinary user's) leaves us to find out.  mincore(2) tells which
 * pages are in memory, whoever populated them; a page that is swapped out is absent for
 * it.  So it will do as long as nothing of ours is swapped out (the VMA's Swap in
 * /proc/self/smaps) and nobody's is meanwhile (/proc/vmstat).  Otherwise each page is
 * tried: with UFFD_FEATURE_SIGBUS a system call on an absent page fails instead of
 * sleeping.  That takes minutes for 512 GiB.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGEMAP_PRESENT_OR_SWAPPED ((uint64_t)3 << 62)
#define PAGEMAP_OF_FILE ((uint64_t)1 << 61)

/* How to find the pages of shared anonymous memory whose file is not to be had. */
enum finding { BY_MINCORE, BY_TRYING };

static int copy_by_seek(struct donation *donation, int freezer, const struct vma *vma)
{
	off_t at = vma->offset + (vma->start - vma->vma_start);
	off_t end = vma->offset + (vma->end - vma->vma_start);

	for (;;) {
		off_t data = lseek(vma->file, at, SEEK_DATA);

		if (data < 0)
			return errno == ENXIO ? 0 : -1;
		if (data >= end)
			return 0;
		at = lseek(vma->file, data, SEEK_HOLE);
		if (at < 0)
			return -1;
		if (at > end)
			at = end;
		if (copy_frozen(donation, freezer, vma, vma->vma_start + (data - vma->offset),
				    vma->vma_start + (at - vma->offset)) < 0)
			return -1;
	}
}

/*
 * The trial is a write of one byte to a scratch file, not to the backing: newer
 * kernels allocate the page they write to before they look at the source.
 */
static int copy_by_trying(struct donation *donation, int freezer, const struct vma *vma)
{
	int scratch = memfd_create("libmshare", MFD_CLOEXEC), result = -1, saved;

	if (scratch < 0)
		return -1;
	for (char *page = vma->start; page < vma->end; page += donation->page) {
		char byte;
		ssize_t tried = vma->prot & PROT_READ ?
					pwrite(scratch, page, 1, 0) :
					pread(donation->memory, &byte, 1, (off_t)(uintptr_t)page);

		if (tried < 0) {
			if (errno == EFAULT || errno == EIO)
				continue;
			goto out;
		}
		if (copy_frozen(donation, freezer, vma, page, page + donation->page) < 0)
			goto out;
	}
	result = 0;
out:
	saved = errno;
	close(scratch);
	errno = saved;
	return result;
}

/* The first half of the scratch memory is copy_unreadable()'s. */
static void *room_for(const struct donation *donation, size_t length)
{
	return donation->scratch + SCRATCH - length;
}

static int copy_by_mincore(struct donation *donation, int freezer, const struct vma *vma)
{
	enum { PAGES = 1 << 18 };
	unsigned char *present = room_for(donation, PAGES);
	char *page = vma->start, *run = NULL;

	while (page < vma->end) {
		size_t left = (size_t)(vma->end - page) / donation->page;
		size_t count = left < PAGES ? left : PAGES;

		if (mincore(page, count * donation->page, present) < 0)
			return -1;
		if (!run && !memchr(present, 1, count)) {
			page += count * donation->page;
			continue;
		}
		for (size_t i = 0; i < count; i++, page += donation->page) {
			if ((present[i] & 1) && !run)
				run = page;
			if (!(present[i] & 1) && run) {
				if (copy_frozen(donation, freezer, vma, run, page) < 0)
					return -1;
				run = NULL;
			}
		}
	}
	return run ? copy_frozen(donation, freezer, vma, run, page) : 0;
}

static int copy_by_pagemap(struct donation *donation, int freezer, const struct vma *vma)
{
	enum { ENTRIES = 8192 };
	uint64_t *entries = room_for(donation, ENTRIES * sizeof *entries);
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	char *page = vma->start, *run = NULL;
	int result = -1;

	if (pagemap < 0)
		return -1;
	while (page < vma->end) {
		size_t left = (size_t)(vma->end - page) / donation->page;
		size_t wanted = left < ENTRIES ? left : ENTRIES;
		ssize_t got = pread(pagemap, entries, wanted * sizeof *entries,
				    (off_t)((uintptr_t)page / donation->page * sizeof *entries));

		if (got < (ssize_t)sizeof *entries)
			goto out;
		for (size_t i = 0; i < (size_t)got / sizeof *entries; i++, page += donation->page) {
			bool exists = (entries[i] & PAGEMAP_PRESENT_OR_SWAPPED) &&
				      !(vma->mapped && (entries[i] & PAGEMAP_OF_FILE));

			if (exists && !run)
				run = page;
			if (!exists && run) {
				if (copy_frozen(donation, freezer, vma, run, page) < 0)
					goto out;
				run = NULL;
			}
		}
	}
	result = run ? copy_frozen(donation, freezer, vma, run, page) : 0;
out:
	close_keeping_errno(pagemap);
	return result;
}

static int copy_contents(struct donation *donation, int freezer, enum finding finding)
{
	for (size_t i = 0; i < donation->count; i++) {
		const struct vma *vma = &donation->vmas[i];
		size_t length = (size_t)(vma->end - vma->start);
		int result;

		if (vma->mapped && vma->shared)
			continue; /* its pages are the file's */
		if (!vma->mapped && !donation->counting &&
		    uffd_register(freezer, vma->start, length, UFFD_MISSING | UFFD_WRITE_PROTECT) < 0 &&
		    uffd_register(freezer, vma->start, length, UFFD_MISSING) < 0)
			return -1;
		if (!vma->shared)
			result = copy_by_pagemap(donation, freezer, vma);
		else if (vma->file >= 0)
			result = copy_by_seek(donation, freezer, vma);
		else if (finding == BY_MINCORE)
			result = copy_by_mincore(donation, freezer, vma);
		else
			result = copy_by_trying(donation, freezer, vma);
		if (result < 0)
			return -1;
	}
	return 0;
}

/* The value of a line of /proc/vmstat, "key value", if the key is of pages swapped out. */
static long long value_of(char *line)
{
	char *space = strchr(line, ' ');

	if (!space)
		return -1;
	*space = '\0'; /* pswpout, zswpout, swpout_zero, thp_swpout */
	return strstr(line, "swpout") ? strtoll(space + 1, NULL, 10) : -1;
}

/*
 * Pages that this machine has swapped out since it was started; -1 if that is not known.
 * Not by stdio: it has its buffers of malloc().
 */
static long long swapped_out(const struct donation *donation)
{
	char *text = donation->scratch, *next;
	int vmstat = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
	long long sum = 0;
	bool known = false;
	size_t length = 0;
	ssize_t got;

	if (vmstat < 0)
		return -1;
	while (length < SCRATCH - 1 &&
	       (got = read(vmstat, text + length, SCRATCH - 1 - length)) > 0)
		length += (size_t)got;
	close(vmstat);
	text[length] = '\0';
	for (char *line = text; (next = strchr(line, '\n')); line = next + 1) {
		long long value;

		*next = '\0';
		value = value_of(line);
		if (value >= 0) {
			sum += value;
			known = true;
		}
	}
	return known ? sum : -1;
}

/* Whether a part of the donation is swapped out now; true if that is not known. */
static bool is_swapped(const struct donation *donation, char *end)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	bool within = false, found = false, known = false;
	char *line = NULL;
	size_t capacity = 0;

	while (smaps && getline(&line, &capacity, smaps) > 0) {
		unsigned long from, to, swap;

		if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
			within = (char *)to > donation->start && (char *)from < end;
		else if (within && sscanf(line, "Swap: %lu kB", &swap) == 1) {
			known = true;
			found |= swap != 0;
		}
	}
	free(line);
	if (smaps)
		fclose(smaps);
	return found || !known;
}

int present_copy(struct donation *donation, char *end, bool files_known, int *freezer)
{
	long long before = swapped_out(donation);
	enum finding finding = BY_MINCORE;

	if (!files_known && (before < 0 || is_swapped(donation, end)))
		finding = BY_TRYING;
	for (;; finding = BY_TRYING) {
		uint64_t features = finding == BY_TRYING ? UFFD_FEATURE_SIGBUS : 0;

		*freezer = uffd_open(donation->attachment->connection.fd, donation->backing);
		if (*freezer < 0 || uffd_handshake(*freezer, features) < 0 ||
		    copy_contents(donation, *freezer, finding) < 0)
			return -1;
		if (files_known || finding == BY_TRYING || swapped_out(donation) == before)
			return 0;
		close(*freezer); /* something may have been missed: all of it again */
	}
}

int present_count(struct donation *donation)
{
	int result;

	donation->counting = true;
	result = copy_contents(donation, -1, BY_MINCORE);
	donation->counting = false;
	return result;
}
