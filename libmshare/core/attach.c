/* SPDX-License-Identifier: MIT */
/* mshare() and its kin: making a region, or attaching one. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * mshare() fails after it has begun to make a region, or made it: it goes before the
 * caller can look.  (Hanging up does the same, but later.)
 */
static void unmake(int connection, uint16_t op)
{
	struct mshare_wire_request request = { .op = op };
	struct mshare_wire_reply reply;
	int ignored;

	connection_call(connection, &request, NULL, NULL, 0, &reply, &ignored);
}

static bool has_range(int region)
{
	struct mshare_info info;

	return pread(region, &info, sizeof info, 0) == sizeof info && info.size != 0;
}

static int reserve_again(const struct details *details)
{
	int mapped = window_reserve((char *)(uintptr_t)details->start, details->size);

	if (mapped > 0)
		errno = EADDRINUSE;
	return mapped == 0 ? 0 : -1;
}

static void describe(const struct attachment *attachment, bool created,
		     struct mshare_region *region)
{
	*region = (struct mshare_region){
		.start = (uintptr_t)attachment->start,
		.size = attachment->size,
		.length = attachment->length ? attachment->length : attachment->size,
		.writable = attachment->writable,
		.created = created,
	};
	memcpy(region->identity, attachment->identity, sizeof region->identity);
	strcpy(region->root, attachment->root);
	region->held = 1;
}

static int check_holder(const struct attachment *attachment, int oflags)
{
	if ((oflags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL)) {
		errno = EEXIST;
		return -1;
	}
	if (attachment->uffd.fd < 0) {
		reason_say("the region could not be attached again after fork");
		errno = ESTALE;
		return -1;
	}
	if (attachment_was_purged(attachment)) {
		errno = ESTALE;
		return -1;
	}
	if ((oflags & O_ACCMODE) == O_RDWR && !attachment->writable) {
		reason_say("this process has attached the region read-only");
		errno = EACCES;
		return -1;
	}
	return 0;
}

enum had { NOT_HAD, HELD, REFUSED };

/*
 * An attachment that this process has already gets one more holder, if it can (or errno says
 * why not).  NOT_HAD: nobody else here attaches it until the one that is beginning is settled.
 */
static enum had hold(struct attachment *beginning, const unsigned char identity[MSHARE_IDENTITY],
		     int oflags, struct mshare_region *region)
{
	struct attachment *attachment;
	enum had had = NOT_HAD;

	attachment_lock();
	attachment = attachment_claim(beginning, identity);
	if (attachment)
		had = check_holder(attachment, oflags) < 0 ? REFUSED : HELD;
	if (had == HELD) {
		attachment->holders++;
		describe(attachment, false, region);
	}
	attachment_unlock();
	return had;
}

static int connect_to(struct attachment *attachment, const struct root *root)
{
	if (attachment->connection.fd < 0)
		held_take(&attachment->connection, connection_open(root));
	return attachment->connection.fd < 0 ? -1 : 0;
}

/* Whether the mount that answered has no daemon by now: then it has said nothing of a region. */
static bool has_gone(struct attachment *attachment, const struct root *root)
{
	if (connect_to(attachment, root) < 0)
		return daemon_is_gone(errno);
	return connection_noted(attachment->connection.fd) == CONNECTION_LOST;
}

/* Which region that is, from the reply to ATTACH, or its file. */
static int learn(struct attachment *attachment, const struct mshare_wire_reply *reply, int region)
{
	static const unsigned char unknown[MSHARE_IDENTITY];
	struct mshare_wire_details told;
	struct details details;

	memcpy(&told, reply->message, sizeof told);
	if (memcmp(told.identity, unknown, sizeof unknown) != 0) {
		attachment->length = told.length;
		attachment_learn(attachment, told.identity);
		return 0;
	}
	if (details_read(region, &details) < 0)
		return errno == EPROTO ? 0 : -1;
	attachment->length = details.length;
	attachment_learn(attachment, details.identity);
	return 0;
}

/* For one that holds nothing that is there already: it fails later, if there is one. */
static void claim(struct attachment *attachment, const struct details *details)
{
	attachment_lock();
	attachment_claim(attachment, details->identity);
	attachment_unlock();
	attachment->length = details->length;
}

/*
 * What a region whose range was chosen by the daemon begins with, as a flag of ATTACH.  An
 * ephemeral one loses its name before it has memory, and has that with COMMIT.
 */
static uint32_t begins_with(const struct attachment *attachment, const struct wish *wish)
{
	bool ephemeral = wish->open && (wish->open->flags & MSHARE_EPHEMERAL);

	if (!wish->zeros)
		return 0;
	return attachment->sized && !ephemeral ? MSHARE_WIRE_ZEROS : MSHARE_WIRE_HAS_MAPPINGS;
}

/*
 * Everything that can fail without a trace comes before the file is created; what
 * comes later is undone.  If it takes the daemon to have a userfaultfd, that comes later:
 * the file is what gives the right to it.  Who creates nothing connects when there is
 * something to say: then the daemon takes notice of both at one time.
 *
 * An attachment without a size takes the region where it lies, which the reply says.
 */
static int attach(struct attachment *attachment, const struct root *root, int oflags, mode_t mode,
		  uint32_t kind, const struct wish *wish, struct mshare_region *described,
		  enum had *had)
{
	struct mshare_wire_request request = {
		.op = MSHARE_WIRE_ATTACH,
		.start = (uintptr_t)attachment->start,
		.size = attachment->size,
		.oflags = (uint32_t)oflags,
		.backing = kind,
	};
	struct mshare_wire_reply reply;
	int region = -1, mapped = -1, backing = -1, result, saved, fds[2] = { -1, -1 };
	enum made made = NOT_MADE;
	bool building = false, complete = false;
	bool as_it_lies = attachment->size == 0, placed = false, only = false, again;
	struct details details = { 0 };

	if (!as_it_lies) {
		mapped = window_reserve(attachment->start, attachment->size);
		if (mapped < 0)
			return -1;
		if (mapped && wish->alone) {
			reason_say("this process has memory in that range: choose another, or none");
			errno = EADDRINUSE;
			return -1;
		}
		if (mapped || wish->zeros)
			request.flags = MSHARE_WIRE_HAS_MAPPINGS;
	}
	if ((oflags & O_CREAT) && connect_to(attachment, root) < 0)
		goto fail;
	fds[1] = uffd_open_unaided();
	if (fds[1] < 0 && fds[1] != UFFD_ASK)
		goto fail;
	if (wish->open && wish->open->identity)
		region = name_open_identity(root->fd, wish->open->identity, oflags);
	else
		region = name_open(root->fd, attachment->name, oflags, mode,
				   wish->placed ? wish->length : 0, attachment->repeated, &made);
	attachment->sized |= made == MADE_SIZED;
	if (region < 0) {
		saved = errno;
		if (saved == ENOMEM && wish->placed)
			details_say_no_room();
		if (saved == ENOENT && has_gone(attachment, root))
			saved = ENOTCONN;
		errno = saved;
		attachment->repeated |= daemon_is_gone(errno);
		goto fail;
	}
	only = attachment_is_only(attachment, name_number(region), !wish->placed);
	if (connect_to(attachment, root) < 0)
		goto fail;
	if (fds[1] == UFFD_ASK) {
		fds[1] = uffd_ask(attachment->connection.fd, region);
		if (fds[1] < 0) {
			attachment->repeated |= daemon_is_gone(errno);
			goto fail;
		}
	}
	/* (If the place is still to be found, that reads them.) */
	if (!only && !(wish->placed && made) && details_read(region, &details) < 0 &&
	    (wish->open || errno != EPROTO)) {
		attachment->repeated |= daemon_is_gone(errno);
		goto fail;
	}
	if (wish->open && !made && !only) {
		*had = hold(attachment, details.identity, oflags, described);
		if (*had != NOT_HAD)
			goto fail;
	}
	/* A call that is made once more has its range, perhaps, of before a daemon died. */
	again = attachment->repeated && (oflags & O_EXCL) && !made && has_range(region);
	if (wish->placed && (made || again || !has_range(region))) {
		if (again ? reserve_again(&details) < 0 :
			    details_place(region, wish->length, made == MADE_SIZED, &details) < 0)
			goto fail;
		mapped = 0;
		placed = true;
		as_it_lies = false;
		attachment_place(attachment, (char *)(uintptr_t)details.start, details.size);
		request.start = details.start;
		request.size = details.size;
		request.flags = begins_with(attachment, wish);
	} else if (as_it_lies) {
		request.flags = MSHARE_WIRE_AS_IT_LIES;
	} else if (!mapped && !made && wish->zeros && has_range(region)) {
		request.flags &= ~MSHARE_WIRE_HAS_MAPPINGS;
	}
	if (!only)
		claim(attachment, &details);
	if (made)
		request.flags |= MSHARE_WIRE_MADE_FILE;
	if (attachment->repeated)
		request.flags |= MSHARE_WIRE_REPEATED;
	held_take(&attachment->uffd, fds[1]);
	request.userfaultfd = (uint32_t)fds[1];
	fds[0] = region;
	result = connection_call(attachment->connection.fd, &request, NULL, fds, 2, &reply, &backing);
	held_take(&attachment->backing, backing);
	attachment->repeated |= result == CONNECTION_LOST;
	if (result < 0)
		goto fail;
	attachment->created = reply.flags & MSHARE_WIRE_CREATED;
	building = reply.flags & MSHARE_WIRE_DONATE;
	complete = !building && (reply.flags & MSHARE_WIRE_CREATED);
	if (only && learn(attachment, &reply, region) < 0)
		goto fail;
	close(region);
	region = -1;
	if (backing < 0) {
		errno = EMFILE; /* the kernel drops what there is no room for: recvmsg(2) */
		goto fail;
	}
	if (as_it_lies) {
		mapped = window_reserve((char *)(uintptr_t)reply.start, reply.size);
		if (mapped > 0) {
			reason_say("this process has something where the region lies");
			errno = wish->open ? EADDRINUSE : EINVAL;
		}
		if (mapped != 0)
			goto fail;
		attachment_place(attachment, (char *)(uintptr_t)reply.start, reply.size);
	}
	/* Before it is complete: whoever dies from now on leaves nothing. */
	if (attachment->created && wish->open && (wish->open->flags & MSHARE_EPHEMERAL) &&
	    name_unlink_identity(root->fd, attachment->identity) < 0)
		goto fail;
	if (building) {
		if (!wish->zeros && attachment_lies_in(attachment->start, attachment->size)) {
			reason_say("this process has another region in that range");
			errno = wish->open ? EADDRINUSE : EINVAL;
			goto fail;
		}
		result = wish->zeros ? donate_zeros(attachment, wish->length, &complete) :
					donate(attachment, &complete);
		if (result < 0)
			goto fail;
	}
	if (!building && window_map(attachment, reply.flags) < 0)
		goto fail;
	if (attachment->created && attachment->writable)
		policy_hand_on(attachment->start, attachment->size);
	return 0;
fail:
	saved = errno;
	/* It was there when its file was opened. */
	if (saved == ENOENT && region >= 0 && wish->open && wish->open->identity)
		saved = ESTALE;
	if (mapped == 0)
		raw_munmap(attachment->start, attachment->size);
	if (complete && made)
		unmake(attachment->connection.fd, MSHARE_WIRE_UNLINK);
	else if (building)
		unmake(attachment->connection.fd, MSHARE_WIRE_DETACH);
	else if (made && region >= 0 && !daemon_is_gone(saved))
		name_unmake(root->fd, attachment->name, region);
	close_keeping_errno(region);
	if (attachment->uffd.fd < 0)
		close_keeping_errno(fds[1]);
	attachment_drop(attachment);
	if (as_it_lies || placed)
		attachment_place(attachment, NULL, 0);
	errno = saved;
	return -1;
}

static int check_alignment(const struct attachment *attachment, int root)
{
	size_t alignment = root_alignment(root);
	char text[100];

	if (alignment == 0)
		return -1;
	if (!(((uintptr_t)attachment->start | attachment->size) & (alignment - 1)))
		return 0;
	snprintf(text, sizeof text, "address and size must be multiples of the alignment, %zu bytes",
		 alignment);
	reason_say(text);
	errno = EINVAL;
	return -1;
}

static int try_add(struct attachment *attachment, int oflags, mode_t mode, uint32_t kind,
		   const struct wish *wish, struct mshare_region *region, enum had *had)
{
	struct root root;
	int result;

	if (wish->open && wish->open->root)
		result = root_use_again(wish->open->root, &root);
	else
		result = name_root(&attachment->waiting, &root);
	if (result < 0)
		return -1;
	strcpy(attachment->root, root.path);
	if ((oflags & O_CREAT) && !wish->placed)
		result = check_alignment(attachment, root.fd);
	if (result == 0)
		result = attach(attachment, &root, oflags, mode, kind, wish, region, had);
	root_close(&root);
	return result;
}

/*
 * Somebody else has made it meanwhile; or it has gone again, and who creates begins anew.  It
 * may be what this process was making when a daemon died, which the next one has taken back.
 */
static bool is_another_now(const struct wish *wish, int oflags)
{
	bool any = wish->placed && !(oflags & O_EXCL);

	return (errno == ENOENT && (any || (oflags & O_CREAT))) || (errno == EINVAL && any);
}

static int add(struct attachment *attachment, int oflags, mode_t mode, uint32_t kind,
	       const struct wish *wish, struct mshare_region *region, enum had *had)
{
	int result, races = 0;

	*had = NOT_HAD;
	if (wish->open && wish->open->identity)
		*had = hold(attachment, wish->open->identity, oflags, region);
	if (*had != NOT_HAD)
		return -1;
	do
		result = try_add(attachment, oflags, mode, kind, wish, region, had);
	while (result < 0 && *had == NOT_HAD &&
	       (is_another_now(wish, oflags) ?
			races++ < 3 :
			(daemon_is_gone(errno) && wait_again(&attachment->waiting))));
	return result;
}

/* It is no attachment. */
static void give_up(struct attachment *attachment)
{
	int saved = errno;

	attachment_settle(attachment, false);
	attachment_free(attachment);
	if (!attachment_any()) /* what fails leaves nothing behind */
		root_forget();
	errno = saved;
}

int attach_region(const char *name, char *start, size_t size, int oflags, mode_t mode,
		  uint32_t kind, const struct wish *wish, struct mshare_info *info,
		  struct mshare_region *region)
{
	struct attachment *attachment;
	enum had had;

	reason_forget();
	attachment = attachment_new(start, size);
	if (!attachment)
		return -1;
	strcpy(attachment->name, name);
	attachment->writable = (oflags & O_ACCMODE) == O_RDWR;
	attachment_begin(attachment);
	if (add(attachment, oflags, mode, kind, wish, region, &had) < 0) {
		name_explain();
		give_up(attachment);
		return had == HELD ? 0 : -1;
	}
	fork_handle();
	attachment->plain = !wish->open;
	attachment->holders = wish->open ? 1 : 0;
	if (info)
		*info = (struct mshare_info){ (uintptr_t)attachment->start, attachment->size };
	if (region)
		describe(attachment, attachment->created, region);
	attachment_settle(attachment, true);
	return 0;
}

bool known_flags(int oflags, int more)
{
	int access = oflags & O_ACCMODE;

	return (access == O_RDONLY || access == O_RDWR) &&
	       !(oflags & ~(O_ACCMODE | O_CLOEXEC | more));
}

/* A backing by its name; the empty name stands for the daemon's default. */
int kind_of(const char *backing, uint32_t *kind)
{
	if (!backing)
		backing = secure_getenv("MSHARE_BACKING");
	if (!backing || *backing == '\0')
		*kind = MSHARE_WIRE_BACKING_DEFAULT;
	else if (strcmp(backing, "shm") == 0)
		*kind = MSHARE_WIRE_BACKING_SHM;
	else if (strcmp(backing, "hugetlb") == 0)
		*kind = MSHARE_WIRE_BACKING_HUGETLB;
	else {
		reason_say("a region's backing is \"shm\" or \"hugetlb\"");
		errno = EINVAL;
		return -1;
	}
	return 0;
}

MSHARE_EXPORT int mshare(const char *name, void *addr, size_t length, int oflags, mode_t mode)
{
	return mshare_backed(name, addr, length, oflags, mode, NULL);
}

MSHARE_EXPORT int mshare_backed(const char *name, void *addr, size_t length, int oflags,
				mode_t mode, const char *backing)
{
	uint32_t kind = MSHARE_WIRE_BACKING_DEFAULT;

	if (name_check(name) < 0)
		return -1;
	if ((oflags & O_CREAT) && kind_of(backing, &kind) < 0)
		return -1;
	if (!known_flags(oflags, O_CREAT | O_EXCL) || ((oflags & O_EXCL) && !(oflags & O_CREAT)) ||
	    length == 0 || (uintptr_t)addr + length < (uintptr_t)addr) {
		errno = EINVAL;
		return -1;
	}
	if (!addr)
		return attach_region(name, NULL, 0, oflags, mode, kind,
				     &(struct wish){ .length = length,
						     .placed = oflags & O_CREAT,
						     .zeros = true,
						     .alone = true },
				     NULL, NULL);
	return attach_region(name, addr, length, oflags, mode, kind, &(struct wish){ 0 }, NULL,
			     NULL);
}

MSHARE_EXPORT int mshare_attach(const char *name, int oflags, struct mshare_info *info)
{
	if (name_check(name) < 0)
		return -1;
	if (!known_flags(oflags, 0)) {
		errno = EINVAL;
		return -1;
	}
	return attach_region(name, NULL, 0, oflags, 0, MSHARE_WIRE_BACKING_DEFAULT,
			     &(struct wish){ 0 }, info, NULL);
}
