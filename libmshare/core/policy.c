/* SPDX-License-Identifier: MIT */
/*
 * Where memory comes from on a machine of several nodes.
 *
 * The daemon makes the pages, so the kernel would go by its policy (numa(7)), and not by that
 * of who touches them.  But memory that is shared may have a policy of its own, which mbind(2)
 * gives it through anybody's mapping: so a new region takes that of the process that makes it
 * (numactl(8)), and whoever wants another one calls mbind() themselves.
 */
#include "internal.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>

#define MOST_NODES 4096 /* the kernel wants room for all that it may ever have */

/* What goes wrong is no failure: it is about speed. */
void policy_hand_on(char *start, size_t size)
{
	unsigned long nodes[MOST_NODES / (8 * sizeof(long))] = { 0 };
	int mode = MPOL_DEFAULT;

	if (raw_syscall(SYS_get_mempolicy, (long)&mode, (long)nodes, MOST_NODES, 0, 0, 0) < 0 ||
	    mode == MPOL_DEFAULT)
		return;
	raw_syscall(SYS_mbind, (long)start, (long)size, mode, (long)nodes, MOST_NODES, 0);
}
