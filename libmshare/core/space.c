/* SPDX-License-Identifier: MIT */
/*
 * Which units of a heap are free: a binary tree of numbers, and no pointers.
 *
 * A node knows of its units the free run at their begin, at their end, and the longest.  If
 * all of them are free, or none is, the node says all there is to say, and what lies below it
 * means nothing.  Zeros are a tree of free units, so a heap needs no beginning, and the parts
 * of the tree that nobody used take no memory.
 *
 * space_set() may be killed at any store.  What is below a node is whole before the node is
 * written, and `best`, which alone tells whether the lower nodes count, is written last: the
 * same call once more finds what it needs, and leaves what it would have left.
 */
#include "heap.h"

#include <errno.h>

/* Stores stay in the order in which they stand here: a process may be killed between two. */
static void put(uint32_t *at, uint32_t value)
{
	__atomic_store_n(at, value, __ATOMIC_RELEASE);
}

static void put_space(struct space *space, uint32_t head, uint32_t tail, uint32_t best)
{
	put(&space->head, head);
	put(&space->tail, tail);
	put(&space->best, best);
}

static int unclean(void)
{
	reason_say("the heap's state in the region has been overwritten");
	errno = EUCLEAN;
	return -1;
}

uint32_t space_size(const struct heap *heap, uint32_t start, unsigned level)
{
	uint64_t whole = (uint64_t)1 << (heap->levels - level);

	if (start >= heap->units)
		return 0;
	return whole < heap->units - start ? (uint32_t)whole : heap->units - start;
}

/* The runs of a node, read once, in units.  -1 with EUCLEAN. */
static int get(const struct heap *heap, uint64_t node, uint32_t size, struct space *runs)
{
	struct space lacks;

	*runs = (struct space){ 0 };
	if (size == 0) /* it is no node */
		return 0;
	lacks.head = __atomic_load_n(&heap->spaces[node].head, __ATOMIC_ACQUIRE);
	lacks.tail = __atomic_load_n(&heap->spaces[node].tail, __ATOMIC_ACQUIRE);
	lacks.best = __atomic_load_n(&heap->spaces[node].best, __ATOMIC_ACQUIRE);
	if (lacks.head > size || lacks.tail > size || lacks.best > size)
		return unclean();
	*runs = (struct space){ size - lacks.head, size - lacks.tail, size - lacks.best };
	return 0;
}

struct halves {
	uint32_t middle; /* the first unit of the right one */
	uint32_t left_size, right_size;
	struct space left, right; /* in units */
};

static int get_halves(const struct heap *heap, uint64_t node, uint32_t start, unsigned level,
		      struct halves *halves)
{
	uint64_t middle = start + ((uint64_t)1 << (heap->levels - level - 1));

	halves->middle = middle < heap->units ? (uint32_t)middle : heap->units;
	halves->left_size = space_size(heap, start, level + 1);
	halves->right_size = space_size(heap, halves->middle, level + 1);
	if (get(heap, 2 * node, halves->left_size, &halves->left) < 0)
		return -1;
	return get(heap, 2 * node + 1, halves->right_size, &halves->right);
}

static uint32_t larger(uint32_t one, uint32_t other)
{
	return one > other ? one : other;
}

/* The node, from its halves. */
static int sum_up(struct heap *heap, uint64_t node, uint32_t start, unsigned level)
{
	uint32_t size = space_size(heap, start, level), head, tail, best;
	struct halves halves;

	if (get_halves(heap, node, start, level, &halves) < 0)
		return -1;
	head = halves.left.head;
	if (head == halves.left_size)
		head += halves.right.head;
	tail = halves.right.tail;
	if (tail == halves.right_size)
		tail += halves.left.tail;
	best = larger(larger(halves.left.best, halves.right.best),
		      halves.left.tail + halves.right.head);
	if (head > size || tail > size || best > size)
		return unclean();
	put_space(&heap->spaces[node], size - head, size - tail, size - best);
	return 0;
}

static void fill(struct heap *heap, uint64_t node, uint32_t size, bool used)
{
	uint32_t lacks = used ? size : 0;

	put_space(&heap->spaces[node], lacks, lacks, lacks);
}

static int set(struct heap *heap, uint64_t node, uint32_t start, unsigned level, uint32_t from,
	       uint32_t to, bool used)
{
	uint32_t size = space_size(heap, start, level), middle;
	uint64_t half;
	struct space runs;

	if (from <= start && start + size <= to) {
		fill(heap, node, size, used);
		return 0;
	}
	if (get(heap, node, size, &runs) < 0)
		return -1;
	half = start + ((uint64_t)1 << (heap->levels - level - 1));
	middle = half < heap->units ? (uint32_t)half : heap->units;
	if (runs.best == size || runs.best == 0) {
		fill(heap, 2 * node, space_size(heap, start, level + 1), runs.best == 0);
		if (middle < heap->units)
			fill(heap, 2 * node + 1, space_size(heap, middle, level + 1),
			     runs.best == 0);
	}
	if (from < middle && set(heap, 2 * node, start, level + 1, from, to, used) < 0)
		return -1;
	if (to > middle && set(heap, 2 * node + 1, middle, level + 1, from, to, used) < 0)
		return -1;
	return sum_up(heap, node, start, level);
}

int space_set(struct heap *heap, uint32_t start, uint32_t count, bool used)
{
	return set(heap, 1, 0, 0, start, start + count, used);
}

uint32_t space_longest(const struct heap *heap)
{
	struct space runs;

	return get(heap, 1, heap->units, &runs) < 0 ? 0 : runs.best;
}

int space_find(const struct heap *heap, uint32_t count, uint32_t *start)
{
	uint64_t node = 1;
	uint32_t at = 0;
	struct space runs;

	if (get(heap, node, heap->units, &runs) < 0)
		return -1;
	if (runs.best < count) {
		reason_say("no free piece of the heap is that large");
		errno = ENOMEM;
		return -1;
	}
	for (unsigned level = 0;; level++) {
		uint32_t size = space_size(heap, at, level);
		struct halves halves;

		if (get(heap, node, size, &runs) < 0)
			return -1;
		if (runs.best == size) { /* all of it is free */
			*start = at;
			return size >= count ? 0 : unclean();
		}
		if (runs.best < count || level == heap->levels)
			return unclean();
		if (get_halves(heap, node, at, level, &halves) < 0)
			return -1;
		if (halves.left.best >= count) {
			node = 2 * node;
		} else if ((uint64_t)halves.left.tail + halves.right.head >= count) {
			*start = halves.middle - halves.left.tail;
			return 0;
		} else {
			node = 2 * node + 1;
			at = halves.middle;
		}
	}
}

struct walk {
	const struct heap *heap;
	space_run run;
	void *context;
	uint32_t start, count; /* of the run that goes on */
	bool used;
};

static int go_on(struct walk *walk, uint32_t start, uint32_t count, bool used)
{
	if (walk->count && walk->used == used) {
		walk->count += count;
		return 0;
	}
	if (walk->count && walk->run(walk->context, walk->start, walk->count, walk->used) < 0)
		return -1;
	walk->start = start;
	walk->count = count;
	walk->used = used;
	return 0;
}

static int walk_node(struct walk *walk, uint64_t node, uint32_t start, unsigned level)
{
	const struct heap *heap = walk->heap;
	uint32_t size = space_size(heap, start, level), head, tail;
	struct halves halves;
	struct space runs;

	if (size == 0)
		return 0;
	if (get(heap, node, size, &runs) < 0)
		return -1;
	if (runs.best == size || runs.best == 0) {
		if (runs.head != runs.best || runs.tail != runs.best)
			return unclean();
		return go_on(walk, start, size, runs.best == 0);
	}
	if (level == heap->levels || get_halves(heap, node, start, level, &halves) < 0)
		return unclean();
	head = halves.left.head + (halves.left.head == halves.left_size ? halves.right.head : 0);
	tail = halves.right.tail + (halves.right.tail == halves.right_size ? halves.left.tail : 0);
	if (head != runs.head || tail != runs.tail ||
	    runs.best != larger(larger(halves.left.best, halves.right.best),
				halves.left.tail + halves.right.head))
		return unclean();
	if (walk_node(walk, 2 * node, start, level + 1) < 0)
		return -1;
	return walk_node(walk, 2 * node + 1, halves.middle, level + 1);
}

int space_walk(const struct heap *heap, space_run run, void *context)
{
	struct walk walk = { .heap = heap, .run = run, .context = context };

	if (walk_node(&walk, 1, 0, 0) < 0)
		return -1;
	return walk.count ? run(context, walk.start, walk.count, walk.used) : 0;
}
