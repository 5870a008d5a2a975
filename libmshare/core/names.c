/* SPDX-License-Identifier: MIT */
/*
 * Names: which there may be, the mount that they lead into, and what can be done to a
 * region by its name alone.
 */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int name_check(const char *name)
{
	if (!name) {
		errno = EFAULT;
		return -1;
	}
	if (*name == '\0') {
		reason_say("a region's name is not empty");
		errno = ENOENT;
	} else if (strchr(name, '/')) {
		reason_say("a region's name has no slash");
		errno = EINVAL;
	} else if (strlen(name) > NAME_MAX) {
		errno = ENAMETOOLONG;
	} else if (*name == '.' || strcmp(name, "mshare_info") == 0) {
		reason_say("this name is reserved by msharefs: choose another");
		errno = EPERM;
	} else {
		return 0;
	}
	return -1;
}

void name_explain(void)
{
	int saved = errno;
	struct root root;

	if (reason_is_said())
		return;
	if (daemon_is_gone(errno)) {
		reason_say("the daemon of msharefs has died; start msharefsd again");
	} else if (errno == EACCES) {
		reason_say("permission denied; its mode says who may, `mshare ls` shows it");
	} else if (errno == EEXIST) {
		reason_say("a region of that name exists, or something is mapped there already");
	} else if (errno == EROFS) {
		reason_say("read-only here, as /sys is in hardened units and containers: "
			   "have msharefs on /run/mshare");
	} else if (errno == ENOENT && root_find(&root) == 0) {
		root_close(&root);
		reason_say("no such region; `mshare ls` lists them");
	} else if (saved == ENOENT) {
		reason_say("msharefs is not mounted; start msharefsd, or say where it is with "
			   "MSHARE_ROOT");
	}
	errno = saved;
}

/*
 * It goes with this process, until it has memory.  length: bytes for which it is given a range
 * at once; an older daemon knows no such names.
 */
static int make(int root, const char *name, int access, mode_t mode, size_t length,
		enum made *made)
{
	char path[sizeof ".sized--" + 20 + NAME_MAX];
	int fd;

	access |= O_CREAT | O_EXCL;
	if (length) {
		snprintf(path, sizeof path, ".sized-%zu-%s", length, name);
		fd = openat(root, path, access, mode);
		*made = fd >= 0 ? MADE_SIZED : NOT_MADE;
		if (fd >= 0 || errno != EPERM)
			return fd;
	}
	snprintf(path, sizeof path, ".making-%s", name);
	fd = openat(root, path, access, mode);
	*made = fd >= 0 ? MADE : NOT_MADE;
	return fd;
}

/*
 * O_CREAT without O_EXCL is never passed on: in a sticky directory the kernel
 * refuses it for another user's file (fs.protected_regular, proc_sys_fs(5)), but
 * an existing region is to be attached.
 *
 * repeated: if there is one, O_EXCL or not, this process may have made it itself
 * just before a daemon died; the daemon judges.
 */
int name_open(int root, const char *name, int oflags, mode_t mode, size_t length, bool repeated,
	      enum made *made)
{
	int access = (oflags & O_ACCMODE) | O_CLOEXEC;
	int fd;

	*made = NOT_MADE;
	for (int tries = 0; tries < 100; tries++) {
		if (!(oflags & O_EXCL)) {
			fd = openat(root, name, access);
			if (fd >= 0 || errno != ENOENT || !(oflags & O_CREAT))
				return fd;
		}
		fd = make(root, name, access, mode, length, made);
		if (fd < 0 && errno == EEXIST && (oflags & O_EXCL) && repeated)
			fd = openat(root, name, access);
		if (fd >= 0 || errno != EEXIST || (oflags & O_EXCL))
			return fd;
	}
	errno = EAGAIN; /* somebody creates and removes it all the time */
	return -1;
}

static void path_of_identity(const unsigned char identity[MSHARE_IDENTITY], char path[64])
{
	static const char prefix[] = ".identity-", digits[] = "0123456789abcdef";
	char *at = path + sizeof prefix - 1;

	memcpy(path, prefix, sizeof prefix);
	for (int i = 0; i < MSHARE_IDENTITY; i++) {
		*at++ = digits[identity[i] >> 4];
		*at++ = digits[identity[i] & 15];
	}
	*at = '\0';
}

int name_open_identity(int root, const unsigned char identity[MSHARE_IDENTITY], int oflags)
{
	char path[64];
	int fd;

	path_of_identity(identity, path);
	fd = openat(root, path, (oflags & O_ACCMODE) | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT)
		errno = ESTALE;
	return fd;
}

int name_unlink_identity(int root, const unsigned char identity[MSHARE_IDENTITY])
{
	char path[64];

	path_of_identity(identity, path);
	return unlinkat(root, path, 0);
}

/* By its number: whoever has removed it meanwhile may have made another one. */
void name_unmake(int root, const char *name, int region)
{
	struct stat made, found;
	struct mshare_info info;
	int saved = errno;

	if (pread(region, &info, sizeof info, 0) == sizeof info && info.size == 0 &&
	    fstat(region, &made) == 0 && fstatat(root, name, &found, AT_SYMLINK_NOFOLLOW) == 0 &&
	    made.st_ino == found.st_ino)
		unlinkat(root, name, 0);
	errno = saved;
}

/* The path that led to the n-th attachment's root. */
static bool path_of_root(size_t number, char path[PATH_MAX])
{
	struct attachment *each;

	attachment_lock();
	for (each = attachment_first(); each && number > 0; each = each->next)
		number--;
	if (each)
		strcpy(path, each->root);
	attachment_unlock();
	return each;
}

/* Somebody else's mount is no better and no worse than none: while ours is away we wait. */
int name_root(const struct waiting *waiting, struct root *root)
{
	char path[PATH_MAX];
	bool gone = waiting->pause != 0;
	int why;

	if (root_use(root) == 0)
		return 0;
	why = errno;
	if (why != ENOENT && why != EPERM)
		return -1;
	for (size_t number = 0; !gone && path_of_root(number, path); number++) {
		gone = root_use_again(path, root) < 0;
		if (!gone)
			root_close(root);
	}
	errno = gone ? ENOTCONN : why;
	return -1;
}

/* The kernel knows it since the file was opened: nobody is asked. */
ino_t name_number(int region)
{
	struct statx status;

	if (statx(region, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO, &status) < 0)
		return 0;
	return status.stx_ino;
}

int name_reopen(int root, const struct attachment *attachment)
{
	static const unsigned char unknown[MSHARE_IDENTITY];
	int access = (attachment->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC, fd;

	if (memcmp(attachment->identity, unknown, sizeof unknown) != 0)
		return name_open_identity(root, attachment->identity, access);
	fd = openat(root, attachment->name, access);
	if (fd >= 0 && name_number(fd) == attachment->file)
		return fd;
	if (fd >= 0 || errno == ENOENT)
		errno = ESTALE;
	close_keeping_errno(fd);
	return -1;
}

void name_say_whose(int error)
{
	if (error == EPERM || error == EACCES)
		reason_say("only the owner of a region and root may remove its name");
}

int name_unlink(const char *name)
{
	struct waiting waiting = { 0 };
	struct root root;
	bool asked = false;
	int result;

	do {
		if (name_root(&waiting, &root) == 0) {
			result = unlinkat(root.fd, name, 0);
			root_close(&root);
			if (result == 0 || (errno == ENOENT && asked))
				return 0;
			asked |= errno == ECONNABORTED; /* it was under way */
			name_say_whose(errno);
		}
	} while (daemon_is_gone(errno) && wait_again(&waiting));
	return -1;
}

static int read_info(const char *name, struct mshare_info *info, const struct waiting *waiting)
{
	struct root root;
	ssize_t got;
	int fd;

	if (name_root(waiting, &root) < 0)
		return -1;
	fd = openat(root.fd, name, O_RDONLY | O_CLOEXEC);
	root_close(&root);
	if (fd < 0)
		return -1;
	got = read(fd, info, sizeof *info);
	close_keeping_errno(fd);
	if (got < 0)
		return -1;
	if (got != sizeof *info || info->size == 0) {
		errno = got == sizeof *info ? ENOENT : EPROTO;
		return -1;
	}
	return 0;
}

MSHARE_EXPORT int mshare_stat(const char *name, struct mshare_info *info)
{
	struct waiting waiting = { 0 };
	int result;

	reason_forget();
	if (name_check(name) < 0)
		return -1;
	if (!info) {
		errno = EFAULT;
		return -1;
	}
	do
		result = read_info(name, info, &waiting);
	while (result < 0 && daemon_is_gone(errno) && wait_again(&waiting));
	if (result < 0)
		name_explain();
	return result;
}

MSHARE_EXPORT int mshare_root(char *path, size_t size)
{
	struct root root;
	size_t length;

	if (!path) {
		errno = EFAULT;
		return -1;
	}
	if (root_find(&root) < 0)
		return -1;
	root_close(&root);
	length = strlen(root.path);
	if (length >= size) {
		errno = ERANGE;
		return -1;
	}
	memcpy(path, root.path, length + 1);
	return 0;
}
