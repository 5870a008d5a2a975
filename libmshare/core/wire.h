/* SPDX-License-Identifier: MIT */
/*
 * wire.h - what goes over .control, the one place where it is written down.
 *
 * SOCK_SEQPACKET: one message is one call, one message its reply, and
 * descriptors travel with their message (SCM_RIGHTS).  A connection attaches one
 * region; its end is the end of the sharer.  Both ends are on one machine, so
 * integers have its byte order.  msharefsd/control/wire.py mirrors it, and
 * tests/control/test_wire.py compares the two.
 */
#ifndef MSHARE_WIRE_H
#define MSHARE_WIRE_H

#include <stdint.h>

#define MSHARE_WIRE_MAGIC 0x4d534852u /* "MSHR", the patches' super block magic */
#define MSHARE_WIRE_VERSION 3
#define MSHARE_WIRE_MAX_OBJECTS 1024

enum mshare_wire_op {
	/*
	 * fds: proof of the right to attach, then the sharer's new userfaultfd.
	 * The proof is a descriptor of the region's file, as the kernel opened it,
	 * or of its backing, which only sharers have (a child after fork).
	 * Reply fd: the backing.
	 */
	MSHARE_WIRE_ATTACH = 1,
	/*
	 * The donor has copied its memory: these are the region's objects.
	 * Reply fd: the backing, read-only, if the region is.
	 */
	MSHARE_WIRE_COMMIT = 2,
	/* The window is unmapped; or before COMMIT: there will be none. */
	MSHARE_WIRE_DETACH = 3,
	/* The same, and the name goes with the last sharer. */
	MSHARE_WIRE_UNLINK = 4,
	/*
	 * fd: proof of the right to a region, as with ATTACH.  Reply fd: /dev/userfaultfd,
	 * for who may not open it.
	 */
	MSHARE_WIRE_USERFAULTFD = 5,
	/*
	 * start, size: a shared anonymous VMA of the caller.  Reply fd: its memory,
	 * read-only, so that SEEK_DATA tells which pages exist.
	 */
	MSHARE_WIRE_VMA_FILE = 6,
	/*
	 * The window is mapped and registered, and not open yet: protect in it what is
	 * protected.  Needed if a reply to ATTACH or COMMIT said PROTECTED, or a NOTE
	 * has come.
	 */
	MSHARE_WIRE_READY = 7,
	/*
	 * The calls of their names, on one object.  MMAP: flags are those of mmap(2);
	 * fd: the file, unless MAP_ANONYMOUS.  MSYNC: what MS_SYNC does.  DISCARD: what
	 * MADV_DONTNEED does to private memory.
	 */
	MSHARE_WIRE_MMAP = 8,
	MSHARE_WIRE_MUNMAP = 9,
	MSHARE_WIRE_MPROTECT = 10,
	MSHARE_WIRE_MSYNC = 11,
	MSHARE_WIRE_DISCARD = 12,
	/*
	 * size: so many bytes of memory are about to be donated.  Fails with ENOMEM if
	 * it can be known that they cannot be had.
	 */
	MSHARE_WIRE_NEED = 13,
	/*
	 * On a new connection, after the daemon has died: go on with this process's
	 * attachment.  fd: the backing.  ESTALE: there is none any more.
	 */
	MSHARE_WIRE_REJOIN = 14,
	/*
	 * On one object, which is mapped there in place of what is: its contents will be
	 * brought, and who touches it waits for them.  flags: MAP_SHARED or MAP_PRIVATE.
	 */
	MSHARE_WIRE_AWAIT = 15,
	/*
	 * The range of one object is brought.  fd: a memfd that has the contents, from its
	 * first byte on.  What is not awaited is left as it is.  Reply: WANTED.  Of length 0
	 * and without a memfd: more will be brought, and this process is still at it.
	 */
	MSHARE_WIRE_FILL = 16,
};

/* The op of a message that answers no call: see READY. */
#define MSHARE_WIRE_NOTE 0x4e

/* Request flags */
#define MSHARE_WIRE_HAS_MAPPINGS 1u /* ATTACH: the caller has mappings in the range */
#define MSHARE_WIRE_MADE_FILE 2u    /* ATTACH: the caller has just created the file */
#define MSHARE_WIRE_AS_IT_LIES 4u   /* ATTACH: whatever range the region has */
#define MSHARE_WIRE_REPEATED 8u     /* ATTACH: one before may have been done; its answer was lost */
/* ATTACH: if it makes the region, anonymous memory is mapped there: as much as was wanted */
#define MSHARE_WIRE_ZEROS 16u

/* Reply flags */
#define MSHARE_WIRE_CREATED 1u        /* ATTACH: this call gave the region its range */
#define MSHARE_WIRE_DONATE 2u         /* ATTACH: copy your memory, then COMMIT */
#define MSHARE_WIRE_USER_MODE_ONLY 4u /* USERFAULTFD: none to be had; user-mode faults only */
#define MSHARE_WIRE_PROTECTED 8u      /* ATTACH, COMMIT: ask READY before opening the window */
#define MSHARE_WIRE_WANTED 16u /* FILL: somebody waits for what is to come at the offset `start` */

/* What holds the pages of a region that ATTACH creates */
#define MSHARE_WIRE_BACKING_DEFAULT 0u /* what the daemon is set to */
#define MSHARE_WIRE_BACKING_SHM 1u
#define MSHARE_WIRE_BACKING_HUGETLB 2u

struct mshare_wire_request {
	uint32_t magic;
	uint16_t version;
	uint16_t op;
	uint64_t start;
	uint64_t size;
	uint32_t oflags;
	uint32_t flags;
	uint32_t object_count; /* that many objects follow */
	uint32_t backing;      /* ATTACH: MSHARE_WIRE_BACKING_*; else zero */
	uint32_t sequence;     /* a call's number; it is done once, however often it comes */
	uint32_t userfaultfd;  /* ATTACH: its number here, for a daemon to come */
};

struct mshare_wire_object {
	uint64_t offset; /* from the region's start */
	uint64_t length;
	uint64_t file_offset; /* of its first byte, if it is of a file */
	uint32_t prot;        /* PROT_* */
	uint32_t flags;       /* MAP_* */
};

struct mshare_wire_reply {
	uint32_t magic;
	uint16_t version;
	uint16_t op;
	int32_t error; /* 0 or an errno */
	uint32_t flags;
	uint64_t start;
	uint64_t size;
	char message[96]; /* what is wrong and what to do, for people; or the details */
};

/* In place of a message in what ATTACH is answered with; zeros: an older daemon does not tell. */
struct mshare_wire_details {
	uint64_t length; /* bytes that its creator wanted, if it left the place to the daemon */
	unsigned char identity[16];
};

#endif
