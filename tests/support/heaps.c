/*
 * heaps REGION: allocate and free in a region's heap, as fast as that goes, and say
 * what is wrong.  Whoever starts it kills it.
 *
 * Each piece is filled with a number of its own: one that is given out twice is found.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mshare.h"

#define PIECES 16

static void fail(const char *what)
{
	fprintf(stderr, "%d: %s: %s (%s)\n", getpid(), what, strerror(errno), mshare_reason());
	exit(1);
}

static void check(const uint64_t *piece, size_t words, uint64_t mark)
{
	if (piece[0] != mark || piece[words / 2] != mark || piece[words - 1] != mark) {
		errno = 0;
		fail("a piece is somebody else's, too");
	}
}

int main(int argc, char **argv)
{
	struct mshare_request request = { .name = argv[1], .oflags = O_RDWR };
	struct mshare_region region;
	uint64_t *pieces[PIECES] = { 0 }, marks[PIECES], mark = (uint64_t)getpid() << 32;
	size_t words[PIECES];
	long long *count;
	unsigned dice = (unsigned)getpid();
	void *lock;

	if (argc != 2)
		return 2;
	if (mshare_open(&request, &region) < 0)
		fail("mshare_open");
	lock = mshare_named(&region, "lock", MSHARE_LOCK, 0, -1);
	count = mshare_named(&region, "count", MSHARE_INTEGER, 0, -1);
	if (!lock || !count)
		fail("mshare_named");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int which = rand_r(&dice) % PIECES;

		if (pieces[which]) {
			check(pieces[which], words[which], marks[which]);
			if (mshare_free(&region, pieces[which], -1) < 0)
				fail("mshare_free");
			pieces[which] = NULL;
			continue;
		}
		/* Most are small, so that most of the time is the heap's. */
		words[which] = rand_r(&dice) % 8 ? 1 + (size_t)rand_r(&dice) % 500 :
						   1 + (size_t)rand_r(&dice) % 5000;
		pieces[which] = mshare_alloc(&region, words[which] * 8, 1 << rand_r(&dice) % 13, -1);
		if (!pieces[which] && errno == ENOMEM)
			continue;
		if (!pieces[which])
			fail("mshare_alloc");
		marks[which] = ++mark;
		pieces[which][0] = pieces[which][words[which] / 2] =
			pieces[which][words[which] - 1] = mark;
		/* What the lock guards: two halves that are the same, but while it is held. */
		if (mshare_lock(lock, -1, NULL) < 0) {
			if (errno != EOWNERDEAD)
				fail("mshare_lock");
			mshare_repaired(lock);
		}
		__atomic_store_n(count, *count + 1, __ATOMIC_RELAXED);
		if (mshare_unlock(lock) < 0)
			fail("mshare_unlock");
	}
}
