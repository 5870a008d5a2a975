/*
 * killed SEED: a heap whose user is killed at every store there is, one after the other.
 *
 * The heap's own sources, with stores that are counted and locks that are none: at the
 * n-th store the call is left for good.  The next one has to find a whole heap, in which
 * what was under way is done or is not, and nothing else has changed.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static long stores_left = -1; /* -1: without end */
static jmp_buf killed;

static void store(void)
{
	if (stores_left >= 0 && stores_left-- == 0)
		longjmp(killed, 1);
}

#define __atomic_store_n(at, value, order) (store(), (void)(*(at) = (value)))
#include "../../libmshare/core/heap.c"
#define unclean unclean_space
#include "../../libmshare/core/space.c"

void reason_forget(void)
{
}

void reason_say(const char *text)
{
	(void)text;
}

void robust_make(struct robust *robust)
{
	(void)robust;
}

int robust_lock(struct robust *robust, int wait, bool *died)
{
	(void)robust, (void)wait;
	*died = false;
	return 0;
}

int robust_unlock(struct robust *robust)
{
	(void)robust;
	return 0;
}

void *mshare_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	(void)length, (void)prot, (void)flags, (void)fd, (void)offset;
	return addr;
}

#define PIECES 40
#define LENGTH (1 << 20)

static struct mshare_region region;
static void *pieces[PIECES];

static void fail(const char *what, long at)
{
	printf("%s, killed at store %ld: errno %d\n", what, at, errno);
	exit(1);
}

static struct mshare_heap_info look(long at)
{
	struct mshare_heap_info info;

	if (mshare_heap_check(&region, &info, 0) < 0)
		fail("the heap is not whole", at);
	return info;
}

static size_t count(void)
{
	size_t found = 0;

	for (int i = 0; i < PIECES; i++)
		found += pieces[i] != NULL;
	return found;
}

/* A call, killed at the n-th store: whether it came to its end before. */
static bool one(void **piece, size_t size, size_t alignment, long n)
{
	void *volatile got = NULL;

	stores_left = n;
	if (setjmp(killed)) {
		stores_left = -1;
		return false;
	}
	if (*piece)
		mshare_free(&region, *piece, 0);
	else
		got = mshare_alloc(&region, size, alignment, 0);
	stores_left = -1;
	*piece = got;
	return true;
}

int main(int argc, char **argv)
{
	static char before[LENGTH];
	char *memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	long points = 0;

	srand(argc > 1 ? (unsigned)atoi(argv[1]) : 1);
	region = (struct mshare_region){
		.start = (uintptr_t)memory, .length = LENGTH, .held = 1, .writable = 1
	};
	if (mshare_heap(&region) < 0)
		fail("mshare_heap", -1);
	for (int round = 0; round < 250; round++) {
		int which = rand() % PIECES;
		size_t size = (size_t)(rand() % (rand() % 4 ? 5000 : 200000));
		size_t alignment = (size_t)1 << rand() % 14, had = count();
		void *piece = pieces[which];
		long n = 0;

		memcpy(before, memory, LENGTH);
		/* Each store in turn, from the same beginning; then to the end. */
		for (;; n++) {
			struct mshare_heap_info info;
			bool ended;

			memcpy(memory, before, LENGTH);
			pieces[which] = piece;
			ended = one(&pieces[which], size, alignment, n);
			info = look(n);
			if (ended && info.pieces != count())
				fail("not what was asked for", n);
			if (info.pieces != had && info.pieces != (piece ? had - 1 : had + 1))
				fail("neither done nor not done", n);
			if (ended)
				break;
		}
		points += n;
	}
	printf("%ld\n", points);
	return points > 1000 ? 0 : 1;
}
