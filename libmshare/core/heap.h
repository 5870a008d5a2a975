/* SPDX-License-Identifier: MIT */
/*
 * heap.h - where the parts of a heap lie in a region, and who may change them.
 *
 * A region that is a heap begins with a header, then come the named objects, a tree that
 * tells which units are free (space.c), a table of the pieces that are in use, and the units
 * that are given out.  Where each lies follows from the region's length alone.
 *
 * Everything in a region may have been overwritten by anyone who maps it.  So nothing that
 * is read there is an address, and every number is checked before it is used: EUCLEAN.
 */
#ifndef MSHARE_HEAP_H
#define MSHARE_HEAP_H

#include "internal.h"

#define HEAP_UNIT 1024u /* bytes */
#define HEAP_NAMES 1024u
#define HEAP_NAME_MAX 55u /* bytes */

/* A pthread_mutex_t that is robust, and what it lacks. */
struct robust {
	pthread_mutex_t mutex;
	uint32_t abandoned; /* its owner died, and nobody has said that all is well again */
};

/* An object with a name.  Once it has a kind it never changes nor goes. */
struct named {
	uint32_t kind; /* enum mshare_kind; 0: free */
	char name[HEAP_NAME_MAX + 1];
	union {
		struct robust lock;
		uint32_t semaphore;
		int64_t integer;
		char room[64];
	} is;
};
_Static_assert(sizeof(struct named) == 128, "the same in every version");

enum change { NOTHING, TAKE, GIVE_BACK };

struct header {
	uint64_t magic; /* last: it is a heap */
	uint64_t length;
	uint32_t unit, units;
	struct robust lock; /* of all that follows, but for the objects' own */
	/* What is being done.  Done once more, or to its end by somebody else, it is the same. */
	uint32_t change, start, count, used_then, pieces_then;
	uint32_t used, pieces; /* in units */
};

/* What is free of a node's units; all zeros: every one is. */
struct space {
	uint32_t head, tail, best; /* the units that its first, last and longest free run lacks */
};

/* A view of a heap, of this process alone. */
struct heap {
	struct header *header;
	struct named *names;
	struct space *spaces; /* node 1 is the root, 2n and 2n + 1 the halves of n */
	uint32_t *pieces;     /* of the unit where a piece begins: its units; else 0 */
	char *data;
	uint32_t units;
	unsigned levels; /* of the tree, below its root */
};

/* sync.c */
/* An unlocked one, in memory that is zeros, or has been made so before: it harms no owner. */
void robust_make(struct robust *robust);
/*
 * 0, or -1 with errno and without the lock: ETIMEDOUT, EDEADLK, EUCLEAN.  *died: it is had,
 * and who had it before died.  wait: milliseconds, or -1.
 */
int robust_lock(struct robust *robust, int wait, bool *died);
/* 0, or -1 with EPERM (it is not this thread's) or EUCLEAN. */
int robust_unlock(struct robust *robust);

/* heap.c */
/* Have the heap alone; what somebody left half done is done.  -1 with errno. */
int heap_enter(const struct mshare_region *region, int wait, struct heap *heap);
void heap_leave(struct heap *heap);

/* space.c */
/* How many units from `start` on one node at that level has; 0 beyond the end. */
uint32_t space_size(const struct heap *heap, uint32_t start, unsigned level);
/* The first free run of so many units: 0, or -1 with ENOMEM or EUCLEAN. */
int space_find(const struct heap *heap, uint32_t count, uint32_t *start);
/* Have [start, start + count) in use, or free.  May be repeated.  -1 with EUCLEAN. */
int space_set(struct heap *heap, uint32_t start, uint32_t count, bool used);
/* The longest free run, in units. */
uint32_t space_longest(const struct heap *heap);
/* Call for each run that is in use or free, from the first on.  -1 with EUCLEAN, or what it gives. */
typedef int (*space_run)(void *context, uint32_t start, uint32_t count, bool used);
int space_walk(const struct heap *heap, space_run run, void *context);

#endif
