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
 * Nothing waits for itself.  The donor's own malloc() may have its heap in the range: so
 * from the freezing on nothing is allocated, and nothing written but the stack and what
 * memory_outside() gave.
 *
 * Nothing is taken that somebody only keeps free: AddressSanitizer has a gap beside its
 * shadow, allocators have arenas.  Such a range is no place for a region (EEXIST).
 *
 * Only pages that exist are copied, and all of them: present.c tells how.
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
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

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

/* Have the daemon say now if there are not enough huge pages, and how many it takes. */
static int check_room(struct donation *donation)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_NEED };
	struct mshare_wire_reply reply;
	int ignored, result = present_count(donation);

	request.size = donation->counted * donation->huge;
	if (result < 0 || request.size == 0)
		return result;
	return attachment_call(donation->attachment, &request, NULL, NULL, 0, &reply, &ignored);
}

static int commit(const struct donation *donation, int *window_fd)
{
	struct mshare_wire_object *objects = (void *)donation->scratch;
	struct mshare_wire_request request = { .op = MSHARE_WIRE_COMMIT };
	struct mshare_wire_reply reply;
	size_t count = 0;

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
		else if (count < MSHARE_WIRE_MAX_OBJECTS)
			objects[count++] = object;
		else {
			errno = E2BIG;
			return -1;
		}
	}
	request.object_count = (uint32_t)count;
	return attachment_call(donation->attachment, &request, objects, NULL, 0, &reply, window_fd);
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
		held_close(&attachment->backing);
		held_take(&attachment->backing, window_fd);
	}
	if (donation->huge) {
		/* Such a window must not be moved (see window.c), so it is closed at first. */
		*complete = false;
		if (window_map(attachment, MSHARE_WIRE_PROTECTED) == 0)
			return 0;
		raw_munmap(donation->start, size);
		return -1;
	}
	if (window_replace(*room, donation->start, size, attachment->backing.fd, attachment->uffd.fd,
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

int donate_zeros(struct attachment *attachment, size_t length, bool *complete)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_COMMIT, .object_count = 1 };
	struct mshare_wire_object object = {
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_SHARED,
	};
	struct mshare_wire_reply reply;
	struct statfs file_system;
	size_t page;
	int window_fd;

	if (fstatfs(attachment->backing.fd, &file_system) < 0)
		return -1;
	page = file_system.f_type == HUGETLBFS_MAGIC ? (size_t)file_system.f_bsize :
						       (size_t)sysconf(_SC_PAGESIZE);
	object.length = (length + page - 1) / page * page;
	if (attachment_call(attachment, &request, &object, NULL, 0, &reply, &window_fd) < 0)
		return -1;
	*complete = true;
	if (!attachment->writable) {
		if (window_fd < 0) {
			errno = EMFILE; /* there was no room for it: recvmsg(2) */
			return -1;
		}
		held_close(&attachment->backing);
		held_take(&attachment->backing, window_fd);
	}
	return window_map(attachment, reply.flags);
}

int donate(struct attachment *attachment, bool *complete)
{
	char *start = attachment->start;
	size_t size = attachment->size;
	struct donation donation = {
		.attachment = attachment,
		.start = start,
		.backing = attachment->backing.fd,
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
	if (fstatfs(attachment->backing.fd, &file_system) < 0)
		goto out;
	if (file_system.f_type == HUGETLBFS_MAGIC)
		donation.huge = (size_t)file_system.f_bsize;
	donation.scratch = memory_outside(start, size, SCRATCH, PROT_READ | PROT_WRITE);
	if (!donation.scratch)
		goto out;
	if (maps_find(&donation, start + size) < 0)
		goto out;
	if (maps_reserved(&donation) != 0)
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
	if (present_copy(&donation, start + size, files_known, &freezer) < 0)
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
	if (donation.scratch)
		raw_munmap(donation.scratch, SCRATCH);
	if (donation.memory >= 0)
		close(donation.memory);
	errno = saved;
	return result;
}
