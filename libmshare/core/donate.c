/* SPDX-License-Identifier: MIT */
/*
 * A donor's memory becomes the region's.
 *
 * The kernel patches copied page table entries; there is no way to hand anonymous
 * pages to a named file from user space, so their contents are copied into the
 * backing (the memory is needed twice for a moment) and the window replaces the
 * donor's mappings.  Three things must hold meanwhile:
 *
 * Nothing is lost.  Everything is copied before anything is replaced; on any error
 * the donor keeps what it has.
 *
 * No write of another thread is lost.  The mappings are registered with a
 * userfaultfd of their own that nobody serves: MISSING stops who touches an absent
 * page, write protection who writes a present one.  They sleep until that
 * descriptor is closed and then find the window.  Readers go on.  (A kernel
 * before 5.19 cannot write-protect shared memory: there other threads must not
 * write while mshare() runs.)
 *
 * Only pages that exist are copied, and all of them.  The region may be 512 GiB of
 * which a few pages were touched.  For private memory /proc/self/pagemap tells
 * exactly which pages exist.  For shared anonymous memory it does not: a page
 * populated by a relative, or swapped out, has no entry in our page table.  The
 * memory is a file of the kernel's own, and the daemon opens it for us by
 * /proc/PID/map_files (that takes CAP_CHECKPOINT_RESTORE); SEEK_DATA then tells.
 * A daemon without that right (an ordinary user's) leaves us to find out.  mincore(2)
 * tells which pages are in memory, whoever populated them; a page that is swapped out
 * is absent for it.  So it will do as long as nothing of ours is swapped out (the VMA's
 * Swap in /proc/self/smaps) and nobody's is meanwhile (/proc/vmstat).  Otherwise each
 * page is tried: with UFFD_FEATURE_SIGBUS a system call on an absent page fails instead
 * of sleeping.  That takes minutes for 512 GiB.
 *
 * On huge pages the last step is not one step: the window is closed for a moment before
 * it opens, and a thread that touches the range just then has SIGSEGV.  (Only mremap()
 * replaces a mapping in one step, and a hugetlb mapping must not be moved: window.c.)
 *
 * Files are opened anew, by the donor and with the donor's rights: the daemon gets a
 * descriptor and no path.  What is left to copy are the pages that the donor wrote to
 * a private mapping, which pagemap tells, too.  These cannot be frozen (userfaultfd
 * takes no files): other threads must not write them while mshare() runs.
 */
#include "internal.h"

#include <errno.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#define COPY_AT_ONCE ((size_t)16 << 20)
#define PAGEMAP_PRESENT_OR_SWAPPED ((uint64_t)3 << 62)
#define PAGEMAP_OF_FILE ((uint64_t)1 << 61)

struct vma {
	char *vma_start, *vma_end; /* as /proc/self/maps has it */
	char *start, *end;         /* its part in the region */
	int prot;
	bool shared;
	bool mapped;  /* of a file, not anonymous */
	off_t offset; /* of vma_start in the file */
	int file;     /* the file, or that of shared anonymous memory; or -1 */
};

/* How to find the pages of shared anonymous memory whose file is not to be had. */
enum finding { BY_MINCORE, BY_TRYING };

struct donation {
	struct attachment *attachment;
	struct vma *vmas;
	size_t count, capacity;
	char *start;
	int backing;
	int memory; /* /proc/self/mem, for what is not readable, and for huge pages */
	size_t page;
	size_t huge; /* the backing's pages, if it is of huge pages; or 0 */
	bool counting;
	size_t counted; /* huge pages that will be needed */
	uintptr_t last_counted;
};

/*
 * The file of a mapping: by its path, if that still leads to it, or by
 * /proc/self/map_files, which takes a privilege.
 */
static int open_mapped(const struct vma *vma, const char *path, unsigned major, unsigned minor,
		       unsigned long inode)
{
	char entry[64];

	snprintf(entry, sizeof entry, "/proc/self/map_files/%lx-%lx", (unsigned long)vma->vma_start,
		 (unsigned long)vma->vma_end);
	for (int tries = 0; tries < 4; tries++) {
		int access = tries & 1 || !vma->shared ? O_RDONLY : O_RDWR;
		int fd = open(tries & 2 ? entry : path, access | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
		struct stat status;

		if (fd < 0)
			continue;
		if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) &&
		    (tries & 2 || (status.st_ino == inode && major(status.st_dev) == major &&
				   minor(status.st_dev) == minor)))
			return fd;
		close(fd);
	}
	errno = EOPNOTSUPP;
	return -1;
}

/* One line of /proc/self/maps into *vma; 0 if it is not in the range, -1 with errno. */
static int parse_line(char *line, char *start, char *end, struct vma *vma)
{
	unsigned long from, to, offset, inode;
	unsigned major, minor;
	char prot[5];
	int name_at = 0;
	char *name;

	if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu %n", &from, &to, prot, &offset, &major, &minor,
		   &inode, &name_at) < 7)
		return 0;
	if ((char *)to <= start || (char *)from >= end)
		return 0;
	name = line + name_at;
	name[strcspn(name, "\n")] = '\0';
	*vma = (struct vma){
		.vma_start = (char *)from,
		.vma_end = (char *)to,
		.start = (char *)from > start ? (char *)from : start,
		.end = (char *)to < end ? (char *)to : end,
		.prot = (prot[0] == 'r' ? PROT_READ : 0) | (prot[1] == 'w' ? PROT_WRITE : 0) |
			(prot[2] == 'x' ? PROT_EXEC : 0),
		.shared = prot[3] == 's',
		.offset = (off_t)offset,
		.file = -1,
	};
	/* The kernel's own names of anonymous memory, or ones given to it (prctl(2)). */
	if (vma->shared && major == 0 &&
	    (strcmp(name, "/dev/zero (deleted)") == 0 || strncmp(name, "[anon_shmem:", 12) == 0))
		return 1;
	if (!vma->shared && inode == 0 && (*name == '\0' || strncmp(name, "[anon:", 6) == 0))
		return 1;
	vma->mapped = true;
	if (*name != '/' || inode == 0) { /* the stack, the heap, a device's memory */
		errno = EOPNOTSUPP;
		return -1;
	}
	vma->file = open_mapped(vma, name, major, minor, inode);
	return vma->file < 0 ? -1 : 1;
}

static int find_vmas(struct donation *donation, char *end)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char *line = NULL;
	size_t capacity = 0;
	int result = 0;

	if (!maps)
		return -1;
	while (result == 0 && getline(&line, &capacity, maps) > 0) {
		struct vma vma;
		int kind = parse_line(line, donation->start, end, &vma);

		if (kind < 0)
			result = -1;
		if (kind <= 0)
			continue;
		if (donation->count == donation->capacity) {
			size_t more = donation->capacity ? 2 * donation->capacity : 16;
			struct vma *grown = realloc(donation->vmas, more * sizeof *grown);

			if (!grown) {
				result = -1;
				continue;
			}
			donation->vmas = grown;
			donation->capacity = more;
		}
		donation->vmas[donation->count++] = vma;
	}
	free(line);
	fclose(maps);
	return result;
}

/*
 * The files behind shared VMAs, and what else it takes descriptors for.  Must come
 * before registering splits the VMAs.
 */
static int open_files(struct donation *donation, bool *files_known)
{
	for (size_t i = 0; i < donation->count && donation->memory < 0; i++) {
		if ((donation->vmas[i].prot & PROT_READ) && !donation->huge)
			continue;
		donation->memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
		if (donation->memory < 0)
			return -1;
	}
	for (size_t i = 0; i < donation->count; i++) {
		struct vma *vma = &donation->vmas[i];
		struct mshare_wire_request request = {
			.op = MSHARE_WIRE_VMA_FILE,
			.start = (uintptr_t)vma->vma_start,
			.size = (uint64_t)(vma->vma_end - vma->vma_start),
		};
		struct mshare_wire_reply reply;

		if (!vma->shared || vma->mapped)
			continue;
		if (attachment_call(donation->attachment, &request, NULL, NULL, 0, &reply,
				    &vma->file) < 0) {
			if (errno != EPERM)
				return -1;
			*files_known = false;
		} else if (vma->file < 0) {
			errno = EMFILE; /* there was no room for it: recvmsg(2) */
			return -1;
		}
	}
	return 0;
}

/* Files become objects before anything is copied: the daemon clears the range. */
static int map_files(const struct donation *donation)
{
	for (size_t i = 0; i < donation->count; i++) {
		const struct vma *vma = &donation->vmas[i];
		struct mshare_wire_request request = { .op = MSHARE_WIRE_MMAP, .object_count = 1 };
		struct mshare_wire_object object = {
			.offset = (uint64_t)(vma->start - donation->start),
			.length = (uint64_t)(vma->end - vma->start),
			.file_offset = (uint64_t)(vma->offset + (vma->start - vma->vma_start)),
			.prot = (uint32_t)vma->prot,
			.flags = vma->shared ? MAP_SHARED : MAP_PRIVATE,
		};
		struct mshare_wire_reply reply;
		int ignored;

		if (vma->mapped && attachment_call(donation->attachment, &request, &object,
						   &vma->file, 1, &reply, &ignored) < 0)
			return -1;
	}
	return 0;
}

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
	char *buffer = malloc(COPY_AT_ONCE);
	int result = -1;

	while (buffer && from < to) {
		size_t left = (size_t)(to - from);
		ssize_t got = pread(donation->memory, buffer, left < COPY_AT_ONCE ? left : COPY_AT_ONCE,
				    (off_t)(uintptr_t)from);

		if (got <= 0 || pwrite(donation->backing, buffer, (size_t)got,
				       from - donation->start) != got)
			goto out;
		from += got;
	}
	result = buffer ? 0 : -1;
out:
	free(buffer);
	return result;
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

/* Stop writers, then copy.  A kernel that cannot write-protect copies anyway. */
static int freeze_and_copy(struct donation *donation, int freezer, const struct vma *vma,
			   char *from, char *to)
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
		if (freeze_and_copy(donation, freezer, vma, vma->vma_start + (data - vma->offset),
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
		if (freeze_and_copy(donation, freezer, vma, page, page + donation->page) < 0)
			goto out;
	}
	result = 0;
out:
	saved = errno;
	close(scratch);
	errno = saved;
	return result;
}

static int copy_by_mincore(struct donation *donation, int freezer, const struct vma *vma)
{
	enum { PAGES = 1 << 18 };
	unsigned char *present = malloc(PAGES);
	char *page = vma->start, *run = NULL;
	int result = -1;

	while (present && page < vma->end) {
		size_t left = (size_t)(vma->end - page) / donation->page;
		size_t count = left < PAGES ? left : PAGES;

		if (mincore(page, count * donation->page, present) < 0)
			goto out;
		if (!run && !memchr(present, 1, count)) {
			page += count * donation->page;
			continue;
		}
		for (size_t i = 0; i < count; i++, page += donation->page) {
			if ((present[i] & 1) && !run)
				run = page;
			if (!(present[i] & 1) && run) {
				if (freeze_and_copy(donation, freezer, vma, run, page) < 0)
					goto out;
				run = NULL;
			}
		}
	}
	if (present)
		result = run ? freeze_and_copy(donation, freezer, vma, run, page) : 0;
out:
	free(present);
	return result;
}

static int copy_by_pagemap(struct donation *donation, int freezer, const struct vma *vma)
{
	enum { ENTRIES = 8192 };
	uint64_t *entries = malloc(ENTRIES * sizeof *entries);
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	char *page = vma->start, *run = NULL;
	int result = -1;

	if (!entries || pagemap < 0)
		goto out;
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
				if (freeze_and_copy(donation, freezer, vma, run, page) < 0)
					goto out;
				run = NULL;
			}
		}
	}
	result = run ? freeze_and_copy(donation, freezer, vma, run, page) : 0;
out:
	free(entries);
	if (pagemap >= 0) {
		int saved = errno;

		close(pagemap);
		errno = saved;
	}
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

/* Have the daemon say now if there are not enough huge pages, and how many it takes. */
static int check_room(struct donation *donation)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_NEED };
	struct mshare_wire_reply reply;
	int ignored, result;

	donation->counting = true;
	result = copy_contents(donation, -1, BY_MINCORE);
	donation->counting = false;
	request.size = donation->counted * donation->huge;
	if (result < 0 || request.size == 0)
		return result;
	return attachment_call(donation->attachment, &request, NULL, NULL, 0, &reply, &ignored);
}

/* Pages that this machine has swapped out since it was started; -1 if that is not known. */
static long long swapped_out(void)
{
	FILE *vmstat = fopen("/proc/vmstat", "re");
	char key[64];
	long long value, sum = 0;
	bool known = false;

	while (vmstat && fscanf(vmstat, "%63s %lld", key, &value) == 2) {
		if (strstr(key, "swpout")) { /* pswpout, zswpout, swpout_zero, thp_swpout */
			sum += value;
			known = true;
		}
	}
	if (vmstat)
		fclose(vmstat);
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

/* Copies everything; *freezer holds back writers from then on, until it is closed. */
static int freeze_and_copy_all(struct donation *donation, char *end, bool files_known,
			       int *freezer)
{
	long long before = swapped_out();
	enum finding finding = BY_MINCORE;

	if (!files_known && (before < 0 || is_swapped(donation, end)))
		finding = BY_TRYING;
	for (;; finding = BY_TRYING) {
		uint64_t features = finding == BY_TRYING ? UFFD_FEATURE_SIGBUS : 0;

		*freezer = uffd_open(donation->attachment->connection);
		if (*freezer < 0 || uffd_handshake(*freezer, features) < 0 ||
		    copy_contents(donation, *freezer, finding) < 0)
			return -1;
		if (files_known || finding == BY_TRYING || swapped_out() == before)
			return 0;
		close(*freezer); /* something may have been missed: all of it again */
	}
}

static int commit(const struct donation *donation, int *window_fd)
{
	struct mshare_wire_object *objects = calloc(donation->count, sizeof *objects);
	struct mshare_wire_request request = { .op = MSHARE_WIRE_COMMIT };
	struct mshare_wire_reply reply;
	size_t count = 0;
	int result;

	if (!objects)
		return -1;
	for (size_t i = 0; i < donation->count; i++) {
		const struct vma *vma = &donation->vmas[i];
		struct mshare_wire_object object = {
			.offset = (uint64_t)(vma->start - donation->start),
			.length = (uint64_t)(vma->end - vma->start),
			.prot = (uint32_t)vma->prot,
			.flags = vma->shared ? MAP_SHARED : MAP_PRIVATE,
		};
		struct mshare_wire_object *last = count ? &objects[count - 1] : NULL;

		if (vma->mapped)
			continue;
		if (last && last->offset + last->length == object.offset &&
		    last->prot == object.prot && last->flags == object.flags)
			last->length += object.length;
		else
			objects[count++] = object;
	}
	if (count > MSHARE_WIRE_MAX_OBJECTS) {
		free(objects);
		errno = E2BIG;
		return -1;
	}
	request.object_count = (uint32_t)count;
	result = attachment_call(donation->attachment, &request, objects, NULL, 0, &reply,
				 window_fd);
	free(objects);
	return result;
}

/* Not while a window is there: the freezer would hold back ourselves. */
static int check_own_memory(const struct donation *donation, size_t size)
{
	char *stack = __builtin_frame_address(0);

	if (stack < donation->start || stack >= donation->start + size)
		return 0;
	errno = EOPNOTSUPP;
	return -1;
}

/*
 * The region is there; its window takes the place of the donor's mappings.  Once it has,
 * the region has the only copy, and stays.
 */
static int replace(const struct donation *donation, char **room, size_t size, int window_fd,
		   bool *complete)
{
	struct attachment *attachment = donation->attachment;
	bool protect = false;

	for (size_t i = 0; i < donation->count; i++) {
		const struct vma *vma = &donation->vmas[i];

		protect |= !(vma->prot & PROT_WRITE) || (vma->mapped && vma->shared);
	}
	if (!attachment->writable) {
		if (window_fd < 0) {
			errno = EMFILE; /* there was no room for it: recvmsg(2) */
			return -1;
		}
		/* What a reader may have, in place of what a donor needs. */
		close(attachment->backing);
		attachment->backing = window_fd;
	}
	if (donation->huge) {
		/* Such a window must not be moved (see window.c), so it is closed at first. */
		*complete = false;
		if (window_map(attachment, MSHARE_WIRE_PROTECTED) == 0)
			return 0;
		raw_munmap(donation->start, size);
		return -1;
	}
	if (window_replace(*room, donation->start, size, attachment->backing, attachment->uffd,
			   attachment->writable, protect) < 0)
		return -1;
	*room = NULL;
	*complete = false;
	/*
	 * The window is open already: what is protected is so from now on.  If the daemon
	 * dies now, the next one finds a sharer like any other, and protects it.
	 */
	if (window_ready(attachment, MSHARE_WIRE_PROTECTED) == 0 || errno == ENOTCONN)
		return 0;
	raw_munmap(donation->start, size);
	return -1;
}

int donate(struct attachment *attachment, bool *complete)
{
	char *start = attachment->start;
	size_t size = attachment->size;
	struct donation donation = {
		.attachment = attachment,
		.start = start,
		.backing = attachment->backing,
		.last_counted = UINTPTR_MAX,
		.memory = -1,
		.page = (size_t)sysconf(_SC_PAGESIZE),
	};
	bool files_known = true;
	int freezer = -1, window_fd = -1, result = -1, saved;
	struct statfs file_system;
	char *room = NULL;

	if (check_own_memory(&donation, size) < 0)
		goto out;
	if (fstatfs(attachment->backing, &file_system) < 0)
		goto out;
	if (file_system.f_type == HUGETLBFS_MAGIC)
		donation.huge = (size_t)file_system.f_bsize;
	if (find_vmas(&donation, start + size) < 0)
		goto out;
	if (open_files(&donation, &files_known) < 0)
		goto out;
	if (map_files(&donation) < 0)
		goto out;
	if (donation.huge && check_room(&donation) < 0)
		goto out;
	room = window_room(start, size);
	if (!room)
		goto out;
	if (freeze_and_copy_all(&donation, start + size, files_known, &freezer) < 0)
		goto out;
	if (commit(&donation, &window_fd) < 0)
		goto out;
	*complete = true;
	result = replace(&donation, &room, size, window_fd, complete);
out:
	saved = errno;
	if (room)
		raw_munmap(room, size);
	/* Unregisters what is still registered, lifts the protection, wakes who waits. */
	if (freezer >= 0)
		close(freezer);
	for (size_t i = 0; i < donation.count; i++) {
		if (donation.vmas[i].file >= 0)
			close(donation.vmas[i].file);
	}
	free(donation.vmas);
	if (donation.memory >= 0)
		close(donation.memory);
	errno = saved;
	return result;
}
