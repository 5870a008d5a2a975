/* SPDX-License-Identifier: MIT */
/*
 * The list of the regions that this process has attached.
 *
 * Synchronization: one lock is held for moments only, never while anybody is asked
 * anything: fork() waits for it (fork.c), and so may malloc(), by mmap().  A call on an
 * attachment holds that attachment's own lock as long as it takes, so another call on the
 * same region waits, and nobody else.  What is in use stays until it is given back.
 *
 * mshare() holds neither, nor does who detaches hold the list's.  Whoever wants the same
 * name, range or region meanwhile waits for it.
 */
#include "internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t settled = PTHREAD_COND_INITIALIZER;
static struct attachment *attachments;
static struct attachment *changing; /* what is about to be attached, or to be left */
/* [lowest, highest) has every attachment: calls outside of it cost two comparisons. */
static atomic_uintptr_t lowest = UINTPTR_MAX, highest;

void attachment_lock(void)
{
	pthread_mutex_lock(&lock);
}

void attachment_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

/* Its other threads are not there, and what they held they hold for ever. */
void attachment_alone(void)
{
	lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	settled = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
	changing = NULL;
	for (struct attachment *each = attachments; each; each = each->next) {
		each->calling = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
		each->users = 1;
	}
}

struct attachment *attachment_at(const char *address)
{
	for (struct attachment *each = attachments; each; each = each->next) {
		if (address >= each->start && address < each->start + each->size)
			return each;
	}
	return NULL;
}

char *attachment_above(const char *address)
{
	char *found = NULL;

	for (struct attachment *each = attachments; each; each = each->next) {
		if (each->start > address && (!found || each->start < found))
			found = each->start;
	}
	return found;
}

bool attachment_lies_in(const char *start, size_t size)
{
	const char *above;
	bool lies;

	attachment_lock();
	above = attachment_above(start);
	lies = attachment_at(start) || (above && above < start + size);
	attachment_unlock();
	return lies;
}

struct attachment *attachment_first(void)
{
	return attachments;
}

bool attachment_any(void)
{
	bool any;

	attachment_lock();
	any = attachments != NULL;
	attachment_unlock();
	return any;
}

struct attachment *attachment_named(const char *name)
{
	struct attachment *each = attachments;

	while (each && (!each->plain || strcmp(each->name, name) != 0))
		each = each->next;
	return each;
}

static struct attachment *find(struct attachment *list, const struct attachment *but,
			       const unsigned char identity[MSHARE_IDENTITY])
{
	while (list && (list == but || memcmp(list->identity, identity, MSHARE_IDENTITY) != 0))
		list = list->next;
	return list;
}

struct attachment *attachment_of(const unsigned char identity[MSHARE_IDENTITY])
{
	return find(attachments, NULL, identity);
}

struct attachment *attachment_take(struct attachment *attachment)
{
	if (attachment)
		attachment->users++;
	return attachment;
}

/*
 * Not by malloc(): its heap may lie in the range, and be held back while that becomes the
 * region's (donate.c); and it may be malloc() that has called us.
 */
struct attachment *attachment_new(char *start, size_t size)
{
	struct attachment *attachment =
		memory_outside(start, size, sizeof *attachment, PROT_READ | PROT_WRITE);

	if (!attachment)
		return NULL;
	attachment->calling = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	attachment->users = 1;
	attachment->connection = attachment->uffd = attachment->backing = HELD_NOTHING;
	attachment->start = start;
	attachment->size = size;
	return attachment;
}

void attachment_free(struct attachment *attachment)
{
	int saved = errno;

	raw_munmap(attachment, sizeof *attachment);
	errno = saved;
}

void attachment_give_back(struct attachment *attachment)
{
	bool last;

	attachment_lock();
	last = --attachment->users == 0;
	attachment_unlock();
	if (last)
		attachment_free(attachment);
}

int attachment_enter(struct attachment *attachment)
{
	pthread_mutex_lock(&attachment->calling);
	if (!attachment->detached)
		return 0;
	pthread_mutex_unlock(&attachment->calling);
	errno = ENOENT;
	return -1;
}

void attachment_leave(struct attachment *attachment)
{
	pthread_mutex_unlock(&attachment->calling);
}

static void update_bounds(void)
{
	uintptr_t low = UINTPTR_MAX, high = 0;

	for (struct attachment *each = attachments; each; each = each->next) {
		uintptr_t start = (uintptr_t)each->start;

		low = start < low ? start : low;
		high = start + each->size > high ? start + each->size : high;
	}
	atomic_store(&lowest, low);
	atomic_store(&highest, high);
}

static struct attachment **link_of(struct attachment **list, const struct attachment *attachment)
{
	while (*list != attachment)
		list = &(*list)->next;
	return list;
}

/* Who takes a region as it lies has no size yet; who knows it by its identity, no name. */
static bool in_each_others_way(const struct attachment *one, const struct attachment *other)
{
	return (*one->name && strcmp(one->name, other->name) == 0) ||
	       (one->start < other->start + other->size && other->start < one->start + one->size);
}

static bool has_to_wait(const struct attachment *attachment)
{
	for (const struct attachment *each = changing; each; each = each->next) {
		if (in_each_others_way(each, attachment))
			return true;
	}
	return false;
}

void attachment_begin(struct attachment *attachment)
{
	attachment_lock();
	while (has_to_wait(attachment))
		pthread_cond_wait(&settled, &lock);
	attachment->next = changing;
	changing = attachment;
	attachment_unlock();
}

static bool is_region_of(const struct attachment *each, const struct attachment *attachment)
{
	return each != attachment && each->file && attachment->file &&
	       each->file / REGION_INODES == attachment->file / REGION_INODES;
}

/* By its number alone: another mount may have the same, and then it is asked which it is. */
static const struct attachment *find_number(const struct attachment *list,
					    const struct attachment *attachment)
{
	while (list && !is_region_of(list, attachment))
		list = list->next;
	return list;
}

bool attachment_is_only(struct attachment *attachment, ino_t file, bool may_be)
{
	attachment_lock();
	attachment->file = file;
	attachment->asking = may_be && file && !find_number(attachments, attachment) &&
			     !find_number(changing, attachment);
	attachment_unlock();
	return attachment->asking;
}

void attachment_learn(struct attachment *attachment, const unsigned char identity[MSHARE_IDENTITY])
{
	attachment_lock();
	memcpy(attachment->identity, identity, sizeof attachment->identity);
	attachment_unlock();
}

static bool is_being_asked_for(const struct attachment *attachment)
{
	const struct attachment *each = find_number(changing, attachment);

	while (each && !each->asking)
		each = find_number(each->next, attachment);
	return each;
}

/*
 * Who waits here has no identity itself meanwhile, nor is it asking, so nobody waits for who
 * waits.
 */
struct attachment *attachment_claim(struct attachment *attachment,
				    const unsigned char identity[MSHARE_IDENTITY])
{
	static const unsigned char unknown[MSHARE_IDENTITY];
	struct attachment *found;

	memset(attachment->identity, 0, sizeof attachment->identity);
	pthread_cond_broadcast(&settled);
	if (memcmp(identity, unknown, sizeof unknown) == 0)
		return NULL;
	while (find(changing, attachment, identity) || is_being_asked_for(attachment))
		pthread_cond_wait(&settled, &lock);
	found = attachment_of(identity);
	if (!found)
		memcpy(attachment->identity, identity, sizeof attachment->identity);
	return found;
}

void attachment_place(struct attachment *attachment, char *start, size_t size)
{
	attachment_lock();
	attachment->start = start;
	attachment->size = size;
	attachment_unlock();
}

void attachment_end(struct attachment *attachment)
{
	*link_of(&attachments, attachment) = attachment->next;
	update_bounds();
	attachment->next = changing;
	changing = attachment;
}

void attachment_settle(struct attachment *attachment, bool attached)
{
	attachment_lock();
	*link_of(&changing, attachment) = attachment->next;
	if (attached) {
		attachment->next = attachments;
		attachments = attachment;
		update_bounds();
	}
	pthread_cond_broadcast(&settled);
	attachment_unlock();
}

MSHARE_EXPORT int mshare_near(const void *addr, size_t length)
{
	uintptr_t at = (uintptr_t)addr;

	return at < atomic_load(&highest) && at + length > atomic_load(&lowest);
}

/* The connection's end comes last: by then the daemon sees that it is no accident. */
void attachment_hang_up(struct attachment *attachment)
{
	held_close(&attachment->uffd);
	held_close(&attachment->connection);
}

void attachment_drop(struct attachment *attachment)
{
	held_close(&attachment->backing);
	attachment_hang_up(attachment);
}
