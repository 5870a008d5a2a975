/* SPDX-License-Identifier: MIT */
/*
 * The window: a region's VMA in this process.  Async-signal-safe.
 *
 * A window that is mapped but not registered with its userfaultfd is the one
 * dangerous state: a touch of an absent page there would be filled with zeros by
 * the kernel, in the backing, for every sharer.  So a window is mapped PROT_NONE,
 * registered, and only then opened.  (UFFDIO_REGISTER asks for VM_MAYWRITE, not
 * VM_WRITE, so PROT_NONE does not hinder it: fs/userfaultfd.c.)
 *
 * A reader's window is MAP_PRIVATE and PROT_READ: the kernel refuses to register
 * a shared mapping of a read-only descriptor (EPERM), and private it shows the
 * same pages.  A reader that makes it writable gets copies of its own.
 *
 * MADV_DONTFORK: a child that inherited the window would not inherit the
 * registration (that needs UFFD_FEATURE_EVENT_FORK and a server that answers in
 * the middle of fork), which is the dangerous state again.  The child attaches for
 * itself; one made by a raw clone() has nothing mapped there and faults.
 */
#include "internal.h"

#include <errno.h>
#include <sys/mman.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

static int flags_of(bool writable)
{
	return (writable ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE | MAP_FIXED;
}

static int prot_of(bool writable)
{
	return writable ? PROT_READ | PROT_WRITE : PROT_READ;
}

int window_reserve(char *start, size_t size)
{
	char *got = raw_mmap(start, size, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1,
			     0);

	if (got == MAP_FAILED)
		return errno == EEXIST ? 1 : -1;
	if (got != start) { /* a kernel before 4.17 took the address for a hint */
		raw_munmap(got, size);
		return 1;
	}
	return 0;
}

/* A daemon that has come meanwhile has told nobody: ask. */
int window_ready(struct attachment *attachment, uint32_t flags)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_READY };
	struct mshare_wire_reply reply;
	int ignored;

	if (!(flags & MSHARE_WIRE_PROTECTED) && connection_noted(attachment->connection) == 0)
		return 0;
	return attachment_call(attachment, &request, NULL, NULL, 0, &reply, &ignored);
}

int window_map(struct attachment *attachment, uint32_t flags)
{
	char *start = attachment->start;
	size_t size = attachment->size;
	bool writable = attachment->writable;

	if (raw_mmap(start, size, PROT_NONE, flags_of(writable), attachment->backing, 0) ==
	    MAP_FAILED)
		return -1;
	if (raw_madvise(start, size, MADV_DONTFORK) < 0)
		return -1;
	if (uffd_register(attachment->uffd, start, size, UFFD_MISSING) < 0)
		return -1;
	if (window_ready(attachment, flags) < 0)
		return -1;
	return raw_mprotect(start, size, prot_of(writable));
}

/*
 * Other threads may be using the range, so the window cannot be PROT_NONE at first,
 * and not for an instant may it be there unguarded.  So it is made elsewhere,
 * registered, and moved to its place: mremap() replaces what is there in one step,
 * and the registration moves with it because the daemon has asked for
 * UFFD_EVENT_REMAP (fs/userfaultfd.c drops it otherwise), which it reads.
 *
 * Not for huge pages: the kernel's mremap() of a populated shared hugetlb mapping waits
 * for a lock that it holds itself (move_hugetlb_page_tables(), huge_pmd_share(); seen on
 * Linux 6.18), for ever, and with it whoever uses the file.
 *
 * mremap() moves one VMA, and what is to be write-protected cannot be told apart
 * yet: so the whole window is registered for that, if any of it is.
 */
int window_replace(char *room, char *start, size_t size, int backing, int uffd, bool writable,
		   bool protect)
{
	if (raw_mmap(room, size, prot_of(writable), flags_of(writable), backing, 0) == MAP_FAILED)
		return -1;
	if (raw_madvise(room, size, MADV_DONTFORK) < 0)
		return -1;
	if (uffd_register(uffd, room, size,
			  UFFD_MISSING | (protect && writable ? UFFD_WRITE_PROTECT : 0)) < 0)
		return -1;
	return raw_mremap(room, size, start);
}

static char *reserve_anywhere(size_t size)
{
	char *got = raw_mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
			     0);

	return got == MAP_FAILED ? NULL : got;
}

/* Had before anything is copied: what limits it (setrlimit(2), vm.max_map_count) tells so now. */
char *window_room(char *start, size_t size)
{
	char *room = reserve_anywhere(size), *other;

	if (!room || room + size <= start || start + size <= room)
		return room;
	/* In a part of the range that is not mapped: mremap() wants no overlap. */
	other = reserve_anywhere(size);
	raw_munmap(room, size);
	return other;
}
