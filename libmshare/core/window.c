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
 * MADV_DONTFORK: a child inherits no window, attaches for itself, and its parent's
 * fork() waits for nobody.  One made by a raw clone() has nothing mapped there and
 * faults.  Where a program has undone that (MADV_DOFORK), the daemon has seen to it that
 * the registration is inherited, too, if it may (UFFD_FEATURE_EVENT_FORK: the fork
 * then waits for the daemon); and a child of fork() unmaps what it has inherited.
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

int window_take_away(char *start, size_t size)
{
	return raw_mmap(start, size, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
			0) == MAP_FAILED ?
		       -1 :
		       0;
}

/* A daemon that has come meanwhile has told nobody: ask. */
int window_ready(struct attachment *attachment, uint32_t flags)
{
	struct mshare_wire_request request = { .op = MSHARE_WIRE_READY };
	struct mshare_wire_reply reply;
	int ignored;

	if (!(flags & MSHARE_WIRE_PROTECTED) && connection_noted(attachment->connection.fd) == 0)
		return 0;
	return attachment_call(attachment, &request, NULL, NULL, 0, &reply, &ignored);
}

/*
 * It is about this process's window alone, and splits it, which nothing minds.  A child has
 * a window of its own, where what lies between two such parts is not dumped either.
 */
int window_dump(struct attachment *attachment, char *start, size_t length, int advice)
{
	char *end = start + length;

	if (raw_madvise(start, length, advice) < 0)
		return -1;
	if (advice == MADV_DODUMP) {
		if (start <= attachment->undumped && end >= attachment->undumped_end)
			attachment->undumped = attachment->undumped_end = NULL;
	} else if (!attachment->undumped_end) {
		attachment->undumped = start;
		attachment->undumped_end = end;
	} else {
		if (start < attachment->undumped)
			attachment->undumped = start;
		if (end > attachment->undumped_end)
			attachment->undumped_end = end;
	}
	return 0;
}

int window_map(struct attachment *attachment, uint32_t flags)
{
	char *start = attachment->start;
	size_t size = attachment->size;
	bool writable = attachment->writable;

	if (raw_mmap(start, size, PROT_NONE, flags_of(writable), attachment->backing.fd, 0) ==
	    MAP_FAILED)
		return -1;
	if (raw_madvise(start, size, MADV_DONTFORK) < 0)
		return -1;
	if (attachment->undumped_end &&
	    raw_madvise(attachment->undumped,
			(size_t)(attachment->undumped_end - attachment->undumped),
			MADV_DONTDUMP) < 0)
		return -1;
	if (uffd_register(attachment->uffd.fd, start, size, UFFD_MISSING) < 0)
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
	if (raw_mmap(room, size, PROT_NONE, flags_of(writable), backing, 0) == MAP_FAILED)
		return -1;
	if (raw_madvise(room, size, MADV_DONTFORK) < 0)
		return -1;
	if (uffd_register(uffd, room, size,
			  UFFD_MISSING | (protect && writable ? UFFD_WRITE_PROTECT : 0)) < 0)
		return -1;
	/* Not before: another thread may fork meanwhile. */
	if (raw_mprotect(room, size, prot_of(writable)) < 0)
		return -1;
	return raw_mremap(room, size, start);
}

static char *map_anywhere(size_t size, int prot)
{
	char *got = raw_mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return got == MAP_FAILED ? NULL : got;
}

void *memory_outside(const char *start, size_t size, size_t length, int prot)
{
	char *room = map_anywhere(length, prot), *wide, *other;

	if (!room || room + length <= start || start + size <= room)
		return room;
	/* In a part of the range where nothing is mapped: so much sticks out at one end. */
	wide = map_anywhere(length + size + length, prot);
	raw_munmap(room, length);
	if (!wide)
		return NULL;
	other = wide + length <= start ? wide : wide + length + size;
	if (other != wide)
		raw_munmap(wide, length + size);
	else
		raw_munmap(wide + length, size + length);
	return other;
}

/* Had before anything is copied: what limits it (setrlimit(2), vm.max_map_count) tells so now. */
char *window_room(char *start, size_t size)
{
	return memory_outside(start, size, size, PROT_NONE);
}
