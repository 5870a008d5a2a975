/* SPDX-License-Identifier: MIT */
/*
 * The list of the regions that this process has attached.
 *
 * Synchronization: one lock is held through every call.  fork() takes it (fork.c), so
 * the child finds the list whole.
 */
#include "internal.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct attachment *attachments;
/* [lowest, highest) has every attachment: calls outside of it cost two comparisons. */
static atomic_uintptr_t lowest = UINTPTR_MAX, highest;

void attachment_lock(void)
{
	pthread_mutex_lock(&lock);
	reason_forget();
}

void attachment_unlock(void)
{
	pthread_mutex_unlock(&lock);
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

struct attachment *attachment_first(void)
{
	return attachments;
}

struct attachment **attachment_find(const char *name)
{
	struct attachment **link = &attachments;

	while (*link && (!(*link)->plain || strcmp((*link)->name, name) != 0))
		link = &(*link)->next;
	return link;
}

struct attachment *attachment_of(const unsigned char identity[MSHARE_IDENTITY])
{
	struct attachment *each = attachments;

	while (each && memcmp(each->identity, identity, MSHARE_IDENTITY) != 0)
		each = each->next;
	return each;
}

struct attachment **attachment_link(const struct attachment *attachment)
{
	struct attachment **link = &attachments;

	while (*link != attachment)
		link = &(*link)->next;
	return link;
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

void attachment_add(struct attachment *attachment)
{
	attachment->next = attachments;
	attachments = attachment;
	update_bounds();
}

void attachment_remove(struct attachment **link)
{
	*link = (*link)->next;
	update_bounds();
}

MSHARE_EXPORT int mshare_near(const void *addr, size_t length)
{
	uintptr_t at = (uintptr_t)addr;

	return at < atomic_load(&highest) && at + length > atomic_load(&lowest);
}

void attachment_hang_up(struct attachment *attachment)
{
	close_keeping_errno(attachment->connection);
	close_keeping_errno(attachment->uffd);
	attachment->connection = attachment->uffd = -1;
}

void attachment_drop(struct attachment *attachment)
{
	attachment_hang_up(attachment);
	close_keeping_errno(attachment->backing);
	attachment->backing = -1;
}
