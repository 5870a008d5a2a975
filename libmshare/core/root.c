/* SPDX-License-Identifier: MIT */
/*
 * Where msharefs is mounted, and whose it is.
 *
 * The daemon behind a mount is given our userfaultfd, and with it everything that is in
 * our memory.  So the question is not where a msharefs is but whether we may trust it, and
 * a path answers neither: any user mounts a file system of any name (fusermount3), and the
 * owner of a directory puts another one in its place (renameat2) while we look.
 *
 * Only the kernel's word counts.  The root directory is opened once, by O_PATH, which asks
 * nobody anything.  The descriptor keeps the file system, so the number of its device is
 * nobody else's any more, and /proc/self/mountinfo is asked for that number: it has to be
 * a fuse.msharefs, mounted by root or by ourselves (`user_id=`, which the kernel prints;
 * what fusermount3 takes from its caller comes before it in other fields, with its spaces
 * escaped).  From then on the descriptor is the mount: regions are opened from it, and
 * .control is reached by /proc/self/fd.  Until then nothing in it is looked at: its server
 * may be one that never answers.  (Where there is no /proc there is no msharefs.  It is
 * read as thread-self: a thread may have mounts and descriptors of its own.)
 *
 * Ourselves: by the real, the effective and the saved number, as FUSE has it, too.  What
 * acts for a user for a while (seteuid(2)) is not that user's.
 *
 * User namespaces.  The kernel prints user_id as a number of the namespace of who mounted
 * (fs/fuse/inode.c: from_kuid_munged(fc->user_ns, ...)).
 * - Whoever makes a user namespace is root there and mounts with user_id=0, but only in
 *   mount namespaces of their own, and such a mount never propagates out of them.  Who
 *   enters the mount namespace alone (nsenter --mount) sees user_id=0 and is refused by
 *   FUSE itself: it serves nobody who is outside of its user namespace
 *   (fuse_allow_current_process(); the parameter allow_sys_admin_access of the module fuse
 *   says otherwise, for CAP_SYS_ADMIN, and is off).  Who enters the user namespace as well
 *   is in the hands of its owner anyway.  A set-user-ID program takes on nobody there whom
 *   its owner is not already: the kernel ignores the bit of a file whose owner the namespace
 *   does not know.
 * - The other way round, a mount from outside may be seen in a container, with a number that
 *   is somebody else's in here.  Where our own number does not mean the same user outside
 *   (/proc/self/uid_map), it is not compared: "ours" then is what was mounted without
 *   allow_other, because then the kernel lets nobody in but the one who mounted it, by its
 *   own numbers.
 * - user_id=0 in a container is the machine's root or the container's.  Both could do
 *   anything to us without a file system.
 *
 * A program that runs with more rights than its caller (AT_SECURE: set-user-ID, file
 * capabilities) takes the usual place, of root's, and no other: neither the environment nor
 * the caller's own mounts are to decide whom it trusts.
 *
 * All but root_find() and root_use(), which read the environment, is async-signal-safe.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define USUAL_ROOT "/sys/fs/mshare"
#define CONTROL ".control"
#define FSTYPE "fuse.msharefs"

size_t root_alignment(int root)
{
	unsigned long long alignment;
	char text[32], *end;
	ssize_t got;
	int fd;

	fd = openat(root, "mshare_info", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	got = read(fd, text, sizeof text - 1);
	close_keeping_errno(fd);
	if (got < 0)
		return 0;
	text[got] = '\0';
	errno = 0;
	alignment = strtoull(text, &end, 10);
	if (end == text || errno != 0 || alignment == 0 || (alignment & (alignment - 1)) != 0) {
		errno = EPROTO;
		return 0;
	}
	return (size_t)alignment;
}

/* ---- tables of /proc, however long their lines are, and without stdio ---- */

struct table {
	int fd;
	size_t at, end;
	char bytes[1024];
};

static int table_open(struct table *table, const char *path)
{
	table->fd = open(path, O_RDONLY | O_CLOEXEC);
	table->at = table->end = 0;
	return table->fd;
}

/* -1 at the end; a table that cannot be read to its end ends there. */
static int next_byte(struct table *table)
{
	if (table->at == table->end) {
		ssize_t got;

		do
			got = read(table->fd, table->bytes, sizeof table->bytes);
		while (got < 0 && errno == EINTR);
		if (got <= 0)
			return -1;
		table->at = 0;
		table->end = (size_t)got;
	}
	return (unsigned char)table->bytes[table->at++];
}

/*
 * What is before the next space or newline, which is returned; -1 at the end.  Space, tab,
 * newline and backslash are written as \ooo.  What is too long is as if it were empty.
 */
static int next_field(struct table *table, char *field, size_t size)
{
	size_t length = 0;
	int byte;

	while ((byte = next_byte(table)) >= 0 && byte != ' ' && byte != '\n') {
		if (byte == '\\') {
			byte = 0;
			for (int i = 0; i < 3; i++)
				byte = byte * 8 + next_byte(table) - '0';
		}
		if (length < size)
			field[length++] = (char)byte;
	}
	field[length < size ? length : 0] = '\0';
	return byte;
}

/* A decimal number that ends where `end` is; or -1. */
static long long number(const char *from, const char *end)
{
	long long value = 0;

	if (from == end || end - from > 10)
		return -1;
	for (; from < end; from++) {
		if (*from < '0' || *from > '9')
			return -1;
		value = value * 10 + (*from - '0');
	}
	return value;
}

/* ---- whom we trust ---- */

/* Whether a user of ours has the same number outside of this user namespace. */
static bool same_outside(uid_t user)
{
	unsigned long long values[3] = { 0 };
	bool same = false, digits = false;
	struct table map;
	int count = 0, byte;

	if (table_open(&map, "/proc/thread-self/uid_map") < 0)
		return errno == ENOENT; /* a kernel without user namespaces */
	while ((byte = next_byte(&map)) >= 0) {
		if (byte >= '0' && byte <= '9') {
			if (count < 3)
				values[count] = values[count] * 10 + (unsigned)(byte - '0');
			digits = true;
			continue;
		}
		count += digits;
		digits = false;
		if (byte != '\n')
			continue;
		/* inside, outside, how many */
		if (count == 3 && user >= values[0] && user - values[0] < values[2])
			same = values[0] == values[1];
		memset(values, 0, sizeof values);
		count = 0;
	}
	close_keeping_errno(map.fd);
	return same;
}

/* By the options that the kernel prints; see above. */
static bool is_trusted(const char *options)
{
	uid_t real, effective, saved;
	bool allow_other = false;
	long long owner = -1;
	int owners = 0;

	for (const char *at = options, *end; *at; at = *end ? end + 1 : end) {
		end = at + strcspn(at, ",");
		if (strncmp(at, "user_id=", 8) == 0) {
			owner = number(at + 8, end);
			owners++;
		}
		allow_other |= end - at == 11 && memcmp(at, "allow_other", 11) == 0;
	}
	if (owners != 1 || owner < 0)
		return false;
	if (owner == 0)
		return true;
	if (getauxval(AT_SECURE) || getresuid(&real, &effective, &saved) < 0)
		return false;
	if (!same_outside(effective))
		return !allow_other;
	return owner == real && owner == effective && owner == saved;
}

struct mount {
	dev_t device;
	bool trusted;
};

/*
 * The next fuse.msharefs of mountinfo (proc_pid_mountinfo(5)), and its path, if target is
 * given; false at the end.
 */
static bool next_msharefs(struct table *table, struct mount *mount, char target[PATH_MAX])
{
	enum { ID, PARENT, DEVICE, ROOT, TARGET, OPTIONS, TAGS, TYPE, SOURCE, SUPER_OPTIONS, END };
	char field[1024];
	bool found;
	int ended;

	do {
		int at = ID;

		found = false;
		do {
			bool is_target = at == TARGET && target;

			ended = next_field(table, is_target ? target : field,
					   is_target ? PATH_MAX : sizeof field);
			if (at == DEVICE) {
				char *colon = strchr(field, ':'), *end = strchr(field, '\0');

				mount->device = colon ? makedev(number(field, colon),
								number(colon + 1, end)) :
							0;
			} else if (at == TYPE) {
				found = strcmp(field, FSTYPE) == 0;
			} else if (at == SUPER_OPTIONS) {
				mount->trusted = found && is_trusted(field);
			}
			if (at != TAGS || strcmp(field, "-") == 0)
				at++;
		} while (ended == ' ');
		found = found && at == END;
	} while (!found && ended >= 0);
	return found;
}

/* What mountinfo says of a device: 0, or -1 with EPERM, or ENOENT if it is no msharefs. */
static int judge(dev_t device)
{
	struct table table;
	struct mount mount;
	int why = ENOENT;

	if (table_open(&table, "/proc/thread-self/mountinfo") < 0)
		return -1;
	while (why == ENOENT && next_msharefs(&table, &mount, NULL)) {
		if (mount.device == device)
			why = mount.trusted ? 0 : EPERM;
	}
	close(table.fd);
	errno = why;
	return why ? -1 : 0;
}

/* ---- one root ---- */

/* Which directory it is, as far as the kernel knows it: the server of a FUSE is not asked. */
static int identify(int at, const char *path, int flags, dev_t *device, ino_t *inode)
{
	struct statx status;

	if (statx(at, path, flags | AT_STATX_DONT_SYNC, 0, &status) < 0)
		return -1;
	*device = makedev(status.stx_dev_major, status.stx_dev_minor);
	*inode = status.stx_ino;
	return 0;
}

static bool leads_to(const struct root *root, int at, const char *path, int flags)
{
	dev_t device;
	ino_t inode;

	return identify(at, path, flags, &device, &inode) == 0 && device == root->device &&
	       inode == root->inode;
}

/* Its number may be the program's by now: closefrom(3), and an open(2) after it. */
static bool is_kept(int fd, dev_t device, ino_t inode)
{
	struct root kept = { .device = device, .inode = inode };

	return fd >= 0 && leads_to(&kept, fd, "", AT_EMPTY_PATH) && (fcntl(fd, F_GETFL) & O_PATH);
}

void root_close(struct root *root)
{
	if (is_kept(root->fd, root->device, root->inode))
		close(root->fd);
	root->fd = -1;
}

/* Whether it is the root of a msharefs: the kernel keeps the attributes of .control. */
static int check_control(int root)
{
	struct stat status;

	if (fstatat(root, CONTROL, &status, AT_SYMLINK_NOFOLLOW) < 0)
		return -1;
	if (S_ISSOCK(status.st_mode))
		return 0;
	errno = ENOENT;
	return -1;
}

static int open_root(struct root *root, const char *path)
{
	int saved;

	root->searched = false;
	root->fd = -1;
	if (strlen(path) >= sizeof root->path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	root->fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root->fd < 0) {
		if (errno == ENOTDIR) /* nor is msharefs mounted on a file */
			errno = ENOENT;
		return -1;
	}
	if (identify(root->fd, "", AT_EMPTY_PATH, &root->device, &root->inode) == 0 &&
	    judge(root->device) == 0 && check_control(root->fd) == 0) {
		memmove(root->path, path, strlen(path) + 1);
		return 0;
	}
	saved = errno;
	close(root->fd);
	root->fd = -1;
	errno = saved;
	return -1;
}

/*
 * The first in /proc/self/mountinfo that is to be trusted and has a daemon.  why: the errno
 * if there is none; a daemon that has died is a better reason, and then one not to be
 * trusted.
 */
static int search_mounts(struct root *root, int why)
{
	char target[PATH_MAX];
	struct table table;
	struct mount mount;
	int found = -1;

	if (table_open(&table, "/proc/thread-self/mountinfo") < 0)
		return -1;
	while (found < 0 && next_msharefs(&table, &mount, target)) {
		errno = EPERM;
		if (mount.trusted)
			found = open_root(root, target);
		if (found < 0 && (errno == ENOTCONN || (errno == EPERM && why == ENOENT)))
			why = errno;
	}
	close(table.fd);
	if (found < 0)
		errno = why;
	root->searched = true;
	return found;
}

int root_find(struct root *root)
{
	const char *wanted = secure_getenv("MSHARE_ROOT");

	if (wanted && *wanted)
		return open_root(root, wanted);
	/* If the daemon of the usual mount has died, say so. */
	if (open_root(root, USUAL_ROOT) == 0)
		return 0;
	if (errno == ENOTCONN || getauxval(AT_SECURE))
		return -1;
	return search_mounts(root, errno == EPERM ? EPERM : ENOENT);
}

/* ---- the root in use ---- */

static struct root current = { .fd = -1 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of that; for moments only */

/*
 * The current root's .control, of the user who looked it up: each has one of its own
 * (mount/controls.py), and the daemon is asked with each lookup.
 */
static struct {
	int fd;
	ino_t inode;
	uid_t user;
} control = { .fd = -1 };

static void forget_control(void)
{
	if (is_kept(control.fd, current.device, control.inode))
		close(control.fd);
	control.fd = -1;
}

void root_lock(void)
{
	pthread_mutex_lock(&lock);
}

void root_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

/* A copy of what is kept, for one call; -1 with errno. */
static int lend(struct root *root)
{
	*root = current;
	root->fd = fcntl(current.fd, F_DUPFD_CLOEXEC, 0);
	return root->fd < 0 ? -1 : 0;
}

static void keep(const struct root *root)
{
	root_lock();
	forget_control();
	root_close(&current);
	current = *root;
	current.fd = fcntl(root->fd, F_DUPFD_CLOEXEC, 0);
	root_unlock();
}

/*
 * Kept open from call to call: reading mountinfo takes long where much is mounted.  What it
 * was found by is looked at with each call instead: whether it still leads there.  Who takes
 * the place of a dead daemon mounts anew, and then it does not.
 */
static bool is_current(const char *path)
{
	return current.fd >= 0 && strcmp(current.path, path) == 0 &&
	       leads_to(&current, current.fd, "", AT_EMPTY_PATH) &&
	       leads_to(&current, AT_FDCWD, path, 0);
}

void root_forget(void)
{
	root_lock();
	forget_control();
	root_close(&current);
	root_unlock();
}

/* Whether looking for it again would find it: one in the usual place would come first. */
static bool is_found_again(void)
{
	dev_t device;
	ino_t inode;

	return current.searched && is_current(current.path) &&
	       identify(AT_FDCWD, USUAL_ROOT, 0, &device, &inode) < 0;
}

int root_use(struct root *root)
{
	const char *wanted = secure_getenv("MSHARE_ROOT");
	bool kept;
	int result = 0;

	root_lock();
	kept = wanted && *wanted ? is_current(wanted) : is_current(USUAL_ROOT) || is_found_again();
	if (kept)
		result = lend(root);
	root_unlock();
	if (kept)
		return result;
	if (root_find(root) < 0)
		return -1;
	keep(root);
	return 0;
}

int root_use_again(const char *path, struct root *root)
{
	bool kept;
	int result = 0;

	root_lock();
	kept = is_current(path);
	if (kept)
		result = lend(root);
	root_unlock();
	if (kept)
		return result;
	if (open_root(root, path) < 0)
		return -1;
	keep(root);
	return 0;
}

static bool is_current_root(const struct root *root)
{
	return current.fd >= 0 && root->device == current.device && root->inode == current.inode;
}

/* Who shares a socket with others, for want of one, looks for one the next time. */
#define SHARED_INODES ((ino_t)1 << 48)

static void keep_control(const struct root *root, int fd)
{
	dev_t device;
	ino_t inode;

	if (identify(fd, "", AT_EMPTY_PATH, &device, &inode) < 0 || inode < SHARED_INODES)
		return;
	root_lock();
	if (is_current_root(root) && device == current.device) {
		forget_control();
		control.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
		control.inode = inode;
		control.user = geteuid();
	}
	root_unlock();
}

int root_control(const struct root *root)
{
	int fd = -1;

	root_lock();
	if (is_current_root(root) && control.user == geteuid() &&
	    is_kept(control.fd, current.device, control.inode))
		fd = fcntl(control.fd, F_DUPFD_CLOEXEC, 0);
	root_unlock();
	if (fd >= 0)
		return fd;
	fd = openat(root->fd, CONTROL, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd >= 0)
		keep_control(root, fd);
	return fd;
}
