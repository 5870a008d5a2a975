/* SPDX-License-Identifier: MIT */
/*
 * A heap in a region: memory for all that map it, given out in pieces.
 *
 * What is to be done is written down before, under the heap's robust lock; it can be done
 * again, and the next one who has the lock does so with what somebody killed has left.  So
 * a heap is whole for whoever is in it, and a piece is in use, or free, and nothing between.
 */
#include "heap.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAGIC 0x3150414548534d00ull /* "\0MSHEAP1" */
#define PART 4096ull                /* parts begin at multiples of it, for any page size a multiple */
#define WORTH_IT ((size_t)1 << 20)  /* of so many bytes the memory is given back at once */

static uint64_t round_up(uint64_t value, uint64_t to)
{
	return (value + to - 1) & ~(to - 1);
}

static unsigned levels_of(uint32_t units)
{
	unsigned levels = 0;

	while (((uint64_t)1 << levels) < units)
		levels++;
	return levels;
}

#define NAMES_AT PART
#define SPACES_AT (NAMES_AT + HEAP_NAMES * sizeof(struct named))

static uint64_t pieces_at(uint32_t units)
{
	uint64_t nodes = ((uint64_t)1 << levels_of(units)) + units;

	return SPACES_AT + round_up(nodes * sizeof(struct space), PART);
}

static uint64_t data_at(uint32_t units)
{
	return pieces_at(units) + round_up(units * sizeof(uint32_t), PART);
}

/* As many units as fit. */
static uint32_t units_of(uint64_t length)
{
	uint64_t low = 0, high = length / HEAP_UNIT < INT32_MAX ? length / HEAP_UNIT : INT32_MAX;

	while (low < high) {
		uint64_t middle = (low + high + 1) / 2;

		if (data_at((uint32_t)middle) + middle * HEAP_UNIT <= length)
			low = middle;
		else
			high = middle - 1;
	}
	return (uint32_t)low;
}

static int view(const struct mshare_region *region, struct heap *heap)
{
	char *start = (char *)region->start;
	uint32_t units;

	if (!region->held) {
		errno = EINVAL;
		return -1;
	}
	if (!region->writable) {
		reason_say("the region is attached read-only: its heap and locks want to be written");
		errno = EACCES;
		return -1;
	}
	units = units_of(region->length);
	if (units == 0) {
		reason_say("the region is too small for a heap: it takes 160 KiB and more");
		errno = EINVAL;
		return -1;
	}
	*heap = (struct heap){
		.header = (struct header *)start,
		.names = (struct named *)(start + NAMES_AT),
		.spaces = (struct space *)(start + SPACES_AT),
		.pieces = (uint32_t *)(start + pieces_at(units)),
		.data = start + data_at(units),
		.units = units,
		.levels = levels_of(units),
	};
	return 0;
}

static int unclean(void)
{
	reason_say("the heap's state in the region has been overwritten");
	errno = EUCLEAN;
	return -1;
}

static int check_header(const struct heap *heap, const struct mshare_region *region)
{
	const struct header *header = heap->header;

	if (__atomic_load_n(&header->magic, __ATOMIC_ACQUIRE) != MAGIC) {
		reason_say("the region has no heap: it was not made with one");
		errno = EINVAL;
		return -1;
	}
	if (header->length != region->length || header->unit != HEAP_UNIT ||
	    header->units != heap->units)
		return unclean();
	return 0;
}

/*
 * Zeros are a heap but for what is written here: the same by whoever does it, and as often,
 * so that one who is killed, or two at the same time, do no harm.
 */
MSHARE_EXPORT int mshare_heap(const struct mshare_region *region)
{
	static const struct header zeros;
	struct heap heap;

	reason_forget();
	if (view(region, &heap) < 0)
		return -1;
	if (__atomic_load_n(&heap.header->magic, __ATOMIC_ACQUIRE) == MAGIC)
		return check_header(&heap, region);
	if (heap.header->magic != 0 || heap.header->change != NOTHING ||
	    (memcmp(heap.header, &zeros, sizeof zeros) != 0 &&
	     heap.header->length != region->length)) {
		reason_say("there is something else in the region than a heap");
		errno = EEXIST;
		return -1;
	}
	heap.header->length = region->length;
	heap.header->unit = HEAP_UNIT;
	heap.header->units = heap.units;
	robust_make(&heap.header->lock);
	__atomic_store_n(&heap.header->magic, MAGIC, __ATOMIC_RELEASE);
	return 0;
}

/* Read once: it may be another number the next time. */
static uint32_t load(const uint32_t *at)
{
	return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

/* Do what is written down, be it for the first time or not. */
static int carry_out(struct heap *heap)
{
	struct header *header = heap->header;
	uint32_t change = load(&header->change);
	uint32_t start = load(&header->start), count = load(&header->count);
	bool take = change == TAKE;

	if (change != TAKE && change != GIVE_BACK)
		return unclean();
	if (count == 0 || start >= heap->units || count > heap->units - start)
		return unclean();
	if (space_set(heap, start, count, take) < 0)
		return -1;
	__atomic_store_n(&heap->pieces[start], take ? count : 0, __ATOMIC_RELEASE);
	__atomic_store_n(&header->used, header->used_then, __ATOMIC_RELEASE);
	__atomic_store_n(&header->pieces, header->pieces_then, __ATOMIC_RELEASE);
	__atomic_store_n(&header->change, NOTHING, __ATOMIC_RELEASE);
	return 0;
}

static int change(struct heap *heap, enum change what, uint32_t start, uint32_t count)
{
	struct header *header = heap->header;

	header->start = start;
	header->count = count;
	header->used_then = what == TAKE ? header->used + count : header->used - count;
	header->pieces_then = what == TAKE ? header->pieces + 1 : header->pieces - 1;
	__atomic_store_n(&header->change, what, __ATOMIC_RELEASE);
	return carry_out(heap);
}

int heap_enter(const struct mshare_region *region, int wait, struct heap *heap)
{
	bool died;

	reason_forget();
	if (view(region, heap) < 0 || check_header(heap, region) < 0 ||
	    robust_lock(&heap->header->lock, wait, &died) < 0)
		return -1;
	heap->header->lock.abandoned = 0; /* all that may be half done is written down */
	if (load(&heap->header->change) != NOTHING && carry_out(heap) < 0) {
		heap_leave(heap);
		return -1;
	}
	return 0;
}

void heap_leave(struct heap *heap)
{
	int saved = errno;

	robust_unlock(&heap->header->lock);
	errno = saved;
}

/* The units of a piece that begins at that address, under the lock; or 0 with errno. */
static uint32_t piece_at(const struct heap *heap, const void *memory, uint32_t *start)
{
	uintptr_t offset = (uintptr_t)memory - (uintptr_t)heap->data;
	uint32_t count;

	if ((uintptr_t)memory < (uintptr_t)heap->data || offset % HEAP_UNIT ||
	    offset / HEAP_UNIT >= heap->units) {
		reason_say("no piece of the heap begins there");
		errno = EINVAL;
		return 0;
	}
	*start = (uint32_t)(offset / HEAP_UNIT);
	count = load(&heap->pieces[*start]);
	if (count == 0) {
		reason_say("no piece of the heap begins there; it may have been freed before");
		errno = EINVAL;
	} else if (count > heap->units - *start) {
		unclean();
		count = 0;
	}
	return count;
}

MSHARE_EXPORT void *mshare_alloc(const struct mshare_region *region, size_t size, size_t alignment,
				 int wait)
{
	uint32_t start = 0, skipped;
	uint64_t count, more;
	struct heap heap;
	void *memory = NULL;

	reason_forget();
	if (alignment & (alignment - 1)) {
		reason_say("an alignment is a power of two");
		errno = EINVAL;
		return NULL;
	}
	if (heap_enter(region, wait, &heap) < 0)
		return NULL;
	count = size / HEAP_UNIT + (size % HEAP_UNIT || size == 0);
	more = alignment > HEAP_UNIT ? alignment / HEAP_UNIT - 1 : 0;
	if (count > heap.units || more > heap.units || count + more > heap.units) {
		reason_say("the heap is smaller than that");
		errno = ENOMEM;
	} else if (space_find(&heap, (uint32_t)(count + more), &start) == 0) {
		uintptr_t at = (uintptr_t)heap.data + (uintptr_t)start * HEAP_UNIT;

		skipped = alignment > HEAP_UNIT ?
				  (uint32_t)((round_up(at, alignment) - at) / HEAP_UNIT) :
				  0;
		start += skipped;
		if (start >= heap.units || count > heap.units - start || heap.pieces[start] != 0)
			unclean();
		else if (change(&heap, TAKE, start, (uint32_t)count) == 0)
			memory = heap.data + (size_t)start * HEAP_UNIT;
	}
	heap_leave(&heap);
	return memory;
}

/* The memory of whole pages goes back, and zeros come; that it cannot is no harm. */
static void give_memory_back(char *start, size_t length)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	char *first = (char *)round_up((uintptr_t)start, page);
	char *end = (char *)((uintptr_t)(start + length) & ~(page - 1));
	int saved = errno;

	if (first < end)
		mshare_mmap(first, (size_t)(end - first), PROT_READ | PROT_WRITE,
			    MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	reason_forget();
	errno = saved;
}

MSHARE_EXPORT int mshare_free(const struct mshare_region *region, void *memory, int wait)
{
	uint32_t start, count;
	struct heap heap;
	int result = -1;

	if (!memory)
		return 0;
	if (heap_enter(region, wait, &heap) < 0)
		return -1;
	count = piece_at(&heap, memory, &start);
	if (count && (size_t)count * HEAP_UNIT >= WORTH_IT) {
		/* It is the caller's until it is free; and the daemon is not asked in the lock. */
		heap_leave(&heap);
		give_memory_back(memory, (size_t)count * HEAP_UNIT);
		if (heap_enter(region, wait, &heap) < 0)
			return -1;
		count = piece_at(&heap, memory, &start);
	}
	if (count)
		result = change(&heap, GIVE_BACK, start, count);
	heap_leave(&heap);
	return result;
}

struct tally {
	const struct heap *heap;
	uint64_t used, pieces;
};

/* What is in use is pieces, one after the other, and what is free has none. */
static int check_run(void *context, uint32_t start, uint32_t count, bool used)
{
	struct tally *tally = context;
	uint32_t next = start;

	for (uint32_t at = start; at < start + count; at++) {
		uint32_t piece = load(&tally->heap->pieces[at]);

		if ((piece != 0) != (used && at == next))
			return unclean();
		if (piece > start + count - at)
			return unclean();
		next += piece;
		tally->pieces += piece != 0;
	}
	tally->used += used ? count : 0;
	return 0;
}

MSHARE_EXPORT int mshare_heap_check(const struct mshare_region *region,
				    struct mshare_heap_info *info, int wait)
{
	struct tally tally = { 0 };
	struct heap heap;
	int result;

	if (heap_enter(region, wait, &heap) < 0)
		return -1;
	tally.heap = &heap;
	result = space_walk(&heap, check_run, &tally);
	if (result == 0 &&
	    (tally.used != heap.header->used || tally.pieces != heap.header->pieces))
		result = unclean();
	if (info)
		*info = (struct mshare_heap_info){
			.size = (uint64_t)heap.units * HEAP_UNIT,
			.used = tally.used * HEAP_UNIT,
			.pieces = tally.pieces,
			.largest = (uint64_t)space_longest(&heap) * HEAP_UNIT,
		};
	heap_leave(&heap);
	return result;
}

static uint32_t hash(const char *name)
{
	uint32_t value = 2166136261u; /* FNV-1a */

	for (; *name; name++)
		value = (value ^ (unsigned char)*name) * 16777619u;
	return value;
}

static void make(struct named *named, const char *name, uint32_t kind, int64_t value)
{
	memset(named, 0, sizeof *named);
	strcpy(named->name, name);
	if (kind == MSHARE_LOCK)
		robust_make(&named->is.lock);
	else if (kind == MSHARE_SEMAPHORE)
		named->is.semaphore = (uint32_t)value;
	else
		named->is.integer = value;
	/* Who is killed before this has made nothing. */
	__atomic_store_n(&named->kind, kind, __ATOMIC_RELEASE);
}

MSHARE_EXPORT void *mshare_named(const struct mshare_region *region, const char *name,
				 enum mshare_kind kind, long long value, int wait)
{
	struct named *named = NULL;
	struct heap heap;
	uint32_t first;

	reason_forget();
	if (!*name || strlen(name) > HEAP_NAME_MAX) {
		reason_say("a name in a region has 1 to 55 bytes");
		errno = *name ? ENAMETOOLONG : EINVAL;
		return NULL;
	}
	if ((kind != MSHARE_LOCK && kind != MSHARE_SEMAPHORE && kind != MSHARE_INTEGER) ||
	    (kind == MSHARE_SEMAPHORE && (value < 0 || value > INT32_MAX))) {
		errno = EINVAL;
		return NULL;
	}
	if (heap_enter(region, wait, &heap) < 0)
		return NULL;
	first = hash(name);
	errno = ENOSPC;
	for (uint32_t tries = 0; tries < HEAP_NAMES; tries++) {
		struct named *each = &heap.names[(first + tries) % HEAP_NAMES];

		if (load(&each->kind) == 0)
			make(each, name, kind, value);
		else if (strncmp(each->name, name, sizeof each->name) != 0)
			continue;
		if (load(&each->kind) == kind) {
			named = each;
		} else {
			reason_say("something of another kind has that name");
			errno = EEXIST;
		}
		break;
	}
	heap_leave(&heap);
	if (!named && errno == ENOSPC)
		reason_say("the region has 1024 names already");
	return named ? &named->is : NULL;
}
